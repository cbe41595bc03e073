//! A running migration, shown: a bar on a terminal, lines elsewhere, or nothing.

use crate::output::clean;
use crate::units::{grouped, span, traffic};
use ferry_migration::report::{Event, Phase, Progress, Round};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// Rounds that get a line each.
const FIRST_ROUNDS: u32 = 8;

/// How it is shown.
pub enum Display {
    /// A bar that is redrawn.
    Bar(ProgressBar),
    /// A line a second, and one for each of the first rounds.
    Lines {
        /// When the last line was written.
        last: Option<Instant>,
    },
    /// Not at all.
    Nothing,
}

impl Display {
    /// `--progress` insists where stderr is no terminal, `--quiet` forbids.
    pub fn new(insist: bool, quiet: bool) -> Self {
        if quiet {
            Self::Nothing
        } else if std::io::stderr().is_terminal() {
            let bar = ProgressBar::with_draw_target(Some(1), ProgressDrawTarget::stderr());
            // A template that does not parse would leave indicatif's own style, which does as well.
            if let Ok(style) =
                ProgressStyle::with_template("{spinner} {bar:24} {percent:>3} %  {msg}")
            {
                bar.set_style(style.progress_chars("━╸ "));
            }
            bar.set_message("connecting");
            // The spinner shows that we are alive even when no event comes.
            bar.enable_steady_tick(Duration::from_millis(200));
            Self::Bar(bar)
        } else if insist {
            Self::Lines { last: None }
        } else {
            Self::Nothing
        }
    }

    /// Shows one event.
    pub fn show(&mut self, event: &Event) {
        match (self, event) {
            (Self::Bar(bar), Event::Progress(p)) => {
                let (all, sent) = match (p.phase, p.disk_total, p.disk_pending) {
                    (Phase::Disks, Some(total), Some(left)) => (total, total.saturating_sub(left)),
                    _ => (p.round_pages, p.round_sent),
                };
                bar.set_length(all.max(1));
                bar.set_position(sent.min(all));
                bar.set_message(line(p));
            }
            (Self::Lines { last }, Event::Progress(p)) if due(*last) => {
                *last = Some(Instant::now());
                tell(&format!("{:>8}  {}", span(p.elapsed_ms), line(p)));
            }
            (Self::Bar(bar), Event::Choice { why }) => {
                bar.suspend(|| tell(&format!("chosen: {}", clean(why))));
            }
            (Self::Lines { .. }, Event::Choice { why }) => {
                tell(&format!("chosen: {}", clean(why)));
            }
            (Self::Bar(bar), Event::Steered(steered)) => {
                bar.suspend(|| tell(&format!("steered: {}", steered.change)));
            }
            (Self::Lines { .. }, Event::Steered(steered)) => {
                tell(&format!("steered: {}", steered.change));
            }
            // Late rounds can be a thousand a second.
            (Self::Lines { last }, Event::Round(r)) if r.n <= FIRST_ROUNDS || due(*last) => {
                *last = Some(Instant::now());
                tell(&round_line(r));
            }
            _ => {}
        }
    }

    /// A sentence that must not be drawn over.
    pub fn say(&self, sentence: &str) {
        match self {
            Self::Bar(bar) => bar.suspend(|| crate::output::say(sentence)),
            _ => crate::output::say(sentence),
        }
    }

    /// Takes the bar away.
    pub fn clear(&self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}

fn due(last: Option<Instant>) -> bool {
    last.is_none_or(|l| l.elapsed() >= Duration::from_secs(1))
}

fn tell(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// A progress in a line.
pub fn line(p: &Progress) -> String {
    let bandwidth = if p.mbps > 0.0 {
        format!(", {:.1} MB/s", p.mbps)
    } else {
        String::new()
    };
    let downtime = p
        .predicted_downtime_ms
        .map(|ms| format!(", downtime ≈ {}", span(ms)))
        .unwrap_or_default();
    let pending = format!(
        "{} pages pending{bandwidth}{downtime}",
        grouped(p.pending_pages)
    );
    match p.phase {
        Phase::Connecting => "connecting".into(),
        Phase::Disks => format!("disks, {} pending", traffic(p.disk_pending.unwrap_or(0))),
        Phase::Live => format!("round {}, {pending}", p.round),
        Phase::Draining => format!("draining, {pending}"),
        Phase::Stopped => format!("the guest stands still, {pending}"),
        Phase::Committed => "handed over, waiting for the destination".into(),
        Phase::Completed => "completed".into(),
        Phase::Aborted => "given up, the guest runs on here".into(),
        Phase::InDoubt => "in doubt".into(),
        Phase::PostCopy => "pages follow".into(),
        Phase::Interrupted => "interrupted".into(),
    }
}

fn round_line(r: &Round) -> String {
    format!(
        "round {}: {} pages in {}, {} dirtied meanwhile",
        r.n,
        grouped(r.pages),
        span(r.ms),
        grouped(r.dirtied)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_phase_has_a_line() {
        let p = |phase| {
            line(&Progress {
                phase,
                round: 2,
                pending_pages: 1000,
                ..Progress::default()
            })
        };
        assert_eq!(p(Phase::Connecting), "connecting");
        assert_eq!(p(Phase::Disks), "disks, 0 B pending");
        assert_eq!(p(Phase::Live), "round 2, 1,000 pages pending");
        assert_eq!(p(Phase::Draining), "draining, 1,000 pages pending");
        assert_eq!(
            p(Phase::Stopped),
            "the guest stands still, 1,000 pages pending"
        );
        assert_eq!(
            p(Phase::Committed),
            "handed over, waiting for the destination"
        );
        let round = Round {
            n: 1,
            pages: 131_072,
            bytes: 5,
            ms: 1920.0,
            dirtied: 4210,
            ..Round::default()
        };
        assert_eq!(
            round_line(&round),
            "round 1: 131,072 pages in 1.92 s, 4,210 dirtied meanwhile"
        );
    }

    #[test]
    fn nothing_and_lines_take_every_event() {
        for mut display in [Display::Nothing, Display::Lines { last: None }] {
            display.show(&Event::Progress(Progress::default()));
            display.show(&Event::Round(Round::default()));
            display.clear();
        }
    }
}
