//! `ferry bench` as its users meet it: interrupted, with a killed guest, with a typo, with a peer
//! that is not there.
#![allow(clippy::unwrap_used, clippy::panic)]

use ferry_tests::{Ran, ferry, guests_run, run, until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// A guest that boots at once and has little to move.
const SMALL: [&str; 4] = ["--guest", "dirty:wss=2M,rate=1000", "--memory", "32M"];

fn bench(out: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(ferry());
    command
        .arg("bench")
        .args(SMALL)
        .args(more)
        .arg("--out")
        .arg(out)
        .stdin(Stdio::null());
    command
}

/// Runs it to its end.
fn ran(mut command: Command) -> Ran {
    let out = command.output().unwrap();
    Ran {
        code: out.status.code(),
        stdout: String::from_utf8_lossy(&out.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&out.stderr).into_owned(),
    }
}

/// The runs in a results file, in the order in which they were made.
fn runs(out: &Path) -> Vec<Value> {
    let text = fs::read_to_string(out.join("results.jsonl")).unwrap_or_default();
    text.lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|line| line["line"] == "run")
        .collect()
}

/// The child process that is `ferry COMMAND` with an argument of this begin, if there is one. Until
/// it has its own, a child has its parent's command line.
fn child_of(parent: u32, command: &str, argument: &str) -> Option<Pid> {
    let processes = fs::read_dir("/proc").unwrap();
    let mut pids = processes.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let found = pids.find(|pid| {
        let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}"));
        let status = read("status").unwrap_or_default();
        let line = read("cmdline").unwrap_or_default();
        let mut arguments = line.split('\0').skip(1);
        status.lines().any(|l| l == format!("PPid:\t{parent}"))
            && arguments.next() == Some(command)
            && arguments.any(|word| word.starts_with(argument))
    });
    Some(Pid::from_raw(found?.parse().unwrap()))
}

fn begun(mut command: Command) -> Child {
    command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn over(child: Child) -> Ran {
    let out = child.wait_with_output().unwrap();
    Ran {
        code: out.status.code(),
        stdout: String::from_utf8_lossy(&out.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&out.stderr).into_owned(),
    }
}

const TWO: [&str; 6] = ["--policy", "precopy", "--policy", "mplm", "--runs", "1"];

#[test]
fn ctrl_c_keeps_what_was_measured_and_the_same_command_goes_on() {
    if !guests_run() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("results");
    let child = begun(bench(&out, &TWO));
    until("one run is made", || !runs(&out).is_empty());
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT).unwrap();
    let first = over(child);
    assert_eq!(first.code, Some(130), "{first:?}");
    assert!(
        first.stderr.contains("the same command goes on"),
        "{first:?}"
    );
    let kept = runs(&out);
    assert_eq!(kept.len(), 1, "{first:?}");
    assert!(out.join("report.html").exists());
    let second = ran(bench(&out, &TWO));
    assert_eq!(second.code, Some(0), "{second:?}");
    assert!(second.stderr.contains("1 of 2 runs"), "{second:?}");
    let all = runs(&out);
    assert_eq!((all.len(), &all[0]), (2, &kept[0]));
    assert_ne!(all[0]["cell"], all[1]["cell"]);
    // Nothing is left to do.
    let third = ran(bench(&out, &TWO));
    assert_eq!((third.code, runs(&out).len()), (Some(0), 2), "{third:?}");
}

#[test]
fn a_killed_guest_is_a_failed_run_and_the_rest_goes_on() {
    if !guests_run() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("results");
    let child = begun(bench(&out, &TWO));
    let mut victim = None;
    until("the guest runs", || {
        victim = child_of(child.id(), "run", "dirty:");
        victim.is_some()
    });
    kill(victim.unwrap(), Signal::SIGKILL).unwrap();
    let first = over(child);
    assert_eq!(first.code, Some(1), "{first:?}");
    assert!(first.stderr.contains("FAILED: "), "{first:?}");
    assert!(first.stdout.contains("0/1 verified, 1 FAILED"), "{first:?}");
    assert!(first.stdout.contains("1/1 verified"), "{first:?}");
    // Only the one that failed is made again.
    let second = ran(bench(&out, &TWO));
    assert_eq!(second.code, Some(0), "{second:?}");
    assert!(second.stderr.contains("1 of 2 runs"), "{second:?}");
    assert!(!second.stdout.contains("FAILED"), "{second:?}");
}

