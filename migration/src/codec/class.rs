//! What kind of content a page has, estimated at a fraction of what any coder costs.
//!
//! MECOM (Jin 2009) sorts pages into similar words, high regularity and low regularity by a
//! dictionary of recent words. Here: a page in which many words are zero is packed against zeros;
//! one whose bytes repeat, or whose words do, is worth a general coder; the rest looks like noise
//! and goes as it is.

use super::patch::Page;
use crate::page::PAGE_SIZE;

/// The coder that suffices for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Class {
    /// At least a third of its words are zero: packing them away gets most of what there is to get.
    Sparse,
    /// Repetitive bytes or words: for zstd.
    Regular,
    /// Looks like noise: no coder helps.
    Noise,
}

const WORDS: usize = PAGE_SIZE / 8;
/// Words looked at for their bytes: spread over the page, so that no single record decides.
const SAMPLED: u32 = 64;
/// Bytes in a sample.
const BYTES: u32 = 8 * SAMPLED;
/// Pairs of equal bytes that noise has among so many: each pair is equal with a probability of
/// 1/256.
const NOISE: u32 = BYTES * (BYTES - 1) / 2 / 256;

/// Estimates a page.
#[must_use]
pub fn classify(page: &Page) -> Class {
    if is_sparse(page) {
        Class::Sparse
    } else if is_regular(page) {
        Class::Regular
    } else {
        Class::Noise
    }
}

/// Whether at least a third of a page's words are zero.
#[must_use]
pub fn is_sparse(page: &Page) -> bool {
    let (words, _) = page.as_chunks::<8>();
    let zeros = words.iter().filter(|word| **word == [0; 8]).count();
    3 * zeros >= WORDS
}

/// Whether a page repeats itself.
#[must_use]
pub fn is_regular(page: &Page) -> bool {
    let (words, _) = page.as_chunks::<8>();
    const EVERY: usize = 4;
    let equal_at = |distance: usize| {
        let pairs = words.iter().zip(&words[distance..]).step_by(EVERY);
        EVERY * pairs.filter(|(a, b)| a == b).count()
    };
    // An eighth of the words can be said by pointing at another.
    repeats(words) || 8 * equal_at(1).max(equal_at(8)) >= WORDS
}

/// Whether bytes of a sample are equal more often than those of noise (its collision entropy,
/// without the logarithm).
fn repeats(words: &[[u8; 8]]) -> bool {
    // Four tables, so that a byte that repeats does not wait for its own count.
    let mut counts = [[0_u8; 256]; 4];
    for word in words.iter().step_by(WORDS / SAMPLED as usize) {
        for (data_channel, byte) in word.iter().enumerate() {
            let count = &mut counts[data_channel % 4][usize::from(*byte)];
            *count = count.saturating_add(1);
        }
    }
    let [a, b, c, d] = &counts;
    let pairs: u32 = (0..256)
        .map(|byte| {
            let n =
                u32::from(a[byte]) + u32::from(b[byte]) + u32::from(c[byte]) + u32::from(d[byte]);
            n * n.saturating_sub(1) / 2
        })
        .sum();
    // Half as many again: base64 has four times as many, and noise less than 1.2 times.
    2 * pairs > 3 * NOISE
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::content::{Content, page};

    #[test]
    fn contents_are_told_apart() {
        let expected = [
            (Content::Noise, Class::Noise),
            (Content::Half, Class::Sparse),
            (Content::Sparse, Class::Sparse),
            (Content::Text, Class::Regular),
            (Content::Pointers, Class::Regular),
            (Content::Repeated, Class::Regular),
            (Content::Weak, Class::Regular),
        ];
        for (content, class) in expected {
            for seed in 0..500 {
                assert_eq!(classify(&page(content, seed)), class, "{content:?} {seed}");
            }
        }
        assert_eq!(classify(&[0; PAGE_SIZE]), Class::Sparse);
        assert_eq!(classify(&[1; PAGE_SIZE]), Class::Regular);
    }
}
