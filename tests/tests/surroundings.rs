//! A VMM survives its surroundings: limits, signals and streams that are not as they should be.
#![allow(clippy::unwrap_used, clippy::panic)]

use ferry_migration::options::Options;
use ferry_migration::report::Status;
use ferry_tests::{Host, State, guests_run, until};
use ferry_vmm::api::client::{Action as Ask, ClientError};
use ferry_vmm::api::types::{SnapshotRequest, Then};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::process::{Resource, Rlimit, prlimit};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;
use std::time::Duration;

const RUN: &[&str] = &[
    "run",
    "--nas",
    "dirty:wss=4M,rate=500",
    "--memory",
    "32M",
    "--serial",
    "stdio",
];

fn signal(host: &Host, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(host.pid()).unwrap()), signal).unwrap();
}

/// Started by a shell that first does this.
fn after(preparation: &str) -> Host {
    up(Host::start_where(preparation, "", RUN))
}

/// Once it answers.
fn up(host: Host) -> Host {
    until("the guest runs", || {
        let status = host.client().status();
        status.is_ok_and(|status| status.state == State::Running)
    });
    host
}

#[test]
fn a_file_size_limit_fails_the_write_and_not_the_guest() {
    if !guests_run() {
        return;
    }
    let host = Host::run("dirty:wss=4M,rate=500,fill=random", "32M", 1);
    let dir = tempfile::tempdir().unwrap();
    let pid = rustix::process::Pid::from_raw(i32::try_from(host.pid()).unwrap());
    let limit = Rlimit {
        current: Some(1 << 20),
        maximum: None,
    };
    prlimit(pid, Resource::Fsize, limit).unwrap();
    let request = SnapshotRequest {
        path: dir.path().join("snapshot"),
        compress: ferry_migration::options::Compress::None,
        live: true,
        force: false,
        then: Then::default(),
        state_version: None,
    };
    let refused = host.client().snapshot(&request).unwrap_err();
    assert!(matches!(refused, ClientError::Refused { .. }), "{refused}");
    assert_eq!(host.state(), State::Running);
}

#[test]
fn signals_that_the_caller_ignores_stay_ignored_and_the_others_end_the_guest() {
    if !guests_run() {
        return;
    }
    // As nohup does, and as a shell does for what it runs in the background.
    let host = after("trap '' HUP INT");
    signal(&host, Signal::SIGHUP);
    signal(&host, Signal::SIGINT);
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(host.state(), State::Running);
    signal(&host, Signal::SIGTERM);
    host.says("the guest was ended on SIGTERM");
}

#[test]
fn a_vmm_needs_none_of_its_standard_streams() {
    if !guests_run() {
        return;
    }
    let host = after("exec <&- >&- 2>&-");
    host.client().act(Ask::Pause).unwrap();
    host.client().act(Ask::Resume).unwrap();
    assert_eq!(host.state(), State::Running);
}

/// The readers of its serial port and of its messages leave, as `ferry run … | head` has it.
#[test]
fn readers_that_leave_end_no_guest() {
    if !guests_run() {
        return;
    }
    let pipe =
        "f=$(mktemp -u) && mkfifo $f && (head -c 1 $f >/dev/null &) && exec >$f 2>&1 && rm $f";
    let run = [RUN, &["--stat", "20ms"]].concat();
    let host = up(Host::start_where(pipe, "", &run));
    let destination = Host::receive();
    // Many lines later.
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(host.state(), State::Running);
    host.client().act(Ask::Pause).unwrap();
    host.client().act(Ask::Resume).unwrap();
    host.migrate_well(destination.uri(), &Host::options());
}

