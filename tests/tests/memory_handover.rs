//! Guests change processes on one host without a byte of their memory being copied; and what goes
//! wrong on the way.
#![allow(clippy::unwrap_used, clippy::panic)]

use ferry_guest_images::{Class, Kernel, Line, Problem};
use ferry_migration::options::{Handover, Options, PolicyKind};
use ferry_migration::report::{Phase, Status};
use ferry_migration::wire::{Channel, Features, FrameType, Header, Hello, HelloAck, Role};
use ferry_tests::peer::{Opening, SESSION, abort_of, handshake_on, shared_ready_at};
use ferry_tests::{Host, Migration, Relay, State, UnixLink, guests_run, until};
use ferry_vmm::memory::SharedRam;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use std::os::fd::OwnedFd;

const WORK: &str = "dirty:wss=4M,rate=1000";

/// Nothing but a hand-over will do, and both sides compare all memory.
fn options() -> Options {
    Options {
        handover: Handover::On,
        ..Host::options()
    }
}

/// To a second process and on to a third, while the guest works.
fn twice(mut source: Host, policy: PolicyKind, more: &[&str]) -> Host {
    for _ in 0..2 {
        let destination = Host::receive_unix_with(more);
        let options = Options {
            policy,
            ..options()
        };
        let report = source.migrate_well(destination.uri(), &options);
        eprintln!("{:?} downtime {:.2} ms", policy, report.downtime_ms);
        assert_eq!(report.policy, "handover", "{report:#?}");
        assert_eq!(source.ends(), Some(0), "{:#?}", source.said());
        destination.says("the guest has arrived");
        destination.proves_running();
        source = destination;
    }
    source
}

/// Every pattern of the writer, one processor and two, whatever policy was asked for.
#[test]
fn writers_move_twice_in_the_same_memory() {
    if !guests_run() {
        return;
    }
    let policies = PolicyKind::ALL.iter().cycle();
    for (pattern, &policy) in ["sequential", "uniform", "zipf"].into_iter().zip(policies) {
        for cpus in [1, 2] {
            let work = format!("dirty:wss=8M,rate=4000,pattern={pattern}");
            let last = twice(Host::run(&work, "64M", cpus), policy, &[]);
            assert!(last.verdict().writes > 0);
        }
    }
}

/// Every kernel; its results agree with the published references.
#[test]
fn kernels_compute_on_in_the_same_memory() {
    if !guests_run() {
        return;
    }
    for kernel in Kernel::ALL {
        // Where many processes share this host, the larger class of all of them would take minutes.
        let class = match kernel {
            Kernel::Is | Kernel::Mg => Class::W,
            _ => Class::S,
        };
        let kernel = &Problem { kernel, class }.to_string();
        let last = twice(
            Host::run_kernel(kernel, "96M", 1),
            PolicyKind::Postcopy,
            &[],
        );
        last.guest_line("a result", |l| matches!(l, Line::Result(_)));
        last.result();
    }
}

/// The disk's lock goes with the guest; a guest that was paused arrives paused; pages are copied
/// where that is asked for.
#[test]
fn a_disk_a_paused_guest_and_a_copy() {
    if !guests_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk");
    std::fs::File::create(&image)
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    let disk = ["--disk", image.to_str().unwrap()];
    let source = Host::run_with(WORK, "64M", 1, &disk);
    let source = twice(source, PolicyKind::Precopy, &disk);
    source.act(ferry_vmm::api::client::Action::Pause).unwrap();
    let paused = Host::receive_unix_with(&disk);
    let report = source.migrate(paused.uri(), &options());
    assert_eq!(report.status, Status::Completed, "{report:#?}");
    assert_eq!(paused.state(), State::Paused);
    paused.act(ferry_vmm::api::client::Action::Resume).unwrap();
    paused.proves_running();
    let last = Host::receive_unix_with(&disk);
    let copied = Options {
        handover: Handover::Off,
        ..Host::options()
    };
    let report = paused.migrate_well(last.uri(), &copied);
    assert_eq!(report.policy, "precopy");
    assert!(report.pages.sent > 1000, "{report:#?}");
    assert_eq!(last.state(), State::Running);
    last.verdict();
}

