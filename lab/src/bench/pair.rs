//! A run: two fresh VMMs, a guest that moves from one to the other, and what came of it.

use super::cell::Cell;
use super::forecast::forecast;
use super::interrupt;
use super::listener::{BEAT_MS, silence_ms};
use super::log::{Log, STAT_MS, seen};
use super::measure::{Figures, Told, watched};
use super::net::Net;
use super::process::{Process, said};
use super::warm::{available, warm};
use super::{cloud, ferry, qemu};
use ferry_guest_images::{BARE, Line, Manner, STOP, Workload};
use ferry_nas::workload::Workload as Kind;
use ferry_terminal::output::Failure;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a guest may take to fill its memory, for each GiB of it.
const BOOT: Duration = Duration::from_secs(60);
/// The steady state before the move: seconds that tell how quiet the machine is.
const SETTLE: Duration = Duration::from_millis(2500);
/// The most runs of a kernel to wait for until it is early in its timed loop. Only a kernel whose
/// iterations are far shorter than the interval of lines takes as many; where it is moved makes no
/// difference.
const RUNS_TO_WAIT: u64 = 30;
/// Lines of the guest after the source has gone: a second of them.
const AFTER: usize = 10;
/// How long the guest may be silent at the destination.
const SILENCE: Duration = Duration::from_secs(60);
/// How long verifying all memory, or finishing a run of a kernel, may take.
const VERDICT: Duration = Duration::from_secs(1200);

/// What a run needs to know of this machine.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Our own program.
    pub ferry: PathBuf,
    /// QEMU's.
    pub qemu: PathBuf,
    /// Cloud Hypervisor's.
    pub cloud: PathBuf,
    /// The rate of the time-stamp counter, so that every VMM's guests are told the same.
    pub tsc_khz: u64,
    /// How long a migration may take.
    pub timeout: Duration,
    /// Whether 2 MiB pages are left as they are before a migration.
    pub cold: bool,
}

/// Two VMMs, the source with a guest.
pub trait Pair {
    /// The source's process, and the destination's.
    fn processes(&mut self) -> [&mut Process; 2];

    /// Moves the guest and waits until the source may be discarded; tells the source to end.
    fn migrate(&mut self) -> Result<Told, Failure>;
}

/// The files of a run.
pub struct Files {
    directory: tempfile::TempDir,
}

impl Files {
    /// One of them.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The guest's image, for VMMs that do not have it built in.
    pub fn image(&self) -> Result<PathBuf, Failure> {
        let image = self.path("bare.elf");
        if !image.exists() {
            std::fs::write(&image, BARE)?;
        }
        Ok(image)
    }

    /// What the source's serial port prints.
    pub fn source(&self) -> Log {
        Log(self.path("source"))
    }

    /// What the destination's prints.
    pub fn destination(&self) -> Log {
        Log(self.path("destination"))
    }
}

/// The kernel command line of a guest, the same under every hypervisor.
pub fn guest_command_line(cell: &Cell, tsc_khz: u64) -> String {
    let cpus = usize::try_from(cell.guest.cpus).unwrap_or(usize::MAX);
    let manner = Manner {
        repeat: Some(0),
        stat_ms: Some(STAT_MS),
        beat_ms: Some(BEAT_MS),
    };
    let work = &cell.guest.work;
    work.command_line_with(cpus, Some(tsc_khz), manner)
}

/// A port that is free now. Another process may take it before it is used; in a namespace of its
/// own every port is free.
pub fn free_port() -> Result<u16, Failure> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Asks a small guest for the rate of the time-stamp counter.
pub fn tsc_khz(ferry: &Path) -> Result<u64, Failure> {
    let files = files()?;
    let process = ferry::clock(ferry, &files)?;
    files.source().wait(
        "its clock's rate",
        BOOT,
        || process.must_run(),
        |line| match line {
            Line::Start { tsc_khz, .. } => Some(*tsc_khz),
            _ => None,
        },
    )
}

fn files() -> Result<Files, Failure> {
    let directory = tempfile::Builder::new().prefix("ferry-bench-").tempdir()?;
    Ok(Files { directory })
}

/// Moves a guest once.
pub fn run(machine: &Machine, cell: &Cell) -> Result<Figures, Failure> {
    let files = files()?;
    run_in(&files, machine, cell).map_err(|Failure(sentence)| {
        let said = said(&["a.err", "b.err"].map(|name| files.path(name)));
        if interrupt::wanted() || said.is_empty() {
            Failure(sentence)
        } else {
            Failure(format!("{sentence} ({said})"))
        }
    })
}

