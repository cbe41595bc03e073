//! Snapshots of a small guest.

use crate::fuzz_bodies::StandIn;
use ferry_migration::options::Compress;
use ferry_migration::rng::Rng;
use ferry_migration::snapshot::{SaveOptions, SaveSetup, save};
use ferry_migration::testing::{RecordedPeer, TestClock};
use ferry_migration::wire::SessionId;
use std::sync::Mutex;
use std::time::Duration;

/// Its pages as they are, and coded in each way.
pub(super) fn snapshots() -> Vec<Vec<u8>> {
    let mut random = Rng::new(1);
    let mut pages = vec![[0; 4096]; 12];
    pages[1].fill(7);
    pages[4][100..300].fill(9);
    pages[5].fill_with(|| random.next().to_le_bytes()[0]);
    pages[9] = pages[5].map(|byte| byte & 0x11);
    let guest = StandIn::of(pages);
    [Compress::None, Compress::Zstd, Compress::Adaptive]
        .into_iter()
        .map(|compress| {
            let file = Mutex::default();
            let setup = SaveSetup {
                session: SessionId([7; 16]),
                options: SaveOptions {
                    compress,
                    threads: 1,
                    live: false,
                    downtime: Duration::ZERO,
                },
                clock: &TestClock::still(),
                cancelled: &|| false,
                describe: &mut || Ok(b"machine".to_vec()),
                resume: true,
                released: &mut |_| {},
            };
            save::<RecordedPeer, _, _>(&guest, &file, setup).unwrap();
            file.into_inner().unwrap()
        })
        .collect()
}
