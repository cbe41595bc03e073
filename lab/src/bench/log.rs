//! The guest's own words, before and after the move.

use super::interrupt;
use ferry_guest_images::{Line, Work};
use ferry_terminal::output::Failure;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

/// Milliseconds between two lines of a guest about its progress.
pub const STAT_MS: u64 = 100;

/// What a serial port has printed into a file.
pub struct Log(pub PathBuf);

impl Log {
    /// All of it; nothing while the file is not there.
    pub fn text(&self) -> String {
        fs::read(&self.0).map_or_else(|_| String::new(), |b| String::from_utf8_lossy(&b).into())
    }

    /// Waits for a line of which `wanted` makes a value, and returns it. `alive` fails when no more
    /// lines can come.
    pub fn wait<T>(
        &self,
        what: &str,
        timeout: Duration,
        alive: impl Fn() -> Result<(), Failure>,
        wanted: impl Fn(&Line<'_>) -> Option<T>,
    ) -> Result<T, Failure> {
        let late = || format!("the guest has not told {what} in {timeout:?}");
        interrupt::until(timeout, late, || {
            let text = self.text();
            // What follows the last line end is still being printed.
            let whole = text.rfind('\n').map_or("", |end| &text[..end]);
            for line in whole.lines().filter_map(Line::parse) {
                if let Line::Fault { .. } | Line::Error(_) | Line::Corrupt(_) = line {
                    return Err(Failure(format!("the guest says: {line}")));
                }
                if let Some(found) = wanted(&line) {
                    return Ok(Some(found));
                }
            }
            alive().map(|()| None)
        })
    }

    /// How many lines about its progress the guest has printed.
    pub fn stats(&self) -> usize {
        stats(&self.text()).len()
    }

    /// Where a kernel was when it last told.
    pub fn step(&self) -> Option<Step> {
        stats(&self.text()).last()?.step
    }
}

/// Where a kernel is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// The run, from 1: a guest begins another as soon as one is over.
    pub run: u64,
    /// Iterations of its timed loop that are over.
    pub done: u32,
    /// How many it has; 0 while the run is set up.
    pub total: u32,
}

impl Step {
    /// Whether it is in its timed loop: neither set up nor verified.
    pub const fn timed(self) -> bool {
        self.done < self.total
    }

    /// Whether a move should begin here: at least one iteration is over, and at most a quarter of
    /// the loop. Before the first iteration memory can be nearly all zero (`mg`).
    pub const fn early(self) -> bool {
        let quarter = self.total / 4;
        let most = if quarter > 1 { quarter } else { 1 };
        self.timed() && self.done >= 1 && self.done <= most
    }
}

/// A line about the guest's progress.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Stat {
    /// Where it ends in the text.
    end: usize,
    /// The guest's clock.
    t_ms: f64,
    /// What it has done, in units of its work.
    done: f64,
    /// Where a kernel is; nothing of the writer.
    step: Option<Step>,
    /// The longest gap since the line before.
    gap_ms: f64,
}

impl Stat {
    /// Whether the work from this line to the next one counts; only a kernel's timed loop does.
    fn counts(&self, next: &Self) -> bool {
        match (self.step, next.step) {
            (Some(from), Some(to)) => from.timed() && from.run == to.run,
            _ => true,
        }
    }
}

fn stats(text: &str) -> Vec<Stat> {
    let mut end = 0;
    let mut found = Vec::new();
    for line in text.split_inclusive('\n') {
        end += line.len();
        if !line.ends_with('\n') {
            continue;
        }
        if let Some(Line::Stat { t_ms, work, gaps }) = Line::parse(line) {
            let (done, step) = match work {
                Work::Writes { writes, .. } => (writes as f64, None),
                Work::Steps { run, done, total } => {
                    let part = f64::from(done) / f64::from(total.max(1));
                    let step = Step { run, done, total };
                    (run.saturating_sub(1) as f64 + part.min(1.0), Some(step))
                }
            };
            found.push(Stat {
                end,
                t_ms: t_ms as f64,
                done,
                step,
                gap_ms: gaps.last_us as f64 / 1e3,
            });
        }
    }
    found
}