fn run_in(files: &Files, machine: &Machine, cell: &Cell) -> Result<Figures, Failure> {
    let net = Net::up(&cell.link)?;
    let policy = &cell.policy;
    let mut pair: Box<dyn Pair> = match (&policy.ferry, &policy.qemu, &policy.cloud) {
        (Some(options), _, _) => Box::new(ferry::start(machine, cell, options, &net, files)?),
        (_, Some(qemu), _) => Box::new(qemu::start(machine, cell, qemu, &net, files)?),
        (_, _, Some(cloud)) => Box::new(cloud::start(machine, cell, cloud, &net, files)?),
        _ => return Err(Failure(format!("{cell} does not say who moves the guest"))),
    };
    let (log, arrived) = (files.source(), files.destination());
    let pids = pair.processes().map(|process| process.id());
    let gib = u32::try_from(cell.guest.memory >> 30).unwrap_or(u32::MAX);
    {
        let [source, destination] = pair.processes();
        let alive = || source.must_run().and_then(|()| destination.must_run());
        log.wait("that it is ready", BOOT * (gib + 1), alive, |line| {
            matches!(line, Line::Ready { .. }).then_some(())
        })?;
        interrupt::pause(SETTLE)?;
        if computes(&cell.guest.work) {
            in_its_loop(&log, alive)?;
        }
    }
    let warm = !machine.cold && warm(cell.guest.memory, available());
    let before = log.text().len();
    let counted = net.counters()?;
    let moved = watched(pids, cell.guest.memory >> 10, machine.timeout, || {
        let told = pair.migrate()?;
        // The source's end is part of what a migration costs.
        let [source, _] = pair.processes();
        source.end(Duration::from_secs(60))?;
        Ok(told)
    })?;
    let counted = net.counters()?.since(counted);
    runs_on(&arrived, pair.processes()[1])?;
    let until = arrived.text().len();
    let [source, destination] = pair.processes();
    let outside_ms = silence_ms(&source.arrivals(true), &destination.arrivals(false));
    let verified = verdict(pair.processes()[1], &arrived, &cell.guest.work)?;
    Ok(Figures {
        told: moved.result,
        seen: seen(&log.text(), before, &arrived.text(), until)?,
        outside_ms,
        link_bytes: counted.sent,
        back_bytes: counted.received,
        source: moved.source,
        destination: moved.destination,
        verified,
        warm,
        forecast: forecast(cell),
    })
}

/// Whether a guest runs a kernel.
fn computes(work: &Workload) -> bool {
    matches!(work.kind(), Kind::Nas(_))
}

/// Waits until a kernel is early in its timed loop, where a move is to begin. While a kernel sets
/// up a run its memory can be nearly empty.
fn in_its_loop(log: &Log, alive: impl Fn() -> Result<(), Failure>) -> Result<(), Failure> {
    let late = || "the guest has not told that it is in its timed loop".to_owned();
    let first = log.step().map_or(1, |step| step.run);
    interrupt::until(VERDICT, late, || {
        let step = log.step().unwrap_or_default();
        if step.early() || step.run >= first + RUNS_TO_WAIT {
            return Ok(Some(()));
        }
        alive().map(|()| None)
    })
}

/// Waits until the guest has told of a second at the destination, counted from now.
fn runs_on(arrived: &Log, destination: &Process) -> Result<(), Failure> {
    let wanted = arrived.stats() + AFTER;
    let late = || {
        format!(
            "the guest is silent at the destination: {} lines about its progress, one every {STAT_MS} ms, were expected",
            AFTER
        )
    };
    interrupt::until(SILENCE, late, || {
        if arrived.stats() >= wanted {
            return Ok(Some(()));
        }
        destination.must_run().map(|()| None)
    })
}

/// Ends the guest, and returns whether it was intact: the writer verifies all of its memory, a
/// kernel the results of the run that was moved.
fn verdict(destination: &mut Process, arrived: &Log, work: &Workload) -> Result<bool, Failure> {
    let kernel = computes(work);
    destination.type_in(&[STOP])?;
    // It may end, having said everything, between two looks at what it said.
    arrived.wait(
        "its verdict",
        VERDICT,
        || Ok(()),
        |line| match line {
            Line::Verdict { verdict, .. } if !kernel => {
                Some(verdict.verified && verdict.corrupt == 0)
            }
            Line::Result(result) if kernel => Some(result.verified),
            _ => None,
        },
    )
}
