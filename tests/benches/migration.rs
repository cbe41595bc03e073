//! Migrations on this machine, ferry's beside QEMU's: `cargo bench -p ferry-tests --bench migration`.
//!
//! Every run boots the same guest (1 GiB, incompressible) in fresh processes, moves it over loopback TCP and asks it to
//! verify all of its memory. The contestants take turns, in an order that rotates, so that whatever else the machine
//! does hits all alike. The table has median and maximum of every figure; a JSON file beside the build has every run.
//!
//! What is measured, and how, alike for all:
//! - *total*: from the request until the source may be discarded, by the VMM's own clock.
//! - *gap*: the longest time that the guest did not run, by the guest's own clock, in the second or two around the move.
//! - *after*: the same in the second after that, while the source is torn down.
//! - *noise*: the same in ordinary seconds before the move. A gap below it says nothing.
//! - *down*: the downtime that the VMM reports.
//! - *wire*: what the VMM says it sent; *lo* is the loopback interface's own counter, other people's traffic included.
//! - *CPU*: seconds of both processes without their vCPU threads (this guest spins all the time), the teardown included.
//! - *RSS*: the most that a process held beyond the guest's memory. ferry's guest lies in a memfd, so that its own is what
//!   the kernel counts as anonymous and file memory; QEMU's guest is anonymous memory, all of it taken for resident,
//!   which flatters QEMU by the few MiB that its guest never touches.
#![forbid(unsafe_code)]
#![allow(missing_docs)]

#[path = "shared/binary.rs"]
mod binary;
mod migration {
    pub mod args;
    pub mod case;
    pub mod ferry;
    pub mod log;
    pub mod measure;
    pub mod process;
    pub mod qemu;
    pub mod qmp;
    pub mod table;
}

use anyhow::{Context, Result};
use clap::Parser;
use migration::args::Args;
use migration::case::Contestant;
use migration::measure::{Run, load};
use migration::{ferry, qemu, table};
use serde_json::json;

fn main() -> Result<()> {
    let args = Args::parse();
    let Some(built) = binary::built("migrations", args.bench)? else {
        return Ok(());
    };
    let binary = &built.ferry;
    let contestants = contestants(&args);
    let tsc_khz = ferry::tsc_khz(binary).context("asking a guest for the clock's rate")?;
    println!(
        "{} runs of {} on {} processors, clock {tsc_khz} kHz, load {}",
        args.runs,
        names(&contestants),
        std::thread::available_parallelism()?,
        load()
    );
    let mut runs: Vec<Run> = Vec::new();
    for case in args.cases() {
        for number in 0..args.runs {
            let shift = number % contestants.len().max(1);
            for contestant in contestants[shift..].iter().chain(&contestants[..shift]) {
                let before = load();
                let result = match contestant {
                    Contestant::Ferry => ferry::run(binary, case),
                    Contestant::Qemu { multifd } => qemu::run(case, *multifd, tsc_khz),
                };
                match result {
                    Ok(figures) => {
                        let run = Run {
                            case,
                            contestant: *contestant,
                            number,
                            load: before,
                            figures,
                        };
                        println!("{}", run.sentence());
                        runs.push(run);
                    }
                    // One that failed is told and left out; the table says how many there were.
                    Err(error) => eprintln!("FAILED: {case} {contestant} run {number}: {error:#}"),
                }
            }
        }
    }
    table::print(&runs);
    let report = json!({ "schema": 1, "tsc_khz": tsc_khz, "runs": runs });
    built.write(args.output, "migration-bench.json", &report)
}

fn contestants(args: &Args) -> Vec<Contestant> {
    let mut list = Vec::new();
    if !args.peer_only {
        list.push(Contestant::Ferry);
    }
    if !args.ferry_only {
        if qemu::installed() {
            list.extend([false, true].map(|multifd| Contestant::Qemu { multifd }));
        } else {
            eprintln!("NOT RUN: the comparison: {} is not installed", qemu::QEMU);
        }
    }
    list
}

fn names(contestants: &[Contestant]) -> String {
    let names: Vec<String> = contestants.iter().map(ToString::to_string).collect();
    names.join(", ")
}
