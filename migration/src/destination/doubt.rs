//! After the connection was lost: the source's word on another one, or an operator's.

use super::{Destination, DestinationError, State};
use crate::page::RamLayout;
use crate::port::{DestinationVm, Link};
use crate::wire::{Channel, Preamble};

impl<L: Link, H: DestinationVm<L>> Destination<L, H> {
    /// Goes on with a new connection that a source opened to end the doubt
    /// (role *recover*, preamble answered): its word is the next frame.
    pub fn reattach(&mut self, mut channel: Channel<L>, preamble: &Preamble) {
        if let Err(error) = preamble.expect_session(self.session) {
            channel.send_abort(&error.to_string());
            return;
        }
        channel.set_end(self.layout.as_ref().map_or(0, RamLayout::end));
        self.channel = channel;
        self.connected = true;
        self.reattached = true;
        // Only this connection counts from here on: what it brings is one push.
        (self.round, self.pushed, self.data_channels) = (0, false, None);
        // Its source asks before it is told.
        self.untold = None;
        // Also where the guest does not run yet: the fault channels of the old connection are of no use.
        if let Some(missing_pages) = &self.missing_pages {
            missing_pages.reconnect();
        }
        match self.state {
            // The first confirmation may have been lost on its way: it is said again.
            State::Complete => self.enter(State::Running),
            State::Ready => self.enter(State::InDoubt),
            _ => {}
        }
    }

    /// Whether the source has something to say on the connection that a doubt is about: the next
    /// [`step`](Destination::step) takes it.
    pub fn has_word(&mut self) -> bool {
        self.connected && self.channel.link().readable().unwrap_or(true)
    }

    /// Whether the source may still say something on the present connection.
    #[must_use]
    pub const fn is_connected(&self) -> bool {
        self.connected
    }

    /// An operator's word in place of the source's: runs the guest here. Only right when the
    /// source is certain not to run it.
    ///
    /// # Errors
    /// When the guest is not complete here, or cannot be started.
    pub fn take_over(&mut self) -> Result<(), DestinationError> {
        let left = self.missing_pages.as_ref().map_or(0, |a| a.left());
        match self.state {
            _ if left > 0 => Err(DestinationError::Lacking(left)),
            State::Ready | State::InDoubt => {
                self.host.claim().map_err(DestinationError::NotStarted)?;
                self.host.run().map_err(DestinationError::Start)?;
                self.enter(State::Running);
                Ok(())
            }
            State::Running | State::Complete | State::Interrupted => Ok(()),
            state @ (State::Waiting | State::Filling | State::Discarded) => {
                Err(DestinationError::State(
                    format!("the guest is not complete here ({state:?})").into(),
                ))
            }
        }
    }

    /// Throws a doubtful guest away: an operator's word that the source has it.
    pub fn abandon(&mut self) {
        if matches!(
            self.state,
            State::Ready | State::InDoubt | State::Filling | State::Waiting
        ) {
            self.discard();
        }
    }
}
