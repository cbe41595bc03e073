//! A snapshot in every format that is read, recorded under `tests/data` by the build that was the
//! first to write it.

use super::*;
use std::path::PathBuf;

fn file(version: u16) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("../tests/data/snapshot-v{version}"))
}

/// The guest that was saved: a few pages of each region.
fn memory() -> Memory {
    let page = |gfn: Gfn| {
        let mut page = [0; PAGE_SIZE];
        for (at, byte) in page.iter_mut().enumerate() {
            *byte = u8::try_from((at / 64 + usize::try_from(gfn).unwrap()) % 251).unwrap();
        }
        (gfn, page)
    };
    [0, 1, 299, 500, 649].map(page).into()
}

#[test]
fn recorded_snapshots_are_read_page_by_page() {
    for version in 1..=VERSION {
        let bytes = std::fs::read(file(version)).unwrap();
        let snapshot = Snapshot::open(bytes.clone()).unwrap();
        assert_eq!(snapshot.machine(), b"machine");
        assert_eq!(snapshot.state(), b"state");
        assert_eq!(snapshot.session(), SessionId([7; 16]));
        assert_eq!(*snapshot.layout(), layout());
        assert!(restored(bytes).unwrap() == memory());
    }
}

#[test]
#[ignore = "writes the file of the current format, where there is none yet: tests/record"]
fn record_a_snapshot() {
    if !file(VERSION).exists() {
        let guest = Writer::new(&layout(), &memory());
        let compress = Compress::Zstd;
        let (bytes, _) = saved(&guest, SaveOptions { compress, ..HOW });
        std::fs::write(file(VERSION), bytes).unwrap();
    }
}
