//! Fault channels: asking for the pages that the guest waits for.
//!
//! One thread each, one request under way each: take a fault, ask, place the answer. With as many
//! as the guest has vCPUs none of them waits for another's page.

use super::error::DestinationError;
use super::missing_pages::{FaultIs, MissingPages};
use super::pages::PageReceiver;
use crate::page::{Gfn, Run};
use crate::port::{Link, PageSink, post_copy};
use crate::wire::{Channel, FrameType, Header};
use std::sync::Arc;
use std::time::Duration;

/// How often a thread without faults looks whether it is over.
const TICK: Duration = Duration::from_millis(100);

/// One fault channel.
pub struct FaultChannel<L, S> {
    channel: Channel<L>,
    missing_pages: Arc<MissingPages<L, S>>,
    receiver: PageReceiver,
    /// Of the connection that it belongs to.
    era: u64,
    /// The source was asked and has not answered.
    asking: bool,
}

impl<L: Link, S: PageSink<L>> FaultChannel<L, S> {
    pub(super) fn new(
        mut channel: Channel<L>,
        missing_pages: Arc<MissingPages<L, S>>,
        era: u64,
        timeout: Duration,
    ) -> Self {
        channel.set_end(missing_pages.layout.end());
        channel.link().set_timeout(Some(timeout));
        Self {
            channel,
            missing_pages,
            receiver: PageReceiver::default(),
            era,
            asking: false,
        }
    }

    /// Serves faults until every page is in place; after the connection is lost, takes note of them
    /// until there is another. `waited_for` says whether the guest may still come.
    pub fn run(mut self, waited_for: &dyn Fn() -> bool) {
        let sink = loop {
            if let Some(begun) = self.missing_pages.wait_begun(TICK) {
                break begun;
            }
            if !waited_for() {
                return;
            }
        };
        while !self.ended() {
            if let Err(error) = self.step(sink.as_ref(), TICK) {
                if !self.ended() {
                    self.missing_pages.lose(&error.to_string());
                }
                break;
            }
        }
        let Self {
            channel,
            missing_pages,
            era,
            ..
        } = self;
        drop(channel);
        // No source can be asked now. Faults are noted, and requested when the source is
        // back.
        while missing_pages.is_lost(era) {
            let noted = post_copy(&*sink).and_then(|memory| match memory.next_fault(TICK)? {
                Some(fault) if missing_pages.fault(fault, era) == FaultIs::Local => {
                    memory.place_zero(Run::new(fault.gfn, 1))
                }
                _ => Ok(()),
            });
            if let Err(error) = noted {
                tracing::warn!(%error, "page faults are not noted until the source reconnects");
                return;
            }
        }
    }

    /// Whether it has nothing more to do.
    pub(crate) fn ended(&self) -> bool {
        self.missing_pages.ended(self.era)
    }

    /// Whether the next step waits for the source's answer.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) const fn is_asking(&self) -> bool {
        self.asking
    }

    /// Takes the source's answer, or the next fault, for which it waits at most so long.
    ///
    /// # Errors
    /// When the channel or this host's memory fails.
    pub fn step(&mut self, sink: &S, wait: Duration) -> Result<(), DestinationError> {
        if self.asking {
            return self.answered();
        }
        if let Some(gfn) = self.missing_pages.next_unasked(self.era) {
            return self.ask(gfn);
        }
        let memory = post_copy(sink).map_err(DestinationError::Memory)?;
        let fault = memory.next_fault(wait).map_err(DestinationError::Memory)?;
        let Some(fault) = fault else { return Ok(()) };
        match self.missing_pages.fault(fault, self.era) {
            FaultIs::New => self.ask(fault.gfn),
            FaultIs::Known => Ok(()),
            FaultIs::Local => memory
                .place_zero(Run::new(fault.gfn, 1))
                .map_err(DestinationError::Memory),
        }
    }

    fn ask(&mut self, gfn: Gfn) -> Result<(), DestinationError> {
        let request = Header {
            gfn,
            count: 1,
            ..Header::bare(FrameType::PageRequest, 0)
        };
        self.asking = true;
        self.channel.send(request, &[])?;
        Ok(())
    }

    fn answered(&mut self) -> Result<(), DestinationError> {
        self.asking = false;
        let header = self.channel.recv_header()?;
        match header.kind {
            FrameType::Pages | FrameType::Zero => {
                self.receiver
                    .receive_to(&mut self.channel, &header, &self.missing_pages)
            }
            FrameType::OnItsWay => {
                self.missing_pages.on_its_way();
                Ok(())
            }
            _ => Err(self
                .channel
                .refuse(&header, "the page that was asked for")
                .into()),
        }
    }
}
