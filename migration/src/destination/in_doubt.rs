//! After the connection was lost: the source's word on another one, or an operator's.

use super::engine::Destination;
use super::error::DestinationError;
use super::phase::Phase;
use super::session::Parts;
use crate::port::{DestinationVm, Link};
use crate::wire::{Channel, FrameType, Preamble};

impl<L: Link, H: DestinationVm<L>> Destination<L, H> {
    /// Goes on with a new connection that a source opened to resolve the doubt
    /// ([`Role::Recover`](crate::wire::Role::Recover), preamble answered): its word is the next
    /// frame.
    pub fn reattach(&mut self, mut channel: Channel<L>, preamble: &Preamble) {
        if let Err(error) = preamble.expect_session(self.session.id) {
            channel.send_abort(&error.to_string());
            return;
        }
        channel.set_end(self.phase.push().map_or(0, |push| push.end));
        self.session.channel = channel;
        self.session.connected = true;
        self.advance(|phase, _| match phase {
            Phase::Ready(mut guest) | Phase::InDoubt(mut guest) => {
                guest.data_channels = None;
                if let Some(push) = &mut guest.push {
                    push.reattach();
                }
                Phase::InDoubt(guest)
            }
            // The source asks before it is told.
            Phase::Started(guest, _) => guest.push.map_or(Phase::Owned, |mut push| {
                push.reattach();
                Phase::Interrupted(push)
            }),
            Phase::Following(mut push) | Phase::Interrupted(mut push) => {
                push.reattach();
                Phase::Interrupted(push)
            }
            // The first confirmation may have been lost on its way: it is said again.
            Phase::Complete => Phase::Owned,
            other => other,
        });
    }

    /// Whether the source has something to say on the present connection: the next
    /// [`step`](Destination::step) takes it.
    pub fn has_word(&mut self) -> bool {
        self.session.connected && self.session.channel.link().readable().unwrap_or(true)
    }

    /// Takes the source's last word on the present connection, after
    /// [`Step::Complete`](super::state::Step::Complete) and where it [has
    /// one](Destination::has_word): whether it knows that the guest runs here. A source that does
    /// not asks again.
    pub fn take_acknowledgement(&mut self) -> bool {
        let link = self.session.channel.link();
        link.set_timeout(Some(self.session.timeouts.handshake));
        link.set_deadline(Some(self.session.timeouts.handshake));
        let header = self.session.channel.recv_header();
        let known = header.is_ok_and(|header| header.kind == FrameType::Alive);
        self.session.connected = false;
        known && matches!(self.phase, Phase::Complete)
    }

    /// Whether the source may still say something on the present connection.
    #[must_use]
    pub const fn is_connected(&self) -> bool {
        self.session.connected
    }

    /// An operator's word in place of the source's: runs the guest here. Only right when the
    /// source is certain not to run it.
    ///
    /// # Errors
    /// When the guest is not complete here, or cannot be started.
    pub fn take_over(&mut self) -> Result<(), DestinationError> {
        let left = self
            .phase
            .push()
            .map_or(0, |push| push.missing_pages.left());
        if left > 0 {
            return Err(DestinationError::Missing(left));
        }
        self.advance_with(|phase, parts| match phase {
            Phase::Ready(guest) | Phase::InDoubt(guest) => {
                let ran = match parts.host.claim() {
                    Ok(()) => parts.host.run().map_err(DestinationError::Start),
                    Err(error) => Err(DestinationError::NotStarted(error)),
                };
                if let Err(error) = ran {
                    return (Phase::InDoubt(guest), Err(error));
                }
                if let Some(push) = guest.push {
                    push.finish(parts.host);
                }
                (Phase::Owned, Ok(()))
            }
            phase @ (Phase::Waiting(_) | Phase::Filling(_) | Phase::Discarded) => {
                let state = phase.state();
                let why = format!("the guest is not complete here ({state:?})");
                (phase, Err(DestinationError::State(why.into())))
            }
            running => (running, Ok(())),
        })
    }

    /// Throws a guest in doubt away: an operator's word that the source has it.
    pub fn abandon(&mut self) {
        self.advance(|phase, parts: &mut Parts<'_, L, H>| match phase {
            Phase::Ready(guest) | Phase::InDoubt(guest) => {
                guest.discard(parts.host);
                Phase::Discarded
            }
            Phase::Filling(filling) => {
                filling.abandon(parts.host);
                Phase::Discarded
            }
            Phase::Waiting(_) => {
                parts.host.discard();
                Phase::Discarded
            }
            running => running,
        });
    }

    fn advance(
        &mut self,
        next: impl FnOnce(Phase<L, H::Sink>, &mut Parts<'_, L, H>) -> Phase<L, H::Sink>,
    ) {
        self.advance_with(|phase, parts| (next(phase, parts), ()));
    }
}
