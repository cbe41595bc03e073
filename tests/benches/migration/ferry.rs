//! A run of ferry.

use super::case::{Case, DOWNTIME, MEMORY_MIB};
use super::log::{Log, seen};
use super::measure::{Figures, watched};
use super::process::{Process, said, typed};
use anyhow::{Context, Result, ensure};
use ferry_guest_images::{Line, STOP};
use ferry_migration::report::{Report, Status};
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How long a guest may take to fill its memory.
pub const BOOT: Duration = Duration::from_secs(60);
/// The steady state before the move: seconds that tell how quiet the machine is.
pub const SETTLE: Duration = Duration::from_millis(2500);
/// The seconds after the move: the guest prints one line each.
pub const AFTER: usize = 3;
/// How long verifying all memory may take.
pub const VERDICT: Duration = Duration::from_secs(60);

/// Asks a small guest for the rate of the time-stamp counter, so that QEMU's guests can be told the same.
pub fn tsc_khz(binary: &Path) -> Result<u64> {
    let directory = tempfile::tempdir()?;
    let log = Log(directory.path().join("serial"));
    let process = Process::start(
        "ferry run",
        Command::new(binary)
            .args(["run", "--nas", "idle:fill=none", "--memory", "32M", "--api"])
            .arg(directory.path().join("api"))
            .arg("--serial")
            .arg(format!("file:{}", log.0.display()))
            .stdin(Stdio::null())
            .stderr(Stdio::null()),
    )?;
    let khz = log.wait("its clock's rate", BOOT, |line| match line {
        Line::Start { tsc_khz, .. } => Some(*tsc_khz),
        _ => None,
    })?;
    drop(process);
    Ok(khz)
}

/// Moves a guest once.
pub fn run(binary: &Path, case: Case) -> Result<Figures> {
    let directory = tempfile::tempdir()?;
    let errors = ["a.err", "b.err"].map(|name| directory.path().join(name));
    run_in(&directory, binary, case).with_context(|| said(&errors))
}

fn run_in(directory: &TempDir, binary: &Path, case: Case) -> Result<Figures> {
    let path = |name: &str| directory.path().join(name);
    let (log, arrived) = (Log(path("source")), Log(path("destination")));
    let mut destination = Process::start(
        "ferry receive",
        Command::new(binary)
            .args(["receive", "tcp:127.0.0.1:0", "--serial", "stdio", "--api"])
            .arg(path("b.sock"))
            .stdin(typed())
            .stdout(File::create(&arrived.0)?)
            .stderr(File::create(path("b.err"))?),
    )?;
    let source = Process::start(
        "ferry run",
        Command::new(binary)
            .args(["run", "--nas", case.workload(), "--memory"])
            .arg(format!("{MEMORY_MIB}M"))
            .arg("--api")
            .arg(path("a.sock"))
            .arg("--serial")
            .arg(format!("file:{}", log.0.display()))
            .stdin(Stdio::null())
            .stderr(File::create(path("a.err"))?),
    )?;
    let uri = uri(&path("b.err"))?;
    log.wait("ready", BOOT, |line| {
        matches!(line, Line::Ready { .. }).then_some(())
    })?;
    sleep(SETTLE);
    let printed = log.text().len();
    let moved = watched(&source, &destination, || {
        let output = Command::new(binary)
            .arg("migrate")
            .arg("--api")
            .arg(path("a.sock"))
            .arg(&uri)
            .args(["--policy", "precopy", "--json", "--downtime"])
            .arg(format!("{}ms", DOWNTIME.as_millis()))
            .output()
            .context("running ferry migrate")?;
        let said = String::from_utf8_lossy(&output.stderr);
        let report: serde_json::Value = serde_json::from_slice(&output.stdout)
            .with_context(|| format!("ferry migrate printed no report: {said}"))?;
        // The source's end is part of what a migration costs.
        source.end(Duration::from_secs(30))?;
        runs(&arrived, 1)?;
        Ok(report)
    })?;
    let raw = moved.result;
    let report: Report = serde_json::from_value(raw.clone()).context("reading the report")?;
    ensure!(
        report.status == Status::Completed,
        "the migration has not completed: {:?}",
        report.error
    );
    let verified = finish(&mut destination, &arrived)?;
    let seen = seen(&log.0, printed, &arrived.text())?;
    Ok(Figures {
        total_ms: report.total_ms,
        gap_ms: seen.gap_ms,
        after_ms: seen.after_ms,
        noise_ms: seen.noise_ms,
        downtime_ms: report.downtime_ms,
        wire_bytes: report.bytes_wire,
        lo_bytes: moved.lo_bytes,
        source: moved.source,
        destination: moved.destination,
        verified,
        report: raw,
    })
}

/// Lets the guest run on for a while, then has it verify its memory and end. Says whether it was intact.
pub fn finish(destination: &mut Process, arrived: &Log) -> Result<bool> {
    runs(arrived, AFTER)?;
    destination.type_in(&[STOP])?;
    let verified = arrived.wait("its verdict", VERDICT, |line| match line {
        Line::Verdict { verdict, .. } => Some(verdict.verified && verdict.corrupt == 0),
        _ => None,
    })?;
    Ok(verified)
}

/// Waits until the guest has told of so many seconds at the destination.
pub fn runs(arrived: &Log, seconds: usize) -> Result<()> {
    let began = Instant::now();
    while arrived.stats() < seconds {
        ensure!(
            began.elapsed() < Duration::from_secs(30),
            "the guest is silent at the destination:\n{}",
            arrived.text()
        );
        sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Where the receiver waits: it chose a port and said so.
fn uri(said: &Path) -> Result<String> {
    let began = Instant::now();
    loop {
        let text = fs::read_to_string(said).unwrap_or_default();
        if let Some(uri) = text.split_whitespace().find(|w| w.starts_with("tcp:")) {
            return Ok(uri.to_owned());
        }
        ensure!(
            began.elapsed() < Duration::from_secs(10),
            "ferry receive does not wait for a guest: {text}"
        );
        sleep(Duration::from_millis(10));
    }
}
