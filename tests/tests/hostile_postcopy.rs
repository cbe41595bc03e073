//! Post-copy with a side that lies. Sources made by hand hand a real receiver a guest and misbehave
//! while its pages follow; destinations made by hand take a real guest and ask for what cannot be.
//!
//! After the handover nothing that one side says may lose the guest at the other: it is kept, the
//! lie is named in a sentence, and an honest peer can go on.
#![allow(clippy::unwrap_used, clippy::panic)]

use ferry_migration::options::{Options, PolicyKind};
use ferry_migration::order::PushOrder;
use ferry_migration::page::{RamLayout, Run};
use ferry_migration::port::Link;
use ferry_migration::report::Status;
use ferry_migration::wire::{
    Arrived, Channel, FLAG_TELL, Features, FrameType, Header, Hello, Ready, Role, Running,
    SessionId,
};
use ferry_tests::peer::{
    Frame, RawLink, SESSION, abort_of, accept, checked, exchange_preamble, hold, listener,
    missing_frame, open_session, page_frame, preambled, send, still_frame, until_state, zero_frame,
};
use ferry_tests::{Host, State, TIMEOUT, guests_run, until};
use ferry_vmm::api::client::Action;
use ferry_vmm::api::types::RecoverRequest;
use ferry_vmm::machine::Machine;
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

/// Pages of the guests that are made by hand.
const PAGES: u64 = 4096;

/// What a source says that was made by hand: a machine that was just switched on and stands still.
struct Made {
    hello: Hello,
    state: Vec<u8>,
}

impl Made {
    fn new() -> Self {
        let machine = Machine::builder()
            .memory(PAGES * 4096)
            .cpus(1)
            .build()
            .unwrap();
        let hello = Hello {
            offered: Features::SUPPORTED,
            required: Features::POST_COPY,
            layout: RamLayout::new(vec![Run::new(0, PAGES)]).unwrap(),
            channels: 0,
            faults: 1,
            disks: Vec::new(),
            policy: "postcopy".into(),
            machine: serde_json::to_vec(machine.description()).unwrap(),
        };
        let paused = machine.pause().unwrap();
        // The first byte says whether it ran.
        let state = [vec![0], paused.save().unwrap().to_bytes().unwrap()].concat();
        Self { hello, state }
    }

    /// Hands the guest over; these pages are to follow.
    fn hand_over(&self, to: SocketAddr, missing: Run) -> Channel<RawLink> {
        let mut channel = open_session(to, &self.hello);
        // The receiver looks at this page (VMClock) before it says READY, and would ask for it.
        send(&mut channel, &still_frame(1, &[Run::new(0xee, 1)]));
        send(&mut channel, &missing_frame(&[missing]));
        send(
            &mut channel,
            &(Header::bare(FrameType::RoundEnd, 1), vec![]),
        );
        expect(&mut channel, FrameType::RoundAck);
        channel
            .send(Header::bare(FrameType::State, 1), &self.state)
            .unwrap();
        expect(&mut channel, FrameType::Ready);
        assert_eq!(commit(&mut channel).missing, missing.count);
        channel
    }
}

fn expect(channel: &mut Channel<RawLink>, kind: FrameType) -> Header {
    let header = channel.recv_header().unwrap();
    assert_eq!(header.kind, kind);
    let mut bytes = Vec::new();
    channel.recv_payload(&header, &mut bytes).unwrap();
    header
}

fn commit(channel: &mut Channel<RawLink>) -> Running {
    channel
        .send(Header::bare(FrameType::Commit, 1), &[])
        .unwrap();
    let header = channel.recv_header().unwrap();
    assert_eq!(header.kind, FrameType::Running);
    channel.recv_json(&header).unwrap()
}

