//! The live phase: collect, decide, send; and draining the link before the pause.

use super::phases::{End, Live};
use super::stop::{How, Stopping};
use super::throttle::Throttled;
use super::{Source, SourceError, ms};
use crate::first_pass::FirstPass;
use crate::model::policy_of;
use crate::page::{PAGE_BYTES, PageSet};
use crate::policy::{Decision, Policy, SendOrder, switch_over};
use crate::port::{Link, SourceVm, holes};
use crate::report::{Event, Phase, Round};
use crate::sender::BATCH_PAGES;
use crate::wire::{FrameType, WireError};

/// Rounds of fewer bytes measure the latency of the link rather than its bandwidth.
const MEASURABLE: u64 = 64 << 10;

/// What the live phase remembers from round to round.
struct Course<'p, 'g> {
    policy: &'p mut dyn Policy,
    /// The policy that the user has asked for instead.
    other: Option<Box<dyn Policy>>,
    /// The link is being emptied before the pause.
    draining: bool,
    /// What was never written was said to be zero.
    announced: bool,
    slowed: Option<Throttled<'g>>,
}

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
        let mut course = Course {
            policy,
            other: None,
            draining: false,
            announced: false,
            slowed: None,
        };
        let result = self.send_rounds(&mut course);
        self.full_speed(course.slowed);
        result
    }

    fn send_rounds(&mut self, course: &mut Course<'_, 'g>) -> Result<How, SourceError> {
        // What the host has cached of the disks is written while memory goes out, and not in the
        // pause.
        self.flush_live()?;
        self.look_for_empty();
        self.session.setup.steering.memory();
        loop {
            self.catch_up(course.draining)?;
            let decision = self.decide(course);
            let Some((how, why)) = self.carry_out(decision, course)? else {
                continue;
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
            self.drain(course)?;
        }
    }

    /// Takes what the destination has acknowledged and what the guest has written meanwhile.
    fn catch_up(&mut self, draining: bool) -> Result<(), SourceError> {
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
        self.disks.collect()
    }

    /// Asks the policy, or another one that the user has asked for meanwhile.
    fn decide(&mut self, course: &mut Course<'_, 'g>) -> Decision {
        self.steer();
        if std::mem::take(&mut self.helm.other_policy) {
            let taken = course.other.insert(policy_of(&self.helm.options));
            self.record.policy = taken.name();
            taken.name().clone_into(&mut self.record.progress.policy);
        }
        let policy: &mut dyn Policy = match &mut course.other {
            Some(other) => other.as_mut(),
            None => &mut *course.policy,
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
        decision
    }

    /// Does what was decided; how and why the live phase ends, if it does.
    fn carry_out(
        &mut self,
        decision: Decision,
        course: &mut Course<'_, 'g>,
    ) -> Result<Option<(How, String)>, SourceError> {
        match decision {
            Decision::Send { mut pages, order } => {
                pages.intersect_with(&self.memory.pending);
                if std::mem::take(&mut course.draining) {
                    self.enter(Phase::Live);
                }
                self.send_round(pages, order, false)?;
            }
            Decision::Watch => self.watch()?,
            Decision::Throttle { dirty_rate, why } => {
                self.slow(&mut course.slowed, dirty_rate, why)?;
            }
            Decision::GiveUp { why } if self.session.setup.steering.close() => {
                return Err(SourceError::GaveUp(why));
            }
            // The user has just asked for something else.
            Decision::GiveUp { .. } => {}
            Decision::Stop { why } => return Ok(Some((How::Copy, why))),
            Decision::HandOver { order, why } => {
                if self.transport.faults.is_empty() {
                    return Err(SourceError::NoPostCopy);
                }
                let first = !std::mem::replace(&mut course.announced, true);
                if !(first && self.announce_unpopulated()?) {
                    return Ok(Some((How::Follow(order), why)));
                }
            }
        }
        Ok(None)
    }

    /// Waits for what still lies in socket buffers and disk caches: it would be paid for in the
    /// pause.
    fn drain(&mut self, course: &mut Course<'_, 'g>) -> Result<(), SourceError> {
        if !std::mem::replace(&mut course.draining, true) {
            self.enter(Phase::Draining);
        }
        while !self.flight.in_flight.is_empty() || self.disks.is_awaiting() {
            self.session.check()?;
            self.take_ack()?;
        }
        if !self.is_flushed() {
            self.flush_live()?;
        }
        Ok(())
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

    pub(super) fn clear(&mut self, pass: &FirstPass) -> Result<(), SourceError> {
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