#[test]
fn unread_serial_output_stops_neither_the_guest_nor_its_migration() {
    if !guests_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    // Full already, and nothing reads it.
    let mut stalled = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open(&fifo)
        .unwrap();
    while stalled.write(&[0; 4096]).is_ok() {}
    let serial = format!("file:{}", fifo.display());
    let host = up(Host::start(&[
        "run",
        "--nas",
        "dirty:wss=4M,rate=500",
        "--memory",
        "32M",
        "--stat",
        "20ms",
        "--serial",
        &serial,
    ]));
    let destination = Host::receive();
    host.migrate_well(destination.uri(), &Host::options());
    drop(stalled);
}

#[test]
fn a_guest_that_ends_during_its_migration_is_not_said_to_run_on() {
    if !guests_run() {
        return;
    }
    let source = Host::run("dirty:wss=16M,rate=500,seconds=3", "64M", 1);
    let destination = Host::receive();
    let slow = Options {
        bandwidth: Some(1 << 20),
        ..Host::options()
    };
    let report = source.migrate(destination.uri(), &slow);
    assert!(
        matches!(report.status, Status::Failed | Status::Cancelled),
        "{report:#?}"
    );
    assert!(report.guest_ended, "{report:#?}");
    assert!(
        report.error.as_deref().unwrap().contains("the guest has"),
        "{report:#?}"
    );
    source.says("the guest has");
}

#[test]
fn a_migration_without_a_thread_fails_with_a_sentence_and_a_later_one_works() {
    if !guests_run() {
        return;
    }
    let group = format!("/sys/fs/cgroup/pids/ferry-test-{}", std::process::id());
    if std::fs::create_dir(&group).is_err() {
        eprintln!("skipped: no pids controller (cgroup v1) that this user may use");
        return;
    }
    let write = |file: &str, text: String| std::fs::write(format!("{group}/{file}"), text).unwrap();
    let source = Host::run("dirty:wss=4M,rate=500", "32M", 1);
    let destination = Host::receive();
    write("cgroup.procs", source.pid().to_string());
    let now = std::fs::read_to_string(format!("{group}/pids.current")).unwrap();
    let now: u32 = now.trim().parse().unwrap();
    // The control socket's thread and the engine's.
    write("pids.max", (now + 2).to_string());
    let mark = destination.mark();
    let many = Options {
        channels: Some(8),
        ..Host::options()
    };
    let report = source.migrate(destination.uri(), &many);
    assert_eq!(report.status, Status::Failed, "{report:#?}");
    let error = report.error.as_deref().unwrap();
    assert!(error.contains("starting a thread"), "{error}");
    write("pids.max", "max".into());
    destination.settles(mark);
    source.migrate_well(destination.uri(), &Host::options());
    drop(source);
    let _ = std::fs::remove_dir(&group);
}

/// More than one read of the terminal brings, with the quit key at its end.
#[test]
fn all_of_a_long_paste_is_read_at_once() {
    if !guests_run() {
        return;
    }
    let script = r#"
import os, pty, select, sys, time
pid, fd = pty.fork()
if pid == 0:
    os.execv(sys.argv[1], sys.argv[1:])
def wait_for(word, seconds):
    seen, end = b"", time.time() + seconds
    while time.time() < end:
        if select.select([fd], [], [], 0.2)[0]:
            try:
                new = os.read(fd, 65536)
            except OSError:
                return True
            seen += new
            if not new or word and word in seen:
                return True
    return False
ok = wait_for(b"keys:", 60)
if ok:
    os.write(fd, b"x" * 2000 + b"\x01x")
    ok = wait_for(None, 60)
if not ok:
    os.kill(pid, 9)
sys.exit(not ok)
"#;
    let dir = tempfile::tempdir().unwrap();
    let ran = Command::new("python3")
        .args(["-c", script])
        .arg(ferry_tests::ferry())
        .args(RUN)
        .arg("--api")
        .arg(dir.path().join("api"))
        .status();
    match ran {
        Ok(status) => assert!(
            status.success(),
            "Ctrl-A x at the end of 2000 bytes was not seen"
        ),
        Err(_) => eprintln!("skipped: no python3"),
    }
}
