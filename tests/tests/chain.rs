//! Who has just been told that a guest has arrived may ask its new VMM for anything at once: a
//! script that moves a guest on and on, and works on it in between, waits for nothing but the
//! commands it gives.
//!
//! Nothing here waits between a migration's end and the next request: that would hide what is to be
//! shown.
#![allow(clippy::unwrap_used, clippy::panic)]

use ferry_migration::options::{Compress, Handover, OnTimeout, Options, PolicyKind};
use ferry_tests::{Host, State, guests_run, until};
use ferry_vmm::api::client::Action;
use ferry_vmm::api::types::{BalloonRequest, SnapshotRequest, Then};
use std::path::Path;
use std::time::Duration;

const HOPS: u64 = 24;

fn snapshot(path: &Path, then: Then) -> SnapshotRequest {
    SnapshotRequest {
        path: path.to_owned(),
        compress: Compress::Auto,
        live: false,
        force: true,
        then,
        state_version: None,
    }
}

/// What a script might do next with a guest that has just arrived: something else after each hop.
fn use_at_once(host: &Host, hop: u64, dir: &Path) {
    match hop % 6 {
        0 => {
            let size = BalloonRequest {
                size_bytes: Some(hop << 20),
                auto: None,
            };
            host.client().set_balloon(&size).unwrap();
            let balloon = host.client().balloon().unwrap();
            assert_eq!(balloon.target_bytes, hop << 20);
        }
        1 => host.act(Action::Pause).unwrap(),
        // It has come paused.
        2 => {
            let status = host.client().status().unwrap();
            assert_eq!(status.state, State::Paused, "{status:#?}");
            host.act(Action::Resume).unwrap();
        }
        3 => {
            let request = snapshot(&dir.join("guest"), Then::Resume);
            host.client().snapshot(&request).unwrap();
        }
        4 => {
            let status = host.client().status().unwrap();
            assert_eq!(status.state, State::Running, "{status:#?}");
            assert!(status.guest.is_some() && status.listening.is_none());
            assert!(status.missing.is_none(), "{status:#?}");
        }
        // And it goes on as it is.
        _ => {}
    }
}

fn chain(options: &Options, receive: fn() -> Host) {
    if !guests_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let receivers: Vec<Host> = (0..HOPS).map(|_| receive()).collect();
    let mut hosts = vec![Host::run_with(
        "dirty:wss=4M,rate=2000",
        "32M",
        1,
        &["--balloon"],
    )];
    for (hop, next) in (0..).zip(receivers) {
        let here = hosts.last().unwrap();
        here.migrate_well(next.uri(), options);
        use_at_once(&next, hop, dir.path());
        hosts.push(next);
    }
    let last = hosts.pop().unwrap();
    for mut host in hosts {
        assert_eq!(host.ends(), Some(0), "{:#?}", host.said());
    }
    assert!(last.verdict().writes > 0);
}

fn policy(policy: PolicyKind) -> Options {
    Options {
        policy,
        ..Host::options()
    }
}

#[test]
fn by_precopy() {
    chain(&policy(PolicyKind::Precopy), Host::receive);
}

#[test]
fn by_postcopy() {
    chain(&policy(PolicyKind::Postcopy), Host::receive);
}

#[test]
fn by_hybrid() {
    chain(&policy(PolicyKind::Hybrid), Host::receive);
}

/// Its pages follow if it dirties too much, and do not follow if not.
#[test]
fn by_precopy_that_may_become_postcopy() {
    let options = Options {
        timeout: Duration::from_millis(1),
        on_timeout: OnTimeout::Postcopy,
        ..Host::options()
    };
    chain(&options, Host::receive);
}

#[test]
fn by_hand_over_of_memory() {
    let options = Options {
        handover: Handover::On,
        ..Host::options()
    };
    chain(&options, Host::receive_unix);
}

/// A guest that comes out of a file takes every request as soon as its control socket is there.
#[test]
fn out_of_a_file() {
    if !guests_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("guest");
    let mut source = Host::run_with("dirty:wss=4M,rate=2000", "32M", 1, &["--balloon"]);
    let request = snapshot(&path, Then::Stop);
    source.client().snapshot(&request).unwrap();
    assert_eq!(source.ends(), Some(0));
    for more in [&[][..], &["--eager"][..]] {
        let args = ["restore", path.to_str().unwrap(), "--serial", "stdio"];
        let host = Host::start(&[&args, more].concat());
        until("its control socket is there", || {
            std::os::unix::net::UnixStream::connect(host.api()).is_ok()
        });
        host.act(Action::Pause).unwrap();
        host.client().balloon().unwrap();
        host.act(Action::Resume).unwrap();
        assert_eq!(host.state(), State::Running);
        assert!(host.verdict().writes > 0);
    }
}