/// What the guest saw of its move.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Seen {
    /// The longest time that it did not run, in the tenth of a second of the move.
    pub gap_ms: f64,
    /// The longest from the request until a second after the source has gone.
    pub worst_ms: f64,
    /// The median over ordinary seconds before the request: of each the longest.
    pub noise_ms: f64,
    /// Its work per second before the request; a kernel's in its timed loop, in runs.
    pub base: f64,
    /// Work per second over time: milliseconds since the request (negative before it), and the rate
    /// until then.
    pub series: Vec<(f64, f64)>,
    /// When it arrived, in milliseconds since the request, to a tenth of a second.
    pub moved_ms: f64,
    /// What of a kernel was moved; nothing of the writer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub course: Option<Course>,
    /// The work that was lost from the request until a second after the source had gone, in
    /// milliseconds of undisturbed work.
    pub lost_ms: f64,
}

/// What a kernel did while it was moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Course {
    /// Where it was when it last told before the request.
    pub from: Step,
    /// Where it was when it first told at the destination.
    pub to: Step,
    /// How long it was not in its timed loop meanwhile, in milliseconds: verifying, and setting up
    /// another run.
    pub beside_ms: f64,
}

impl fmt::Display for Course {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            from,
            to,
            beside_ms,
        } = self;
        // Set up it has not been told how many there are.
        let total = from.total.max(to.total);
        write!(f, "iterations {} to {} of {total}", from.done, to.done)?;
        match to.run.saturating_sub(from.run) {
            0 => {}
            1 => f.write_str(", one run later")?,
            n => write!(f, ", {n} runs later")?,
        }
        if *beside_ms > 0.0 {
            write!(f, ", {:.1} s beside the timed loop", beside_ms / 1e3)?;
        }
        Ok(())
    }
}

/// How much of a long series is kept.
const SERIES: usize = 20_000;

/// Work from one line to the next.
struct Rate {
    /// Until when, in milliseconds since the request.
    until_ms: f64,
    per_second: f64,
    span_ms: f64,
    /// Whether it is to be compared.
    counts: bool,
}

impl Rate {
    /// The rate between two lines; `zero` is when the request was.
    fn of(pair: &[Stat], zero: f64) -> Self {
        let (from, to) = (&pair[0], &pair[1]);
        let span_ms = (to.t_ms - from.t_ms).max(1.0);
        Self {
            until_ms: to.t_ms - zero,
            per_second: (to.done - from.done).max(0.0) / span_ms * 1e3,
            span_ms,
            counts: from.counts(to),
        }
    }
}

