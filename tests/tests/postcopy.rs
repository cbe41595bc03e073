//! Post-copy under faults: a guest that runs at the destination while its pages are still at the
//! source is not lost, whatever breaks, and never runs twice.
//!
//! The connections go through a proxy that stalls in the middle of the push, until the test has
//! broken what it wants.
#![allow(clippy::unwrap_used, clippy::panic)]

use ferry_migration::options::{Options, PolicyKind};
use ferry_migration::order::PushOrder;
use ferry_migration::report::{Phase, Report, Status};
use ferry_tests::peer::ready_at;
use ferry_tests::{Action, Host, Migration, Proxy, Ran, State, Way, guests_run, run, until};
use ferry_vmm::api::client::Action as Ask;
use ferry_vmm::vmm::Missing;

/// Touches all of its memory, so that it soon needs a page that is not there.
const WORK: &str = "dirty:wss=24M,rate=2000";
const MEMORY: &str = "40M";
/// How much has crossed when the test breaks something: the guest runs there, and most of it is
/// still here.
const BEGUN: u64 = 4 << 20;

fn options(order: PushOrder) -> Options {
    Options {
        policy: PolicyKind::Postcopy,
        order,
        bandwidth: Some(8_000_000),
        ..Host::options()
    }
}

/// A migration in the middle of its push, where it stays until the proxy goes on.
struct Pushing {
    source: Host,
    destination: Host,
    proxy: Proxy,
    migration: Migration,
}

impl Pushing {
    fn begin(order: PushOrder, cpus: u32) -> Self {
        Self::begin_with(&options(order), cpus)
    }

    fn begin_with(options: &Options, cpus: u32) -> Self {
        let source = Host::run(WORK, MEMORY, cpus);
        let destination = Host::receive();
        let proxy = Proxy::to(destination.address());
        proxy.stall_at(BEGUN);
        let migration = source.begin_migration(&proxy.uri(), options);
        until("pages follow the guest", || {
            proxy.total(Way::Forth) >= BEGUN && missing(&destination).is_some()
        });
        assert!(!migration.is_over());
        Self {
            source,
            destination,
            proxy,
            migration,
        }
    }

    /// Both sides say that the connection is lost; the guest is at the destination and waits.
    fn interrupted(self) -> (Host, Host) {
        let report = self.migration.report();
        eprintln!("interrupted: {}", report.error.as_deref().unwrap_or("-"));
        says_interrupted(&report);
        waits_for_pages(&self.source, &self.destination);
        (self.source, self.destination)
    }
}

fn missing(host: &Host) -> Option<Missing> {
    host.client().status().unwrap().missing
}

fn says_interrupted(report: &Report) {
    assert_eq!(report.status, Status::Interrupted, "{report:#?}");
    let error = report.error.as_deref().unwrap();
    assert!(!error.is_empty() && !error.contains('\n'), "{error}");
    assert_eq!(report.verified, None, "{report:#?}");
    let pages = &report.pages;
    assert!(
        pages.sent + pages.zero + pages.skipped < pages.total,
        "{report:#?}"
    );
}

/// The guest is the destination's and waits there for a page; the source keeps what it has.
fn waits_for_pages(source: &Host, destination: &Host) {
    source.reaches(State::Interrupted);
    let told = source.client().status().unwrap().explanation;
    assert!(
        told.contains("pages that are only here are missing there")
            && told.contains("`ferry recover`"),
        "{told}"
    );
    blocked(destination);
    for action in [Ask::Pause, Ask::Resume] {
        let refused = source.act(action).unwrap_err();
        assert!(refused.contains("that are only here"), "{refused}");
    }
    let refused = source.recover(true).unwrap_err();
    assert!(refused.contains("a second copy"), "{refused}");
    assert_eq!(source.state(), State::Interrupted);
}

/// The destination says that pages are missing and that none comes; a processor of the guest waits
/// for one.
fn blocked(destination: &Host) {
    until("the guest waits for a page that does not come", || {
        missing(destination).is_some_and(|l| l.lost.is_some() && l.waiting > 0)
    });
    // A lost fault channel is noticed while pages of the push still lie in the other socket.
    let mut left = None;
    until("no page comes any more", || {
        let now = missing(destination).map(|l| l.pages);
        std::mem::replace(&mut left, now) == now
    });
    let status = destination.client().status().unwrap();
    assert_eq!(status.state, State::Running);
    let told = &status.explanation;
    assert!(
        told.contains("of its pages are missing") && told.contains("`ferry recover` at the source"),
        "{told}"
    );
    let before = missing(destination).unwrap();
    let refused = destination.act(Ask::Pause).unwrap_err();
    assert!(
        refused.contains("may be waiting for one") && !refused.contains('\n'),
        "{refused}"
    );
    let refused = destination.recover(true).unwrap_err();
    assert!(
        refused.contains(&format!("{} pages that only the source has", before.pages)),
        "{refused}"
    );
    cannot_move_on(destination);
    // Nothing of it has changed anything.
    let after = missing(destination).unwrap();
    assert_eq!((after.pages, after.lost), (before.pages, before.lost));
    assert_eq!(destination.state(), State::Running);
}

