//! What both sides compute alike, so that their memory and disks can be compared.

use crate::page::{Gfn, PAGE_SIZE};
use crate::port::BLOCK_BYTES;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// The hash by which `--verify` compares a page; the frame number is its seed, so that pages that
/// were swapped do not pass.
pub(crate) fn page_hash(gfn: Gfn, page: &[u8; PAGE_SIZE]) -> u64 {
    xxh3_64_with_seed(page, gfn)
}

/// Whether all bytes are zero: compared with themselves one further, which the library does fast.
pub(crate) fn all_zero(bytes: &[u8]) -> bool {
    bytes
        .split_first()
        .is_none_or(|(first, rest)| *first == 0 && *rest == bytes[..bytes.len() - 1])
}

/// The hashes by which `--verify` compares blocks; the place is the seed, so that blocks that were
/// swapped do not pass.
pub(crate) fn block_hashes(copy: usize, first: u64, bytes: &[u8]) -> impl Iterator<Item = u8> {
    let block = usize::try_from(BLOCK_BYTES).unwrap_or(usize::MAX);
    (first..)
        .zip(bytes.chunks(block))
        .flat_map(move |(number, bytes)| {
            let seed = (copy as u64) << 48 ^ number;
            xxh3_64_with_seed(bytes, seed).to_le_bytes()
        })
}
