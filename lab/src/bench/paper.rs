//! `ferry bench paper`: the papers' experiments with real guests over a shaped link, and each
//! paper's figures compared with ours.

mod mplm;
mod postcopy;
mod stord;

use super::Common;
use super::cell::{Cell, Guest, Link, Policy};
use super::journal::Run;
use super::net::PAYLOAD;
use super::spec::{Spec, product};
use super::statistics::{Metric, Row};
use crate::findings::{Finding, table};
use ferry_migration::options::Options;
use ferry_terminal::output::Failure;

/// A paper.
#[derive(Debug, clap::Subcommand)]
pub enum Paper {
    Mplm(mplm::Args),
    Stord(stord::Args),
    Postcopy(postcopy::Args),
}

/// What the results say about a paper's claims.
type Judge = Box<dyn Fn(&Results<'_>) -> Vec<Finding>>;

/// An experiment: what to measure, and what to make of it.
pub struct Experiment {
    pub spec: Spec,
    /// The paper's setup and ours, in a few sentences.
    scale: String,
    judge: Judge,
}

/// Runs of a paper each.
const RUNS: u32 = 3;

impl Paper {
    /// What every benchmark takes.
    pub const fn common(&self) -> &Common {
        match self {
            Self::Mplm(args) => &args.common,
            Self::Stord(args) => &args.common,
            Self::Postcopy(args) => &args.common,
        }
    }

    /// What it wants measured.
    pub fn experiment(&self) -> Result<Experiment, Failure> {
        match self {
            Self::Mplm(args) => mplm::experiment(args),
            Self::Stord(args) => stord::experiment(args),
            Self::Postcopy(args) => postcopy::experiment(args),
        }
    }
}

impl Experiment {
    /// Every guest by every policy over one link.
    fn new(
        title: &str,
        guests: &[Guest],
        link: &Link,
        policies: &[Policy],
        scale: String,
        judge: impl Fn(&Results<'_>) -> Vec<Finding> + 'static,
    ) -> Result<Self, Failure> {
        for guest in guests {
            guest.check().map_err(Failure)?;
        }
        let guests: Vec<&Guest> = guests.iter().collect();
        let policies: Vec<&Policy> = policies.iter().collect();
        Ok(Self {
            spec: Spec {
                title: title.to_owned(),
                runs: RUNS,
                cells: product(&guests, &[link], &policies),
                goals: Vec::new(),
            },
            scale,
            judge: Box::new(judge),
        })
    }

    /// The paper's figures compared with ours.
    pub fn verdict(&self, spec: &Spec, runs: &[Run]) -> String {
        let results = Results {
            cells: &spec.cells,
            runs,
        };
        format!("\n{}\n\n{}", self.scale, table(&(self.judge)(&results)))
    }
}

/// What was measured.
pub struct Results<'a> {
    cells: &'a [Cell],
    runs: &'a [Run],
}

impl Results<'_> {
    /// The median of a metric, if there are runs.
    fn median(&self, guest: &str, policy: &str, metric: &str) -> Option<f64> {
        let wanted = |cell: &&Cell| cell.guest.name == guest && cell.policy.name == policy;
        let cell = self.cells.iter().find(wanted)?;
        Row::of(cell, self.runs).median(Metric::named(metric)?)
    }

    /// What `policy` saves of what `other` takes, as a share; negative if it takes more.
    fn saved(&self, guest: &str, policy: &str, other: &str, metric: &str) -> Option<f64> {
        let (ours, theirs) = (
            self.median(guest, policy, metric)?,
            self.median(guest, other, metric)?,
        );
        (theirs > 0.0).then(|| 1.0 - ours / theirs)
    }
}

/// A policy of ferry's.
fn ours(name: &str, options: Options) -> Policy {
    Policy::of_ferry(name, options)
}

/// A figure, or that there is none.
fn shown(value: Option<f64>, unit: &str, digits: usize) -> String {
    value.map_or_else(
        || "not measured".to_owned(),
        |value| format!("{value:.digits$}{unit}"),
    )
}

