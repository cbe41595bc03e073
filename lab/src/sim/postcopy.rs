//! `ferry sim paper postcopy`: post-copy with pre-paging (Hines and Gopalan 2009).

use super::findings::Finding;
use super::guest::Choice;
use super::mplm::named_trace;
use super::plot::{self, Lines, Series};
use super::{Output, Paper, each, percent};
use crate::record;
use ferry_migration::model::{Activity, Faults, Outcome, Pattern, Replay, Setup, Writer, migrate};
use ferry_migration::options::{OnTimeout, Options, PolicyKind};
use ferry_migration::order::PushOrder;
use ferry_migration::page::{PAGE_BYTES, RamLayout, Run};
use ferry_migration::trace::Trace;
use ferry_terminal::output::Failure;
use ferry_terminal::rows::wrapped;
use ferry_terminal::units::{grouped, memory};
use serde_json::json;
use std::path::PathBuf;
use std::time::Duration;

/// Total time, downtime, pages transferred and page faults over the working set, post-copy against pre-copy.
///
/// The slides' stress test: a guest of 1024 MB on Gigabit Ethernet that writes a working set in an endless loop.
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
    // Of demand paging only the faults are of interest: its total is mostly that the rest waits until the guest is quiet.
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
    let mut tables = vec![grid_table(&results), patterns_table(&results)];
    if !results.traces.is_empty() {
        tables.push(traces_table(&results));
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
        findings: findings(&results),
        tables,
        data: json!({ "ways": data }),
        plots,
    })
}

fn extremes(values: &[f64]) -> (f64, f64) {
    let low = values.iter().copied().fold(f64::INFINITY, f64::min);
    (
        low,
        values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
    )
}

fn spread(values: &[f64]) -> String {
    let (low, high) = extremes(values);
    format!("{} … {}", percent(low), percent(high))
}

fn findings(r: &Results) -> Vec<Finding> {
    let best = Way::Bubble(4);
    // Whether pushed page by page, as in the slides, or in batches.
    let shares = |way: Way, share: fn(&Faults) -> f64| -> (f64, f64) {
        let at = ORDERS.iter().position(|order| *order == way).unwrap_or(0);
        let patterns = r
            .patterns
            .iter()
            .filter_map(|(_, _, faults)| faults.get(at));
        let stress = r.of(way).iter().filter_map(|o| o.faults.as_ref());
        extremes(&patterns.chain(stress).map(share).collect::<Vec<_>>())
    };
    let slides = shares(Way::Slides, Faults::hidden_share);
    let pushed = shares(Way::Slides, Faults::pushed_share);
    let batches = shares(best, Faults::hidden_share);
    let stalled = |way: Way| {
        let at = SETS.iter().position(|set| *set == 64).unwrap_or(0);
        let faults = r.of(way).get(at).and_then(|o| o.faults.as_ref());
        faults.map_or(0.0, |f| f.stalled.as_secs_f64())
    };
    let verdict = |holds: bool| {
        if holds {
            "Holds."
        } else {
            "Does not hold here."
        }
    };
    let less_total = r.less(best, total);
    let less_pages = r.less(best, pages);
    let down = |way: Way| {
        let times: Vec<f64> = r.of(way).iter().map(downtime).collect();
        extremes(&times)
    };
    let (pre, post, hybrid) = (down(Way::PreCopy), down(best), down(Way::Hybrid));
    vec![
        Finding::new(
            "Total time, against pre-copy",
            "more than 50 % less",
            format!("{} less", spread(&less_total)),
            format!(
                "{} Over the working sets, smallest to largest reduction. Post-copy takes memory ÷ link whatever the guest does; how far \
             pre-copy is above that depends on when it is stopped.",
                verdict(extremes(&less_total).1 > 0.5)
            ),
        ),
        Finding::new(
            "Pages transferred",
            "up to 75 % less",
            format!("{} less", spread(&less_pages)),
            format!(
                "{} Each page crosses once. Ferry's pre-copy stops when it sees no progress and so sends less in vain than Xen's, which \
             went through its rounds.",
                verdict(extremes(&less_pages).1 >= 0.75)
            ),
        ),
        Finding::new(
            "Downtime, pre-copy",
            "increases with the set",
            format!("{:.0} … {:.0} ms", pre.0, pre.1),
            verdict(pre.1 > 2.0 * pre.0),
        ),
        Finding::new(
            "Downtime, post-copy",
            "remains low",
            format!("{:.1} … {:.1} ms", post.0, post.1),
            format!(
                "{} CPU and device state only. In the slides' real workloads pre-copy's was lower: their pseudo-paging had to prepare \
             the guest's memory in the pause, which userfaultfd does not.",
                verdict(post.1 < 1.1 * post.0)
            ),
        ),
        Finding::new(
            "Downtime, hybrid",
            "(not shown)",
            format!("{:.1} … {:.1} ms", hybrid.0, hybrid.1),
            "The set of stale pages is sent in the pause, as runs or as a bitmap.",
        ),
        Finding::new(
            "Faults hidden, worst case: batches",
            "≥ 50 %",
            percent(batches.0),
            format!(
                "{} Over sweeps, uniform and Zipf's writers and all working sets. ferry pushes {} pages at a time: a fault waits for the \
             batch on the link, and the pages pushed meanwhile are its neighbours.",
                verdict(batches.0 >= 0.5),
                r.push_pages
            ),
        ),
        Finding::new(
            "… and page by page, as in the slides",
            "≥ 50 %",
            format!(
                "{} arrived, {} pushed",
                percent(slides.0),
                percent(pushed.0)
            ),
            format!(
                "A sweep that outruns the link catches up with what is pushed ahead of it: each page is on its way when it is touched, and \
                 the vCPU waits briefly for each. Whether the slides count such waits as faults they do not say{}.",
                if slides.0 < 0.5 && pushed.0 > 0.5 {
                    "; their 50 % lies between"
                } else {
                    ""
                }
            ),
        ),
        Finding::new(
            "Faults hidden, at most",
            "80 %",
            format!(
                "{} ({} page by page)",
                percent(batches.1),
                percent(slides.1)
            ),
            verdict(batches.1.max(slides.1) >= 0.8),
        ),
        Finding::new(
            "How long the guest stalls, 64 MiB",
            "(not shown)",
            format!(
                "flush {:.2} s, bubbling {:.2} s",
                stalled(Way::Flush),
                stalled(best)
            ),
            format!(
                "What counts for the guest is not how many faults it has but how long it waits: larger batches make fewer faults and longer \
                 waits. Page by page it would be {:.2} s.",
                stalled(Way::Slides)
            ),
        ),
        Finding::new(
            "Hidden: 1 pivot and 4",
            "(1 in the slides)",
            format!(
                "{} / {}",
                spread(&r.hidden(Way::Bubble(1))),
                spread(&r.hidden(best))
            ),
            "By the stress test's working set. Several pivots serve several streams of faults; one sweep is one stream.",
        ),
    ]
}

