//! Makes the runs that are missing, one after the other, and writes each down.

use super::cell::{Cell, Policy};
use super::estimate::{about, expected};
use super::interrupt;
use super::journal::{Journal, Run};
use super::measure::{Figures, load};
use super::net::Shaping;
use super::pair::{self, Machine};
use super::{cloud, qemu};
use ferry_terminal::output::{Failure, say};
use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Where the runs stand: a bar with the time left on a terminal, a line for each elsewhere.
struct Display {
    bar: Option<ProgressBar>,
    all: usize,
    done: usize,
}

impl Display {
    fn new(all: usize) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let target = ProgressDrawTarget::stderr();
            let bar = ProgressBar::with_draw_target(Some(all as u64), target);
            // A template that does not parse would leave indicatif's own style, which does as well.
            if let Ok(style) = ProgressStyle::with_template("{bar:24} {pos}/{len}{prefix}  {msg}") {
                bar.set_style(style.progress_chars("━╸ "));
            }
            bar.enable_steady_tick(Duration::from_millis(500));
            bar
        });
        Self { bar, all, done: 0 }
    }

    /// A run begins; `left` is how long all that are left are expected to take, if that is known.
    fn begin(&self, what: &str, left: Duration) {
        if let Some(bar) = &self.bar {
            bar.set_message(what.to_owned());
            if !left.is_zero() {
                bar.set_prefix(format!(", about {} left", HumanDuration(left)));
            }
        }
    }

    fn end(&mut self, sentence: &str) {
        self.done += 1;
        match &self.bar {
            Some(bar) => {
                bar.suspend(|| say(sentence));
                bar.inc(1);
            }
            None => say(&format!("{}/{} {sentence}", self.done, self.all)),
        }
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// A run in a sentence.
fn sentence(cell: &Cell, number: u32, figures: &Figures) -> String {
    let stall = figures
        .stalled_ms()
        .map(|ms| format!(", stall {ms:.0}"))
        .unwrap_or_default();
    let course = figures
        .seen
        .course
        .map(|course| format!(", in {course}"))
        .unwrap_or_default();
    format!(
        "{cell}, run {number}: total {:.0} ms, gap {:.1} ms (reported {}, noise {:.1}{stall}), {:.0} MiB{course}, {}",
        figures.told.total_ms,
        figures.seen.gap_ms,
        figures
            .told
            .downtime_ms
            .map_or_else(|| "nothing that can be".to_owned(), |ms| format!("{ms:.1}")),
        figures.seen.noise_ms,
        figures.link_bytes as f64 / f64::from(1 << 20),
        if figures.verified {
            "verified"
        } else {
            "NOT VERIFIED"
        }
    )
}

/// What cannot be measured here, said once; the rest.
fn possible(machine: &Machine, missing: Vec<(Cell, u32)>) -> Vec<(Cell, u32)> {
    if missing
        .iter()
        .any(|(cell, _)| Shaping::of(&cell.link) == Shaping::Cap)
    {
        say(
            "only root may shape a link: the senders' own caps stand in for it, and the results say so",
        );
    }
    type Theirs = fn(&Policy) -> bool;
    let peers: [(&str, Theirs, Option<String>); 2] = [
        ("QEMU", |p| p.qemu.is_some(), qemu::missing(&machine.qemu)),
        (
            "Cloud Hypervisor",
            |p| p.cloud.is_some(),
            cloud::missing(&machine.cloud),
        ),
    ];
    let mut possible = missing;
    for (name, theirs, why) in peers {
        let count = possible
            .iter()
            .filter(|(cell, _)| theirs(&cell.policy))
            .count();
        if let Some(why) = why.filter(|_| count > 0) {
            say(&format!("NOT RUN: {count} runs of {name}: {why}"));
            possible.retain(|(cell, _)| !theirs(&cell.policy));
        }
    }
    possible
}

/// How much of the time that is left may be used.
struct Budget {
    began: Instant,
    all: Option<Duration>,
    /// The round in hand.
    round: u32,
}

impl Budget {
    fn new(all: Option<Duration>) -> Self {
        Self {
            began: Instant::now(),
            all,
            round: 0,
        }
    }

    /// Whether the first of `left` may begin. A round after the first begins only if all of it is
    /// expected to fit, so that all cells have as many runs. The first round runs until the time is
    /// up.
    fn allows(&mut self, journal: &Journal, left: &[(Cell, u32)]) -> bool {
        let (Some(all), Some((_, number))) = (self.all, left.first()) else {
            return true;
        };
        let time = all.saturating_sub(self.began.elapsed());
        if *number == self.round && *number > 1 {
            return true;
        }
        self.round = *number;
        let round = left.iter().take_while(|(_, n)| n == number);
        if *number > 1 {
            let expected: Duration = round.map(|(cell, _)| expected(&journal.runs, cell)).sum();
            expected <= time
        } else {
            // What was never run may take as long as the others did.
            !time.is_zero()
                && left.first().map(|(cell, _)| expected(&journal.runs, cell)) <= Some(time)
        }
    }
}

/// How many runs of so many of each cell there are.
pub fn all(cells: &[Cell], runs: u32) -> usize {
    cells.len() * usize::try_from(runs).unwrap_or(usize::MAX)
}

/// What is to be made of `all` runs, and about how long it takes.
pub fn plan(made: &[Run], missing: &[(Cell, u32)], all: usize, budget: Option<Duration>) -> String {
    let time = missing.iter().map(|(cell, _)| expected(made, cell)).sum();
    let count = match missing.len() {
        0 => return format!("all {all} runs are made"),
        1 if all == 1 => "1 run is to be made".to_owned(),
        some if some == all => format!("{all} runs are to be made"),
        some => format!("{some} of {all} runs are to be made"),
    };
    let budget = budget.filter(|&budget| budget < time);
    let budget = budget.map_or_else(String::new, |budget| {
        format!(", of which --budget allows {}", about(budget))
    });
    format!("{count}, {}{budget}", about(time))
}

/// Makes the runs that are missing in the journal, within the budget. A failed run is recorded as
/// failed, and the others go on.
pub fn run(
    machine: &Machine,
    journal: &mut Journal,
    cells: &[Cell],
    runs: u32,
    budget: Option<Duration>,
) -> Result<(), Failure> {
    let missing = possible(machine, journal.missing(cells, runs));
    let all = all(cells, runs);
    if !missing.is_empty() {
        say(&plan(&journal.runs, &missing, all, budget));
    }
    let mut display = Display::new(missing.len());
    let mut budget = Budget::new(budget);
    for (at, (cell, number)) in missing.iter().enumerate() {
        if !budget.allows(journal, &missing[at..]) {
            drop(display);
            say(&format!(
                "the time allowed by --budget is used: {} runs are left, from run {number} of {cell} on; the same command goes on \
                 with them",
                missing.len() - at
            ));
            return Ok(());
        }
        let left = missing[at..].iter();
        let left = left.map(|(cell, _)| expected(&journal.runs, cell)).sum();
        display.begin(&cell.to_string(), left);
        let before = load();
        let began = Instant::now();
        let result = pair::run(machine, cell);
        // What was interrupted has not failed: it is made another time.
        interrupt::check()?;
        display.end(&match &result {
            Ok(figures) => sentence(cell, *number, figures),
            Err(Failure(why)) => format!("FAILED: {cell}, run {number}: {why}"),
        });
        let (figures, error) = match result {
            Ok(figures) => (Some(figures), None),
            Err(Failure(why)) => (None, Some(why)),
        };
        journal.add(Run {
            shaping: Shaping::of(&cell.link),
            cell: cell.clone(),
            number: *number,
            load: before,
            took_s: began.elapsed().as_secs_f64(),
            figures,
            error,
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::journal::Host;
    use super::super::spec::Spec;
    use super::*;

    #[test]
    fn a_budget_begins_only_rounds_that_fit() {
        let dir = tempfile::tempdir().unwrap();
        let text = "[[guest]]\nname='g'\nwork='idle:fill=none'\nmemory='32M'\n[[policy]]\nname='a'\nferry={}\n\
                    [[policy]]\nname='b'\nferry={policy='mplm'}\n";
        let cells = Spec::parse("x", text).unwrap().cells;
        let mut journal = Journal::open(&dir.path().join("r"), Host::default()).unwrap();
        let missing = journal.missing(&cells, 3);
        let hour = Duration::from_secs(3600);
        assert!(Budget::new(None).allows(&journal, &missing));
        assert!(Budget::new(Some(hour)).allows(&journal, &missing));
        assert!(!Budget::new(Some(Duration::ZERO)).allows(&journal, &missing));
        for cell in &cells {
            journal
                .add(Run {
                    cell: cell.clone(),
                    number: 1,
                    shaping: Shaping::of(&cell.link),
                    load: String::new(),
                    took_s: 1000.0,
                    figures: Some(Figures::default()),
                    error: None,
                })
                .unwrap();
        }
        // Two runs of 1000 s fit into an hour, not into half an hour; a round that began goes on.
        let missing = journal.missing(&cells, 3);
        let said = plan(&journal.runs, &missing, 6, Some(hour));
        assert_eq!(
            said,
            "4 of 6 runs are to be made, about 67 min, of which --budget allows about 60 min"
        );
        assert!(!Budget::new(Some(hour / 2)).allows(&journal, &missing));
        let mut budget = Budget::new(Some(hour));
        assert!(budget.allows(&journal, &missing));
        budget.all = Some(Duration::ZERO);
        assert!(budget.allows(&journal, &missing[1..]));
        assert!(!budget.allows(&journal, &missing[2..]));
    }
}
