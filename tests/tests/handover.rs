//! Faults around the handover: the few messages in which a guest changes hands, and processes
//! killed with `kill -9`.
//!
//! The proxy holds the source's words back from the moment the destination is ready: the commit is
//! on its way, and the test decides what becomes of it.
#![allow(clippy::unwrap_used, clippy::panic)]

use ferry_migration::options::Options;
use ferry_migration::report::Status;
use ferry_tests::peer::verified_ready_at;
use ferry_tests::{Action, Host, Migration, Proxy, State, Way, guests_run, is_locked, until};

const WORK: &str = "dirty:wss=4M,rate=1000";

struct Pair {
    source: Host,
    destination: Host,
    proxy: Proxy,
    migration: Migration,
}

/// A migration whose source is committed, and whose commit is held back.
fn committed() -> Pair {
    committed_with(&[])
}

/// The same, of a guest with these devices.
fn committed_with(devices: &[&str]) -> Pair {
    let source = Host::run_with(WORK, "64M", 1, devices);
    let destination = Host::receive_with(devices);
    let proxy = Proxy::to(destination.address());
    proxy.plan(Way::Back, verified_ready_at(), Action::Freeze(Way::Forth));
    let options = Options {
        max_rounds: Some(1),
        ..Host::options()
    };
    let migration = source.begin_migration(&proxy.uri(), &options);
    proxy.wait_hits(1);
    // "ready" has a header and a few bytes; the source commits when it has read it.
    until("the source has committed", || {
        let phase = source.client().status().unwrap().migration.map(|m| m.phase);
        phase == Some(ferry_migration::report::Phase::Committed)
    });
    // The source repeats its commit on new connections: nothing passes until a test allows it.
    proxy.allow(proxy.connections());
    Pair {
        source,
        destination,
        proxy,
        migration,
    }
}

/// Neither side runs it, and both say what can be done.
fn both_in_doubt(source: &Host, destination: &Host) {
    destination.reaches(State::InDoubt);
    source.reaches(State::InDoubt);
    for host in [source, destination] {
        let status = host.client().status().unwrap();
        assert!(
            status.explanation.contains("ferry recover"),
            "{}",
            status.explanation
        );
    }
    // Not by itself, not by a resume either.
    for host in [source, destination] {
        let refused = host
            .act(ferry_vmm::api::client::Action::Resume)
            .unwrap_err();
        assert!(refused.contains("cannot resume"), "{refused}");
    }
    assert_eq!(
        (source.state(), destination.state()),
        (State::InDoubt, State::InDoubt)
    );
}

/// The connection breaks before, in and after the commit; `ferry recover` at the source ends the
/// doubt.
#[test]
fn recover_at_the_source_ends_the_doubt() {
    if !guests_run() {
        return;
    }
    for passed in [0, 1, 16, 31] {
        let Pair {
            mut source,
            destination,
            proxy,
            migration,
        } = committed();
        proxy.plan(Way::Forth, proxy.passed(Way::Forth) + passed, Action::Cut);
        proxy.thaw(Way::Forth);
        let report = migration.report();
        eprintln!("cut after {passed} bytes of the commit: {:?}", report.error);
        assert_eq!(report.status, Status::InDoubt, "{report:#?}");
        both_in_doubt(&source, &destination);
        proxy.allow(u64::MAX);
        source.recover(false).unwrap();
        assert_eq!(source.ends(), Some(0), "{:?}", source.said());
        assert_eq!(destination.state(), State::Running);
        destination.verdict();
    }
}

/// The commit arrives and its confirmation does not: the guest runs there, the source is in doubt
/// until it asks.
#[test]
fn a_lost_confirmation_is_asked_for() {
    if !guests_run() {
        return;
    }
    for at in ["lost", "damaged"] {
        let Pair {
            mut source,
            destination,
            proxy,
            migration,
        } = committed();
        if at == "lost" {
            proxy.freeze(Way::Back);
        } else {
            proxy.plan(Way::Back, proxy.passed(Way::Back) + 5, Action::Flip(0));
        }
        proxy.thaw(Way::Forth);
        destination.reaches(State::Running);
        proxy.cut();
        let report = migration.report();
        assert_eq!(report.status, Status::InDoubt, "{at} {report:#?}");
        source.reaches(State::InDoubt);
        destination.proves_running();
        proxy.allow(u64::MAX);
        source.recover(false).unwrap();
        assert_eq!(source.ends(), Some(0));
        destination.verdict();
    }
}

