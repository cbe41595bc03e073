//! What must hold when a simulated migration has ended, and who has the guest then.

use super::Fate;
use super::fault::PortFault;
use super::link::Peer;
use super::world::World;
use crate::destination::State as DestinationState;
use crate::page::PageSet;
use crate::report::{Report, Status};

impl World {
    /// What the report says against what is so, before any recovery.
    pub fn check(&self, report: &Report, peer: &Peer) -> Vec<String> {
        let mut wrong = Vec::new();
        let mut must = |truth: bool, what: &str| {
            if !truth {
                wrong.push(format!(
                    "{what} (status {:?}, error {:?})",
                    report.status, report.error
                ));
            }
        };
        must(
            !(self.source_runs && self.destination_runs),
            "two owners at the end",
        );
        if self.source_dead {
            return wrong;
        }
        must(
            !self.cancelled || matches!(report.status, Status::Cancelled | Status::Failed),
            "a user was told that the migration is cancelled, and it went on",
        );
        must(
            self.slowed == 0.0,
            "the migration is over, and the guest is still slowed",
        );
        let (steered, accepted) = (report.steered.len(), self.steered);
        must(
            match report.status {
                Status::Failed | Status::Cancelled => steered <= accepted,
                _ => steered == accepted,
            },
            "not all changes that were accepted were made, and no others",
        );
        for (truth, what) in self.claims(report, peer) {
            must(truth, what);
        }
        if !self.destination_dead && peer.state() == Some(DestinationState::Discarded) {
            must(
                !self.destination_has,
                "the destination says discarded but keeps the machine",
            );
        }
        wrong
    }

    /// What the report's status says of both sides.
    fn claims(&self, report: &Report, peer: &Peer) -> Vec<(bool, &'static str)> {
        let there = self.destination_runs || self.destination_dead;
        let failed = report.error.is_some();
        match report.status {
            Status::Completed => vec![
                (there, "completed, but the destination does not run"),
                (!self.source_runs, "completed, but the source runs"),
                (!failed, "completed with an error"),
                (
                    self.missing.as_ref().is_none_or(PageSet::is_empty),
                    "completed, and pages are missing",
                ),
            ],
            Status::Interrupted => vec![
                (
                    self.committed && !self.source_runs,
                    "interrupted, but the source was not committed",
                ),
                (there, "interrupted, but the destination does not run"),
                (failed, "interrupted without a reason"),
            ],
            Status::Failed | Status::Cancelled => vec![
                (
                    self.source_runs,
                    "not completed, but the source does not run",
                ),
                (
                    !self.destination_runs,
                    "not completed, but the destination runs",
                ),
                (
                    !self.committed || self.port_fault == Some(PortFault::Commit),
                    "aborted after the commit",
                ),
                (failed, "not completed without a reason"),
            ],
            Status::InDoubt => vec![
                (
                    self.committed && !self.source_runs,
                    "in doubt, but the source was not committed",
                ),
                (
                    self.destination_dead || keeps_the_guest(peer),
                    "in doubt, and the destination has thrown the guest away",
                ),
            ],
        }
    }

    pub const fn source_fate(&self) -> Fate {
        if self.source_dead {
            Fate::Dead
        } else if self.source_runs {
            Fate::Runs
        } else {
            Fate::Holds
        }
    }

    pub const fn destination_fate(&self, _: &Peer) -> Fate {
        if self.destination_dead {
            Fate::Dead
        } else if self.destination_runs {
            Fate::Runs
        } else if self.destination_has {
            Fate::Holds
        } else {
            Fate::Empty
        }
    }
}

fn keeps_the_guest(peer: &Peer) -> bool {
    matches!(
        peer.state(),
        Some(
            DestinationState::Ready
                | DestinationState::InDoubt
                | DestinationState::Running
                | DestinationState::Interrupted
                | DestinationState::Complete
        )
    )
}
