//! Made-up pages for tests and benchmarks, by kind of content; the same seed gives the same page.

use super::patch::Page;
use crate::page::PAGE_SIZE;

/// A kind of content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Content {
    /// Incompressible.
    Noise,
    /// Every other group of 32 bytes zero: 2:1.
    Half,
    /// 64 of every 512 bytes hold something.
    Sparse,
    /// Words of a small vocabulary.
    Text,
    /// Addresses and small numbers, as a kernel's tables have them.
    Pointers,
    /// A record of noise, over and over.
    Repeated,
    /// Noise but for each sixteenth byte: it looks regular, and zstd saves a few hundredths.
    Weak,
}

impl Content {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Noise,
        Self::Half,
        Self::Sparse,
        Self::Text,
        Self::Pointers,
        Self::Repeated,
        Self::Weak,
    ];
}

/// SplitMix64.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Makes a page.
#[must_use]
pub fn page(content: Content, seed: u64) -> Page {
    const WORDS: &[&[u8]] = &[
        b"guest ",
        b"page ",
        b"memory ",
        b"the ",
        b"of ",
        b"round ",
        b"dirty ",
        b"\n",
        b"= 0x4f; ",
        b"migration ",
        b"(",
        b") ",
        b"struct ",
        b"return ",
        b"0, 1, 2, ",
        b"source ",
    ];
    let mut state = seed.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ 0x5eed;
    let mut page = [0; PAGE_SIZE];
    let record: Vec<u64> = (0..8).map(|_| random(&mut state)).collect();
    let mut text = Vec::new();
    while content == Content::Text && text.len() < PAGE_SIZE {
        let pick = usize::try_from(random(&mut state) % WORDS.len() as u64).unwrap_or(0);
        text.extend_from_slice(WORDS[pick]);
    }
    for (index, word) in page.chunks_exact_mut(8).enumerate() {
        let noise = random(&mut state);
        let value = match content {
            Content::Weak if index % 2 == 0 => noise & !0xff | 0x55,
            Content::Noise | Content::Weak => noise,
            Content::Half if index & 4 == 0 => noise,
            Content::Sparse if index & 56 == 0 => noise,
            Content::Half | Content::Sparse => 0,
            Content::Pointers if index % 3 == 0 => 0xffff_8880_0000_0000 | (noise & 0x0fff_ffc0),
            Content::Pointers => noise & 0xfff,
            Content::Repeated => record[index % 8],
            Content::Text => {
                word.copy_from_slice(&text[8 * index..8 * index + 8]);
                continue;
            }
        };
        word.copy_from_slice(&value.to_le_bytes());
    }
    page
}
