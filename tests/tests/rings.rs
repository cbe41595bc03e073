//! Guests whose dirty pages are found by KVM's dirty rings (`--dirty ring`).
#![allow(clippy::unwrap_used, clippy::panic)]

use ferry_migration::options::{Options, PolicyKind, Tracking};
use ferry_migration::report::{Phase, Status};
use ferry_tests::{Host, State, guests_run, until};
use ferry_vmm::api::client::Action;
use std::time::Duration;

const RING: &[&str] = &["--dirty", "ring"];
const WRITER: &str = "dirty:wss=8M,rate=4000,pattern=uniform,fill=random";

/// Whether this host has rings; says loudly if not.
fn rings() -> bool {
    if !guests_run() {
        return false;
    }
    let has = ferry_vmm::kvm::Host::open().unwrap().has_dirty_rings();
    if !has {
        eprintln!("NOT RUN: this host's KVM has no dirty rings");
    }
    has
}

/// One guest goes round, by each policy in turn and with all memory compared; what one migration
/// left in the rings does not disturb the next. The last hop is to a machine with the log, and the
/// guest's own check covers the whole way.
#[test]
fn every_policy_moves_a_writer() {
    if !rings() {
        return;
    }
    let mut here = Host::run_with(WRITER, "32M", 2, RING);
    for (policy, reorder) in PolicyKind::ALL.iter().flat_map(|p| [(p, false), (p, true)]) {
        let options = Options {
            policy: *policy,
            reorder: Some(reorder),
            dirty: Tracking::Ring,
            ..Host::options()
        };
        let next = Host::receive_with(RING);
        let report = here.migrate_well(next.uri(), &options);
        assert_eq!(report.policy, policy.name());
        assert_eq!(here.ends(), Some(0), "{:#?}", here.said());
        assert_eq!(next.state(), State::Running);
        here = next;
    }
    let next = Host::receive_with(&["--dirty", "log"]);
    here.migrate_well(next.uri(), &Host::options());
    let refused = next.migrate(
        "tcp:127.0.0.1:1",
        &Options {
            dirty: Tracking::Ring,
            ..Host::options()
        },
    );
    let why = refused.error.unwrap_or_default();
    assert_eq!(refused.status, Status::Failed);
    assert!(
        why.contains("found by the log") && why.contains("--dirty ring"),
        "{why}"
    );
    next.proves_running();
    next.verdict();
}

/// A migration that is cancelled leaves entries in the rings, and tracking off; the next begins
/// anew.
#[test]
fn a_cancelled_migration_leaves_nothing_in_the_rings() {
    if !rings() {
        return;
    }
    let mut source = Host::run_with(WRITER, "64M", 2, RING);
    let destination = Host::receive_with(RING);
    for _ in 0..2 {
        let slow = Options {
            // Minutes, so that it is not over before it is cancelled.
            bandwidth: Some(250_000),
            timeout: Duration::from_secs(600),
            ..Host::options()
        };
        let mark = destination.mark();
        let migration = source.begin_migration(destination.uri(), &slow);
        until("pages are on their way", || {
            let progress = source.client().status().unwrap().migration;
            progress.is_some_and(|p| p.phase == Phase::Live && p.bytes_wire > 100_000)
        });
        source.act(Action::Cancel).unwrap();
        assert_eq!(migration.report().status, Status::Cancelled);
        source.proves_running();
        destination.settles(mark);
    }
    source.migrate_well(destination.uri(), &Host::options());
    assert_eq!(source.ends(), Some(0));
    destination.verdict();
}
