//! Migrations that are given up: by the user, by a time limit; and what else can be asked of a VMM
//! meanwhile.
#![allow(clippy::unwrap_used, clippy::panic)]

use ferry_migration::options::{OnTimeout, Options};
use ferry_migration::report::{Phase, Status};
use ferry_tests::{Action as Fault, Host, Proxy, State, Way, ferry, guests_run, run, until};
use ferry_vmm::api::client::Action;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::process::{Command, Stdio};
use std::time::Duration;

/// Too slow for a 64 MiB guest to be gone before the test has done what it wants: that takes
/// minutes.
fn slow() -> Options {
    Options {
        bandwidth: Some(250_000),
        timeout: Duration::from_secs(600),
        ..Host::options()
    }
}

/// Waits until pages are on their way.
fn live(source: &Host) {
    until("pages are on their way", || {
        let progress = source.client().status().unwrap().migration;
        progress.is_some_and(|p| p.phase == Phase::Live && p.bytes_wire > 100_000)
    });
}

/// `ferry cancel` in mid-flight: the guest runs on, the receiver takes the next migration. Twice,
/// as nothing may be left over from the first time; then the guest moves and everything it wrote is
/// there.
#[test]
fn cancel_leaves_everything_as_it_was() {
    if !guests_run() {
        return;
    }
    let mut source = Host::run("dirty:wss=8M,rate=3000", "64M", 2);
    let destination = Host::receive();
    for _ in 0..2 {
        let mark = destination.mark();
        let migration = source.begin_migration(destination.uri(), &slow());
        live(&source);
        let api = source.api();
        let ran = run(&["cancel".as_ref(), "--api".as_ref(), api.as_os_str()]);
        assert_eq!(ran.code, Some(0), "{ran:?}");
        let report = migration.report();
        assert_eq!(report.status, Status::Cancelled, "{report:?}");
        assert_eq!((report.downtime_ms, report.verified), (0.0, None));
        source.proves_running();
        destination.settles(mark);
    }
    let refused = source.act(Action::Cancel).unwrap_err();
    assert!(refused.contains("none is under way"), "{refused}");
    source.migrate_well(destination.uri(), &Host::options());
    assert_eq!(source.ends(), Some(0));
    destination.verdict();
}

/// A migration that would take minutes is steered: what cannot be is refused with a code, what can
/// is done, and it ends on the user's word. The guest arrives whole.
#[test]
fn a_running_migration_is_steered_and_switched_over() {
    if !guests_run() {
        return;
    }
    let mut source = Host::run("dirty:wss=8M,rate=3000", "64M", 1);
    let destination = Host::receive();
    let (api, there) = (source.api(), destination.api());
    let ferry = |args: &[&str], api: &std::path::Path| {
        let api = ["--api".as_ref(), api.as_os_str()];
        let args: Vec<_> = args.iter().map(|arg| (*arg).as_ref()).chain(api).collect();
        run(&args)
    };
    let refused = |args: &[&str], api: &std::path::Path, code: &str| {
        let said = ferry(args, api);
        assert_eq!(
            said.code,
            Some(if code == "usage" { 2 } else { 1 }),
            "{said:?}"
        );
        assert!(
            said.stdout.contains(&format!("\"code\": \"{code}\"")),
            "{said:?}"
        );
    };
    refused(&["switchover", "--json"], &api, "not-migrating");
    let migration = source.begin_migration(destination.uri(), &slow());
    live(&source);
    refused(&["tune", "--json"], &api, "usage");
    refused(&["tune", "--json", "--bandwidth", "1K"], &api, "usage");
    refused(
        &["tune", "--json", "--policy", "hybrid"],
        &api,
        "no-postcopy",
    );
    refused(
        &["tune", "--json", "--downtime", "1s"],
        &there,
        "not-migrating",
    );
    let tuned = ferry(&["tune", "--bandwidth", "2Mbit", "--policy", "mplm"], &api);
    assert_eq!(tuned.code, Some(0), "{tuned:?}");
    assert!(
        tuned.stderr.contains("policy mplm, bandwidth 0.2 MB/s"),
        "{tuned:?}"
    );
    let switched = ferry(&["switchover", "--json"], &api);
    assert_eq!(switched.code, Some(0), "{switched:?}");
    let report = migration.report();
    assert_eq!(
        (report.status, report.verified),
        (Status::Completed, Some(true)),
        "{report:?}"
    );
    let changes: Vec<String> = report
        .steered
        .iter()
        .map(|s| s.change.to_string())
        .collect();
    assert_eq!(
        changes,
        ["policy mplm, bandwidth 0.2 MB/s", "switch over now"]
    );
    assert!(
        report
            .why
            .is_some_and(|why| why.contains("asked to switch over"))
    );
    assert_eq!((source.ends(), report.policy.as_str()), (Some(0), "mplm"));
    destination.verdict();
}

