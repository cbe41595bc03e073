//! A guest that a migration brings: from the first word of it until it runs here.

use super::guest::{Guest, TakeOver};
use super::state::{Ending, State};
use super::{Inner, Vmm};
use crate::api::types::{ArrivalOutcome, IncomingReport, RecordStatus, What};
use std::sync::Arc;

impl Vmm {
    /// Whether a guest that arrives is still wanted.
    ///
    /// # Errors
    /// Why not; a sentence.
    pub fn wants_arrival(&self) -> Result<(), String> {
        self.core.lock().wants_arrival()
    }

    /// The source has handed a guest over: it belongs to this VMM from now on, and
    /// [arrives](Self::arrived) when it runs.
    ///
    /// # Errors
    /// It is not wanted any more; a sentence.
    pub fn claim_arrival(&self) -> Result<(), String> {
        let mut inner = self.core.lock();
        inner.wants_arrival()?;
        inner.enter(State::Starting);
        Ok(())
    }

    /// A migration has brought the guest; it runs, or stands still as it did at the source. To be
    /// called before the source can know: a client that hears of it there may send any request
    /// here.
    pub fn arrived(&self, guest: Arc<dyn Guest>, running: bool) {
        let mut inner = self.core.lock();
        match inner.state {
            State::Receiving { .. } | State::ArrivalInDoubt { .. } | State::Starting => {
                // Stopped while it was starting here: as if that had come a moment later.
                let ending = inner.ending.take();
                if ending.is_some() {
                    guest.stop();
                }
                inner.guest = Some(guest);
                match ending {
                    Some(ending) => self.core.finish(&mut inner, State::Ended(ending)),
                    None if running => inner.enter(State::Running),
                    None => inner.enter(State::Paused),
                }
            }
            // Stopped before the source handed it over, by a receiver that did not ask.
            _ => guest.stop(),
        }
    }

    /// A guest is complete here and the source fell silent before it handed it over; `why` is its
    /// sentence.
    pub fn arrival_in_doubt(&self, why: String, guest: Arc<dyn TakeOver>) {
        let mut inner = self.core.lock();
        if inner.wants_arrival().is_ok() {
            // A request to end was about a guest that would run; this may be its only copy.
            inner.ending = None;
            inner.enter(State::ArrivalInDoubt {
                why,
                guest,
                warned: false,
            });
        }
    }

    /// The source has said that it keeps the guest: a doubt is over, and the next may arrive.
    pub fn arrival_failed(&self, listening: String) {
        let mut inner = self.core.lock();
        if matches!(inner.state, State::ArrivalInDoubt { .. } | State::Starting) {
            inner.enter(State::Receiving { listening });
        }
    }

    /// News of the migration `session` that arrives, for the feed.
    pub fn incoming(
        &self,
        session: &str,
        policy: &str,
        status: RecordStatus,
        incoming: IncomingReport,
    ) {
        let mut inner = self.core.lock();
        let record = inner.history.get(session);
        let known = record.and_then(|record| record.incoming.as_ref());
        let before = known.map_or(0, |known| known.bytes_received);
        // Counted by its first end: what became of a doubt later is in its record.
        let open = record.is_none_or(|record| record.status == RecordStatus::UnderWay);
        let bytes = incoming.bytes_received.saturating_sub(before);
        inner.totals.received(bytes);
        if open && status != RecordStatus::UnderWay {
            inner.totals.arrived(policy, status, &incoming);
        }
        inner.history.arrives(session, policy, status, incoming);
    }

    /// What became of a connection, or of a migration that arrives, for the feed.
    pub fn tell_arrival(&self, outcome: ArrivalOutcome, explanation: String) {
        self.core.feed.tell(|| What::Arrival {
            outcome,
            explanation,
        });
    }

    /// No guest can arrive any more; the text is a sentence. One that has arrived goes on.
    pub fn listening_ended(&self, why: &str) {
        let mut inner = self.core.lock();
        if matches!(inner.state, State::Receiving { .. }) {
            let ending = Ending::NotReceived(why.to_owned());
            self.core.finish(&mut inner, State::Ended(ending));
        }
    }
}

impl Inner {
    fn wants_arrival(&self) -> Result<(), String> {
        match &self.state {
            State::Receiving { .. } | State::ArrivalInDoubt { .. } | State::Starting => Ok(()),
            state => Err(format!(
                "the receiver takes no guest any more: {}",
                state.explanation()
            )),
        }
    }
}