/// Through something that forwards bytes only, memory is copied, unless that was ruled out.
#[test]
fn where_files_do_not_pass_pages_do() {
    if !guests_run() {
        return;
    }
    let source = Host::run(WORK, "64M", 1);
    let destination = Host::receive_unix();
    let relay = Relay::to(destination.uri());
    relay.without_files();
    let report = source.migrate(&relay.uri(), &options());
    assert_eq!(report.status, Status::Failed, "{report:#?}");
    let why = report.error.unwrap();
    assert!(why.contains("--handover off"), "{why}");
    source.proves_running();
    let tcp = Host::receive();
    let why = source.migrate(tcp.uri(), &options()).error.unwrap();
    assert!(why.contains("unix:PATH"), "{why}");
    let report = source.migrate_well(&relay.uri(), &Host::options());
    assert_eq!(report.policy, "precopy");
    assert_eq!(destination.state(), State::Running);
    destination.verdict();
}

struct Pair {
    source: Host,
    destination: Host,
    relay: Relay,
    migration: Migration,
}

impl Pair {
    /// A migration whose answers are held back from this byte on.
    fn held_back(at: u64) -> Self {
        let source = Host::run(WORK, "64M", 1);
        let destination = Host::receive_unix();
        let relay = Relay::to(destination.uri());
        relay.hold_back_at(at);
        let migration = source.begin_migration(&relay.uri(), &options());
        relay.answered(at);
        Self {
            source,
            destination,
            relay,
            migration,
        }
    }

    /// A migration whose source is committed, and whose commit is held back.
    fn committed() -> Self {
        let source = Host::run(WORK, "64M", 1);
        let destination = Host::receive_unix();
        let relay = Relay::to(destination.uri());
        relay.hold_forth_at(shared_ready_at() + 1);
        // The source repeats its commit on new connections: none passes.
        relay.alone();
        let migration = source.begin_migration(&relay.uri(), &options());
        until("the source has committed", || {
            let migration = source.client().status().unwrap().migration;
            migration.is_some_and(|m| m.phase == Phase::Committed)
        });
        Self {
            source,
            destination,
            relay,
            migration,
        }
    }

    /// The commit is lost.
    fn in_doubt(self) -> (Host, Host, Relay) {
        self.relay.cut();
        let report = self.migration.report();
        assert_eq!(report.status, Status::InDoubt, "{report:#?}");
        self.source.reaches(State::InDoubt);
        self.destination.reaches(State::InDoubt);
        (self.source, self.destination, self.relay)
    }
}

fn refused(host: &Host, why: &str) {
    let refused = host.recover(true).unwrap_err();
    assert!(refused.contains(why), "{refused}");
    assert!(!refused.contains('\n'), "{refused}");
}

const HELD: &str = "another process has the guest's memory";
const STALE: &str = "has run the guest since";

/// The source asks again, and the destination runs the guest.
#[test]
fn recover_ends_the_doubt() {
    if !guests_run() {
        return;
    }
    let (mut source, destination, relay) = Pair::committed().in_doubt();
    relay.together();
    source.recover(false).unwrap();
    assert_eq!(source.ends(), Some(0), "{:?}", source.said());
    assert_eq!(destination.state(), State::Running);
    destination.verdict();
}

/// An operator's word on one side; the other cannot run the guest in the same memory then, whatever
/// the operator says, nor after the first has died.
#[test]
fn an_operator_cannot_run_it_twice() {
    if !guests_run() {
        return;
    }
    for destination_first in [true, false] {
        let (source, destination, _relay) = Pair::committed().in_doubt();
        let (mut first, second) = if destination_first {
            (destination, source)
        } else {
            (source, destination)
        };
        first.recover(true).unwrap();
        first.proves_running();
        refused(&second, HELD);
        first.proves_running();
        if destination_first {
            first.verdict();
        } else {
            first.kill();
        }
        refused(&second, STALE);
        assert_eq!(second.state(), State::InDoubt);
    }
}

