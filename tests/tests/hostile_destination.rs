//! Destinations that lie: receivers made by hand, for a real source.
//!
//! The source's guest runs on, and its user reads one sentence.
#![allow(clippy::unwrap_used, clippy::panic)]

use ferry_migration::options::Options;
use ferry_migration::port::Link;
use ferry_migration::report::{Report, Status};
use ferry_migration::wire::{FLAG_CRC, Features, FrameType, Header, HelloAck, Ready};
use ferry_tests::peer::{
    RawLink, accept, accept_with, hold, preamble_of, preambled, receiver, rest, until_state,
};
use ferry_tests::{Host, State, guests_run};
use ferry_vmm::api::client::Action;
use ferry_vmm::machine::MachineState;
use std::io::Write;
use std::time::Duration;

const WORK: &str = "dirty:wss=4M,rate=1000";

type Script = Box<dyn FnOnce(RawLink) + Send>;

/// Receivers that close, babble and lie: the guest runs on, and the report has one sentence that
/// says why.
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
                            compare_us: 0,
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
    state_versions(&source);
    // Reads all and never answers: its user loses timeout.
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
                    compare_us: 0,
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

/// The state comes in the version that the destination reads; where there is none, the guest is
/// not even paused.
fn state_versions(source: &Host) {
    for (reads, comes) in [(None, 3), (Some(3), 3), (Some(4), 4), (Some(9), 4)] {
        let (tell, told) = std::sync::mpsc::channel();
        let uri = receiver(move |link| {
            let ack = HelloAck {
                features: Features::SUPPORTED.without(Features::SHARED_MEMORY),
                state: reads,
            };
            let mut channel = accept_with(link, &ack);
            let state = until_state(&mut channel);
            channel.send_abort("seen enough");
            tell.send(state).unwrap();
        });
        let name = format!("reads {reads:?}");
        let report = source.migrate(&uri, &Host::options());
        failed(&name, &report, "seen enough");
        // The byte before it says whether the guest ran.
        let state = told.recv().unwrap();
        assert_eq!(&state[1..9], b"FRYSTATE", "{name}");
        assert_eq!(state[9..13], u32::to_le_bytes(comes), "{name}");
        MachineState::from_bytes(&state[1..]).unwrap();
        source.reaches(State::Running);
    }
    let uri = receiver(|link| {
        let ack = HelloAck {
            features: Features::SUPPORTED,
            state: Some(2),
        };
        hold(accept_with(link, &ack));
    });
    let report = source.migrate(&uri, &Host::options());
    failed(
        "reads 2",
        &report,
        "version 2, but this ferry writes versions 3 to 4",
    );
    assert_eq!(report.rounds.len(), 0, "{report:#?}");
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
    failed("silence", &report, "longer than this step may take");
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