/// A kernel's memory may hold next to nothing while it sets up a run.
#[test]
fn a_kernel_is_moved_from_within_its_timed_loop() {
    if !guests_run() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("results");
    let bench = |more: &[&str]| {
        let mut command = Command::new(ferry());
        command.args(["bench", "--guest", "sp.W", "--memory", "16M"]);
        command.args(more).arg("--out").arg(&out);
        command.stdin(Stdio::null());
        ran(command)
    };
    let plan = bench(&["--plan"]);
    assert!(
        plan.stdout.contains("5 runs are to be made, about "),
        "{plan:?}"
    );
    assert!(!out.exists(), "{plan:?}");
    let ran = bench(&["--policy", "precopy", "--runs", "1"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(
        ran.stderr.contains("1 run is to be made, about "),
        "{ran:?}"
    );
    assert!(
        ran.stdout.contains("Where the kernel was moved: "),
        "{ran:?}"
    );
    let seen = &runs(&out)[0]["figures"]["seen"];
    let from = &seen["course"]["from"];
    // From the first quarter of them on, and a few more while it is asked to move.
    assert_eq!(from["total"], 400, "{seen}");
    assert!((1..400).contains(&from["done"].as_u64().unwrap()), "{seen}");
}

#[test]
fn a_typo_is_shown_with_its_line_and_column() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("mine.toml");
    let text = "[[guest]]\nname = \"w\"\nwork = \"idle:fill=none\"\nmemroy = \"32M\"\n";
    fs::write(&file, text).unwrap();
    let ran = run(&["bench".as_ref(), file.as_os_str()]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(
        ran.stderr
            .contains("mine.toml, line 4, column 1: unknown field `memroy`"),
        "{ran:?}"
    );
}

/// Without a binary its runs are left out with a sentence, and the others are made.
#[test]
fn a_peer_that_is_not_there_is_said_so() {
    if !guests_run() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("results");
    let peer = "cloud-hypervisor:precopy=/nonexistent/ch";
    let ran = ran(bench(&out, &["--peer", peer, "--runs", "1"]));
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(
        ran.stderr
            .contains("NOT RUN: 1 runs of Cloud Hypervisor: /nonexistent/ch is not installed"),
        "{ran:?}"
    );
    assert_eq!(runs(&out).len(), 1);
}

/// The driver of Cloud Hypervisor, against a fake that speaks its API and has ferry move the guest.
#[test]
fn cloud_hypervisors_api_is_spoken() {
    if !guests_run() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("results");
    let mut command = bench(
        &out,
        &[
            "--peer",
            "cloud-hypervisor",
            "--runs",
            "1",
            "--only",
            "cloud",
        ],
    );
    command
        .env(
            "FERRY_CLOUD_HYPERVISOR",
            env!("CARGO_BIN_EXE_fake-cloud-hypervisor"),
        )
        .env("FERRY_BIN", ferry());
    let ran = ran(command);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let runs = runs(&out);
    assert_eq!(runs.len(), 2, "{ran:?}");
    for run in runs {
        let figures = &run["figures"];
        assert_eq!(figures["verified"], true, "{run}");
        assert!(figures["told"]["total_ms"].as_f64().unwrap() > 0.0, "{run}");
        assert!(figures["seen"]["gap_ms"].as_f64().unwrap() > 0.0, "{run}");
        assert!(figures["outside_ms"].as_f64().unwrap() > 0.0, "{run}");
        // It tells no downtime and no bytes: none are made up.
        assert_eq!(figures["told"]["downtime_ms"], Value::Null, "{run}");
        assert_eq!(figures["told"]["wire_bytes"], Value::Null, "{run}");
    }
    assert!(
        ran.stdout.contains("cloud-hypervisor v53.0-fake"),
        "{ran:?}"
    );
}
