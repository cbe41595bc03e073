//! The exit codes of `ferry migrate` with real guests: what a script learns of each end.
//!
//! The ends that take a broken network go through the proxy; cli/tests/cli has the table with a
//! pretended VMM.
#![allow(clippy::unwrap_used, clippy::panic)]

use ferry_migration::wire::FrameType;
use ferry_tests::{Host, Moment, Proxy, State, Strike, Way, Wire, ferry, guests_run, run, until};
use serde_json::Value;
use std::process::{Child, Command, Stdio};

/// `ferry migrate --json` over one channel, in the background.
fn migrate(source: &Host, uri: &str, more: &[&str]) -> Child {
    Command::new(ferry())
        .args(["migrate", uri, "--json", "--channels", "1", "--api"])
        .arg(source.api())
        .args(more)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Its exit status and the object that it printed.
fn end(child: Child) -> (Option<i32>, Value) {
    let out = child.wait_with_output().unwrap();
    let object = serde_json::from_slice(&out.stdout).unwrap();
    (out.status.code(), object)
}

fn recovers(source: &mut Host, uri: &str) {
    let api = source.api();
    let ran = run(&["recover", "--api", api.to_str().unwrap(), uri]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_eq!(source.ends(), Some(0), "{:?}", source.said());
}

#[test]
fn a_destination_that_is_not_there_is_1_and_the_guest_runs_on() {
    if !guests_run() {
        return;
    }
    let source = Host::run("dirty:wss=4M,rate=500", "64M", 1);
    let (code, report) = end(migrate(&source, "unix:/nonexistent/link", &[]));
    assert_eq!((code, &report["code"]), (Some(1), &"failed".into()));
    source.proves_running();
    source.verdict();
}

#[test]
fn a_limit_that_cancels_is_3() {
    if !guests_run() {
        return;
    }
    let source = Host::run("dirty:wss=16M,rate=6000", "64M", 1);
    let destination = Host::receive();
    let hopeless = [
        "--timeout",
        "1s",
        "--downtime",
        "50ms",
        "--bandwidth",
        "15M",
    ];
    let (code, report) = end(migrate(&source, destination.uri(), &hopeless));
    assert_eq!((code, &report["code"]), (Some(3), &"cancelled".into()));
    source.proves_running();
    source.verdict();
}

/// The connection breaks when the source has committed: neither side runs the guest, until
/// `ferry recover`.
#[test]
fn a_lost_commit_is_4() {
    if !guests_run() {
        return;
    }
    let mut source = Host::run("idle:fill=none", "64M", 1);
    let destination = Host::receive();
    let ready = Strike {
        kinds: &[FrameType::Ready],
        way: Way::Back,
        number: 1,
        after: None,
        moment: Moment::After,
        or_state: false,
    };
    let wire = Wire::to(destination.uri(), ready);
    let child = migrate(&source, wire.uri(), &[]);
    assert!(wire.struck(|| false));
    until("the source has committed", || {
        let phase = source.client().status().unwrap().migration.map(|m| m.phase);
        phase == Some(ferry_migration::report::Phase::Committed)
    });
    // The source repeats its commit on new connections: none passes.
    wire.cut(true);
    let (code, report) = end(child);
    assert_eq!((code, &report["code"]), (Some(4), &"in-doubt".into()));
    assert_eq!(source.state(), State::InDoubt);
    recovers(&mut source, destination.uri());
    destination.reaches(State::Running);
}

/// The connection breaks while pages follow the guest: it waits at the destination, until
/// `ferry recover`.
#[test]
fn a_broken_post_copy_is_5() {
    if !guests_run() {
        return;
    }
    const BEGUN: u64 = 4 << 20;
    let mut source = Host::run("dirty:wss=24M,rate=2000", "40M", 1);
    let destination = Host::receive();
    let proxy = Proxy::to(destination.address());
    proxy.stall_at(BEGUN);
    let slow = ["--policy", "postcopy", "--bandwidth", "8M"];
    let child = migrate(&source, &proxy.uri(), &slow);
    until("pages follow the guest", || {
        proxy.total(Way::Forth) >= BEGUN && destination.state() == State::Running
    });
    proxy.cut();
    let (code, report) = end(child);
    assert_eq!((code, &report["code"]), (Some(5), &"interrupted".into()));
    assert_eq!(source.state(), State::Interrupted);
    recovers(&mut source, destination.uri());
    destination.proves_running();
    destination.verdict();
}
