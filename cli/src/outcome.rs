//! How commands end, for scripts: an exit status, and a `code` in the JSON. Both are an interface.
//!
//! Every command that fails has 1 and one of `failed`, `no-guest` (no guest has that name),
//! `no-vmm`, `not-ferry` and `refused`, or 2 and `usage`. `ferry migrate` has more:
//!
//! | status | `code` | |
//! |---|---|---|
//! | 0 | `moved` | the guest runs at the destination |
//! | 0 | `begun` | with --detach |
//! | 1 | `failed` | the guest runs at the source |
//! | 1 | `no-guest`, `no-vmm`, `not-ferry`, `refused` | the migration did not begin |
//! | 2 | `usage` | the command line is wrong |
//! | 3 | `cancelled` | by an operator or a limit; the guest runs at the source |
//! | 4 | `in-doubt` | neither side runs the guest by itself: `ferry recover` |
//! | 4 | `lost` | the VMM ended before its report: where the guest is, `ferry status` of both sides tells |
//! | 5 | `interrupted` | the guest runs at the destination and misses pages: `ferry recover` |
//! | 6 | `not-equal` | the guest runs at the destination, and its memory is not equal |

use ferry_migration::report::{Report, Status};
use ferry_terminal::names::NameError;
use ferry_terminal::output::Failure;
use ferry_vmm::api::client::ClientError;
use serde::Serialize;
use std::process::ExitCode;

/// The part of the table that `ferry migrate --help` shows.
pub const HELP: &str = "Exit status:
  0  the guest runs at the destination
  1  the migration failed or did not begin; the guest stays here
  2  the command line is wrong
  3  the migration was cancelled, by an operator or a limit; the guest stays here
  4  in doubt: neither side runs the guest by itself; see `ferry recover`
  5  interrupted: the guest runs at the destination and misses pages; see `ferry recover`
  6  the guest runs at the destination, and its memory is not equal (--verify)";

/// A row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The exit status.
    pub status: u8,
    /// The `code`.
    pub code: &'static str,
}

/// A row of the table, or one of a command of its own.
pub const fn row(status: u8, code: &'static str) -> Outcome {
    Outcome { status, code }
}

/// Options that contradict each other.
pub const USAGE: Outcome = row(2, "usage");

impl Outcome {
    /// Of a migration that has a report.
    pub fn of(report: &Report) -> Self {
        match report.status {
            Status::Completed if report.verified == Some(false) => row(6, "not-equal"),
            Status::Completed => row(0, "moved"),
            Status::Failed => row(1, "failed"),
            Status::Cancelled => row(3, "cancelled"),
            Status::InDoubt => row(4, "in-doubt"),
            Status::Interrupted => row(5, "interrupted"),
        }
    }

    /// Of a request without a report; `begun` says whether the migration was under way.
    pub fn without_report(error: &ClientError, begun: bool) -> Self {
        match error {
            _ if begun => row(4, "lost"),
            ClientError::NoSocket(_) | ClientError::NoAnswer { .. } | ClientError::Lost { .. } => {
                row(1, "no-vmm")
            }
            ClientError::Foreign { .. } => row(1, "not-ferry"),
            ClientError::Refused { .. } => row(1, "refused"),
            ClientError::Output(_) => row(1, "failed"),
        }
    }

    /// Whether the guest runs on at the source.
    pub const fn guest_stays(self) -> bool {
        matches!(self.status, 1 | 3)
    }

    /// For the shell.
    pub fn exit(self) -> ExitCode {
        self.status.into()
    }
}

/// Why a command failed: its outcome, and one sentence for stderr.
#[derive(Debug)]
pub struct Ended {
    /// The exit status and the `code`.
    pub outcome: Outcome,
    /// For people.
    pub sentence: String,
}

impl Ended {
    /// A wrong command line.
    pub fn usage(sentence: impl Into<String>) -> Self {
        Self {
            outcome: USAGE,
            sentence: sentence.into(),
        }
    }

    fn new(code: &'static str, sentence: String) -> Self {
        Self {
            outcome: row(1, code),
            sentence,
        }
    }
}

impl From<Failure> for Ended {
    fn from(Failure(sentence): Failure) -> Self {
        Self::new("failed", sentence)
    }
}

impl From<ClientError> for Ended {
    fn from(error: ClientError) -> Self {
        let outcome = Outcome::without_report(&error, false);
        Self::new(outcome.code, error.to_string())
    }
}

impl From<NameError> for Ended {
    fn from(error: NameError) -> Self {
        let code = match error {
            NameError::Unknown { .. } => "no-guest",
            _ => "failed",
        };
        Self::new(code, error.to_string())
    }
}

/// The report with its `code`: what `--json` prints.
#[derive(Serialize)]
pub struct Coded<'a> {
    /// The `code`.
    pub code: &'static str,
    /// The report.
    #[serde(flatten)]
    pub report: &'a Report,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn help_and_module_documentation_name_every_status() {
        let shown: Vec<u8> = HELP
            .lines()
            .filter_map(|line| line.trim().split(' ').next()?.parse().ok())
            .collect();
        assert_eq!(shown, [0, 1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn every_end_has_its_status() {
        let of = |status, verified| {
            let mut report = Report::bare("s".into(), "precopy".into(), status, "e".into());
            report.verified = verified;
            let outcome = Outcome::of(&report);
            (outcome.status, outcome.code)
        };
        assert_eq!(of(Status::Completed, None), (0, "moved"));
        assert_eq!(of(Status::Completed, Some(true)), (0, "moved"));
        assert_eq!(of(Status::Completed, Some(false)), (6, "not-equal"));
        // Compared in the pause, and found different: the guest did not leave.
        assert_eq!(of(Status::Failed, Some(false)), (1, "failed"));
        assert_eq!(of(Status::Cancelled, None), (3, "cancelled"));
        assert_eq!(of(Status::InDoubt, None), (4, "in-doubt"));
        assert_eq!(of(Status::Interrupted, None), (5, "interrupted"));
    }
}
