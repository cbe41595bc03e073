//! A set of pages, cut into batches in the order in which they go out.

use super::BATCH_PAGES;
use crate::first_pass::REQUEST_PAGES;
use crate::page::{Gfn, Heat, PageSet, Run};
use crate::policy::SendOrder;

/// Cuts a set into batches in the wanted order.
#[derive(Debug)]
pub(crate) struct Batches {
    /// What is to be sent, part by part, the next part last.
    parts: Vec<PageSet>,
    at: Gfn,
    size: u64,
    left: u64,
    /// Of a pass that sends last what is being written: pages that will be appended.
    to_come: Option<u64>,
    /// Pages that held nothing when it was looked.
    empty: Option<PageSet>,
}

impl Batches {
    /// Pages found dirty more often than this are equally hot.
    const HOTTEST: u8 = 8;

    /// In batches of at most `size` pages.
    pub(crate) fn new(pages: PageSet, order: SendOrder, heat: &Heat, size: u64) -> Self {
        let left = pages.len();
        let parts = match order {
            SendOrder::Address => vec![pages],
            SendOrder::ColdFirst => Self::by_heat(&pages, heat),
        };
        Self {
            parts,
            at: 0,
            size: size.clamp(1, BATCH_PAGES),
            left,
            to_come: None,
            empty: None,
        }
    }

    /// These pages held nothing when it was looked: many of them together are a batch of its own,
    /// of up to [`REQUEST_PAGES`], since there is next to nothing to send.
    pub(crate) fn with_empty(mut self, empty: Option<PageSet>) -> Self {
        self.empty = empty;
        self
    }

    /// How many pages from the first of the run on seem to hold nothing.
    fn empty_from(&self, run: Run) -> u64 {
        let holds = self
            .empty
            .as_ref()
            .filter(|empty| empty.contains(run.first));
        holds.map_or(0, |empty| {
            run.count.min(empty.next_absent(run.first) - run.first)
        })
    }

    /// In batches of at most `size` pages from now on.
    pub(crate) fn resize(&mut self, size: u64) {
        self.size = size.clamp(1, BATCH_PAGES);
    }

    /// So many pages will be appended, and what comes later is likelier to be sent again.
    pub(crate) const fn before(mut self, to_come: u64) -> Self {
        self.to_come = Some(to_come);
        self
    }

    /// Pages after those that were taken which are likelier to be sent again.
    pub(crate) fn warmer(&self) -> u64 {
        self.to_come.map_or(0, |to_come| self.left + to_come)
    }

    /// Pages that were not taken.
    pub(crate) const fn left(&self) -> u64 {
        self.left
    }

    /// Pages that will be appended.
    pub(crate) fn to_come(&self) -> u64 {
        self.to_come.unwrap_or(0)
    }

    /// These go after all others.
    pub(crate) fn append(&mut self, pages: PageSet) {
        let count = pages.len();
        self.left += count;
        self.to_come = self.to_come.map(|to_come| to_come.saturating_sub(count));
        self.parts.insert(0, pages);
    }

    /// Parts by heat, the hottest first in the list: it is sent from its end.
    fn by_heat(pages: &PageSet, heat: &Heat) -> Vec<PageSet> {
        // Classes double: 0, 1, 2–3, 4–7, 8 and more.
        let class = |gfn| (u8::BITS - heat.of(gfn).min(Self::HOTTEST).leading_zeros()) as usize;
        let classes = (u8::BITS - Self::HOTTEST.leading_zeros()) as usize + 1;
        let mut parts = vec![PageSet::new(pages.end()); classes];
        for gfn in pages.iter() {
            parts[classes - 1 - class(gfn)].insert(gfn);
        }
        parts
    }

    /// The next batch; `false` when there is none.
    pub(crate) fn next(&mut self, runs: &mut Vec<Run>) -> bool {
        runs.clear();
        let mut room = self.size;
        while room > 0 {
            let Some(part) = self.parts.last() else { break };
            let Some(mut run) = part.next_run(self.at, REQUEST_PAGES) else {
                // A batch never spans two parts: within it, runs are in address order.
                if !runs.is_empty() {
                    break;
                }
                self.parts.pop();
                self.at = 0;
                continue;
            };
            let empty = self.empty_from(run);
            if empty > self.size && !runs.is_empty() {
                break;
            }
            run.count = if empty > self.size {
                room = empty;
                empty
            } else {
                run.count.min(room)
            };
            self.at = run.end();
            room -= run.count;
            self.left -= run.count;
            runs.push(run);
        }
        !runs.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn set(end: Gfn, runs: &[(Gfn, u64)]) -> PageSet {
        let mut set = PageSet::new(end);
        let runs = runs.iter().map(|(first, count)| Run::new(*first, *count));
        runs.for_each(|run| set.insert_run(run));
        set
    }

    proptest! {
        /// Each page is in one batch, and a batch is small unless all of it seems to hold nothing.
        #[test]
        fn batches_take_each_page_once(
            pages in prop::collection::vec((0..60_000_u64, 1..5_000_u64), 1..8),
            empty in prop::collection::vec((0..60_000_u64, 1..30_000_u64), 0..8),
            size in 1..=BATCH_PAGES,
        ) {
            let end = 60_000;
            let (pages, empty) = (set(end, &pages), set(end, &empty));
            let mut batches = Batches::new(pages.clone(), SendOrder::Address, &Heat::new(end), size)
                .with_empty(Some(empty.clone()));
            let (mut runs, mut taken) = (Vec::new(), PageSet::new(end));
            while batches.next(&mut runs) {
                let count: u64 = runs.iter().map(|run| run.count).sum();
                let holes: u64 = runs.iter().map(|run| empty.count_in(*run)).sum();
                prop_assert!(count <= size || runs.len() == 1 && holes == count && count <= REQUEST_PAGES);
                for run in &runs {
                    prop_assert_eq!(taken.count_in(*run), 0);
                    taken.insert_run(*run);
                }
            }
            prop_assert_eq!(batches.left(), 0);
            prop_assert!(taken == pages);
        }
    }
}
