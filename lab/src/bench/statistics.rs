//! What many runs have in common.

use super::cell::Cell;
use super::forecast::Forecast;
use super::journal::Run;
use super::measure::Figures;

/// The smallest, the middle and the largest of some values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    pub min: f64,
    pub median: f64,
    pub max: f64,
}

/// The spread of values; nothing of nothing.
pub fn spread(mut values: Vec<f64>) -> Option<Spread> {
    values.retain(|value| !value.is_nan());
    values.sort_by(f64::total_cmp);
    let (min, max) = (*values.first()?, *values.last()?);
    let half = values.len() / 2;
    let median = if values.len() % 2 == 1 {
        values[half]
    } else {
        f64::midpoint(values[half - 1], values[half])
    };
    Some(Spread { min, median, max })
}

/// A figure of a run.
pub struct Metric {
    /// As bench files and tables of results call it.
    pub name: &'static str,
    /// The head of its column.
    pub head: &'static str,
    /// What it is, for the legend.
    pub meaning: &'static str,
    /// Whether a narrow table has it.
    pub main: bool,
    /// Digits after the point.
    pub digits: usize,
    of: fn(&Figures, &Cell) -> Option<f64>,
}

const MIB: f64 = (1 << 20) as f64;

/// Every metric; all but the model's are better when they are smaller.
pub const METRICS: [Metric; 27] = [
    metric(
        true,
        "total_ms",
        "total ms",
        0,
        "from the request until the source may be discarded, by the VMM's clock",
        |f, _| Some(f.told.total_ms),
    ),
    metric(
        true,
        "gap_ms",
        "gap ms",
        1,
        "the longest time that the guest did not run, by its own clock, in the tenth of a second of the move",
        |f, _| Some(f.seen.gap_ms),
    ),
    metric(
        true,
        "outside_ms",
        "outside",
        1,
        "the longest silence at the move, in ms, for a listener on the serial port, to which the guest sends a byte every 2 ms",
        |f, _| f.outside_ms,
    ),
    metric(
        true,
        "downtime_ms",
        "down ms",
        1,
        "the downtime that the VMM reports",
        |f, _| f.told.downtime_ms,
    ),
    metric(
        false,
        "error_ms",
        "|d−gap|",
        1,
        "how far the reported downtime is from the guest's gap",
        |f, _| f.error_ms(),
    ),
    metric(
        false,
        "worst_ms",
        "worst ms",
        1,
        "the guest's longest gap from the request until a second after the source has gone",
        |f, _| Some(f.seen.worst_ms),
    ),
    metric(
        true,
        "noise_ms",
        "noise",
        1,
        "the same in ordinary seconds before: a gap below it says nothing",
        |f, _| Some(f.seen.noise_ms),
    ),
    metric(
        true,
        "stall_ms",
        "stall ms",
        1,
        "the time that vCPUs waited for pages (post-copy)",
        |f, _| f.stalled_ms(),
    ),
    metric(
        true,
        "faults",
        "faults",
        0,
        "page faults that crossed the network (post-copy)",
        |f, _| f.told.faults.as_ref().map(|faults| faults.count as f64),
    ),
    metric(
        true,
        "fault_p50_us",
        "p50 µs",
        0,
        "their median latency; QEMU does not tell",
        |f, _| latency(f, |l| l.p50_us),
    ),
    metric(
        true,
        "fault_p99_us",
        "p99 µs",
        0,
        "their 99th percentile; QEMU does not tell",
        |f, _| latency(f, |l| l.p99_us),
    ),
    metric(
        true,
        "link_mib",
        "link MiB",
        1,
        "what the link carried, with all headers (on loopback other traffic too)",
        |f, _| Some(f.link_bytes as f64 / MIB),
    ),
    metric(
        false,
        "wire_mib",
        "wire MiB",
        1,
        "what the VMM says it sent",
        |f, _| Some(f.told.wire_bytes? as f64 / MIB),
    ),
    metric(
        false,
        "pages_sent",
        "pages",
        0,
        "pages sent with their contents",
        |f, _| Some(f.told.pages_sent? as f64),
    ),
    metric(
        true,
        "pages_resent",
        "resent",
        0,
        "pages that crossed more than once",
        |f, _| Some(f.told.pages_resent? as f64),
    ),
    metric(
        false,
        "pages_zero",
        "zero",
        0,
        "pages announced as zero",
        |f, _| Some(f.told.pages_zero? as f64),
    ),
    metric(
        true,
        "lost_ms",
        "lost ms",
        0,
        "work that the guest did not do from the request until a second after the source has gone, in time; of a kernel in its timed loop",
        |f, _| Some(f.seen.lost_ms),
    ),
    metric(
        true,
        "beside_ms",
        "beside ms",
        0,
        "how long a kernel was not in its timed loop from the request until it had arrived: its run ended, was verified, and another was set up",
        |f, _| f.seen.course.map(|course| course.beside_ms),
    ),
    metric(
        true,
        "cpu_s_per_gib",
        "CPU s/GiB",
        2,
        "CPU seconds of both processes, without vCPU threads, per GiB of guest memory",
        |f, cell| Some((f.source.cpu_s + f.destination.cpu_s) * 1024.0 / cell.guest.mib() as f64),
    ),
    metric(
        false,
        "source_rss_mib",
        "src RSS",
        1,
        "the most that the source held beyond the guest's memory, in MiB",
        |f, _| Some(f.source.own_kib as f64 / 1024.0),
    ),
    metric(
        false,
        "destination_rss_mib",
        "dst RSS",
        1,
        "the same of the destination",
        |f, _| Some(f.destination.own_kib as f64 / 1024.0),
    ),
    metric(
        true,
        "over_link",
        "× link",
        3,
        "total time over (bytes that the link counted ÷ its rate)",
        |f, cell| {
            let rate = cell.link.rate? as f64;
            Some(f.told.total_ms / 1e3 * rate / (f.link_bytes as f64).max(1.0))
        },
    ),
    metric(
        false,
        "first_dirty",
        "dirty %",
        1,
        "share of the first round's pages that was dirty again after it, in per cent (ferry)",
        |f, _| {
            let round = f.told.report.pointer("/rounds/0")?;
            // The pages of post-copy follow their guest, and are not dirtied any more.
            if round.get("follows")?.as_bool()? || f.told.report.pointer("/rounds/1").is_none() {
                return None;
            }
            let number = |name: &str| round.get(name).and_then(serde_json::Value::as_f64);
            Some(100.0 * number("dirtied")? / number("pages")?.max(1.0))
        },
    ),
    metric(
        false,
        "pair_rss_mib",
        "pair RSS",
        1,
        "what a pair holds before the move beyond the guest's memory, in MiB",
        |f, _| Some((f.source.own_before_kib + f.destination.own_before_kib) as f64 / 1024.0),
    ),
    metric(
        false,
        "model_total",
        "m÷total",
        2,
        "the model's total time ÷ the measured one (ferry, shaped links)",
        |f, _| over(f, |model| model.total_ms, Some(f.told.total_ms)),
    ),
    metric(
        false,
        "model_downtime",
        "m÷down",
        2,
        "the model's downtime ÷ the reported one",
        |f, _| over(f, |model| model.downtime_ms, f.told.downtime_ms),
    ),
    metric(
        false,
        "model_bytes",
        "m÷wire",
        2,
        "the model's bytes ÷ those that ferry sent",
        |f, _| {
            over(
                f,
                |model| model.bytes,
                f.told.wire_bytes.map(|bytes| bytes as f64),
            )
        },
    ),
];

