//! A policy of one's own, against pre-copy on a simulated guest.
//!
//! ```text
//! cargo run -p ferry-migration --example own_policy --features testing
//! ```
//!
//! A policy decides what is sent next and when to stop. It does no I/O and reads no clock; the
//! engine alone reads memory, sends, pauses and commits. So it cannot lose a write, whatever it
//! decides. The simulator checks that, too.
#![forbid(unsafe_code)]

use ferry_migration::policy::{Decision, Policy, SendOrder, View};
use ferry_migration::report::Status;
use ferry_migration::testing::simulator::{Outcome, Scenario, run, run_with};

/// Sends what is pending as long as each round leaves clearly less than the one before; then it
/// stops.
#[derive(Default)]
struct Halving {
    before: Option<u64>,
}

impl Policy for Halving {
    fn name(&self) -> &'static str {
        "halving"
    }

    fn next(&mut self, view: &View<'_>) -> Decision {
        let pending = view.pending_pages;
        match self.before.replace(pending) {
            Some(before) if pending * 2 > before => Decision::Stop {
                why: format!(
                    "a round left {pending} of {before} pages: another would not halve them"
                ),
            },
            _ if pending == 0 => Decision::Stop {
                why: "nothing is pending".into(),
            },
            _ => Decision::Send {
                pages: view.pending.clone(),
                order: SendOrder::ColdFirst,
            },
        }
    }
}

fn print(outcome: &Outcome) {
    let report = &outcome.report;
    println!(
        "{:>8}: {:?} after {} rounds, {} pages sent, {:.2} ms of downtime: {}",
        report.policy,
        report.status,
        report.rounds.len(),
        report.pages.sent,
        report.downtime_ms,
        report.why.as_deref().unwrap_or("no reason")
    );
}

fn main() -> Result<(), String> {
    let scenario = Scenario::calm(1);
    let own = run_with(&scenario, &mut Halving::default());
    for outcome in [&own, &run(&scenario)] {
        print(outcome);
    }
    if own.report.status != Status::Completed || !own.violations.is_empty() {
        return Err(format!("{:?} {:?}", own.report.error, own.violations));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_guest_arrives_by_it() -> Result<(), String> {
        super::main()
    }
}
