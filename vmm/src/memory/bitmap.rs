//! One bit per page, set by many threads, read and cleared by words.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};

use super::PAGE_SIZE;

/// Pages of a region that were dirtied. `vm-memory`'s own bitmap can only be read bit by bit or
/// drained into a new vector; a migration reads and clears it by words, in place, many times.
///
/// Clones share the bits.
///
/// Ordering: a writer sets the bit after its write to memory (Release), a sender clears the bit
/// before it reads memory (AcqRel). Whichever way they interleave, either the sender reads the new
/// bytes or the bit is set afterwards.
#[derive(Debug, Clone, Default)]
pub struct DirtyBitmap {
    words: Arc<[AtomicU64]>,
    pages: u64,
}

impl DirtyBitmap {
    /// Sets `count` bits from `page`; what is past the end is ignored.
    pub(crate) fn set_pages(&self, page: u64, count: u64) {
        let end = page.saturating_add(count).min(self.pages);
        let mut at = page;
        while at < end {
            let next = ((at / 64 + 1) * 64).min(end);
            let bits = next - at;
            let mask = (u64::MAX >> (64 - bits)) << (at % 64);
            if let Some(word) = self.word(at / 64) {
                word.fetch_or(mask, Ordering::AcqRel);
            }
            at = next;
        }
    }

    pub(crate) fn clear_all(&self) {
        for word in self.words.iter() {
            word.store(0, Ordering::Release);
        }
    }

    /// ORs the words from `first` on into `out`, which must not be longer than what is left.
    pub(crate) fn or_into(&self, first: usize, out: &mut [u64]) {
        for (own, out) in self.words.iter().skip(first).zip(out) {
            *out |= own.load(Ordering::Acquire);
        }
    }

    /// Sets all bits that are set in `from`.
    pub(crate) fn or_from(&self, first: usize, from: &[u64]) {
        for (own, from) in self.words.iter().skip(first).zip(from) {
            if *from != 0 {
                own.fetch_or(*from, Ordering::AcqRel);
            }
        }
    }

    /// Clears exactly the bits that are set in `mask`.
    pub(crate) fn and_not(&self, first: usize, mask: &[u64]) {
        for (own, mask) in self.words.iter().skip(first).zip(mask) {
            // A locked read-modify-write costs far more than this test, and most words are clean.
            if *mask != 0 && own.load(Ordering::Relaxed) & mask != 0 {
                own.fetch_and(!mask, Ordering::AcqRel);
            }
        }
    }

    fn word(&self, index: u64) -> Option<&AtomicU64> {
        self.words.get(usize::try_from(index).ok()?)
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
        let page = to_u64(offset) / PAGE_SIZE;
        self.word(page / 64)
            .is_some_and(|w| w.load(Ordering::Acquire) & (1 << (page % 64)) != 0)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

impl NewBitmap for DirtyBitmap {
    fn with_len(len: usize) -> Self {
        let pages = to_u64(len).div_ceil(PAGE_SIZE);
        let words = usize::try_from(pages.div_ceil(64)).unwrap_or(0);
        Self {
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
            pages,
        }
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
