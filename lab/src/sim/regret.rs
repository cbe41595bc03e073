//! `ferry sim regret`: how far `--policy auto` is from the best that could have been chosen.

use super::mplm::named_trace;
use super::{each, percent};
use crate::record;
use ferry_migration::model::regret::{Comparison, cases, compare};
use ferry_migration::model::{Activity, Pattern, Writer};
use ferry_migration::page::{PAGE_BYTES, PageSet, RamLayout, Run};
use ferry_migration::trace::{self, Header, Trace};
use ferry_terminal::output::{Failure, put, put_json};
use ferry_terminal::rows::aligned;
use serde_json::json;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// How much more `--policy auto` costs than the best of about 40 fixed option sets, which an oracle
/// picks afterwards: over recorded guests, links, round trips and goals.
///
/// The cost is total time, and the pause and stalls once more. The constants of auto were fitted on
/// one half of the built-in guests; the other half was held out. Without --trace it takes some
/// minutes.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  ferry sim regret
  ferry sim regret --trace mine=guest.trace --offsets 2")]
pub struct Args {
    /// A recorded guest instead of the built-in ones.
    #[arg(long, value_name = "NAME=PATH", value_parser = named_trace)]
    trace: Vec<(String, PathBuf)>,
    /// At how many places of each trace a migration begins.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u8).range(1..=64))]
    offsets: u8,
    /// Also list what cost over 10 % more than the best.
    #[arg(long)]
    list: bool,
    /// Print one JSON object instead.
    #[arg(long)]
    json: bool,
}

/// A guest, and whether the constants were fitted on it.
struct Guest {
    name: String,
    fitted: Option<bool>,
    trace: Trace,
}

/// Recorded kernels; lab/traces/README.md says how.
const RECORDED: [(&str, bool, &[u8]); 7] = [
    ("bt.A", true, include_bytes!("../../traces/bt.A.trace.zst")),
    ("ft.A", true, include_bytes!("../../traces/ft.A.trace.zst")),
    ("mg.A", true, include_bytes!("../../traces/mg.A.trace.zst")),
    ("cg.A", false, include_bytes!("../../traces/cg.A.trace.zst")),
    ("ep.A", false, include_bytes!("../../traces/ep.A.trace.zst")),
    ("is.A", false, include_bytes!("../../traces/is.A.trace.zst")),
    ("sp.A", false, include_bytes!("../../traces/sp.A.trace.zst")),
];

/// Synthetic writers: the pattern, pages of its working set, pages per second, and whether it rests
/// for 1.5 s of each 2 s.
const WRITERS: [(&str, bool, Pattern, u64, f64, bool); 10] = [
    ("uniform-light", true, Pattern::Uniform, 8192, 2e3, false),
    ("uniform-heavy", false, Pattern::Uniform, 16384, 20e3, false),
    (
        "zipf-light",
        false,
        Pattern::Zipf { exponent: 1.0 },
        16384,
        4e3,
        false,
    ),
    (
        "zipf-heavy",
        true,
        Pattern::Zipf { exponent: 1.0 },
        24576,
        40e3,
        false,
    ),
    (
        "sequential-light",
        true,
        Pattern::Sequential,
        8192,
        2e3,
        false,
    ),
    (
        "sequential-heavy",
        false,
        Pattern::Sequential,
        16384,
        15e3,
        false,
    ),
    (
        "stride-light",
        false,
        Pattern::Stride { step: 16 },
        8192,
        3e3,
        false,
    ),
    (
        "stride-heavy",
        true,
        Pattern::Stride { step: 16 },
        24576,
        20e3,
        false,
    ),
    ("bursts-light", true, Pattern::Uniform, 8192, 8e3, true),
    ("bursts-heavy", false, Pattern::Uniform, 16384, 30e3, true),
];

/// Pages of a synthetic guest: 128 MiB.
const PAGES: u64 = 32 << 10;
/// Intervals of 100 ms that it is recorded for.
const INTERVALS: u64 = 100;
const INTERVAL: Duration = Duration::from_millis(100);

