//! A set of pages that one thread changes.

use super::{Gfn, Run};

/// A set of pages: a bitmap over frames `0..end`.
#[derive(PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    end: Gfn,
}

impl Clone for PageSet {
    fn clone(&self) -> Self {
        Self {
            words: self.words.clone(),
            end: self.end,
        }
    }

    /// Into the memory that this set has already: sets are copied every round.
    fn clone_from(&mut self, source: &Self) {
        self.words.clone_from(&source.words);
        self.end = source.end;
    }
}

impl std::fmt::Debug for PageSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PageSet({} of {})", self.len(), self.end)
    }
}

/// Index into the words; a frame below `end` always fits (see
/// [`RamLayout::MAX_GFN`](super::RamLayout::MAX_GFN)).
fn word_of(gfn: Gfn) -> usize {
    usize::try_from(gfn / 64).unwrap_or(usize::MAX)
}

/// A mask of the bits `from..to` of a word, `0 ≤ from < to ≤ 64`.
const fn mask(from: u64, to: u64) -> u64 {
    (u64::MAX << from) & (u64::MAX >> (64 - to))
}

/// The words that a run touches, each with a mask of its bits there, clipped to the end of a set.
fn parts(run: Run, end: Gfn) -> impl Iterator<Item = (usize, u64)> {
    let end = run.end().min(end);
    let mut at = run.first;
    std::iter::from_fn(move || {
        (at < end).then(|| {
            let upto = end.min((at / 64 + 1) * 64);
            let part = (word_of(at), mask(at % 64, upto - at / 64 * 64));
            at = upto;
            part
        })
    })
}

impl PageSet {
    /// The empty set over frames `0..end`.
    #[must_use]
    pub fn new(end: Gfn) -> Self {
        Self {
            words: vec![0; word_of(end.div_ceil(64) * 64)],
            end,
        }
    }

    /// The frame after the last that the set can hold.
    #[must_use]
    pub const fn end(&self) -> Gfn {
        self.end
    }

