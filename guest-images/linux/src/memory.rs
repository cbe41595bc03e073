//! A process that uses memory: some of it for good, which it verifies, and some for a while, which
//! is then free and not zero.

use std::time::Duration;

/// Bytes of a page, and pages of a MiB.
const PAGE: usize = 4096;
const MIB: usize = 256;
/// Between two verifications.
const PAUSE: Duration = Duration::from_millis(500);

/// What belongs into word `word` of page `page`: a mixture (splitmix64), so that no coder makes it
/// smaller.
fn content(page: usize, word: usize) -> u64 {
    let seed = u64::try_from(page * (PAGE / 8) + word).unwrap_or(0) + 1;
    let mut z = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn filled(mib: usize) -> Vec<u64> {
    let words = mib * MIB * PAGE / 8;
    let mut memory = Vec::with_capacity(words);
    memory.extend((0..words).map(|at| content(at / (PAGE / 8), at % (PAGE / 8))));
    memory
}

/// The first page that is not as [`filled`] left it.
fn wrong(memory: &[u64]) -> Option<usize> {
    let as_filled = |at: &usize| memory[*at] == content(at / (PAGE / 8), at % (PAGE / 8));
    let at = (0..memory.len()).find(|at| !as_filled(at));
    at.map(|at| at / (PAGE / 8))
}

/// `init memory KEEP FREE`: fills FREE MiB and gives them back to the kernel, keeps KEEP MiB, and
/// verifies these for ever.
pub fn run(keep: &str, free: &str) -> Result<(), String> {
    let number = |text: &str| {
        text.parse::<usize>()
            .map_err(|_| format!("`{text}` is not a number of MiB"))
    };
    let (keep, free) = (number(keep)?, number(free)?);
    let kept = filled(keep);
    // Large allocations are mappings of their own: dropped, their pages are the kernel's at once.
    drop(std::hint::black_box(filled(free)));
    println!("ferry-memory: kept={keep} freed={free}");
    for times in 1u64.. {
        if let Some(page) = wrong(&kept) {
            return Err(format!("CORRUPT: page {page} is not what was written"));
        }
        println!("ferry-memory: verified={times}");
        std::thread::sleep(PAUSE);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flipped_bit_is_found() {
        let mut memory = filled(1);
        assert_eq!((memory.len(), wrong(&memory)), (131_072, None));
        memory[512 * 3 + 7] ^= 1 << 40;
        assert_eq!(wrong(&memory), Some(3));
    }
}
