//! A set of pages that several threads change at once.

use super::{Gfn, PageSet, Run};
use std::sync::atomic::{AtomicU64, Ordering};

/// A set of pages `0..end`, one bit each, laid out like a [`PageSet`](super::PageSet).
///
/// Changes are `AcqRel` and reads `Acquire`. So a thread that writes a page and then inserts it
/// races with one that removes it and then reads the page without losing the write: the reader sees
/// the new bytes, or the page is in the set again.
#[derive(Debug, Default)]
pub struct AtomicPageSet {
    words: Box<[AtomicU64]>,
    end: Gfn,
}

impl AtomicPageSet {
    /// An empty set of pages below `end`.
    #[must_use]
    pub fn new(end: Gfn) -> Self {
        let words = usize::try_from(end.div_ceil(64)).unwrap_or(usize::MAX);
        Self {
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
            end,
        }
    }

    /// The frame after the last that the set can hold.
    #[must_use]
    pub const fn end(&self) -> Gfn {
        self.end
    }

    fn word(&self, gfn: Gfn) -> Option<&AtomicU64> {
        self.words.get(usize::try_from(gfn / 64).ok()?)
    }

    /// The word of a page and the page's bit in it; `None` beyond the end.
    fn bit(&self, gfn: Gfn) -> Option<(&AtomicU64, u64)> {
        let word = self.word(gfn).filter(|_| gfn < self.end)?;
        Some((word, 1 << (gfn % 64)))
    }

    /// Whether the page is in the set; pages beyond its end never are.
    #[must_use]
    pub fn contains(&self, gfn: Gfn) -> bool {
        self.bit(gfn)
            .is_some_and(|(word, bit)| word.load(Ordering::Acquire) & bit != 0)
    }

    /// Adds a page; says whether it was new. Pages beyond the end are ignored.
    pub fn insert(&self, gfn: Gfn) -> bool {
        self.bit(gfn)
            .is_some_and(|(word, bit)| word.fetch_or(bit, Ordering::AcqRel) & bit == 0)
    }

    /// Applies `f(word, mask)` to every word that the run touches, clipped to the end.
    fn for_words(&self, run: Run, f: impl Fn(&AtomicU64, u64)) {
        let end = run.end().min(self.end);
        let mut at = run.first;
        while at < end {
            let next = ((at / 64 + 1) * 64).min(end);
            let mask = (u64::MAX >> (64 - (next - at))) << (at % 64);
            if let Some(word) = self.word(at) {
                f(word, mask);
            }
            at = next;
        }
    }

    /// Adds a run, clipped to the end.
    pub fn insert_run(&self, run: Run) {
        self.for_words(run, |word, mask| {
            word.fetch_or(mask, Ordering::AcqRel);
        });
    }

    /// Removes a run.
    pub fn remove_run(&self, run: Run) {
        self.for_words(run, |word, mask| {
            word.fetch_and(!mask, Ordering::AcqRel);
        });
    }

    /// The first part of a run whose pages are all in the set.
    #[must_use]
    pub fn first_run(&self, within: Run) -> Option<Run> {
        let end = within.end().min(self.end);
        let first = self.next(within.first, end, 0)?;
        let end = self.next(first, end, u64::MAX).unwrap_or(end);
        Some(Run::new(first, end - first))
    }

    /// The first page from `gfn` on, below `end`, that is in the set, or with all bits to `flip`
    /// the first that is not.
    fn next(&self, mut gfn: Gfn, end: Gfn, flip: u64) -> Option<Gfn> {
        while gfn < end {
            let word = self.word(gfn)?;
            let rest = (word.load(Ordering::Acquire) ^ flip) >> (gfn % 64);
            if rest != 0 {
                let found = gfn + u64::from(rest.trailing_zeros());
                return (found < end).then_some(found);
            }
            gfn += 64 - gfn % 64;
        }
        None
    }

    /// The words that hold the frames from `first`, a multiple of 64, on.
    fn words_from(&self, first: Gfn) -> impl Iterator<Item = &AtomicU64> {
        debug_assert_eq!(first % 64, 0, "a log starts at a word");
        let skip = usize::try_from(first / 64).unwrap_or(usize::MAX);
        self.words.iter().skip(skip)
    }

