//! The binary, guests that it runs, and a pretended VMM.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

pub fn ferry(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ferry"))
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

pub fn stderr(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

/// One sentence on stderr, nothing on stdout; with --json the same sentence in an object there.
pub fn fails(args: &[&str], code: i32) -> String {
    let out = ferry(args);
    let text = stderr(&out);
    assert_eq!(out.status.code(), Some(code), "{args:?}: {text}");
    if args.contains(&"--json") {
        let value: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        assert_eq!(
            format!("ferry: {}\n", value["error"].as_str().unwrap()),
            text
        );
        assert!(value["code"].is_string() && value["schema"] == 1, "{value}");
    } else {
        assert!(out.stdout.is_empty(), "{args:?} wrote to stdout");
    }
    assert_eq!(text.lines().count(), 1, "{args:?}: {text}");
    assert!(text.starts_with("ferry: "), "{args:?}: {text}");
    text
}

/// False, loudly, where no guest can run.
pub fn guests_run() -> bool {
    let out = ferry(&["doctor", "--json"]);
    if !out.status.success() {
        eprintln!("NOT RUN: no guest can run on this host, see `ferry doctor`");
    }
    out.status.success()
}

/// The head and the body of a request to a pretended VMM.
pub fn request(stream: &mut BufReader<UnixStream>) -> String {
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

/// Waits until `what` is so.
pub fn until(name: &str, what: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(90);
    while !what() {
        assert!(Instant::now() < deadline, "waited in vain until {name}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A `ferry run` in the background.
pub struct Guest {
    pub child: Child,
    pub api: String,
    _dir: tempfile::TempDir,
}

impl Guest {
    /// Returns when the guest has printed the line that begins with `until`.
    pub fn start(work: &str, until: &str) -> (Self, BufReader<std::process::ChildStdout>) {
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

    pub fn ask(&self, command: &str) -> Output {
        ferry(&[command, "--api", &self.api])
    }

    pub fn state(&self) -> String {
        let out = ferry(&["status", "--json", "--api", &self.api]);
        let value: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        value["state"].as_str().unwrap().to_owned()
    }

    /// Waits until this command has begun to migrate it.
    pub fn migrates(&self, command: &mut Child) {
        let deadline = Instant::now() + Duration::from_secs(90);
        while self.state() != "migrating" {
            let ended = command.try_wait().unwrap();
            assert!(ended.is_none(), "the migration is over: {ended:?}");
            assert!(Instant::now() < deadline, "it does not begin");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Its exit status and last words.
    pub fn end(mut self) -> (Option<i32>, String) {
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

    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        send(&self.child, signal);
    }
}

pub fn send(child: &Child, signal: nix::sys::signal::Signal) {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    nix::sys::signal::kill(pid, signal).unwrap();
}

/// A `ferry receive` in the background, and where it listens.
pub fn receiver() -> (Guest, String, BufReader<std::process::ChildStderr>) {
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

pub const WRITER: &str = "dirty:wss=4M,rate=500";
