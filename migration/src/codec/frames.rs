//! Coded page frames, as they are put together.

use crate::page::Run;
use crate::wire::{Encoding, FLAG_CRC, FrameType, HEADER_BYTES, Header, RUN_BYTES, encode_runs};

/// Runs as they would be had all been raw at once: ascending, as a snapshot's tables have to be,
/// and joined where they touch within a run of the batch, as [`append`](super::append) does.
pub(super) fn put_in_order(runs: &mut Vec<Run>, batch: &[Run]) {
    runs.sort_unstable_by_key(|run| run.first);
    runs.dedup_by(|run, before| {
        let joined =
            before.end() == run.first && batch.iter().all(|whole| whole.first != run.first);
        if joined {
            before.count += run.count;
        }
        joined
    });
}

/// Appends a coded page frame: header, table, and what `body` appends.
pub(super) fn put_frame(
    encoding: Encoding,
    round: u32,
    runs: &[Run],
    out: &mut Vec<u8>,
    body: impl FnOnce(&mut Vec<u8>),
) {
    let at = out.len();
    out.resize(at + HEADER_BYTES, 0);
    encode_runs(runs, out);
    body(out);
    let payload = &out[at + HEADER_BYTES..];
    debug_assert!(payload.len() <= runs.len() * RUN_BYTES + super::MAX_CODED_BYTES);
    let header = Header {
        flags: FLAG_CRC,
        encoding: encoding as u8,
        gfn: runs.first().map_or(0, |run| run.first),
        // A frame has at most MAX_CODED_PAGES, so that nothing here can exceed its field.
        count: u32::try_from(runs.len()).unwrap_or(u32::MAX),
        length: u32::try_from(payload.len()).unwrap_or(u32::MAX),
        payload_crc: crc32c::crc32c(payload),
        ..Header::bare(FrameType::Pages, round)
    };
    out[at..at + HEADER_BYTES].copy_from_slice(&header.encode());
}
