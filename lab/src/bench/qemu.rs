//! The same bare guest under Debian's QEMU, moved by its machine protocol.

use super::cell::{Cell, Qemu, QemuMode};
use super::interrupt;
use super::measure::Told;
use super::net::Net;
use super::pair::{Files, Machine, Pair, free_port, guest_command_line};
use super::process::{Process, version_of};
use super::qmp::Qmp;
use ferry_migration::report::Faults;
use ferry_terminal::output::Failure;
use serde_json::{Value, json};
use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The program, where none is named.
pub const PROGRAM: &str = "qemu-system-x86_64";
/// Far beyond what any link here carries. QEMU's default would be 128 MiB/s.
const BANDWIDTH: u64 = 1 << 40;

/// Why its runs cannot be made, if so.
pub fn missing(program: &Path) -> Option<String> {
    version_of(program).is_none().then(|| {
        let program = program.display();
        format!("{program} is not installed; give --qemu PATH")
    })
}

/// The two QEMUs.
pub struct Pairing {
    processes: [Process; 2],
    source: Qmp,
    destination: Qmp,
    uri: String,
    how: Qemu,
    pages: u64,
}

/// The machine, alike on both sides.
fn machine(
    mut command: Command,
    cell: &Cell,
    tsc_khz: u64,
    files: &Files,
    qmp: &Path,
) -> Result<Command, Failure> {
    let command_line = guest_command_line(cell, tsc_khz);
    let image = files.image()?;
    command
        // Without arch-capabilities: software KVM offers the MSR and then refuses to set it.
        .args([
            "-M",
            "microvm,acpi=off",
            "-enable-kvm",
            "-cpu",
            "host,arch-capabilities=off",
        ])
        .args(["-m", &format!("{}M", cell.guest.mib())])
        .args(["-smp", &cell.guest.cpus.to_string()])
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

/// Starts both, and the guest.
pub fn start(
    of: &Machine,
    cell: &Cell,
    how: &Qemu,
    net: &Net,
    files: &Files,
) -> Result<Pairing, Failure> {
    let side = |command, qmp: &str| machine(command, cell, of.tsc_khz, files, &files.path(qmp));
    let destination = Process::start(
        "the receiving QEMU",
        side(net.at_destination(&of.qemu), "b.qmp")?
            .args(["-incoming", "defer", "-serial", "stdio"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(files.path("b.err"))?),
    )?
    .recorded_in(&files.destination())?;
    let source = Process::start(
        "the sending QEMU",
        side(net.at_source(&of.qemu), "a.qmp")?
            .args(["-serial", "stdio"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(files.path("a.err"))?),
    )?
    .recorded_in(&files.source())?;
    let mut pair = Pairing {
        processes: [source, destination],
        source: Qmp::connect(&files.path("a.qmp"))?,
        destination: Qmp::connect(&files.path("b.qmp"))?,
        uri: String::new(),
        how: how.clone(),
        pages: cell.guest.memory / 4096,
    };
    configure(&mut pair.source, how, net.cap, false)?;
    configure(&mut pair.destination, how, net.cap, true)?;
    pair.uri = listen(&mut pair.destination, net.address())?;
    Ok(pair)
}

/// Sets capabilities and parameters of one side.
fn configure(qmp: &mut Qmp, how: &Qemu, cap: Option<u64>, receives: bool) -> Result<(), Failure> {
    let mut wanted: Vec<&str> = how.mode.capability().into_iter().collect();
    if how.mode == QemuMode::Postcopy && receives {
        wanted.push("postcopy-blocktime");
    }
    let on: Vec<Value> = wanted
        .iter()
        .map(|name| json!({ "capability": name, "state": true }))
        .collect();
    if !on.is_empty() {
        qmp.command("migrate-set-capabilities", &json!({ "capabilities": on }))?;
    }
    let mut parameters = json!({
        "downtime-limit": how.downtime_ms,
        "max-bandwidth": cap.unwrap_or(BANDWIDTH),
    });
    match how.mode {
        QemuMode::Multifd => parameters["multifd-channels"] = json!(how.channels),
        QemuMode::Xbzrle => parameters["xbzrle-cache-size"] = json!(how.cache),
        QemuMode::Postcopy => parameters["max-postcopy-bandwidth"] = json!(cap.unwrap_or(0)),
        QemuMode::Precopy | QemuMode::AutoConverge => {}
    }
    qmp.command("migrate-set-parameters", &parameters)?;
    Ok(())
}

/// Makes the destination listen. QEMU does not tell its port, so a free one is chosen; if another
/// process takes it first, the next is tried.
fn listen(qmp: &mut Qmp, address: &str) -> Result<String, Failure> {
    let mut last = Failure("no port is free".into());
    for _ in 0..5 {
        let port = free_port()?;
        let uri = format!("tcp:{address}:{port}");
        match qmp.command("migrate-incoming", &json!({ "uri": uri })) {
            Ok(_) => return Ok(uri),
            Err(error) => last = error,
        }
    }
    Err(last)
}

impl Pair for Pairing {
    fn processes(&mut self) -> [&mut Process; 2] {
        let [source, destination] = &mut self.processes;
        [source, destination]
    }

    fn migrate(&mut self) -> Result<Told, Failure> {
        let began = Instant::now();
        self.source
            .command("migrate", &json!({ "uri": self.uri }))?;
        if self.how.mode == QemuMode::Postcopy {
            self.source.command("migrate-start-postcopy", &json!({}))?;
        }
        let mut dirtied: Vec<(f64, f64)> = Vec::new();
        let mut timeout = self.how.stop_after_ms.map(Duration::from_millis);
        let mut stopped = false;
        // A question every 10 ms: fewer would not disturb less, and more would.
        let report = loop {
            let report = self.source.command("query-migrate", &json!({}))?;
            match report.get("status").and_then(Value::as_str) {
                Some("completed") => break report,
                Some("failed" | "cancelled") => {
                    let why = report.get("error-desc").and_then(Value::as_str);
                    let why = why.unwrap_or("no reason given");
                    return Err(Failure(format!("QEMU's migration failed: {why}")));
                }
                _ => {}
            }
            if timeout.is_some_and(|timeout| began.elapsed() > timeout) {
                timeout = None;
                stopped = true;
                self.source.command("stop", &json!({}))?;
            }
            if let Some(rate) = report
                .pointer("/ram/dirty-pages-rate")
                .and_then(Value::as_f64)
                && dirtied.last().map_or(rate > 0.0, |last| last.1 != rate)
            {
                dirtied.push((began.elapsed().as_secs_f64() * 1e3, rate));
            }
            interrupt::pause(Duration::from_millis(10))?;
        };
        if stopped {
            self.wake()?;
        }
        let arrived = match self.how.mode {
            QemuMode::Postcopy => Some(self.waited()?),
            _ => None,
        };
        // Its end is part of what a migration costs, as it is for ferry, whose source ends by
        // itself.
        self.source.command("quit", &json!({}))?;
        told(report, arrived, self.pages, dirtied)
    }
}

impl Pairing {
    /// Resumes a guest that moved while it was paused. QEMU would forget a `cont` that comes while
    /// the guest arrives.
    fn wake(&mut self) -> Result<(), Failure> {
        let qmp = &mut self.destination;
        interrupt::until(
            Duration::from_secs(60),
            || "the receiving QEMU does not say that its guest has arrived".to_owned(),
            || {
                let state = qmp.command("query-status", &json!({}))?;
                let arrived = state.get("status").and_then(Value::as_str) != Some("inmigrate");
                Ok(arrived.then_some(()))
            },
        )?;
        qmp.command("cont", &json!({})).map(drop)
    }

    /// What the destination says of post-copy, once all has arrived.
    fn waited(&mut self) -> Result<Value, Failure> {
        let qmp = &mut self.destination;
        interrupt::until(
            Duration::from_secs(60),
            || "the receiving QEMU does not tell how long its processors waited".to_owned(),
            || {
                let report = qmp.command("query-migrate", &json!({}))?;
                let over = report.get("status").and_then(Value::as_str) == Some("completed");
                Ok(over.then_some(report))
            },
        )
    }
}

/// QEMU's words in ours (`query-migrate` in its qapi/migration.json).
fn told(
    report: Value,
    arrived: Option<Value>,
    pages: u64,
    dirtied: Vec<(f64, f64)>,
) -> Result<Told, Failure> {
    let missing = |name: &str| Failure(format!("QEMU's report has no {name}: {report}"));
    let number = |name: &str| {
        report
            .pointer(name)
            .and_then(Value::as_f64)
            .ok_or_else(|| missing(name))
    };
    let count = |name: &str| {
        report
            .pointer(name)
            .and_then(Value::as_u64)
            .ok_or_else(|| missing(name))
    };
    // Deltas of pages that were sent before are not among the "normal" ones.
    let deltas = report
        .pointer("/xbzrle-cache/pages")
        .and_then(Value::as_u64)
        .unwrap_or(0);
    let sent = count("/ram/normal")? + deltas;
    let zero = count("/ram/duplicate")?;
    let faults = match &arrived {
        None => None,
        Some(arrived) => {
            let stalled: f64 = arrived
                .get("postcopy-vcpu-blocktime")
                .and_then(Value::as_array)
                .ok_or_else(|| missing("postcopy-vcpu-blocktime at the destination"))?
                .iter()
                .filter_map(Value::as_f64)
                .sum();
            Some(Faults {
                count: count("/ram/postcopy-requests")?,
                stalled_ms: stalled,
                ..Faults::default()
            })
        }
    };
    let (total_ms, downtime) = (number("/total-time")?, number("/downtime")?);
    // QEMU 7.2 takes a downtime that rounds to zero for unmeasured, and counts from the host's
    // boot.
    let possible = downtime <= total_ms;
    Ok(Told {
        total_ms,
        downtime_ms: possible.then_some(downtime),
        odd: (!possible).then(|| format!("{downtime:.0} ms of a total of {total_ms:.0} ms")),
        wire_bytes: Some(count("/ram/transferred")?),
        pages_sent: Some(sent),
        pages_resent: Some((sent + zero).saturating_sub(pages)),
        pages_zero: Some(zero),
        faults,
        dirtied,
        report: json!({ "source": report, "destination": arrived }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_words_are_understood() {
        let report = json!({
            "status": "completed", "total-time": 1140, "downtime": 4,
            "ram": { "transferred": 4096000u64, "normal": 900, "duplicate": 200, "postcopy-requests": 7 },
        });
        let arrived = json!({ "status": "completed", "postcopy-vcpu-blocktime": [179, 1] });
        let told = told(report, Some(arrived), 1000, Vec::new()).unwrap();
        assert_eq!((told.total_ms, told.downtime_ms), (1140.0, Some(4.0)));
        assert_eq!(
            (told.pages_sent, told.pages_zero, told.pages_resent),
            (Some(900), Some(200), Some(100))
        );
        let faults = told.faults.unwrap();
        assert_eq!((faults.count, faults.stalled_ms), (7, 180.0));
    }

    #[test]
    fn a_downtime_since_the_boot_of_the_host_is_not_believed() {
        let report = json!({
            "total-time": 340, "downtime": 15_781_200,
            "ram": { "transferred": 1, "normal": 1, "duplicate": 0 },
        });
        let told = told(report, None, 1, Vec::new()).unwrap();
        assert_eq!(told.downtime_ms, None);
        assert!(told.odd.unwrap().contains("15781200 ms"));
    }

    #[test]
    fn a_report_without_a_figure_is_no_zero() {
        let error = told(json!({ "total-time": 1 }), None, 1, Vec::new())
            .unwrap_err()
            .0;
        assert!(error.contains("no /ram/normal"), "{error}");
    }
}