/// The commit is lost and the network comes back: the source repeats the commit by itself, before
/// it reports a doubt and after that.
#[test]
fn a_lost_commit_is_repeated_without_an_operator() {
    if !guests_run() {
        return;
    }
    for reported in [false, true] {
        let Pair {
            mut source,
            destination,
            proxy,
            migration,
        } = committed();
        if reported {
            proxy.cut();
            assert_eq!(migration.report().status, Status::InDoubt);
            both_in_doubt(&source, &destination);
            proxy.allow(u64::MAX);
        } else {
            proxy.allow(u64::MAX);
            proxy.cut();
            let report = migration.report();
            assert_eq!(report.status, Status::Completed, "{report:#?}");
        }
        assert_eq!(source.ends(), Some(0), "{:?}", source.said());
        assert_eq!(destination.state(), State::Running);
        destination.verdict();
    }
}

/// "ready" is lost, and so is the source's word that it keeps its guest: the source runs it, the
/// destination holds a copy that does not run, and can be told to end.
#[test]
fn a_destination_that_hears_nothing_holds_still() {
    if !guests_run() {
        return;
    }
    let source = Host::run(WORK, "64M", 1);
    let mut destination = Host::receive();
    let proxy = Proxy::to(destination.address());
    proxy.allow(1);
    proxy.plan(Way::Back, verified_ready_at(), Action::Cut);
    let options = Options {
        max_rounds: Some(1),
        ..Host::options()
    };
    let report = source.migrate(&proxy.uri(), &options);
    assert_eq!(report.status, Status::Failed, "{report:#?}");
    assert_eq!(source.state(), State::Running);
    destination.reaches(State::InDoubt);
    assert!(destination.guest_lines().is_empty());
    // Ending it would discard the only copy, for all it knows: it has to be said twice.
    destination
        .act(ferry_vmm::api::client::Action::Stop)
        .unwrap_or_else(|e| eprintln!("the first stop: {e}"));
    if destination
        .client()
        .status()
        .is_ok_and(|s| s.state == State::InDoubt)
    {
        destination
            .act(ferry_vmm::api::client::Action::Stop)
            .unwrap();
    }
    assert_eq!(destination.ends(), Some(0), "{:?}", destination.said());
    source.proves_running();
    source.verdict();
}

/// The source dies with its commit unsent: an operator's word at the destination saves the guest.
#[test]
fn take_over_at_the_destination() {
    if !guests_run() {
        return;
    }
    let Pair {
        mut source,
        destination,
        proxy,
        migration,
    } = committed();
    source.kill();
    proxy.cut();
    assert!(migration.outcome().is_err());
    destination.reaches(State::InDoubt);
    let refused = destination.recover(false).unwrap_err();
    assert!(refused.contains("--take-over"), "{refused}");
    destination.recover(true).unwrap();
    destination.proves_running();
    destination.verdict();
}

/// An operator takes over at the destination while the source lives: the source then learns that
/// from `ferry recover`.
#[test]
fn a_source_learns_that_the_destination_took_over() {
    if !guests_run() {
        return;
    }
    let Pair {
        mut source,
        destination,
        proxy,
        migration,
    } = committed();
    proxy.cut();
    assert_eq!(migration.report().status, Status::InDoubt);
    both_in_doubt(&source, &destination);
    destination.recover(true).unwrap();
    destination.proves_running();
    proxy.allow(u64::MAX);
    source.recover(false).unwrap();
    assert_eq!(source.ends(), Some(0));
    destination.verdict();
}

/// The destination dies with the commit unread: `recover` cannot reach it and says so, and an
/// operator's word at the source saves the guest.
#[test]
fn take_over_at_the_source() {
    if !guests_run() {
        return;
    }
    let Pair {
        source,
        mut destination,
        proxy,
        migration,
    } = committed();
    destination.kill();
    proxy.cut();
    assert_eq!(migration.report().status, Status::InDoubt);
    source.reaches(State::InDoubt);
    let refused = source.recover(false).unwrap_err();
    assert!(!refused.contains('\n') && refused.len() > 20, "{refused}");
    eprintln!("recover without a destination: {refused}");
    assert_eq!(source.state(), State::InDoubt);
    source.recover(true).unwrap();
    source.proves_running();
    source.verdict();
}