/// Ctrl-C on `ferry migrate` cancels, says so in one sentence, and exits 3.
#[test]
fn ctrl_c_cancels() {
    if !guests_run() {
        return;
    }
    let source = Host::run("dirty:wss=4M,rate=1000", "64M", 1);
    let destination = Host::receive();
    let child = Command::new(ferry())
        .args([
            "migrate",
            destination.uri(),
            "--bandwidth",
            "2Mbit",
            "--api",
        ])
        .arg(source.api())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    until("the migration has begun", || {
        source.state() == State::Migrating
    });
    live(&source);
    kill(
        Pid::from_raw(i32::try_from(child.id()).unwrap()),
        Signal::SIGINT,
    )
    .unwrap();
    let out = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(3), "{said}");
    assert!(
        said.contains("cancelling; the guest stays where it is"),
        "{said}"
    );
    assert!(
        said.contains("was cancelled") && said.contains("the guest runs on where it was"),
        "{said}"
    );
    source.proves_running();
    destination.reaches(State::Receiving);
    source.verdict();
}

/// A `ferry migrate` that is killed takes nothing with it: the VMM migrates on, and can be asked.
#[test]
fn the_command_can_die() {
    if !guests_run() {
        return;
    }
    let mut source = Host::run("dirty:wss=4M,rate=500", "64M", 1);
    let destination = Host::receive();
    let proxy = Proxy::to(destination.address());
    proxy.plan(Way::Forth, 1 << 20, Fault::Freeze(Way::Forth));
    let mut child = Command::new(ferry())
        .args([
            "migrate",
            &proxy.uri(),
            "--channels",
            "1",
            "--verify",
            "--quiet",
            "--api",
        ])
        .arg(source.api())
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    proxy.wait_hits(1);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(source.state(), State::Migrating);
    proxy.thaw(Way::Forth);
    assert_eq!(source.ends(), Some(0), "{:?}", source.said());
    destination.verdict();
}

/// A writer that is faster than the cap never converges: `--on-timeout` decides.
#[test]
fn a_time_limit_cancels_or_stops() {
    if !guests_run() {
        return;
    }
    let mut source = Host::run("dirty:wss=16M,rate=6000", "64M", 1);
    let destination = Host::receive();
    let hopeless = |on_timeout| Options {
        timeout: Duration::from_secs(1),
        bandwidth: Some(15_000_000),
        downtime: Duration::from_millis(50),
        on_timeout,
        ..Host::options()
    };
    let mark = destination.mark();
    let report = source.migrate(destination.uri(), &hopeless(OnTimeout::Cancel));
    assert_eq!(report.status, Status::Cancelled, "{report:?}");
    assert!(
        report
            .error
            .as_deref()
            .is_some_and(|e| e.contains("does not converge")),
        "{report:?}"
    );
    source.proves_running();
    destination.settles(mark);
    // It ends a pass that takes longer, on one channel and on several.
    for channels in [1, 2] {
        let mark = destination.mark();
        let slow = Options {
            timeout: Duration::from_millis(100),
            bandwidth: Some(4_000_000),
            channels: Some(channels),
            ..hopeless(OnTimeout::Cancel)
        };
        let report = source.migrate(destination.uri(), &slow);
        assert_eq!(report.status, Status::Cancelled, "{report:?}");
        let sent = report.rounds.first().map_or(0, |round| round.pages);
        assert!(sent < (16 << 20) / 4096, "{report:?}");
        source.proves_running();
        destination.settles(mark);
    }
    let report = source.migrate_well(destination.uri(), &hopeless(OnTimeout::Stop));
    eprintln!(
        "stopped after 1 s: downtime {:.0} ms, {:?}",
        report.downtime_ms, report.why
    );
    // It had to break its promise, and says why.
    assert!(report.why.is_some());
    assert_eq!(source.ends(), Some(0));
    destination.verdict();
}

