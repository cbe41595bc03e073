//! The live phase: collect, decide, send; and draining the link before the pause.

use super::data_channels::worth_data_channels;
use super::phases::{End, Live};
use super::stop::{How, Stopping};
use super::throttle::Throttled;
use super::{InFlight, Source, SourceError, ms};
use crate::first_pass::FirstPass;
use crate::model::policy_of;
use crate::page::{PAGE_BYTES, PageSet, Run};
use crate::policy::{Decision, Policy, SendOrder, switch_over};
use crate::port::{Link, SourceVm, holes};
use crate::report::{Event, Phase, Round};
use crate::sender::{BATCH_PAGES, BatchMode, Batches, Sent};
use crate::wire::{FrameType, Header, WireError};
use std::time::Duration;

/// Progress is told this often.
pub(super) const PROGRESS_EVERY: Duration = Duration::from_millis(100);
/// Returns the next step of the pages that [`Batches::to_come`] counts; called on the engine's
/// thread.
pub(super) type More<'m> = &'m mut dyn FnMut() -> Result<PageSet, SourceError>;
/// Rounds of fewer bytes measure the latency of the link rather than its bandwidth.
const MEASURABLE: u64 = 64 << 10;

impl<'s, 'a, 'g, L: Link, G: SourceVm<L>> Live<'s, 'a, 'g, L, G> {
    /// Sends rounds until the policy stops, the link is empty and the disks are flushed.
    pub(super) fn run(
        self,
        policy: &mut dyn Policy,
    ) -> Result<Stopping<'s, 'a, 'g, L, G>, End<'g>> {
        let Self { source, tracking } = self;
        match source.live(policy) {
            Ok(how) => Ok(Stopping {
                source,
                tracking: Some(tracking),
                how,
            }),
            Err(error) => Err(End::Here(error)),
        }
    }
}