/// Either side is killed while memory is on its way: the other one goes on as if nothing had been.
#[test]
fn a_killed_process_on_the_way() {
    if !guests_run() {
        return;
    }
    let slow = Options {
        bandwidth: Some(10_000_000),
        ..Host::options()
    };
    let mut destination = Host::receive();
    let mut victim = Host::run(WORK, "64M", 1);
    let mut source = Host::run(WORK, "64M", 1);
    for wanted in [1, 1 << 20, 8 << 20] {
        let proxy = Proxy::to(destination.address());
        proxy.stall_at(wanted);
        let mark = destination.mark();
        let migration = victim.begin_migration(&proxy.uri(), &slow);
        until("memory is on its way", || {
            proxy.passed(Way::Forth) >= wanted
        });
        victim.kill();
        proxy.go_on();
        assert!(migration.outcome().is_err());
        // Of one that has sent no preamble yet nothing is said.
        if wanted > 1 {
            destination.settles(mark);
        }
        victim = Host::run(WORK, "64M", 1);
    }
    for wanted in [1, 1 << 20, 8 << 20] {
        let proxy = Proxy::to(destination.address());
        proxy.stall_at(wanted);
        let migration = source.begin_migration(&proxy.uri(), &slow);
        until("memory is on its way", || {
            proxy.passed(Way::Forth) >= wanted
        });
        destination.kill();
        proxy.go_on();
        let report = migration.report();
        assert_eq!(report.status, Status::Failed, "{report:#?}");
        source.proves_running();
        destination = Host::receive();
    }
    source.migrate_well(destination.uri(), &Host::options());
    assert_eq!(source.ends(), Some(0));
    destination.verdict();
}

/// A disk's image, and who has its lock.
struct Image {
    path: tempfile::NamedTempFile,
}

impl Image {
    fn new() -> Self {
        let path = tempfile::NamedTempFile::new().unwrap();
        path.as_file().set_len(1 << 20).unwrap();
        Self { path }
    }

    fn option(&self) -> &str {
        self.path.path().to_str().unwrap()
    }

    /// A process has it: a host that may run the guest.
    fn is_locked(&self) -> bool {
        is_locked(self.path.path())
    }
}

/// Up to the commit the disk is the source's, whatever becomes of the destination; in doubt it is
/// unlocked; and then it is that side's which runs the guest, and by it the other side cannot, not
/// even by an operator's mistaken word.
#[test]
fn in_doubt_the_disk_belongs_to_the_side_that_may_run_the_guest() {
    if !guests_run() {
        return;
    }
    let image = Image::new();
    let devices = ["--disk", image.option()];
    let Pair {
        source,
        destination,
        proxy,
        migration,
    } = committed_with(&devices);
    proxy.cut();
    assert_eq!(migration.report().status, Status::InDoubt);
    both_in_doubt(&source, &destination);
    assert!(!image.is_locked(), "neither side may run the guest");
    destination.recover(true).unwrap();
    assert_eq!(destination.state(), State::Running);
    assert!(image.is_locked());
    let refused = source.recover(true).unwrap_err();
    assert!(refused.contains("in use"), "{refused}");
    assert_eq!(source.state(), State::InDoubt);
    destination.proves_running();
    // What the source was told to do it would still do, were the destination gone.
    drop(destination);
    until("the destination's lock is gone", || !image.is_locked());
    source.recover(true).unwrap();
    source.proves_running();
    assert!(image.is_locked());
    source.verdict();
}

/// The destination of a guest with a disk is killed before the commit, and with the commit on its
/// way.
#[test]
fn a_killed_destination_leaves_the_disk_to_the_source() {
    if !guests_run() {
        return;
    }
    let image = Image::new();
    let devices = ["--disk", image.option()];
    let source = Host::run_with(WORK, "64M", 1, &devices);
    let mut destination = Host::receive_with(&devices);
    let proxy = Proxy::to(destination.address());
    proxy.plan(Way::Back, verified_ready_at(), Action::Freeze(Way::Back));
    let options = Options {
        max_rounds: Some(1),
        ..Host::options()
    };
    let migration = source.begin_migration(&proxy.uri(), &options);
    proxy.wait_hits(1);
    // It is ready, and the source does not know.
    assert!(image.is_locked());
    destination.kill();
    proxy.cut();
    assert_eq!(migration.report().status, Status::Failed);
    source.proves_running();
    assert!(image.is_locked());
    source.verdict();
    assert!(!image.is_locked());

    let Pair {
        source,
        mut destination,
        proxy,
        migration,
    } = committed_with(&devices);
    destination.kill();
    proxy.cut();
    assert_eq!(migration.report().status, Status::InDoubt);
    source.reaches(State::InDoubt);
    assert!(!image.is_locked());
    source.recover(true).unwrap();
    assert!(image.is_locked());
    source.proves_running();
    source.verdict();
}

/// The source of a guest with a disk is killed with its commit unsent: its lock died with it.
#[test]
fn a_killed_source_leaves_the_disk_to_the_destination() {
    if !guests_run() {
        return;
    }
    let image = Image::new();
    let Pair {
        mut source,
        destination,
        proxy,
        migration,
    } = committed_with(&["--disk", image.option()]);
    source.kill();
    proxy.cut();
    assert!(migration.outcome().is_err());
    destination.reaches(State::InDoubt);
    assert!(!image.is_locked());
    destination.recover(true).unwrap();
    assert_eq!(destination.state(), State::Running);
    assert!(image.is_locked());
    destination.proves_running();
    destination.verdict();
    assert!(!image.is_locked());
}
