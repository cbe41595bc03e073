//! Pages, runs of pages and sets of pages.
//!
//! A *page* is 4 KiB of guest-physical memory, named by its guest frame number ([`Gfn`]). A
//! [`PageSet`] is a bitmap over a guest's frame numbers, laid out like KVM's dirty log (bit *i* of
//! word *w* is frame 64 *w* + *i*), so that a log can be united with it word by word. An
//! [`AtomicPageSet`] is the same for several threads, and [`Heat`] counts how often pages were in a
//! set.

mod atomic;
mod heat;
mod set;

pub use atomic::AtomicPageSet;
pub use heat::Heat;
pub use set::PageSet;

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

    /// The pages of both.
    pub(crate) fn overlap(self, other: Self) -> Option<Self> {
        let first = self.first.max(other.first);
        let end = self.end().min(other.end());
        (first < end).then(|| Self::new(first, end - first))
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
#[non_exhaustive]
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
    /// is allocated from a peer's claim, so the claim has a bound (512 MiB of bitmap at the very
    /// most).
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

    /// The first part of the set that is not RAM.
    #[must_use]
    pub fn first_outside(&self, set: &PageSet) -> Option<Run> {
        let ends = std::iter::once(0).chain(self.runs.iter().map(Run::end));
        let starts = self.runs.iter().map(|run| run.first);
        ends.zip(starts.chain(std::iter::once(set.end())))
            .find_map(|(from, to)| {
                let run = set.next_run(from, u64::MAX).filter(|run| run.first < to)?;
                Some(Run::new(run.first, run.end().min(to) - run.first))
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

#[cfg(test)]
mod tests;
