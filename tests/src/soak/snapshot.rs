//! Cases with a file between the two processes.

use super::disk::{DiskFaults, Mode};
use super::{Case, Fault, MEMORY, Outcome, STAT, Step, Verdict, WORK, runs, turns};
use crate::{Host, State};
use ferry_guest_images::Line;
use ferry_migration::options::Compress;
use ferry_vmm::api::types::{SnapshotReport, SnapshotRequest, Then};
use nix::sys::signal::Signal;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Duration;

const KILLED: &str = "the source was killed before its file was complete";

pub(super) fn run(case: &Case) -> Verdict {
    let ground = Ground::new();
    match case.step {
        Step::Complete => ground.written(),
        Step::Following => ground.reading(case),
        _ => ground.writing(case),
    }
}

struct Ground {
    source: Host,
    file: PathBuf,
    /// Of the process that writes, and of the one that reads.
    faults: [DiskFaults; 2],
    dir: tempfile::TempDir,
}

type Writing = JoinHandle<Result<SnapshotReport, String>>;

impl Ground {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let faults = ["writes", "reads"].map(|name| DiskFaults::new(dir.path(), name));
        let args = [
            "run", "--nas", WORK, "--memory", MEMORY, "--cpus", "1", "--serial", "stdio", STAT[0],
            STAT[1],
        ];
        let source = faults[0].start(&args);
        source.guest_line("a line", |line| matches!(line, Line::Stat { .. }));
        Self {
            source,
            file: dir.path().join("guest"),
            faults,
            dir,
        }
    }

    fn snapshot(&self, live: bool, then: Then) -> Writing {
        let client = self.source.client().clone();
        let request = SnapshotRequest {
            path: self.file.clone(),
            compress: Compress::None,
            live,
            force: false,
            then,
            state_version: None,
        };
        std::thread::spawn(move || client.snapshot(&request).map_err(|e| e.to_string()))
    }

    /// Broken while the file is written.
    fn writing(mut self, case: &Case) -> Verdict {
        let faults = &self.faults[0];
        match case.step {
            Step::FirstPass => faults.hold_at(faults.calls() + 1),
            Step::Draining => faults.hold_at(faults.calls() + 6),
            Step::Stopped => faults.hold_at(faults.calls() + 3),
            // All of it is written, and the file has no name.
            _ => faults.hold_sync_at(faults.syncs() + 1),
        }
        let live = matches!(case.step, Step::FirstPass | Step::Draining);
        let then = match case.rng().below(2) {
            0 => Then::Resume,
            _ => Then::Stop,
        };
        let writing = self.snapshot(live, then);
        let struck = faults.holds(|| writing.is_finished());
        assert!(!struck || !self.file.exists(), "a file without its end");
        match case.fault {
            Fault::KillSource => {
                self.source.kill();
                return self.killed(writing, struck);
            }
            Fault::StopSource => {
                self.source.signal(Signal::SIGSTOP);
                faults.go_on();
                std::thread::sleep(case.lasts());
                self.source.signal(Signal::SIGCONT);
            }
            Fault::DiskSlow => faults.set(Mode::Slow),
            _ => faults.set(Mode::Failing),
        }
        faults.go_on();
        let result = writing.join().unwrap();
        faults.set(Mode::Normal);
        let failed = case.fault == Fault::DiskFailing && struck;
        assert_eq!(result.is_err(), failed, "{result:?}");
        self.only(if failed { &[] } else { &["guest"] });
        if result.is_ok() && then == Then::Stop {
            assert_eq!(self.source.ends(), Some(0), "{:#?}", self.source.said());
            return self.restored(struck, Vec::new());
        }
        runs(&self.source);
        self.source.verdict();
        if result.is_ok() {
            restore(&self.faults[1], &self.file).verdict();
        }
        verdict(Outcome::AtSource, struck)
    }

    /// The file is whole, or there is none.
    fn killed(self, writing: Writing, struck: bool) -> Verdict {
        let result = writing.join().unwrap();
        assert!(result.is_err() || !struck, "{result:?}");
        if self.file.exists() {
            assert!(!struck, "a killed process has published its file");
            return self.restored(struck, Vec::new());
        }
        self.only(&[]);
        verdict(Outcome::Lost(KILLED), struck)
    }

    /// The process that wrote it is killed when the file is complete: the file is the guest.
    fn written(mut self) -> Verdict {
        let report = self.snapshot(false, Then::Pause).join().unwrap();
        assert!(report.is_ok(), "{report:?}");
        self.source.kill();
        self.restored(true, Vec::new())
    }

    /// Broken while the guest runs and its memory is read.
    fn reading(mut self, case: &Case) -> Verdict {
        let report = self.snapshot(false, Then::Stop).join().unwrap();
        assert!(report.is_ok(), "{report:?}");
        assert_eq!(self.source.ends(), Some(0), "{:#?}", self.source.said());
        let faults = &self.faults[1];
        // Slow, so that memory is still to be read when the guest runs.
        faults.set(Mode::Slow);
        let mut restored = restore(faults, &self.file);
        restored.says("the guest runs here");
        faults.hold_at(1);
        let here = |host: &Host| host.client().status().is_ok_and(|s| s.missing.is_none());
        let struck = faults.holds(|| here(&restored));
        match case.fault {
            Fault::KillDestination => restored.kill(),
            Fault::StopDestination => {
                restored.signal(Signal::SIGSTOP);
                faults.go_on();
                std::thread::sleep(case.lasts());
                restored.signal(Signal::SIGCONT);
            }
            Fault::DiskFailing => {
                faults.set(Mode::Failing);
                faults.go_on();
                // A guest that would read what is not its memory ends.
                if struck {
                    assert_eq!(restored.ends(), Some(1), "{:#?}", restored.said());
                }
            }
            _ => {}
        }
        faults.go_on();
        let lines = restored.guest_lines();
        if restored.has_ended() {
            faults.set(Mode::Normal);
            return self.restored(struck, lines);
        }
        std::thread::sleep(Duration::from_millis(20));
        faults.set(Mode::Normal);
        runs(&restored);
        let turns = turns([self.source.guest_lines(), restored.guest_lines()]);
        assert_eq!(turns, [0, 1]);
        restored.verdict();
        verdict(Outcome::AtDestination, struck)
    }

    /// The file makes the guest. `before` are lines of one that was restored and has ended.
    fn restored(self, struck: bool, before: Vec<String>) -> Verdict {
        let restored = restore(&self.faults[1], &self.file);
        restored.says("the guest runs here");
        if restored.state() == State::Paused {
            let resume = ferry_vmm::api::client::Action::Resume;
            restored.act(resume).unwrap();
        }
        runs(&restored);
        let turns = turns([
            [self.source.guest_lines(), before].concat(),
            restored.guest_lines(),
        ]);
        assert_eq!(turns, [0, 1]);
        restored.verdict();
        verdict(Outcome::AtDestination, struck)
    }

    /// Beside what the test has made itself, nothing but these is in the folder.
    fn only(&self, names: &[&str]) {
        for entry in std::fs::read_dir(self.dir.path()).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let known = ["writes", "reads"].contains(&&*name) || names.contains(&&*name);
            assert!(known, "{name} was left behind");
        }
        assert_eq!(self.file.exists(), !names.is_empty());
    }
}

fn verdict(outcome: Outcome, struck: bool) -> Verdict {
    Verdict {
        outcome,
        struck,
        operator: Vec::new(),
    }
}

fn restore(faults: &DiskFaults, file: &Path) -> Host {
    faults.start(&["restore", file.to_str().unwrap(), "--serial", "stdio"])
}
