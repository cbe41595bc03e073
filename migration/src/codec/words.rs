//! Pages that are mostly zero: a map of the words that are not, and those words.
//!
//! ```text
//!  map u8: which of the page's 8 groups of 64 words hold anything
//!  for each of those: which of its words do, u64
//!  for each of those: the word
//! ```
//!
//! As quick for zeros that are scattered as for zeros that lie together, and at most 65 bytes more
//! than the words themselves; a general coder finds little more in such pages.

use super::patch::Page;
use crate::page::PAGE_SIZE;

const WORD: usize = 8;
const GROUPS: usize = 8;
const GROUP: usize = 64 * WORD;
/// Words of which a page must have fewer to be packed: two thirds.
const MOST_WORDS: usize = PAGE_SIZE / WORD * 2 / 3;

/// The words of each group that are not zero, by bits.
fn maps(page: &Page) -> [u64; GROUPS] {
    let (groups, _) = page.as_chunks::<GROUP>();
    let mut maps = [0; GROUPS];
    for (map, group) in maps.iter_mut().zip(groups) {
        let (words, _) = group.as_chunks::<WORD>();
        for (bit, word) in words.iter().enumerate() {
            *map |= u64::from(u64::from_le_bytes(*word) != 0) << bit;
        }
    }
    maps
}

/// Appends a page of which at least a third of the words are zero; `false`, and nothing, for
/// another.
pub fn pack(page: &Page, out: &mut Vec<u8>) -> bool {
    let maps = maps(page);
    let words: u32 = maps.iter().map(|map| map.count_ones()).sum();
    if words as usize > MOST_WORDS {
        return false;
    }
    let top = maps
        .iter()
        .enumerate()
        .fold(0, |top, (group, map)| top | u8::from(*map != 0) << group);
    out.push(top);
    for map in maps.iter().filter(|map| **map != 0) {
        out.extend_from_slice(&map.to_le_bytes());
    }
    // Every word is written, and those that are zero are written over by the next.
    let mut packed = [0; PAGE_SIZE + WORD];
    let mut length = 0;
    let (words, _) = page.as_chunks::<WORD>();
    for word in words {
        packed[length..length + WORD].copy_from_slice(word);
        length += if *word == [0; WORD] { 0 } else { WORD };
    }
    out.extend_from_slice(&packed[..length]);
    true
}

/// Writes the words to a page of zeros; `false` when the bytes are no packed page, which then holds
/// a part.
pub fn unpack(bytes: &[u8], page: &mut Page) -> bool {
    let Some((&top, mut rest)) = bytes.split_first() else {
        return false;
    };
    let mut maps = [0; GROUPS];
    for (group, map) in maps.iter_mut().enumerate() {
        if top >> group & 1 == 0 {
            continue;
        }
        let Some((bytes, after)) = rest.split_first_chunk::<WORD>() else {
            return false;
        };
        *map = u64::from_le_bytes(*bytes);
        rest = after;
        if *map == 0 {
            return false;
        }
    }
    let (words, odd) = rest.as_chunks::<WORD>();
    let listed: u32 = maps.iter().map(|map| map.count_ones()).sum();
    if !odd.is_empty() || words.len() != listed as usize {
        return false;
    }
    let mut words = words.iter();
    let (groups, _) = page.as_chunks_mut::<GROUP>();
    for (mut map, group) in maps.into_iter().zip(groups) {
        let (into, _) = group.as_chunks_mut::<WORD>();
        while map != 0 {
            if let Some(word) = words.next() {
                into[map.trailing_zeros() as usize] = *word;
            }
            map &= map - 1;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::content::{self, Content};
    use proptest::prelude::*;

    fn check(page: &Page) -> Option<usize> {
        let words = page.chunks_exact(WORD).filter(|w| **w != [0; WORD]).count();
        let mut out = vec![9];
        if !pack(page, &mut out) {
            assert_eq!(out, [9]);
            assert!(words > PAGE_SIZE / WORD * 2 / 3);
            return None;
        }
        assert!(out.len() - 1 <= 65 + WORD * words);
        let mut back = [0; PAGE_SIZE];
        assert!(unpack(&out[1..], &mut back));
        assert!(back == *page, "another page came out");
        for cut in 1..out.len() - 1 {
            assert!(!unpack(&out[1..cut], &mut [0; PAGE_SIZE]), "cut at {cut}");
        }
        out.push(0);
        assert!(!unpack(&out[1..], &mut [0; PAGE_SIZE]));
        Some(out.len() - 2)
    }

    #[test]
    fn sizes() {
        assert_eq!(check(&[0; PAGE_SIZE]), Some(1));
        let mut one = [0; PAGE_SIZE];
        one[PAGE_SIZE - 1] = 1;
        assert_eq!(check(&one), Some(1 + 8 + 8));
        assert_eq!(check(&content::page(Content::Half, 1)), Some(1 + 64 + 2048));
        assert_eq!(check(&content::page(Content::Noise, 1)), None);
    }

    proptest! {
        #[test]
        fn what_is_packed_is_unpacked(words in proptest::collection::btree_map(0..512_usize, any::<u64>(), 0..400)) {
            let mut page = [0; PAGE_SIZE];
            for (at, word) in words {
                page[at * WORD..][..WORD].copy_from_slice(&word.to_le_bytes());
            }
            check(&page);
        }

        #[test]
        fn any_bytes_are_unpacked_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut page = [0; PAGE_SIZE];
            if unpack(&bytes, &mut page) {
                let words = page.chunks_exact(WORD).filter(|w| **w != [0; WORD]).count();
                prop_assert!(words * WORD <= bytes.len());
            }
        }
    }
}
