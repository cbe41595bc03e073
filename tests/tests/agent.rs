//! Two hosts on one machine, each with a folder of guests of its own, and an agent on one of them.
#![allow(clippy::unwrap_used, clippy::panic)]

use ferry_tests::pki::{Authority, Certificates};
use ferry_tests::{Ran, ferry, guests_run, run_by, until};
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use tempfile::TempDir;

const WORK: &str = "dirty:wss=4M,rate=500";

/// A host: its guests' names are in a folder of its own.
struct Place {
    folder: TempDir,
    started: Vec<Child>,
}

impl Place {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            started: Vec::new(),
        }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(ferry());
        command.env("RUNTIME_DIRECTORY", self.folder.path());
        command
    }

    fn ferry(&self, args: &[&str]) -> Ran {
        let mut command = self.command();
        command.args(args);
        run_by(command)
    }

    fn guest(&mut self, name: &str) {
        let mut command = self.command();
        command.args(["run", "--nas", WORK, "--memory", "32M", "--name", name]);
        command.args(["--serial", "null"]).stderr(Stdio::null());
        self.started.push(command.spawn().unwrap());
        until("the guest runs", || self.state(name) == "running");
    }

    /// An agent, and where it listens.
    fn agent(&mut self, certificates: &Certificates, more: &[&str]) -> String {
        let mut command = self.command();
        command.args([
            "agent",
            "--listen",
            "127.0.0.1:0",
            "--tls",
            certificates.text(),
        ]);
        let mut child = command.args(more).stderr(Stdio::piped()).spawn().unwrap();
        let mut words = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        words.read_line(&mut line).unwrap();
        std::thread::spawn(move || words.lines().for_each(drop));
        self.started.push(child);
        let (_, address) = line.trim().split_once("listens on ").expect(&line);
        address.to_owned()
    }

    fn guests(&self) -> Vec<Value> {
        let ran = self.ferry(&["ps", "--json"]);
        let list: Value = serde_json::from_str(&ran.stdout).unwrap();
        list["guests"].as_array().unwrap().clone()
    }

    fn state(&self, name: &str) -> String {
        let guests = self.guests();
        let found = guests.iter().find(|guest| guest["name"] == name);
        found.map_or("none".into(), |guest| {
            guest["state"].as_str().unwrap().to_owned()
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for guest in self.guests() {
            self.ferry(&["stop", guest["name"].as_str().unwrap()]);
        }
        for child in &mut self.started {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[test]
fn a_guest_is_moved_to_a_host_and_what_cannot_come_is_told_before() {
    if !guests_run() {
        return;
    }
    let authority = Authority::default();
    let certificates = authority.host("hostb");
    let (mut here, mut there) = (Place::new(), Place::new());
    let host = there.agent(&certificates, &[]);
    here.guest("web");
    here.guest("db");
    there.guest("db");
    let tls = ["--tls", certificates.text(), "--quiet"];
    // What the other host lacks, and who may not ask it.
    let ran = here.ferry(&[&["migrate", "db", &host], &tls[..]].concat());
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(
        ran.stderr
            .contains("a guest of the name db is here already"),
        "{ran:?}"
    );
    let strange = Authority::default().host("hostb");
    let ran = here.ferry(&["migrate", "web", &host, "--tls", strange.text()]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.stderr.contains("is of another authority"), "{ran:?}");
    let ran = here.ferry(&["migrate", "web", "no.such.host.invalid", tls[0], tls[1]]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(
        ran.stderr.contains("no.such.host.invalid is not reached"),
        "{ran:?}"
    );
    // A migration that ends here leaves no receiver there.
    let mut slow = here.command();
    slow.args(["migrate", "web", &host, "--bandwidth", "1M"])
        .args(tls);
    let slow = std::thread::spawn(move || run_by(slow));
    until("the guest is on its way", || {
        here.state("web") == "migrating"
    });
    assert_eq!(there.state("web"), "receiving");
    until("it is cancelled", || {
        here.ferry(&["cancel", "web"]).code == Some(0)
    });
    let ran = slow.join().unwrap();
    assert_eq!(ran.code, Some(3), "{ran:?}");
    until("the receiver has ended", || there.state("web") == "none");
    assert_eq!(here.state("web"), "running");

    let ran = here.ferry(&[&["migrate", "web", &host, "--verify"], &tls[..]].concat());
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_eq!(there.state("web"), "running");
    until("its old VMM has ended", || here.state("web") == "none");
    assert_eq!(here.state("db"), "running");
}

#[test]
fn a_host_is_emptied_and_its_guests_outlive_the_agent() {
    if !guests_run() {
        return;
    }
    let certificates = Authority::default().host("hostb");
    let (mut here, mut there) = (Place::new(), Place::new());
    let host = there.agent(&certificates, &[]);
    let agent = there.started.len() - 1;
    let names = ["a", "b", "c"];
    names.iter().for_each(|name| here.guest(name));
    let evacuate = |more: &[&str]| {
        let args = [
            "evacuate",
            "--to",
            &host,
            "--tls",
            certificates.text(),
            "--json",
        ];
        let ran = here.ferry(&[&args, more].concat());
        let printed: Value =
            serde_json::from_str(&ran.stdout).unwrap_or_else(|e| panic!("{e} {ran:?}"));
        (ran, printed)
    };
    let (ran, plan) = evacuate(&["--dry-run"]);
    assert_eq!(
        (ran.code, &plan["code"]),
        (Some(0), &"planned".into()),
        "{ran:?}"
    );
    assert!(names.iter().all(|name| here.state(name) == "running"));
    assert!(there.guests().is_empty());
    let (ran, result) = evacuate(&["--parallel", "2"]);
    assert_eq!(
        (ran.code, &result["code"]),
        (Some(0), &"moved".into()),
        "{ran:?}"
    );
    let rows = result["guests"].as_array().unwrap();
    assert_eq!(rows.len(), 3, "{result:#}");
    assert!(
        rows.iter()
            .all(|row| row["downtime_ms"].as_f64().unwrap() > 0.0),
        "{result:#}"
    );
    there.started[agent].kill().unwrap();
    there.started[agent].wait().unwrap();
    assert!(names.iter().all(|name| there.state(name) == "running"));
    until("nothing is left", || here.guests().is_empty());
    // Without an agent nothing moves, and that is one sentence.
    here.guest("d");
    let args = ["evacuate", "--to", &host, "--tls", certificates.text()];
    let ran = here.ferry(&args);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(
        ran.stderr.contains("does `ferry agent` run there?"),
        "{ran:?}"
    );
    assert_eq!(here.state("d"), "running");
}
