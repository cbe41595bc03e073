//! The `ferry` binary as users meet it: what it prints where, and how it exits.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

fn ferry(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ferry"))
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn stderr(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

/// One sentence on stderr, nothing on stdout.
fn fails(args: &[&str], code: i32) -> String {
    let out = ferry(args);
    let text = stderr(&out);
    assert_eq!(out.status.code(), Some(code), "{args:?}: {text}");
    assert!(out.stdout.is_empty(), "{args:?} wrote to stdout");
    assert_eq!(text.lines().count(), 1, "{args:?}: {text}");
    assert!(text.starts_with("ferry: "), "{args:?}: {text}");
    text
}

/// False, loudly, where no guest can run.
fn guests_run() -> bool {
    let out = ferry(&["doctor", "--json"]);
    if !out.status.success() {
        eprintln!("NOT RUN: no guest can run on this host, see `ferry doctor`");
    }
    out.status.success()
}

#[test]
fn usage_errors_are_2_and_one_sentence() {
    for args in [
        &["nonsense"][..],
        &["status"],
        &["status", "--api"],
        &["migrate", "--api", "s"],
        &["migrate", "--api", "s", "tcp:a:1", "--downtime", "soon"],
        &["migrate", "--api", "s", "tcp:a:1", "--policy", "magic"],
        &["run"],
        &["run", "--kernel", "k"],
        &["run", "--kernel", "k", "--nas", "mg.A", "--memory", "1G"],
        &["run", "--nas", "mg.Z"],
        &["run", "--nas", "mg.A", "--memory", "lots"],
        &["run", "--nas", "mg.A", "--serial", "loud"],
        &["nas", "dirty:"],
        &["receive", "carrier-pigeon"],
    ] {
        let text = fails(args, 2);
        assert!(text.contains("--help`"), "{args:?}: {text}");
    }
    assert_eq!(ferry(&[]).status.code(), Some(2));
}

#[test]
fn help_is_on_stdout_with_an_example() {
    let commands = [
        "run", "receive", "migrate", "cancel", "status", "pause", "resume", "stop", "recover",
        "doctor", "nas", "record", "sim",
    ];
    for command in commands {
        let out = ferry(&[command, "--help"]);
        assert!(out.status.success());
        assert!(
            String::from_utf8_lossy(&out.stdout).contains("Example"),
            "{command}"
        );
        assert!(out.stderr.is_empty());
    }
    assert!(ferry(&["--version"]).status.success());
}

#[test]
fn nobody_on_the_socket_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api");
    let api = path.to_str().unwrap();
    for command in ["status", "pause", "resume", "stop", "cancel", "recover"] {
        let text = fails(&[command, "--api", api], 1);
        assert!(text.contains("there is no socket"), "{text}");
    }
    drop(UnixListener::bind(&path).unwrap());
    let text = fails(&["status", "--json", "--api", api], 1);
    assert!(
        text.contains("no ferry answers on") && text.contains("is the guest's VMM running?"),
        "{text}"
    );
    let text = fails(&["migrate", "--json", "--api", api, "tcp:127.0.0.1:1"], 1);
    assert!(text.contains("no ferry answers on"), "{text}");
    let text = fails(
        &[
            "migrate",
            "--channels",
            "0",
            "--api",
            api,
            "tcp:127.0.0.1:1",
        ],
        2,
    );
    assert!(text.contains("1 to 64"), "{text}");
}

/// The head and the body of a request to a pretended VMM.
fn request(stream: &mut BufReader<UnixStream>) -> String {
    let mut text = String::new();
    while !text.ends_with("\r\n\r\n") {
        assert!(stream.read_line(&mut text).unwrap() > 0, "{text}");
    }
    let length = text.to_lowercase();
    let length = length
        .lines()
        .find_map(|l| l.strip_prefix("content-length: "));
    let mut body = vec![0; length.map_or(0, |n| n.parse().unwrap())];
    stream.read_exact(&mut body).unwrap();
    text + std::str::from_utf8(&body).unwrap()
}

#[test]
fn ctrl_c_cancels_a_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let (api, file) = (dir.path().join("api"), dir.path().join("file"));
    let vmm = UnixListener::bind(&api).unwrap();
    let child = Command::new(env!("CARGO_BIN_EXE_ferry"))
        .arg("snapshot")
        .arg("--api")
        .args([&api, &file])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut writing = BufReader::new(vmm.accept().unwrap().0);
    let asked = request(&mut writing);
    assert!(asked.starts_with("PUT /v1/snapshot "), "{asked}");
    send(&child, nix::sys::signal::Signal::SIGINT);
    let mut cancel = BufReader::new(vmm.accept().unwrap().0);
    let asked = request(&mut cancel);
    assert!(asked.starts_with("PUT /v1/cancel "), "{asked}");
    let done = b"HTTP/1.1 204 No Content\r\n\r\n";
    cancel.get_mut().write_all(done).unwrap();
    let why = r#"{"error":"the snapshot was cancelled"}"#;
    let refused = format!(
        "HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{why}",
        why.len()
    );
    writing.get_mut().write_all(refused.as_bytes()).unwrap();
    let out = child.wait_with_output().unwrap();
    let text = stderr(&out);
    assert_eq!(out.status.code(), Some(1), "{text}");
    assert_eq!(
        text.lines().collect::<Vec<_>>(),
        [
            "ferry: cancelling; no file is made",
            "ferry: the snapshot was cancelled"
        ]
    );
}

