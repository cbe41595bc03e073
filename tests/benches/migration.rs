//! A migration side by side with QEMU's: the same bare guest, the same machine, the same run.
//!
//!     cargo bench -p ferry-tests --bench migration -- [--runs N] [--case idle|writer] [--memory MIB] [--ferry-only]
//!
//! Each run is a pair of fresh processes on loopback; the order of the programs rotates. What is compared:
//! the total time, the longest gap that the guest itself saw around the move (by its TSC), what the program
//! said of its downtime, and bytes on the wire. Medians and maxima are printed, and JSON goes to
//! `target/bench-migration.json`. Figures of one machine on one day: compare the ratios.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

#[path = "migration/ferry.rs"]
mod ferry;
#[path = "migration/qemu.rs"]
mod qemu;

use ferry_guest_images::{Line, Workload};
use std::fs;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

/// What a run came to.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    total_ms: f64,
    gap_ms: f64,
    reported_ms: f64,
    wire_mb: f64,
    /// Memory beside the guest's RAM, before the migration; 0 where it was not looked at.
    own_kib: [u64; 2],
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Program {
    Ferry,
    Qemu,
    QemuMultifd,
}

impl Program {
    const fn name(self) -> &'static str {
        match self {
            Self::Ferry => "ferry, 1 channel",
            Self::Qemu => "QEMU precopy",
            Self::QemuMultifd => "QEMU multifd x4",
        }
    }
}

/// What every run is given.
pub struct Case {
    name: &'static str,
    workload: Workload,
    memory_mib: u64,
    downtime_ms: u64,
    tsc_khz: Option<u64>,
}

/// Ends its process.
pub struct Kill(pub Child);

