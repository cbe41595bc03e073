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
        match report.status {
            Status::Completed => {
                must(
                    self.destination_runs || self.destination_dead,
                    "completed, but the destination does not run",
                );
                must(!self.source_runs, "completed, but the source runs");
                must(report.error.is_none(), "completed with an error");
                must(
                    self.missing.as_ref().is_none_or(PageSet::is_empty),
                    "completed, and pages are missing",
                );
            }
            Status::Interrupted => {
                must(
                    self.committed && !self.source_runs,
                    "interrupted, but the source was not committed",
                );
                must(
                    self.destination_runs || self.destination_dead,
                    "interrupted, but the destination does not run",
                );
                must(report.error.is_some(), "interrupted without a reason");
            }
            Status::Failed | Status::Cancelled => {
                must(
                    self.source_runs,
                    "not completed, but the source does not run",
                );
                must(
                    !self.destination_runs,
                    "not completed, but the destination runs",
                );
                must(
                    !self.committed || self.port_fault == Some(PortFault::Commit),
                    "aborted after the commit",
                );
                must(report.error.is_some(), "not completed without a reason");
            }
            Status::InDoubt => {
                must(
                    self.committed && !self.source_runs,
                    "in doubt, but the source was not committed",
                );
                if !self.destination_dead {
                    let kept = matches!(
                        peer.state(),
                        Some(
                            DestinationState::Ready
                                | DestinationState::InDoubt
                                | DestinationState::Running
                                | DestinationState::Interrupted
                                | DestinationState::Complete
                        )
                    );
                    must(
                        kept,
                        "in doubt, and the destination has thrown the guest away",
                    );
                }
            }
        }
        if !self.destination_dead && peer.state() == Some(DestinationState::Discarded) {
            must(
                !self.destination_has,
                "the destination says discarded but keeps the machine",
            );
        }
        wrong
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
