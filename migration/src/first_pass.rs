//! A first pass over memory that learns, while it sends, what the guest is writing to.
//!
//! Dynamic page transfer reordering (Svärd 2012) sends pages last that were dirtied often, and in
//! the first pass it is not known yet which these are. So the dirty log is cleared before the pass,
//! and looked at a few times during it:
//!
//! ```text
//!  left ──▶ regions, those least written to first ──▶ their pages that were not written ──▶ a step of the round
//!    ▲                                               their pages that were ─▶ the round's end
//!    └────────── the dirty log: written while others were sent ◀──────────────┘
//! ```
//!
//! A region counts, and not the page alone: who writes to one page in three of a region will soon
//! have written to the others.

use crate::page::{Gfn, PageSet, Run};

/// Pages of a region: 2 MiB.
const REGION: usize = 512;
const REGION_WORDS: usize = REGION / 64;
/// The pass is made in about so many steps.
const STEPS: u64 = 16;
/// Pages that are worth one request to the dirty log, so that the guest never waits long for it:
/// 64 MiB.
pub(crate) const REQUEST_PAGES: u64 = 16 << 10;
/// A step has at least so many pages.
const FEWEST: u64 = 64;

/// What is left of a first pass.
#[derive(Debug)]
pub(crate) struct FirstPass {
    left: PageSet,
    /// Those of them that were not written: for each step anew.
    calm: PageSet,
    step: u64,
}

impl FirstPass {
    pub(crate) fn new(pages: PageSet) -> Self {
        Self {
            calm: PageSet::new(pages.end()),
            step: (pages.len() / STEPS).max(FEWEST),
            left: pages,
        }
    }

    /// Pages that were not taken.
    pub(crate) const fn left(&self) -> &PageSet {
        &self.left
    }

    /// Takes the next step's pages, of whole regions where nothing was written to them; none when
    /// nothing is left. `log` is what was written since the pass began, to those that are left and
    /// to pages that were sent.
    pub(crate) fn next(&mut self, log: &PageSet) -> PageSet {
        self.take(log, self.step)
    }

    /// As [`next`](Self::next), a step of about `room` pages.
    pub(crate) fn take(&mut self, log: &PageSet, mut room: u64) -> PageSet {
        self.calm.clone_from(&self.left);
        self.calm.subtract(log);
        // What is written all the time goes last, and then all of it is as good as any.
        let from = if self.calm.is_empty() {
            &self.left
        } else {
            &self.calm
        };
        let left = self.left.words().chunks(REGION_WORDS);
        let written = left
            .zip(log.words().chunks(REGION_WORDS))
            .map(|(left, log)| {
                left.iter()
                    .zip(log)
                    .map(|(l, w)| (l & w).count_ones())
                    .sum::<u32>()
            });
        let parts = from.words().chunks(REGION_WORDS);
        let mut regions: Vec<_> = written
            .zip(parts.enumerate())
            .filter(|(_, (_, words))| count(words) > 0)
            .collect();
        regions.sort_unstable();
        let mut step = PageSet::new(self.left.end());
        for (_, (region, words)) in regions {
            if room == 0 {
                break;
            }
            step.insert_words((region * REGION) as Gfn, words);
            room = room.saturating_sub(count(words).into());
        }
        self.left.subtract(&step);
        step
    }

    /// What is left, in parts that are worth one request to the dirty log, so that the guest never
    /// waits long for it.
    pub(crate) fn parts(&self) -> impl Iterator<Item = Vec<Run>> + '_ {
        const RUNS: usize = 256;
        let mut at = 0;
        std::iter::from_fn(move || {
            let mut part = Vec::new();
            let mut room = REQUEST_PAGES;
            while let Some(run) = self.left.next_run(at, room) {
                at = run.end();
                room -= run.count;
                part.push(run);
                if room == 0 || part.len() == RUNS {
                    break;
                }
            }
            (!part.is_empty()).then_some(part)
        })
    }
}

/// Pages in a part of a set.
fn count(words: &[u64]) -> u32 {
    words.iter().map(|word| word.count_ones()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn set(end: Gfn, runs: &[Run]) -> PageSet {
        let mut set = PageSet::new(end);
        runs.iter().for_each(|run| set.insert_run(*run));
        set
    }

    /// The first half is written to, here and there: once that is known the second goes first, then
    /// what was not written.
    #[test]
    fn a_warm_region_waits_for_the_cold_ones() {
        let end = 32 * REGION as Gfn;
        let mut pass = FirstPass::new(set(end, &[Run::new(0, end)]));
        let first = pass.next(&PageSet::new(end));
        assert_eq!(first, set(end, &[Run::new(0, end / 16)]));
        let written: Vec<Run> = (0..end / 2).step_by(7).map(|g| Run::new(g, 1)).collect();
        let log = set(end, &written);
        let mut cold = PageSet::new(end);
        for _ in 0..8 {
            cold.union_with(&pass.next(&log));
        }
        assert_eq!(cold, set(end, &[Run::new(end / 2, end / 2)]));
        let mut last = PageSet::new(end);
        while !pass.left().is_empty() {
            last = pass.next(&log);
            let mut calm = pass.left().clone();
            calm.subtract(&log);
            assert!(calm.is_empty() || !last.iter().any(|gfn| log.contains(gfn)));
        }
        assert!(last.iter().all(|gfn| log.contains(gfn)));
    }

    proptest! {
        /// Each page goes once, in not many more steps than were wanted, whatever is written
        /// meanwhile.
        #[test]
        fn every_page_goes_once(
            runs in proptest::collection::vec((0..5000_u64, 1..900_u64), 0..8),
            logs in proptest::collection::vec(proptest::collection::vec((0..5500_u64, 1..300_u64), 0..6), 1..20),
        ) {
            let runs: Vec<Run> = runs.into_iter().map(|(first, count)| Run::new(first, count)).collect();
            let all = set(6000, &runs);
            let mut pass = FirstPass::new(all.clone());
            let listed: Vec<Run> = pass.parts().flatten().collect();
            prop_assert_eq!(&set(6000, &listed), &all);
            let mut gone = PageSet::new(6000);
            let mut steps = 0;
            for log in logs.iter().cycle() {
                let log: Vec<Run> = log.iter().map(|(first, count)| Run::new(*first, *count)).collect();
                let before = pass.left().len();
                let step = pass.next(&set(6000, &log));
                if step.is_empty() {
                    break;
                }
                prop_assert_eq!(pass.left().len() + step.len(), before);
                let mut again = gone.clone();
                again.intersect_with(&step);
                prop_assert!(again.is_empty());
                gone.union_with(&step);
                steps += 1;
            }
            prop_assert!(gone == all && pass.left().is_empty());
            // A step is short where only what was not written was left, which the next log may
            // change.
            prop_assert!(steps <= 2 * STEPS + 2 + logs.len() as u64);
        }
    }
}
