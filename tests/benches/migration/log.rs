//! The guest's own words, before and after the move.

use anyhow::{Context, Result, bail};
use ferry_guest_images::{Gaps, Line};
use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// What a serial port has printed into a file.
pub struct Log(pub PathBuf);

impl Log {
    /// All of it; nothing while the file is not there.
    pub fn text(&self) -> String {
        fs::read(&self.0).map_or_else(|_| String::new(), |b| String::from_utf8_lossy(&b).into())
    }

    /// Waits until a line does, and returns what `wanted` made of it.
    pub fn wait<T>(
        &self,
        what: &str,
        patience: Duration,
        wanted: impl Fn(&Line<'_>) -> Option<T>,
    ) -> Result<T> {
        let began = Instant::now();
        loop {
            let text = self.text();
            // What follows the last line end is still being printed.
            let whole = text.rfind('\n').map_or("", |end| &text[..end]);
            for line in whole.lines().filter_map(Line::parse) {
                if let Line::Fault { .. } | Line::Error(_) | Line::Corrupt(_) = line {
                    bail!("the guest says: {line}");
                }
                if let Some(found) = wanted(&line) {
                    return Ok(found);
                }
            }
            if began.elapsed() > patience {
                let name = self.0.display();
                bail!("the guest has not said {what} in {patience:?}; {name} has:\n{text}");
            }
            sleep(Duration::from_millis(20));
        }
    }

    /// How many seconds the guest has told of.
    pub fn stats(&self) -> usize {
        self.text()
            .lines()
            .filter(|line| matches!(Line::parse(line), Some(Line::Stat { .. })))
            .count()
    }
}

/// The gaps that the guest saw, in milliseconds.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// The longest around the move.
    pub gap_ms: f64,
    /// The longest in the second after that.
    pub after_ms: f64,
    /// The median over the seconds before the migration: of each the longest.
    pub noise_ms: f64,
}

fn ms(gaps: &Gaps) -> f64 {
    gaps.last_us as f64 / 1e3
}

fn gaps(text: &str) -> Vec<(usize, f64)> {
    let mut at = 0;
    let mut found = Vec::new();
    for line in text.split_inclusive('\n') {
        at += line.len();
        if let (true, Some(Line::Stat { gaps, .. })) = (line.ends_with('\n'), Line::parse(line)) {
            found.push((at, ms(&gaps)));
        }
    }
    found
}

/// Reads what was printed at the source up to the move, and what was printed at the destination.
///
/// A line is printed once a second and tells of the time since the line before. The move falls into the first line that
/// was begun at the destination. One that was begun at the source and ended at the destination had its figures before
/// the move; the next one counts then, and the longer of the two is taken.
pub fn seen(source: &Path, source_before: usize, destination: &str) -> Result<Seen> {
    let source = Log(source.to_owned()).text();
    let text = format!("{source}{destination}");
    let all = gaps(&text);
    let torn = !source.is_empty() && !source.ends_with('\n');
    let arrived: Vec<f64> = all
        .iter()
        .filter(|(end, _)| *end > source.len())
        .map(|(_, gap)| *gap)
        .collect();
    let lines = if torn { 2 } else { 1 };
    if arrived.len() < lines {
        bail!("the guest has told of too few seconds at the destination:\n{text}");
    }
    let gap_ms = arrived[..lines].iter().copied().fold(0.0, f64::max);
    let before = gaps(source.get(..source_before).unwrap_or(&source));
    // The line that tells of the time before "ready" is of the filling of memory.
    let ready = source.find("ready").context("the guest was not ready")?;
    let mut ordinary: Vec<f64> = before
        .iter()
        .filter(|(end, _)| *end > ready)
        .map(|(_, gap)| *gap)
        .collect();
    ordinary.sort_by(f64::total_cmp);
    let noise_ms = ordinary.get(ordinary.len() / 2).copied().unwrap_or(0.0);
    Ok(Seen {
        gap_ms,
        after_ms: arrived.get(lines).copied().unwrap_or(0.0),
        noise_ms,
    })
}