impl<'g, L: Link, G: SourceVm<L>> Source<'_, 'g, L, G> {
    /// Whatever comes of it, the guest runs at full speed afterwards.
    fn live(&mut self, policy: &mut dyn Policy) -> Result<How, SourceError> {
        let mut slowed = None;
        let result = self.send_rounds(policy, &mut slowed);
        self.full_speed(slowed);
        result
    }

    fn send_rounds(
        &mut self,
        policy: &mut dyn Policy,
        slowed: &mut Option<Throttled<'g>>,
    ) -> Result<How, SourceError> {
        // What the host has cached of the disks is written while memory goes out, and not in the
        // pause.
        self.flush_live()?;
        let (mut draining, mut announced) = (false, false);
        let mut other: Option<Box<dyn Policy>> = None;
        self.look_for_empty();
        self.session.setup.steering.memory();
        loop {
            self.session.check()?;
            self.take_acks()?;
            // One round may be on its way while the next is prepared: the link never idles, and
            // a peer that has gone silent is noticed instead of being sent rounds for ever.
            while self.flight.in_flight.len() > 1 {
                self.take_ack()?;
            }
            // While the link is drained nothing more goes out, but what the pause would have to
            // send is known.
            if !draining {
                self.send_written_blocks()?;
            }
            self.collect()?;
            self.disks.collect()?;
            self.steer();
            if std::mem::take(&mut self.helm.other_policy) {
                let taken = other.insert(policy_of(&self.helm.options));
                self.record.policy = taken.name();
                taken.name().clone_into(&mut self.record.progress.policy);
            }
            let policy: &mut dyn Policy = match &mut other {
                Some(other) => other.as_mut(),
                None => &mut *policy,
            };
            if std::mem::take(&mut self.helm.other_limits) {
                policy.tune(&self.helm.options);
            }
            let view = self.view();
            let decision = if self.helm.switch_over {
                switch_over(policy, &view, &self.helm.options)
            } else {
                policy.next(&view)
            };
            if let Some(why) = policy.choice() {
                (self.session.setup.events)(Event::Choice { why });
            }
            let (how, why) = match decision {
                Decision::Send { mut pages, order } => {
                    pages.intersect_with(&self.memory.pending);
                    if std::mem::take(&mut draining) {
                        self.enter(Phase::Live);
                    }
                    self.send_round(pages, order, false)?;
                    continue;
                }
                Decision::Watch => {
                    self.watch()?;
                    continue;
                }
                Decision::Throttle { dirty_rate, why } => {
                    self.slow(slowed, dirty_rate, why)?;
                    continue;
                }
                Decision::GiveUp { why } if self.session.setup.steering.close() => {
                    return Err(SourceError::GaveUp(why));
                }
                // The user has just asked for something else.
                Decision::GiveUp { .. } => continue,
                Decision::Stop { why } => (How::Copy, why),
                Decision::HandOver { order, why } => {
                    if self.transport.faults.is_empty() {
                        return Err(SourceError::NoPostCopy);
                    }
                    if !std::mem::replace(&mut announced, true) && self.announce_unpopulated()? {
                        continue;
                    }
                    (How::Follow(order), why)
                }
            };
            // What the guest writes meanwhile may be worth another round.
            if self.hash_live()? {
                continue;
            }
            let drained = self.flight.in_flight.is_empty() && !self.disks.is_awaiting();
            if drained && self.is_flushed() {
                if !self.session.setup.steering.close() {
                    continue;
                }
                self.record.why = Some(why);
                return Ok(how);
            }
            // What still lies in socket buffers and disk caches would be paid for in the pause.
            if !std::mem::replace(&mut draining, true) {
                self.enter(Phase::Draining);
            }
            while !self.flight.in_flight.is_empty() || self.disks.is_awaiting() {
                self.session.check()?;
                self.take_ack()?;
            }
            if !self.is_flushed() {
                self.flush_live()?;
            }
        }
    }

    /// Before post-copy: what was never written is said to be zero while the guest runs. That costs
    /// next to nothing; to follow the guest it would have to be placed page by page, and take
    /// memory there.
    fn announce_unpopulated(&mut self) -> Result<bool, SourceError> {
        let mut unsent = self.memory.pending.clone();
        unsent.subtract(&self.memory.sent_once);
        if unsent.is_empty() {
            return Ok(false);
        }
        let mut pages = self.unpopulated(usize::MAX);
        pages.intersect_with(&unsent);
        if pages.is_empty() {
            return Ok(false);
        }
        self.memory.empty.clone_from(&pages);
        // Whatever the cap: a batch of zero pages is a few bytes.
        self.send_round_in(pages, SendOrder::Address, false, BATCH_PAGES)?;
        Ok(true)
    }

    /// What was never written or was given back, of at most so many pieces.
    fn unpopulated(&self, pieces: usize) -> PageSet {
        let mut pages = PageSet::new(self.memory.layout.end());
        let runs = self.memory.layout.runs().iter();
        let found = runs.flat_map(|region| holes(self.guest, *region));
        found.take(pieces).for_each(|hole| pages.insert_run(hole));
        pages
    }

    /// Looks before anything is sent where nothing seems to lie, as far as that is told soon.
    fn look_for_empty(&mut self) {
        /// Memory in more pieces than this is looked at as it goes out.
        const PIECES: usize = 4096;
        self.memory.empty = self.unpopulated(PIECES);
    }

    /// Pages to be sent, in batches of at most so many but for those that seem to hold nothing.
    fn batches(&self, pages: PageSet, order: SendOrder, batch: u64) -> Batches {
        let empty = Some(&self.memory.empty).filter(|empty| !empty.is_empty());
        Batches::new(pages, order, &self.memory.heat, batch).with_empty(empty.cloned())
    }

    /// Takes pending pages off the dirty log, which then shows what is written to them: they are
    /// pending all the same.
    fn watch(&mut self) -> Result<(), SourceError> {
        let log = if std::mem::replace(&mut self.memory.watched, true) {
            let mut log = self.memory.written.clone();
            log.intersect_with(&self.memory.pending);
            log
        } else {
            self.memory.pending.clone()
        };
        self.clear(&FirstPass::new(log))
    }

    fn clear(&mut self, pass: &FirstPass) -> Result<(), SourceError> {
        let mut words = Vec::new();
        for part in pass.parts() {
            self.guest
                .clear_dirty(&part, &mut words)
                .map_err(|e| SourceError::guest("clearing the dirty log", e))?;
        }
        Ok(())
    }

    /// Unites the dirty log with what is pending.
    pub(super) fn collect(&mut self) -> Result<(), SourceError> {
        self.memory.fresh.clear();
        self.guest
            .collect_dirty(&mut self.memory.fresh)
            .map_err(|e| SourceError::guest("reading the dirty log", e))?;
        let now = self.now();
        if self.memory.watched {
            self.memory.written.clone_from(&self.memory.fresh);
        }
        // A page stays in the log until it is cleared for sending: what was pending is not news.
        self.memory.fresh.subtract(&self.memory.pending);
        self.memory.pending.union_with(&self.memory.fresh);
        if let Some(hashed) = &mut self.memory.hashed {
            hashed.subtract(&self.memory.pending);
        }
        self.memory.heat.record(&self.memory.fresh);
        // Counted in the one pass over the bitmap that is needed in any case.
        let regions = self.memory.fresh.len_by_part(Round::REGIONS);
        let (pages, over) = (
            regions.iter().sum::<u64>(),
            now.saturating_sub(self.memory.collected_at),
        );
        // The second collection of a round, after draining, finds only what is not pending yet:
        // taken alone it would make a guest that writes its working set all the time look calm, and
        // pre-copy would send round after round in search of a pause that it has.
        self.memory.dirtied = if self.memory.dirtied_round == self.flight.round {
            (self.memory.dirtied.0 + pages, self.memory.dirtied.1 + over)
        } else {
            (pages, over)
        };
        self.memory.dirtied_round = self.flight.round;
        self.memory.collected_at = now;
        if let Some(last) = self.record.rounds.last_mut() {
            last.dirty(&regions);
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
        self.send_round_in(pages, order, paused, self.transport.pacer.batch_pages())
    }

    /// As [`send_round`](Self::send_round), in batches of so many pages.
    fn send_round_in(
        &mut self,
        pages: PageSet,
        order: SendOrder,
        paused: bool,
        batch: u64,
    ) -> Result<Sent, SourceError> {
        self.flight.round += 1;
        let started = self.now();
        self.record.progress.round = self.flight.round;
        self.record.progress.round_pages = pages.len();
        self.record.progress.round_sent = 0;
        let mode = BatchMode {
            round: self.flight.round,
            paused,
            tell: false,
            warmer: 0,
            data_channels: 1,
        };
        // How often the first pages are dirtied is not known yet.
        let learns = order == SendOrder::ColdFirst && self.memory.sent_once.is_empty();
        let sent = if learns {
            self.send_first_pass(pages, mode, batch)?
        } else {
            let batches = self.batches(pages, order, batch);
            self.send_batches(batches, mode, None)?
        };
        if self.record.rounds.len() >= Self::ROUNDS_KEPT {
            // The first and the last tell the story.
            self.record.rounds.remove(Self::ROUNDS_KEPT / 2);
            self.record.rounds_omitted += 1;
        }
        self.record.rounds.push(Round {
            n: self.flight.round,
            pages: sent.pages(),
            bytes: sent.bytes,
            ms: 0.0,
            dirtied: 0,
            dirtied_regions: Vec::new(),
            follows: false,
        });
        self.barrier(self.flight.round)?;
        let ended = self.now();
        // Data channels send at the same time, and each looks for zero pages while others send:
        // more than the time that went by cannot have been the link's.
        let link = (sent.link + sent.coding).min(ended.saturating_sub(started));
        self.flight.in_flight.push_back(InFlight {
            round: self.flight.round,
            sent,
            link,
            started,
            ended,
            disks: self.disks.take_since_round(),
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
        if few || self.transport.data_channels.is_empty() {
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
        // All are pending: from here on the log tells which of them are written. Each is cleared
        // once more as it leaves.
        self.clear(&pass)?;
        let mut log = PageSet::new(self.memory.layout.end());
        let step = pass.next(&log);
        let to_come = pass.left().len();
        let first = self
            .batches(step, SendOrder::Address, batch)
            .before(to_come);
        let mut more = || {
            log.clear();
            guest.collect_dirty(&mut log).map_err(failed)?;
            Ok(pass.next(&log))
        };
        self.send_batches(first, mode, Some(&mut more))
    }

    /// Marks the end of a round on every channel.
    pub(super) fn barrier(&mut self, round: u32) -> Result<(), SourceError> {
        for (data_channel, _) in &mut self.transport.data_channels {
            data_channel.send(Header::bare(FrameType::RoundEnd, round), &[])?;
        }
        self.transport.alive_at = self.now();
        self.session
            .control
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
            self.session.check()?;
            let mode = BatchMode {
                warmer: batches.warmer(),
                ..mode
            };
            let waited = self.pace(mode);
            let mut sent = self.transport.sender.send(
                &mut self.session.control,
                self.guest,
                &runs,
                mode,
                self.session.setup.clock,
            )?;
            self.transport
                .pacer
                .charge(sent.bytes, self.session.setup.clock);
            sent.link += waited;
            self.delivered(&runs, sent);
            total.add(sent);
            self.take_acks()?;
            self.keep_alive()?;
            self.tell_progress();
            if self.session.setup.steering.has_news() {
                // What was not sent stays pending.
                if self.steer() {
                    return Ok(total);
                }
                batches.resize(self.transport.pacer.batch_pages());
            }
            let lasted = self.now().saturating_sub(self.record.memory_began);
            if !mode.paused && self.helm.is_time_up(lasted) {
                return Ok(total);
            }
        }
    }

    /// Tells the progress, unless that was done a moment ago.
    pub(super) fn tell_progress(&mut self) {
        if self.now().saturating_sub(self.record.last_event) >= PROGRESS_EVERY {
            self.emit_progress();
        }
    }

    /// Waits for the user's cap. Not in the pause: there it would cost the guest.
    fn pace(&self, mode: BatchMode) -> Duration {
        if mode.paused {
            return Duration::ZERO;
        }
        let (owner, steering) = (self.session.setup.owner, self.session.setup.steering);
        self.transport.pacer.wait(self.session.setup.clock, &|| {
            owner.is_cancelled() || steering.has_news()
        })
    }

    /// Takes pages that were handed to the link off the pending set; before this they are still
    /// pending, whatever failed.
    pub(super) fn delivered(&mut self, runs: &[Run], sent: Sent) {
        for run in runs {
            self.memory.pending.remove_run(*run);
            self.record.pages.resent += self.memory.sent_once.count_in(*run);
            self.memory.sent_once.insert_run(*run);
            self.memory.empty.remove_run(*run);
        }
        self.record.pages.sent += sent.data_pages;
        self.record.pages.zero += sent.zero_pages;
        self.record.pages.skipped += sent.skipped_pages;
        self.record.codecs.join(&sent.codecs);
        self.record.progress.round_sent += sent.pages();
    }

    /// Takes what has arrived, without waiting: acknowledgements, or the peer's reason to give up.
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