/// A recording of a synthetic writer.
fn synthetic(
    name: &str,
    pattern: Pattern,
    working_set: u64,
    rate: f64,
    rests: bool,
) -> Result<Trace, Failure> {
    let layout = RamLayout::new(vec![Run::new(0, PAGES)])?;
    let header = Header {
        layout: layout.clone(),
        memory_bytes: PAGES * PAGE_BYTES,
        cpus: 1,
        name: None,
        workload: Some(name.to_owned()),
        empty_pages: None,
        interval_us: 100_000,
    };
    let failed = |error: std::io::Error| Failure(format!("cannot make a trace ({error})"));
    let mut file = trace::Writer::new(Vec::new(), &header).map_err(failed)?;
    let mut guest = Writer::new(&layout, pattern, working_set, rate, 3);
    let mut at = Duration::ZERO;
    for interval in 0..INTERVALS {
        at += INTERVAL;
        let mut pages = PageSet::new(PAGES);
        guest.advance(at.as_secs_f64(), &mut pages);
        if rests && interval % 20 >= 5 {
            pages.clear();
        }
        file.frame(at, &pages).map_err(failed)?;
    }
    let bytes = file.finish(at).map_err(failed)?;
    Ok(Trace::read(bytes.as_slice())?)
}

fn built_in() -> Result<Vec<Guest>, Failure> {
    let mut guests = Vec::new();
    for (name, fitted, pattern, working_set, rate, rests) in WRITERS {
        guests.push(Guest {
            name: name.to_owned(),
            fitted: Some(fitted),
            trace: synthetic(name, pattern, working_set, rate, rests)?,
        });
    }
    for (name, fitted, packed) in RECORDED {
        let failed = |error| Failure(format!("the built-in trace {name} is damaged ({error})"));
        let bytes = zstd::decode_all(packed).map_err(failed)?;
        guests.push(Guest {
            name: name.to_owned(),
            fitted: Some(fitted),
            trace: Trace::read(bytes.as_slice())?,
        });
    }
    Ok(guests)
}

/// What some comparisons come to.
struct Summary {
    /// Those of which something was feasible.
    cases: usize,
    mean: f64,
    worst: f64,
    /// `auto` broke a goal that could be kept.
    broken: usize,
    /// Nothing kept the goals.
    infeasible: usize,
}

impl Summary {
    fn of<'c>(comparisons: impl Iterator<Item = &'c Comparison>) -> Self {
        let (mut regrets, mut broken, mut infeasible) = (Vec::new(), 0, 0);
        for comparison in comparisons {
            match comparison.regret() {
                None => infeasible += 1,
                Some(_) if !comparison.kept => broken += 1,
                Some(regret) => regrets.push(regret),
            }
        }
        Self {
            cases: regrets.len() + broken,
            mean: regrets.iter().sum::<f64>() / regrets.len().max(1) as f64,
            worst: regrets.iter().copied().fold(0.0, f64::max),
            broken,
            infeasible,
        }
    }

    fn row(&self, name: &str, half: &str) -> Vec<String> {
        vec![
            name.to_owned(),
            half.to_owned(),
            self.cases.to_string(),
            format!("{:.1} %", self.mean * 100.0),
            percent(self.worst),
            self.broken.to_string(),
            self.infeasible.to_string(),
        ]
    }

    fn json(&self, name: &str) -> serde_json::Value {
        json!({
            "name": name,
            "cases": self.cases,
            "mean_regret": self.mean,
            "worst_regret": self.worst,
            "goals_broken": self.broken,
            "infeasible": self.infeasible,
        })
    }
}

const fn half(fitted: Option<bool>) -> &'static str {
    match fitted {
        Some(true) => "fitted",
        Some(false) => "held out",
        None => "given",
    }
}

