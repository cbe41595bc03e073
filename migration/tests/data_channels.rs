//! Several data channels, source and destination in this process with real threads: what a data
//! channel that is slow, dies or stalls does to the others and to the guest, and how many data
//! channels are used. Counts and contents are asserted, never times.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use ferry_migration::destination::{self, Destination, State, Step};
use ferry_migration::net::MonotonicClock;
use ferry_migration::options::{Compress, OnTimeout, Options};
use ferry_migration::page::{PAGE_SIZE, RamLayout, Run};
use ferry_migration::port::Link;
use ferry_migration::report::{Report, Status};
use ferry_migration::rng::Rng;
use ferry_migration::source::{self, Ownership, Setup};
use ferry_migration::steering::Steering;
use ferry_migration::testing::{Carried, MemoryLink, TestDestination, TestSource, Trouble};
use ferry_migration::wire::{
    Channel, Features, FrameType, HEADER_BYTES, Header, Hello, Role, SessionId, encode_runs,
};
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

/// Longer than any test takes, on any machine.
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

/// The destination's process; the state that it ends in.
fn serve(
    connections: Receiver<MemoryLink>,
    vm: TestDestination,
    timeouts: destination::Timeouts,
) -> State {
    let (channel, preamble) =
        destination::exchange_preamble(connections.recv().unwrap(), NEVER).unwrap();
    let clock = Arc::new(MonotonicClock::new());
    let mut engine = Destination::new(channel, &preamble, vm, timeouts, clock);
    engine.step().unwrap();
    std::thread::scope(|scope| {
        if let Some(data_channels) = engine.data_channels().cloned() {
            scope.spawn(move || {
                for link in connections {
                    let Ok((channel, preamble)) = destination::exchange_preamble(link, NEVER)
                    else {
                        return;
                    };
                    // A source that aborts may come once more, to say so.
                    if preamble.role != Role::Data {
                        continue;
                    }
                    let data_channel = data_channels.attach(channel, preamble.channel).unwrap();
                    scope.spawn(move || data_channel.run());
                }
            });
        }
        let _ = engine.run();
    });
    engine.state()
}

struct Outcome {
    report: Report,
    destination: State,
    equal: bool,
}

/// Migrates a guest of so many MiB; `trouble` says what each data channel suffers from.
fn migrate(mib: usize, channels: Option<u16>, trouble: impl Fn(u16) -> Option<Trouble>) -> Outcome {
    migrate_in_order(mib, Some(false), channels, trouble)
}

fn migrate_in_order(
    mib: usize,
    reorder: Option<bool>,
    channels: Option<u16>,
    trouble: impl Fn(u16) -> Option<Trouble>,
) -> Outcome {
    let guest = TestSource::new((mib << 20) / PAGE_SIZE);
    migrate_guest(&guest, (Compress::None, reorder), channels, trouble)
}

fn migrate_guest(
    guest: &TestSource,
    (compress, reorder): (Compress, Option<bool>),
    channels: Option<u16>,
    trouble: impl Fn(u16) -> Option<Trouble>,
) -> Outcome {
    let options = Options {
        channels,
        compress,
        reorder,
        max_rounds: Some(4),
        on_timeout: OnTimeout::Stop,
        ..Options::default()
    };
    migrate_as(
        guest,
        &options,
        (SOURCE_TIMEOUTS, DESTINATION_TIMEOUTS),
        trouble,
    )
}

fn migrate_as(
    guest: &TestSource,
    options: &Options,
    (timeouts, there): (source::Timeouts, destination::Timeouts),
    trouble: impl Fn(u16) -> Option<Trouble>,
) -> Outcome {
    let arrived = TestDestination::new(guest.pages());
    let (sender, connections) = channel();
    let vm = arrived.clone();
    let peer = std::thread::spawn(move || serve(connections, vm, there));
    let connect = |role, index| {
        let (ours, theirs) = MemoryLink::pair();
        sender.send(theirs).map_err(|_| io::Error::other("gone"))?;
        let data = role == Role::Data;
        Ok(ours.suffers(data.then(|| trouble(index)).flatten()))
    };
    let report = source::migrate(
        guest,
        Setup {
            connect: &mut { connect },
            clock: &MonotonicClock::new(),
            options,
            session: SessionId([7; 16]),
            owner: &Ownership::default(),
            steering: &Steering::default(),
            events: &mut |_| {},
            timeouts,
            threads: true,
        },
    );
    drop(sender);
    let destination = peer.join().unwrap();
    Outcome {
        report,
        destination,
        equal: guest.memory() == arrived.memory(),
    }
}

