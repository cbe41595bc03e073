//! The live phase: collect, decide, send; and draining the link before the pause.

use super::data_channels::worth_data_channels;
use super::{InFlight, LiveEnd, Source, SourceError, State, ms};
use crate::first_pass::FirstPass;
use crate::page::{PAGE_BYTES, PageSet, Run};
use crate::policy::{Decision, Policy, SendOrder};
use crate::port::{Link, SourceVm};
use crate::report::{Event, Round};
use crate::sender::{BATCH_PAGES, BatchMode, Batches, Sent};
use crate::wire::{FrameType, Header, WireError};
use std::time::Duration;

/// Progress is told this often.
pub(super) const PROGRESS_EVERY: Duration = Duration::from_millis(100);
/// Tells, on the engine's own thread, what comes next of the pages that [`Batches::to_come`] counts.
pub(super) type More<'m> = &'m mut dyn FnMut() -> Result<PageSet, SourceError>;
/// Rounds of fewer bytes measure the latency of the link rather than its bandwidth.
const MEASURABLE: u64 = 64 << 10;

impl<L: Link, G: SourceVm<L>> Source<'_, '_, L, G> {
    /// Sends rounds until the policy stops and the link is empty.
    pub(super) fn live(&mut self, policy: &mut dyn Policy) -> Result<LiveEnd, SourceError> {
        loop {
            self.check_cancel()?;
            self.take_acks()?;
            // One round may be on its way while the next is prepared: the link never idles, and
            // a peer that has gone silent is noticed instead of being sent rounds for ever.
            while self.in_flight.len() > 1 {
                self.take_ack()?;
            }
            // While the link is drained nothing more goes out, but what the pause would have to send is known.
            if self.state != State::Draining {
                self.send_written_blocks()?;
            }
            self.collect()?;
            self.disks.collect()?;
            let decision = policy.next(&self.view());
            let (end, why) = match decision {
                Decision::Send { mut pages, order } => {
                    pages.intersect_with(&self.pending);
                    if self.state == State::Draining {
                        self.enter(State::Running);
                    }
                    self.send_round(pages, order, false)?;
                    continue;
                }
                Decision::GiveUp { why } => return Err(SourceError::GaveUp(why)),
                Decision::Stop { why } => (LiveEnd::Stop, why),
                Decision::HandOver { order, why } => {
                    if self.round == 0 && self.announce_unpopulated()? {
                        continue;
                    }
                    (LiveEnd::HandOver(order), why)
                }
            };
            if self.in_flight.is_empty() && !self.disks.is_awaiting() {
                self.why = Some(why);
                return Ok(end);
            }
            // What still lies in socket buffers would be paid for in the pause.
            self.enter(State::Draining);
            while !self.in_flight.is_empty() || self.disks.is_awaiting() {
                self.check_cancel()?;
                self.take_ack()?;
            }
        }
    }

    /// Before post-copy: what was never written is said to be zero while the guest runs. That costs next to
    /// nothing; to follow the guest it would have to be placed page by page, and take memory there.
    fn announce_unpopulated(&mut self) -> Result<bool, SourceError> {
        let mut pages = PageSet::new(self.layout.end());
        for region in self.layout.runs() {
            let mut at = region.first;
            while let Some(run) = self.guest.unpopulated(Run::new(at, region.end() - at)) {
                pages.insert_run(run);
                at = run.end();
                if at >= region.end() {
                    break;
                }
            }
        }
        if pages.is_empty() {
            return Ok(false);
        }
        // Whatever the cap: a batch of zero pages is a few bytes.
        self.send_round_in(pages, SendOrder::Address, false, BATCH_PAGES)?;
        Ok(true)
    }

    /// Unites the dirty log with what is pending.
    pub(super) fn collect(&mut self) -> Result<(), SourceError> {
        self.fresh.clear();
        self.guest
            .collect_dirty(&mut self.fresh)
            .map_err(|e| SourceError::guest("reading the dirty log", e))?;
        let now = self.now();
        // A page stays in the log until it is cleared for sending: what was pending is not news.
        self.fresh.subtract(&self.pending);
        self.pending.union_with(&self.fresh);
        self.heat.record(&self.fresh);
        let (pages, over) = (self.fresh.len(), now.saturating_sub(self.collected_at));
        // The second collection of a round, after draining, finds only what is not pending yet: taken
        // alone it would make a guest that writes its working set all the time look calm, and pre-copy
        // would send round after round in search of a pause that it has.
        self.dirtied = if self.dirtied_round == self.round {
            (self.dirtied.0 + pages, self.dirtied.1 + over)
        } else {
            (pages, over)
        };
        self.dirtied_round = self.round;
        self.collected_at = now;
        if let Some(last) = self.rounds.last_mut() {
            last.dirtied += pages;
        }
        Ok(())
    }

