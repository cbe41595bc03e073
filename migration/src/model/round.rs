//! The state of a modelled migration, and a round of it: the model's counterpart of the source
//! engine's live phase.

use super::{Activity, Clearing, Outcome, Round, Setup};
use crate::first_pass::FirstPass;
use crate::numbers::{pages_in, seconds};
use crate::page::{Heat, PageSet, Run};
use crate::policy::{SendOrder, View};
use crate::sender::{BATCH_PAGES, Batches};
use std::collections::VecDeque;
use std::time::Duration;

/// What looking at the dirty log takes, in seconds: rounds without pages take time, too.
const COLLECT: f64 = 10e-6;

pub(super) struct Rounds<'a> {
    setup: &'a Setup,
    guest: &'a mut dyn Activity,
    cap: Option<f64>,
    now: f64,
    /// The dirty log: a page is in it from its first write until it is cleared.
    log: PageSet,
    pending: PageSet,
    pending_pages: u64,
    sent_once: PageSet,
    heat: Heat,
    fresh: PageSet,
    fresh_pages: u64,
    fresh_over: f64,
    /// The log as last read, once the policy watches it.
    written: PageSet,
    watched: bool,
    post_copy: bool,
    fresh_round: u32,
    collected_at: f64,
    /// When the rounds on their way will have been acknowledged.
    in_flight: VecDeque<f64>,
    acknowledged: bool,
    /// Which pages are written often is known: the first pass need not find out.
    learned: bool,
    sent: u64,
    resent: u64,
    /// Bytes of pages on the wire.
    bytes: f64,
    rounds: Vec<Round>,
}

/// How a modelled migration begins.
#[derive(Clone, Debug, Default)]
pub(super) struct Begin {
    /// The user's cap in bytes per second.
    pub cap: Option<f64>,
    /// Whether the guest may be handed over before its pages.
    pub post_copy: bool,
    /// Where it stands; `None` is at its beginning.
    pub from: Option<Start>,
}

/// Where a migration stands that is modelled from there on.
#[derive(Clone, Debug)]
pub(crate) struct Start {
    /// Pages that are missing or stale at the destination.
    pub pending: PageSet,
    /// Pages that were sent at least once.
    pub sent: PageSet,
    /// How often pages are written: the first pass has been learning.
    pub heat: Heat,
}

/// A round that is being sent.
struct Sending {
    began: f64,
    sent: u64,
    bytes: f64,
    bandwidth: f64,
}

impl<'a> Rounds<'a> {
    pub fn new(setup: &'a Setup, begin: Begin, guest: &'a mut dyn Activity) -> Self {
        let end = setup.layout.end();
        let measured = begin.from.is_some();
        let from = begin.from.unwrap_or_else(|| Start {
            pending: setup.layout.all(),
            sent: PageSet::new(end),
            heat: Heat::new(end),
        });
        Self {
            setup,
            guest,
            cap: begin.cap,
            now: 0.0,
            log: from.pending.clone(),
            pending_pages: from.pending.len(),
            pending: from.pending,
            sent_once: from.sent,
            heat: from.heat,
            fresh: PageSet::new(end),
            fresh_pages: 0,
            fresh_over: 0.0,
            written: PageSet::new(end),
            watched: false,
            post_copy: begin.post_copy,
            fresh_round: 0,
            collected_at: 0.0,
            in_flight: VecDeque::new(),
            acknowledged: measured,
            learned: measured,
            sent: 0,
            resent: 0,
            bytes: 0.0,
            rounds: Vec::new(),
        }
    }

    /// Rounds so far.
    pub fn count(&self) -> u32 {
        u32::try_from(self.rounds.len()).unwrap_or(u32::MAX)
    }

    /// Pages that are missing or stale at the destination, as last collected.
    pub const fn pending(&self) -> &PageSet {
        &self.pending
    }

    /// Pages that the last collection found newly dirty.
    pub const fn fresh(&self) -> &PageSet {
        &self.fresh
    }

    /// Seconds since the migration began.
    pub const fn now(&self) -> f64 {
        self.now
    }