/// What no data channel suffers from.
const fn none(_: u16) -> Option<Trouble> {
    None
}

#[test]
fn a_slow_data_channel_does_not_hold_the_others() {
    // Data channel 1 takes no page before the others have carried five sixths of what is not zero.
    // A data channel that got its share of the pages beforehand would keep a third from them, and
    // they would wait for each other.
    let others = Arc::new(Carried::default());
    let outcome = migrate(64, Some(3), |data_channel| match data_channel {
        1 => Some(Trouble::Waits(Arc::clone(&others), 45 << 20)),
        _ => Some(Trouble::Counts(Arc::clone(&others))),
    });
    let report = outcome.report;
    assert_eq!(report.status, Status::Completed, "{:?}", report.error);
    assert!(outcome.equal);
    let bytes = &report.channels.bytes;
    assert_eq!(bytes.len(), 3);
    // It got a batch when it was free, if at all: the others carried what it did not.
    assert!(bytes[0] + bytes[2] > 44 << 20, "{bytes:?}");
    assert!(bytes.iter().sum::<u64>() >= report.pages.sent * PAGE_SIZE as u64);
}

#[test]
fn a_data_channel_that_dies_or_stalls_leaves_the_guest_where_it_is() {
    let dies: fn(Arc<Carried>, u64) -> Trouble = Trouble::Dies;
    let stalls: fn(Arc<Carried>, u64) -> Trouble = Trouble::Stalls;
    for (kind, after, reorder) in [
        (dies, 3 << 20, Some(false)),
        (stalls, 3 << 20, Some(false)),
        // In a later step of the first pass.
        (dies, 3 << 20, Some(true)),
        (stalls, 3 << 20, Some(true)),
        // Between two batches, or in a table of runs.
        (dies, (1 << 20) + 80, None),
        (stalls, 100, None),
    ] {
        // Data channels take batches when they are free: the others wait, so that this one surely
        // gets as far as its trouble.
        let carried = Arc::new(Carried::default());
        let trouble = kind(Arc::clone(&carried), after);
        let outcome = migrate_in_order(32, reorder, Some(3), |data_channel| match data_channel {
            1 => Some(trouble.clone()),
            _ => Some(Trouble::Waits(Arc::clone(&carried), after + 1)),
        });
        let report = outcome.report;
        assert_eq!(report.status, Status::Failed, "{trouble:?}");
        let error = report.error.unwrap();
        assert!(!error.is_empty() && !error.contains('\n'), "{error}");
        assert!(!error.contains("did not come"), "{error}");
        assert_eq!(outcome.destination, State::Discarded, "{trouble:?}");
        assert_eq!(report.channels.opened, 3);
    }
}

/// A round on several channels that takes longer than the destination waits for a word on the
/// control channel is no sign of a dead source.
#[test]
fn a_long_round_on_several_channels_is_not_taken_for_silence() {
    let guest = TestSource::new((16 << 20) / PAGE_SIZE);
    let options = Options {
        channels: Some(3),
        compress: Compress::None,
        // 16 MiB take five seconds.
        bandwidth: Some(3 << 20),
        max_rounds: Some(1),
        on_timeout: OnTimeout::Stop,
        ..Options::default()
    };
    let outcome = migrate_as(
        &guest,
        &options,
        (
            source::Timeouts {
                alive: Duration::from_millis(50),
                ..SOURCE_TIMEOUTS
            },
            destination::Timeouts {
                transfer: Duration::from_secs(2),
                ..DESTINATION_TIMEOUTS
            },
        ),
        none,
    );
    let report = outcome.report;
    assert_eq!(report.status, Status::Completed, "{:?}", report.error);
    assert!(outcome.equal);
}

