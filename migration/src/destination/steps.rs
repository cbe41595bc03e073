//! A step: the phase that there is handles one frame, or what needs none.

use super::phase::{End, Guest, Phase, Started, Stepped};
use super::session::Parts;
use super::state::Step;
use crate::port::{DestinationVm, Link, PageSink};

impl<L: Link, S: PageSink<L> + 'static> Phase<L, S> {
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