/// A guest that is not complete does not move on.
fn cannot_move_on(host: &Host) {
    let request = ferry_vmm::api::types::MigrateRequest {
        uri: "tcp:127.0.0.1:1".into(),
        options: Options::default(),
        ..ferry_vmm::api::types::MigrateRequest::default()
    };
    let refused = host.client().migrate(&request, &mut |_| {}).unwrap_err();
    let refused = refused.to_string();
    assert!(
        refused.contains("have not arrived here yet; migrate it on when they have"),
        "{refused}"
    );
}

/// `ferry recover`, as an operator types it.
fn recover(source: &Host, uri: Option<&str>) -> Ran {
    let api = source.api();
    let mut args = vec!["recover", "--api", api.to_str().unwrap()];
    args.extend(uri);
    let ran = run(&args);
    assert_eq!(ran.stdout, "");
    assert_eq!(ran.stderr.lines().count(), 1, "{ran:?}");
    ran
}

fn recovers(source: &Host, uri: Option<&str>) {
    let ran = recover(source, uri);
    assert_eq!(ran.code, Some(0), "{ran:?}; it said {:#?}", source.said());
}

/// Everything is there: the source is gone, and the guest verifies its memory.
fn complete(mut source: Host, destination: Host) {
    assert_eq!(source.ends(), Some(0), "{:#?}", source.said());
    until("nothing is missing", || missing(&destination).is_none());
    destination.says("all of the guest's memory has arrived");
    destination.proves_running();
    assert!(destination.verdict().writes > 0);
}

/// All connections are cut, or only the pushing one, or only the one for faults: the same, and
/// `ferry recover` ends it.
#[test]
fn a_cut_interrupts_and_recover_goes_on() {
    if !guests_run() {
        return;
    }
    for (cut, order, cpus) in [
        (None, PushOrder::Flush, 1),
        (Some(0), PushOrder::Bubble, 2),
        (Some(1), PushOrder::Flush, 1),
    ] {
        // What the destination has need not be sent again, and may be gone here.
        let options = Options {
            free_source: cut.is_none(),
            ..options(order)
        };
        let pushing = Pushing::begin_with(&options, cpus);
        assert_eq!(pushing.proxy.connections(), 1 + u64::from(cpus));
        match cut {
            None => pushing.proxy.cut(),
            Some(number) => pushing.proxy.cut_one(number),
        }
        eprintln!("cut {cut:?} with push order {}", order.name());
        let proxy = Proxy::to(pushing.destination.address());
        let (source, destination) = pushing.interrupted();
        recovers(&source, Some(&proxy.uri()));
        complete(source, destination);
    }
}

/// With --free-source memory is there once: the source gives back what the destination has,
/// whatever the order and the channels.
#[test]
fn memory_is_given_back_while_the_rest_follows() {
    if !guests_run() {
        return;
    }
    const MIB: u64 = 1 << 20;
    for (policy, order, channels) in [
        (PolicyKind::Postcopy, PushOrder::Flush, 1),
        (PolicyKind::Postcopy, PushOrder::Bubble, 2),
        (PolicyKind::Hybrid, PushOrder::Bubble, 1),
    ] {
        let mut source = Host::run(WORK, MEMORY, 1);
        let destination = Host::receive();
        let options = Options {
            policy,
            free_source: true,
            channels: Some(channels),
            bandwidth: Some(40_000_000),
            ..options(order)
        };
        let report = source.migrate_well(destination.uri(), &options);
        let freed = report.freed.unwrap();
        eprintln!(
            "{policy:?} {order:?} {channels}: {freed:?} of {:?}",
            report.pages
        );
        let (back, twice) = (freed.bytes / MIB, freed.twice_bytes / MIB);
        match (policy, order) {
            // Both hosts have all of it when the guest moves.
            (PolicyKind::Hybrid, _) => assert!(twice >= 16, "{report:#?}"),
            (_, PushOrder::Flush) => assert!(back >= 16 && twice <= 12, "{report:#?}"),
            // A bubble for each stream of faults: as many pieces are begun and not complete.
            _ => assert!(back >= 8, "{report:#?}"),
        }
        assert_eq!(source.ends(), Some(0));
        destination.verdict();
    }
}

