//! Guests by name, in a runtime folder of the test's own.

use crate::support::{WRITER, guests_run, stderr, until};
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, Output, Stdio};

/// Guests of a host. Dropping it ends them.
struct Names {
    dir: tempfile::TempDir,
    started: Vec<Child>,
}

impl Names {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            started: Vec::new(),
        }
    }

    fn folder(&self) -> PathBuf {
        self.dir.path().join("ferry")
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ferry"));
        command
            .args(args)
            .env("RUNTIME_DIRECTORY", self.folder())
            .current_dir(self.dir.path())
            .stdin(Stdio::null());
        command
    }

    fn ferry(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Succeeds, and prints an object.
    fn json(&self, args: &[&str]) -> Value {
        let out = self.ferry(args);
        assert!(out.status.success(), "{args:?}: {}", stderr(&out));
        serde_json::from_slice(&out.stdout).unwrap()
    }

    /// Fails with this exit status; the sentence.
    fn fails(&self, args: &[&str], code: i32) -> String {
        let out = self.ferry(args);
        let text = stderr(&out);
        assert_eq!(out.status.code(), Some(code), "{args:?}: {text}");
        assert_eq!(text.lines().count(), 1, "{text}");
        text
    }

    /// Starts a guest and waits until it has printed the line that begins so.
    fn run(&mut self, args: &[&str]) -> &mut Child {
        let mut child = self
            .command(&[&["run"], args].concat())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        let ready = lines
            .lines()
            .map_while(Result::ok)
            .any(|line| line.starts_with("ferry-guest: ready"));
        self.started.push(child);
        assert!(ready, "the guest ended before it was ready");
        self.started.last_mut().unwrap()
    }

    /// Starts a receiver: where it listens, and what it says.
    fn receive(&mut self, args: &[&str]) -> (String, BufReader<ChildStderr>) {
        let fixed = ["receive", "tcp:127.0.0.1:0", "--serial", "null"];
        let mut child = self
            .command(&[&fixed, args].concat())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut words = BufReader::new(child.stderr.take().unwrap());
        self.started.push(child);
        let mut line = String::new();
        words.read_line(&mut line).unwrap();
        let uri = line.split_whitespace().find(|w| w.starts_with("tcp:"));
        (uri.unwrap().to_owned(), words)
    }

    /// Name and state of each guest that `ferry ps` lists.
    fn ps(&self) -> Vec<(String, String)> {
        let list = self.json(&["ps", "--json"]);
        let text = |row: &Value, key: &str| row[key].as_str().unwrap().to_owned();
        let guests = list["guests"].as_array().unwrap().iter();
        guests
            .map(|row| (text(row, "name"), text(row, "state")))
            .collect()
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        for child in &mut self.started {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn is(name: &str, state: &str) -> (String, String) {
    (name.to_owned(), state.to_owned())
}

#[test]
fn a_name_that_no_guest_has_is_said_with_what_to_do() {
    let names = Names::new();
    assert_eq!(names.ps(), []);
    for args in [
        &["status", "web"][..],
        &["migrate", "web", "tcp:127.0.0.1:1"],
        &["balloon", "web", "off"],
        &["snapshot", "web", "file"],
        &["record", "web", "file"],
        &["recover", "web"],
    ] {
        let text = names.fails(args, 1);
        assert!(
            text.contains("no guest is named web in") && text.contains("`ferry ps`"),
            "{text}"
        );
    }
    let out = names.ferry(&["status", "web", "--json"]);
    let value: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(value["code"], "no-guest");
    let text = names.fails(&["run", "--nas", "is.S", "--name", "a/b"], 2);
    assert!(text.contains("1 to 64 letters"), "{text}");
    let text = names.fails(&["recover", "web", "tcp:a:1", "--take-over"], 2);
    assert!(text.contains("leave out the URI"), "{text}");
}

#[test]
fn a_name_is_one_guests_until_its_vmm_is_gone() {
    if !guests_run() {
        return;
    }
    let mut names = Names::new();
    names.run(&["--nas", WRITER, "--name", "web"]);
    let socket = fs::metadata(names.folder().join("web.sock")).unwrap();
    assert!(socket.file_type().is_socket());
    assert_eq!(socket.permissions().mode() & 0o777, 0o600);
    let again = ["run", "--nas", "is.S", "--serial", "null", "--name", "web"];
    let text = names.fails(&again, 1);
    assert!(text.contains("a guest named web is here already"), "{text}");
    assert!(names.ferry(&["pause", "web"]).status.success());
    assert_eq!(names.ps(), [is("web", "paused")]);

    names.started[0].kill().unwrap();
    names.started[0].wait().unwrap();
    assert_eq!(names.ps(), [is("web", "stale")]);
    let text = names.fails(&["status", "web"], 1);
    assert!(text.contains("no ferry answers on"), "{text}");
    names.run(&["--nas", WRITER, "--name", "web"]);
    assert_eq!(names.ps(), [is("web", "running")]);
    assert!(names.ferry(&["stop", "web"]).status.success());
    assert!(names.started[1].wait().unwrap().success());
    assert_eq!(names.ps(), []);
}

#[test]
fn a_guest_moves_by_its_name_and_is_listed_at_both_ends() {
    if !guests_run() {
        return;
    }
    let mut names = Names::new();
    names.run(&["--nas", WRITER, "--name", "web"]);
    let (uri, mut words) = names.receive(&["--name", "web-2"]);
    assert_eq!(names.ps(), [is("web", "running"), is("web-2", "receiving")]);
    let table = names.ferry(&["ps"]).stdout;
    let table = String::from_utf8(table).unwrap();
    assert!(table.contains(&format!("on {uri}")), "{table}");
    let report = names.json(&[
        "migrate",
        "web",
        &uri,
        "--json",
        "--verify",
        "--on-timeout",
        "stop",
        "--timeout",
        "15s",
    ]);
    assert_eq!(
        (&report["code"], &report["verified"]),
        (&"moved".into(), &true.into())
    );
    assert!(names.started[0].wait().unwrap().success());
    let mut line = String::new();
    words.read_line(&mut line).unwrap();
    assert!(line.contains("the guest has arrived"), "{line}");
    let list = names.json(&["ps", "--json"]);
    let row = &list["guests"][0];
    assert_eq!(
        (
            &row["name"],
            &row["guest_name"],
            &row["state"],
            &row["cpus"]
        ),
        (&"web-2".into(), &"web".into(), &"running".into(), &1.into()),
        "{list}"
    );
    assert!(names.ferry(&["stop", "web-2"]).status.success());
}

#[test]
fn a_guest_file_runs_and_a_flag_beside_it_wins() {
    let mut names = Names::new();
    let said = [
        "run",
        "--nas",
        WRITER,
        "--cpus",
        "2",
        "--name",
        "web",
        "--print-config",
    ];
    let file = names.dir.path().join("web.toml");
    let printed = names.ferry(&said);
    assert!(printed.status.success(), "{}", stderr(&printed));
    fs::write(&file, &printed.stdout).unwrap();
    fs::write(
        names.dir.path().join("odd.toml"),
        "nas = 'mg.A'\nmemry = 2\n",
    )
    .unwrap();
    let text = names.fails(&["run", "odd.toml"], 2);
    assert!(
        text.contains("odd.toml:2:1: there is no key `memry`; is `memory` meant?"),
        "{text}"
    );
    fs::write(
        names.dir.path().join("odd.toml"),
        "nas = 'mg.A'\nmemory = 'lots'\n",
    )
    .unwrap();
    let text = names.fails(&["run", "odd.toml"], 2);
    assert!(
        text.contains("odd.toml:2:10: invalid value 'lots'"),
        "{text}"
    );
    if !guests_run() {
        return;
    }
    names.run(&["web.toml", "--cpus", "1"]);
    let status = names.json(&["status", "web", "--json"]);
    assert_eq!(status["guest"]["cpus"], 1, "{status}");
}

/// What the guest has said when it is at work.
fn until_it_works(shown: &mut impl BufRead) -> String {
    let mut text = String::new();
    while !text.contains("ferry-guest: stat") {
        assert!(shown.read_line(&mut text).unwrap() > 0, "{text}");
    }
    text
}

#[test]
fn a_console_is_attached_to_and_a_log_is_read_by_name() {
    if !guests_run() {
        return;
    }
    let mut names = Names::new();
    let mut run = |args: &[&str]| {
        let child = names
            .command(&[&["run", "--nas", WRITER], args].concat())
            .spawn();
        names.started.push(child.unwrap());
    };
    run(&["--name", "web", "--serial", "pty"]);
    run(&["--name", "db", "--serial", "file:db.log"]);
    let all = [is("db", "running"), is("web", "running")];
    until("both run", || names.ps() == all);

    let mut console = names
        .command(&["console", "web"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut shown = BufReader::new(console.stdout.take().unwrap());
    let mut text = until_it_works(&mut shown);
    let again = names.fails(&["console", "web"], 1);
    assert!(again.contains("another `ferry console`"), "{again}");
    // The guest's own way to be ended: it verifies all it wrote.
    console.stdin.take().unwrap().write_all(b"q").unwrap();
    shown.read_to_string(&mut text).unwrap();
    assert!(text.contains("verified=yes"), "{text}");
    assert!(console.wait().unwrap().success());
    assert!(names.started[0].wait().unwrap().success());

    let elsewhere = names.fails(&["console", "db"], 1);
    assert!(
        elsewhere.contains("file:") && elsewhere.contains("--serial pty"),
        "{elsewhere}"
    );
    let mut follow = names
        .command(&["logs", "db", "--follow"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut shown = BufReader::new(follow.stdout.take().unwrap());
    let mut text = until_it_works(&mut shown);
    assert!(names.ferry(&["stop", "db"]).status.success());
    shown.read_to_string(&mut text).unwrap();
    assert!(follow.wait().unwrap().success());
    let log = fs::read_to_string(names.dir.path().join("db.log")).unwrap();
    assert_eq!(text, log);
}