    /// A report has at most this many rounds.
    const ROUNDS_KEPT: usize = 1000;

    /// Sends `pages` as one round and ends it with a barrier.
    pub(super) fn send_round(
        &mut self,
        pages: PageSet,
        order: SendOrder,
        paused: bool,
    ) -> Result<Sent, SourceError> {
        self.send_round_in(pages, order, paused, self.pacer.batch_pages())
    }

    /// As [`send_round`](Self::send_round), in batches of so many pages.
    fn send_round_in(
        &mut self,
        pages: PageSet,
        order: SendOrder,
        paused: bool,
        batch: u64,
    ) -> Result<Sent, SourceError> {
        self.round += 1;
        let started = self.now();
        self.progress.round_pages = pages.len();
        self.progress.round_sent = 0;
        let mode = BatchMode {
            round: self.round,
            paused,
            tell: false,
            warmer: 0,
            data_channels: 1,
        };
        // Of the first pages nobody knows yet how often they are dirtied.
        let learns = order == SendOrder::ColdFirst && self.sent_once.is_empty();
        let sent = if learns {
            self.send_first_pass(pages, mode, batch)?
        } else {
            let batches = Batches::new(pages, order, &self.heat, batch);
            self.send_batches(batches, mode, None)?
        };
        if self.rounds.len() >= Self::ROUNDS_KEPT {
            // The first and the last tell the story.
            self.rounds.remove(Self::ROUNDS_KEPT / 2);
            self.rounds_omitted += 1;
        }
        self.rounds.push(Round {
            n: self.round,
            pages: sent.pages(),
            bytes: sent.bytes,
            ms: 0.0,
            dirtied: 0,
            follows: false,
        });
        self.barrier(self.round)?;
        let ended = self.now();
        // Data channels send at the same time, and each looks for zero pages while others send: more than the time that went by
        // cannot have been the link's.
        let link = (sent.link + sent.coding).min(ended.saturating_sub(started));
        self.in_flight.push_back(InFlight {
            round: self.round,
            sent,
            link,
            started,
            ended,
            beside: self.disks.take_beside(),
        });
        Ok(sent)
    }

    /// What a round sends, on the channels that are worth it.
    fn send_batches(
        &mut self,
        batches: Batches,
        mode: BatchMode,
        more: Option<More<'_>>,
    ) -> Result<Sent, SourceError> {
        let few = !worth_data_channels(batches.left() + batches.to_come());
        if few || self.data_channels.is_empty() {
            self.send_here(batches, mode, more)
        } else {
            self.send_on_data_channels(batches, mode, more)
        }
    }

    /// A first pass that learns meanwhile what the guest writes to, and sends that last.
    fn send_first_pass(
        &mut self,
        pages: PageSet,
        mode: BatchMode,
        batch: u64,
    ) -> Result<Sent, SourceError> {
        let failed = |e| SourceError::guest("reading the dirty log", e);
        let guest = self.guest;
        let mut pass = FirstPass::new(pages);
        let mut words = Vec::new();
        // All are pending: from here on the log tells which of them are written. Each is cleared once more as it leaves.
        for part in pass.parts() {
            guest.clear_dirty(&part, &mut words).map_err(failed)?;
        }
        let mut log = PageSet::new(self.layout.end());
        let step = pass.next(&log);
        let to_come = pass.left().len();
        let first = Batches::new(step, SendOrder::Address, &self.heat, batch).before(to_come);
        let mut more = || {
            log.clear();
            guest.collect_dirty(&mut log).map_err(failed)?;
            Ok(pass.next(&log))
        };
        self.send_batches(first, mode, Some(&mut more))
    }

    /// Marks the end of a round on every channel.
    pub(super) fn barrier(&mut self, round: u32) -> Result<(), SourceError> {
        for (data_channel, _) in &mut self.data_channels {
            data_channel.send(Header::bare(FrameType::RoundEnd, round), &[])?;
        }
        self.data_channels_at = self.now();
        self.control
            .send(Header::bare(FrameType::RoundEnd, round), &[])?;
        Ok(())
    }

