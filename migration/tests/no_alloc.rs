//! The sending path allocates nothing per page, and neither does the receiving one.
//!
//! A guest of 16 MiB and one of 64 MiB cross a link in memory, source and destination in this
//! process, every allocation of both counted. The number may depend on rounds and messages, never
//! on pages.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use ferry_migration::destination::{self, Destination};
use ferry_migration::options::{Compress, OnTimeout, Options};
use ferry_migration::page::PAGE_SIZE;
use ferry_migration::report::{Report, Status};
use ferry_migration::source::{self, Ownership, Setup};
use ferry_migration::steering::Steering;
use ferry_migration::testing::{MemoryLink, TestClock, TestDestination, TestSource};
use ferry_migration::wire::{Role, SessionId};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, Stats, StatsAlloc};
use std::alloc::System;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// What a data channel's encoder and decoder may hold together, whatever they send.
const DATA_CHANNEL_BUFFERS: usize = 6 << 20;
/// The delta cache, smaller than either guest, so that it is as full with the one as with the
/// other.
const CACHE: u64 = 1 << 20;

/// Longer than the test takes, on any machine.
const NEVER: Duration = Duration::from_secs(120);
const SOURCE_TIMEOUTS: source::Timeouts = source::Timeouts {
    handshake: NEVER,
    transfer: NEVER,
    ready: NEVER,
    commit: NEVER,
    doubt: NEVER,
    ..source::Timeouts::DEFAULT
};
const DESTINATION_TIMEOUTS: destination::Timeouts = destination::Timeouts {
    handshake: NEVER,
    transfer: NEVER,
    commit: NEVER,
};

/// No event is due because time has passed.
fn clock() -> TestClock {
    TestClock::ticking(Duration::from_nanos(1))
}

/// The destination's process: the first connection is the control channel, each further one a data
/// channel.
fn serve(connections: Receiver<MemoryLink>, vm: TestDestination) {
    let (channel, preamble) =
        destination::exchange_preamble(connections.recv().unwrap(), NEVER).unwrap();
    let clock = Arc::new(clock());
    let mut engine = Destination::new(channel, &preamble, vm, DESTINATION_TIMEOUTS, clock);
    // The handshake, which says how many data channels will come.
    engine.step().unwrap();
    std::thread::scope(|scope| {
        if let Some(data_channels) = engine.data_channels() {
            let data_channels = data_channels.clone();
            scope.spawn(move || {
                for link in connections {
                    let (channel, preamble) = destination::exchange_preamble(link, NEVER).unwrap();
                    // A source that aborts may come once more, to say so.
                    if preamble.role != Role::Data {
                        continue;
                    }
                    let data_channel = data_channels.attach(channel, preamble.channel).unwrap();
                    scope.spawn(move || data_channel.run());
                }
            });
        }
        engine.run().unwrap();
    });
}

/// Migrates a guest of so many bytes; what it took, and what it allocated from the first page on.
fn migrate(bytes: usize, channels: u16, compress: Compress, reorder: bool) -> (Report, Stats) {
    let guest = TestSource::new(bytes / PAGE_SIZE);
    let arrived = TestDestination::new(bytes / PAGE_SIZE);
    let (sender, connections) = channel();
    let vm = arrived.clone();
    let peer = std::thread::spawn(move || serve(connections, vm));
    let options = Options {
        channels: Some(channels),
        compress,
        reorder: Some(reorder),
        delta_cache: CACHE,
        max_rounds: Some(4),
        on_timeout: OnTimeout::Stop,
        ..Options::default()
    };
    let connect = |_, _| {
        let (ours, theirs) = MemoryLink::pair();
        sender.send(theirs).map_err(|_| io::Error::other("gone"))?;
        Ok(ours)
    };
    let region = Region::new(ALLOCATOR);
    let report = source::migrate(
        &guest,
        Setup {
            connect: &mut { connect },
            clock: &clock(),
            options: &options,
            session: SessionId([7; 16]),
            owner: &Ownership::default(),
            steering: &Steering::default(),
            events: &mut |_| {},
            timeouts: SOURCE_TIMEOUTS,
            threads: true,
        },
    );
    let stats = region.change();
    drop(sender);
    peer.join().unwrap();
    assert_eq!(report.status, Status::Completed, "{:?}", report.error);
    assert!(guest.memory() == arrived.memory(), "memory arrived damaged");
    (report, stats)
}

/// The only test of this file: the counter counts the whole process.
#[test]
fn allocations_do_not_grow_with_the_pages() {
    const SMALL: usize = 16 << 20;
    const LARGE: usize = 64 << 20;
    // More rounds, a vector that doubles once or twice more, a thread's start: not a 48th of the
    // pages.
    const SLACK: usize = 256;
    let coders = [
        Compress::None,
        Compress::Zstd,
        Compress::Delta,
        Compress::Adaptive,
        Compress::Auto,
    ];
    // Bytes a page. What is put off in the first pass leaves shorter runs, and each of its sixteen
    // steps has a set of its own.
    for (channels, compress, (reorder, a_page)) in [1, 2].into_iter().flat_map(|channels| {
        let orders = [(false, 16), (true, 20)];
        let each = move |compress| orders.map(|order| (channels, compress, order));
        coders.into_iter().flat_map(each)
    }) {
        // The first migration of a process also pays for what is set up once.
        migrate(1 << 20, channels, compress, reorder);
        let (small_report, small) = migrate(SMALL, channels, compress, reorder);
        let (large_report, large) = migrate(LARGE, channels, compress, reorder);
        if matches!(
            compress,
            Compress::Zstd | Compress::Delta | Compress::Adaptive
        ) {
            assert!(
                !large_report.codecs.is_empty(),
                "{compress:?} coded nothing"
            );
        }
        let more_pages = large_report.pages.sent - small_report.pages.sent;
        assert!(more_pages >= 8000, "{more_pages}");
        assert!(large_report.pages.resent > 0, "the pause had pages to send");
        let count = |stats: &Stats| stats.allocations + stats.reallocations;
        println!(
            "{channels} channels, {compress:?}, reorder {reorder}: {} pages sent with {} allocations of {} KiB in all, {} pages with {} of {} KiB",
            small_report.pages.sent,
            count(&small),
            small.bytes_allocated >> 10,
            large_report.pages.sent,
            count(&large),
            large.bytes_allocated >> 10,
        );
        assert!(
            count(&large) <= count(&small) + SLACK,
            "{more_pages} more pages took {} allocations in place of {}",
            count(&large),
            count(&small)
        );
        // Sets of pages and heat: a few bits and a byte a page, some of them copied once a round.
        let more_bytes = large.bytes_allocated.saturating_sub(small.bytes_allocated);
        // A data channel that had nothing to do with the small guest has no buffers for coding yet.
        let buffers = if compress == Compress::None {
            0
        } else {
            usize::from(channels) * DATA_CHANNEL_BUFFERS
        };
        assert!(
            more_bytes < a_page * (LARGE - SMALL) / PAGE_SIZE + buffers,
            "{more_bytes} bytes more for {more_pages} more pages"
        );
    }
}
