//! What every phase has: the connection to the source, and how long it is waited for.

use super::error::DestinationError;
use super::timeouts::{FRAME_TIMEOUTS, Timeouts};
use crate::port::{Clock, DestinationVm, Link};
use crate::wire::{Channel, FrameType, Header, SessionId, WireError};
use std::sync::Arc;
use std::time::Duration;

/// One migration's control channel.
pub(super) struct Session<L> {
    pub channel: Channel<L>,
    /// The source may still say something on it.
    pub connected: bool,
    pub id: SessionId,
    pub timeouts: Timeouts,
    pub clock: Arc<dyn Clock + Send + Sync>,
    /// As the source named it; empty before its handshake.
    pub policy: String,
    /// For payloads.
    pub buffer: Vec<u8>,
}

impl<L: Link> Session<L> {
    pub fn now(&self) -> Duration {
        self.clock.now()
    }

    /// Waits for the commit at most so long, in all.
    pub fn wait_for_commit(&mut self) {
        let commit = self.timeouts.commit;
        self.channel.link().set_timeout(Some(commit));
        self.channel.link().set_deadline(Some(commit));
    }

    /// Waits for a frame as while memory arrives, and at most [`FRAME_TIMEOUTS`] times as long for
    /// all of it.
    pub fn wait_for_transfer(&mut self) {
        let transfer = self.timeouts.transfer;
        self.channel.link().set_timeout(Some(transfer));
        self.channel
            .link()
            .set_deadline(Some(transfer * FRAME_TIMEOUTS));
    }

    /// Receives the source's commit, and nothing else.
    pub fn commit(&mut self) -> Result<(), DestinationError> {
        let header = self.channel.recv_header()?;
        if header.kind == FrameType::Commit {
            return Ok(());
        }
        Err(self.channel.refuse(&header, "the commit").into())
    }

    /// Receives a frame's payload; to be put back as the buffer.
    pub fn payload(&mut self, header: &Header) -> Result<Vec<u8>, WireError> {
        let mut bytes = std::mem::take(&mut self.buffer);
        self.channel.recv_payload(header, &mut bytes)?;
        Ok(bytes)
    }

    /// Tells the source why this is over, unless it has said so itself.
    pub fn explain(&mut self, error: &DestinationError) {
        if !error.is_from_peer() {
            self.channel.send_abort(&error.to_string());
        }
    }
}

/// What a phase works with, and does not own.
pub(super) struct Parts<'a, L, H> {
    pub session: &'a mut Session<L>,
    pub host: &'a mut H,
}

impl<L: Link, H: DestinationVm<L>> Parts<'_, L, H> {
    /// The guest stays with the source: tells it why, and throws the machine away.
    pub fn discard(&mut self, error: &DestinationError) {
        self.session.explain(error);
        self.host.discard();
    }
}

/// For a frame.
pub(super) fn micros(took: Duration) -> u64 {
    u64::try_from(took.as_micros()).unwrap_or(u64::MAX)
}
