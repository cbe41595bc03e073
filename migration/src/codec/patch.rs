//! Patches: a page as its difference from another, in the way of XBZRLE (Svärd 2011, QEMU).
//!
//! ```text
//!  patch = (skip, length, bytes[length])*      skip and length as LEB128, at most two bytes each
//! ```
//!
//! `skip` bytes are as in the base, `length` bytes follow. What is left at the end of the page is
//! as in the base, so that the empty patch says "unchanged".

use crate::page::PAGE_SIZE;

/// A page's bytes.
pub type Page = [u8; PAGE_SIZE];

/// A page of zeros.
pub const ZEROS: Page = [0; PAGE_SIZE];

const WORD: usize = size_of::<u64>();
/// Words that are compared at once: the compiler makes vector instructions of them.
const CHUNK: usize = 8 * WORD;

/// Why a patch was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PatchError {
    /// A number without an end, or of more bytes than any number of a patch needs.
    #[error("a patch holds a length that cannot be read")]
    Number,
    /// More bytes than the patch has left.
    #[error("a patch announces more bytes than it holds")]
    Truncated,
    /// Past the end of the page.
    #[error("a patch reaches past the end of its page")]
    TooLong,
    /// Nothing is written there.
    #[error("a patch holds an empty piece")]
    Empty,
}

fn word(page: &Page, at: usize) -> u64 {
    let mut bytes = [0; WORD];
    bytes.copy_from_slice(&page[at..at + WORD]);
    u64::from_ne_bytes(bytes)
}

/// Whether two pieces of a whole chunk are equal.
fn same_chunk(old: &Page, new: &Page, at: usize) -> bool {
    let words = (at..at + CHUNK).step_by(WORD);
    words.fold(0, |or, at| or | (word(old, at) ^ word(new, at))) == 0
}

/// The first byte at or after `at` that differs; `at` is at a word's start.
fn next_difference(old: &Page, new: &Page, mut at: usize) -> Option<usize> {
    while at < PAGE_SIZE {
        if at.is_multiple_of(CHUNK) && same_chunk(old, new, at) {
            at += CHUNK;
            continue;
        }
        let difference = word(old, at) ^ word(new, at);
        if difference != 0 {
            // The first byte in memory is the lowest of a little-endian word.
            return Some(at + difference.to_le().trailing_zeros() as usize / 8);
        }
        at += WORD;
    }
    None
}

/// Where the piece that begins at `from` ends: before the first whole word that is equal.
fn end_of_difference(old: &Page, new: &Page, from: usize) -> usize {
    let mut at = from / WORD * WORD + WORD;
    let mut last = word(old, at - WORD) ^ word(new, at - WORD);
    while at < PAGE_SIZE {
        let difference = word(old, at) ^ word(new, at);
        if difference == 0 {
            break;
        }
        last = difference;
        at += WORD;
    }
    at - last.to_le().leading_zeros() as usize / 8
}

/// A number below 2¹⁴.
fn put_number(number: usize, out: &mut Vec<u8>) {
    let low = u8::try_from(number & 0x7f).unwrap_or(0);
    match u8::try_from(number >> 7).unwrap_or(0) {
        0 => out.push(low),
        high => out.extend_from_slice(&[low | 0x80, high]),
    }
}

fn take_number(patch: &mut &[u8]) -> Result<usize, PatchError> {
    let (low, rest) = patch.split_first().ok_or(PatchError::Number)?;
    if low & 0x80 == 0 {
        *patch = rest;
        return Ok(usize::from(*low));
    }
    let (high, rest) = rest.split_first().ok_or(PatchError::Number)?;
    if *high == 0 || high & 0x80 != 0 {
        return Err(PatchError::Number);
    }
    *patch = rest;
    Ok(usize::from(low & 0x7f) | usize::from(*high) << 7)
}

/// Appends the patch that makes `new` of `old`. `false`, and nothing appended, when it would take
/// more than `limit` bytes.
pub fn encode(old: &Page, new: &Page, limit: usize, out: &mut Vec<u8>) -> bool {
    let start = out.len();
    let (mut done, mut at) = (0, 0);
    while let Some(from) = next_difference(old, new, at) {
        let end = end_of_difference(old, new, from);
        if out.len() - start + (end - from) + 4 > limit {
            out.truncate(start);
            return false;
        }
        put_number(from - done, out);
        put_number(end - from, out);
        out.extend_from_slice(&new[from..end]);
        done = end;
        // The word after the piece is equal, or there is none.
        at = end.div_ceil(WORD) * WORD;
    }
    true
}

