//! The guest and the link of a simulation, as the command line names them.

use crate::record;
use ferry_migration::model::{Activity, Pattern, Replay, Setup, Writer};
use ferry_migration::page::{PAGE_BYTES, RamLayout, Run};
use ferry_migration::trace::Trace;
use ferry_terminal::output::Failure;
use ferry_terminal::units::{duration, memory, rate, size};
use std::path::PathBuf;
use std::time::Duration;

/// How a synthetic guest chooses its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Choice {
    /// Any page of the working set, each as likely.
    Uniform,
    /// One after the other, around and around.
    Sequential,
    /// A few often, most seldom.
    Zipf,
}

/// What is simulated.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Guest and link")]
// Its name would be that of the command it is part of.
#[group(skip)]
pub struct Args {
    /// A recorded guest (`ferry record`); it begins anew at its end.
    #[arg(long, value_name = "PATH", conflicts_with_all = ["writer", "wss", "rate", "memory", "exponent"])]
    trace: Option<PathBuf>,
    /// A synthetic guest: how it chooses the pages that it writes.
    #[arg(long, value_enum, value_name = "HOW")]
    writer: Option<Choice>,
    /// The synthetic guest's working set.
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "256M")]
    wss: u64,
    /// Pages that it writes per second.
    #[arg(long, value_name = "PAGES", default_value_t = 20_000.0, value_parser = pages_per_second)]
    rate: f64,
    /// Its RAM.
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "1G")]
    memory: u64,
    /// How steep --writer zipf is.
    #[arg(long, value_name = "NUMBER", default_value_t = 1.0, value_parser = exponent)]
    exponent: f64,
    /// Seed of the random numbers.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// What the link carries, for example 2.5Gbit, or 100M in bytes.
    #[arg(long, value_name = "RATE", value_parser = rate, default_value = "1Gbit")]
    bandwidth: u64,
    /// The link's round trip.
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "0.2ms")]
    round_trip: Duration,
}

/// The most writes per second that a simulation follows one by one.
const FASTEST: f64 = 10e6;
/// The largest simulated guest: its bitmaps and counters take about 1/3000 of it.
const LARGEST: u64 = 1 << 40;

fn pages_per_second(text: &str) -> Result<f64, String> {
    let rate = text.parse::<f64>().ok();
    rate.filter(|rate| (0.0..=FASTEST).contains(rate))
        .ok_or_else(|| format!("a rate is pages per second from 0 to {FASTEST}, such as 20000"))
}

fn exponent(text: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok();
    number
        .filter(|n| (0.01..=10.0).contains(n))
        .ok_or_else(|| "an exponent is a number from 0.01 to 10, such as 1.0".into())
}

/// A guest, before it is run: each run of it is the same.
pub struct Guest {
    kind: Kind,
    seed: u64,
    pub setup: Setup,
    /// What it is, in words.
    pub name: String,
}

enum Kind {
    Trace(Box<Trace>),
    Writer(Pattern, u64, f64),
}

impl Args {
    /// Reads the trace, or makes up the guest.
    ///
    /// # Errors
    /// The trace cannot be read, or the sizes do not fit.
    pub fn guest(&self) -> Result<Guest, Failure> {
        let (bandwidth, round_trip) = (self.bandwidth as f64, self.round_trip);
        let (kind, setup, name) = match (&self.trace, self.writer) {
            (Some(path), _) => {
                let trace = record::read(path)?;
                let header = trace.header();
                let what = header.workload.as_ref().or(header.name.as_ref());
                let what =
                    what.map_or_else(|| "a guest".to_owned(), |w| w.escape_debug().to_string());
                let name = format!(
                    "{what} of {}, recorded for {:.1} s every {} ms",
                    memory(header.memory_bytes),
                    trace.duration().as_secs_f64(),
                    header.interval_us / 1000
                );
                let setup = Setup::recorded(&trace, bandwidth, round_trip);
                (Kind::Trace(Box::new(trace)), setup, name)
            }
            (None, Some(choice)) => {
                let (kind, layout, name) = self.synthetic(choice)?;
                let setup = Setup::with_round_trip(layout, bandwidth, round_trip);
                (kind, setup, name)
            }
            (None, None) => {
                return Err(Failure(
                    "name a guest to simulate: --trace PATH (from `ferry record`) or --writer uniform|sequential|zipf"
                        .into(),
                ));
            }
        };
        Ok(Guest {
            kind,
            seed: self.seed,
            setup,
            name,
        })
    }

    fn synthetic(&self, choice: Choice) -> Result<(Kind, RamLayout, String), Failure> {
        if !(PAGE_BYTES..=LARGEST).contains(&self.memory) {
            return Err(Failure(format!(
                "a guest of {} cannot be simulated; give --memory 4K to 1T",
                memory(self.memory)
            )));
        }
        if self.wss > self.memory {
            return Err(Failure(format!(
                "the working set of {} does not fit into {} of memory; give --wss or --memory",
                memory(self.wss),
                memory(self.memory)
            )));
        }
        let layout = RamLayout::new(vec![Run::new(0, self.memory / PAGE_BYTES)])?;
        let (pattern, how) = match choice {
            Choice::Uniform => (Pattern::Uniform, "uniformly"),
            Choice::Sequential => (Pattern::Sequential, "in sequence"),
            Choice::Zipf => (
                Pattern::Zipf {
                    exponent: self.exponent,
                },
                "by Zipf's law",
            ),
        };
        let name = format!(
            "a writer of {} pages/s, {how} in {} of {}",
            self.rate,
            memory(self.wss),
            memory(self.memory)
        );
        Ok((
            Kind::Writer(pattern, self.wss / PAGE_BYTES, self.rate),
            layout,
            name,
        ))
    }
}

impl Guest {
    /// A run of it from its beginning.
    #[must_use]
    pub fn activity(&self) -> Box<dyn Activity + '_> {
        match &self.kind {
            Kind::Trace(trace) => Box::new(Replay::new(trace, self.seed)),
            Kind::Writer(pattern, pages, rate) => {
                let writer = Writer::new(&self.setup.layout, *pattern, *pages, *rate, self.seed);
                Box::new(writer)
            }
        }
    }
}
