//! ferry itself, as the benchmark runs it: two processes of this program.

use super::cell::Cell;
use super::interrupt;
use super::listener::BEAT_MS;
use super::log::STAT_MS;
use super::measure::Told;
use super::net::Net;
use super::pair::{Files, Machine, Pair};
use super::process::Process;
use ferry_migration::options::Options;
use ferry_migration::report::{Event, Report, Status};
use ferry_terminal::output::Failure;
use ferry_vmm::api::client::Client;
use ferry_vmm::api::types::{MigrateRequest, TlsFiles};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// `ferry run` and `ferry receive`.
pub struct Ferry {
    processes: [Process; 2],
    client: Client,
    request: MigrateRequest,
}

/// Starts a small guest that tells the rate of its clock.
pub fn clock(ferry: &Path, files: &Files) -> Result<Process, Failure> {
    Process::start(
        "ferry run",
        Command::new(ferry)
            .args(["run", "--nas", "idle:fill=none", "--memory", "32M", "--api"])
            .arg(files.path("a.sock"))
            .arg("--serial")
            .arg(format!("file:{}", files.source().0.display()))
            .stdin(Stdio::null())
            .stderr(File::create(files.path("a.err"))?),
    )
}

/// The name in the certificates: both ends are this machine.
const HOST: &str = "laboratory";

/// Makes an authority and certificates of it, with ferry's own command; returns their folder.
fn certificates(ferry: &Path, files: &Files) -> Result<PathBuf, Failure> {
    let authority = files.path("pki");
    for (command, name) in [("init", None), ("host", Some(HOST))] {
        let made = Command::new(ferry)
            .args(["pki", command])
            .arg(&authority)
            .args(name)
            .output()?;
        if !made.status.success() {
            let why = String::from_utf8_lossy(&made.stderr);
            return Err(Failure(format!("no certificates were made: {why}")));
        }
    }
    Ok(authority.join(HOST))
}

/// Starts both, and the guest.
pub fn start(
    machine: &Machine,
    cell: &Cell,
    options: &Options,
    net: &Net,
    files: &Files,
) -> Result<Ferry, Failure> {
    let certificates = match cell.policy.tls {
        true => Some(certificates(&machine.ferry, files)?),
        false => None,
    };
    let mut receive = net.at_destination(&machine.ferry);
    receive
        .arg("receive")
        .arg(format!("tcp:{}:0", net.address()));
    match &certificates {
        Some(dir) => receive.arg("--tls").arg(dir),
        // Only the two ends of a laboratory's link reach it.
        None => receive.arg("--insecure"),
    };
    let destination = Process::start(
        "ferry receive",
        receive
            .args(["--serial", "stdio", "--api"])
            .arg(files.path("b.sock"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(files.path("b.err"))?),
    )?
    .recorded_in(&files.destination())?;
    let mut run = net.at_source(&machine.ferry);
    run.arg("run");
    if let Some(dir) = &certificates {
        run.arg("--allow").arg(dir);
    }
    let source = Process::start(
        "ferry run",
        run.args(["--nas", &cell.guest.work.to_string()])
            .args(["--repeat", "0", "--stat", &format!("{STAT_MS}ms")])
            .args(["--beat", &format!("{BEAT_MS}ms")])
            .args(["--memory", &format!("{}M", cell.guest.mib())])
            .args(["--cpus", &cell.guest.cpus.to_string(), "--api"])
            .arg(files.path("a.sock"))
            .args(["--serial", "stdio"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(files.path("a.err"))?),
    )?
    .recorded_in(&files.source())?;
    let receiver = Client::new(&files.path("b.sock"));
    let uri = interrupt::until(
        Duration::from_secs(30),
        || "ferry receive does not wait for a guest".to_owned(),
        || {
            destination.must_run()?;
            // Its socket is not there at once.
            Ok(receiver.status().ok().and_then(|status| status.listening))
        },
    )?;
    let mut options = options.clone();
    // A cap of the user's own stays, where it is lower.
    options.bandwidth = match (options.bandwidth, net.cap) {
        (Some(own), Some(cap)) => Some(own.min(cap)),
        (own, cap) => own.or(cap),
    };
    Ok(Ferry {
        processes: [source, destination],
        client: Client::new(&files.path("a.sock")),
        request: MigrateRequest {
            uri,
            options,
            tls: certificates.map(|dir| TlsFiles {
                dir,
                authz: Some(HOST.to_owned()),
            }),
            ..MigrateRequest::default()
        },
    })
}

impl Pair for Ferry {
    fn processes(&mut self) -> [&mut Process; 2] {
        let [source, destination] = &mut self.processes;
        [source, destination]
    }

    fn migrate(&mut self) -> Result<Told, Failure> {
        let began = Instant::now();
        let mut dirtied = Dirtied::default();
        let report = self.client.migrate(&self.request, &mut |event| {
            if let Event::Round(round) = event
                && !round.follows
            {
                dirtied.round(began.elapsed().as_secs_f64() * 1e3, round.dirtied);
            }
        })?;
        if report.status != Status::Completed {
            let why = report.error.as_deref().unwrap_or("no reason given");
            return Err(Failure(format!("the migration did not complete: {why}")));
        }
        told(report, dirtied.rates)
    }
}

/// The guest's dirty rate over time, from the rounds. Very short rounds are merged: too few pages
/// in too little time make no rate.
#[derive(Debug, Default)]
struct Dirtied {
    /// Milliseconds since the request, and the pages per second until then.
    rates: Vec<(f64, f64)>,
    since: f64,
    pages: u64,
}

impl Dirtied {
    /// The shortest time that a rate is told of, in milliseconds.
    const MOMENT: f64 = 50.0;
    /// The most rates that are kept.
    const MOST: usize = 5000;

    /// A round ended at that time, and found so many pages.
    fn round(&mut self, now: f64, pages: u64) {
        self.pages += pages;
        let span = now - self.since;
        if span < Self::MOMENT || self.rates.len() >= Self::MOST {
            return;
        }
        let rate = self.pages as f64 / span * 1e3;
        if self.rates.is_empty() {
            // A curve from the beginning.
            self.rates.push((0.0, rate));
        }
        self.rates.push((now, rate));
        (self.since, self.pages) = (now, 0);
    }
}

fn told(report: Report, dirtied: Vec<(f64, f64)>) -> Result<Told, Failure> {
    let post_copy = report.faults.count > 0 || report.rounds.iter().any(|round| round.follows);
    Ok(Told {
        total_ms: report.total_ms,
        downtime_ms: Some(report.downtime_ms),
        odd: None,
        wire_bytes: Some(report.bytes_wire),
        pages_sent: Some(report.pages.sent),
        pages_resent: Some(report.pages.resent),
        // QEMU counts both as one.
        pages_zero: Some(report.pages.zero + report.pages.skipped),
        faults: post_copy.then(|| report.faults.clone()),
        dirtied,
        report: serde_json::to_value(report)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_told_of_more_than_a_moment() {
        let mut dirtied = Dirtied::default();
        dirtied.round(400.0, 800);
        // Three pages in a tenth of a millisecond are no thirty thousand a second.
        dirtied.round(400.1, 3);
        dirtied.round(500.0, 97);
        assert_eq!(
            dirtied.rates,
            [(0.0, 2000.0), (400.0, 2000.0), (500.0, 1000.0)]
        );
    }
}
