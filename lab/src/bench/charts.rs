//! The results as plots.

use super::measure::Figures;
use super::statistics::{Metric, Row};
use crate::plot::{Bar, Lines, Series, lines_svg, lying_bars_svg};
use ferry_terminal::output::Failure;

/// The most curves of a plot: more could not be told from each other in print.
const CURVES: usize = 6;
/// What a curve shows before the request and after the end, in milliseconds.
const MARGIN_MS: f64 = 2000.0;
/// Lines of a kernel for each point of a curve: a kernel counts whole iterations, and there may be
/// none in a tenth of a second.
const WHOLE: usize = 10;

/// Bars of a metric, one for each policy that has it.
fn bars(rows: &[Row<'_>], name: &str, title: &str, unit: &str) -> Result<Option<String>, Failure> {
    let Some(metric) = Metric::named(name) else {
        return Ok(None);
    };
    let bars: Vec<Bar> = rows
        .iter()
        .filter_map(|row| {
            let spread = row.spread(metric)?;
            Some(Bar {
                name: row.cell.policy.name.clone(),
                value: spread.median,
                range: (spread.min, spread.max),
                first: row.cell.policy.ours(),
            })
        })
        .collect();
    if bars.is_empty() {
        return Ok(None);
    }
    lying_bars_svg(title, unit, &bars).map(Some)
}

/// Curves of the typical run of each policy, in as many plots as they need.
fn curves(
    rows: &[Row<'_>],
    title: &str,
    x: &str,
    y: &str,
    log_x: bool,
    points: impl Fn(&Figures) -> Vec<(f64, f64)>,
) -> Result<Vec<String>, Failure> {
    let series: Vec<(String, Vec<(f64, f64)>)> = rows
        .iter()
        .filter_map(|row| {
            let points = points(row.typical()?);
            (points.len() > 1).then(|| (row.cell.policy.name.clone(), points))
        })
        .collect();
    let plot = |some: &[(String, Vec<(f64, f64)>)]| {
        lines_svg(&Lines {
            title,
            x,
            y,
            log: (log_x, false),
            series: some
                .iter()
                .map(|(name, points)| Series {
                    name: name.clone(),
                    points: points.clone(),
                })
                .collect(),
            levels: Vec::new(),
        })
    };
    series.chunks(CURVES).map(plot).collect()
}

/// The guest's work over time, around the move; in seconds.
fn throughput(figures: &Figures) -> Vec<(f64, f64)> {
    let last = figures.told.total_ms + MARGIN_MS;
    let near = figures
        .seen
        .series
        .iter()
        .filter(|(t, _)| (-MARGIN_MS..=last).contains(t));
    let points: Vec<(f64, f64)> = near.map(|&(t, rate)| (t / 1e3, rate)).collect();
    if figures.seen.course.is_none() {
        return points;
    }
    let mean = |some: &[(f64, f64)]| {
        let sum: f64 = some.iter().map(|point| point.1).sum();
        Some((some.last()?.0, sum / some.len() as f64))
    };
    points.chunks(WHOLE).filter_map(mean).collect()
}

/// The share of page faults that a latency was enough for.
fn latencies(figures: &Figures) -> Vec<(f64, f64)> {
    let Some(faults) = &figures.told.faults else {
        return Vec::new();
    };
    let all: u64 = faults.histogram.iter().map(|bucket| bucket.count).sum();
    let mut seen = 0;
    let share = |bucket: &ferry_migration::report::Bucket| {
        seen += bucket.count;
        (bucket.upto_us, 100.0 * seen as f64 / all.max(1) as f64)
    };
    faults.histogram.iter().map(share).collect()
}

/// Every plot of a group that has something to show.
pub fn group(rows: &[Row<'_>]) -> Result<Vec<String>, Failure> {
    let mut plots = Vec::new();
    for (metric, title, unit) in [
        ("total_ms", "Total time", "ms"),
        (
            "gap_ms",
            "Downtime: the guest's own longest gap at the move",
            "ms",
        ),
        (
            "outside_ms",
            "Downtime: the longest silence of the serial port at the move",
            "ms",
        ),
        (
            "stall_ms",
            "Time that vCPUs waited for pages (post-copy)",
            "ms",
        ),
        ("link_mib", "Bytes on the link", "MiB"),
    ] {
        plots.extend(bars(rows, metric, title, unit)?);
    }
    plots.extend(curves(
        rows,
        "The guest's work over time (0: the request)",
        "seconds",
        "work per second",
        false,
        throughput,
    )?);
    plots.extend(curves(
        rows,
        "Pages dirtied per second, as the VMM saw it",
        "seconds since the request",
        "pages per second",
        false,
        |figures| {
            let rates = figures.told.dirtied.iter();
            rates.map(|&(t, rate)| (t / 1e3, rate)).collect()
        },
    )?);
    plots.extend(curves(
        rows,
        "Latency of page faults",
        "microseconds",
        "per cent of the faults that took no longer",
        true,
        latencies,
    )?);
    Ok(plots)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_migration::report::{Bucket, Faults};

    #[test]
    fn latencies_add_up_to_all() {
        let mut figures = Figures::default();
        assert!(latencies(&figures).is_empty());
        let bucket = |upto_us, count| Bucket { upto_us, count };
        figures.told.faults = Some(Faults {
            histogram: vec![bucket(10.0, 1), bucket(20.0, 2), bucket(90.0, 1)],
            ..Faults::default()
        });
        assert_eq!(
            latencies(&figures),
            [(10.0, 25.0), (20.0, 75.0), (90.0, 100.0)]
        );
    }

    #[test]
    fn a_kernel_that_counts_whole_iterations_has_an_even_curve() {
        let mut figures = Figures::default();
        figures.told.total_ms = 4000.0;
        let lines = (0..40).map(|n| (f64::from(n) * 100.0, f64::from(n % 2)));
        figures.seen.series = lines.collect();
        assert_eq!(throughput(&figures).len(), 40);
        figures.seen.course = Some(Default::default());
        let rates: Vec<f64> = throughput(&figures).iter().map(|point| point.1).collect();
        assert_eq!(rates, [0.5; 4]);
    }

    #[test]
    fn curves_end_soon_after_the_move() {
        let mut figures = Figures::default();
        figures.told.total_ms = 1000.0;
        figures.seen.series = (-100..100).map(|n| (f64::from(n) * 100.0, 5.0)).collect();
        let shown = throughput(&figures);
        assert_eq!(shown.first(), Some(&(-2.0, 5.0)));
        assert_eq!(shown.last(), Some(&(3.0, 5.0)));
    }
}