/// Small rounds go out on the control channel, large ones on the data channels; whatever overtakes
/// whatever, the newer page wins.
#[test]
fn rounds_of_all_sizes_arrive_in_order() {
    for (mib, data_channels) in [(1, 2), (3, 2), (9, 4), (24, 7)] {
        let outcome = migrate(mib, Some(data_channels), none);
        let report = outcome.report;
        assert_eq!(report.status, Status::Completed, "{:?}", report.error);
        assert!(outcome.equal, "{mib} MiB on {data_channels} data_channels");
        assert!(report.pages.resent > 0);
        assert_eq!(
            (report.channels.opened, report.channels.used),
            (data_channels, data_channels)
        );
        let on_data_channels: u64 = report.channels.bytes.iter().sum();
        // What is small is not worth the data channels: they carry the ends of rounds.
        let small = mib <= 1;
        assert_eq!(
            on_data_channels < 4096,
            small,
            "{mib} MiB: {:?}",
            report.channels
        );
    }
}

/// What comes next is said while data channels send: each page goes out, however many steps that
/// makes, and what was written meanwhile again.
#[test]
fn a_first_pass_in_steps_arrives() {
    for (mib, data_channels) in [(1, 2), (3, 2), (9, 4), (24, 7), (70, 3)] {
        let outcome = migrate_in_order(mib, Some(true), Some(data_channels), none);
        let report = outcome.report;
        assert_eq!(report.status, Status::Completed, "{:?}", report.error);
        assert!(outcome.equal, "{mib} MiB on {data_channels} data_channels");
        let pages = (mib as u64) << 8;
        let first = report.rounds.first().map(|round| round.pages);
        assert_eq!(
            first,
            Some(pages),
            "{mib} MiB on {data_channels} data_channels"
        );
        assert_eq!(report.channels.used, data_channels);
    }
}

/// Pages that look regular and do not shrink go raw after all, between those that are noise: they
/// arrive where they were.
#[test]
fn what_no_coder_shrinks_arrives() {
    let mut rng = Rng::new(1);
    let guest = TestSource::with(2048, |gfn, page| {
        for word in page.chunks_exact_mut(8) {
            word.copy_from_slice(&rng.next().to_le_bytes());
        }
        if gfn % 3 == 0 {
            page.iter_mut().step_by(16).for_each(|byte| *byte = 0x55);
        }
    });
    for compress in [Compress::Zstd, Compress::Adaptive, Compress::Auto] {
        for channels in [1, 3] {
            let outcome = migrate_guest(&guest, (compress, None), Some(channels), none);
            let report = outcome.report;
            assert_eq!(report.status, Status::Completed, "{:?}", report.error);
            assert!(outcome.equal, "{compress:?}");
            assert_eq!(report.codecs.zstd.pages, 0, "{compress:?}");
        }
    }
}

/// One processor here, as far as the guest's port says: nothing is opened that was not asked for.
#[test]
fn unrequested_data_channels() {
    let report = migrate(4, None, none).report;
    assert_eq!(report.status, Status::Completed, "{:?}", report.error);
    assert_eq!(report.channels.opened, 0);
    assert!(
        report.channels.why.contains("one processor"),
        "{:?}",
        report.channels
    );
}

/// A source made by hand, with one data channel; the destination's answers are what a test waits
/// for.
struct ByHand {
    control: Channel<MemoryLink>,
    data: Channel<MemoryLink>,
    arrived: TestDestination,
    peer: std::thread::JoinHandle<State>,
}

const PAGES: u64 = 16;

