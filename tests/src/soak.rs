//! The kill matrix: one migration of a real guest, broken at a chosen step, and what became of it.
//!
//! A [`Case`] is a way to move a guest, a step of the ownership protocol and a fault. [`run`] moves
//! a guest, strikes when the frame of that step passes, and ends what the fault began. Then it does
//! what an operator would, until one side has the guest, and the guest verifies its memory. What
//! must hold:
//!
//! - The guest's own lines tell where it ran. It never ran on both sides.
//! - A guest that a living process has is not lost: it runs, or is in doubt and can be resolved.
//! - Its disk is as it was, and locked by the side that runs it.

mod case;
mod disk;
mod moved;
mod operator;
mod snapshot;

pub use case::{Case, Fault, Method, Step};

use crate::Host;
use ferry_guest_images::Line;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Where a guest is after a case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Where it was.
    AtSource,
    /// It has moved.
    AtDestination,
    /// The process that had it was killed. The sentence says which.
    Lost(&'static str),
}

/// What a case showed.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// Where the guest is, verified.
    pub outcome: Outcome,
    /// Whether the step of the case has come: a fault before it can end the migration.
    pub struck: bool,
    /// What an operator had to do.
    pub operator: Vec<&'static str>,
}

/// Runs a case.
///
/// # Errors
/// What did not hold, with what both sides said.
pub fn run(case: &Case) -> Result<Verdict, String> {
    let run = || match case.method {
        Method::Snapshot => snapshot::run(case),
        _ => moved::run(case),
    };
    catch_unwind(AssertUnwindSafe(run)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let fixed = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
        text.or(fixed).unwrap_or_else(|| "a panic".into())
    })
}

/// The guest's work in every case: its lines are frequent, for they tell who ran it.
const WORK: &str = "dirty:wss=4M,rate=1000";
const MEMORY: &str = "32M";
const STAT: [&str; 2] = ["--stat", "20ms"];

/// Expects that the guest runs here, and has said when. Its first line here may be the end of one
/// that it began elsewhere.
fn runs(host: &Host) {
    host.proves_running();
    host.guest_line("a line", |line| matches!(line, Line::Stat { .. }));
}

/// Who printed the guest's lines, in the guest's own order; each run of lines counts once.
///
/// The guest's clock goes on when it moves. Two copies of a guest print lines of the same times.
fn turns(lines: [Vec<String>; 2]) -> Vec<usize> {
    let mut all = Vec::new();
    for (side, lines) in lines.iter().enumerate() {
        for line in lines {
            if let Some(Line::Stat { t_ms, .. }) = Line::parse(line) {
                all.push((t_ms, side));
            }
        }
    }
    all.sort_unstable();
    let mut turns: Vec<usize> = all.into_iter().map(|(_, side)| side).collect();
    turns.dedup();
    turns
}

#[cfg(test)]
mod tests {
    use super::turns;

    const GAPS: &str = "gap_us=0 gap_max_us=0 gap_max_at_ms=0";

    fn lines(times: &[u64]) -> Vec<String> {
        let line = |t: &u64| format!("ferry-guest: stat t_ms={t} writes={t} corrupt=0 {GAPS}");
        times.iter().map(line).collect()
    }

    #[test]
    fn a_guest_that_moves_takes_turns_and_one_that_runs_twice_shows() {
        assert_eq!(turns([lines(&[1, 2, 3]), lines(&[])]), [0]);
        assert_eq!(turns([lines(&[1, 2, 3]), lines(&[5, 8])]), [0, 1]);
        // Lines that are read late change nothing.
        assert_eq!(turns([lines(&[3, 1, 2]), lines(&[8, 5])]), [0, 1]);
        assert_eq!(turns([lines(&[1, 4]), lines(&[4, 5])]), [0, 1]);
        assert_eq!(turns([lines(&[1, 4, 6]), lines(&[5])]), [0, 1, 0]);
        assert_eq!(turns([lines(&[1, 4, 6]), lines(&[4, 6])]), [0, 1, 0, 1]);
        // The rest of a line that began elsewhere.
        let torn = vec!["=7 writes=7 corrupt=0".to_owned()];
        assert_eq!(turns([lines(&[9]), torn]), [0]);
    }
}
