//! What the destination says while memory goes out: which rounds are in place.

use super::engine::Source;
use super::error::SourceError;
use super::record::ms;
use crate::page::PAGE_BYTES;
use crate::port::{Link, SourceVm};
use crate::report::Event;
use crate::wire::{FrameType, WireError};

/// Rounds of fewer bytes measure the latency of the link rather than its bandwidth.
const MEASURABLE: u64 = 64 << 10;

impl<L: Link, G: SourceVm<L>> Source<'_, '_, L, G> {
    /// Takes what has arrived, without waiting: acknowledgements, or the peer's reason to abort.
    pub(super) fn take_acks(&mut self) -> Result<(), SourceError> {
        while self
            .session
            .control
            .link()
            .readable()
            .map_err(WireError::Io)?
        {
            self.take_ack()?;
        }
        Ok(())
    }

    /// Waits for the next acknowledgement.
    pub(super) fn take_ack(&mut self) -> Result<(), SourceError> {
        let answered_at = self.flight.answered_at.take();
        let header = self.session.recv()?;
        if self.disks.take_answer(&header) {
            return Ok(());
        }
        let expected = self.flight.in_flight.front().copied();
        match expected {
            Some(flight) if header.kind == FrameType::RoundAck && header.round == flight.round => {
                self.flight.in_flight.pop_front();
                // It may have come while data channels were sending.
                let now = answered_at.unwrap_or_else(|| self.now());
                let took = now.saturating_sub(flight.started);
                // What the link took: the time in its calls and until the last byte was placed.
                let (blocks, blocks_took) = flight.disks;
                let link = flight.link + now.saturating_sub(flight.ended) + blocks_took;
                if flight.sent.bytes + blocks < MEASURABLE {
                    // A small round measures the round trip, and the handshake's was measured while
                    // the destination had other things to do.
                    self.session.rtt = self.session.rtt.min(now.saturating_sub(flight.ended));
                }
                if flight.sent.data_pages * PAGE_BYTES + blocks >= MEASURABLE
                    || self.flight.bandwidth.estimate().is_none() && flight.sent.pages() > 0
                {
                    // Of pages as they are in memory: it is pending pages that the estimate is for.
                    let bytes = flight.sent.bytes.max(flight.sent.data_pages * PAGE_BYTES);
                    self.flight.bandwidth.record((bytes + blocks).max(1), link);
                }
                if let Some(round) = self.record.rounds.iter_mut().find(|r| r.n == flight.round) {
                    round.ms = ms(took);
                    let round = round.clone();
                    (self.session.setup.events)(Event::Round(round));
                }
                // The next round's pages began to move when this one's were in place.
                if let Some(next) = self.flight.in_flight.front_mut() {
                    next.started = next.started.max(now);
                    next.ended = next.ended.max(now);
                }
                Ok(())
            }
            _ => Err(self
                .session
                .control
                .refuse(&header, "the acknowledgement of a round")
                .into()),
        }
    }

    /// Rounds whose acknowledgement never came have no duration; the report keeps them as sent.
    pub(super) fn drop_unacknowledged(&mut self) {
        self.flight.in_flight.clear();
    }
}