/// The push has channels of its own, and one of them is cut: what was on it is asked for again.
#[test]
fn a_lost_data_channel_of_the_push_interrupts() {
    if !guests_run() {
        return;
    }
    let options = Options {
        channels: Some(2),
        ..options(PushOrder::Bubble)
    };
    let pushing = Pushing::begin_with(&options, 2);
    assert_eq!(pushing.proxy.connections(), 5);
    pushing.proxy.cut_one(2);
    let proxy = Proxy::to(pushing.destination.address());
    let (source, destination) = pushing.interrupted();
    recovers(&source, Some(&proxy.uri()));
    complete(source, destination);
}

/// Interrupted again while it recovers, and reached at another address each time.
#[test]
fn interrupted_twice_and_the_destination_has_moved() {
    if !guests_run() {
        return;
    }
    let pushing = Pushing::begin(PushOrder::Bubble, 1);
    pushing.proxy.cut();
    pushing.proxy.allow(0);
    let (source, destination) = pushing.interrupted();
    // Its old address does not answer any more.
    let ran = recover(&source, None);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    waits_for_pages(&source, &destination);
    let before = missing(&destination).unwrap().pages;
    let second = Proxy::to(destination.address());
    second.stall_at(BEGUN);
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| recover(&source, Some(&second.uri())));
        until("pages follow again", || {
            second.total(Way::Forth) >= BEGUN && missing(&destination).is_some()
        });
        // Asked already: one is enough.
        let refused = source.recover(false).unwrap_err();
        assert!(refused.contains("being asked"), "{refused}");
        let progress = source.client().status().unwrap().migration.unwrap();
        assert_eq!(progress.phase, Phase::PostCopy, "{progress:?}");
        second.cut();
        let ran = asked.join().unwrap();
        eprintln!("interrupted again: {}", ran.stderr.trim());
        assert_eq!(ran.code, Some(1), "{ran:?}");
    });
    waits_for_pages(&source, &destination);
    let after = missing(&destination).unwrap().pages;
    assert!(after < before, "{before} pages were missing, now {after}");
    let third = Proxy::to(destination.address());
    recovers(&source, Some(&third.uri()));
    complete(source, destination);
}

/// Nothing passes any more, without an error: the source notices by itself, and the destination
/// goes on with the new connection although its old one still stands.
#[test]
fn a_silent_network_interrupts() {
    if !guests_run() {
        return;
    }
    let pushing = Pushing::begin(PushOrder::Flush, 1);
    let report = pushing.migration.report();
    eprintln!("stalled: {}", report.error.as_deref().unwrap_or("-"));
    says_interrupted(&report);
    pushing.source.reaches(State::Interrupted);
    let there = Proxy::to(pushing.destination.address());
    recovers(&pushing.source, Some(&there.uri()));
    complete(pushing.source, pushing.destination);
}

/// The destination dies with the guest: the source says so, runs nothing by itself nor on a word,
/// and can be ended.
#[test]
fn a_killed_destination_takes_the_guest_with_it() {
    if !guests_run() {
        return;
    }
    let Pushing {
        mut source,
        mut destination,
        proxy,
        migration,
    } = Pushing::begin(PushOrder::Bubble, 1);
    destination.kill();
    proxy.go_on();
    says_interrupted(&migration.report());
    let lines = source.guest_lines().len();
    source.reaches(State::Interrupted);
    assert!(source.act(Ask::Resume).is_err());
    let refused = source.recover(true).unwrap_err();
    assert!(refused.contains("a second copy"), "{refused}");
    let ran = recover(&source, None);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert_eq!(source.state(), State::Interrupted);
    assert_eq!(source.guest_lines().len(), lines, "the guest ran here");
    source.act(Ask::Stop).unwrap();
    assert_eq!(source.ends(), Some(0), "{:#?}", source.said());
}

/// The source dies with the pages: the destination says what is missing, and can be ended although
/// its processors wait.
#[test]
fn a_killed_source_leaves_the_guest_waiting() {
    if !guests_run() {
        return;
    }
    for cpus in [1, 2] {
        let Pushing {
            mut source,
            mut destination,
            proxy,
            migration,
        } = Pushing::begin(PushOrder::Flush, cpus);
        source.kill();
        proxy.go_on();
        assert!(migration.outcome().is_err());
        blocked(&destination);
        destination.act(Ask::Stop).unwrap();
        assert_eq!(destination.ends(), Some(0), "{:#?}", destination.said());
    }
}

/// What was handed over is neither cancelled nor ended nor moved on before it is complete; then it
/// is as any guest.
#[test]
fn after_the_commit_it_is_too_late() {
    if !guests_run() {
        return;
    }
    let Pushing {
        source,
        destination,
        proxy,
        migration,
    } = Pushing::begin(PushOrder::Bubble, 1);
    let refused = source.act(Ask::Cancel).unwrap_err();
    assert!(refused.contains("too late"), "{refused}");
    let refused = source.act(Ask::Stop).unwrap_err();
    assert!(refused.contains("ends by itself"), "{refused}");
    let told = source.client().status().unwrap().explanation;
    assert!(
        told.contains("was handed over") && !told.contains("cancel"),
        "{told}"
    );
    cannot_move_on(&destination);
    let told = destination.client().status().unwrap().explanation;
    assert!(told.contains("of its pages follow"), "{told}");
    proxy.go_on();
    let report = migration.report();
    assert_eq!(
        (report.status, report.verified),
        (Status::Completed, Some(true)),
        "{report:#?}"
    );
    assert_eq!(report.pages.resent, 0, "{report:#?}");
    complete(source, destination);
}

