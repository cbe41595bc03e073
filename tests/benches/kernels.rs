//! What the virtual machine costs a kernel's speed: `cargo bench -p ferry-tests --bench kernels`.
//!
//! The same kernel runs on the host itself (`ferry nas`) and in a bare guest (`ferry run --nas`) by
//! turns, each in a process of its own, and who is first changes with every pair, so that whatever
//! else the machine does hits both alike. A pair gives a ratio, guest to host; the table has the
//! median of the ratios and of both speeds, and the ratio of the best speeds beside them: work of
//! others on the machine only ever takes speed away. The median is asked to reach the goal.
#![forbid(unsafe_code)]
#![allow(missing_docs)]

#[path = "shared/binary.rs"]
mod binary;
#[path = "shared/median.rs"]
mod median;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use ferry_guest_images::{Line, Workload};
use median::median;
use serde::Serialize;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The least share of the host's speed that a guest is to reach.
const GOAL: f64 = 0.95;

/// Measures kernels in a guest beside the host.
#[derive(Debug, Parser)]
struct Args {
    /// KERNEL.CLASS, more than one where commas divide them.
    #[arg(long, value_delimiter = ',', default_values = ["ep.A", "is.A", "mg.A"])]
    kernels: Vec<String>,
    /// Pairs of runs of each.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    pairs: u32,
    /// Processors of the guest, and threads on the host.
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// Where the JSON goes; by default into the build directory.
    #[arg(long, value_name = "PATH")]
    output: Option<PathBuf>,
    /// What `cargo bench` adds, and `cargo test` does not.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Speeds in Mop/s.
#[derive(Clone, Copy, Debug, Serialize)]
struct Pair {
    host: f64,
    guest: f64,
}

#[derive(Debug, Serialize)]
struct Measured {
    kernel: String,
    cpus: u32,
    pairs: Vec<Pair>,
    ratio_median: f64,
    ratio_of_best: f64,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let Some(built) = binary::built("kernels", args.bench)? else {
        return Ok(());
    };
    println!(
        "{} pairs of runs on {} of {} processors",
        args.pairs,
        args.cpus,
        std::thread::available_parallelism()?
    );
    println!(
        "kernel    host Mop/s   guest Mop/s   guest/host: median (least to most), of the best"
    );
    let mut all = Vec::new();
    for kernel in &args.kernels {
        let measured = measure(&built.ferry, kernel, &args)?;
        println!("{}", measured.sentence());
        all.push(measured);
    }
    let report = json!({ "schema": 1, "goal": GOAL, "kernels": all });
    built.write(args.output, "kernels-bench.json", &report)
}

fn measure(ferry: &Path, kernel: &str, args: &Args) -> Result<Measured> {
    let workload = Workload::parse(kernel)?;
    let mut pairs = Vec::new();
    for number in 0..args.pairs {
        let (host, guest);
        if number % 2 == 0 {
            host = on_host(ferry, &workload, args.cpus)?;
            guest = in_guest(ferry, &workload, args.cpus)?;
        } else {
            guest = in_guest(ferry, &workload, args.cpus)?;
            host = on_host(ferry, &workload, args.cpus)?;
        }
        pairs.push(Pair { host, guest });
    }
    let best = |speed: fn(&Pair) -> f64| pairs.iter().map(speed).fold(0.0, f64::max);
    let ratios = pairs.iter().map(|pair| pair.guest / pair.host).collect();
    Ok(Measured {
        kernel: kernel.to_owned(),
        cpus: args.cpus,
        ratio_median: median(ratios),
        ratio_of_best: best(|pair| pair.guest) / best(|pair| pair.host),
        pairs,
    })
}

impl Measured {
    fn sentence(&self) -> String {
        let column = |speed: fn(&Pair) -> f64| median(self.pairs.iter().map(speed).collect());
        let ratios = || self.pairs.iter().map(|pair| pair.guest / pair.host);
        format!(
            "{:6} {:13.1} {:13.1}   {:.3} ({:.3} to {:.3}), {:.3}{}",
            self.kernel,
            column(|pair| pair.host),
            column(|pair| pair.guest),
            self.ratio_median,
            ratios().fold(f64::INFINITY, f64::min),
            ratios().fold(0.0, f64::max),
            self.ratio_of_best,
            if self.ratio_median < GOAL {
                "   MISSES THE GOAL"
            } else {
                ""
            }
        )
    }
}

fn on_host(ferry: &Path, workload: &Workload, cpus: u32) -> Result<f64> {
    let mut command = Command::new(ferry);
    command.args(["nas", &workload.to_string(), "--json", "--threads"]);
    let text = output(command.arg(cpus.to_string()))?;
    let report: serde_json::Value = serde_json::from_str(&text)?;
    ensure!(report["verified"] == true, "not verified: {report}");
    report["mops"].as_f64().context("no speed in the report")
}

fn in_guest(ferry: &Path, workload: &Workload, cpus: u32) -> Result<f64> {
    let directory = tempfile::tempdir()?;
    let mut command = Command::new(ferry);
    command
        .args(["run", "--serial", "stdio", "--nas", &workload.to_string()])
        .args(["--cpus", &cpus.to_string(), "--api"])
        .arg(directory.path().join("api"));
    let text = output(&mut command)?;
    for line in text.lines() {
        if let Some(Line::Result(result)) = Line::parse(line) {
            ensure!(result.verified, "not verified: {line}");
            return Ok(result.mops);
        }
    }
    bail!("the guest printed no result: {text}")
}

/// Runs a command to its end; what it printed.
fn output(command: &mut Command) -> Result<String> {
    let out = command.stdin(Stdio::null()).output()?;
    let said = String::from_utf8_lossy(&out.stderr);
    ensure!(out.status.success(), "{command:?} failed: {said}");
    Ok(String::from_utf8(out.stdout)?)
}