const fn metric(
    main: bool,
    name: &'static str,
    head: &'static str,
    digits: usize,
    meaning: &'static str,
    of: fn(&Figures, &Cell) -> Option<f64>,
) -> Metric {
    Metric {
        name,
        main,
        head,
        meaning,
        digits,
        of,
    }
}

/// The model's figure ÷ the measured one.
fn over(figures: &Figures, of: fn(&Forecast) -> f64, measured: Option<f64>) -> Option<f64> {
    let measured = measured.filter(|measured| *measured > 0.0)?;
    Some(of(figures.forecast.as_ref()?) / measured)
}

fn latency(figures: &Figures, of: fn(&ferry_migration::report::Faults) -> f64) -> Option<f64> {
    let faults = figures.told.faults.as_ref()?;
    (!faults.histogram.is_empty()).then(|| of(faults))
}

impl Metric {
    /// The metric of that name.
    pub fn named(name: &str) -> Option<&'static Self> {
        METRICS.iter().find(|metric| metric.name == name)
    }

    /// Its value in a run.
    pub fn of(&self, figures: &Figures, cell: &Cell) -> Option<f64> {
        (self.of)(figures, cell)
    }

    /// A value as its column shows it.
    pub fn show(&self, value: Option<f64>) -> String {
        value.map_or_else(|| "–".to_owned(), |v| format!("{v:.*}", self.digits))
    }
}