/// Killed around the commit: the other side has all of the memory.
#[test]
fn a_killed_process_takes_no_memory_with_it() {
    if !guests_run() {
        return;
    }
    // The source, with its commit unsent.
    let mut pair = Pair::committed();
    pair.source.kill();
    pair.relay.cut();
    assert!(pair.migration.outcome().is_err());
    pair.destination.reaches(State::InDoubt);
    pair.destination.recover(true).unwrap();
    pair.destination.proves_running();
    pair.destination.verdict();
    // The destination, with the commit unread.
    let mut pair = Pair::committed();
    pair.destination.kill();
    pair.relay.cut();
    assert_eq!(pair.migration.report().status, Status::InDoubt);
    pair.source.reaches(State::InDoubt);
    pair.source.recover(true).unwrap();
    pair.source.proves_running();
    pair.source.verdict();
    // The destination, before it has the state.
    let mut pair = Pair::held_back(shared_ready_at());
    pair.destination.kill();
    pair.relay.cut();
    assert_eq!(pair.migration.report().status, Status::Failed);
    pair.source.proves_running();
    pair.source.verdict();
}

/// The source is killed when the destination runs the guest and has not told it yet.
#[test]
fn a_guest_outlives_the_process_that_made_its_memory() {
    if !guests_run() {
        return;
    }
    let mut pair = Pair::committed();
    // What is answered so far has passed: "ready". What comes next is that it runs.
    pair.relay.hold_back_at(0);
    pair.relay.release_forth();
    pair.destination.reaches(State::Running);
    pair.source.kill();
    pair.relay.cut();
    pair.destination.proves_running();
    pair.destination.verdict();
}

/// "ready" is lost: the source runs on; the destination, which keeps what it has, can never run it.
#[test]
fn a_source_that_runs_on_cannot_be_overrun() {
    if !guests_run() {
        return;
    }
    let mut pair = Pair::held_back(shared_ready_at());
    // Not even that the source keeps its guest can be said.
    pair.relay.alone();
    pair.relay.holds_back();
    pair.relay.cut();
    let report = pair.migration.report();
    assert_eq!(report.status, Status::Failed, "{report:#?}");
    pair.source.proves_running();
    pair.destination.reaches(State::InDoubt);
    refused(&pair.destination, HELD);
    pair.source.proves_running();
    pair.source.kill();
    refused(&pair.destination, STALE);
}

fn memfd(bytes: u64, seals: SealFlags) -> OwnedFd {
    let file = memfd_create("a lie", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&file, bytes).unwrap();
    fcntl_add_seals(&file, seals).unwrap();
    file
}

fn descriptors(host: &Host) -> usize {
    let path = format!("/proc/{}/fd", host.pid());
    std::fs::read_dir(path).unwrap().count()
}

fn word() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC).unwrap()
}

/// Bytes of the guests whose handshakes are repeated.
const MEMORY: u64 = 64 << 20;

/// A source, a receiver, and the handshake that the one said to the other, without files.
fn recorded() -> (Host, Host, Hello) {
    let source = Host::run(WORK, "64M", 1);
    let receiver = Host::receive_unix();
    let relay = Relay::to(receiver.uri());
    relay.without_files();
    let mark = receiver.mark();
    let why = source.migrate(&relay.uri(), &options()).error.unwrap();
    eprintln!("recorded: {why}");
    let hello = Opening::of(&relay.said()).hello;
    receiver.settles(mark);
    (source, receiver, hello)
}

/// Says a handshake, and these files beside it.
fn offers(receiver: &Host, hello: &Hello, files: Vec<OwnedFd>) -> Channel<UnixLink> {
    let mut channel = handshake_on(UnixLink::connect(receiver.uri()), Role::Control, 0, SESSION);
    channel.link().files = files;
    channel
        .send(Header::bare(FrameType::Hello, 0), &hello.encode())
        .unwrap();
    channel
}

/// A case was refused for the right reason, in one sentence.
fn is_refused(name: &str, sentence: &str, expected: &str) {
    eprintln!("{name}: {sentence}");
    assert!(sentence.contains(expected), "{name}: {sentence}");
    assert!(!sentence.contains('\n'), "{name}: {sentence}");
}