/// Compares, and prints a table.
///
/// # Errors
/// A trace cannot be read.
pub fn run(args: &Args) -> Result<ExitCode, Failure> {
    let guests = if args.trace.is_empty() {
        built_in()?
    } else {
        let given = args.trace.iter().map(|(name, path)| {
            Ok(Guest {
                name: name.clone(),
                fitted: None,
                trace: record::read(path)?,
            })
        });
        given.collect::<Result<_, Failure>>()?
    };
    let work = guests.iter().enumerate().flat_map(|(at, guest)| {
        let cases = cases(&guest.trace, usize::from(args.offsets));
        cases.into_iter().map(move |case| (at, case))
    });
    let compared: Vec<(usize, Comparison)> = each(work.collect(), |(at, case)| {
        let comparisons = compare(&guests[at].trace, case);
        comparisons
            .into_iter()
            .map(move |c| (at, c))
            .collect::<Vec<_>>()
    })
    .into_iter()
    .flatten()
    .collect();
    let of = |wanted: &dyn Fn(usize) -> bool| {
        let of = compared.iter().filter(|(at, _)| wanted(*at));
        Summary::of(of.map(|(_, comparison)| comparison))
    };
    let summaries: Vec<Summary> = (0..guests.len()).map(|at| of(&|a| a == at)).collect();
    let halves: Vec<(&str, Summary)> = [Some(true), Some(false)]
        .into_iter()
        .filter(|_| args.trace.is_empty())
        .map(|wanted| (half(wanted), of(&|at| guests[at].fitted == wanted)))
        .collect();
    if args.json {
        let names = guests.iter().zip(&summaries);
        put_json(&json!({
            "schema": 1,
            "guests": names.map(|(guest, s)| s.json(&guest.name)).collect::<Vec<_>>(),
            "halves": halves.iter().map(|(name, s)| s.json(name)).collect::<Vec<_>>(),
            "comparisons": compared.iter().map(|(at, comparison)| json!({
                "guest": guests[*at].name,
                "regret": comparison.regret(),
                "comparison": comparison,
            })).collect::<Vec<_>>(),
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let head = [
        "guest",
        "half",
        "cases",
        "mean",
        "worst",
        "broken",
        "infeasible",
    ];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for (guest, summary) in guests.iter().zip(&summaries) {
        rows.push(summary.row(&guest.name, half(guest.fitted)));
    }
    for (name, summary) in &halves {
        rows.push(summary.row("all", name));
    }
    let mut text = aligned(&rows);
    if args.list {
        for (at, comparison) in &compared {
            text += &listed(&guests[*at].name, comparison);
        }
    }
    put(&text)?;
    Ok(ExitCode::SUCCESS)
}

/// A line about a comparison that turned out badly.
fn listed(guest: &str, comparison: &Comparison) -> String {
    let (Some(regret), Some((best, cost))) = (comparison.regret(), &comparison.oracle) else {
        return String::new();
    };
    if comparison.kept && regret <= 0.1 {
        return String::new();
    }
    let case = &comparison.case;
    format!(
        "{guest}, {:.0} Mbit/s, round trip {:?}, pause {:?}, frame {}, post-copy {}{}: {:.3} s, {best} {cost:.3} s; {}\n",
        case.bandwidth * 8e-6,
        case.round_trip,
        case.downtime,
        case.frame,
        comparison.post_copy,
        if comparison.kept { "" } else { ", goal broken" },
        comparison.auto,
        comparison.why
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_guests_are_there_and_write() {
        let guests = built_in().unwrap();
        assert_eq!(guests.len(), 17);
        for guest in &guests {
            let dirtied: u64 = guest.trace.frames().iter().map(|frame| frame.pages()).sum();
            assert!(dirtied > 100, "{}", guest.name);
            assert!(guest.trace.is_whole(), "{}", guest.name);
        }
    }

    #[test]
    fn a_broken_goal_is_no_regret() {
        let trace = synthetic("t", Pattern::Uniform, 64, 100.0, false).unwrap();
        let case = cases(&trace, 1)[0];
        let mut list = compare(&trace, case);
        list.truncate(1);
        let summary = Summary::of(list.iter());
        assert_eq!(
            (summary.cases, summary.broken, summary.infeasible),
            (1, 0, 0)
        );
        assert!(summary.worst < 0.1, "{}", summary.worst);
        list[0].kept = false;
        assert_eq!(Summary::of(list.iter()).broken, 1);
        list[0].oracle = None;
        assert_eq!(Summary::of(list.iter()).infeasible, 1);
    }
}
