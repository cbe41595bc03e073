//! `ferry migrate` with real guests.

use crate::support::{Guest, fails, ferry, guests_run, receiver, stderr};
use std::io::BufRead;
use std::process::{Command, Stdio};

#[test]
fn a_guest_moves_and_both_sides_say_so() {
    if !guests_run() {
        return;
    }
    let (source, _lines) = Guest::start("idle:fill=none", "ferry-guest: ready");
    let (mut destination, uri, mut words) = receiver();
    assert_eq!(destination.state(), "receiving");
    let out = ferry(&["migrate", "--json", "--api", &source.api, &uri]);
    let report: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert!(out.status.success(), "{report}");
    assert_eq!(
        (&report["status"], &report["code"]),
        (&"completed".into(), &"moved".into())
    );
    assert!(out.stderr.is_empty(), "{}", stderr(&out));
    let (code, text) = source.end();
    assert_eq!((code, text.lines().count()), (Some(0), 1), "{text}");
    assert!(
        text.contains(&format!("the guest has moved to {uri}")),
        "{text}"
    );
    let mut line = String::new();
    words.read_line(&mut line).unwrap();
    assert!(line.contains("the guest has arrived"), "{line}");
    assert_eq!(destination.state(), "running");
    assert!(destination.ask("stop").status.success());
    assert!(destination.child.wait().unwrap().success());
}

#[test]
fn ctrl_c_cancels_a_migration_and_the_guest_stays() {
    if !guests_run() {
        return;
    }
    let (source, _lines) = Guest::start("idle:fill=random", "ferry-guest: ready");
    let (mut destination, uri, _words) = receiver();
    let mut migrate = Command::new(env!("CARGO_BIN_EXE_ferry"))
        // Minutes, at this rate.
        .args([
            "migrate",
            "--json",
            "--bandwidth",
            "80Kbit",
            "--api",
            &source.api,
            &uri,
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    source.migrates(&mut migrate);
    // While it moves it can neither be paused nor moved elsewhere.
    let text = stderr(&source.ask("pause"));
    assert!(text.contains("is being migrated to"), "{text}");
    let text = fails(&["migrate", "--api", &source.api, "tcp:127.0.0.1:1"], 1);
    assert!(text.contains("is being migrated to"), "{text}");
    let pid = nix::unistd::Pid::from_raw(i32::try_from(migrate.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    let out = migrate.wait_with_output().unwrap();
    let report: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(
        (out.status.code(), report["status"].as_str()),
        (Some(3), Some("cancelled"))
    );
    assert_eq!(report["code"], "cancelled");
    assert!(
        stderr(&out).contains("the guest runs on where it was"),
        "{}",
        stderr(&out)
    );
    assert_eq!(source.state(), "running");
    assert!(source.ask("stop").status.success());
    assert_eq!(source.end().0, Some(0));
    assert!(destination.ask("stop").status.success());
    assert!(destination.child.wait().unwrap().success());
}

#[test]
fn a_signal_during_a_migration_cancels_it_and_ends_the_guest() {
    if !guests_run() {
        return;
    }
    let (source, _lines) = Guest::start("idle:fill=random", "ferry-guest: ready");
    let (mut destination, uri, _words) = receiver();
    let mut migrate = Command::new(env!("CARGO_BIN_EXE_ferry"))
        .args([
            "migrate",
            "--quiet",
            "--bandwidth",
            "80Kbit",
            "--api",
            &source.api,
            &uri,
        ])
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    source.migrates(&mut migrate);
    source.signal(nix::sys::signal::Signal::SIGTERM);
    let (code, text) = source.end();
    assert_eq!(code, Some(0), "{text}");
    assert!(
        text.contains("cancelling the migration to") && text.contains("on SIGTERM"),
        "{text}"
    );
    // The report arrives although its VMM is ending.
    let out = migrate.wait_with_output().unwrap();
    assert_eq!(out.status.code(), Some(3));
    assert!(
        stderr(&out).contains("the guest was ended on SIGTERM"),
        "{}",
        stderr(&out)
    );
    assert_eq!(destination.state(), "receiving");
    assert!(destination.ask("stop").status.success());
    assert!(destination.child.wait().unwrap().success());
}