impl ByHand {
    fn connect(required: Features, timeouts: destination::Timeouts) -> Self {
        let arrived = TestDestination::new(usize::try_from(PAGES).unwrap());
        let (sender, connections) = channel();
        let vm = arrived.clone();
        let peer = std::thread::spawn(move || serve(connections, vm, timeouts));
        let open = |role| {
            let (ours, theirs) = MemoryLink::pair();
            sender.send(theirs).unwrap();
            let mut channel = Channel::new(ours);
            channel.open(role, 0, SessionId([7; 16])).unwrap();
            channel.set_end(PAGES);
            channel
        };
        let mut control = open(Role::Control);
        let hello = Hello {
            offered: Features::SUPPORTED.without(Features::SHARED_MEMORY),
            required: required.or(Features::CHANNELS),
            layout: RamLayout::new(vec![Run::new(0, PAGES)]).unwrap(),
            channels: 1,
            faults: 0,
            disks: Vec::new(),
            policy: "precopy".into(),
            machine: b"pages".to_vec(),
        };
        let header = Header::bare(FrameType::Hello, 0);
        control.send(header, &hello.encode()).unwrap();
        let mut this = Self {
            control,
            data: open(Role::Data),
            arrived,
            peer,
        };
        this.expect(FrameType::HelloAck);
        this
    }

    fn expect(&mut self, kind: FrameType) {
        let header = self.control.recv_header().unwrap();
        let mut bytes = Vec::new();
        self.control.recv_payload(&header, &mut bytes).unwrap();
        let text = String::from_utf8_lossy(&bytes);
        assert_eq!(header.kind, kind, "{text}");
    }

    fn end_round(&mut self, round: u32) {
        let header = Header::bare(FrameType::RoundEnd, round);
        self.control.send(header, &[]).unwrap();
        self.data.send(header, &[]).unwrap();
        self.expect(FrameType::RoundAck);
    }

    /// Fails where the channel is closed.
    fn page(channel: &mut Channel<MemoryLink>, gfn: u64, byte: u8) -> std::io::Result<()> {
        let mut table = Vec::new();
        encode_runs(&[Run::new(gfn, 1)], &mut table);
        let header = Header {
            gfn,
            count: 1,
            length: u32::try_from(table.len() + PAGE_SIZE).unwrap(),
            payload_crc: crc32c::crc32c(&table),
            ..Header::bare(FrameType::Pages, 1)
        };
        let head = [&header.encode()[..], &table].concat();
        assert_eq!(head.len(), HEADER_BYTES + table.len());
        channel.link().send(&head, &[byte; PAGE_SIZE])
    }

    fn hashes(&mut self) {
        let hash = |gfn| xxhash_rust::xxh3::xxh3_64_with_seed(&[0; PAGE_SIZE], gfn).to_le_bytes();
        let hashes: Vec<u8> = (0..PAGES).flat_map(hash).collect();
        let header = Header {
            count: u32::try_from(PAGES).unwrap(),
            ..Header::bare(FrameType::Verify, 1)
        };
        self.control.send(header, &hashes).unwrap();
    }
}

/// What a source sends on a data channel after the guest was verified, or is complete, is not
/// written into it.
#[test]
fn nothing_is_written_into_a_complete_guest() {
    for verify in [false, true] {
        let required = if verify {
            Features::VERIFY
        } else {
            Features::default()
        };
        let mut source = ByHand::connect(required, DESTINATION_TIMEOUTS);
        source.end_round(1);
        let state = Header::bare(FrameType::State, 1);
        if verify {
            source.hashes();
        }
        source.control.send(state, b"state").unwrap();
        source.expect(FrameType::Ready);
        // The channel may be closed by now, or this one is not taken any more.
        let _ = ByHand::page(&mut source.data, 3, 0x5a);
        // The channel is closed; where it is not, the page was taken before so long.
        let enough = Some(Duration::from_secs(3));
        source.data.link().set_timeout(enough);
        assert!(source.data.recv_header().is_err());
        let commit = Header::bare(FrameType::Commit, 1);
        source.control.send(commit, &[]).unwrap();
        source.expect(FrameType::Running);
        let page = *source.arrived.memory().page(3);
        assert!(page == [0; PAGE_SIZE], "verify {verify}");
        drop((source.control, source.data));
        assert_eq!(source.peer.join().unwrap(), State::Complete);
    }
}