#[test]
fn doctor_prints_one_object_and_says_whether_guests_run() {
    let out = ferry(&["doctor", "--json"]);
    let value: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(value["schema"], 1);
    assert_eq!(value["ready"].as_bool().unwrap(), out.status.success());
    assert!(["hardware", "software", "none"].contains(&value["kind"].as_str().unwrap()));
    assert!(value["checks"].as_array().unwrap().len() > 8);
    assert!(out.stderr.is_empty(), "{}", stderr(&out));
    let text = ferry(&["doctor"]);
    assert_eq!(text.status.code(), out.status.code());
}

#[test]
fn a_kernel_on_the_host_is_verified() {
    let out = ferry(&["nas", "is.S", "--json"]);
    assert!(out.status.success());
    let value: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(
        (value["kernel"].as_str(), value["verified"].as_bool()),
        (Some("is.S"), Some(true))
    );
}

#[test]
fn a_reader_that_leaves_is_no_panic() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_ferry"))
        .arg("doctor")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let out = child.wait_with_output().unwrap();
    assert!(out.stderr.is_empty(), "{}", stderr(&out));
}

#[test]
fn bad_paths_are_said_before_anything_runs() {
    if !guests_run() {
        return;
    }
    let run = |rest: &[&str]| {
        let args = [&["run", "--serial", "null"], rest].concat();
        fails(&args, 1)
    };
    let text = run(&["--kernel", "/nonexistent/kernel", "--memory", "64M"]);
    assert!(text.contains("/nonexistent/kernel"), "{text}");
    let text = run(&["--kernel", "/etc/passwd", "--memory", "64M"]);
    assert!(text.contains("/etc/passwd"), "{text}");
    let text = run(&["--nas", "is.S", "--api", "/nonexistent/api"]);
    assert!(
        text.contains("there is no directory /nonexistent"),
        "{text}"
    );
    let text = run(&["--nas", "mg.A", "--memory", "16M"]);
    assert!(
        text.contains("mg.A needs") && text.contains("16 MiB"),
        "{text}"
    );
    let text = run(&["--nas", "is.S", "--cpus", "0"]);
    assert!(text.contains("1 to"), "{text}");
    let text = fails(
        &["run", "--nas", "is.S", "--serial", "file:/nonexistent/log"],
        1,
    );
    assert!(text.contains("/nonexistent/log"), "{text}");
}

/// A `ferry run` in the background.
struct Guest {
    child: Child,
    api: String,
    _dir: tempfile::TempDir,
}

impl Guest {
    /// Returns when the guest has printed the line that begins with `until`.
    fn start(work: &str, until: &str) -> (Self, BufReader<std::process::ChildStdout>) {
        let dir = tempfile::tempdir().unwrap();
        let api = dir.path().join("api").to_str().unwrap().to_owned();
        let mut child = Command::new(env!("CARGO_BIN_EXE_ferry"))
            .args(["run", "--nas", work, "--api", &api, "--name", "tested"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        while !line.starts_with(until) {
            line.clear();
            assert!(
                lines.read_line(&mut line).unwrap() > 0,
                "the guest ended without {until:?}"
            );
        }
        (
            Self {
                child,
                api,
                _dir: dir,
            },
            lines,
        )
    }

    fn ask(&self, command: &str) -> Output {
        ferry(&[command, "--api", &self.api])
    }

    fn state(&self) -> String {
        let out = ferry(&["status", "--json", "--api", &self.api]);
        let value: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        value["state"].as_str().unwrap().to_owned()
    }

    /// Waits until this command has begun to migrate it.
    fn migrates(&self, command: &mut Child) {
        let deadline = Instant::now() + Duration::from_secs(90);
        while self.state() != "migrating" {
            let ended = command.try_wait().unwrap();
            assert!(ended.is_none(), "the migration is over: {ended:?}");
            assert!(Instant::now() < deadline, "it does not begin");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Its exit status and last words.
    fn end(mut self) -> (Option<i32>, String) {
        let mut text = String::new();
        self.child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        let code = self.child.wait().unwrap().code();
        assert!(!Path::new(&self.api).exists(), "the socket was left behind");
        (code, text)
    }

    fn signal(&self, signal: nix::sys::signal::Signal) {
        send(&self.child, signal);
    }
}

fn send(child: &Child, signal: nix::sys::signal::Signal) {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    nix::sys::signal::kill(pid, signal).unwrap();
}

/// A `ferry receive` in the background, and where it listens.
fn receiver() -> (Guest, String, BufReader<std::process::ChildStderr>) {
    let dir = tempfile::tempdir().unwrap();
    let api = dir.path().join("api").to_str().unwrap().to_owned();
    let mut child = Command::new(env!("CARGO_BIN_EXE_ferry"))
        .args([
            "receive",
            "tcp:127.0.0.1:0",
            "--serial",
            "null",
            "--api",
            &api,
        ])
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut words = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    words.read_line(&mut line).unwrap();
    let uri = line
        .split_whitespace()
        .find(|w| w.starts_with("tcp:"))
        .unwrap()
        .to_owned();
    let guest = Guest {
        child,
        api,
        _dir: dir,
    };
    (guest, uri, words)
}

const WRITER: &str = "dirty:wss=4M,rate=500";

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
    assert!(text.contains("a VMM already answers on"), "{text}");
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
    // The guest runs before the terminal is taken; and what both say may be mixed, so that one line is not enough to wait for.
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
    assert_eq!(report["status"], "completed");
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
        (Some(1), Some("cancelled"))
    );
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
    assert_eq!(out.status.code(), Some(1));
    assert!(stderr(&out).contains("was cancelled"), "{}", stderr(&out));
    assert_eq!(destination.state(), "receiving");
    assert!(destination.ask("stop").status.success());
    assert!(destination.child.wait().unwrap().success());
}
