//! Which parts of a disk were written: for a copy of the disk that is made while the guest uses it.

use std::sync::RwLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::sync::{read, write};

/// Bytes that one bit stands for.
pub const BLOCK: u64 = 64 << 10;

/// A bitmap of written blocks of 64 KiB, off at first.
///
/// A write is marked when it is done and before the guest sees its completion. So a caller that
/// [takes](Self::take) the bits and then copies the blocks has the newest bytes, or finds the bit
/// set again.
#[derive(Debug, Default)]
pub struct WrittenBlocks {
    bits: RwLock<Option<Vec<AtomicU64>>>,
}

impl WrittenBlocks {
    /// Begins with no block marked, for a disk of `bytes`.
    pub fn start(&self, bytes: u64) {
        let words = bytes.div_ceil(BLOCK).div_ceil(64);
        let words = usize::try_from(words).unwrap_or(0);
        let bits = (0..words).map(|_| AtomicU64::new(0)).collect();
        *write(&self.bits) = Some(bits);
    }

    /// Forgets all.
    pub fn stop(&self) {
        *write(&self.bits) = None;
    }

    /// The blocks written since the last time, as words: bit `i` of word `j` is block `64 j + i`.
    /// They count as not written afterwards. `None` when it is off.
    #[must_use]
    pub fn take(&self) -> Option<Vec<u64>> {
        let bits = read(&self.bits);
        bits.as_ref()
            .map(|words| words.iter().map(|w| w.swap(0, Ordering::AcqRel)).collect())
    }

    /// Marks blocks again that were taken and could not be copied.
    pub fn put_back(&self, words: &[u64]) {
        let bits = read(&self.bits);
        for (own, word) in bits.iter().flatten().zip(words) {
            own.fetch_or(*word, Ordering::AcqRel);
        }
    }

    pub(super) fn mark(&self, offset: u64, len: u64) {
        let bits = read(&self.bits);
        let (Some(words), Some(last)) = (bits.as_ref(), len.checked_sub(1)) else {
            return;
        };
        let end = u64::try_from(words.len())
            .unwrap_or(u64::MAX)
            .saturating_mul(64);
        let last = (offset.saturating_add(last) / BLOCK).min(end.saturating_sub(1));
        for block in offset / BLOCK..=last {
            let word = usize::try_from(block / 64).ok().and_then(|w| words.get(w));
            if let Some(word) = word {
                word.fetch_or(1 << (block % 64), Ordering::AcqRel);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_touched_block_is_marked_once() {
        let written = WrittenBlocks::default();
        written.mark(0, 1);
        assert_eq!(written.take(), None, "off");
        written.start(100 * BLOCK);
        written.mark(BLOCK - 1, 2);
        written.mark(70 * BLOCK, BLOCK);
        written.mark(99 * BLOCK, u64::MAX / 2);
        written.mark(5 * BLOCK, 0);
        assert_eq!(
            written.take(),
            Some(vec![0b11, 1 << 6 | 1 << 35 | u64::MAX << 36])
        );
        assert_eq!(written.take(), Some(vec![0, 0]));
        written.put_back(&[1 << 9, 0]);
        assert_eq!(written.take(), Some(vec![1 << 9, 0]));
        written.stop();
        assert_eq!(written.take(), None);
    }
}
