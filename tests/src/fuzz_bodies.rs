//! What the fuzz targets do with their bytes, as ordinary functions: `tests/fuzz_smoke.rs` runs
//! them on mutations of good input, `fuzz/` under libFuzzer.

mod api;
mod console;
mod destination;
mod guest;
mod kernel;
mod link;
mod pairing;
mod source;
mod trace;
mod virtio;
mod vsock;

pub use api::api;
pub use console::console;
pub use destination::{data_channels, handshake};
pub(crate) use guest::StandIn;
pub use kernel::kernel;
pub(crate) use link::joined;
pub use link::mend;
pub use pairing::pairing;
pub use source::source;
pub use trace::trace;
pub use virtio::{virtio, virtio_state};
pub use vsock::vsock;

use ferry_migration::codec::Decoder;
use ferry_migration::page::{AtomicPageSet, Gfn, PAGE_SIZE, Run};
use ferry_migration::snapshot::{BlockReader, Snapshot};
use ferry_migration::wire::{
    Encoding, Features, HEADER_BYTES, Header, Limits, PREAMBLE_BYTES, Preamble, decode_runs,
    encode_runs,
};
use ferry_vmm::machine::{MachineState, OLDEST_STATE_VERSION, STATE_VERSION};
use link::put_crc;
use std::sync::Arc;

/// Headers, run tables and preambles: whatever is accepted is within its limits and encodes to the
/// same bytes.
pub fn frame(bytes: &[u8]) {
    let limits = Limits { end: 1000 };
    if let Some(head) = bytes.first_chunk::<HEADER_BYTES>() {
        let mut fixed = *head;
        let crc = crc32c::crc32c(&fixed[..28]);
        fixed[28..].copy_from_slice(&crc.to_le_bytes());
        for bytes in [head, &fixed] {
            if let Ok(header) = Header::decode(bytes, limits) {
                assert!(header.length <= header.kind.max_payload());
                assert!(header.body_pages() * PAGE_SIZE as u64 <= u64::from(header.length));
                assert_eq!(Header::decode(&header.encode(), limits), Ok(header));
            }
        }
    }
    let mut runs = Vec::new();
    let pages = decode_runs(bytes, &mut runs);
    assert_eq!(pages, runs.iter().map(|r| r.count).sum::<u64>());
    let mut again = Vec::new();
    encode_runs(&runs, &mut again);
    assert_eq!(again, bytes[..bytes.len() / 8 * 8]);
    if let Some(head) = bytes.first_chunk::<PREAMBLE_BYTES>() {
        let mut fixed = *head;
        let crc = crc32c::crc32c(&fixed[..60]);
        fixed[60..].copy_from_slice(&crc.to_le_bytes());
        for bytes in [head, &fixed] {
            if let Ok(preamble) = Preamble::decode(bytes) {
                let again = Preamble::decode(&preamble.encode()).unwrap();
                assert_eq!(
                    (again.role, again.channel, again.session),
                    (preamble.role, preamble.channel, preamble.session)
                );
            }
        }
    }
}

/// Coded pages: decoded or refused, the same each time, and never more than what was announced. The
/// first bytes choose the encoding, the pages, and whether they were sent before.
pub fn codec(bytes: &[u8]) {
    let Some(([encoding, count, known], body)) = bytes.split_first_chunk::<3>() else {
        return;
    };
    let encoding = [Encoding::Zstd, Encoding::Patch][usize::from(encoding % 2)];
    let runs = [Run::new(5, 1 + u64::from(*count)), Run::new(400, 1)];
    let copies = Arc::new(AtomicPageSet::new(1000));
    let known = Run::new(5, u64::from(*known));
    copies.insert_run(known);
    let mut decoder = Decoder::new(Features::SUPPORTED, copies);
    let mut decode = || {
        let base = &mut |gfn: Gfn, page: &mut [u8; PAGE_SIZE]| {
            assert!(
                (known.first..known.end()).contains(&gfn),
                "page {gfn} was read, which never came"
            );
            page.fill(gfn.to_le_bytes()[0]);
            Ok(())
        };
        decoder
            .decode(encoding, &runs, body, base)
            .map(<[u8]>::to_vec)
            .map_err(|error| error.to_string())
    };
    let first = decode();
    if let Ok(pages) = &first {
        assert_eq!(pages.len() as u64, runs.iter().map(Run::bytes).sum::<u64>());
    }
    assert_eq!(decode(), first, "the decoder remembers");
}

