//! Reading and writing past the page cache (`O_DIRECT`, open(2)): offsets, lengths and memory must
//! be aligned.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::RwLock;

use crate::sync;

/// Alignment of memory: no Linux block device asks for more than a page.
const MEMORY: usize = 4096;
/// Bytes that go through a bounce buffer at once.
const BOUNCE: usize = 256 << 10;

/// Bytes that begin at a page.
#[derive(Debug)]
pub(in crate::block) struct AlignedBuffer {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuffer {
    pub(in crate::block) fn new(len: usize) -> Self {
        let bytes = vec![0; len + MEMORY];
        let start = bytes.as_ptr().align_offset(MEMORY).min(MEMORY);
        Self { bytes, start, len }
    }

    pub(in crate::block) fn bytes(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

/// How a block device is read and written past the page cache.
#[derive(Debug)]
pub(super) struct Direct {
    /// Bytes of its logical block.
    block: u64,
    /// Held exclusively while a block is read, changed and written back, so that no other write to
    /// it is lost.
    writing: RwLock<()>,
}

impl Direct {
    pub(super) const fn new(block: u64) -> Self {
        Self {
            block,
            writing: RwLock::new(()),
        }
    }

    fn fits(&self, offset: u64, bytes: &[u8]) -> bool {
        let len = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        self.whole(offset, len) && bytes.as_ptr().align_offset(MEMORY) == 0
    }

    /// Whether a range is of whole blocks.
    pub(super) const fn whole(&self, offset: u64, len: u64) -> bool {
        offset.is_multiple_of(self.block) && len.is_multiple_of(self.block)
    }

    /// The blocks around a range, as much of it as goes through a bounce buffer at once: their
    /// first byte, their length, and how many bytes of the range are in them.
    fn blocks(&self, offset: u64, len: usize) -> (u64, usize, usize) {
        let block = usize::try_from(self.block).unwrap_or(BOUNCE);
        let first = offset - offset % self.block;
        let skip = usize::try_from(offset - first).unwrap_or(0);
        let part = len.min(BOUNCE - skip.min(BOUNCE - 1));
        (first, (skip + part).next_multiple_of(block), part)
    }

    pub(super) fn read(&self, file: &File, mut offset: u64, into: &mut [u8]) -> io::Result<()> {
        if self.fits(offset, into) {
            return file.read_exact_at(into, offset);
        }
        let mut rest = into;
        while !rest.is_empty() {
            let (first, len, part) = self.blocks(offset, rest.len());
            let mut bounce = AlignedBuffer::new(len);
            file.read_exact_at(bounce.bytes(), first)?;
            let skip = usize::try_from(offset - first).unwrap_or(0);
            let (now, later) = rest.split_at_mut(part);
            now.copy_from_slice(&bounce.bytes()[skip..skip + part]);
            rest = later;
            offset += u64::try_from(part).unwrap_or(0);
        }
        Ok(())
    }

    pub(super) fn write(&self, file: &File, mut offset: u64, from: &[u8]) -> io::Result<()> {
        let len = u64::try_from(from.len()).unwrap_or(u64::MAX);
        if self.whole(offset, len) {
            let _shared = sync::read(&self.writing);
            if self.fits(offset, from) {
                return file.write_all_at(from, offset);
            }
            for part in from.chunks(BOUNCE) {
                let mut bounce = AlignedBuffer::new(part.len());
                bounce.bytes().copy_from_slice(part);
                file.write_all_at(bounce.bytes(), offset)?;
                offset += u64::try_from(part.len()).unwrap_or(0);
            }
            return Ok(());
        }
        let _alone = sync::write(&self.writing);
        let mut rest = from;
        while !rest.is_empty() {
            let (first, len, part) = self.blocks(offset, rest.len());
            let mut bounce = AlignedBuffer::new(len);
            file.read_exact_at(bounce.bytes(), first)?;
            let skip = usize::try_from(offset - first).unwrap_or(0);
            let (now, later) = rest.split_at(part);
            bounce.bytes()[skip..skip + part].copy_from_slice(now);
            file.write_all_at(bounce.bytes(), first)?;
            rest = later;
            offset += u64::try_from(part).unwrap_or(0);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIZE: usize = 1 << 20;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Whatever is read and written, of blocks of any size, is what a plain array of bytes
        /// holds.
        #[test]
        fn is_an_array_of_bytes(
            shift in 9_u32..13,
            steps in proptest::collection::vec((0..SIZE / 512, 1..700_usize, any::<u8>()), 1..12),
        ) {
            let file = tempfile::tempfile().unwrap();
            file.set_len(u64::try_from(SIZE).unwrap()).unwrap();
            let direct = Direct::new(1 << shift);
            let mut model = vec![0_u8; SIZE];
            for (sector, sectors, byte) in steps {
                let (from, to) = (sector * 512, (sector + sectors).min(SIZE / 512) * 512);
                let bytes: Vec<u8> = (from..to).map(|i| byte.wrapping_add(u8::try_from(i / 7 % 251).unwrap())).collect();
                direct.write(&file, u64::try_from(from).unwrap(), &bytes).unwrap();
                model[from..to].copy_from_slice(&bytes);
                let mut back = vec![0; to - from];
                direct.read(&file, u64::try_from(from).unwrap(), &mut back).unwrap();
                prop_assert_eq!(&back, &bytes);
            }
            let mut all = vec![0; SIZE];
            direct.read(&file, 0, &mut all).unwrap();
            prop_assert!(all == model);
        }
    }

    #[test]
    fn writes_of_parts_of_one_block_are_all_kept() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let direct = Direct::new(4096);
        std::thread::scope(|s| {
            for part in 0..8_u64 {
                let (file, direct) = (&file, &direct);
                s.spawn(move || {
                    for _ in 0..50 {
                        let bytes = [u8::try_from(part).unwrap() + 1; 512];
                        direct.write(file, part * 512, &bytes).unwrap();
                    }
                });
            }
        });
        let mut all = [0; 4096];
        direct.read(&file, 0, &mut all).unwrap();
        for (part, bytes) in all.chunks(512).enumerate() {
            assert!(bytes.iter().all(|b| usize::from(*b) == part + 1));
        }
    }
}