/// A share in per cent, or that there is none.
fn percent(share: Option<f64>) -> String {
    shown(share.map(|share| share * 100.0), " %", 0)
}

/// Whether a claim held.
fn verdict(held: Option<bool>) -> &'static str {
    match held {
        Some(true) => "Holds.",
        Some(false) => "Does not hold here.",
        None => "Not measured.",
    }
}

/// The smallest and the largest of values; nothing of nothing.
fn extremes(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    let found = super::statistics::spread(values.collect())?;
    Some((found.min, found.max))
}

/// Pages per second that a link of so many bytes per second carries.
fn pages_per_second(rate: u64) -> f64 {
    rate as f64 * PAYLOAD / 4096.0
}

/// How long one pass over so much memory takes.
pub fn pass_seconds(memory: u64, rate: u64) -> f64 {
    memory as f64 / (rate as f64 * PAYLOAD)
}

/// A positive number of seconds, pages or the like without its fraction.
fn whole(value: f64) -> u64 {
    // Far below 2⁶⁴, as a link's pages or a pass' milliseconds are; a negative number becomes zero.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let whole = value.round() as u64;
    whole
}

#[cfg(test)]
mod tests {
    use super::super::measure::Figures;
    use super::super::net::Shaping;
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(subcommand)]
        paper: Paper,
    }

    /// Runs in which every cell took as long as its place in the matrix says.
    fn measured(spec: &Spec) -> Vec<Run> {
        let run = |(place, cell): (usize, &Cell)| {
            let mut figures = Figures::default();
            figures.told.total_ms = 1000.0 * (place + 1) as f64;
            figures.told.pages_sent = Some(1000);
            figures.told.faults = Some(ferry_migration::report::Faults {
                count: 10,
                ..Default::default()
            });
            Run {
                cell: cell.clone(),
                number: 1,
                shaping: Shaping::Tc,
                load: String::new(),
                took_s: 0.0,
                figures: Some(figures),
                error: None,
            }
        };
        spec.cells.iter().enumerate().map(run).collect()
    }

    #[test]
    fn each_paper_is_judged_with_runs_and_without() {
        for name in ["mplm", "stord", "postcopy"] {
            let cli = Cli::try_parse_from(["paper", name]).unwrap();
            let experiment = cli.paper.experiment().unwrap();
            let spec = &experiment.spec;
            assert!(spec.cells.len() > 5, "{name}");
            for cell in &spec.cells {
                cell.guest.check().unwrap();
                cell.policy.check().unwrap();
            }
            let nothing = experiment.verdict(spec, &[]);
            assert!(nothing.contains("not measured"), "{nothing}");
            let text = experiment.verdict(spec, &measured(spec));
            assert!(text.contains("paper") && text.contains("ours"), "{text}");
            assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
        }
    }

    #[test]
    fn bad_experiments_are_refused_in_a_sentence() {
        for (arguments, part) in [
            (["paper", "mplm", "--kernels", "lu.A"], "`lu`"),
            (["paper", "mplm", "--kernels", "mg.Q"], "`Q`"),
            (["paper", "stord", "--rates", "200"], "200"),
            (["paper", "stord", "--memory", "1M"], "1 MiB"),
            (["paper", "postcopy", "--sets", "4G"], "4108 MiB"),
        ] {
            let error = match Cli::try_parse_from(arguments) {
                Ok(cli) => cli.paper.experiment().err().unwrap().0,
                Err(error) => error.to_string(),
            };
            assert!(error.contains(part), "{arguments:?}: {error}");
        }
    }

    #[test]
    fn a_gigabit_carries_what_was_measured() {
        assert!((pages_per_second(125_000_000) * 4096.0 / 1e6 - 119.6).abs() < 0.1);
        assert!((pass_seconds(512 << 20, 125_000_000) - 4.49).abs() < 0.01);
    }
}
