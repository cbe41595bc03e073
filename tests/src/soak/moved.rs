//! Cases between two processes.

use super::disk::{DiskFaults, Mode};
use super::operator::Sides;
use super::{Case, Fault, MEMORY, Method, Outcome, STAT, Step, Verdict, WORK, runs, turns};
use crate::{Host, Migration, Moment, State, Strike, Way, Wire, is_locked, until};
use ferry_guest_images::Line;
use ferry_migration::options::{Compress, Handover, Options, PolicyKind};
use ferry_migration::report::Status;
use ferry_migration::rng::Rng;
use ferry_migration::wire::FrameType;
use ferry_vmm::api::client::Action;
use nix::sys::signal::Signal;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Bytes of the disk: some blocks of the copy, the last not whole.
const DISK: usize = (1 << 20) + 512;

/// Both sides, what joins them, and their disks.
struct Ground {
    source: Host,
    destination: Host,
    wire: Wire,
    faults: [DiskFaults; 2],
    disks: [PathBuf; 2],
    contents: Vec<u8>,
    _dir: tempfile::TempDir,
}

pub(super) fn run(case: &Case) -> Verdict {
    let mut ground = Ground::new(case);
    let mut rng = case.rng();
    let uri = ground.wire.uri().to_owned();
    let migration = ground.source.begin_migration(&uri, &options(case.method));
    let struck = ground.wire.struck(|| migration.is_over());
    let may_be_lost = ground.strike(case, &mut rng);
    let mut sides = Sides {
        source: &mut ground.source,
        destination: &mut ground.destination,
        may_be_lost,
        did: Vec::new(),
    };
    let outcome = sides.resolve();
    let operator = sides.did;
    ground.check(case, &outcome, migration);
    Verdict {
        outcome,
        struck,
        operator,
    }
}

fn options(method: Method) -> Options {
    let common = Options {
        max_rounds: Some(1),
        // What a codec saves depends on the clock.
        compress: Compress::None,
        ..Host::options()
    };
    match method {
        Method::PostCopy => Options {
            policy: PolicyKind::Postcopy,
            // Pages still follow when the strike comes.
            bandwidth: Some(16_000_000),
            ..common
        },
        Method::HandOver => Options {
            handover: Handover::On,
            ..common
        },
        Method::CopyDisk => Options {
            copy_disk: true,
            ..common
        },
        Method::PreCopy | Method::Snapshot => common,
    }
}

/// The frame of a step.
fn strike(case: &Case, moment: Moment) -> Strike {
    use FrameType::{
        Alive, Arrived, Blocks, BlocksStored, BlocksZero, Commit, HelloAck, MissingBits,
        MissingRuns, Pages, Ready, RoundAck, RoundEnd, Running, Verify, Zero,
    };
    use Way::{Back, Forth};
    let method = case.method;
    let (way, kinds): (Way, &'static [FrameType]) = match case.step {
        Step::FirstPass => match method {
            Method::PreCopy => (Forth, &[Pages, Zero]),
            Method::CopyDisk => (Forth, &[Blocks, BlocksZero]),
            _ => (Back, &[HelloAck]),
        },
        Step::Draining => match method {
            Method::PostCopy => (Forth, &[MissingRuns, MissingBits]),
            Method::CopyDisk => (Back, &[BlocksStored]),
            _ => (Back, &[RoundAck]),
        },
        Step::Stopped => match method {
            Method::PreCopy | Method::CopyDisk => (Forth, &[RoundEnd]),
            Method::HandOver => (Forth, &[Verify]),
            _ => (Forth, &[FrameType::State]),
        },
        Step::State => (Forth, &[FrameType::State]),
        Step::Ready => (Back, &[Ready]),
        Step::Commit => (Forth, &[Commit]),
        Step::Running => (Back, &[Running]),
        Step::Following => (Forth, &[Pages, Zero]),
        Step::Complete => match method {
            Method::PostCopy => (Back, &[Arrived]),
            _ => (Forth, &[Alive]),
        },
    };
    let stopped = case.step == Step::Stopped;
    Strike {
        kinds,
        way,
        number: match case.step {
            // The first round, the pages that were compared, and then the last round.
            Step::Stopped if kinds == [RoundEnd] => 3,
            Step::Following => 3,
            _ => 1,
        },
        after: matches!(case.step, Step::Following | Step::Complete).then_some(Running),
        moment: match moment {
            _ if stopped => Moment::Before,
            // Of a state that has not begun to be sent nothing is to be told from the step before.
            Moment::Before if case.step == Step::State => Moment::After,
            moment => moment,
        },
        or_state: stopped,
    }
}