impl Drop for Kill {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

const PATIENCE: Duration = Duration::from_secs(120);

/// Waits until `look` finds something.
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(began.elapsed() < PATIENCE, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Waits until the guest's steady state begins.
pub fn ready(console: &Path) {
    until("the guest to be ready", || {
        let text = fs::read_to_string(console).ok()?;
        text.lines()
            .any(|line| matches!(Line::parse(line), Some(Line::Ready { .. })))
            .then_some(())
    });
    // The guest has filled its memory; let it do its work for a while.
    std::thread::sleep(Duration::from_millis(1500));
}

/// The longest gap that the guest reports on the destination's console in the lines that cover the move:
/// the first two, since the move may fall between a measurement and its line.
pub fn gap_ms(console: &Path) -> f64 {
    until("the guest to report from the destination", || {
        let text = fs::read_to_string(console).ok()?;
        let gaps: Vec<u64> = text
            .lines()
            .filter_map(|line| match Line::parse(line) {
                Some(Line::Stat { gaps, .. }) => Some(gaps.last_us),
                Some(Line::Corrupt(_)) => panic!("the guest's memory is corrupt: {line}"),
                _ => None,
            })
            .collect();
        (gaps.len() >= 2).then(|| gaps[..2].iter().copied().max().unwrap_or(0) as f64 / 1e3)
    })
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn main() {
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| a != "--bench")
        .collect();
    let value = |name: &str| {
        arguments
            .iter()
            .position(|a| a == name)
            .and_then(|i| arguments.get(i + 1))
            .cloned()
    };
    let runs: usize = value("--runs").map_or(5, |n| n.parse().expect("--runs takes a number"));
    let memory_mib: u64 =
        value("--memory").map_or(1024, |n| n.parse().expect("--memory takes MiB"));
    let only = value("--case");
    if fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_err()
    {
        println!("NOT RUN: this benchmark needs /dev/kvm");
        return;
    }
    let ferry = ferry::build();
    let mut programs = vec![Program::Ferry];
    if !arguments.iter().any(|a| a == "--ferry-only") {
        if Command::new(qemu::QEMU).arg("--version").output().is_ok() {
            programs.extend([Program::Qemu, Program::QemuMultifd]);
        } else {
            println!(
                "NOT RUN: QEMU ({} is not installed); ferry alone is measured",
                qemu::QEMU
            );
        }
    }
    let tsc_khz = ferry_vmm::machine::Machine::builder()
        .memory(2 << 20)
        .build()
        .unwrap()
        .tsc_khz()
        .map(u64::from);
    let cases = [
        ("idle", "idle:fill=random", 10.0),
        ("writer", "dirty:wss=16M,rate=5000", 8.0),
    ];
    let mut json = Vec::new();
    for (name, work, gap_goal) in cases {
        if only.as_deref().is_some_and(|o| o != name) {
            continue;
        }
        let workload = Workload::parse(work).unwrap();
        let case = Case {
            name,
            workload,
            memory_mib,
            downtime_ms: 20,
            tsc_khz,
        };
        println!(
            "\n{name}: {work}, {memory_mib} MiB, downtime target {} ms, loopback, {runs} runs each",
            case.downtime_ms
        );
        let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); programs.len()];
        for run in 0..runs {
            for turn in 0..programs.len() {
                let which = (run + turn) % programs.len();
                let sample = match programs[which] {
                    Program::Ferry => ferry::run(&ferry, &case),
                    Program::Qemu => qemu::run(&case, None),
                    Program::QemuMultifd => qemu::run(&case, Some(4)),
                };
                samples[which].push(sample);
            }
        }
        println!(
            "{:<18} {:>10} {:>10} {:>9} {:>9} {:>12} {:>14} {:>10}",
            "median (max)", "total ms", "", "gap ms", "", "reported ms", "|said - gap|", "wire MB"
        );
        let mut medians = Vec::new();
        for (program, samples) in programs.iter().zip(&samples) {
            let column = |f: &dyn Fn(&Sample) -> f64| {
                let mut values: Vec<f64> = samples.iter().map(f).collect();
                let middle = median(&mut values);
                (middle, values.last().copied().unwrap_or(f64::NAN))
            };
            let (total, total_max) = column(&|s| s.total_ms);
            let (gap, gap_max) = column(&|s| s.gap_ms);
            let (reported, _) = column(&|s| s.reported_ms);
            let (off, _) = column(&|s| (s.reported_ms - s.gap_ms).abs());
            let (wire, _) = column(&|s| s.wire_mb);
            println!(
                "{:<18} {total:>10.0} {:>10} {gap:>9.2} {:>9} {reported:>12.2} {off:>14.2} {wire:>10.1}",
                program.name(),
                format!("({total_max:.0})"),
                format!("({gap_max:.2})"),
            );
            medians.push((total, gap, off));
            for s in samples {
                json.push(serde_json::json!({
                    "case": case.name, "program": program.name(), "total_ms": s.total_ms, "gap_ms": s.gap_ms,
                    "reported_ms": s.reported_ms, "wire_mb": s.wire_mb, "own_kib": s.own_kib,
                }));
            }
        }
        let (total, gap, off) = medians[0];
        for (program, (peer, ..)) in programs.iter().zip(&medians).skip(1) {
            println!(
                "ferry's total is {:.2} x {}'s",
                total / peer,
                program.name()
            );
        }
        let own = samples[0].iter().flat_map(|s| s.own_kib).max().unwrap_or(0) as f64 / 1024.0;
        for (what, got, goal) in [
            ("total ms", total, 1200.0),
            ("guest gap ms", gap, gap_goal),
            ("|reported - gap| ms", off, 3.0),
            ("MiB beside guest RAM, each", own, 40.0),
        ] {
            println!(
                "goal: {what} <= {goal}: {got:.2} {}",
                if got <= goal { "met" } else { "MISSED" }
            );
        }
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bench-migration.json");
    match fs::write(&path, serde_json::to_string_pretty(&json).unwrap()) {
        Ok(()) => println!("\nall samples: target/bench-migration.json"),
        Err(error) => println!(
            "\nthe samples could not be written to {}: {error}",
            path.display()
        ),
    }
}
