//! The bytes of a peer: their checksums made right, and several channels from one input.

use ferry_migration::wire::{FLAG_CRC, HEADER_BYTES, PREAMBLE_BYTES};

/// Makes the checksums of a channel right, as far as it can be followed; in payloads only where
/// that is asked for.
pub fn mend(stream: &[u8], payloads: bool) -> Vec<u8> {
    let mut bytes = stream.to_vec();
    if let Some((preamble, frames)) = bytes.split_at_mut_checked(PREAMBLE_BYTES) {
        put_crc(preamble, 60);
        mend_frames(frames, payloads);
    }
    bytes
}

/// As [`mend`], of a channel without its preamble.
pub(super) fn mend_frames(mut frames: &mut [u8], payloads: bool) {
    while let Some((head, rest)) = frames.split_first_chunk_mut::<HEADER_BYTES>() {
        let length = u32::from_le_bytes([head[4], head[5], head[6], head[7]]);
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let (payload, after) = rest.split_at_mut(length.min(rest.len()));
        if payloads && length > 0 {
            head[1] |= FLAG_CRC;
            head[24..28].copy_from_slice(&crc32c::crc32c(payload).to_le_bytes());
        }
        put_crc(head, 28);
        frames = after;
    }
}

/// The checksum of what lies before it, where there is room for one.
pub(super) fn put_crc(bytes: &mut [u8], at: usize) {
    if let Some((before, after)) = bytes.split_at_mut_checked(at)
        && let Some(place) = after.first_chunk_mut::<4>()
    {
        *place = crc32c::crc32c(before).to_le_bytes();
    }
}

/// Several channels from one input: each is its length in 16 bits and its bytes, the last is what
/// is left.
pub(super) fn channels(mut bytes: &[u8], payloads: bool) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk::<2>() {
        let length = usize::from(u16::from_le_bytes(*length)).min(rest.len());
        let (frames, after) = rest.split_at(length);
        let mut frames = frames.to_vec();
        mend_frames(&mut frames, payloads);
        all.push(frames);
        bytes = after;
    }
    all
}

/// What [`channels`] reads.
pub(crate) fn joined(channels: &[&[u8]]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for channel in channels {
        bytes.extend(u16::try_from(channel.len()).unwrap().to_le_bytes());
        bytes.extend_from_slice(channel);
    }
    bytes
}