    /// The bitmap.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// How many pages are in the set.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.words
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum()
    }

    /// How many pages are in each of at most `most` equal parts of `0..end`; the last part may be
    /// smaller.
    #[must_use]
    pub fn len_by_part(&self, most: usize) -> Vec<u64> {
        let words = self.words.len().div_ceil(most.max(1)).max(1);
        let len = |part: &[u64]| part.iter().map(|word| u64::from(word.count_ones())).sum();
        self.words.chunks(words).map(len).collect()
    }

    /// How many pages of a run are in the set.
    #[must_use]
    pub fn count_in(&self, run: Run) -> u64 {
        parts(run, self.end)
            .map(|(word, mask)| u64::from((self.words[word] & mask).count_ones()))
            .sum()
    }

    /// Whether no page is in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// Whether the page is in the set; pages beyond the end are not.
    #[must_use]
    pub fn contains(&self, gfn: Gfn) -> bool {
        gfn < self.end && self.words[word_of(gfn)] & (1 << (gfn % 64)) != 0
    }

    /// Adds a page; says whether it was new. Pages beyond the end are ignored.
    pub fn insert(&mut self, gfn: Gfn) -> bool {
        if gfn >= self.end {
            return false;
        }
        let word = &mut self.words[word_of(gfn)];
        let bit = 1 << (gfn % 64);
        let new = *word & bit == 0;
        *word |= bit;
        new
    }

    /// Removes a page; says whether it was there.
    pub fn remove(&mut self, gfn: Gfn) -> bool {
        if gfn >= self.end {
            return false;
        }
        let word = &mut self.words[word_of(gfn)];
        let bit = 1 << (gfn % 64);
        let there = *word & bit != 0;
        *word &= !bit;
        there
    }

    /// Adds or removes a page. Pages beyond the end are ignored.
    pub fn set(&mut self, gfn: Gfn, there: bool) {
        if gfn < self.end {
            let word = &mut self.words[word_of(gfn)];
            *word = *word & !(1 << (gfn % 64)) | u64::from(there) << (gfn % 64);
        }
    }

    /// Applies `f(word, mask)` to every word that the run touches, clipped to the end.
    fn for_words(&mut self, run: Run, f: impl Fn(&mut u64, u64)) {
        for (word, mask) in parts(run, self.end) {
            f(&mut self.words[word], mask);
        }
    }

    /// Adds a run, clipped to the end.
    pub fn insert_run(&mut self, run: Run) {
        self.for_words(run, |word, mask| *word |= mask);
    }

    /// Removes a run.
    pub fn remove_run(&mut self, run: Run) {
        self.for_words(run, |word, mask| *word &= !mask);
    }

    /// Unites with a part of a log: `words[0]` holds the frames from `first`, a multiple of 64.
    /// Bits beyond the end are dropped.
    pub fn insert_words(&mut self, first: Gfn, words: &[u64]) {
        debug_assert_eq!(first % 64, 0, "a log starts at a word");
        let start = word_of(first).min(self.words.len());
        for (mine, theirs) in self.words[start..].iter_mut().zip(words) {
            *mine |= theirs;
        }
        self.trim();
    }

    /// Clears the bits beyond the end in the last word.
    fn trim(&mut self) {
        if !self.end.is_multiple_of(64)
            && let Some(last) = self.words.last_mut()
        {
            *last &= mask(0, self.end % 64);
        }
    }

    /// Adds all pages of the other. Where that has none nothing is written: a new set costs the
    /// memory that is used of it.
    pub fn union_with(&mut self, other: &Self) {
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            if *theirs != 0 {
                *mine |= theirs;
            }
        }
        self.trim();
    }

    /// Removes all pages of the other.
    pub fn subtract(&mut self, other: &Self) {
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine &= !theirs;
        }
    }

    /// Becomes the pages that the other has and this set has not, in the memory of this set.
    pub fn become_difference(&mut self, other: &Self) {
        for (index, mine) in self.words.iter_mut().enumerate() {
            *mine = other.words.get(index).copied().unwrap_or(0) & !*mine;
        }
        self.trim();
    }

    /// How many pages both have.
    #[must_use]
    pub fn count_common(&self, other: &Self) -> u64 {
        let both = self.words.iter().zip(&other.words);
        both.map(|(mine, theirs)| u64::from((mine & theirs).count_ones()))
            .sum()
    }

    /// Keeps the pages that the other has too.
    pub fn intersect_with(&mut self, other: &Self) {
        for (index, mine) in self.words.iter_mut().enumerate() {
            *mine &= other.words.get(index).copied().unwrap_or(0);
        }
    }

    /// Empties the set.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// The first page at or after `gfn`.
    #[must_use]
    pub fn next(&self, gfn: Gfn) -> Option<Gfn> {
        if gfn >= self.end {
            return None;
        }
        let mut index = word_of(gfn);
        let mut word = self.words[index] & (u64::MAX << (gfn % 64));
        loop {
            if word != 0 {
                return Some(index as u64 * 64 + u64::from(word.trailing_zeros()));
            }
            index += 1;
            word = *self.words.get(index)?;
        }
    }

    /// The first page at or after `gfn` that is *not* in the set (`end` when all are).
    #[must_use]
    pub fn next_absent(&self, gfn: Gfn) -> Gfn {
        let mut index = word_of(gfn);
        let mut below = gfn % 64;
        while let Some(&word) = self.words.get(index) {
            let absent = !word & (u64::MAX << below);
            if absent != 0 {
                return (index as u64 * 64 + u64::from(absent.trailing_zeros())).min(self.end);
            }
            below = 0;
            index += 1;
        }
        self.end
    }

    /// The last page at or before `gfn`.
    #[must_use]
    pub fn previous(&self, gfn: Gfn) -> Option<Gfn> {
        let gfn = gfn.min(self.end.checked_sub(1)?);
        let mut index = word_of(gfn);
        let mut word = self.words[index] & mask(0, gfn % 64 + 1);
        loop {
            if word != 0 {
                return Some(index as u64 * 64 + 63 - u64::from(word.leading_zeros()));
            }
            index = index.checked_sub(1)?;
            word = self.words[index];
        }
    }

    /// The first run at or after `gfn`, of at most `limit` pages.
    #[must_use]
    pub fn next_run(&self, gfn: Gfn, limit: u64) -> Option<Run> {
        let first = self.next(gfn)?;
        let end = self
            .next_absent(first)
            .min(first.saturating_add(limit.max(1)));
        Some(Run::new(first, end - first))
    }

    /// The run that ends at the last page at or before `gfn`: its last `limit` pages at most.
    #[must_use]
    pub fn previous_run(&self, gfn: Gfn, limit: u64) -> Option<Run> {
        let last = self.previous(gfn)?;
        let lowest = (last + 1).saturating_sub(limit.max(1));
        let mut index = word_of(last);
        // Absent pages at or below `last`: the highest of them bounds the run from below.
        let mut absent = !self.words[index] & mask(0, last % 64 + 1);
        let first = loop {
            if absent != 0 {
                break index as u64 * 64 + 64 - u64::from(absent.leading_zeros());
            }
            if index as u64 * 64 <= lowest {
                break lowest;
            }
            index -= 1;
            absent = !self.words[index];
        };
        let first = first.max(lowest);
        Some(Run::new(first, last + 1 - first))
    }

    /// All runs in address order, maximal.
    pub fn runs(&self) -> impl Iterator<Item = Run> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            let run = self.next_run(at, u64::MAX)?;
            at = run.end();
            Some(run)
        })
    }

    /// All pages in address order.
    pub fn iter(&self) -> impl Iterator<Item = Gfn> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            let gfn = self.next(at)?;
            at = gfn + 1;
            Some(gfn)
        })
    }
}
