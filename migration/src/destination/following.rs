//! Post-copy at the destination: pages that follow a guest which runs already.

use super::{Destination, DestinationError, State, Step, TICK};
use crate::page::PageSet;
use crate::port::{DestinationVm, Link};
use crate::wire::{Arrived, Channel, FLAG_TELL, FrameType, Header, WireError, recv_set};
use std::time::Duration;

/// Says that the pages of a frame are in place, if it asks for that.
pub(super) fn tell_placed<L: Link>(
    channel: &mut Channel<L>,
    header: &Header,
) -> Result<(), DestinationError> {
    if header.flags & FLAG_TELL != 0 {
        channel.send(Header::bare(FrameType::Placed, header.round), &[])?;
    }
    Ok(())
}

impl<L: Link, H: DestinationVm<L>> Destination<L, H> {
    /// Whether pages follow the guest, or did.
    #[must_use]
    pub fn follows(&self) -> bool {
        self.missing_pages.as_ref().is_some_and(|a| a.begun())
    }

    /// Pages that will follow the guest.
    pub(super) fn list_missing(&mut self, header: &Header) -> Result<(), DestinationError> {
        let Some(layout) = &self.layout else {
            return Err(self.channel.refuse(header, "a greeting").into());
        };
        let missing = self
            .missing
            .get_or_insert_with(|| PageSet::new(layout.end()));
        let mut part = PageSet::new(layout.end());
        recv_set(&mut self.channel, header, layout, &mut part)?;
        self.host
            .drop_stale(&part)
            .map_err(DestinationError::Unfit)?;
        missing.union_with(&part);
        Ok(())
    }

    /// Waits for the next frame of the push, or (`false`) for the last page, which may come on another
    /// channel, or for a fault channel's failure.
    pub(super) fn wait_for_frame(&mut self) -> Result<bool, DestinationError> {
        const LAST: Duration = Duration::from_millis(1);
        let mut until = self.clock.now() + self.timeouts.transfer;
        let mut before = u64::MAX;
        loop {
            if self.can_complete() {
                return Ok(false);
            }
            // Before any frame: a push without a pause would hide it.
            if let Some(why) = self.missing_pages.as_ref().and_then(|a| a.lost()) {
                return Err(DestinationError::FaultChannel(why));
            }
            let left = self.missing_pages.as_ref().map_or(0, |a| a.left());
            if left < before {
                // Pages come on another channel: the source lives.
                (before, until) = (left, self.clock.now() + self.timeouts.transfer);
            }
            let wait = if self.pushed && left > 0 { LAST } else { TICK };
            if self
                .channel
                .link()
                .wait_readable(wait)
                .map_err(WireError::Io)?
            {
                return Ok(true);
            }
            if self.clock.now() >= until {
                return Err(if self.pushed && left > 0 {
                    DestinationError::Incomplete { pages: left }
                } else {
                    WireError::Io(std::io::ErrorKind::TimedOut.into()).into()
                });
            }
        }
    }

    /// Whether the next step needs no frame.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn needs_no_frame(&self) -> bool {
        self.untold.is_some() || self.can_complete()
    }

    /// Whether everything has come.
    fn can_complete(&self) -> bool {
        self.missing_pages
            .as_ref()
            .is_some_and(|a| (self.pushed || a.is_dismissed()) && a.is_complete())
    }

    /// A frame of the push.
    pub(super) fn following(
        &mut self,
        header: &Header,
        kind: FrameType,
    ) -> Result<(), DestinationError> {
        let Some(missing_pages) = &self.missing_pages else {
            return Err(DestinationError::NotPostCopy);
        };
        match kind {
            FrameType::Pages | FrameType::Zero if !self.pushed => {
                self.receiver
                    .receive_to(&mut self.channel, header, missing_pages)?;
                tell_placed(&mut self.channel, header)
            }
            FrameType::RoundEnd if !self.pushed && header.round == self.round + 1 => {
                if let Some(data_channels) = &self.data_channels {
                    data_channels.end_round(header.round)?;
                }
                self.round = header.round;
                self.pushed = true;
                Ok(())
            }
            FrameType::Verify if self.pushed => {
                self.channel.recv_payload(header, &mut self.buffer)?;
                for (gfn, hash) in (header.gfn..).zip(self.buffer.as_chunks::<8>().0) {
                    missing_pages.compare(gfn, *hash);
                }
                Ok(())
            }
            FrameType::Alive => Ok(()),
            _ => Err(self
                .channel
                .refuse(header, "pages of the running guest, or their end")
                .into()),
        }
    }

    /// Tells the source once everything is in place and compared.
    pub(super) fn completed(&mut self) -> Result<Step, DestinationError> {
        let done = self.missing_pages.as_ref().filter(|_| self.can_complete());
        let Some((faults, different)) = done.and_then(|a| a.complete()) else {
            return Ok(Step::Continue);
        };
        let ended = self
            .missing_pages
            .as_ref()
            .is_some_and(|a| a.is_dismissed());
        // The guest is complete, whether the source hears it or not.
        self.finish();
        let arrived = Arrived {
            faults,
            different,
            ended,
        };
        self.channel.send_json(FrameType::Arrived, &arrived)?;
        Ok(Step::Complete)
    }

    pub(super) fn finish(&mut self) {
        if let Some(missing_pages) = self.missing_pages.take() {
            missing_pages.end();
            self.host.end_post_copy();
        }
        self.enter(State::Complete);
    }
}
