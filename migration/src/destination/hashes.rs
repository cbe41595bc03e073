//! What comparing hashes of pages has found. Hashes come while the guest still runs at the source,
//! and in the pause of what has changed since.
//!
//! ```text
//!  not compared ──hash──▶ equal or different ──the page is written again──▶ not compared
//! ```

use crate::page::{AtomicPageSet, Gfn, PAGE_SIZE, PageSet, RamLayout, Run};
use crate::verify::page_hash;

/// For each page whether its bytes here, as they are now, were compared with the source's.
///
/// A page that is written after it was compared counts as not compared: so a guest is equal only if
/// each of its pages was compared after it was last written.
#[derive(Debug, Default)]
pub(super) struct Hashes {
    equal: AtomicPageSet,
    different: AtomicPageSet,
}

/// Why a guest is not known to be equal.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Unequal {
    /// So many pages differ, this one first.
    Differs {
        /// How many pages.
        pages: u64,
        /// The first of them.
        first: Gfn,
    },
    /// Pages were not compared.
    NotCompared,
}

impl Hashes {
    /// For a guest whose memory ends at `end`.
    pub(super) fn new(end: Gfn) -> Self {
        Self {
            equal: AtomicPageSet::new(end),
            different: AtomicPageSet::new(end),
        }
    }

    /// Compares a page with the source's hash of it.
    pub(super) fn compare(&self, gfn: Gfn, page: &[u8; PAGE_SIZE], hash: &[u8]) {
        let (found, other) = if page_hash(gfn, page).to_le_bytes() == hash {
            (&self.equal, &self.different)
        } else {
            (&self.different, &self.equal)
        };
        other.remove_run(Run::new(gfn, 1));
        found.insert(gfn);
    }

    /// Pages were written. To be called after the last byte of them.
    pub(super) fn written(&self, runs: &[Run]) {
        for run in runs {
            self.equal.remove_run(*run);
            self.different.remove_run(*run);
        }
    }

    /// Whether all pages but those that are to follow were compared, and equal.
    pub(super) fn check(
        &self,
        layout: &RamLayout,
        to_follow: Option<&PageSet>,
    ) -> Result<(), Unequal> {
        let mut different = self.different.to_set();
        let mut here = layout.all();
        if let Some(pages) = to_follow {
            different.subtract(pages);
            here.subtract(pages);
        }
        if let Some(first) = different.next(0) {
            let pages = different.len();
            return Err(Unequal::Differs { pages, first });
        }
        here.subtract(&self.equal.to_set());
        if here.is_empty() {
            Ok(())
        } else {
            Err(Unequal::NotCompared)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_compared_last_is_equal() {
        let layout = RamLayout::new(vec![Run::new(0, 100)]).unwrap();
        let hashes = Hashes::new(100);
        let page = [7; PAGE_SIZE];
        let good = |gfn| page_hash(gfn, &page).to_le_bytes();
        assert_eq!(hashes.check(&layout, None), Err(Unequal::NotCompared));
        (0..100).for_each(|gfn| hashes.compare(gfn, &page, &good(gfn)));
        assert_eq!(hashes.check(&layout, None), Ok(()));
        // The hash of another page, as if two were swapped.
        hashes.compare(41, &page, &good(42));
        let differs = Unequal::Differs {
            pages: 1,
            first: 41,
        };
        assert_eq!(hashes.check(&layout, None), Err(differs));
        // It comes again, and is compared again.
        hashes.written(&[Run::new(41, 2)]);
        assert_eq!(hashes.check(&layout, None), Err(Unequal::NotCompared));
        hashes.compare(41, &page, &good(41));
        let mut missing = PageSet::new(100);
        missing.insert(42);
        assert_eq!(hashes.check(&layout, Some(&missing)), Ok(()));
        hashes.compare(42, &page, &good(42));
        assert_eq!(hashes.check(&layout, None), Ok(()));
    }
}