/// Before the commit a cancel is what it always is.
#[test]
fn before_the_commit_it_can_be_cancelled() {
    if !guests_run() {
        return;
    }
    let mut source = Host::run(WORK, MEMORY, 1);
    let destination = Host::receive();
    let proxy = Proxy::to(destination.address());
    let hybrid = Options {
        policy: PolicyKind::Hybrid,
        bandwidth: Some(1_000_000),
        ..options(PushOrder::Bubble)
    };
    let mark = destination.mark();
    let migration = source.begin_migration(&proxy.uri(), &hybrid);
    until("the first pass is under way", || {
        proxy.total(Way::Forth) >= 1 << 20
    });
    source.act(Ask::Cancel).unwrap();
    assert_eq!(migration.report().status, Status::Cancelled);
    source.proves_running();
    destination.settles(mark);
    source.migrate_well(
        destination.uri(),
        &Options {
            bandwidth: None,
            ..hybrid
        },
    );
    assert_eq!(source.ends(), Some(0));
    destination.verdict();
}

/// A migration whose source is committed, and whose commit was lost on the way.
fn doubtful() -> (Host, Host) {
    let source = Host::run(WORK, MEMORY, 1);
    let destination = Host::receive();
    let proxy = Proxy::to(destination.address());
    proxy.plan(Way::Back, ready_at(), Action::Freeze(Way::Forth));
    let migration = source.begin_migration(&proxy.uri(), &options(PushOrder::Flush));
    until("the source has committed", || {
        let status = source.client().status().unwrap();
        status.migration.map(|m| m.phase) == Some(Phase::Committed)
    });
    // The source repeats its commit on new connections: none passes.
    proxy.allow(proxy.connections());
    proxy.cut();
    let report = migration.report();
    assert_eq!(report.status, Status::InDoubt, "{report:#?}");
    source.reaches(State::InDoubt);
    destination.reaches(State::InDoubt);
    assert!(destination.guest_lines().is_empty());
    (source, destination)
}

/// The commit itself is lost: `ferry recover` says it again and sends everything, faults included.
#[test]
fn a_lost_commit_is_said_again() {
    if !guests_run() {
        return;
    }
    let (source, destination) = doubtful();
    recovers(&source, Some(destination.uri()));
    complete(source, destination);
}

/// Both operators say that the guest shall run on their side: it can on one only.
#[test]
fn only_the_side_with_the_pages_can_take_over() {
    if !guests_run() {
        return;
    }
    let (source, mut destination) = doubtful();
    let refuses = |destination: &Host| {
        let refused = destination.recover(true).unwrap_err();
        assert!(
            refused.contains("pages that only the source has"),
            "{refused}"
        );
        assert_eq!(destination.state(), State::InDoubt);
    };
    refuses(&destination);
    source.recover(true).unwrap();
    source.proves_running();
    refuses(&destination);
    assert!(destination.guest_lines().is_empty());
    destination.act(Ask::Stop).unwrap();
    assert_eq!(destination.ends(), Some(0), "{:#?}", destination.said());
    source.proves_running();
    source.verdict();
}

/// Receivers that do not have this guest are told apart, and nothing is lost by asking them.
#[test]
fn recover_at_the_wrong_door() {
    if !guests_run() {
        return;
    }
    let pushing = Pushing::begin(PushOrder::Flush, 1);
    pushing.proxy.cut();
    let (source, destination) = pushing.interrupted();
    let empty = Host::receive();
    let taken = Host::receive();
    let mut other = Host::run("dirty:wss=4M,rate=500", "32M", 1);
    other.migrate_well(taken.uri(), &Host::options());
    assert_eq!(other.ends(), Some(0));
    for wrong in [&empty, &taken] {
        let ran = recover(&source, Some(wrong.uri()));
        assert_eq!(ran.code, Some(1), "{ran:?}");
        // A receiver that has its guest closes its port, sooner or later.
        let closed = wrong.uri() == taken.uri() && ran.stderr.contains("Connection refused");
        assert!(
            closed || ran.stderr.contains("does not know that migration"),
            "{ran:?}"
        );
        waits_for_pages(&source, &destination);
    }
    empty.reaches(State::Receiving);
    taken.verdict();
    recovers(&source, Some(destination.uri()));
    complete(source, destination);
}
