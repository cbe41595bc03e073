//! The phases, each with what it has: what a phase cannot have, its type does not have.
//!
//! How one follows another is in the file of its steps: `waiting.rs`, `filling.rs`, `guest.rs`,
//! `push.rs`. A step consumes its phase.

use super::blocks::Disks;
use super::data_channels::DataChannelSet;
use super::error::DestinationError;
use super::hashes::Hashes;
use super::missing_pages::MissingPages;
use super::pages::PageReceiver;
use super::state::{State, Step};
use crate::page::{Gfn, PageSet, RamLayout};
use crate::wire::Hello;
use std::sync::Arc;
use std::time::Duration;

/// Where the destination stands, with all that it has there; see the figure in [`super`].
pub(super) enum Phase<L, S> {
    Waiting(Waiting),
    Filling(Box<Filling<L, S>>),
    /// READY was sent.
    Ready(Guest<L, S>),
    /// And no word came.
    InDoubt(Guest<L, S>),
    /// The guest runs, and the source is told so by the next step.
    Started(Guest<L, S>, Started),
    /// The guest runs and pages follow it.
    Following(Push<L, S>),
    /// The guest runs and pages are missing; the connection is lost, or is a new one that has said
    /// nothing yet.
    Interrupted(Push<L, S>),
    /// The guest runs and is complete; its source may ask.
    Owned,
    /// The source was told.
    Complete,
    /// The source has the guest.
    Discarded,
}

/// Connected; the machine is not built.
#[derive(Default)]
pub(super) enum Waiting {
    /// The handshake is the next frame.
    #[default]
    Handshake,
    /// This is coming, and the files that go with it were asked for.
    Files(Box<Hello>),
}

/// The machine stands; its memory arrives.
pub(super) struct Filling<L, S> {
    pub layout: RamLayout,
    pub sink: Arc<S>,
    /// The memory is the source's own: no page comes.
    pub shared: bool,
    pub receiver: PageReceiver,
    pub data_channels: Option<Arc<DataChannelSet<L, S>>>,
    /// In post-copy.
    pub to_follow: Option<ToFollow<L, S>>,
    pub disks: Disks,
    /// The last round of pages, and of blocks.
    pub round: u32,
    pub block_round: u32,
    /// The pages are all here: what is compared now is not written any more.
    pub sealed: bool,
    /// With `--verify`.
    pub hashes: Option<Compared>,
}

/// Comparing pages with the source's.
pub(super) struct Compared {
    pub hashes: Arc<Hashes>,
    /// What that has taken since the last round ended, in the end in the pause.
    pub took: Duration,
}

/// Pages that are to follow the guest.
pub(super) struct ToFollow<L, S> {
    pub missing_pages: Arc<MissingPages<L, S>>,
    /// As far as they were listed; `None` where the policy has not decided for post-copy.
    pub listed: Option<PageSet>,
}

/// The machine with its state.
pub(super) struct Guest<L, S> {
    /// What follows it.
    pub push: Option<Push<L, S>>,
    /// Of the connection, to be closed with it.
    pub data_channels: Option<Arc<DataChannelSet<L, S>>>,
}

/// When the guest was started, by the engine's clock.
#[derive(Clone, Copy, Debug)]
pub(super) struct Started {
    /// The commit was read.
    pub asked: Duration,
    /// The guest's first instruction.
    pub ran: Duration,
}

impl Started {
    /// It runs already.
    pub const fn at(now: Duration) -> Self {
        Self {
            asked: now,
            ran: now,
        }
    }
}

/// Pages that follow a guest.
pub(super) struct Push<L, S> {
    pub missing_pages: Arc<MissingPages<L, S>>,
    /// Of this connection.
    pub data_channels: Option<Arc<DataChannelSet<L, S>>>,
    pub receiver: PageReceiver,
    /// The frame after the guest's last.
    pub end: Gfn,
    /// The last round that has ended.
    pub round: u32,
    /// The source has said that it pushed everything.
    pub pushed: bool,
    pub verify: bool,
    /// The connection is one that the source opened later: it does not know what is missing.
    pub reattached: bool,
}

/// What a step leads to.
pub(super) type Next<L, S> = (Phase<L, S>, Step);

/// A step that ended in an error: where the destination stands now, and why.
pub(super) struct End<L, S> {
    pub phase: Phase<L, S>,
    pub error: DestinationError,
}

impl<L, S> End<L, S> {
    /// Boxed: it is rare, and what it holds is large.
    pub fn new(phase: Phase<L, S>, error: DestinationError) -> Box<Self> {
        Box::new(Self { phase, error })
    }
}

pub(super) type Stepped<L, S> = Result<Next<L, S>, Box<End<L, S>>>;

impl<L, S> Phase<L, S> {
    pub const fn state(&self) -> State {
        match self {
            Self::Waiting(_) => State::Waiting,
            Self::Filling(_) => State::Filling,
            Self::Ready(_) => State::Ready,
            Self::InDoubt(_) => State::InDoubt,
            Self::Started(..) | Self::Following(_) | Self::Owned => State::Running,
            Self::Interrupted(_) => State::Interrupted,
            Self::Complete => State::Complete,
            Self::Discarded => State::Discarded,
        }
    }

    /// What is missing, or may come to be.
    pub const fn push(&self) -> Option<&Push<L, S>> {
        match self {
            Self::Ready(guest) | Self::InDoubt(guest) | Self::Started(guest, _) => {
                guest.push.as_ref()
            }
            Self::Following(push) | Self::Interrupted(push) => Some(push),
            _ => None,
        }
    }
}
