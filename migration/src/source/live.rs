//! The live phase: collect, decide, send; and draining the link before the pause.

use super::engine::Source;
use super::error::SourceError;
use super::phases::{End, Tracking};
use super::stop::{How, Stopping};
use super::throttle::Throttled;
use crate::model::policy_of;
use crate::page::PageSet;
use crate::policy::{Decision, Policy, SendOrder, switch_over};
use crate::port::{Link, SourceVm, holes};
use crate::report::{Event, Phase};
use crate::sender::BATCH_PAGES;

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

/// The guest runs and is logged; memory goes out.
pub(super) struct Live<'s, 'a, 'g, L: Link, G: SourceVm<L>> {
    pub(super) source: &'s mut Source<'a, 'g, L, G>,
    pub(super) tracking: Tracking<'g, L, G>,
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
}
