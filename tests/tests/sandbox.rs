//! `--sandbox`, as the kernel shows it of a VMM that runs.
#![allow(clippy::unwrap_used, clippy::panic)]

use ferry_tests::{Host, guests_run, run};
use ferry_vmm::doctor::Diagnosis;
use std::collections::BTreeSet;
use std::fs;

/// A field of each thread's `status` file (proc_pid_status(5)).
fn of_threads(pid: u32, field: &str) -> BTreeSet<String> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let value = |thread: fs::DirEntry| {
        // A thread may end meanwhile.
        let status = fs::read_to_string(thread.path().join("status")).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix(field))?;
        Some(line.trim_start_matches(':').trim().to_owned())
    };
    threads
        .filter_map(|thread| value(thread.unwrap()))
        .collect()
}

fn all(value: &str) -> BTreeSet<String> {
    BTreeSet::from([value.to_owned()])
}

/// The kernel's SECCOMP_MODE_FILTER.
const FILTERED: &str = "2";

fn is_whole_here() -> bool {
    let ran = run(&["doctor", "--json"]);
    let found: Diagnosis = serde_json::from_str(&ran.stdout).unwrap();
    let check = found.checks.iter().find(|c| c.name == "sandbox");
    check.unwrap().ok
}

fn filters_here() -> bool {
    ferry_vmm::sandbox::support().seccomp
}

#[test]
fn every_thread_is_in_it_by_default_wherever_the_guest_goes() {
    if !guests_run() {
        return;
    }
    let source = Host::run("dirty:wss=4M,rate=500", "32M", 2);
    let destination = Host::receive();
    let check = |host: &Host| {
        assert_eq!(of_threads(host.pid(), "NoNewPrivs"), all("1"));
        if filters_here() {
            assert_eq!(of_threads(host.pid(), "Seccomp"), all(FILTERED));
        }
        let limits = fs::read_to_string(format!("/proc/{}/limits", host.pid())).unwrap();
        let cores = limits.lines().find(|l| l.starts_with("Max core file size"));
        let fields: Vec<_> = cores.unwrap().split_whitespace().skip(4).take(2).collect();
        assert_eq!(fields, ["0", "0"]);
    };
    check(&source);
    source.migrate_well(destination.uri(), &Host::options());
    check(&destination);
    destination.verdict();
}

#[test]
fn off_leaves_the_process_as_it_is() {
    if !guests_run() {
        return;
    }
    let host = Host::run_with("idle:fill=none", "32M", 1, &["--sandbox", "off"]);
    let own = of_threads(std::process::id(), "Seccomp");
    assert_eq!(of_threads(host.pid(), "Seccomp"), own);
    let own = of_threads(std::process::id(), "NoNewPrivs");
    assert_eq!(of_threads(host.pid(), "NoNewPrivs"), own);
}

#[test]
fn require_starts_where_the_doctor_says_that_it_is_whole_and_else_refuses() {
    if !guests_run() {
        return;
    }
    if is_whole_here() {
        let host = Host::run_with("idle:fill=none", "32M", 1, &["--sandbox", "require"]);
        assert_eq!(of_threads(host.pid(), "Seccomp"), all(FILTERED));
        assert!(!host.said().iter().any(|line| line.contains("not whole")));
        return;
    }
    let refused = run(&["run", "--nas", "idle:fill=none", "--sandbox", "require"]);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(refused.stderr.contains("the whole sandbox"), "{refused:?}");
    let host = Host::run("idle:fill=none", "32M", 1);
    host.says("the sandbox is not whole");
}