    /// The guest's size and the link.
    pub const fn setup(&self) -> &'a Setup {
        self.setup
    }

    /// The guest itself.
    pub fn guest(&mut self) -> &mut dyn Activity {
        self.guest
    }

    /// `sent` pages of so many bytes, all those of the set, have followed the guest, the last of
    /// them at `end`.
    pub fn followed(&mut self, pages: &PageSet, (sent, bytes): (u64, f64), end: f64) {
        pages.runs().for_each(|run| self.deliver(run));
        self.bytes += bytes;
        self.now = self.now.max(end);
        self.end_round(sent);
    }

    /// Bytes per second while the guest runs.
    pub fn live_bandwidth(&self) -> f64 {
        let link = self.setup.bandwidth.max(1.0);
        self.cap.map_or(link, |cap| cap.min(link))
    }

    /// The guest runs until `now`.
    fn pass_until(&mut self, now: f64) {
        if now > self.now {
            self.now = now;
            self.guest.advance(now, &mut self.log);
        }
    }

    fn acknowledge(&mut self, most: usize) {
        while let Some(&at) = self.in_flight.front()
            && (at <= self.now || self.in_flight.len() > most)
        {
            self.in_flight.pop_front();
            self.acknowledged = true;
            self.pass_until(at);
        }
    }

    /// As the engine collects: what was pending already is not news.
    pub fn collect(&mut self) {
        self.acknowledge(1);
        self.pass_until(self.now + COLLECT);
        self.fresh.clear();
        self.fresh.union_with(&self.log);
        if self.watched {
            self.written.clone_from(&self.log);
        }
        self.fresh.subtract(&self.pending);
        self.pending.union_with(&self.fresh);
        self.heat.record(&self.fresh);
        let (pages, over) = (self.fresh.len(), self.now - self.collected_at);
        if self.fresh_round == self.count() {
            // Again after draining: together with what was found before.
            self.fresh_pages += pages;
            self.fresh_over += over;
        } else {
            (self.fresh_pages, self.fresh_over) = (pages, over);
        }
        self.fresh_round = self.count();
        self.collected_at = self.now;
        self.pending_pages = self.pending.len();
        if let Some(last) = self.rounds.last_mut() {
            last.pending = self.pending_pages;
        }
    }

    /// Takes pending pages off the log, as the engine does.
    pub fn watch(&mut self) {
        self.watched = true;
        self.log.subtract(&self.pending);
    }

    /// Waits until nothing is on its way; says whether there was anything to wait for.
    pub fn drain(&mut self) -> bool {
        let busy = !self.in_flight.is_empty();
        self.acknowledge(0);
        busy
    }

    pub fn view(&self) -> View<'_> {
        View {
            round: self.count(),
            total_pages: self.setup.layout.pages(),
            pending: &self.pending,
            pending_pages: self.pending_pages,
            sent: &self.sent_once,
            heat: &self.heat,
            written: &self.written,
            dirtied_pages: self.fresh_pages,
            dirtied_over: seconds(self.fresh_over),
            bandwidth: self
                .acknowledged
                .then(|| self.effective(self.live_bandwidth())),
            cap: self.cap,
            state_bytes: self.setup.state_bytes,
            disk_bytes: 0,
            pause_overhead: self.setup.pause_overhead,
            round_trip: self.setup.round_trip,
            post_copy: self.post_copy,
            elapsed: seconds(self.now),
        }
    }

    /// Bytes of memory per second: what a policy measures where pages shrink on the wire.
    fn effective(&self, bandwidth: f64) -> f64 {
        bandwidth * crate::page::PAGE_BYTES as f64 / self.setup.page_bytes.max(1.0)
    }

    /// Sends a round of those of `pages` that are pending.
    pub fn send(&mut self, mut pages: PageSet, order: SendOrder) {
        pages.intersect_with(&self.pending);
        self.guest.round_begins(&self.pending);
        if self.setup.clearing == Clearing::AtRoundStart {
            self.log.subtract(&pages);
        }
        // From the beginning of the round, so that many small steps do not add up to an error.
        let mut sending = Sending {
            began: self.now,
            sent: 0,
            bytes: 0.0,
            bandwidth: self.live_bandwidth(),
        };
        if order == SendOrder::ColdFirst && !self.learned && self.sent_once.is_empty() {
            // As the engine learns in its first pass.
            self.log.subtract(&pages);
            let mut pass = FirstPass::new(pages);
            while !pass.left().is_empty() {
                let step = pass.next(&self.log);
                self.send_pages(step, SendOrder::Address, &mut sending);
            }
        } else {
            self.send_pages(pages, order, &mut sending);
        }
        self.bytes += sending.bytes;
        self.end_round(sending.sent);
        self.in_flight
            .push_back(self.now + self.setup.round_trip.as_secs_f64());
    }

    fn send_pages(&mut self, pages: PageSet, order: SendOrder, sending: &mut Sending) {
        let mut batches = Batches::new(pages, order, &self.heat, BATCH_PAGES);
        let mut runs: Vec<Run> = Vec::with_capacity(64);
        while batches.next(&mut runs) {
            for run in &runs {
                sending.bytes += self.setup.bytes(*run);
                if self.setup.clearing == Clearing::BeforeEachPage {
                    self.log.remove_run(*run);
                }
                self.deliver(*run);
                sending.sent += run.count;
            }
            self.pass_until(sending.began + sending.bytes / sending.bandwidth);
        }
    }

    fn deliver(&mut self, run: Run) {
        self.pending.remove_run(run);
        for gfn in run.first..run.end() {
            if !self.sent_once.insert(gfn) {
                self.resent += 1;
            }
        }
    }

    fn end_round(&mut self, pages: u64) {
        self.sent += pages;
        let n = self.count() + 1;
        self.rounds.push(Round {
            n,
            pages,
            end: self.now,
            pending: 0,
        });
    }

    /// Stops the guest and copies what is pending; returns the downtime in seconds.
    pub fn stop(&mut self) -> f64 {
        self.collect();
        let all = self.pending.clone();
        self.stop_with(&all)
    }

    /// Stops the guest and copies `pages` only; what else is pending is lost.
    pub fn stop_with(&mut self, pages: &PageSet) -> f64 {
        let runs: Vec<Run> = pages.runs().collect();
        let content: f64 = runs.iter().map(|run| self.setup.bytes(*run)).sum();
        self.bytes += content;
        runs.into_iter().for_each(|run| self.deliver(run));
        let copied = pages.len();
        // The user's cap does not hold in the pause.
        let rate = self.setup.bandwidth.max(1.0);
        let bytes = content + self.setup.state_bytes as f64;
        let downtime = bytes / rate + self.setup.pause_overhead.as_secs_f64();
        self.now += downtime;
        self.end_round(copied);
        if let Some(last) = self.rounds.last_mut() {
            last.pending = self.pending.len();
        }
        downtime
    }

    pub fn outcome(
        self,
        policy: &str,
        completed: bool,
        why: String,
        downtime: Duration,
    ) -> Outcome {
        let state = if completed { self.setup.state_bytes } else { 0 };
        Outcome {
            policy: policy.to_owned(),
            completed,
            why,
            total: seconds(self.now),
            downtime,
            pages_sent: self.sent,
            pages_resent: self.resent,
            bytes: pages_in(self.bytes) + state,
            rounds: self.rounds,
            faults: None,
        }
    }
}
