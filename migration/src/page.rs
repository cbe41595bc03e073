//! Pages, runs of pages and sets of pages.
//!
//! A *page* is 4 KiB of guest-physical memory, named by its guest frame number ([`Gfn`]). A
//! [`PageSet`] is a bitmap over a guest's frame numbers, laid out like KVM's dirty log (bit *i*
//! of word *w* is frame 64 *w* + *i*), so that a log can be united with it word by word.

use serde::{Deserialize, Serialize};

/// log2 of the page size.
pub const PAGE_SHIFT: u32 = 12;
/// Bytes in a page.
pub const PAGE_SIZE: usize = 1 << PAGE_SHIFT;
/// Bytes in a page, for byte counts.
pub const PAGE_BYTES: u64 = 1 << PAGE_SHIFT;

/// A guest frame number: guest-physical address divided by the page size.
pub type Gfn = u64;

/// A run of consecutive pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Run {
    /// The first frame.
    pub first: Gfn,
    /// How many frames; a run in use is never empty.
    pub count: u64,
}

impl Run {
    /// A run of `count` pages from `first`.
    #[must_use]
    pub const fn new(first: Gfn, count: u64) -> Self {
        Self { first, count }
    }

    /// The frame after the last, saturating: a run that came from outside may claim anything.
    #[must_use]
    pub const fn end(&self) -> Gfn {
        self.first.saturating_add(self.count)
    }

    /// Bytes in the run, saturating.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.count.saturating_mul(PAGE_BYTES)
    }
}

/// Which frame numbers of a guest are RAM: sorted, disjoint, not empty.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<Run>", into = "Vec<Run>")]
pub struct RamLayout {
    runs: Vec<Run>,
}

/// Why a list of runs is no RAM layout.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// No memory at all.
    #[error("the RAM layout is empty")]
    Empty,
    /// More regions than any machine has.
    #[error("the RAM layout has {0} regions; at most {max} are allowed", max = RamLayout::MAX_REGIONS)]
    TooMany(usize),
    /// A region is empty, overlaps its predecessor, is out of order, or ends beyond the limit.
    #[error(
        "RAM region {index} (frame {first:#x}, {count} pages) is empty, out of order or beyond {limit:#x}",
        limit = RamLayout::MAX_GFN
    )]
    Region {
        /// Which one.
        index: usize,
        /// Its first frame.
        first: Gfn,
        /// Its length in pages.
        count: u64,
    },
}

impl RamLayout {
    /// More regions than this are refused.
    pub const MAX_REGIONS: usize = 64;
    /// Frames from here on are refused (16 TiB of guest-physical space): a bitmap over the layout
    /// is allocated from a peer's claim, so the claim has a bound (512 MiB of bitmap at the very most).
    pub const MAX_GFN: Gfn = 1 << 32;

    /// Checks and takes a list of regions.
    ///
    /// # Errors
    /// [`LayoutError`] when the regions are not sorted, disjoint and within bounds.
    pub fn new(runs: Vec<Run>) -> Result<Self, LayoutError> {
        if runs.is_empty() {
            return Err(LayoutError::Empty);
        }
        if runs.len() > Self::MAX_REGIONS {
            return Err(LayoutError::TooMany(runs.len()));
        }
        let mut free_from = 0;
        for (index, run) in runs.iter().enumerate() {
            if run.count == 0 || run.first < free_from || run.end() > Self::MAX_GFN {
                return Err(LayoutError::Region {
                    index,
                    first: run.first,
                    count: run.count,
                });
            }
            free_from = run.end();
        }
        Ok(Self { runs })
    }

    /// The regions, in order.
    #[must_use]
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Pages of RAM.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.runs.iter().map(|run| run.count).sum()
    }

    /// The frame after the last: the size of the bitmaps.
    #[must_use]
    pub fn end(&self) -> Gfn {
        self.runs.last().map_or(0, Run::end)
    }

    /// Whether the whole run is RAM, within one region (a run never spans two: they are not
    /// adjacent in the host's address space).
    #[must_use]
    pub fn contains(&self, run: Run) -> bool {
        run.count > 0
            && self.runs.iter().any(|region| {
                run.first >= region.first
                    && run.first < region.end()
                    && run.count <= region.end() - run.first
            })
    }

    /// All pages of RAM as a set.
    #[must_use]
    pub fn all(&self) -> PageSet {
        let mut set = PageSet::new(self.end());
        for run in &self.runs {
            set.insert_run(*run);
        }
        set
    }
}

impl TryFrom<Vec<Run>> for RamLayout {
    type Error = LayoutError;
    fn try_from(runs: Vec<Run>) -> Result<Self, LayoutError> {
        Self::new(runs)
    }
}

impl From<RamLayout> for Vec<Run> {
    fn from(layout: RamLayout) -> Self {
        layout.runs
    }
}

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

/// Index into the words; a frame below `end` always fits (see [`RamLayout::MAX_GFN`]).
fn word_of(gfn: Gfn) -> usize {
    usize::try_from(gfn / 64).unwrap_or(usize::MAX)
}

/// A mask of the bits `from..to` of a word, `0 ≤ from < to ≤ 64`.
const fn mask(from: u64, to: u64) -> u64 {
    (u64::MAX << from) & (u64::MAX >> (64 - to))
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

    /// Applies `f(word, mask)` to every word that the run touches, clipped to the end.
    fn for_words(&mut self, run: Run, f: impl Fn(&mut u64, u64)) {
        let mut at = run.first.min(self.end);
        let end = run.end().min(self.end);
        while at < end {
            let word_end = (at / 64 + 1) * 64;
            let upto = end.min(word_end);
            f(
                &mut self.words[word_of(at)],
                mask(at % 64, upto - at / 64 * 64),
            );
            at = upto;
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

    /// Adds all pages of the other.
    pub fn union_with(&mut self, other: &Self) {
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine |= theirs;
        }
        self.trim();
    }

    /// Removes all pages of the other.
    pub fn subtract(&mut self, other: &Self) {
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine &= !theirs;
        }
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

/// How often a page was found dirty: saturating counters, halved now and then so that the past
/// fades. Used to send pages that are dirtied often late in a round
/// (dynamic page transfer reordering, Svärd 2012).
#[derive(Clone, Debug)]
pub struct Heat {
    counts: Vec<u8>,
    collections: u32,
}

impl Heat {
    /// Counters are halved after this many collections.
    const HALF_LIFE: u32 = 32;

    /// Cold pages `0..end`.
    #[must_use]
    pub fn new(end: Gfn) -> Self {
        Self {
            counts: vec![0; usize::try_from(end).unwrap_or(usize::MAX)],
            collections: 0,
        }
    }

    /// Counts one collection of the dirty log.
    pub fn record(&mut self, dirty: &PageSet) {
        self.collections += 1;
        if self.collections.is_multiple_of(Self::HALF_LIFE) {
            for count in &mut self.counts {
                *count /= 2;
            }
        }
        for gfn in dirty.iter() {
            if let Some(count) = usize::try_from(gfn)
                .ok()
                .and_then(|i| self.counts.get_mut(i))
            {
                *count = count.saturating_add(1);
            }
        }
    }

    /// How often the page was found dirty, lately.
    #[must_use]
    pub fn of(&self, gfn: Gfn) -> u8 {
        usize::try_from(gfn)
            .ok()
            .and_then(|i| self.counts.get(i))
            .copied()
            .unwrap_or(0)
    }
}

#[cfg(test)]
mod tests;