impl Ground {
    fn new(case: &Case) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let contents: Vec<u8> = (0..DISK).map(|at| (at / 7).to_le_bytes()[0]).collect();
        let own = dir.path().join("disk.img");
        std::fs::write(&own, &contents).unwrap();
        let other = match case.method {
            Method::CopyDisk => dir.path().join("copy.img"),
            _ => own.clone(),
        };
        let faults = ["source", "destination"].map(|name| DiskFaults::new(dir.path(), name));
        let args = [
            "run", "--nas", WORK, "--memory", MEMORY, "--cpus", "1", "--serial", "stdio", "--disk",
        ];
        let start = |faults: &DiskFaults, args: &[&str]| match case.fault {
            Fault::DiskSlow | Fault::DiskFailing => faults.start(args),
            _ => Host::start(args),
        };
        let source = start(
            &faults[0],
            &[&args[..], &[text(&own), STAT[0], STAT[1]]].concat(),
        );
        source.guest_line("a line", |line| matches!(line, Line::Stat { .. }));
        let listens = match case.method {
            Method::HandOver => format!("unix:{}", text(&dir.path().join("link"))),
            _ => "tcp:127.0.0.1:0".to_owned(),
        };
        let args = ["receive", &listens, "--serial", "stdio", "--disk"];
        let destination =
            Host::listening(start(&faults[1], &[&args[..], &[text(&other)]].concat()));
        let moments = [Moment::Before, Moment::Inside, Moment::After];
        let moment = moments[usize::try_from(case.rng().below(3)).unwrap()];
        let wire = Wire::to(destination.uri(), strike(case, moment));
        Self {
            source,
            destination,
            wire,
            faults,
            disks: [own, other],
            contents,
            _dir: dir,
        }
    }

    /// Does the harm and ends it. Why the guest may be lost by it.
    fn strike(&mut self, case: &Case, rng: &mut Rng) -> Option<&'static str> {
        let lasts = case.lasts();
        match case.fault {
            Fault::KillSource => {
                self.source.kill();
                let lost = self.without_source(case.method);
                self.wire.cut(false);
                return lost;
            }
            Fault::KillDestination => {
                self.destination.kill();
                let lost = self.without_destination(case.method);
                self.wire.cut(false);
                return lost;
            }
            Fault::KillBoth => {
                self.source.kill();
                self.destination.kill();
                self.wire.cut(false);
                return Some("both were killed");
            }
            Fault::StopSource => stop(&self.source, &self.wire, lasts),
            Fault::StopDestination => stop(&self.destination, &self.wire, lasts),
            Fault::Cut => {
                self.wire.cut(rng.chance(0.5));
                std::thread::sleep(lasts);
                self.wire.heal();
            }
            Fault::Stalled => {
                std::thread::sleep(lasts);
                match rng.below(3) {
                    0 => self.wire.release(),
                    1 => self.wire.cut(false),
                    _ => {
                        // Too late after the commit: refused then.
                        let _ = self.source.act(Action::Cancel);
                        self.wire.cut(false);
                    }
                }
            }
            Fault::Trickled => self.wire.trickle(),
            Fault::DiskSlow | Fault::DiskFailing => {
                let mode = match case.fault {
                    Fault::DiskSlow => Mode::Slow,
                    _ => Mode::Failing,
                };
                let faults = &self.faults[usize::try_from(rng.below(2)).unwrap()];
                faults.set(mode);
                self.wire.release();
                std::thread::sleep(lasts);
                faults.set(Mode::Normal);
            }
        }
        None
    }

    /// Whether the destination may have nothing of the guest, or too little.
    fn without_source(&self, method: Method) -> Option<&'static str> {
        let complete = match method {
            Method::PostCopy => FrameType::Arrived,
            _ => FrameType::Ready,
        };
        (!self.wire.has_seen(complete)).then_some("the source was killed before all had left it")
    }

    /// Whether the guest may have run at the destination, so that what the source has is no guest
    /// any more.
    fn without_destination(&self, method: Method) -> Option<&'static str> {
        let taken = match method {
            // Pages and memory are in one place only.
            Method::PostCopy | Method::HandOver => FrameType::Commit,
            _ => FrameType::Running,
        };
        let taken = self.wire.has_seen(taken);
        taken.then_some("the destination was killed with the guest")
    }

    /// What must hold in the end.
    fn check(mut self, case: &Case, outcome: &Outcome, migration: Migration) {
        let host = match outcome {
            Outcome::AtSource => &self.source,
            Outcome::AtDestination => &self.destination,
            Outcome::Lost(_) => {
                let turns = turns([self.source.guest_lines(), self.destination.guest_lines()]);
                assert!(matches!(*turns, [] | [0] | [0, 1]), "{turns:?}");
                return;
            }
        };
        runs(host);
        let report = migration.outcome();
        let lines = [self.source.guest_lines(), self.destination.guest_lines()];
        let turns = turns(lines.clone());
        // A killed destination may have run the guest before an operator took it back.
        let back = case.fault == Fault::KillDestination && *outcome == Outcome::AtSource;
        let once = matches!(*turns, [0] | [0, 1]) || back && *turns == [0, 1, 0];
        assert!(once, "the guest ran on both sides: {turns:?} {lines:#?}");
        let [own, other] = &self.disks;
        let intact = |disk: &Path| std::fs::read(disk).unwrap() == self.contents;
        assert!(intact(own), "the source's disk has changed");
        match outcome {
            Outcome::AtSource => {
                assert!(
                    is_locked(own),
                    "the guest runs here without its disk's lock"
                );
                let completed = report.is_ok_and(|r| r.status == Status::Completed);
                assert!(
                    !completed,
                    "a migration that left the guest is said to be complete"
                );
                // A disk that has failed once never moves again: what it holds is not known.
                if self.destination.has_ended() || case.fault == Fault::DiskFailing {
                    self.source.verdict();
                } else {
                    self.moves_still(case.method);
                }
            }
            _ => {
                assert!(intact(other), "the copy of the disk differs");
                assert!(is_locked(other), "the guest runs without its disk's lock");
                if !self.source.has_ended() {
                    assert_ne!(self.source.state(), State::Running);
                    assert_eq!(self.source.ends(), Some(0), "{:#?}", self.source.said());
                }
                self.destination.verdict();
            }
        }
    }

    /// The fault has left nothing behind that keeps the guest here.
    fn moves_still(mut self, method: Method) {
        until("the receiver takes the guest", || {
            let report = self
                .source
                .migrate(self.destination.uri(), &options(method));
            // A receiver may still be busy with what was broken.
            if report.status != Status::Completed {
                eprintln!("tried again: {:?}", report.error);
                self.destination.reaches(State::Receiving);
            }
            report.status == Status::Completed
        });
        assert_eq!(self.source.ends(), Some(0), "{:#?}", self.source.said());
        runs(&self.destination);
        self.destination.verdict();
    }
}

fn stop(host: &Host, wire: &Wire, lasts: Duration) {
    host.signal(Signal::SIGSTOP);
    wire.release();
    std::thread::sleep(lasts);
    host.signal(Signal::SIGCONT);
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
