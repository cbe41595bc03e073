//! A run of QEMU: the same guest, the same downtime, its own control socket.

use super::case::{Case, DOWNTIME, MEMORY_MIB};
use super::ferry::{BOOT, SETTLE, finish, runs};
use super::log::{Log, seen};
use super::measure::{Figures, watched};
use super::process::{Process, said, typed};
use super::qmp::Qmp;
use anyhow::{Context, Result, bail};
use ferry_guest_images::{BARE, Line, Workload};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// The program.
pub const QEMU: &str = "qemu-system-x86_64";
/// Far beyond what any link here carries. QEMU's default would be 128 MiB/s.
const BANDWIDTH: u64 = 1 << 40;
/// Connections of multifd.
const CHANNELS: u32 = 4;

/// Whether it is there.
pub fn installed() -> bool {
    Command::new(QEMU)
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// The machine, alike on both sides.
fn machine(directory: &Path, workload: &str, tsc_khz: u64, qmp: &Path) -> Result<Command> {
    let command_line = Workload::parse(workload)?.command_line(1, Some(tsc_khz));
    let image = directory.join("bare.elf");
    if !image.exists() {
        fs::write(&image, BARE)?;
    }
    let mut command = Command::new(QEMU);
    command
        // Without arch-capabilities: software KVM offers the MSR and then refuses to set it.
        .args([
            "-M",
            "microvm,acpi=off",
            "-enable-kvm",
            "-cpu",
            "host,arch-capabilities=off",
        ])
        .args(["-m", &format!("{MEMORY_MIB}M"), "-smp", "1"])
        // With names its vCPU threads can be told from the others.
        .args(["-name", "bench,debug-threads=on"])
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-kernel",
        ])
        .arg(image)
        .args(["-append", &command_line, "-qmp"])
        .arg(format!("unix:{},server=on,wait=off", qmp.display()));
    Ok(command)
}

/// Moves a guest once.
pub fn run(case: Case, multifd: bool, tsc_khz: u64) -> Result<Figures> {
    let directory = tempfile::tempdir()?;
    let errors = ["a.err", "b.err"].map(|name| directory.path().join(name));
    run_in(&directory, case, multifd, tsc_khz).with_context(|| said(&errors))
}

fn run_in(directory: &TempDir, case: Case, multifd: bool, tsc_khz: u64) -> Result<Figures> {
    let path = |name: &str| directory.path().join(name);
    let (log, arrived) = (Log(path("source")), Log(path("destination")));
    let start = |qmp: &str| machine(directory.path(), case.workload(), tsc_khz, &path(qmp));
    let mut destination = Process::start(
        "the receiving QEMU",
        start("b.qmp")?
            .args(["-incoming", "defer", "-serial", "stdio"])
            .stdin(typed())
            .stdout(File::create(&arrived.0)?)
            .stderr(File::create(path("b.err"))?),
    )?;
    let source = Process::start(
        "the sending QEMU",
        start("a.qmp")?
            .arg("-serial")
            .arg(format!("file:{}", log.0.display()))
            .stdin(Stdio::null())
            .stderr(File::create(path("a.err"))?),
    )?;
    let mut to_source = Qmp::connect(&path("a.qmp"))?;
    let mut to_destination = Qmp::connect(&path("b.qmp"))?;
    for qmp in [&mut to_source, &mut to_destination] {
        configure(qmp, multifd)?;
    }
    let uri = listen(&mut to_destination)?;
    log.wait("ready", BOOT, |line| {
        matches!(line, Line::Ready { .. }).then_some(())
    })?;
    sleep(SETTLE);
    let printed = log.text().len();
    let moved = watched(&source, &destination, || {
        to_source.command("migrate", &json!({ "uri": uri }))?;
        let report = completed(&mut to_source)?;
        // Its end is part of what a migration costs, as it is for ferry, whose source ends by itself.
        to_source.command("quit", &json!({}))?;
        source.end(Duration::from_secs(30))?;
        runs(&arrived, 1)?;
        Ok(report)
    })?;
    let report = moved.result;
    let verified = finish(&mut destination, &arrived)?;
    let seen = seen(&log.0, printed, &arrived.text())?;
    let number = |value: Option<&Value>, name: &str| {
        value
            .and_then(Value::as_f64)
            .with_context(|| format!("QEMU's report has no {name}: {report}"))
    };
    let transferred = report.pointer("/ram/transferred").and_then(Value::as_u64);
    Ok(Figures {
        total_ms: number(report.get("total-time"), "total-time")?,
        gap_ms: seen.gap_ms,
        after_ms: seen.after_ms,
        noise_ms: seen.noise_ms,
        downtime_ms: number(report.get("downtime"), "downtime")?,
        wire_bytes: transferred.context("QEMU's report has no ram.transferred")?,
        lo_bytes: moved.lo_bytes,
        source: moved.source,
        destination: moved.destination,
        verified,
        report,
    })
}

fn configure(qmp: &mut Qmp, multifd: bool) -> Result<()> {
    let downtime = u64::try_from(DOWNTIME.as_millis())?;
    let mut parameters = json!({ "downtime-limit": downtime, "max-bandwidth": BANDWIDTH });
    if multifd {
        let on = json!({ "capabilities": [{ "capability": "multifd", "state": true }] });
        qmp.command("migrate-set-capabilities", &on)?;
        parameters["multifd-channels"] = json!(CHANNELS);
    }
    qmp.command("migrate-set-parameters", &parameters)?;
    Ok(())
}

/// Has the destination listen. QEMU does not say which port it got, so one is found for it; another process may take it
/// in between, and then the next is tried.
fn listen(qmp: &mut Qmp) -> Result<String> {
    let mut last = None;
    for _ in 0..5 {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let uri = format!("tcp:127.0.0.1:{port}");
        match qmp.command("migrate-incoming", &json!({ "uri": uri })) {
            Ok(_) => return Ok(uri),
            Err(error) => last = Some(error),
        }
    }
    bail!("QEMU cannot listen: {last:?}")
}

/// Waits for the end. A question every 10 ms: fewer would not disturb less, and more would.
fn completed(qmp: &mut Qmp) -> Result<Value> {
    let began = Instant::now();
    loop {
        let report = qmp.command("query-migrate", &json!({}))?;
        match report.get("status").and_then(Value::as_str) {
            Some("completed") => return Ok(report),
            Some("failed" | "cancelled") => bail!("QEMU's migration failed: {report}"),
            _ if began.elapsed() > Duration::from_secs(120) => {
                bail!("QEMU's migration does not end: {report}")
            }
            _ => sleep(Duration::from_millis(10)),
        }
    }
}
