//! The dirty log beside the dirty rings: `cargo bench -p ferry-tests --bench dirty`.
//!
//! First alone: what turning tracking on, looking, and clearing cost the thread that does it
//! (processor time), and what being watched costs the guest (its writes a second beside those of
//! the same guest without tracking). Then in pre-copy over a capped link: how many pages go out
//! again. Log and rings take turns, so that whatever else the machine does hits both alike; every
//! figure is a median.
//!
//! How `--dirty auto` chooses follows from this: see `ferry_vmm::kvm::DirtyLog`.
#![forbid(unsafe_code)]
#![allow(missing_docs)]

#[path = "shared/guest.rs"]
mod guest;
#[path = "shared/measure.rs"]
mod measure;
#[path = "shared/median.rs"]
mod median;

use anyhow::{Result, bail, ensure};
use clap::Parser;
use ferry_migration::options::{Compress, OnTimeout, Options, Tracking};
use ferry_migration::page::PageSet;
use ferry_migration::report::{Report, Status};
use ferry_tests::benchmark_host;
use ferry_vmm::machine::Machine;
use ferry_vmm::migrate::{Arrival, Handle, Receiver, Uri, migrate};
use guest::{Guest, rate};
use measure::{Cost, timed};
use median::median;
use std::sync::Arc;
use std::time::Duration;

/// Pages of a batch, as a migration clears them.
const BATCH_WORDS: usize = 256 / 64;

#[derive(Debug, Parser)]
struct Args {
    /// Times that log and rings take turns.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    turns: u32,
    /// Looks at the dirty pages in each turn.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    looks: u32,
    /// What `cargo bench` adds, and `cargo test` does not.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let Some(host) = benchmark_host("dirty tracking", args.bench) else {
        return Ok(());
    };
    if !host.has_dirty_rings() {
        eprintln!("NOT RUN: benchmark of dirty tracking: this host's KVM has no dirty rings");
        return Ok(());
    }
    for (what, work, memory) in [
        (
            "much is written: 256 MiB, as fast as it can",
            "dirty:wss=192M,rate=0",
            256 << 20,
        ),
        (
            "little is written: 1 GiB, 2,000 pages a second",
            "dirty:wss=16M,rate=2000",
            1 << 30,
        ),
    ] {
        println!("{what}");
        println!(
            "        on, ms   look, ms   pages in a look   clear, µs/page   rings full   guest's speed while watched"
        );
        alone(work, memory, &args)?;
    }
    println!("pre-copy at 1 Gbit/s of 256 MiB: 8,000 pages a second in 64 MiB");
    println!("       total, s    pages sent   of them again   rounds   downtime, ms");
    moved("dirty:wss=64M,rate=8000", 256 << 20, &args)
}

const BOTH: [Tracking; 2] = [Tracking::Log, Tracking::Ring];

/// Figures of one turn.
#[derive(Default)]
struct Turn {
    on: f64,
    look: f64,
    pages: f64,
    clear: f64,
    full: f64,
    speed: f64,
}

fn alone(work: &str, memory: u64, args: &Args) -> Result<()> {
    let guests: Vec<Guest> = BOTH
        .into_iter()
        .map(|tracking| {
            let guest = Guest::run(work, memory, tracking)?;
            // It shall have the processor to itself when it is its turn.
            guest.machine.pause()?.keep_paused();
            Ok(guest)
        })
        .collect::<Result<_>>()?;
    let mut turns: [Vec<Turn>; 2] = Default::default();
    for _ in 0..args.turns {
        for (guest, turns) in guests.iter().zip(&mut turns) {
            guest.machine.resume()?;
            turns.push(turn(guest, args.looks)?);
            guest.machine.pause()?.keep_paused();
        }
    }
    for (tracking, turns) in BOTH.iter().zip(&turns) {
        let of = |figure: fn(&Turn) -> f64| median(turns.iter().map(figure).collect());
        println!(
            "  {:4} {:8.2} {:10.3} {:17.0} {:16.3} {:12.0} {:20.3}",
            tracking.name(),
            of(|t| t.on) * 1e3,
            of(|t| t.look) * 1e3,
            of(|t| t.pages),
            of(|t| t.clear) * 1e6,
            of(|t| t.full),
            of(|t| t.speed),
        );
    }
    Ok(())
}

