//! A network that breaks at every stage, and processes that are killed.
//!
//! After each fault exactly one guest runs, or both sides say that they are in doubt and the
//! documented way out works. The guest then verifies everything it ever wrote.
#![allow(clippy::unwrap_used, clippy::panic)]

use ferry_migration::options::{Compress, Options};
use ferry_migration::report::{Report, Status};
use ferry_migration::wire::HEADER_BYTES;
use ferry_tests::peer::{Opening, verified_ready_at};
use ferry_tests::{Action, Host, Proxy, State, Way, guests_run};
use ferry_vmm::api::client::Action as Ask;
use std::time::Duration;

const WORK: &str = "dirty:wss=4M,rate=1000";

/// One live round and the last: so the messages of every run lie at the same places in the stream
/// of answers.
fn two_rounds() -> Options {
    Options {
        max_rounds: Some(1),
        // What a codec saves depends on the clock: offsets would move.
        compress: Compress::None,
        ..Host::options()
    }
}

/// The guest is still the source's: it runs there, and the receiver has nothing and waits.
fn stays(source: &Host, destination: &Host, report: &Report, paused: bool, mark: usize) {
    assert_eq!(report.status, Status::Failed, "{report:#?}");
    let error = report.error.as_deref().unwrap();
    assert!(!error.is_empty() && !error.contains('\n'), "{error}");
    source.reaches(if paused {
        State::Paused
    } else {
        State::Running
    });
    destination.settles(mark);
}

/// What a migration of this guest says before it is committed: how many bytes, and where its second
/// frame begins. Its "ready" is cut off, so the guest stays.
fn measure(source: &Host, destination: &Host) -> (u64, u64) {
    let (before, mark) = (source.state(), destination.mark());
    let proxy = Proxy::to(destination.address());
    proxy.plan(Way::Back, verified_ready_at(), Action::Cut);
    let report = source.migrate(&proxy.uri(), &two_rounds());
    assert_eq!(proxy.hits(), 1, "{report:#?}");
    assert_eq!(report.rounds.len(), 2, "{report:#?}");
    source.reaches(before);
    destination.settles(mark);
    (
        proxy.passed(Way::Forth),
        Opening::of(&proxy.opening()).frames_at,
    )
}

/// Cut anywhere before the commit, in either direction: the guest stays, and after all cuts it
/// still moves.
#[test]
fn a_cut_before_the_commit_leaves_the_guest() {
    if !guests_run() {
        return;
    }
    let mut source = Host::run(WORK, "64M", 1);
    let destination = Host::receive();
    let (forth, frames) = measure(&source, &destination);
    let head = HEADER_BYTES as u64;
    let ready = verified_ready_at();
    let cut = |way, at, paused| {
        let mark = destination.mark();
        let proxy = Proxy::to(destination.address());
        proxy.plan(way, at, Action::Cut);
        let report = source.migrate(&proxy.uri(), &two_rounds());
        assert_eq!(proxy.hits(), 1, "{way:?} {at}");
        eprintln!(
            "cut {way:?} at {at}: {}",
            report.error.as_deref().unwrap_or("none")
        );
        stays(&source, &destination, &report, paused, mark);
    };
    // In the handshake, at and in the first frames, and all over memory.
    let handshake = [
        0,
        1,
        63,
        64,
        80,
        96,
        frames - 1,
        frames,
        frames + 1,
        frames + head + 3,
    ];
    let memory = (1..8).map(|part| forth * part / 8);
    for at in handshake.into_iter().chain(memory) {
        cut(Way::Forth, at, false);
    }
    // In every answer up to and in "ready".
    let acks = [ready - 2 * head, ready - head - 1, ready - head, ready - 1];
    for at in [0, 1, 64, 70, 96]
        .into_iter()
        .chain(acks)
        .chain([ready, ready + 1, ready + head + 2])
    {
        cut(Way::Back, at, false);
    }
    // In the last pages, the hashes and the state, whose places are known where the guest stands
    // still.
    source.act(Ask::Pause).unwrap();
    let (forth, _) = measure(&source, &destination);
    for before_end in [200_000, 100_000, 20_000, 2_000, 100] {
        cut(Way::Forth, forth - before_end, true);
    }
    source.act(Ask::Resume).unwrap();
    source.proves_running();
    source.migrate_well(destination.uri(), &Host::options());
    assert_eq!(source.ends(), Some(0));
    destination.verdict();
}

/// A direction that ends while the other goes on (half-closed): the guest stays.
#[test]
#[ignore = "waits for a minute in all: tests/run --long"]
fn a_truncated_direction_leaves_the_guest() {
    if !guests_run() {
        return;
    }
    let source = Host::run(WORK, "64M", 1);
    let destination = Host::receive();
    for (way, at) in [
        (Way::Forth, 70),
        (Way::Forth, 1 << 20),
        (Way::Forth, 40 << 20),
        (Way::Back, 64),
        (Way::Back, verified_ready_at() - 10),
    ] {
        let mark = destination.mark();
        let proxy = Proxy::to(destination.address());
        proxy.plan(way, at, Action::Truncate);
        let report = source.migrate(&proxy.uri(), &two_rounds());
        eprintln!(
            "truncated {way:?} at {at}: {}",
            report.error.as_deref().unwrap_or("none")
        );
        stays(&source, &destination, &report, false, mark);
    }
    source.proves_running();
    source.verdict();
}