/// Lies before the commit: the receiver says what is wrong, keeps nothing and waits for the next.
#[test]
fn a_receiver_refuses_before_the_commit() {
    if !guests_run() {
        return;
    }
    let made = Made::new();
    let receiver = Host::receive();
    let address = receiver.address();
    let without = |change: &dyn Fn(&mut Hello)| {
        let mut hello = made.hello.clone();
        change(&mut hello);
        hello
    };
    for (name, hello, expected) in [
        (
            "post-copy without a channel for faults",
            without(&|h| h.faults = 0),
            "no channel for page faults",
        ),
        (
            "more fault channels than there can be",
            without(&|h| h.faults = u16::MAX),
            "a migration has at most 64",
        ),
        (
            "a guest that does not fit",
            without(&|h| {
                let mut machine: serde_json::Value = serde_json::from_slice(&h.machine).unwrap();
                machine["memory"] = (1u64 << 42).into();
                h.machine = serde_json::to_vec(&machine).unwrap();
            }),
            "more than this host has available",
        ),
    ] {
        let mark = receiver.mark();
        let mut channel = exchange_preamble(address, Role::Control, 0, SESSION);
        channel
            .send(Header::bare(FrameType::Hello, 0), &hello.encode())
            .unwrap();
        let sentence = abort_of(&mut channel);
        eprintln!("{name}: {sentence}");
        assert!(sentence.contains(expected), "{name}: {sentence}");
        receiver.settles(mark);
    }
    let bits = |gfn| {
        let header = Header {
            gfn,
            count: 2,
            ..Header::bare(FrameType::MissingBits, 0)
        };
        checked(header, vec![0xff; 16])
    };
    let agreed = made.hello.clone();
    let not_agreed = without(&|h| (h.required, h.faults) = (Features::default(), 0));
    for (name, hello, frame, expected) in [
        (
            "missing pages behind the last",
            &agreed,
            missing_frame(&[Run::new(PAGES - 1, 2)]),
            "not the guest's memory",
        ),
        (
            "missing pages far away",
            &agreed,
            bits(1 << 40),
            "outside the guest's memory",
        ),
        (
            "missing pages half outside",
            &agreed,
            bits(PAGES - 64),
            "outside the guest's memory",
        ),
        (
            "missing pages that were not agreed on",
            &not_agreed,
            missing_frame(&[Run::new(0, 10)]),
            "was expected",
        ),
    ] {
        let mark = receiver.mark();
        let mut channel = open_session(address, hello);
        send(&mut channel, &frame);
        let sentence = abort_of(&mut channel);
        eprintln!("{name}: {sentence}");
        assert!(sentence.contains(expected), "{name}: {sentence}");
        drop(channel);
        receiver.settles(mark);
    }
}

/// Fault channels of no session, of another session, twice, and more than there are.
#[test]
fn fault_channels_are_counted() {
    if !guests_run() {
        return;
    }
    let made = Made::new();
    let receiver = Host::receive();
    let address = receiver.address();
    let refused =
        |index, session| abort_of(&mut exchange_preamble(address, Role::Fault, index, session));
    let unknown = "no migration here has announced this fault channel";
    assert!(refused(0, SESSION).contains(unknown));
    let channel = open_session(address, &made.hello);
    assert!(refused(0, SessionId([9; 16])).contains(unknown));
    let taken = "was not announced by its migration, or is connected already";
    assert!(refused(1, SESSION).contains(taken));
    assert!(refused(u16::MAX, SESSION).contains(taken));
    // Both have sent their preambles before either is taken: the receiver decides which is second.
    let fault = || exchange_preamble(address, Role::Fault, 0, SESSION);
    let mut both = [fault(), fault()];
    let mut told = None;
    until("a second fault channel of this number is refused", || {
        let timeout = Duration::from_millis(10);
        told = both
            .iter_mut()
            .position(|c| c.link().wait_readable(timeout).unwrap());
        told.is_some()
    });
    let second = &mut both[told.unwrap()];
    second.link().set_timeout(Some(TIMEOUT));
    assert!(abort_of(second).contains(taken));
    drop((both, channel));
    receiver.reaches(State::Receiving);
}

/// Lies while pages follow: the guest is the receiver's by then. It is kept, and an honest source
/// brings the rest.
#[test]
fn a_receiver_keeps_what_it_was_handed() {
    if !guests_run() {
        return;
    }
    let made = Made::new();
    // Without the page that `hand_over` sends.
    let all = Run::new(0, 128);
    let bare = |kind, round| (Header::bare(kind, round), vec![]);
    let lies: [(&str, Run, Vec<Frame>, &str); 8] = [
        (
            "a page twice",
            all,
            vec![
                still_frame(2, &[Run::new(5, 1)]),
                still_frame(2, &[Run::new(5, 1)]),
            ],
            "each page crosses once",
        ),
        (
            "zeros over a page that is there",
            all,
            vec![
                still_frame(2, &[Run::new(20, 1)]),
                zero_frame(&[Run::new(16, 10)]),
            ],
            "each page crosses once",
        ),
        (
            "a page that was never missing",
            Run::new(0, 100),
            vec![still_frame(2, &[Run::new(200, 1)])],
            "each page crosses once",
        ),
        (
            "a page behind the last",
            all,
            vec![zero_frame(&[Run::new(PAGES, 1)])],
            "not the guest's memory",
        ),
        (
            "pages without a checksum",
            all,
            vec![page_frame(&[Run::new(16, 1)], 1)],
            "pages with a checksum",
        ),
        (
            "the end of another round",
            all,
            vec![bare(FrameType::RoundEnd, 7)],
            "was expected",
        ),
        (
            "hashes before the end",
            all,
            vec![checked(
                Header {
                    count: 1,
                    ..Header::bare(FrameType::Verify, 2)
                },
                vec![0; 8],
            )],
            "was expected",
        ),
        (
            "a second state",
            all,
            vec![checked(Header::bare(FrameType::State, 2), vec![1; 100])],
            "was expected",
        ),
    ];
    for (name, missing, frames, expected) in lies {
        let mut receiver = Host::receive();
        let address = receiver.address();
        let mut channel = made.hand_over(address, missing);
        let _fault = exchange_preamble(address, Role::Fault, 0, SESSION);
        for frame in &frames {
            send(&mut channel, frame);
        }
        let sentence = abort_of(&mut channel);
        eprintln!("{name}: {sentence}");
        assert!(
            sentence.contains(expected) && !sentence.contains('\n'),
            "{name}: {sentence}"
        );
        // All but the last frame was as it should be.
        let here = frames.len() as u64 - 1;
        let status = || receiver.client().status().unwrap().missing;
        until("the receiver says what is missing", || {
            status().is_some_and(|l| l.lost.is_some())
        });
        let left = status().unwrap();
        assert_eq!(left.pages, missing.count - here, "{name}: {left:?}");
        assert!(left.lost.unwrap().contains(expected), "{name}");
        brings_the_rest(address, left.pages);
        until("nothing is missing", || status().is_none());
        assert_eq!(receiver.state(), State::Paused);
        receiver.act(Action::Stop).unwrap();
        assert_eq!(receiver.ends(), Some(0), "{:#?}", receiver.said());
    }
}