/// A machine's state: read or refused; what is read is written to the same meaning.
pub fn machine_state(bytes: &[u8]) {
    let mut fixed = bytes.to_vec();
    if let Some((header, body)) = fixed.split_at_mut_checked(24) {
        header[16..20].copy_from_slice(&u32::try_from(body.len()).unwrap_or(0).to_le_bytes());
        header[20..24].copy_from_slice(&crc32c::crc32c(body).to_le_bytes());
    }
    for bytes in [bytes, &fixed] {
        if let Ok(state) = MachineState::from_bytes(bytes) {
            for version in OLDEST_STATE_VERSION..=STATE_VERSION {
                let written = state.to_bytes_as(version).unwrap();
                let again = MachineState::from_bytes(&written).unwrap();
                assert_eq!(again.cpus(), state.cpus());
                assert_eq!(again.to_bytes_as(version).unwrap(), written);
            }
        }
    }
}

/// A snapshot, as it is and with its checksums made right: it is refused, or its pages are what its
/// index says, inside the guest's memory and each there once. Returns how many pages could be read
/// once its checksums were right; `None` when it was refused as a whole.
pub fn snapshot(bytes: &[u8]) -> Option<u64> {
    let _ = read_snapshot(bytes.to_vec());
    read_snapshot(mend_snapshot(bytes))
}

fn read_snapshot(bytes: Vec<u8>) -> Option<u64> {
    let snapshot = Snapshot::open(bytes).ok()?;
    let mut reader = BlockReader::default();
    let mut pages = 0;
    for frame in snapshot.frames() {
        let Ok(block) = reader.read(&snapshot, frame) else {
            continue;
        };
        let mut next = 0;
        for (run, bytes) in block.pieces() {
            assert!(run.first >= next && snapshot.layout().contains(run));
            assert_eq!(bytes.len() as u64, run.count * PAGE_SIZE as u64);
            assert_eq!(snapshot.frame_of(run.first), Some(frame));
            next = run.end();
            pages += run.count;
        }
    }
    assert!(pages <= snapshot.data_pages());
    Some(pages)
}

/// Makes the checksums of a snapshot right, as far as its trailer can be followed.
fn mend_snapshot(bytes: &[u8]) -> Vec<u8> {
    const END: usize = 64;
    let mut bytes = bytes.to_vec();
    if bytes.len() < 2 * END {
        return bytes;
    }
    let end = bytes.len() - END;
    let long = |bytes: &[u8], at: usize| {
        let at = at.min(bytes.len() - 8);
        let value = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        usize::try_from(value).unwrap()
    };
    let index = long(&bytes, end + 24).min(end);
    let parts = [long(&bytes, end + 8), long(&bytes, end + 16)];
    let entries = bytes[index..end].chunks_exact(16);
    let frames: Vec<usize> = entries.map(|entry| long(entry, 8)).chain(parts).collect();
    for at in frames {
        mend_frame(&mut bytes, at, end);
    }
    let crc = crc32c::crc32c(&bytes[index..end]);
    bytes[end + 40..end + 44].copy_from_slice(&crc.to_le_bytes());
    for at in [0, end] {
        put_crc(&mut bytes[at..], 60);
    }
    bytes
}

fn mend_frame(bytes: &mut [u8], at: usize, end: usize) {
    let Some(body) = at.checked_add(HEADER_BYTES).filter(|body| *body <= end) else {
        return;
    };
    let length = u32::from_le_bytes(bytes[at + 4..at + 8].try_into().unwrap()) as usize;
    if let Some(to) = body.checked_add(length).filter(|to| *to <= end) {
        let crc = crc32c::crc32c(&bytes[body..to]);
        bytes[at + 24..at + 28].copy_from_slice(&crc.to_le_bytes());
    }
    put_crc(&mut bytes[at..], 28);
}
