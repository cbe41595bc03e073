//! Sources that lie: streams made by hand, straight at a receiver.
//!
//! A receiver survives every one of them in little memory and then takes a good migration.
#![allow(clippy::unwrap_used, clippy::panic)]

use ferry_migration::page::Run;
use ferry_migration::port::Link;
use ferry_migration::wire::{
    Channel, Encoding, FLAG_CRC, Features, FrameType, Header, Hello, PREAMBLE_BYTES, Preamble,
    Role, SessionId,
};
use ferry_tests::peer::{
    Opening, RawLink, SESSION, abort_of, checked, coded_frame, dial, exchange_preamble,
    open_session, page_frame, preamble_of, rest, send, zero_frame,
};
use ferry_tests::{Host, Proxy, State, guests_run, until};
use std::io::Write;
use std::time::Duration;

const WORK: &str = "dirty:wss=4M,rate=1000";
/// A receiver without a guest, whatever was sent to it.
const MOST_RSS: u64 = 200 << 20;

/// What a real source says to begin with.
fn opening() -> Opening {
    let mut source = Host::run(WORK, "64M", 1);
    let destination = Host::receive();
    let proxy = Proxy::to(destination.address());
    source.migrate_well(&proxy.uri(), &Host::options());
    assert_eq!(source.ends(), Some(0));
    Opening::of(&proxy.opening())
}

/// What has arrived since the mark has ended, and did no harm.
fn survives_it(receiver: &Host, mark: usize) {
    receiver.settles(mark);
    survives(receiver);
}

fn survives(receiver: &Host) {
    receiver.reaches(State::Receiving);
    assert!(
        receiver.rss() < MOST_RSS,
        "{} bytes resident",
        receiver.rss()
    );
}

fn takes_a_good_migration(receiver: Host) {
    let mut source = Host::run(WORK, "64M", 1);
    source.migrate_well(receiver.uri(), &Host::options());
    assert_eq!(source.ends(), Some(0));
    receiver.verdict();
}

/// Nonsense before the handshake.
#[test]
fn a_receiver_survives_strangers() {
    if !guests_run() {
        return;
    }
    let receiver = Host::receive();
    let address = receiver.address();
    let mut http = b"GET / HTTP/1.1\r\nHost: example\r\n".to_vec();
    http.resize(PREAMBLE_BYTES, b' ');
    for (bytes, expected) in [
        (http, "does not speak ferry's migration protocol"),
        (vec![0; 4096], "does not speak ferry's migration protocol"),
        (
            preamble_of(9, 8),
            "speaks migration protocol 9 (oldest 8), this ferry speaks 1 (oldest 1)",
        ),
        (preamble_of(1, 3), "speaks migration protocol 1 (oldest 3)"),
        (preamble_of(1, 1)[..40].to_vec(), "closed the connection"),
    ] {
        let mut link = dial(address);
        link.0.write_all(&bytes).unwrap();
        // It may have hung up already.
        let _ = link.0.shutdown(std::net::Shutdown::Write);
        let answer = rest(&mut link);
        // It gets our preamble, if anything, so that a ferry of another version can say both
        // versions.
        assert!(
            answer.is_empty() || answer.starts_with(b"FERRYMIG"),
            "{answer:?}"
        );
        receiver.says(expected);
        survives(&receiver);
    }
    for (role, expected) in [
        (
            Role::Data,
            "no migration here has announced this data channel",
        ),
        (Role::Recover, "does not know that migration"),
        (
            Role::Fault,
            "no migration here has announced this fault channel",
        ),
    ] {
        let sentence = abort_of(&mut exchange_preamble(address, role, 3, SESSION));
        assert!(sentence.contains(expected), "{sentence}");
        survives(&receiver);
    }
    // Slow garbage.
    let mut link = dial(address);
    for i in 0..PREAMBLE_BYTES {
        link.0.write_all(&i.to_le_bytes()[..1]).unwrap();
        std::thread::sleep(Duration::from_millis(5));
    }
    rest(&mut link);
    survives(&receiver);
    takes_a_good_migration(receiver);
}