/// An honest source that reconnects.
fn brings_the_rest(to: SocketAddr, missing_now: u64) {
    let layout = RamLayout::new(vec![Run::new(0, PAGES)]).unwrap();
    let mut channel = exchange_preamble(to, Role::Recover, 0, SESSION);
    channel.set_end(PAGES);
    assert_eq!(commit(&mut channel).missing, missing_now);
    let mut missing = ferry_migration::page::PageSet::new(PAGES);
    while missing.len() < missing_now {
        let header = channel.recv_header().unwrap();
        ferry_migration::wire::recv_set(&mut channel, &header, &layout, &mut missing).unwrap();
    }
    assert_eq!(missing.len(), missing_now);
    let _fault = exchange_preamble(to, Role::Fault, 0, SESSION);
    for run in missing.runs() {
        send(&mut channel, &zero_frame(&[run]));
    }
    send(
        &mut channel,
        &(Header::bare(FrameType::RoundEnd, 1), vec![]),
    );
    let header = channel.recv_header().unwrap();
    assert_eq!(header.kind, FrameType::Arrived);
    let arrived: Arrived = channel.recv_json(&header).unwrap();
    assert_eq!((arrived.different, arrived.ended), (0, false));
}

/// Takes the guest as a destination should, up to and with the commit.
fn takes(link: RawLink, listener: &TcpListener) -> (Channel<RawLink>, Channel<RawLink>) {
    takes_as(
        link,
        listener,
        &Running {
            missing: 1000,
            ..Running::default()
        },
    )
}

fn takes_as(
    link: RawLink,
    listener: &TcpListener,
    running: &Running,
) -> (Channel<RawLink>, Channel<RawLink>) {
    let mut control = accept(link, Features::SUPPORTED);
    let (stream, _) = listener.accept().unwrap();
    let mut fault = preambled(RawLink(stream));
    fault.set_end(u64::MAX);
    until_state(&mut control);
    let ready = Ready {
        verified: false,
        compare_us: 0,
        restore_us: 1,
    };
    control.send_json(FrameType::Ready, &ready).unwrap();
    expect(&mut control, FrameType::Commit);
    control.send_json(FrameType::Running, running).unwrap();
    (control, fault)
}

/// Slow enough that the push is under way when the lie arrives.
fn slowly() -> Options {
    Options {
        policy: PolicyKind::Postcopy,
        bandwidth: Some(2_000_000),
        verify: false,
        ..Host::options()
    }
}

const WORK: &str = "dirty:wss=4M,rate=1000";

/// Requests that cannot be, and a word that comes too soon: the source keeps its pages, and runs
/// nothing.
#[test]
fn a_source_keeps_what_was_not_fetched() {
    if !guests_run() {
        return;
    }
    let request = |gfn, count| Header {
        gfn,
        count,
        ..Header::bare(FrameType::PageRequest, 0)
    };
    for (name, lie, expected) in [
        (
            "a page that is not RAM",
            request(1 << 40, 1),
            "outside the guest's memory",
        ),
        (
            "as many pages as can be written",
            request(0, u32::MAX),
            "outside the guest's memory",
        ),
        (
            "more pages than are waited for",
            request(0, 4000),
            "asked for 4000 pages from page 0x0 at once",
        ),
        ("no pages", request(0, 0), "that cannot be"),
        (
            "a commit of its own",
            Header::bare(FrameType::Commit, 0),
            "was expected",
        ),
    ] {
        let uri = listener(move |link, listener| {
            let (control, mut fault) = takes(link, listener);
            fault.link().send(&lie.encode(), &[]).unwrap();
            hold(control);
        });
        keeps_its_pages(name, &uri, expected);
    }
    let uri = listener(|link, listener| {
        let (mut control, _fault) = takes(link, listener);
        let arrived = Arrived::default();
        control.send_json(FrameType::Arrived, &arrived).unwrap();
        hold(control);
    });
    keeps_its_pages(
        "everything has arrived, it says",
        &uri,
        "were not sent to it",
    );
}