/// The runs of a cell.
pub struct Row<'a> {
    pub cell: &'a Cell,
    pub good: Vec<(&'a Run, &'a Figures)>,
    pub failed: Vec<&'a Run>,
}

impl<'a> Row<'a> {
    /// The runs of one cell, out of all.
    pub fn of(cell: &'a Cell, runs: &'a [Run]) -> Self {
        let of_cell = || runs.iter().filter(|run| run.cell == *cell);
        Self {
            cell,
            good: of_cell()
                .filter_map(|run| Some((run, run.figures.as_ref()?)))
                .collect(),
            failed: of_cell().filter(|run| run.figures.is_none()).collect(),
        }
    }

    /// The spread of a metric over the runs that succeeded.
    pub fn spread(&self, metric: &Metric) -> Option<Spread> {
        let values = self.good.iter();
        spread(
            values
                .filter_map(|(_, figures)| metric.of(figures, self.cell))
                .collect(),
        )
    }

    /// Its median.
    pub fn median(&self, metric: &Metric) -> Option<f64> {
        self.spread(metric).map(|spread| spread.median)
    }

    /// The run whose total time is the median: the one to draw.
    pub fn typical(&self) -> Option<&'a Figures> {
        let mut runs: Vec<&Figures> = self.good.iter().map(|(_, figures)| *figures).collect();
        runs.sort_by(|a, b| a.told.total_ms.total_cmp(&b.told.total_ms));
        runs.get(runs.len().saturating_sub(1) / 2).copied()
    }

    /// How many runs found the guest intact.
    pub fn verified(&self) -> usize {
        self.good.iter().filter(|(_, f)| f.verified).count()
    }
}

/// The rows of the cells that have runs, group by group.
pub fn groups<'a>(cells: &'a [Cell], runs: &'a [Run]) -> Vec<Vec<Row<'a>>> {
    let mut groups: Vec<Vec<Row<'a>>> = Vec::new();
    for cell in cells {
        let row = Row::of(cell, runs);
        if row.good.is_empty() && row.failed.is_empty() {
            continue;
        }
        // A file may name one group in two places.
        let group = groups
            .iter_mut()
            .find(|g| g[0].cell.group() == cell.group());
        match group {
            Some(group) => group.push(row),
            None => groups.push(vec![row]),
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn spreads() {
        assert_eq!(spread(Vec::new()), None);
        assert_eq!(spread(vec![f64::NAN]), None);
        let of = |values: &[f64]| spread(values.to_vec()).unwrap();
        assert_eq!(
            of(&[3.0]),
            Spread {
                min: 3.0,
                median: 3.0,
                max: 3.0
            }
        );
        assert_eq!(of(&[4.0, 1.0]).median, 2.5);
        assert_eq!(of(&[9.0, 1.0, 2.0]).median, 2.0);
    }

    #[test]
    fn names_of_metrics_are_their_own() {
        for (index, metric) in METRICS.iter().enumerate() {
            let found = METRICS.iter().position(|m| m.name == metric.name);
            assert_eq!(found, Some(index), "{}", metric.name);
        }
        assert!(Metric::named("speed").is_none());
    }

    proptest! {
        #[test]
        fn half_lie_on_each_side_of_the_median(values in proptest::collection::vec(-1e9f64..1e9, 1..50)) {
            let found = spread(values.clone()).unwrap();
            let below = values.iter().filter(|v| **v < found.median).count();
            let above = values.iter().filter(|v| **v > found.median).count();
            prop_assert!(below * 2 <= values.len() && above * 2 <= values.len());
            prop_assert!(found.min <= found.median && found.median <= found.max);
        }
    }
}
