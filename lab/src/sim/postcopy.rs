//! `ferry sim paper postcopy`: post-copy with pre-paging (Hines and Gopalan 2009).

mod claims;
mod tables;

use super::guest::Choice;
use super::mplm::named_trace;
use super::plot::{self, Lines, Series};
use super::{Output, Paper, each};
use crate::record;
use ferry_migration::model::{Activity, Faults, Outcome, Pattern, Replay, Setup, Writer, migrate};
use ferry_migration::options::{OnTimeout, Options, PolicyKind};
use ferry_migration::order::PushOrder;
use ferry_migration::page::{PAGE_BYTES, RamLayout, Run};
use ferry_migration::trace::Trace;
use ferry_terminal::output::Failure;
use ferry_terminal::units::memory;
use serde_json::json;
use std::path::PathBuf;
use std::time::Duration;

/// Total time, downtime, pages transferred and page faults over the working set, post-copy against
/// pre-copy.
///
/// The slides' stress test: a guest of 1024 MB on Gigabit Ethernet that writes a working set in an
/// endless loop.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  ferry sim paper postcopy
  ferry sim paper postcopy --trace mg=mg.trace")]
pub struct Args {
    #[command(flatten)]
    output: Output,
    /// How the stress test walks its working set; the slides say \"infinite loop\".
    #[arg(long, value_enum, value_name = "HOW", default_value = "sequential")]
    writer: Choice,
    /// Pages that it writes per second when none is missing.
    #[arg(long, value_name = "PAGES", default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    rate: u32,
    /// A recorded guest, to be moved by each as well.
    #[arg(long, value_name = "NAME=PATH", value_parser = named_trace)]
    trace: Vec<(String, PathBuf)>,
    /// Model one page for N: N times faster and coarser.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=64))]
    scale: u64,
    /// Seed of the random numbers.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

impl Args {
    pub const fn json(&self) -> bool {
        self.output.json
    }
}

/// The slides' guest in bytes, its link in bytes per second and the working sets in MiB.
const MEMORY: u64 = 1 << 30;
const LINK: f64 = 125e6;
const SETS: [u64; 7] = [8, 16, 32, 64, 128, 256, 512];
/// Xen's limit of rounds, and a target at which it does not matter.
const ROUNDS: u32 = 29;
const TARGET: Duration = Duration::from_millis(30);

/// One way of moving the guest.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    PreCopy,
    Demand,
    Flush,
    /// One pivot, page by page: the slides' pseudo-code.
    Slides,
    /// With so many pivots, in batches.
    Bubble(u16),
    Hybrid,
}

const WAYS: [Way; 7] = [
    Way::PreCopy,
    Way::Flush,
    Way::Slides,
    Way::Bubble(1),
    Way::Bubble(4),
    Way::Hybrid,
    Way::Demand,
];

impl Way {
    fn name(self) -> String {
        match self {
            Self::PreCopy => "pre-copy".into(),
            Self::Demand => "demand paging".into(),
            Self::Flush => "post-copy, flush".into(),
            Self::Slides => "post-copy, page by page".into(),
            Self::Bubble(1) => "post-copy, 1 pivot".into(),
            Self::Bubble(n) => format!("post-copy, {n} pivots"),
            Self::Hybrid => "hybrid".into(),
        }
    }

    fn run(self, setup: &Setup, guest: &mut dyn Activity) -> Outcome {
        let (policy, order, pivots) = match self {
            Self::PreCopy => (PolicyKind::Precopy, PushOrder::default(), 1),
            Self::Demand => (PolicyKind::Postcopy, PushOrder::Demand, 1),
            Self::Flush => (PolicyKind::Postcopy, PushOrder::Flush, 1),
            Self::Slides => (PolicyKind::Postcopy, PushOrder::Bubble, 1),
            Self::Bubble(pivots) => (PolicyKind::Postcopy, PushOrder::Bubble, pivots),
            Self::Hybrid => (PolicyKind::Hybrid, PushOrder::Bubble, 4),
        };
        let options = Options {
            policy,
            order,
            pivots,
            downtime: TARGET,
            max_rounds: Some(ROUNDS),
            on_timeout: OnTimeout::Stop,
            ..Options::as_published()
        };
        let mut setup = setup.clone();
        if self == Self::Slides {
            setup.push_pages = 1;
        }
        migrate(&setup, &options, guest)
    }
}