/// What a table says of a move: total, pause, pages, faults, what was hidden, and the time stalled.
fn cells(o: &Outcome) -> [String; 6] {
    let f = o.faults.clone().unwrap_or_default();
    let only = |text: String| match o.faults {
        Some(_) => text,
        None => "–".to_owned(),
    };
    [
        format!("{:.2}", total(o)),
        format!("{:.1}", downtime(o)),
        grouped(o.pages_sent),
        only(grouped(f.count)),
        only(percent(f.hidden_share())),
        only(format!("{:.2}", f.stalled.as_secs_f64())),
    ]
}

const CELLS: [&str; 6] = [
    "total s",
    "pause ms",
    "pages",
    "faults",
    "hidden",
    "stalled s",
];
const WIDTHS: [usize; 6] = [8, 9, 10, 8, 7, 9];

fn grid_table(r: &Results) -> String {
    let rows = WAYS.iter().flat_map(|way| {
        r.of(*way).iter().zip(SETS).map(|(o, set)| {
            let mut row = vec![way.name(), set.to_string()];
            row.extend(cells(o));
            row
        })
    });
    format!(
        "The stress test (demand paging: until no fault comes for a while, then the rest is pushed; stalled: how long the vCPU waited in all)\n{}",
        wrapped(
            &[&["", "WSS MiB"][..], &CELLS].concat(),
            &[&[23, 7][..], &WIDTHS].concat(),
            &rows.collect::<Vec<_>>()
        )
    )
}

fn patterns_table(r: &Results) -> String {
    let rows = r.patterns.iter().map(|(choice, set, faults)| {
        let mut row = vec![format!("{choice:?}, {set} MiB").to_lowercase()];
        row.extend(faults.iter().map(|f| {
            format!(
                "{} + {}, {:.2} s",
                percent(f.hidden_share()),
                percent(f.pushed_share() - f.hidden_share()),
                f.stalled.as_secs_f64()
            )
        }));
        row
    });
    let head: Vec<String> = [String::new()]
        .into_iter()
        .chain(ORDERS.map(Way::name))
        .collect();
    let head: Vec<&str> = head.iter().map(String::as_str).collect();
    format!(
        "First touches of pages that had arrived + that were on their way, and how long the vCPU waited in all\n{}",
        wrapped(&head, &[20, 23, 23, 23, 23], &rows.collect::<Vec<_>>())
    )
}

fn traces_table(r: &Results) -> String {
    let rows = r.traces.iter().flat_map(|(name, outcomes)| {
        outcomes.iter().zip(WAYS).map(move |(o, way)| {
            let mut row = vec![name.clone(), way.name()];
            row.extend(cells(o));
            row
        })
    });
    format!(
        "Recorded guests on the same link (a trace holds writes: pages that are only read do not fault here)\n{}",
        wrapped(
            &[&["", ""][..], &CELLS].concat(),
            &[&[10, 23][..], &WIDTHS].concat(),
            &rows.collect::<Vec<_>>()
        )
    )
}