/// Reads what was printed at the source (of which `before` bytes before the request), and what was
/// printed at the destination (of which `until` bytes until a second after the source had gone).
///
/// A line tells of the time since the line before. The move falls into the first line that was
/// begun at the destination. One that was begun at the source and ended at the destination had its
/// figures before the move; the next one counts then, and the longer of the two is taken.
pub fn seen(source: &str, before: usize, destination: &str, until: usize) -> Result<Seen, Failure> {
    let text = format!("{source}{destination}");
    let ready = source
        .find("ready")
        .ok_or_else(|| Failure("the guest was not ready before it moved".into()))?;
    // The line that tells of the time before "ready" is of the filling of memory.
    let all: Vec<Stat> = stats(&text)
        .into_iter()
        .filter(|stat| stat.end > ready)
        .skip(1)
        .collect();
    let torn = !source.is_empty() && !source.ends_with('\n');
    let move_lines = if torn { 2 } else { 1 };
    let first = all.partition_point(|stat| stat.end <= source.len());
    let moved = all.get(first..first + move_lines).ok_or_else(|| {
        Failure("the guest has told too little at the destination to know its gap".into())
    })?;
    let longest = |stats: &[Stat]| stats.iter().map(|s| s.gap_ms).fold(0.0, f64::max);
    let asked = all.partition_point(|stat| stat.end <= before);
    let over = all
        .partition_point(|stat| stat.end <= source.len() + until)
        .max(first + move_lines);
    let ordinary = &all[..asked.min(first)];
    let mut seconds: Vec<f64> = ordinary
        .chunks(usize::try_from(1000 / STAT_MS).unwrap_or(1))
        .map(longest)
        .collect();
    seconds.sort_by(f64::total_cmp);
    let zero = ordinary.last().map_or(all[0].t_ms, |stat| stat.t_ms);
    let rates: Vec<Rate> = all.windows(2).map(|pair| Rate::of(pair, zero)).collect();
    let work = |(done, time): (f64, f64), rate: &Rate| {
        if rate.counts {
            (done + rate.per_second * rate.span_ms, time + rate.span_ms)
        } else {
            (done, time)
        }
    };
    let quiet = rates.iter().take(asked.saturating_sub(1));
    let (done, time) = quiet.fold((0.0, 0.0), work);
    let base = if time > 0.0 { done / time } else { 0.0 };
    let during = rates.get(asked.saturating_sub(1)..over.saturating_sub(1));
    let (done, time) = during.unwrap_or_default().iter().fold((0.0, 0.0), work);
    let meanwhile = rates.get(asked.saturating_sub(1)..first);
    let course = ordinary
        .last()
        .and_then(|stat| stat.step)
        .zip(moved[0].step);
    Ok(Seen {
        gap_ms: longest(moved),
        worst_ms: longest(all.get(asked.min(first)..over).unwrap_or(moved)),
        noise_ms: seconds.get(seconds.len() / 2).copied().unwrap_or(0.0),
        base,
        moved_ms: moved[0].t_ms - zero,
        course: course.map(|(from, to)| Course {
            from,
            to,
            beside_ms: {
                let rates = meanwhile.unwrap_or_default().iter();
                let beside = rates.filter(|rate| !rate.counts);
                beside.fold(0.0, |sum, rate| sum + rate.span_ms)
            },
        }),
        lost_ms: if base > 0.0 {
            (time - done / base).max(0.0)
        } else {
            0.0
        },
        // What comes after is the guest's verification of its memory.
        series: rates
            .iter()
            .take(over.saturating_sub(1).min(SERIES))
            .map(|rate| (rate.until_ms, rate.per_second))
            .collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(t_ms: u64, writes: u64, gap_us: u64) -> String {
        format!(
            "ferry-guest: stat t_ms={t_ms} writes={writes} corrupt=0 gap_us={gap_us} gap_max_us=0 gap_max_at_ms=0\n"
        )
    }

    fn guest(from: u64, lines: u64, gap_us: u64) -> String {
        (from..from + lines)
            .map(|n| line(n * 100, n * 500, gap_us))
            .collect()
    }

    #[test]
    fn the_gap_is_of_the_move_and_the_noise_of_the_time_before() {
        let source = format!(
            "ferry-guest: ready t_ms=90\n{}{}",
            line(100, 0, 999_000),
            guest(2, 20, 120)
        );
        let before = source.len();
        let source = source + &guest(22, 5, 2_000);
        // A pause of 50 ms, then an undisturbed guest; far later a hiccup that is none of ours.
        let destination = line(2750, 13_500, 50_000) + &guest(28, 10, 3_000);
        let until = destination.len();
        let destination = destination + &guest(38, 2, 70_000);
        let seen = seen(&source, before, &destination, until).unwrap();
        assert_eq!(
            (seen.gap_ms, seen.worst_ms, seen.noise_ms),
            (50.0, 50.0, 0.12)
        );
        assert_eq!(seen.base, 5000.0);
        assert_eq!(seen.moved_ms, 650.0);
        // 50 ms too late, and made up for in the next line: the writer's own rhythm.
        assert!(seen.lost_ms < 1.0, "{}", seen.lost_ms);
        assert!(seen.series.first().unwrap().0 < 0.0);
    }

    #[test]
    fn a_line_that_the_move_tore_counts_with_the_next() {
        let source = format!("ferry-guest: ready t_ms=90\n{}", guest(1, 20, 100));
        let before = source.len();
        let torn = line(2100, 10_500, 100);
        let (left, right) = torn.split_at(30);
        let destination = format!("{right}{}{}", line(2230, 11_000, 30_000), guest(24, 5, 100));
        let seen = seen(
            &format!("{source}{left}"),
            before,
            &destination,
            destination.len(),
        )
        .unwrap();
        assert_eq!(seen.gap_ms, 30.0);
    }

    #[test]
    fn lost_work_is_measured_in_time() {
        let source = format!("ferry-guest: ready t_ms=90\n{}", guest(1, 20, 100));
        // Half a second without any work, at full rate after that.
        let destination: String = (21..26).map(|n| line(n * 100, 10_000, 90_000)).collect();
        let rest: String = (26..36)
            .map(|n| line(n * 100, 10_000 + (n - 25) * 500, 100))
            .collect();
        let destination = destination + &rest;
        let seen = seen(&source, source.len(), &destination, destination.len()).unwrap();
        assert!((seen.lost_ms - 500.0).abs() < 1.0, "{}", seen.lost_ms);
    }

    fn kernel(t_ms: u64, run: u64, done: u32, total: u32) -> String {
        format!(
            "ferry-guest: stat t_ms={t_ms} nas_run={run} step={done}/{total} gap_us=100 gap_max_us=0 gap_max_at_ms=0\n"
        )
    }

    #[test]
    fn a_move_begins_early_in_a_loop() {
        let early = |done, total| {
            Step {
                run: 1,
                done,
                total,
            }
            .early()
        };
        assert!(early(1, 4) && early(1, 1 << 20) && early(5, 20));
        // Set-up, no iteration yet, too late, verified, and a loop of a single iteration.
        for (done, total) in [(0, 0), (0, 4), (2, 4), (6, 20), (20, 20), (1, 1)] {
            assert!(!early(done, total), "{done}/{total}");
        }
    }

    #[test]
    fn of_a_kernel_only_its_loop_is_compared() {
        // Ten iterations a second, at the source.
        let run = |from: u64, number| -> String {
            (0..=10)
                .map(|n| kernel(from + u64::from(n) * 100, number, n, 10))
                .collect()
        };
        let source = format!(
            "{}ferry-guest: ready t_ms=90\n{}{}{}",
            kernel(80, 1, 0, 0),
            run(100, 1),
            kernel(1200, 2, 0, 0),
            run(1300, 2)
        );
        let before = source.find("nas_run=2 step=3/10").unwrap();
        // Half a second is lost in the loop, and half a second goes by beside it.
        let destination: String = [
            kernel(2800, 3, 0, 0),
            kernel(2900, 3, 0, 10),
            kernel(3500, 3, 1, 10),
            kernel(3600, 3, 2, 10),
        ]
        .concat();
        let seen = seen(&source, before, &destination, destination.len()).unwrap();
        assert!((seen.base - 1.0).abs() < 1e-9, "{}", seen.base);
        assert!((seen.lost_ms - 500.0).abs() < 1e-6, "{}", seen.lost_ms);
        let course = seen.course.unwrap();
        assert_eq!((course.from.run, course.from.done), (2, 2));
        assert_eq!((course.to.run, course.beside_ms), (3, 500.0));
        let words = course.to_string();
        assert_eq!(
            words,
            "iterations 2 to 0 of 10, one run later, 0.5 s beside the timed loop"
        );
    }

    #[test]
    fn too_little_is_said_so() {
        let source = format!("ferry-guest: ready t_ms=90\n{}", guest(1, 5, 100));
        assert!(seen(&source, source.len(), "", 0).is_err());
        assert!(seen("", 0, "", 0).is_err());
    }
}