/// The stress test of one working set.
fn stress(args: &Args, choice: Choice, set: u64, way: Way) -> Result<Outcome, Failure> {
    let pages = MEMORY / PAGE_BYTES / args.scale;
    let layout = RamLayout::new(vec![Run::new(0, pages)])?;
    let scale = args.scale as f64;
    let setup = Setup::new(layout, LINK / scale);
    let pattern = match choice {
        Choice::Uniform => Pattern::Uniform,
        Choice::Sequential => Pattern::Sequential,
        Choice::Zipf => Pattern::Zipf { exponent: 1.0 },
    };
    let working_set = (set << 20) / PAGE_BYTES / args.scale;
    let rate = f64::from(args.rate) / scale;
    let mut guest = Writer::new(&setup.layout, pattern, working_set, rate, args.seed);
    Ok(way.run(&setup, &mut guest))
}

/// Everything that was modelled.
struct Results {
    /// By way, then by working set.
    grid: Vec<Vec<Outcome>>,
    /// By pattern and working set, for each of the post-copy orders: its faults.
    patterns: Vec<(Choice, u64, Vec<Faults>)>,
    /// Pages that ferry pushes at once.
    push_pages: u64,
    /// By trace, for each way.
    traces: Vec<(String, Vec<Outcome>)>,
}

const ORDERS: [Way; 4] = [Way::Flush, Way::Slides, Way::Bubble(1), Way::Bubble(4)];

impl Results {
    fn of(&self, way: Way) -> &[Outcome] {
        let row = WAYS.iter().position(|w| *w == way).unwrap_or(0);
        &self.grid[row]
    }

    /// By how much less one way has of something than pre-copy, for each working set.
    fn less(&self, way: Way, of: fn(&Outcome) -> f64) -> Vec<f64> {
        let pairs = self.of(way).iter().zip(self.of(Way::PreCopy));
        pairs.map(|(new, old)| 1.0 - of(new) / of(old)).collect()
    }

    /// The share of demand paging's faults that a way hides, for each working set.
    fn hidden(&self, way: Way) -> Vec<f64> {
        let share = |o: &Outcome| o.faults.as_ref().map_or(0.0, Faults::hidden_share);
        self.of(way).iter().map(share).collect()
    }
}

fn compute(args: &Args) -> Result<Results, Failure> {
    let cells = WAYS.iter().flat_map(|&way| SETS.map(|set| (way, set)));
    let outcomes = each(cells.collect(), |(way, set)| {
        stress(args, args.writer, set, way)
    });
    let outcomes: Vec<Outcome> = outcomes.into_iter().collect::<Result<_, _>>()?;
    let grid = outcomes
        .chunks(SETS.len())
        .map(<[Outcome]>::to_vec)
        .collect();
    let choices = [Choice::Sequential, Choice::Uniform, Choice::Zipf];
    let cells = choices
        .into_iter()
        .flat_map(|choice| [64, 512].map(|set| (choice, set)));
    let patterns = each(cells.collect(), |(choice, set)| {
        let faults = ORDERS.map(|way| {
            let outcome = stress(args, choice, set, way)?;
            Ok(outcome.faults.unwrap_or_default())
        });
        Ok((
            choice,
            set,
            faults.into_iter().collect::<Result<Vec<_>, Failure>>()?,
        ))
    });
    let read = |(name, path): &(String, PathBuf)| Ok((name.clone(), record::read(path)?));
    let traces: Vec<(String, Trace)> = args
        .trace
        .iter()
        .map(read)
        .collect::<Result<_, Failure>>()?;
    let traces = traces.iter().map(|(name, trace)| {
        let setup = Setup::new(trace.header().layout.clone(), LINK);
        let run = |way: Way| way.run(&setup, &mut Replay::new(trace, args.seed));
        (name.clone(), each(WAYS.to_vec(), run))
    });
    let layout = RamLayout::new(vec![Run::new(0, 1)])?;
    Ok(Results {
        grid,
        push_pages: Setup::new(layout, LINK).push_pages,
        patterns: patterns.into_iter().collect::<Result<_, Failure>>()?,
        traces: traces.collect(),
    })
}

