//! Peers that lie: streams made by hand, straight at a receiver, and receivers made by hand, for a real source.
//!
//! A receiver survives every one of them in little memory and then takes a good migration; a source's guest runs on, and
//! its user reads one sentence.
#![allow(clippy::unwrap_used, clippy::panic)]

use ferry_migration::options::Options;
use ferry_migration::page::Run;
use ferry_migration::port::Link;
use ferry_migration::report::{Report, Status};
use ferry_migration::wire::{
    Channel, FLAG_CRC, Features, FrameType, Header, Hello, HelloAck, PREAMBLE_BYTES, Preamble,
    Ready, Role, SessionId, encode_runs,
};
use ferry_tests::peer::{Opening, RawLink, abort_of, dial, greet, rest};
use ferry_tests::{Host, Proxy, State, guests_run, until};
use ferry_vmm::api::client::Action;
use std::io::Write;
use std::net::TcpListener;
use std::time::Duration;

const WORK: &str = "dirty:wss=4M,rate=1000";
/// A receiver without a guest, whatever was sent to it.
const MOST_RSS: u64 = 200 << 20;
const SESSION: SessionId = SessionId(*b"hostile-streams!");

/// What a real source says to begin with.
fn opening() -> Opening {
    let mut source = Host::run(WORK, "64M", 1);
    let destination = Host::receive();
    let proxy = Proxy::to(destination.address());
    source.migrate_well(&proxy.uri(), &Host::options());
    assert_eq!(source.ends(), Some(0));
    Opening::of(&proxy.opening())
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

fn preamble_of(version: u16, oldest: u16) -> Vec<u8> {
    let mut bytes = Preamble::new(Role::Control, 0, SESSION).encode().to_vec();
    bytes[8..10].copy_from_slice(&version.to_le_bytes());
    bytes[10..12].copy_from_slice(&oldest.to_le_bytes());
    let crc = crc32c::crc32c(&bytes[..60]);
    bytes[60..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// Nonsense before the greeting.
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
        // It gets our preamble, if anything, so that a ferry of another version can say both versions.
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
        (Role::Fault, "has no use for a fault channel"),
    ] {
        let sentence = abort_of(&mut greet(address, role, 3, SESSION));
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

/// Frames that are well-formed and wrong, before and after a good greeting.
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
    let checked = |header: Header, payload: Vec<u8>| {
        let header = Header {
            flags: FLAG_CRC,
            payload_crc: crc32c::crc32c(&payload),
            ..header
        };
        (header, payload)
    };
    // Before the greeting.
    for (name, (header, payload), expected) in [
        (
            "a commit",
            raw(bare(FrameType::Commit), vec![]),
            "a greeting",
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
            "a huge greeting",
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
            "a greeting",
        ),
        (
            "no JSON",
            checked(
                Header {
                    length: 9,
                    ..bare(FrameType::Hello)
                },
                b"\x05\0\0\0nope!".to_vec(),
            ),
            "cannot be understood",
        ),
        (
            "a short greeting",
            checked(
                Header {
                    length: 2,
                    ..bare(FrameType::Hello)
                },
                vec![1, 2],
            ),
            "truncated",
        ),
    ] {
        let mut channel = greet(address, Role::Control, 0, SESSION);
        channel.link().send(&header.encode(), &payload).unwrap();
        let sentence = abort_of(&mut channel);
        eprintln!("{name}: {sentence}");
        assert!(sentence.contains(expected), "{name}: {sentence}");
        drop(channel);
        survives(&receiver);
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
        (
            "too many channels",
            Hello {
                channels: u16::MAX,
                ..hello.clone()
            },
        ),
    ] {
        let mut channel = greet(address, Role::Control, 0, SESSION);
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
        survives(&receiver);
    }
    // After a good greeting.
    let table = |runs: &[Run]| {
        let mut bytes = Vec::new();
        encode_runs(runs, &mut bytes);
        bytes
    };
    let end = hello.layout.end();
    let page = |runs: &[Run], pages: usize| {
        let table = table(runs);
        let length = table.len() + pages * 4096;
        let header = Header {
            length: u32::try_from(length).unwrap(),
            count: u32::try_from(runs.len()).unwrap(),
            gfn: 16,
            payload_crc: crc32c::crc32c(&table),
            ..bare(FrameType::Pages)
        };
        (header, [table, vec![0xaa; pages * 4096]].concat())
    };
    let zero = |runs: &[Run]| {
        let table = table(runs);
        let header = Header {
            length: u32::try_from(table.len()).unwrap(),
            count: u32::try_from(runs.len()).unwrap(),
            gfn: 16,
            ..bare(FrameType::Zero)
        };
        checked(header, table)
    };
    for (name, (header, payload), expected) in [
        (
            "a second greeting",
            checked(
                Header {
                    length: 4,
                    ..bare(FrameType::Hello)
                },
                vec![0; 4],
            ),
            "was expected",
        ),
        (
            "a commit",
            raw(bare(FrameType::Commit), vec![]),
            "was expected",
        ),
        (
            "its own answer",
            checked(
                Header {
                    length: 2,
                    ..bare(FrameType::Ready)
                },
                b"{}".to_vec(),
            ),
            "was expected",
        ),
        (
            "a later round",
            raw(Header::bare(FrameType::RoundEnd, 5), vec![]),
            "the end of the next round",
        ),
        (
            "a state of another round",
            checked(
                Header {
                    length: 3,
                    ..Header::bare(FrameType::State, 9)
                },
                vec![1, 2, 3],
            ),
            "the end of the last round",
        ),
        (
            "no state",
            checked(
                Header {
                    length: 100,
                    ..bare(FrameType::State)
                },
                vec![7; 100],
            ),
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
            page(&[Run::new(end, 1)], 1),
            "not the guest's memory",
        ),
        (
            "a page far away",
            page(&[Run::new((1 << 48) - 1, 1)], 1),
            "not the guest's memory",
        ),
        (
            "a run over the end",
            page(&[Run::new(end - 1, 2)], 2),
            "not the guest's memory",
        ),
        (
            "zeros over the end",
            zero(&[Run::new(end - 5, 65_536)]),
            "not the guest's memory",
        ),
        (
            "zeros far away",
            zero(&[Run::new((1 << 48) - 1, 65_536)]),
            "not the guest's memory",
        ),
        ("a table that lists more", page(&[Run::new(16, 2)], 1), ""),
        (
            "a table that lists less",
            page(&[Run::new(16, 1), Run::new(20, 1)], 3),
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
            "a damaged table",
            {
                let (h, p) = zero(&[Run::new(16, 1)]);
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
        let mut channel = greeted(&receiver, &hello);
        channel.link().send(&header.encode(), &payload).unwrap();
        let sentence = abort_of(&mut channel);
        eprintln!("{name}: {sentence}");
        assert!(
            sentence.contains(expected) && !sentence.contains('\n'),
            "{name}: {sentence}"
        );
        drop(channel);
        survives(&receiver);
    }
    // A state of 64 MiB that never comes: memory grows with what is sent, not with what was promised.
    let mut channel = greeted(&receiver, &hello);
    let header = Header {
        length: 64 << 20,
        flags: FLAG_CRC,
        ..bare(FrameType::State)
    };
    channel.link().send(&header.encode(), &[0; 1000]).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    assert!(receiver.rss() < MOST_RSS);
    drop(channel);
    survives(&receiver);
    // A data channel of another migration, while one arrives; and one too many.
    let channel = greeted(
        &receiver,
        &Hello {
            channels: 1,
            ..hello.clone()
        },
    );
    for (index, session) in [(0, SessionId([9; 16])), (1, SESSION)] {
        let mut data = greet(address, Role::Data, index, session);
        if session == SESSION {
            // Closed without a word: it is no channel of this migration.
            assert!(data.recv_header().is_err() || index == 1);
        } else {
            let sentence = abort_of(&mut data);
            assert!(
                sentence.contains("no migration here has announced"),
                "{sentence}"
            );
        }
    }
    drop(channel);
    survives(&receiver);
    takes_a_good_migration(receiver);
}

/// A control channel whose greeting was accepted.
fn greeted(receiver: &Host, hello: &Hello) -> Channel<RawLink> {
    let mut channel = greet(receiver.address(), Role::Control, 0, SESSION);
    channel
        .send(Header::bare(FrameType::Hello, 0), &hello.encode())
        .unwrap();
    let header = channel.recv_header().unwrap();
    assert_eq!(
        header.kind,
        FrameType::HelloAck,
        "{}",
        abort_text(&mut channel, &header)
    );
    let _: HelloAck = channel.recv_json(&header).unwrap();
    channel.set_end(hello.layout.end());
    channel
}

fn abort_text(channel: &mut Channel<RawLink>, header: &Header) -> String {
    if header.kind != FrameType::Abort {
        return String::new();
    }
    let mut bytes = Vec::new();
    channel.recv_payload(header, &mut bytes).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
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

/// A receiver made by hand: takes one migration and does what the script says.
fn receiver(script: impl FnOnce(RawLink) + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("tcp:{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        script(RawLink(stream));
    });
    uri
}

/// Answers preamble and greeting as a receiver should.
fn accept(link: RawLink, features: Features) -> Channel<RawLink> {
    let mut channel = preambled(link);
    let header = channel.recv_header().unwrap();
    let mut bytes = Vec::new();
    channel.recv_payload(&header, &mut bytes).unwrap();
    let hello = Hello::decode(&bytes).unwrap();
    channel.set_end(hello.layout.end());
    channel
        .send_json(FrameType::HelloAck, &HelloAck { features })
        .unwrap();
    channel
}

fn preambled(link: RawLink) -> Channel<RawLink> {
    let mut channel = Channel::new(link);
    let theirs = channel.recv_preamble().unwrap();
    channel.send_preamble(&theirs).unwrap();
    channel
}

/// Takes frames and acknowledges rounds until the state has come.
fn until_state(channel: &mut Channel<RawLink>) {
    loop {
        let header = channel.recv_header().unwrap();
        let mut bytes = Vec::new();
        channel
            .recv_part(usize::try_from(header.length).unwrap(), &mut bytes)
            .unwrap();
        match header.kind {
            FrameType::RoundEnd => channel
                .send(Header::bare(FrameType::RoundAck, header.round), &[])
                .unwrap(),
            FrameType::State => return,
            _ => {}
        }
    }
}

fn hold(channel: Channel<RawLink>) {
    rest(&mut channel.into_link());
}

type Script = Box<dyn FnOnce(RawLink) + Send>;

/// Receivers that close, babble and lie: the guest runs on, and the report has one sentence that says why.
#[test]
fn a_source_survives_its_receiver() {
    if !guests_run() {
        return;
    }
    let source = Host::run(WORK, "64M", 1);
    let json = |kind: FrameType, text: &'static [u8]| -> Script {
        Box::new(move |link| {
            let mut channel = preambled(link);
            channel.recv_header().unwrap();
            channel.send(Header::bare(kind, 0), text).unwrap();
            hold(channel);
        })
    };
    let after = |frame: Header| -> Script {
        Box::new(move |link| {
            let mut channel = accept(link, Features::SUPPORTED);
            channel.send(frame, &[]).unwrap();
            hold(channel);
        })
    };
    let scripts: Vec<(&str, Script, &str)> = vec![
        ("closes", Box::new(drop), ""),
        (
            "babbles",
            Box::new(|mut l| {
                let _ = l.0.write_all(&[0x5a; 4096]);
                rest(&mut l);
            }),
            "does not speak ferry's migration protocol",
        ),
        (
            "another version",
            Box::new(|mut l| {
                let _ = l.0.write_all(&preamble_of(7, 5));
                rest(&mut l);
            }),
            "speaks migration protocol 7 (oldest 5), this ferry speaks 1",
        ),
        (
            "another session",
            Box::new(|mut l| {
                let _ = l.0.write_all(&preamble_of(1, 1));
                rest(&mut l);
            }),
            "belongs to migration",
        ),
        (
            "closes after the preamble",
            Box::new(|l| drop(preambled(l))),
            "",
        ),
        (
            "answers with noise",
            json(FrameType::HelloAck, b"\xff\xfe{"),
            "cannot be understood",
        ),
        (
            "answers deep JSON",
            json(FrameType::HelloAck, &[b'['; 60_000]),
            "cannot be understood",
        ),
        (
            "gives up in colour",
            json(FrameType::Abort, b"no\nroom \x1b[31mhere"),
            "the peer gave up: no room",
        ),
        (
            "is ready at once",
            json(FrameType::Ready, b"{\"verified\":true,\"restore_us\":1}"),
            "was expected",
        ),
        (
            "lacks what is needed",
            Box::new(|l| hold(accept(l, Features::default()))),
            "feature",
        ),
        (
            "says ready before its time",
            after(Header::bare(FrameType::Commit, 0)),
            "was expected",
        ),
        (
            "acknowledges what was not sent",
            after(Header::bare(FrameType::RoundAck, 7)),
            "",
        ),
        (
            "a huge answer",
            Box::new(|l| {
                let mut channel = accept(l, Features::SUPPORTED);
                let header = Header {
                    length: u32::MAX,
                    flags: FLAG_CRC,
                    ..Header::bare(FrameType::Abort, 0)
                };
                channel.link().send(&header.encode(), &[]).unwrap();
                hold(channel);
            }),
            "that cannot be",
        ),
        (
            "closes instead of ready",
            Box::new(|l| {
                let mut channel = accept(l, Features::SUPPORTED);
                until_state(&mut channel);
            }),
            "",
        ),
        (
            "runs before the commit",
            Box::new(|l| {
                let mut channel = accept(l, Features::SUPPORTED);
                until_state(&mut channel);
                channel
                    .send_json(
                        FrameType::Running,
                        &ferry_migration::wire::Running::default(),
                    )
                    .unwrap();
                hold(channel);
            }),
            "was expected",
        ),
        (
            "did not compare",
            Box::new(|l| {
                let mut channel = accept(l, Features::SUPPORTED);
                until_state(&mut channel);
                channel
                    .send_json(
                        FrameType::Ready,
                        &Ready {
                            verified: false,
                            restore_us: u64::MAX,
                        },
                    )
                    .unwrap();
                hold(channel);
            }),
            "compare",
        ),
    ];
    for (name, script, expected) in scripts {
        let report = source.migrate(&receiver(script), &Host::options());
        eprintln!("{name}: {:?}", report.error);
        failed(name, &report, expected);
        source.reaches(State::Running);
    }
    // Reads all and never answers: its user loses patience.
    for answered in [false, true] {
        let uri = receiver(move |mut link| {
            if answered {
                hold(accept(link, Features::SUPPORTED));
            } else {
                rest(&mut link);
            }
        });
        let migration = source.begin_migration(&uri, &Host::options());
        std::thread::sleep(Duration::from_millis(300));
        assert!(!migration.is_over());
        source.act(Action::Cancel).unwrap();
        assert_eq!(migration.report().status, Status::Cancelled);
        source.reaches(State::Running);
    }
    // Gives the guest back after it was handed over: the one lie that only an operator can judge.
    let uri = receiver(|link| {
        let mut channel = accept(link, Features::SUPPORTED);
        until_state(&mut channel);
        channel
            .send_json(
                FrameType::Ready,
                &Ready {
                    verified: true,
                    restore_us: 1,
                },
            )
            .unwrap();
        assert_eq!(channel.recv_header().unwrap().kind, FrameType::Commit);
        channel.send_abort("on second thoughts, no");
    });
    let report = source.migrate(&uri, &Host::options());
    assert_eq!(report.status, Status::InDoubt, "{report:#?}");
    source.reaches(State::InDoubt);
    assert!(source.recover(false).is_err());
    source.recover(true).unwrap();
    source.proves_running();
    source.verdict();
}

/// A receiver that never says a word: the source gives up by itself.
#[test]
fn a_source_gives_up_on_silence() {
    if !guests_run() {
        return;
    }
    let source = Host::run(WORK, "64M", 1);
    let uri = receiver(|mut link| {
        rest(&mut link);
    });
    let report = source.migrate(&uri, &Options::default());
    failed("silence", &report, "silent for");
    source.proves_running();
    source.verdict();
}

fn failed(name: &str, report: &Report, expected: &str) {
    assert_eq!(report.status, Status::Failed, "{name}: {report:#?}");
    let error = report.error.as_deref().unwrap();
    assert!(error.contains(expected), "{name}: {error}");
    assert!(
        !error.is_empty() && !error.chars().any(char::is_control),
        "{name}: {error:?}"
    );
}