/// A writer that fills its working set in each round converges once it is slowed; cancelled or
/// moved, it runs at full speed again.
#[test]
fn a_guest_that_does_not_converge_is_slowed_until_it_does() {
    if !guests_run() {
        return;
    }
    let mut source = Host::run("dirty:wss=8M,rate=6000", "64M", 2);
    let destination = Host::receive();
    let limited = |on_timeout| Options {
        bandwidth: Some(8_000_000),
        downtime: Duration::from_millis(50),
        max_rounds: Some(2),
        on_timeout,
        ..Host::options()
    };
    let mark = destination.mark();
    let report = source.migrate(destination.uri(), &limited(OnTimeout::Cancel));
    assert_eq!(report.status, Status::Cancelled, "{report:?}");
    assert_eq!(report.slowed, None);
    destination.settles(mark);
    // Cancelled while it is slowed.
    let mark = destination.mark();
    let hopeless = Options {
        downtime: Duration::ZERO,
        throttle: 50,
        ..limited(OnTimeout::Throttle)
    };
    let migration = source.begin_migration(destination.uri(), &hopeless);
    until("the guest is slowed", || {
        let progress = source.client().status().unwrap().migration;
        progress.is_some_and(|progress| progress.round > 5)
    });
    source.act(Action::Cancel).unwrap();
    let report = migration.report();
    assert_eq!(report.status, Status::Cancelled, "{report:?}");
    assert!(report.slowed.is_some(), "{report:?}");
    source.proves_running();
    destination.settles(mark);
    let report = source.migrate_well(destination.uri(), &limited(OnTimeout::Throttle));
    let slowed = report.slowed.unwrap();
    eprintln!("{slowed:?}, downtime {:.0} ms", report.downtime_ms);
    let rested: f64 = slowed.vcpus.iter().map(|vcpu| vcpu.rested_ms).sum();
    assert!(slowed.vcpus.len() == 2 && rested > 0.0, "{slowed:?}");
    assert_eq!(source.ends(), Some(0));
    destination.verdict();
}

/// While one migration runs the VMM answers everything else, and refuses what cannot be now in a
/// sentence.
#[test]
fn a_migrating_vmm_answers() {
    if !guests_run() {
        return;
    }
    let source = Host::run("dirty:wss=8M,rate=3000", "64M", 1);
    let (destination, other) = (Host::receive(), Host::receive());
    let migration = source.begin_migration(destination.uri(), &slow());
    live(&source);
    for _ in 0..20 {
        assert_eq!(source.state(), State::Migrating);
        assert!(source.client().migration().unwrap().progress.is_some());
    }
    for action in [Action::Pause, Action::Resume] {
        let refused = source.act(action).unwrap_err();
        assert!(
            refused.contains("is being migrated to") && !refused.contains('\n'),
            "{refused}"
        );
    }
    let api = source.api();
    let ran = run(&[
        "migrate".as_ref(),
        "--api".as_ref(),
        api.as_os_str(),
        other.uri().as_ref(),
    ]);
    assert_eq!((ran.code, ran.stdout.as_str()), (Some(1), ""), "{ran:?}");
    assert!(
        ran.stderr.contains("cannot migrate") && ran.stderr.lines().count() == 1,
        "{ran:?}"
    );
    let refused = source.recover(true).unwrap_err();
    assert!(refused.contains("nothing is in doubt"), "{refused}");
    // A second source is told that the receiver is busy, and its guest runs on.
    let second = Host::run("dirty:wss=4M,rate=500", "64M", 1);
    let report = second.migrate(destination.uri(), &Host::options());
    assert_eq!(report.status, Status::Failed);
    assert!(
        report
            .error
            .as_deref()
            .is_some_and(|e| e.contains("another migration is arriving")),
        "{report:?}"
    );
    second.proves_running();
    assert!(!migration.is_over());
    source.act(Action::Cancel).unwrap();
    assert_eq!(migration.report().status, Status::Cancelled);
    source.proves_running();
    source.verdict();
}

/// `ferry stop` during a migration cancels it and ends the guest; SIGTERM does the same. The
/// receiver waits on.
#[test]
fn stopping_a_migrating_guest_ends_it() {
    if !guests_run() {
        return;
    }
    let destination = Host::receive();
    for by_signal in [false, true] {
        let mut source = Host::run("dirty:wss=4M,rate=500", "64M", 1);
        let mark = destination.mark();
        let migration = source.begin_migration(destination.uri(), &slow());
        live(&source);
        if by_signal {
            source.signal(Signal::SIGTERM);
        } else {
            source.act(Action::Stop).unwrap();
        }
        assert_eq!(source.ends(), Some(0), "{:?}", source.said());
        if let Ok(report) = migration.outcome() {
            assert_eq!(report.status, Status::Cancelled);
        }
        destination.settles(mark);
    }
}