    /// The pages that are in the set now.
    #[must_use]
    pub fn to_set(&self) -> PageSet {
        let mut words = vec![0; self.words.len()];
        self.or_into(0, &mut words);
        let mut set = PageSet::new(self.end);
        set.insert_words(0, &words);
        set
    }

    /// Unites `words`, whose first bit is the frame `first`, a multiple of 64, with this set.
    pub fn or_into(&self, first: Gfn, words: &mut [u64]) {
        for (own, word) in self.words_from(first).zip(words) {
            *word |= own.load(Ordering::Acquire);
        }
    }

    /// Adds the pages of `words`, whose first bit is the frame `first`, a multiple of 64. Bits
    /// beyond the end are dropped.
    pub fn insert_words(&self, first: Gfn, words: &[u64]) {
        for ((own, word), at) in self.words_from(first).zip(words).zip((first..).step_by(64)) {
            let word = match self.end - at {
                inside @ ..64 => word & !(u64::MAX << inside),
                _ => *word,
            };
            if word != 0 {
                own.fetch_or(word, Ordering::AcqRel);
            }
        }
    }

    /// Removes the pages of `words`, whose first bit is the frame `first`, a multiple of 64, and no
    /// other.
    pub fn remove_words(&self, first: Gfn, words: &[u64]) {
        for (own, word) in self.words_from(first).zip(words) {
            // A locked read-modify-write costs far more than this test, and most words are clean.
            if *word != 0 && own.load(Ordering::Relaxed) & word != 0 {
                own.fetch_and(!word, Ordering::AcqRel);
            }
        }
    }

    /// Empties the set.
    pub fn clear(&self) {
        for word in &self.words {
            word.store(0, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const END: Gfn = 200;

    fn words_of(set: &BTreeSet<Gfn>, first: Gfn, count: usize) -> Vec<u64> {
        let mut words = vec![0; count];
        for gfn in set.range(first..first + 64 * count as u64) {
            words[((gfn - first) / 64) as usize] |= 1 << (gfn % 64);
        }
        words
    }

    proptest! {
        #[test]
        fn as_a_set_of_numbers(steps in proptest::collection::vec((0..220_u64, 1..150_u64, 0..6_u8, any::<u64>()), 0..40)) {
            let set = AtomicPageSet::new(END);
            let mut naive: BTreeSet<Gfn> = BTreeSet::new();
            for (first, count, what, bits) in steps {
                let run = Run::new(first, count);
                let start = first / 64 * 64;
                let listed = (0..64).filter(|bit| bits >> bit & 1 == 1).map(|bit| start + bit);
                match what {
                    0 => prop_assert_eq!(set.insert(first), first < END && naive.insert(first)),
                    1 => { set.insert_run(run); naive.extend(first..run.end()); }
                    2 => { set.remove_run(run); naive.retain(|gfn| !(first..run.end()).contains(gfn)); }
                    3 => { set.insert_words(start, &[bits]); naive.extend(listed); }
                    4 => { set.remove_words(start, &[bits]); listed.for_each(|gfn| { naive.remove(&gfn); }); }
                    _ => { set.clear(); naive.clear(); }
                }
                naive.retain(|gfn| *gfn < END);
                for gfn in 0..END + 100 {
                    prop_assert_eq!(set.contains(gfn), naive.contains(&gfn));
                }
                let mut words = vec![0; 2];
                set.or_into(start, &mut words);
                prop_assert_eq!(words, words_of(&naive, start, 2));
                let inside: Vec<_> = naive.range(first..run.end()).copied().collect();
                let together = inside.iter().zip(inside.first().copied().unwrap_or(0)..).take_while(|(a, b)| *a == b).count();
                let expected = inside.first().map(|first| Run::new(*first, together as u64));
                prop_assert_eq!(set.first_run(run), expected);
                prop_assert!(set.to_set().iter().eq(naive.iter().copied()));
            }
            prop_assert!(!set.contains(u64::MAX) && !set.insert(1 << 40));
            set.insert_run(Run::new(190, u64::MAX));
            prop_assert!(set.contains(END - 1) && !set.contains(END));
        }
    }
}
