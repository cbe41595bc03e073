//! The figures of a run, and how they are taken.

use super::case::{Case, Contestant, MEMORY_MIB};
use super::process::{Process, Use, Watch, watch};
use anyhow::Result;
use serde::Serialize;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};

/// What a migration came to.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    /// From the request until the source may be discarded.
    pub total_ms: f64,
    /// The longest gap that the guest saw around the move.
    pub gap_ms: f64,
    /// The longest gap of the second after that: the source is torn down meanwhile.
    pub after_ms: f64,
    /// The gap of an ordinary second before.
    pub noise_ms: f64,
    /// The downtime that was reported.
    pub downtime_ms: f64,
    /// Bytes that were reported as sent.
    pub wire_bytes: u64,
    /// Bytes that the loopback interface carried meanwhile.
    pub lo_bytes: u64,
    /// The source's process.
    pub source: Use,
    /// The destination's process.
    pub destination: Use,
    /// Whether the guest found all of its memory intact at the destination.
    pub verified: bool,
    /// The VMM's own report.
    pub report: serde_json::Value,
}

impl Figures {
    /// How far the report is from what the guest saw.
    pub fn error_ms(&self) -> f64 {
        (self.downtime_ms - self.gap_ms).abs()
    }

    /// CPU-seconds of both sides for each GiB of guest memory.
    pub fn cpu_s_per_gib(&self) -> f64 {
        (self.source.cpu_s + self.destination.cpu_s) * 1024.0 / MEMORY_MIB as f64
    }
}

/// One run of one contestant.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    /// What the guest did.
    pub case: Case,
    /// Who moved it.
    pub contestant: Contestant,
    /// Which run.
    pub number: usize,
    /// The machine's load before it.
    pub load: String,
    /// What came of it.
    pub figures: Figures,
}

impl Run {
    /// For people who wait for the table.
    pub fn sentence(&self) -> String {
        let f = &self.figures;
        format!(
            "{} {} {:<15} total {:7.0} ms  gap {:6.1} (after {:5.1}, noise {:4.1})  reported {:6.1}  {}  load {}",
            self.case,
            self.number + 1,
            self.contestant,
            f.total_ms,
            f.gap_ms,
            f.after_ms,
            f.noise_ms,
            f.downtime_ms,
            if f.verified {
                "verified"
            } else {
                "NOT VERIFIED"
            },
            self.load
        )
    }
}

/// The machine's load averages.
pub fn load() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let three: Vec<&str> = text.split(' ').take(3).collect();
    three.join(" ")
}

/// Bytes that the loopback interface has carried.
fn loopback_bytes() -> u64 {
    fs::read_to_string("/sys/class/net/lo/statistics/tx_bytes")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(0)
}

/// What the machine saw while something was done.
pub struct Watched<T> {
    /// What was done.
    pub result: T,
    /// The source's process.
    pub source: Use,
    /// The destination's process.
    pub destination: Use,
    /// Bytes of the loopback interface.
    pub lo_bytes: u64,
}

/// Does something and watches both processes meanwhile.
pub fn watched<T>(
    source: &Process,
    destination: &Process,
    what: impl FnOnce() -> Result<T>,
) -> Result<Watched<T>> {
    let guest_kib = MEMORY_MIB << 10;
    let mut watches = [source, destination].map(|process| Watch::new(process, guest_kib));
    let stop = AtomicBool::new(false);
    let before = loopback_bytes();
    let result = std::thread::scope(|scope| {
        scope.spawn(|| watch(&mut watches, &stop));
        let result = what();
        stop.store(true, Ordering::Relaxed);
        result
    })?;
    let lo_bytes = loopback_bytes().saturating_sub(before);
    let [source, destination] = watches.map(Watch::finish);
    Ok(Watched {
        result,
        source,
        destination,
        lo_bytes,
    })
}