    /// Everything on the control channel, in this thread: there is no other, or little to send.
    fn send_here(
        &mut self,
        mut batches: Batches,
        mode: BatchMode,
        mut more: Option<More<'_>>,
    ) -> Result<Sent, SourceError> {
        let mut total = Sent::default();
        let mut runs = Vec::with_capacity(64);
        loop {
            if !batches.next(&mut runs) {
                match &mut more {
                    Some(more) if batches.to_come() > 0 => batches.append(more()?),
                    _ => return Ok(total),
                }
                continue;
            }
            self.check_cancel()?;
            let mode = BatchMode {
                warmer: batches.warmer(),
                ..mode
            };
            let waited = self.pace(mode);
            let mut sent =
                self.sender
                    .send(&mut self.control, self.guest, &runs, mode, self.setup.clock)?;
            self.pacer.charge(sent.bytes, self.setup.clock);
            sent.link += waited;
            self.delivered(&runs, sent);
            total.add(sent);
            self.take_acks()?;
            self.keep_data_channels_alive()?;
            self.tell_progress();
        }
    }

    /// Tells the progress, unless that was done a moment ago.
    pub(super) fn tell_progress(&mut self) {
        if self.now().saturating_sub(self.last_event) >= PROGRESS_EVERY {
            self.emit_progress();
        }
    }

    /// Waits for the user's cap. Not in the pause: there it would cost the guest.
    fn pace(&self, mode: BatchMode) -> Duration {
        if mode.paused {
            return Duration::ZERO;
        }
        let cancel = self.setup.cancel;
        self.pacer.wait(self.setup.clock, &|| cancel.is_cancelled())
    }

    /// Takes pages that were handed to the link off the pending set; before this they are still
    /// pending, whatever failed.
    pub(super) fn delivered(&mut self, runs: &[Run], sent: Sent) {
        for run in runs {
            self.pending.remove_run(*run);
            for gfn in run.first..run.end() {
                if !self.sent_once.insert(gfn) {
                    self.pages.resent += 1;
                }
            }
        }
        self.pages.sent += sent.data_pages;
        self.pages.zero += sent.zero_pages;
        self.pages.skipped += sent.skipped_pages;
        self.codecs.join(&sent.codecs);
        self.progress.round_sent += sent.pages();
    }

    /// Takes what has arrived, without waiting: acknowledgements, or the peer's reason to give up.
    pub(super) fn take_acks(&mut self) -> Result<(), SourceError> {
        while self.control.link().readable().map_err(WireError::Io)? {
            self.take_ack()?;
        }
        Ok(())
    }

    /// Waits for the next acknowledgement.
    pub(super) fn take_ack(&mut self) -> Result<(), SourceError> {
        let answered_at = self.answered_at.take();
        let header = self.control.recv_header()?;
        if self.disks.take_answer(&header) {
            return Ok(());
        }
        let expected = self.in_flight.front().copied();
        match expected {
            Some(flight) if header.kind == FrameType::RoundAck && header.round == flight.round => {
                self.in_flight.pop_front();
                // It may have come while data channels were sending.
                let now = answered_at.unwrap_or_else(|| self.now());
                let took = now.saturating_sub(flight.started);
                // What the link took: the time in its calls and until the last byte was placed.
                let (blocks, beside) = flight.beside;
                let link = flight.link + now.saturating_sub(flight.ended) + beside;
                if flight.sent.bytes + blocks < MEASURABLE {
                    // A small round measures the round trip, and the handshake's was measured while
                    // the destination had other things to do.
                    self.rtt = self.rtt.min(now.saturating_sub(flight.ended));
                }
                if flight.sent.data_pages * PAGE_BYTES + blocks >= MEASURABLE
                    || self.bandwidth.estimate().is_none() && flight.sent.pages() > 0
                {
                    // Of pages as they are in memory: it is pending pages that the estimate is for.
                    let bytes = flight.sent.bytes.max(flight.sent.data_pages * PAGE_BYTES);
                    self.bandwidth.record((bytes + blocks).max(1), link);
                }
                if let Some(round) = self.rounds.iter_mut().find(|r| r.n == flight.round) {
                    round.ms = ms(took);
                    let round = round.clone();
                    (self.setup.events)(Event::Round(round));
                }
                // The next round's pages began to move when this one's were in place.
                if let Some(next) = self.in_flight.front_mut() {
                    next.started = next.started.max(now);
                    next.ended = next.ended.max(now);
                }
                Ok(())
            }
            _ => Err(self
                .control
                .refuse(&header, "the acknowledgement of a round")
                .into()),
        }
    }

    /// Rounds whose acknowledgement never came have no duration; the report keeps them as sent.
    pub(super) fn drop_unacknowledged(&mut self) {
        self.in_flight.clear();
    }
}