/// Applies a patch to its base.
///
/// # Errors
/// [`PatchError`]; the page then holds neither the one nor the other.
pub fn apply(mut patch: &[u8], page: &mut Page) -> Result<(), PatchError> {
    let mut at = 0;
    while !patch.is_empty() {
        let from = at + take_number(&mut patch)?;
        let length = take_number(&mut patch)?;
        if length == 0 {
            return Err(PatchError::Empty);
        }
        let into = page
            .get_mut(from..from + length)
            .ok_or(PatchError::TooLong)?;
        let (bytes, rest) = patch
            .split_at_checked(length)
            .ok_or(PatchError::Truncated)?;
        into.copy_from_slice(bytes);
        patch = rest;
        at = from + length;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Byte by byte: what `apply` must do.
    fn naive_apply(patch: &[u8], base: &Page) -> Option<Vec<u8>> {
        fn number(patch: &[u8], at: &mut usize) -> Option<usize> {
            let low = *patch.get(*at)?;
            *at += 1;
            if low < 128 {
                return Some(usize::from(low));
            }
            let high = *patch.get(*at)?;
            *at += 1;
            (1..128)
                .contains(&high)
                .then(|| usize::from(low - 128) + 128 * usize::from(high))
        }
        let mut page = base.to_vec();
        let (mut at, mut to) = (0, 0);
        while at < patch.len() {
            to += number(patch, &mut at)?;
            let length = number(patch, &mut at)?;
            if length == 0 {
                return None;
            }
            for _ in 0..length {
                *page.get_mut(to)? = *patch.get(at)?;
                to += 1;
                at += 1;
            }
        }
        Some(page)
    }

    fn check(old: &Page, new: &Page) -> usize {
        let mut patch = vec![7];
        assert!(encode(old, new, 3 * PAGE_SIZE, &mut patch));
        let mut page = *old;
        apply(&patch[1..], &mut page).unwrap();
        assert!(page == *new, "another page came out");
        assert_eq!(naive_apply(&patch[1..], old).as_deref(), Some(&new[..]));
        // A limit is kept, and what does not fit leaves nothing behind.
        for limit in [0, 1, 100, patch.len() - 1, PAGE_SIZE] {
            let mut limited = vec![7];
            if encode(old, new, limit, &mut limited) {
                assert!(limited.len() <= limit + 1);
                assert_eq!(limited, patch);
            } else {
                assert_eq!(limited, [7]);
            }
        }
        patch.len() - 1
    }

    #[test]
    fn the_ends_of_a_page() {
        let mut new = ZEROS;
        assert_eq!(check(&ZEROS, &new), 0);
        new[PAGE_SIZE - 1] = 1;
        assert_eq!(check(&ZEROS, &new), 4);
        new[0] = 1;
        assert_eq!(check(&ZEROS, &new), 3 + 4);
        let full = [3; PAGE_SIZE];
        assert_eq!(check(&ZEROS, &full), 3 + PAGE_SIZE);
        assert_eq!(check(&full, &ZEROS), 3 + PAGE_SIZE);
    }

    /// A page with a few stretches written over.
    fn page() -> impl Strategy<Value = Page> {
        let stretch = (0..PAGE_SIZE, 1..300_usize, any::<u8>(), any::<bool>());
        proptest::collection::vec(stretch, 0..12).prop_map(|stretches| {
            let mut page = ZEROS;
            for (from, length, value, varied) in stretches {
                let end = (from + length).min(PAGE_SIZE);
                for (i, byte) in page[from..end].iter_mut().enumerate() {
                    let step = if varied { i * 37 } else { 0 };
                    *byte = value.wrapping_add((step & 0xff) as u8);
                }
            }
            page
        })
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(old in page(), new in page()) {
            check(&old, &new);
            check(&ZEROS, &new);
        }

        #[test]
        fn a_few_changed_bytes_cost_a_few_bytes(old in page(), at in proptest::collection::vec(0..PAGE_SIZE, 1..20)) {
            let mut new = old;
            at.iter().for_each(|at| new[*at] ^= 0x55);
            prop_assert!(check(&old, &new) <= at.len() * (4 + 2 * WORD));
        }

        #[test]
        fn any_bytes_are_applied_or_refused(patch in proptest::collection::vec(any::<u8>(), 0..200), small in any::<bool>()) {
            // Small numbers lead further in.
            let patch: Vec<u8> = patch.into_iter().map(|b| if small { b % 16 } else { b }).collect();
            let mut page = ZEROS;
            let result = apply(&patch, &mut page);
            let naive = naive_apply(&patch, &ZEROS);
            prop_assert_eq!(result.is_ok(), naive.is_some());
            if let Some(naive) = naive {
                prop_assert_eq!(&page[..], &naive[..]);
            }
        }
    }
}