/// Frames that are well-formed and wrong, before and after a good handshake.
#[test]
fn a_receiver_survives_lies() {
    if !guests_run() {
        return;
    }
    let Opening { hello, .. } = opening();
    let receiver = Host::receive();
    let address = receiver.address();
    let bare = |kind| Header::bare(kind, 0);
    let raw = |header: Header, payload: Vec<u8>| (header, payload);
    // Before the handshake.
    for (name, frame, expected) in [
        (
            "a commit",
            raw(bare(FrameType::Commit), vec![]),
            "a handshake",
        ),
        (
            "a page",
            raw(
                Header {
                    length: 8 + 4096,
                    count: 1,
                    gfn: 5,
                    ..bare(FrameType::Pages)
                },
                vec![],
            ),
            "outside the guest's memory",
        ),
        (
            "a block",
            checked(
                Header::of_blocks(FrameType::Blocks, 0, Run::new(0, 1)),
                vec![1; 65536],
            ),
            "a handshake",
        ),
        (
            "a huge handshake",
            raw(
                Header {
                    length: u32::MAX,
                    flags: FLAG_CRC,
                    ..bare(FrameType::Hello)
                },
                vec![],
            ),
            "that cannot be",
        ),
        (
            "a state",
            raw(
                Header {
                    length: 64 << 20,
                    flags: FLAG_CRC,
                    ..bare(FrameType::State)
                },
                vec![0; 1000],
            ),
            "a handshake",
        ),
        (
            "no JSON",
            checked(bare(FrameType::Hello), b"\x05\0\0\0nope!".to_vec()),
            "cannot be understood",
        ),
        (
            "a short handshake",
            checked(bare(FrameType::Hello), vec![1, 2]),
            "truncated",
        ),
    ] {
        let mark = receiver.mark();
        let mut channel = exchange_preamble(address, Role::Control, 0, SESSION);
        send(&mut channel, &frame);
        let sentence = abort_of(&mut channel);
        eprintln!("{name}: {sentence}");
        assert!(sentence.contains(expected), "{name}: {sentence}");
        drop(channel);
        survives_it(&receiver, mark);
    }
    // Greetings that cannot be.
    let with = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut machine: serde_json::Value = serde_json::from_slice(&hello.machine).unwrap();
        change(&mut machine);
        Hello {
            machine: serde_json::to_vec(&machine).unwrap(),
            ..hello.clone()
        }
    };
    let with_disks = |bytes: &[u64]| Hello {
        required: Features::DISKS,
        disks: bytes.to_vec(),
        ..hello.clone()
    };
    for (name, hello) in [
        (
            "an enormous machine",
            with(&|m| m["memory"] = (1u64 << 60).into()),
        ),
        ("no memory", with(&|m| m["memory"] = 0.into())),
        ("many processors", with(&|m| m["cpus"] = 100_000.into())),
        (
            "more memory than announced",
            with(&|m| m["memory"] = (128u64 << 20).into()),
        ),
        (
            "no machine",
            Hello {
                machine: vec![],
                ..hello.clone()
            },
        ),
        (
            "a nested machine",
            Hello {
                machine: vec![b'['; 100_000],
                ..hello.clone()
            },
        ),
        (
            "a feature from the future",
            Hello {
                required: Features(1 << 63),
                ..hello.clone()
            },
        ),
        ("a disk that is not here", with_disks(&[1 << 20])),
        ("an empty disk", with_disks(&[0])),
        ("no disks", with_disks(&[])),
        ("endless disks", with_disks(&[u64::MAX; 64])),
        ("many disks", with_disks(&[512; 10_000])),
        (
            "too many channels",
            Hello {
                channels: u16::MAX,
                ..hello.clone()
            },
        ),
    ] {
        let mark = receiver.mark();
        let mut channel = exchange_preamble(address, Role::Control, 0, SESSION);
        channel
            .send(bare(FrameType::Hello), &hello.encode())
            .unwrap();
        let sentence = abort_of(&mut channel);
        eprintln!("{name}: {sentence}");
        assert!(
            !sentence.is_empty() && !sentence.contains('\n'),
            "{name}: {sentence}"
        );
        drop(channel);
        survives_it(&receiver, mark);
    }
    // After a good handshake.
    let end = hello.layout.end();
    let compressed = zstd::bulk::compress(&[7; 2 * 4096], 1).unwrap();
    for (name, frame, expected) in [
        (
            "a second handshake",
            checked(bare(FrameType::Hello), vec![0; 4]),
            "was expected",
        ),
        (
            "a commit",
            raw(bare(FrameType::Commit), vec![]),
            "was expected",
        ),
        (
            "a block of a disk that was not announced",
            checked(
                Header::of_blocks(FrameType::Blocks, 0, Run::new(0, 1)),
                vec![1; 65536],
            ),
            "was expected",
        ),
        (
            "its own answer",
            checked(bare(FrameType::Ready), b"{}".to_vec()),
            "was expected",
        ),
        (
            "a later round",
            raw(Header::bare(FrameType::RoundEnd, 5), vec![]),
            "the end of the next round",
        ),
        (
            "a state of another round",
            checked(Header::bare(FrameType::State, 9), vec![1, 2, 3]),
            "the end of the last round",
        ),
        (
            "no state",
            checked(bare(FrameType::State), vec![7; 100]),
            "",
        ),
        (
            "a page request",
            raw(
                Header {
                    count: 1,
                    gfn: 1,
                    ..bare(FrameType::PageRequest)
                },
                vec![],
            ),
            "was expected",
        ),
        (
            "a page after the last",
            page_frame(&[Run::new(end, 1)], 1),
            "not the guest's memory",
        ),
        (
            "a page far away",
            page_frame(&[Run::new((1 << 48) - 1, 1)], 1),
            "not the guest's memory",
        ),
        (
            "a run over the end",
            page_frame(&[Run::new(end - 1, 2)], 2),
            "not the guest's memory",
        ),
        (
            "zeros over the end",
            zero_frame(&[Run::new(end - 5, 65_536)]),
            "not the guest's memory",
        ),
        (
            "zeros far away",
            zero_frame(&[Run::new((1 << 48) - 1, 65_536)]),
            "not the guest's memory",
        ),
        (
            "a table that lists more",
            page_frame(&[Run::new(16, 2)], 1),
            "",
        ),
        (
            "a table that lists less",
            page_frame(&[Run::new(16, 1), Run::new(20, 1)], 3),
            "",
        ),
        (
            "an impossible length",
            raw(
                Header {
                    length: 4097,
                    count: 1,
                    gfn: 1,
                    ..bare(FrameType::Pages)
                },
                vec![],
            ),
            "that cannot be",
        ),
        (
            "hashes of nothing",
            raw(
                Header {
                    length: 8,
                    count: 2,
                    flags: FLAG_CRC,
                    ..bare(FrameType::Verify)
                },
                vec![],
            ),
            "that cannot be",
        ),
        (
            "pages that decompress to more",
            coded_frame(Encoding::Zstd, &[Run::new(16, 1)], &compressed),
            "cannot be decompressed",
        ),
        (
            "pages that decompress to less",
            coded_frame(Encoding::Zstd, &[Run::new(16, 3)], &compressed),
            "8192 bytes for 3 pages",
        ),
        (
            "a difference to a page that was never sent",
            coded_frame(Encoding::Patch, &[Run::new(16, 1)], &[0; 6]),
            "never sent here",
        ),
        (
            "a damaged table",
            {
                let (h, p) = zero_frame(&[Run::new(16, 1)]);
                (
                    Header {
                        payload_crc: 1,
                        ..h
                    },
                    p,
                )
            },
            "damaged",
        ),
    ] {
        let mark = receiver.mark();
        let mut channel = open_session(address, &hello);
        send(&mut channel, &frame);
        let sentence = abort_of(&mut channel);
        eprintln!("{name}: {sentence}");
        assert!(
            sentence.contains(expected) && !sentence.contains('\n'),
            "{name}: {sentence}"
        );
        drop(channel);
        survives_it(&receiver, mark);
    }
    // A state of 64 MiB that never comes: memory grows with what is sent, not with what was
    // promised.
    let mut channel = open_session(address, &hello);
    let header = Header {
        length: 64 << 20,
        flags: FLAG_CRC,
        ..bare(FrameType::State)
    };
    channel.link().send(&header.encode(), &[0; 1000]).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    assert!(receiver.rss() < MOST_RSS);
    let mark = receiver.mark();
    drop(channel);
    survives_it(&receiver, mark);
    // A data channel of another migration, while one arrives; and one too many.
    let channel = open_session(
        address,
        &Hello {
            channels: 1,
            ..hello.clone()
        },
    );
    for (index, session) in [(0, SessionId([9; 16])), (1, SESSION)] {
        let mut data = exchange_preamble(address, Role::Data, index, session);
        if session == SESSION {
            // Closed without a word: it is no channel of this migration.
            assert!(data.recv_header().is_err());
        } else {
            let sentence = abort_of(&mut data);
            assert!(
                sentence.contains("no migration here has announced"),
                "{sentence}"
            );
        }
    }
    let mark = receiver.mark();
    drop(channel);
    survives_it(&receiver, mark);
    takes_a_good_migration(receiver);
}

/// Two hundred connections at once that say nothing, or half a sentence.
#[test]
fn a_receiver_survives_a_crowd() {
    if !guests_run() {
        return;
    }
    let receiver = Host::receive();
    let mut crowd: Vec<RawLink> = (0..200).map(|_| dial(receiver.address())).collect();
    for (i, link) in crowd.iter_mut().enumerate() {
        // Some of them were closed already: there were too many.
        let _ = link
            .0
            .write_all(&Preamble::new(Role::Control, 0, SESSION).encode()[..i % PREAMBLE_BYTES]);
    }
    assert_eq!(receiver.state(), State::Receiving);
    assert!(receiver.rss() < MOST_RSS, "{}", receiver.rss());
    drop(crowd);
    // The last of them may still be on its way out.
    until("a migration is taken again", || {
        let mut channel = Channel::new(dial(receiver.address()));
        channel
            .send_preamble(&Preamble::new(Role::Fault, 0, SESSION))
            .is_ok()
            && channel.recv_preamble().is_ok()
    });
    survives(&receiver);
    takes_a_good_migration(receiver);
}
