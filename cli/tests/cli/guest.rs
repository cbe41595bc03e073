//! A guest's life: run, paused, resumed, stopped, and its console.

use crate::support::{Guest, WRITER, fails, guests_run, stderr};
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};

#[test]
fn a_guest_is_run_paused_resumed_and_stopped() {
    if !guests_run() {
        return;
    }
    let (guest, mut lines) = Guest::start(WRITER, "ferry-guest: ready");
    assert_eq!(guest.state(), "running");
    assert!(guest.ask("pause").status.success());
    assert_eq!(guest.state(), "paused");
    let text = String::from_utf8_lossy(&guest.ask("status").stdout).into_owned();
    assert!(
        text.contains("guest      tested, ") && text.contains("`ferry resume`"),
        "{text}"
    );
    assert!(guest.ask("resume").status.success());
    assert_eq!(guest.state(), "running");
    let out = guest.ask("cancel");
    assert!(
        stderr(&out).contains("none is under way"),
        "{}",
        stderr(&out)
    );
    let out = guest.ask("recover");
    assert!(
        stderr(&out).contains("nothing is in doubt"),
        "{}",
        stderr(&out)
    );
    // It still runs: another line comes.
    let mut line = String::new();
    lines.read_line(&mut line).unwrap();
    assert!(line.contains("corrupt=0"), "{line}");
    assert!(guest.ask("stop").status.success());
    let (code, text) = guest.end();
    assert_eq!((code, text.lines().count()), (Some(0), 1), "{text}");
    assert!(
        text.contains("by a request on its control socket"),
        "{text}"
    );
}

#[test]
fn signals_end_a_guest_in_one_sentence() {
    if !guests_run() {
        return;
    }
    use nix::sys::signal::Signal::{SIGINT, SIGTERM};
    for signal in [SIGINT, SIGTERM] {
        let (guest, _lines) = Guest::start(WRITER, "ferry-guest: ready");
        guest.signal(signal);
        assert_eq!(
            guest.end(),
            (Some(0), format!("ferry: the guest was ended on {signal}\n"))
        );
    }
}

#[test]
fn stdin_reaches_the_guest_and_its_verdict_comes_back() {
    if !guests_run() {
        return;
    }
    let (mut guest, mut lines) = Guest::start(WRITER, "ferry-guest: ready");
    // The guest's own way to be ended: it verifies all it wrote.
    guest.child.stdin.take().unwrap().write_all(b"q").unwrap();
    let mut rest = String::new();
    lines.read_to_string(&mut rest).unwrap();
    assert!(
        rest.contains("verdict ") && rest.contains("verified=yes"),
        "{rest}"
    );
    let (code, text) = guest.end();
    assert_eq!(code, Some(0), "{text}");
}

#[test]
fn one_socket_has_one_vmm() {
    if !guests_run() {
        return;
    }
    let (guest, _lines) = Guest::start(WRITER, "ferry-guest: ready");
    let text = fails(
        &[
            "run", "--nas", "is.S", "--serial", "null", "--api", &guest.api,
        ],
        1,
    );
    assert!(text.contains("a process already uses the socket"), "{text}");
    assert_eq!(guest.state(), "running");
    assert!(guest.ask("stop").status.success());
    guest.end();
}

#[test]
fn a_terminal_is_raw_while_the_guest_runs_and_restored_after() {
    if !guests_run() {
        return;
    }
    if Command::new("script").arg("--version").output().is_err() {
        eprintln!("NOT RUN: script(1) is not installed");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let api = dir.path().join("api");
    // The shell compares the terminal's settings before and after.
    let shell = format!(
        "a=$(stty -g); {} run --nas {WRITER} --api {}; b=$(stty -g); [ \"$a\" = \"$b\" ] && echo terminal restored",
        env!("CARGO_BIN_EXE_ferry"),
        api.display()
    );
    let mut child = Command::new("script")
        .args(["-qec", &shell, "/dev/null"])
        .env("SHELL", "/bin/sh")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    let mut seen = String::new();
    // The guest runs before the terminal is taken; and what both say may be mixed, so that one line
    // is not enough to wait for.
    while !(seen.contains("keys: Ctrl-A x") && seen.contains("ferry-guest: stat")) {
        assert!(lines.read_line(&mut seen).unwrap() > 0, "{seen}");
    }
    // Ctrl-C is the guest's; Ctrl-A x is ours.
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"\x03\x01x").unwrap();
    stdin.flush().unwrap();
    lines.read_to_string(&mut seen).unwrap();
    drop(stdin);
    child.wait().unwrap();
    assert!(seen.contains("the guest was ended by Ctrl-A x"), "{seen}");
    assert!(seen.contains("terminal restored"), "{seen}");
}
