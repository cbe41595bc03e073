//! The states of a [`Vmm`](super::Vmm), and what to say about them.

use super::{MigrationHandle, TakeOver};
use crate::api::Refusal;
use crate::api::types::StateName;
use ferry_migration::source::Owner;
use std::sync::Arc;

/// How a guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Ending {
    /// The guest switched itself off.
    Shutdown,
    /// The guest asked for a reset, which ends a VMM without firmware.
    Reset,
    /// The guest's processor met a fault that it could not deliver: a crash.
    TripleFault,
    /// A user asked for it, and how ("on SIGTERM").
    Stopped(String),
    /// It cannot go on; the text is a sentence.
    Failed(String),
    /// None can arrive any more; the text is a sentence.
    NotReceived(String),
}

impl Ending {
    pub(super) fn sentence(&self) -> String {
        match self {
            Self::Shutdown => "the guest has shut down".into(),
            Self::Reset => "the guest has asked for a reset and was ended".into(),
            Self::TripleFault => "the guest has crashed: its processor triple-faulted".into(),
            Self::Stopped(how) => format!("the guest was ended {how}"),
            Self::Failed(why) => format!("the guest cannot go on: {why}"),
            Self::NotReceived(why) => why.clone(),
        }
    }
}

/// Why a VMM has nothing more to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// One sentence for the user.
    pub sentence: String,
    /// Whether that is a good end.
    pub success: bool,
    /// The guest runs elsewhere.
    pub moved: bool,
}

pub(super) enum State {
    Receiving {
        listening: String,
    },
    /// A guest is complete here, and the source fell silent before it handed it over.
    ArrivalInDoubt {
        why: String,
        guest: Arc<dyn TakeOver>,
        /// The user was told that ending would discard it.
        warned: bool,
    },
    /// The source has committed: the guest belongs here and is about to run.
    Starting,
    Running,
    Paused,
    Migrating {
        to: String,
        handle: Arc<dyn MigrationHandle>,
        paused_before: bool,
    },
    Moved {
        to: String,
        /// In milliseconds, where it is known.
        downtime_ms: Option<f64>,
    },
    /// Handed over, and the destination did not confirm.
    InDoubt(Lost),
    /// The guest runs at the destination; pages that this side has are missing there.
    Interrupted(Lost),
    Ended(Ending),
}

/// A refusal that says what is and what can be done.
pub(super) fn conflict(wish: &str, state: &State) -> Refusal {
    Refusal::Conflict(format!("cannot {wish}: {}", state.explanation()))
}

/// A destination that was lost after the commit.
pub(super) struct Lost {
    pub to: String,
    pub session: String,
    /// The user was told that ending would discard what is here.
    pub warned: bool,
    /// The destination is being asked, or sent missing pages: taking over meanwhile might make a
    /// second copy.
    pub asking: Option<Asking>,
}

/// A question to the destination that is under way.
pub(super) struct Asking {
    pub handle: Arc<dyn MigrationHandle>,
    /// By the VMM itself: an operator's request waits for the answer.
    pub in_background: bool,
}

impl Lost {
    pub fn new(to: &str, session: &str) -> Self {
        Self {
            to: to.to_owned(),
            session: session.to_owned(),
            warned: false,
            asking: None,
        }
    }
}

impl State {
    pub(super) const fn name(&self) -> StateName {
        match self {
            Self::Receiving { .. } | Self::Starting => StateName::Receiving,
            Self::Running => StateName::Running,
            Self::Paused => StateName::Paused,
            Self::Migrating { .. } => StateName::Migrating,
            Self::Moved { .. } => StateName::Moved,
            Self::ArrivalInDoubt { .. } | Self::InDoubt(_) => StateName::InDoubt,
            Self::Interrupted(_) => StateName::Interrupted,
            Self::Ended(_) => StateName::Ended,
        }
    }

    /// Whether the guest here is the one that goes on, so that a change of it is not lost.
    pub(super) fn keeps_changes(&self) -> bool {
        match self {
            Self::Running | Self::Paused => true,
            Self::Migrating { handle, .. } => handle.owner() == Owner::Source,
            _ => false,
        }
    }

    /// Where the guest goes, or went.
    pub(super) fn to(&self) -> Option<&str> {
        match self {
            Self::Migrating { to, .. }
            | Self::Moved { to, .. }
            | Self::InDoubt(Lost { to, .. })
            | Self::Interrupted(Lost { to, .. }) => Some(to),
            _ => None,
        }
    }

    /// One sentence: what is, and what can be done.
    pub(super) fn explanation(&self) -> String {
        match self {
            Self::Receiving { listening } => format!("waits on {listening} for a guest to arrive"),
            Self::ArrivalInDoubt { why, .. } => format!(
                "a guest is complete here and was not handed over ({why}); `ferry recover` at the \
                 source does that; if the source surely does not run it, `ferry recover \
                 --take-over` runs it here, and if it does, `ferry stop` discards this copy"
            ),
            Self::Starting => "the guest was handed over to this VMM and is about to run".into(),
            Self::Running => "the guest runs here".into(),
            Self::Paused => "the guest is paused here; `ferry resume` lets it run".into(),
            Self::Migrating { to, handle, .. } => match handle.owner() {
                Owner::Source => {
                    format!("the guest is being migrated to {to}; `ferry cancel` keeps it here")
                }
                Owner::InDoubt | Owner::Destination => format!(
                    "the guest was handed over to {to}, and what is missing there is on its way; this VMM ends when all has arrived"
                ),
            },
            Self::Moved { to, .. } => {
                format!("the guest was migrated to {to} and never runs here again")
            }
            Self::Interrupted(Lost { to, .. }) => format!(
                "the guest runs at {to}, and pages that are only here are missing there: the connection was lost; \
                 `ferry recover` sends them (give it the address if the destination has moved)"
            ),
            Self::InDoubt(Lost { to, .. }) => format!(
                "the guest was handed over to {to}, which did not confirm; it is asked again and again, and `ferry recover` \
                 asks at once; if it surely does not run there, `ferry recover --take-over` runs \
                 it here, and if it does, `ferry stop` discards this copy"
            ),
            Self::Ended(ending) => ending.sentence(),
        }
    }

    pub(super) fn outcome(&self) -> Option<Outcome> {
        match self {
            Self::Moved { to, downtime_ms } => {
                let downtime = downtime_ms.map(|ms| format!(" (downtime {ms:.1} ms)"));
                let sentence = format!(
                    "the guest has moved to {to}{}",
                    downtime.unwrap_or_default()
                );
                Some(Outcome {
                    sentence,
                    success: true,
                    moved: true,
                })
            }
            Self::Ended(ending) => Some(Outcome {
                sentence: ending.sentence(),
                success: !matches!(
                    ending,
                    Ending::Failed(_) | Ending::NotReceived(_) | Ending::TripleFault
                ),
                moved: false,
            }),
            _ => None,
        }
    }
}