/// Files that are not the guest's memory, too many, too few: refused in a sentence, closed, and the
/// next is welcome.
#[test]
fn a_receiver_survives_files_that_lie() {
    if !guests_run() {
        return;
    }
    let (source, receiver, hello) = recorded();
    let before = descriptors(&receiver);
    let good = SealFlags::SHRINK | SealFlags::GROW;
    let with = |memory| vec![memory, word()];
    let disk = || {
        let file = tempfile::tempfile().unwrap();
        file.set_len(MEMORY).unwrap();
        OwnedFd::from(file)
    };
    let required = |required| Hello {
        required,
        ..hello.clone()
    };
    let must = required(Features::SHARED_MEMORY);
    let may = required(Features::default());
    let cases: Vec<(&str, &Hello, Vec<OwnedFd>, &str)> = vec![
        ("none", &must, vec![], "none came"),
        ("too small", &must, with(memfd(MEMORY / 2, good)), "bytes"),
        ("too big", &must, with(memfd(MEMORY * 2, good)), "bytes"),
        (
            "unsealed",
            &must,
            with(memfd(MEMORY, SealFlags::GROW)),
            "none came",
        ),
        (
            "unwritable",
            &may,
            with(memfd(MEMORY, good | SealFlags::FUTURE_WRITE)),
            "cannot be written",
        ),
        ("a file", &may, with(disk()), "not a memory file"),
        ("an event", &may, with(word()), "not a memory file"),
        ("half", &must, vec![memfd(MEMORY, good)], "a part only"),
        (
            "too many",
            &may,
            (0..SharedRam::SPARES + 3)
                .map(|_| memfd(MEMORY, good))
                .collect(),
            "more files",
        ),
    ];
    for (name, hello, files, expected) in cases {
        let mark = receiver.mark();
        let mut channel = offers(&receiver, hello, files);
        is_refused(name, &abort_of(&mut channel), expected);
        drop(channel);
        receiver.settles(mark);
    }
    // One that could be cut is left alone where the source may copy instead.
    let mark = receiver.mark();
    let mut channel = offers(&receiver, &may, with(memfd(MEMORY, SealFlags::GROW)));
    let header = channel.recv_header().unwrap();
    let ack: HelloAck = channel.recv_json(&header).unwrap();
    assert!(!ack.features.has(Features::SHARED_MEMORY));
    drop(channel);
    receiver.settles(mark);
    // A page where none is expected.
    let mut channel = offers(&receiver, &must, with(memfd(MEMORY, good)));
    channel.set_end(must.layout.end());
    assert_eq!(channel.recv_header().unwrap().kind, FrameType::HelloAck);
    drop(channel);
    until("everything was closed", || descriptors(&receiver) <= before);
    source.migrate_well(receiver.uri(), &options());
    assert_eq!(receiver.state(), State::Running);
    receiver.verdict();
}

/// Files that are no taps, too many, or nothing of the kind: the same.
#[test]
fn a_receiver_survives_taps_that_lie() {
    if !guests_run() {
        return;
    }
    let (source, receiver, hello) = recorded();
    // This guest has no card, so its source offers nothing.
    assert!(!hello.offered.has(Features::SHARED_FILES));
    let hello = Hello {
        offered: hello.offered.or(Features::SHARED_FILES),
        ..hello
    };
    let null = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    let good = || memfd(MEMORY, SealFlags::SHRINK | SealFlags::GROW);
    let before = descriptors(&receiver);
    let cases = [
        ("no tap", FrameType::Files, 1, "no tap device at all"),
        ("memory again", FrameType::Files, 0, "no tap device at all"),
        ("too many", FrameType::Files, 14, "more files"),
        (
            "another word",
            FrameType::Commit,
            1,
            "the files of the guest's devices",
        ),
    ];
    for (name, kind, files, expected) in cases {
        let mark = receiver.mark();
        let mut channel = offers(&receiver, &hello, vec![good(), word()]);
        assert_eq!(channel.recv_header().unwrap().kind, FrameType::FilesWanted);
        channel.link().files = match files {
            0 => vec![good()],
            n => (0..n).map(|_| null()).collect(),
        };
        channel.send(Header::bare(kind, 0), &[]).unwrap();
        is_refused(name, &abort_of(&mut channel), expected);
        drop(channel);
        receiver.settles(mark);
    }
    until("everything was closed", || descriptors(&receiver) <= before);
    source.migrate_well(receiver.uri(), &options());
    receiver.verdict();
}