/// A page that comes after it was compared was not compared: the guest is not verified.
#[test]
fn a_page_that_is_written_after_its_hash_is_not_verified() {
    let mut source = ByHand::connect(Features::VERIFY, DESTINATION_TIMEOUTS);
    source.end_round(1);
    source.hashes();
    ByHand::page(&mut source.data, 3, 0x5a).unwrap();
    source.end_round(2);
    let state = Header::bare(FrameType::State, 2);
    source.control.send(state, b"state").unwrap();
    source.expect(FrameType::Abort);
    assert_eq!(source.peer.join().unwrap(), State::Discarded);
}

/// A round that takes longer than the timeout, while its pages come on a data channel, is no
/// silence of the control channel.
#[test]
fn pages_on_a_data_channel_are_a_sign_of_life() {
    let timeout = Duration::from_millis(800);
    let timeouts = destination::Timeouts {
        transfer: timeout,
        ..DESTINATION_TIMEOUTS
    };
    let mut source = ByHand::connect(Features::default(), timeouts);
    for n in 0..8 {
        ByHand::page(&mut source.data, n, 1).unwrap();
        std::thread::sleep(timeout / 4);
    }
    source.end_round(1);
    let state = Header::bare(FrameType::State, 1);
    source.control.send(state, b"state").unwrap();
    source.expect(FrameType::Ready);
    let commit = Header::bare(FrameType::Commit, 1);
    source.control.send(commit, &[]).unwrap();
    source.expect(FrameType::Running);
    drop((source.control, source.data));
    assert_eq!(source.peer.join().unwrap(), State::Complete);
}

/// The destination falls into doubt while its source is only slow: the commit that comes later on
/// the same connection counts.
#[test]
fn a_slow_source_still_commits() {
    let (ours, theirs) = MemoryLink::pair();
    let (tell, told) = channel();
    let peer = std::thread::spawn(move || {
        let (channel, preamble) = destination::exchange_preamble(theirs, NEVER).unwrap();
        let host = TestDestination::new(16);
        let timeouts = destination::Timeouts {
            commit: Duration::from_millis(50),
            ..DESTINATION_TIMEOUTS
        };
        let clock = Arc::new(MonotonicClock::new());
        let mut engine = Destination::new(channel, &preamble, host, timeouts, clock);
        engine.run().unwrap_err();
        assert_eq!(engine.state(), State::InDoubt);
        assert!(engine.is_connected() && !engine.has_word());
        tell.send(()).unwrap();
        while !engine.has_word() {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(engine.step().unwrap(), Step::Running);
        assert_eq!(engine.step().unwrap(), Step::Complete);
    });
    let mut control = Channel::new(ours);
    control.open(Role::Control, 0, SessionId([7; 16])).unwrap();
    control.set_end(PAGES);
    let hello = Hello {
        offered: Features::SUPPORTED.without(Features::SHARED_MEMORY),
        required: Features::default(),
        layout: RamLayout::new(vec![Run::new(0, PAGES)]).unwrap(),
        channels: 0,
        faults: 0,
        disks: Vec::new(),
        policy: "precopy".into(),
        machine: b"pages".to_vec(),
    };
    let expect = |control: &mut Channel<MemoryLink>, kind| {
        let header = control.recv_header().unwrap();
        control.recv_payload(&header, &mut Vec::new()).unwrap();
        assert_eq!(header.kind, kind);
    };
    let header = Header::bare(FrameType::Hello, 0);
    control.send(header, &hello.encode()).unwrap();
    expect(&mut control, FrameType::HelloAck);
    let state = Header::bare(FrameType::State, 0);
    control.send(state, b"state").unwrap();
    expect(&mut control, FrameType::Ready);
    told.recv().unwrap();
    let commit = Header::bare(FrameType::Commit, 0);
    control.send(commit, &[]).unwrap();
    expect(&mut control, FrameType::Running);
    peer.join().unwrap();
}
