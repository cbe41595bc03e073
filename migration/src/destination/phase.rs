//! The phases, each with what it has, and how one follows another.

use super::filling::Filling;
use super::guest::{Guest, Started};
use super::push::Push;
use super::session::Parts;
use super::waiting::Waiting;
use super::{DestinationError, State, Step};
use crate::port::{DestinationVm, Link, PageSink};

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

impl<L: Link, S: PageSink<L> + 'static> Phase<L, S> {
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

    /// Handles one frame, or what needs none.
    pub fn step<H: DestinationVm<L, Sink = S>>(self, parts: &mut Parts<'_, L, H>) -> Stepped<L, S> {
        match self {
            Self::Waiting(waiting) => waiting.step(parts),
            Self::Filling(filling) => filling.step(parts),
            Self::Ready(guest) | Self::InDoubt(guest) => guest.decide(parts),
            Self::Started(guest, started) => guest.tell(started, parts),
            Self::Following(push) => push.step(parts),
            Self::Interrupted(push) => push.resume(parts),
            Self::Owned => owned(parts),
            ended @ (Self::Complete | Self::Discarded) => {
                let channel = &mut parts.session.channel;
                let error = match channel.recv_header() {
                    Ok(header) => channel.refuse(&header, "nothing more"),
                    Err(error) => error,
                };
                Err(End::new(ended, error.into()))
            }
        }
    }
}

/// A source asks whether its guest runs: it says the commit again.
fn owned<L: Link, H: DestinationVm<L>>(parts: &mut Parts<'_, L, H>) -> Stepped<L, H::Sink> {
    parts.session.wait_for_commit();
    match parts.session.commit() {
        Ok(()) => {
            let started = Started::at(parts.session.now());
            Ok((Phase::Started(Guest::whole(), started), Step::Running))
        }
        Err(error) => Err(End::new(Phase::Owned, error)),
    }
}
