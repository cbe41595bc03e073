//! A set of pages that several data channels change at once.

use crate::page::{Gfn, Run};
use std::sync::atomic::{AtomicU64, Ordering};

/// One bit for each page. Bits are independent: nothing is ordered by them, the barrier between rounds does that.
#[derive(Debug, Default)]
pub struct Marks {
    words: Box<[AtomicU64]>,
}

impl Marks {
    /// An empty set of pages below `end`.
    #[must_use]
    pub fn new(end: Gfn) -> Self {
        let words = usize::try_from(end.div_ceil(64)).unwrap_or(0);
        Self {
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    fn word(&self, gfn: Gfn) -> Option<(&AtomicU64, u64)> {
        let word = self.words.get(usize::try_from(gfn / 64).ok()?)?;
        Some((word, 1 << (gfn % 64)))
    }

    /// Whether the page is in the set; pages beyond its end never are.
    #[must_use]
    pub fn contains(&self, gfn: Gfn) -> bool {
        self.word(gfn)
            .is_some_and(|(word, bit)| word.load(Ordering::Relaxed) & bit != 0)
    }

    /// Adds a page; `true` when it was there already.
    pub fn insert(&self, gfn: Gfn) -> bool {
        self.word(gfn)
            .is_some_and(|(word, bit)| word.fetch_or(bit, Ordering::Relaxed) & bit != 0)
    }

    /// The first part of a run whose pages are all in the set.
    #[must_use]
    pub fn first_run(&self, within: Run) -> Option<Run> {
        let end = within.end().min(self.words.len() as u64 * 64);
        let first = self.next(within.first, end, 0)?;
        let end = self.next(first, end, u64::MAX).unwrap_or(end);
        Some(Run::new(first, end - first))
    }

    /// The first page from `gfn` on, below `end`, that is in the set, or with all bits to `flip` the first that is not.
    fn next(&self, mut gfn: Gfn, end: Gfn, flip: u64) -> Option<Gfn> {
        while gfn < end {
            let (word, _) = self.word(gfn)?;
            let rest = (word.load(Ordering::Relaxed) ^ flip) >> (gfn % 64);
            if rest != 0 {
                let found = gfn + u64::from(rest.trailing_zeros());
                return (found < end).then_some(found);
            }
            gfn += 64 - gfn % 64;
        }
        None
    }

    /// Adds the pages of a run, or takes them off.
    pub fn set_run(&self, run: Run, present: bool) {
        let mut gfn = run.first;
        while gfn < run.end() {
            let Some((word, _)) = self.word(gfn) else {
                return;
            };
            let in_word = (64 - gfn % 64).min(run.end() - gfn);
            let mask = (u64::MAX >> (64 - in_word)) << (gfn % 64);
            if present {
                word.fetch_or(mask, Ordering::Relaxed);
            } else {
                word.fetch_and(!mask, Ordering::Relaxed);
            }
            gfn += in_word;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn as_a_set_of_numbers(steps in proptest::collection::vec((0..200_u64, 1..150_u64, 0..3_u8), 0..40)) {
            let marks = Marks::new(256);
            let mut naive = BTreeSet::new();
            for (first, count, what) in steps {
                match what {
                    0 => prop_assert_eq!(marks.insert(first), !naive.insert(first)),
                    _ => {
                        let run = Run::new(first, count.min(256 - first));
                        marks.set_run(run, what == 1);
                        for gfn in run.first..run.end() {
                            if what == 1 { naive.insert(gfn); } else { naive.remove(&gfn); }
                        }
                    }
                }
                for gfn in 0..256 {
                    prop_assert_eq!(marks.contains(gfn), naive.contains(&gfn));
                }
                let within = Run::new(first, count);
                let inside: Vec<_> = naive.range(within.first..within.end()).copied().collect();
                let together = inside.iter().zip(inside.first().copied().unwrap_or(0)..).take_while(|(a, b)| *a == b).count();
                let expected = inside.first().map(|first| Run::new(*first, together as u64));
                prop_assert_eq!(marks.first_run(within), expected);
            }
            prop_assert!(!marks.contains(u64::MAX) && !marks.insert(1 << 40));
            marks.set_run(Run::new(250, 1000), true);
        }
    }
}
