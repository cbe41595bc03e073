//! What a page holds.

use super::Page;

/// What the memory is filled with, which decides how well it compresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// Incompressible words in every page.
    Random,
    /// Seven of eight filled pages are zero, the eighth incompressible; pages of the working set
    /// are 7/8 zeros.
    ZeroRich,
    /// Every other filled page is zero, the rest compress 2:1, as do the pages of the working set.
    Half,
    /// Pages beyond the working set are left alone; the working set is incompressible.
    None,
}

impl Fill {
    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::ZeroRich => "zero-rich",
            Self::Half => "half",
            Self::None => "none",
        }
    }

    pub(crate) fn parse(name: &str) -> Option<Self> {
        [Self::Random, Self::ZeroRich, Self::Half, Self::None]
            .into_iter()
            .find(|fill| fill.name() == name)
    }

    /// The shape of the pages that are written over and over.
    pub(super) fn working_set(self) -> Shape {
        match self {
            Self::Random | Self::None => Shape::Random,
            Self::ZeroRich => Shape::Sparse,
            Self::Half => Shape::Half,
        }
    }

    /// The shape of page `number` beyond the working set.
    pub(super) fn rest(self, number: u64) -> Shape {
        match self {
            Self::Random | Self::None => Shape::Random,
            Self::ZeroRich if number.is_multiple_of(8) => Shape::Random,
            Self::Half if !number.is_multiple_of(2) => Shape::Half,
            Self::ZeroRich | Self::Half => Shape::Zero,
        }
    }
}

/// How a page's words follow from its number, its generation and the seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// The header, then pseudo-random words.
    Random,
    /// The header, then every other group of 32 bytes zero.
    Half,
    /// The header, then 64 of every 512 bytes pseudo-random and the others zero.
    Sparse,
    /// Nothing but zeros, header included.
    Zero,
}

/// A word that is not what was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Corruption {
    /// The page's number in the guest's memory arena.
    pub page: u64,
    /// The generation it should be of.
    pub generation: u32,
    /// The first wrong word of its 512.
    pub word: u64,
    /// What should be there.
    pub expected: u64,
    /// What is there.
    pub found: u64,
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Mixes all bits of `x` into all bits of the result (the finaliser of SplitMix64).
pub(super) fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

impl Shape {
    fn key(seed: u64, number: u64, generation: u32) -> u64 {
        mix(mix(mix(seed).wrapping_add(number)).wrapping_add(u64::from(generation)))
    }

    /// Word `i` of the body. Cheaper than `mix`: one multiplication, as every word of every write
    /// goes through it.
    #[inline(always)]
    fn word(self, key: u64, i: u64) -> u64 {
        let present = match self {
            Self::Random => true,
            Self::Half => i & 4 == 0,
            Self::Sparse => i & 56 == 0,
            Self::Zero => false,
        };
        if !present {
            return 0;
        }
        let x = key.wrapping_add(i.wrapping_mul(GOLDEN));
        let x = (x ^ (x >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
        x ^ (x >> 32)
    }

    fn header(self, number: u64, generation: u32) -> [u64; 2] {
        match self {
            Self::Zero => [0; 2],
            _ => [number, u64::from(generation)],
        }
    }

    /// Writes the page's first `part` words, all of them in its first generation: the words behind
    /// stay as that left them.
    pub(super) fn write(
        self,
        page: &mut Page,
        seed: u64,
        number: u64,
        generation: u32,
        part: usize,
    ) {
        let key = Self::key(seed, number, generation);
        let words = if generation == 0 { page.len() } else { part };
        let (head, body) = page.split_at_mut(2);
        head.copy_from_slice(&self.header(number, generation));
        for (i, word) in (2..words as u64).zip(body) {
            *word = self.word(key, i);
        }
    }

    /// The first word that is not as [`Shape::write`] left it.
    pub(super) fn verify(
        self,
        page: &Page,
        seed: u64,
        number: u64,
        generation: u32,
        part: usize,
    ) -> Option<Corruption> {
        let keys = [generation, 0].map(|generation| Self::key(seed, number, generation));
        let (head, body) = page.split_at(2);
        let (changed, kept) = body.split_at(part.saturating_sub(2).min(body.len()));
        // No early exit in the loops: in the common case nothing differs, and this way they are
        // branch-free.
        let expected = self.header(number, generation);
        let mut difference = (head[0] ^ expected[0]) | (head[1] ^ expected[1]);
        for (i, &word) in (2..).zip(changed) {
            difference |= word ^ self.word(keys[0], i);
        }
        for (i, &word) in (part as u64..).zip(kept) {
            difference |= word ^ self.word(keys[1], i);
        }
        if difference == 0 {
            return None;
        }
        let words = expected
            .into_iter()
            .chain((2..512).map(|i| self.word(keys[usize::from(i >= part as u64)], i)));
        (0..)
            .zip(words)
            .zip(page)
            .find(|((_, expected), found)| expected != *found)
            .map(|((word, expected), &found)| Corruption {
                page: number,
                generation,
                word,
                expected,
                found,
            })
    }
}
