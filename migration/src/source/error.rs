//! Why a migration did not complete, from the source's view.

use crate::options::OptionsError;
use crate::page::Gfn;
use crate::port::PortError;
use crate::report::Status;
use crate::sender::SendError;
use crate::wire::WireError;
use std::io;

/// Why a migration did not complete.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// The options cannot be meant.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// No connection.
    #[error("cannot connect to the destination: {0}")]
    Connect(io::Error),
    /// The connection or the peer.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The peer cannot do what the options need.
    #[error(
        "the destination's ferry cannot do what this migration needs (feature bits {missing:#x}); upgrade it"
    )]
    Features {
        /// The missing ones.
        missing: u64,
    },
    /// Memory cannot be handed over to where the guest is to go.
    #[error("the guest's memory cannot be handed over: {0}; without --handover on it is sent")]
    NotShared(String),
    /// The guest or this host.
    #[error("{what} failed: {error}")]
    Guest {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        error: PortError,
    },
    /// A destination that is ready without having done what it was asked for.
    #[error(
        "the destination is ready but did not compare guest memory, which --verify asks for; the guest stays here"
    )]
    NotVerified,
    /// A page request that cannot be.
    #[error(
        "the destination asked for {count} pages from page {gfn:#x} at once, which are not all the guest's or more than a guest waits for"
    )]
    Request {
        /// The first page.
        gfn: u64,
        /// How many.
        count: u64,
    },
    /// A destination that misses more than there is.
    #[error("the destination says that {missing} pages are missing, of a guest that has {total}")]
    Missing {
        /// Pages that it claims are missing.
        missing: u64,
        /// Pages that there are.
        total: u64,
    },
    /// A destination at which is missing what it had.
    #[error(
        "page {gfn} is missing at the destination, which had said to have it, and --free-source gave it back here: the guest there has lost it"
    )]
    GivenBack {
        /// The page.
        gfn: Gfn,
    },
    /// A policy that moves the guest before its pages, where that was not agreed.
    #[error(
        "the policy asks for post-copy, which the options do not: set --on-timeout postcopy or a post-copy policy"
    )]
    NoPostCopy,
    /// A guest that is to be slowed and cannot be.
    #[error("this guest cannot be slowed down; give another --on-timeout than throttle")]
    NoThrottle,
    /// The guest stood still for as long as it may.
    #[error(
        "the pause was longer than --max-pause allows; the guest runs here again, give a longer one or a faster link"
    )]
    PauseTooLong,
    /// A destination that says too soon that it has everything.
    #[error("the destination says that it has every page, yet {0} were not sent to it")]
    TooSoon(u64),
    /// After post-copy, with `--verify`.
    #[error("{0} pages at the destination are not as they were sent; the guest runs there on them")]
    Differs(u64),
    /// The user.
    #[error("the migration was cancelled")]
    Cancelled,
    /// The policy.
    #[error("the migration does not converge: {0}")]
    GaveUp(String),
    /// No answer in time to something the guest had to wait for.
    #[error("the destination did not say {0} in time")]
    Silent(&'static str),
}

impl SourceError {
    pub(super) const fn guest(what: &'static str, error: PortError) -> Self {
        Self::Guest { what, error }
    }

    /// Whether COMMIT, said again, may bring another answer. A destination that gave up at it keeps
    /// the guest, and may be able to start it the next time.
    pub(super) const fn may_retry(&self) -> bool {
        match self {
            Self::Connect(_) | Self::Silent(_) => true,
            Self::Wire(error) => !matches!(
                error,
                WireError::NotStarted(_) | WireError::UnknownSession(_)
            ),
            _ => false,
        }
    }

    pub(super) const fn status(&self) -> Status {
        match self {
            Self::Cancelled | Self::GaveUp(_) => Status::Cancelled,
            _ => Status::Failed,
        }
    }

    /// What the peer is told.
    pub(super) fn for_peer(&self) -> String {
        format!("the source keeps the guest: {self}")
    }

    /// The system has no thread left for a data channel.
    pub(super) fn no_thread(error: io::Error) -> Self {
        Self::guest(
            "starting a thread for a data channel",
            format!(
                "{error}; raise the limit of threads (ulimit -u, TasksMax=), or use fewer --channels"
            )
            .into(),
        )
    }

    /// A time-out in the pause, said as what was waited for.
    pub(super) fn or_silent(self, what: &'static str) -> Self {
        match self {
            Self::Wire(WireError::Io(e)) if e.kind() == io::ErrorKind::TimedOut => {
                Self::Silent(what)
            }
            other => other,
        }
    }
}

impl From<SendError> for SourceError {
    fn from(error: SendError) -> Self {
        match error {
            SendError::Wire(error) => Self::Wire(error),
            SendError::Guest(error) => Self::guest("reading guest memory", error),
        }
    }
}
