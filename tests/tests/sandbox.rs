//! `--sandbox`, as the kernel shows it of a VMM that runs.
#![allow(clippy::unwrap_used, clippy::panic)]

use ferry_migration::options::Compress;
use ferry_tests::{CONFINED, Host, State, ferry, guests_run, run, until};
use ferry_vmm::api::client::{Action, Client};
use ferry_vmm::api::types::{SnapshotRequest, Then};
use ferry_vmm::doctor::Diagnosis;
use rustix::io::FdFlags;
use std::collections::BTreeSet;
use std::fs;
use std::net::TcpListener;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;

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

/// tests/tests/linux.rs does it on a kernel that has landlock for sure.
#[test]
fn files_outside_are_not_opened() {
    if ferry_vmm::sandbox::support().landlock == 0 {
        eprintln!("NOT RUN: files_outside_are_not_opened: this kernel has no landlock");
        return;
    }
    let folders = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let mut command = Command::new(env!("CARGO_BIN_EXE_confined"));
    let out = command.args(folders.iter().map(tempfile::TempDir::path));
    let out = out.output().unwrap();
    assert_eq!(String::from_utf8_lossy(&out.stdout), CONFINED, "{out:?}");
}

#[test]
fn a_snapshot_is_made_only_where_requests_may_name_files() {
    if !guests_run() {
        return;
    }
    let host = Host::run("idle:fill=none", "32M", 1);
    let request = SnapshotRequest {
        path: "/ferry-test.snap".into(),
        compress: Compress::None,
        live: false,
        force: false,
        then: Then::Resume,
        state_version: None,
    };
    let refused = host.client().snapshot(&request).unwrap_err().to_string();
    for words in [
        "lets requests name files in ",
        "/ferry-test.snap",
        "--allow",
    ] {
        assert!(refused.contains(words), "{refused}");
    }
    host.proves_running();
}

/// Leaves a descriptor open for the next process that is started.
fn pass(fd: impl Into<OwnedFd>) -> (OwnedFd, String) {
    let fd = fd.into();
    rustix::io::fcntl_setfd(&fd, FdFlags::empty()).unwrap();
    let number = fd.as_raw_fd().to_string();
    (fd, number)
}

#[test]
fn what_is_not_fit_is_refused_with_a_sentence() {
    let (left, _right) = UnixStream::pair().unwrap();
    let (_left, socket) = pass(left);
    let (_file, file) = pass(fs::File::open("/proc/self/exe").unwrap());
    let closed = "fd:900";
    for (option, value, words) in [
        (
            "--net",
            format!("fd={socket}"),
            "is a socket, where a tap device",
        ),
        (
            "--disk",
            format!("fd:{socket}"),
            "is a socket, where a regular file",
        ),
        (
            "--disk",
            format!("fd:{file}"),
            "is not open for reading and writing",
        ),
        ("--disk", closed.into(), "is not open;"),
        ("--api", format!("fd:{socket}"), "does not listen"),
        ("--api", "systemd".into(), "systemd has passed no socket"),
    ] {
        let ran = run(&[
            "run",
            "--nas",
            "idle:fill=none",
            "--serial",
            "null",
            option,
            &value,
        ]);
        assert_eq!(ran.code, Some(1), "{ran:?}");
        assert!(ran.stderr.contains(words), "{option} {value}: {ran:?}");
    }
}

/// A source with descriptors, and a destination that is started as systemd does it.
#[test]
fn a_guest_moves_between_processes_that_open_nothing() {
    if !guests_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let open = || {
        pass(
            fs::File::options()
                .read(true)
                .write(true)
                .open(&disk)
                .unwrap(),
        )
    };
    let api = |name| {
        let path = dir.path().join(name);
        (pass(UnixListener::bind(&path).unwrap()), Client::new(&path))
    };
    let ((source_api, number), source) = api("source");
    let (file, at_source) = open();
    let mut here = Command::new(ferry());
    here.args(["run", "--nas", "dirty:wss=4M,rate=500", "--memory", "32M"])
        .args(["--serial", "null", "--api", &format!("fd:{number}")])
        .args(["--disk", &format!("fd:{at_source}")]);
    let mut here = here.spawn().unwrap();
    drop((source_api, file));

    let ((there_api, api), destination) = api("destination");
    let port = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("tcp:{}", port.local_addr().unwrap());
    let (port, receive) = pass(port);
    let (file, at_destination) = open();
    // Numbers from 3 on, and the process's own: no program between them and ferry has another.
    let activate = format!(
        "export LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=receive:api; \
         exec \"$0\" \"$@\" 103<&{receive} 104<&{api} 105<&{at_destination} {receive}<&- {api}<&- {at_destination}<&- \
         3<&103 4<&104 5<&105 103<&- 104<&- 105<&-"
    );
    let mut there = Command::new("bash");
    there
        .args(["-c", &activate])
        .arg(ferry())
        .args(["receive", "systemd", "--api", "systemd"])
        .args(["--serial", "null", "--disk", "fd:5"]);
    let mut there = there.spawn().unwrap();
    drop((there_api, port, file));

    until("the receiver answers", || destination.status().is_ok());
    let ran = run(&[
        "migrate",
        "--api",
        dir.path().join("source").to_str().unwrap(),
        &uri,
        "--verify",
    ]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(here.wait().unwrap().success());
    assert_eq!(destination.status().unwrap().state, State::Running);
    destination.act(Action::Stop).unwrap();
    assert!(there.wait().unwrap().success());
    // Their files are whose they were.
    for name in ["source", "destination"] {
        assert!(dir.path().join(name).exists(), "{name}");
    }
    drop(source);
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