/// Bits that flip under a checksum, and under `--verify` where there is none: refused, the guest
/// stays.
#[test]
fn flipped_bits_are_found() {
    if !guests_run() {
        return;
    }
    let ready = verified_ready_at();
    let mut source = Host::run(WORK, "64M", 1);
    let destination = Host::receive();
    // A guest that stands still is sent in the same bytes every time.
    source.act(Ask::Pause).unwrap();
    let (forth, frames) = measure(&source, &destination);
    let flips = [
        ("magic", Way::Forth, 3),
        ("session", Way::Forth, 25),
        ("preamble's checksum", Way::Forth, 62),
        ("handshake's length", Way::Forth, 69),
        ("handshake's header checksum", Way::Forth, 94),
        ("handshake's JSON", Way::Forth, 120),
        ("machine's description", Way::Forth, frames - 5),
        ("first page frame's header", Way::Forth, frames + 9),
        (
            "first run table",
            Way::Forth,
            frames + HEADER_BYTES as u64 + 2,
        ),
        ("a live page", Way::Forth, forth * 6 / 10),
        ("hashes", Way::Forth, forth - 70_000),
        ("state", Way::Forth, forth - 2_000),
        ("answered preamble", Way::Back, 30),
        ("answer's header", Way::Back, 70),
        ("answer's JSON", Way::Back, 97),
        ("acknowledgement", Way::Back, ready - 40),
        ("ready's header", Way::Back, ready + 4),
        ("ready's JSON", Way::Back, ready + 40),
    ];
    for (name, way, at) in flips {
        let mark = destination.mark();
        let proxy = Proxy::to(destination.address());
        proxy.plan(way, at, Action::Flip(5));
        let report = source.migrate(&proxy.uri(), &two_rounds());
        assert_eq!(proxy.hits(), 1, "{name}");
        let error = report
            .error
            .clone()
            .unwrap_or_else(|| panic!("{name}: {report:#?}"));
        eprintln!("flipped in {name}: {error}");
        stays(&source, &destination, &report, true, mark);
        if name == "a live page" {
            assert!(error.contains("guest memory differs"), "{error}");
        }
    }
    source.act(Ask::Resume).unwrap();
    source.migrate_well(destination.uri(), &Host::options());
    assert_eq!(source.ends(), Some(0));
    destination.verdict();
}

/// Bytes that were never sent appear in the stream.
#[test]
fn injected_garbage_is_refused() {
    if !guests_run() {
        return;
    }
    let source = Host::run(WORK, "64M", 1);
    let destination = Host::receive();
    let (_, frames) = measure(&source, &destination);
    for (way, at, length) in [
        (Way::Forth, 0, 1),
        (Way::Forth, 64, 32),
        (Way::Forth, frames, 32),
        (Way::Forth, frames, 4096),
        (Way::Back, 0, 64),
        (Way::Back, 64, 33),
        (Way::Back, verified_ready_at(), 100),
    ] {
        let mark = destination.mark();
        let proxy = Proxy::to(destination.address());
        let garbage = (0..length)
            .map(|i: u32| i.wrapping_mul(167).to_le_bytes()[0])
            .collect();
        proxy.plan(way, at, Action::Insert(garbage));
        let report = source.migrate(&proxy.uri(), &two_rounds());
        eprintln!(
            "{length} bytes of garbage {way:?} at {at}: {}",
            report.error.as_deref().unwrap_or("none")
        );
        stays(&source, &destination, &report, false, mark);
    }
    source.verdict();
}

/// A slow network only takes longer; one that stands still can be cancelled, and the guest stays.
#[test]
fn delays_and_stalls() {
    if !guests_run() {
        return;
    }
    let mut source = Host::run(WORK, "64M", 1);
    let destination = Host::receive();
    for (way, at) in [
        (Way::Forth, 64),
        (Way::Forth, 20 << 20),
        (Way::Back, 64),
        (Way::Back, verified_ready_at() - 32),
    ] {
        let mark = destination.mark();
        let proxy = Proxy::to(destination.address());
        proxy.plan(way, at, Action::Freeze(way));
        let migration = source.begin_migration(&proxy.uri(), &two_rounds());
        proxy.wait_hits(1);
        source.act(Ask::Cancel).unwrap();
        let report = migration.report();
        eprintln!("stalled {way:?} at {at}: {:?}", report.error);
        assert_eq!(report.status, Status::Cancelled, "{report:#?}");
        source.reaches(State::Running);
        // The destination cannot know while nothing reaches it.
        proxy.cut();
        destination.settles(mark);
    }
    let proxy = Proxy::to(destination.address());
    proxy.plan(Way::Forth, 0, Action::Delay(Duration::from_millis(2)));
    source.migrate_well(&proxy.uri(), &Host::options());
    assert_eq!(source.ends(), Some(0));
    destination.verdict();
}
