//! A writer that verifies, on a disk: blocks all over it, in an order without pattern, each with
//! its number and its generation in every word, past the guest's page cache. What was written is
//! read again before it is written over.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use crate::content::content;

/// `O_DIRECT` of x86-64 Linux.
const O_DIRECT: i32 = 0o40_000;
/// Size of a block in bytes, and how many are used at most: 256 MiB.
const BLOCK: usize = 4096;
const MAX_BLOCKS: u64 = 65536;
/// Writes between two lines of output, and between two flushes.
const LINE_EVERY: u64 = 256;
const FLUSH_EVERY: u64 = 32;

/// A block, aligned as O_DIRECT wants it.
#[repr(align(4096))]
struct Block([u8; BLOCK]);

impl Block {
    fn fill(&mut self, number: u64, generation: u64) {
        for (i, word) in (0u64..).zip(self.0.chunks_exact_mut(8)) {
            word.copy_from_slice(&content(number, generation, i).to_le_bytes());
        }
    }

    /// The first byte that is not as [`Block::fill`] left it.
    fn check(&self, number: u64, generation: u64) -> Option<u64> {
        let mut words = (0u64..).zip(self.0.chunks_exact(8));
        words
            .find(|(i, word)| **word != content(number, generation, *i).to_le_bytes())
            .map(|(i, _)| i * 8)
    }
}

/// `init disk PATH`: writes and verifies for ever; ends only when the disk fails or is not what was
/// written.
pub fn run(path: &str) -> Result<(), String> {
    let failed =
        |what: &'static str| move |e: io::Error| format!("the disk cannot be {what} ({e})");
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(O_DIRECT)
        .open(path)
        .map_err(|e| format!("{path} cannot be opened ({e})"))?;
    let bytes = file.seek(SeekFrom::End(0)).map_err(failed("measured"))?;
    let blocks = (bytes / u64::try_from(BLOCK).unwrap_or(1)).min(MAX_BLOCKS);
    if blocks == 0 {
        return Err(format!("{path} is smaller than a block"));
    }
    println!("ferry-disk: start path={path} blocks={blocks}");
    let mut generations = vec![0u64; usize::try_from(blocks).unwrap_or(0)];
    let mut block = Block([0; BLOCK]);
    let mut state = 1;
    for written in 1u64.. {
        state = content(state, written, 0);
        let number = state % blocks;
        let Some(generation) = usize::try_from(number)
            .ok()
            .and_then(|n| generations.get_mut(n))
        else {
            continue;
        };
        step(&file, &mut block, number, generation)?;
        if written % FLUSH_EVERY == 0 {
            file.sync_data().map_err(failed("flushed"))?;
        }
        if written % LINE_EVERY == 0 {
            println!("ferry-disk: writes={written} corrupt=0");
        }
    }
    Ok(())
}

/// Verifies a block if it was written before, and writes it anew.
fn step(file: &File, block: &mut Block, number: u64, generation: &mut u64) -> Result<(), String> {
    let at = number * u64::try_from(BLOCK).unwrap_or(1);
    if *generation > 0 {
        file.read_exact_at(&mut block.0, at)
            .map_err(|e| format!("block {number} cannot be read ({e})"))?;
        if let Some(byte) = block.check(number, *generation) {
            return Err(format!(
                "CORRUPT: byte {byte} of block {number} is not what generation {generation} wrote"
            ));
        }
    }
    *generation += 1;
    block.fill(number, *generation);
    file.write_all_at(&block.0, at)
        .map_err(|e| format!("block {number} cannot be written ({e})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_of_another_generation_place_or_with_a_flipped_bit_is_found() {
        let mut block = Block([0; BLOCK]);
        block.fill(7, 3);
        assert_eq!(block.check(7, 3), None);
        assert_eq!(block.check(7, 2), Some(0));
        assert_eq!(block.check(8, 3), Some(0));
        block.0[4095] ^= 1;
        assert_eq!(block.check(7, 3), Some(4088));
    }

    #[test]
    fn a_lost_write_is_corruption() {
        let path = std::env::temp_dir().join(format!("ferry-disk-{}", std::process::id()));
        std::fs::write(&path, vec![0; 4 * BLOCK]).unwrap();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        let mut block = Block([0; BLOCK]);
        let mut generation = 0;
        for _ in 0..3 {
            step(&file, &mut block, 2, &mut generation).unwrap();
        }
        generation = 4;
        assert!(
            step(&file, &mut block, 2, &mut generation)
                .unwrap_err()
                .contains("CORRUPT")
        );
        std::fs::remove_file(&path).unwrap();
    }
}