fn total(o: &Outcome) -> f64 {
    o.total.as_secs_f64()
}

fn downtime(o: &Outcome) -> f64 {
    o.downtime.as_secs_f64() * 1e3
}

fn pages(o: &Outcome) -> f64 {
    o.pages_sent as f64
}

fn faults(o: &Outcome) -> f64 {
    o.faults.as_ref().map_or(0.0, |f| f.count as f64)
}

pub fn run(args: &Args) -> Result<Paper, Failure> {
    let results = compute(args)?;
    let out = args.output.directory("postcopy")?;
    let chart =
        |title: &'static str, y: &'static str, log: bool, ways: &[Way], of: fn(&Outcome) -> f64| {
            let series = |way: &Way| Series {
                name: way.name(),
                points: SETS
                    .iter()
                    .zip(results.of(*way))
                    // On a logarithmic axis there is no place for none.
                    .filter(|(_, o)| !log || of(o) > 0.0)
                    .map(|(set, o)| (*set as f64, of(o)))
                    .collect(),
            };
            Lines {
                title,
                x: "working set (MiB)",
                y,
                log: (true, log),
                series: ways.iter().map(series).collect(),
                levels: Vec::new(),
            }
        };
    // Of demand paging only the faults are of interest: its total is mostly that the rest waits
    // until the guest is quiet.
    let ways = &[
        Way::PreCopy,
        Way::Flush,
        Way::Slides,
        Way::Bubble(4),
        Way::Hybrid,
    ];
    let post = &[
        Way::Flush,
        Way::Slides,
        Way::Bubble(4),
        Way::Hybrid,
        Way::Demand,
    ];
    let charts = [
        (
            "total-time.svg",
            chart("Total migration time", "seconds", false, ways, total),
        ),
        (
            "downtime.svg",
            chart("Downtime", "milliseconds", true, ways, downtime),
        ),
        (
            "pages.svg",
            chart("Pages transferred", "pages", false, ways, pages),
        ),
        (
            "faults.svg",
            chart("Network-bound page faults", "faults", true, post, faults),
        ),
    ];
    let mut plots = Vec::new();
    for (name, chart) in &charts {
        plots.push(out.file(name, |path| plot::lines(path, chart))?);
    }
    let data: Vec<_> = WAYS
        .iter()
        .map(|way| {
            let cells = SETS.iter().zip(results.of(*way));
            let cells = cells.map(|(set, o)| {
                json!({ "wss_mib": set, "total_ms": total(o) * 1e3, "downtime_ms": downtime(o), "pages_sent": o.pages_sent, "faults": o.faults })
            });
            json!({ "way": way.name(), "cells": cells.collect::<Vec<_>>() })
        })
        .collect();
    let mut tables = vec![tables::grid(&results), tables::patterns(&results)];
    if !results.traces.is_empty() {
        tables.push(tables::traces(&results));
    }
    Ok(Paper {
        name: "postcopy",
        setup: format!(
            "The slides' stress test: {}, 1 Gbit/s, a working set of 8 to 512 MiB written in an endless loop ({:?}, {} pages/s; the slides do \
             not give the rate). Pre-copy stops after {ROUNDS} rounds as Xen's does, or when what is left has not shrunk for six. One vCPU; \
             a fault waits for its request, the batch on the link, the page and the way back. One page stands for {}. The slides' charts \
             are pictures: their text's claims are checked.",
            memory(MEMORY),
            args.writer,
            args.rate,
            args.scale
        ),
        findings: claims::findings(&results),
        tables,
        data: json!({ "ways": data }),
        plots,
    })
}