/// Migrates to a destination that lies after it took the guest.
fn keeps_its_pages(name: &str, uri: &str, expected: &str) {
    let mut source = Host::run(WORK, "32M", 1);
    let report = source.migrate(uri, &slowly());
    let error = report.error.as_deref().unwrap();
    eprintln!("{name}: {error}");
    assert_eq!(report.status, Status::Interrupted, "{name}: {report:#?}");
    assert!(
        error.contains(expected) && !error.chars().any(char::is_control),
        "{name}: {error}"
    );
    source.reaches(State::Interrupted);
    let refused = source.recover(true).unwrap_err();
    assert!(refused.contains("a second copy"), "{refused}");
    source.act(Action::Stop).unwrap();
    assert_eq!(source.ends(), Some(0));
}

/// Destinations that claim that pages are missing which cannot be, when the source reconnects.
#[test]
fn a_source_does_not_believe_every_lack() {
    if !guests_run() {
        return;
    }
    let source = Host::run(WORK, "32M", 1);
    let uri = listener(|link, listener| drop(takes(link, listener)));
    let report = source.migrate(&uri, &slowly());
    assert_eq!(report.status, Status::Interrupted, "{report:#?}");
    let lies: [(&str, u64, Vec<Frame>, &str); 4] = [
        (
            "more pages than there are",
            u64::MAX,
            vec![],
            "of a guest that has 8192",
        ),
        (
            "pages that are not RAM",
            10,
            vec![missing_frame(&[Run::new(8190, 10)])],
            "not the guest's memory",
        ),
        (
            "the same pages again and again",
            10,
            vec![
                missing_frame(&[Run::new(0, 5)]),
                missing_frame(&[Run::new(0, 5)]),
            ],
            "not listed before",
        ),
        (
            "no list",
            10,
            vec![(Header::bare(FrameType::RoundAck, 1), vec![])],
            "the missing pages",
        ),
    ];
    for (name, missing, frames, expected) in lies {
        is_not_believed(&source, name, missing, frames, expected);
    }
}

/// A destination that lost what it had, at a source that has given it back.
#[test]
fn a_source_sends_nothing_that_it_has_given_back() {
    if !guests_run() {
        return;
    }
    let source = Host::run(WORK, "32M", 1);
    let uri = listener(|link, listener| {
        let running = Running {
            missing: 8000,
            tells: true,
            ..Running::default()
        };
        let (mut control, _fault) = takes_as(link, listener, &running);
        let mut placed = 0;
        while placed < 4000 {
            let header = control.recv_header().unwrap();
            let length = usize::try_from(header.length).unwrap();
            control.recv_part(length, &mut Vec::new()).unwrap();
            if header.flags & FLAG_TELL != 0 {
                let told = Header::bare(FrameType::Placed, header.round);
                control.send(told, &[]).unwrap();
            }
            placed += u64::from(header.count);
        }
    });
    let options = Options {
        free_source: true,
        order: PushOrder::Flush,
        bandwidth: None,
        ..slowly()
    };
    let report = source.migrate(&uri, &options);
    assert_eq!(report.status, Status::Interrupted, "{report:#?}");
    let freed = report.freed.unwrap();
    assert!(freed.bytes >= 2 << 20, "{freed:?}");
    // All of its pages: what it had is among them.
    let all = vec![missing_frame(&[Run::new(0, 8192)])];
    let name = "what it had said to have";
    is_not_believed(&source, name, 8192, all, "gave it back here");
}

/// What a destination lists as missing is refused with this sentence, and the source keeps its
/// pages.
fn is_not_believed(source: &Host, name: &str, missing: u64, frames: Vec<Frame>, expected: &str) {
    let uri = listener(move |link, _| {
        let mut control = preambled(link);
        expect(&mut control, FrameType::Commit);
        let running = Running {
            missing,
            ..Running::default()
        };
        control.send_json(FrameType::Running, &running).unwrap();
        for frame in &frames {
            send(&mut control, frame);
        }
        hold(control);
    });
    let request = RecoverRequest {
        uri: Some(uri),
        ..RecoverRequest::default()
    };
    let error = source.client().recover(&request).unwrap_err().to_string();
    eprintln!("{name}: {error}");
    assert!(error.contains(expected), "{name}: {error}");
    assert_eq!(source.state(), State::Interrupted);
}
