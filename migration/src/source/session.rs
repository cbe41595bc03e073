//! The control channel of one migration, and how long to wait on it.

use super::error::SourceError;
use super::setup::Setup;
use crate::port::Link;
use crate::wire::{Channel, FrameType, Header, Role};
use std::time::Duration;

/// One migration's setup and its control channel.
pub(super) struct Session<'a, L: Link> {
    pub(super) setup: Setup<'a, L>,
    pub(super) control: Channel<L>,
    pub(super) rtt: Duration,
    /// The destination takes hashes of pages while the guest runs.
    pub(super) live_hashes: bool,
    /// The newest version of the machine's state that the destination reads, if it said so.
    pub(super) reads_state: Option<u32>,
    /// While the guest stands still: when it runs again at the latest.
    pub(super) until: Option<Duration>,
    /// Bytes sent on channels that were replaced.
    pub(super) sent_before: u64,
}

impl<'a, L: Link> Session<'a, L> {
    /// With an open connection whose preamble was not sent.
    pub(super) fn connect(setup: Setup<'a, L>, role: Role) -> Result<Self, SourceError> {
        let link = (setup.connect)(role, 0).map_err(SourceError::Connect)?;
        Ok(Self {
            setup,
            control: Channel::new(link),
            rtt: Duration::ZERO,
            live_hashes: false,
            reads_state: None,
            until: None,
            sent_before: 0,
        })
    }

    /// Replaces a control channel that was lost.
    pub(super) fn reconnect(&mut self) -> Result<(), SourceError> {
        let link = (self.setup.connect)(Role::Recover, 0).map_err(SourceError::Connect)?;
        self.sent_before += self.control.sent();
        self.control = Channel::new(link);
        Ok(())
    }

    pub(super) fn now(&self) -> Duration {
        self.setup.clock.now()
    }

    /// Whether to go on: the user has not cancelled, and the guest has not stood still for too
    /// long.
    pub(super) fn check(&self) -> Result<(), SourceError> {
        if self.setup.owner.is_cancelled() {
            return Err(SourceError::Cancelled);
        }
        match self.until {
            Some(until) if self.now() >= until => Err(SourceError::PauseTooLong),
            _ => Ok(()),
        }
    }

    /// The next frame that says something; a destination that only lives says [`FrameType::Alive`].
    pub(super) fn recv(&mut self) -> Result<Header, SourceError> {
        loop {
            let header = self.control.recv_header()?;
            if header.kind != FrameType::Alive {
                return Ok(header);
            }
            self.check()?;
        }
    }

    /// Waits on the control channel from now on: this long without progress, and this long in all.
    pub(super) fn wait_at_most(&mut self, silence: Duration, all: Option<Duration>) {
        let link = self.control.link();
        link.set_timeout(Some(silence));
        link.set_deadline(all);
    }
}
