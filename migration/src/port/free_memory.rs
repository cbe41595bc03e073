//! Giving memory back to the source's host while the guest runs at the destination.

use super::PortError;
use crate::page::{Gfn, PageSet, Run};
use std::sync::Mutex;

/// Guest memory that can be given back piece by piece, once the guest and its pages are elsewhere.
pub trait FreeMemory: Sync {
    /// Pages of a piece, which begins at a multiple of as many. Part of a huge page would be
    /// overwritten and not given back.
    fn piece(&self) -> u64;

    /// Gives pages back that are all of a piece, or all of it that is RAM; what they hold is lost.
    ///
    /// # Errors
    /// When the host does not take them; they are as they were then.
    fn free(&self, pages: Run) -> Result<(), PortError>;

    /// What was given back. It is kept as long as the memory: a later connection has to know.
    fn freed(&self) -> &Mutex<FreedPages>;
}

/// Pages that the destination has and that are not here any more.
#[derive(Debug, Default)]
pub struct FreedPages {
    pages: Option<PageSet>,
    /// By frame number, with verification only: what the pages were.
    hashes: Vec<u64>,
}

impl FreedPages {
    /// Whether the guest's memory is all here.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pages.as_ref().is_none_or(PageSet::is_empty)
    }

    /// Whether this page was given back.
    #[must_use]
    pub fn contains(&self, gfn: Gfn) -> bool {
        self.pages.as_ref().is_some_and(|pages| pages.contains(gfn))
    }

    /// The first of these pages that was given back.
    pub(crate) fn first_of(&self, pages: &PageSet) -> Option<Gfn> {
        let freed = self.pages.as_ref()?;
        pages.iter().find(|gfn| freed.contains(*gfn))
    }

    /// The hash of a page that was given back, where one was kept.
    pub(crate) fn hash(&self, gfn: Gfn) -> Option<u64> {
        let at = usize::try_from(gfn).ok()?;
        self.contains(gfn).then(|| self.hashes.get(at).copied())?
    }

    /// Keeps the hashes of pages that are about to be given back; `end` is the frame after the
    /// guest's last.
    pub(crate) fn keep_hashes(&mut self, pages: Run, hashes: &[u64], end: Gfn) {
        self.hashes.resize(usize::try_from(end).unwrap_or(0), 0);
        let first = usize::try_from(pages.first).unwrap_or(usize::MAX);
        for (kept, hash) in self.hashes.iter_mut().skip(first).zip(hashes) {
            *kept = *hash;
        }
    }

    /// These were given back.
    pub(crate) fn insert(&mut self, pages: Run, end: Gfn) {
        let all = self.pages.get_or_insert_with(|| PageSet::new(end));
        all.insert_run(pages);
    }
}
