//! One bit per page, set by many threads, read and cleared by words.

use std::sync::Arc;

use ferry_migration::page::{AtomicPageSet, Run};
use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};

use super::PAGE_SIZE;

/// Pages of a region that were dirtied: an [`AtomicPageSet`] that `vm-memory` marks. `vm-memory`'s
/// own bitmap can only be read bit by bit or drained into a new vector; a migration reads and
/// clears it by words, in place, many times.
///
/// Clones share the bits. Pages are counted from the region's first.
#[derive(Debug, Clone, Default)]
pub struct DirtyBitmap(Arc<AtomicPageSet>);

/// The page of a word's first bit.
const fn page_of(word: usize) -> u64 {
    word as u64 * 64
}

impl DirtyBitmap {
    /// Sets `count` bits from `page`; what is past the end is ignored.
    pub(crate) fn set_pages(&self, page: u64, count: u64) {
        self.0.insert_run(Run::new(page, count));
    }

    pub(crate) fn clear_all(&self) {
        self.0.clear();
    }

    /// ORs the words from `first` on into `out`, which must not be longer than what is left.
    pub(crate) fn or_into(&self, first: usize, out: &mut [u64]) {
        self.0.or_into(page_of(first), out);
    }

    /// Sets all bits that are set in `from`.
    pub(crate) fn or_from(&self, first: usize, from: &[u64]) {
        self.0.insert_words(page_of(first), from);
    }

    /// Clears exactly the bits that are set in `mask`.
    pub(crate) fn and_not(&self, first: usize, mask: &[u64]) {
        self.0.remove_words(page_of(first), mask);
    }
}

impl<'a> WithBitmapSlice<'a> for DirtyBitmap {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for DirtyBitmap {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len == 0 {
            return;
        }
        let first = to_u64(offset) / PAGE_SIZE;
        let last = to_u64(offset.saturating_add(len - 1)) / PAGE_SIZE;
        self.set_pages(first, last - first + 1);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.0.contains(to_u64(offset) / PAGE_SIZE)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

impl NewBitmap for DirtyBitmap {
    fn with_len(len: usize) -> Self {
        Self(Arc::new(AtomicPageSet::new(
            to_u64(len).div_ceil(PAGE_SIZE),
        )))
    }
}

fn to_u64(n: usize) -> u64 {
    // usize is never wider than 64 bits on the hosts this builds for.
    u64::try_from(n).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_follow_a_naive_oracle() {
        let pages = 200usize;
        let bitmap = DirtyBitmap::with_len(pages * 4096);
        let mut naive = vec![false; pages];
        // A small fixed sequence of ranges that start, end and lie across word edges.
        for (page, count) in [
            (0, 1),
            (63, 2),
            (64, 64),
            (130, 0),
            (190, 100),
            (5, 3),
            (127, 1),
        ] {
            bitmap.set_pages(page, count);
            for p in page..(page + count).min(200) {
                naive[usize::try_from(p).unwrap()] = true;
            }
        }
        let mut words = vec![0; 4];
        bitmap.or_into(0, &mut words);
        for (p, want) in naive.iter().enumerate() {
            assert_eq!(words[p / 64] >> (p % 64) & 1 == 1, *want, "page {p}");
            assert_eq!(bitmap.dirty_at(p * 4096 + 17), *want);
        }
        assert_eq!(words[3] >> 8, 0, "nothing past the end");
        bitmap.and_not(1, &[1]);
        assert!(!bitmap.dirty_at(64 * 4096));
        assert!(bitmap.dirty_at(65 * 4096));
        bitmap.or_from(1, &[1]);
        assert!(bitmap.dirty_at(64 * 4096));
    }

    #[test]
    fn writes_mark_every_page_they_touch() {
        let bitmap = DirtyBitmap::with_len(10 * 4096);
        bitmap.mark_dirty(4095, 2);
        bitmap.mark_dirty(3 * 4096, 0);
        bitmap.mark_dirty(9 * 4096, usize::MAX);
        let dirty: Vec<_> = (0..10).filter(|p| bitmap.dirty_at(p * 4096)).collect();
        assert_eq!(dirty, [0, 1, 9]);
    }
}
