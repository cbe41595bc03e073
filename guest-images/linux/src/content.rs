//! Contents that tell what they are: of a disk's blocks, and of the bodies that a client sends.

/// What belongs into word `word` of a thing with this number and generation: a mixture (splitmix64)
/// of all three.
pub(crate) fn content(number: u64, generation: u64, word: u64) -> u64 {
    let mut z = (number << 40 ^ generation << 10 ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