fn turn(guest: &Guest, looks: u32) -> Result<Turn> {
    const WINDOW: Duration = Duration::from_millis(100);
    let machine = &guest.machine;
    let log = machine.dirty_log();
    let window = WINDOW * looks;
    let before = guest.progress()?;
    std::thread::sleep(window);
    let undisturbed = rate(before, guest.progress()?)?;
    let full = log.full_rings();
    let (started, on) = timed(|| log.start());
    started?;
    let mut pages = PageSet::new(
        machine
            .ram()
            .regions()
            .iter()
            .map(|r| r.end_gfn())
            .max()
            .unwrap_or(0),
    );
    // The first look finds all there is, whichever it is.
    take(machine, &mut pages)?;
    let began = guest.progress()?;
    let mut costs = (Cost::default(), Cost::default(), 0);
    for _ in 0..looks {
        std::thread::sleep(WINDOW);
        let (look, clear) = take(machine, &mut pages)?;
        costs.0 += look;
        costs.1 += clear;
        costs.2 += pages.len();
    }
    let watched = rate(began, guest.progress()?)?;
    log.stop()?;
    ensure!(costs.2 > 0, "the guest wrote nothing");
    Ok(Turn {
        on: on.cpu,
        look: costs.0.cpu / f64::from(looks),
        pages: costs.2 as f64 / f64::from(looks),
        clear: costs.1.cpu / costs.2 as f64,
        full: (log.full_rings() - full) as f64,
        speed: watched / undisturbed,
    })
}

/// Collects what is dirty and clears it, batch by batch.
fn take(machine: &Machine, pages: &mut PageSet) -> Result<(Cost, Cost)> {
    let log = machine.dirty_log();
    pages.clear();
    let (looked, look) = timed(|| log.collect(|first, words| pages.insert_words(first, words)));
    looked?;
    let (cleared, clear) = timed(|| {
        for region in machine.ram().regions() {
            let first = usize::try_from(region.first_gfn / 64).unwrap_or(usize::MAX);
            let words = pages.words().get(first..first + region.words());
            let batches = words.unwrap_or_default().chunks(BATCH_WORDS);
            for (at, words) in (region.first_gfn..).step_by(64 * BATCH_WORDS).zip(batches) {
                log.clear(at, words)?;
            }
        }
        Ok::<(), ferry_vmm::kvm::DirtyLogError>(())
    });
    cleared?;
    Ok((look, clear))
}

fn moved(work: &str, memory: u64, args: &Args) -> Result<()> {
    let mut reports: [Vec<Report>; 2] = Default::default();
    for _ in 0..args.turns {
        for (tracking, reports) in BOTH.iter().zip(&mut reports) {
            reports.push(move_one(work, memory, *tracking)?);
        }
    }
    for (tracking, reports) in BOTH.iter().zip(&reports) {
        let of = |figure: fn(&Report) -> f64| median(reports.iter().map(figure).collect());
        println!(
            "  {:4} {:8.2} {:13.0} {:15.0} {:8.0} {:14.2}",
            tracking.name(),
            of(|r| r.total_ms) / 1e3,
            of(|r| r.pages.sent as f64),
            of(|r| r.pages.resent as f64),
            of(|r| r.rounds.len() as f64),
            of(|r| r.downtime_ms),
        );
    }
    Ok(())
}

fn move_one(work: &str, memory: u64, tracking: Tracking) -> Result<Report> {
    let guest = Guest::run(work, memory, tracking)?;
    let console = Arc::new(|| Ok(Box::new(std::io::sink()) as _));
    let receiver = Receiver::bind(&"tcp:127.0.0.1:0".parse::<Uri>()?, console)?;
    let options = Options {
        bandwidth: Some(125_000_000),
        downtime: Duration::from_millis(50),
        timeout: Duration::from_secs(20),
        on_timeout: OnTimeout::Stop,
        compress: Compress::None,
        ..Options::default()
    };
    let report = migrate(
        &guest.machine,
        receiver.local_uri(),
        &options,
        &Handle::new(),
        &mut |_| {},
    );
    ensure!(report.status == Status::Completed, "{report:?}");
    match receiver.wait(Duration::from_secs(10)) {
        Some(Arrival::Arrived { machine, .. }) => machine.stop(),
        other => bail!("the guest did not arrive: {other:?}"),
    }
    Ok(report)
}
