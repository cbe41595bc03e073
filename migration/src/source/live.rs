//! The live phase: collect, decide, send; and draining the link before the pause.

use super::{InFlight, LiveEnd, Source, SourceError, State, ms};
use crate::page::{PAGE_BYTES, PageSet, Run};
use crate::policy::{Decision, Policy, SendOrder};
use crate::port::{Guest, Link};
use crate::report::{Event, Round};
use crate::sender::{BATCH_PAGES, BatchMode, Batches, SendError, Sent};
use crate::wire::{FrameType, Header, WireError};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// Progress is told this often.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);
/// Rounds of fewer bytes measure the latency of the link rather than its bandwidth.
const MEASURABLE: u64 = 64 << 10;

impl<L: Link, G: Guest<L>> Source<'_, '_, L, G> {
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
            self.collect()?;
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
            if self.in_flight.is_empty() {
                self.why = Some(why);
                return Ok(end);
            }
            // What still lies in socket buffers would be paid for in the pause.
            self.enter(State::Draining);
            while !self.in_flight.is_empty() {
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
        };
        let batches = Batches::new(pages, order, &self.heat, batch);
        let sent = if self.lanes.is_empty() {
            self.send_here(batches, mode)?
        } else {
            self.send_on_lanes(batches, mode)?
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
        self.in_flight.push_back(InFlight {
            round: self.round,
            sent,
            started,
            ended,
        });
        Ok(sent)
    }

    /// Marks the end of a round on every channel.
    pub(super) fn barrier(&mut self, round: u32) -> Result<(), SourceError> {
        for (lane, _) in &mut self.lanes {
            lane.send(Header::bare(FrameType::RoundEnd, round), &[])?;
        }
        self.control
            .send(Header::bare(FrameType::RoundEnd, round), &[])?;
        Ok(())
    }

    /// One channel: everything on the control channel, in this thread.
    fn send_here(&mut self, mut batches: Batches, mode: BatchMode) -> Result<Sent, SourceError> {
        let mut total = Sent::default();
        let mut runs = Vec::with_capacity(64);
        while batches.next(&mut runs) {
            self.check_cancel()?;
            let waited = self.pace(mode);
            let mut sent =
                self.sender
                    .send(&mut self.control, self.guest, &runs, mode, self.setup.clock)?;
            self.pacer.charge(sent.bytes, self.setup.clock);
            sent.link += waited;
            self.delivered(&runs, sent);
            total.add(sent);
            self.take_acks()?;
            if self.now().saturating_sub(self.last_event) >= PROGRESS_EVERY {
                self.emit_progress();
            }
        }
        Ok(total)
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
    fn delivered(&mut self, runs: &[Run], sent: Sent) {
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
        self.codecs.join(&sent.codecs);
        self.progress.round_sent += sent.pages();
    }

    /// Several channels: each lane takes the next batch when it is free, so a slow lane holds
    /// nobody up.
    fn send_on_lanes(&mut self, batches: Batches, mode: BatchMode) -> Result<Sent, SourceError> {
        struct Done {
            runs: Vec<Run>,
            sent: Sent,
            error: Option<SendError>,
        }
        let work = Mutex::new(batches);
        let stop = AtomicBool::new(false);
        let progress = AtomicU64::new(0);
        let finished = (Mutex::new(0_usize), Condvar::new());
        let (guest, pacer, clock) = (self.guest, &self.pacer, self.setup.clock);
        let cancel = self.setup.cancel;
        let count = self.lanes.len();
        let events = &mut self.setup.events;
        let snapshot = &mut self.progress;
        let results: Vec<Done> = std::thread::scope(|scope| {
            let handles: Vec<_> = self
                .lanes
                .iter_mut()
                .map(|(channel, sender)| {
                    let (work, stop, progress, finished) = (&work, &stop, &progress, &finished);
                    scope.spawn(move || {
                        let mut done = Done {
                            runs: Vec::new(),
                            sent: Sent::default(),
                            error: None,
                        };
                        let mut runs = Vec::with_capacity(64);
                        while !stop.load(Ordering::Relaxed) && !cancel.is_cancelled() {
                            let more = work
                                .lock()
                                .unwrap_or_else(PoisonError::into_inner)
                                .next(&mut runs);
                            if !more {
                                break;
                            }
                            let waited = if mode.paused {
                                Duration::ZERO
                            } else {
                                pacer.wait(clock, &|| cancel.is_cancelled())
                            };
                            match sender.send(channel, guest, &runs, mode, clock) {
                                Ok(mut sent) => {
                                    pacer.charge(sent.bytes, clock);
                                    sent.link += waited;
                                    done.runs.extend_from_slice(&runs);
                                    done.sent.add(sent);
                                    progress.fetch_add(sent.pages(), Ordering::Relaxed);
                                }
                                Err(error) => {
                                    done.error = Some(error);
                                    stop.store(true, Ordering::Relaxed);
                                    break;
                                }
                            }
                        }
                        *finished.0.lock().unwrap_or_else(PoisonError::into_inner) += 1;
                        finished.1.notify_one();
                        done
                    })
                })
                .collect();
            // This thread tells the progress meanwhile.
            let mut ended = finished.0.lock().unwrap_or_else(PoisonError::into_inner);
            while *ended < count {
                let (guard, timeout) = finished
                    .1
                    .wait_timeout(ended, PROGRESS_EVERY)
                    .unwrap_or_else(PoisonError::into_inner);
                ended = guard;
                if timeout.timed_out() {
                    snapshot.round_sent = progress.load(Ordering::Relaxed);
                    events(Event::Progress(snapshot.clone()));
                }
            }
            drop(ended);
            handles
                .into_iter()
                .filter_map(|handle| handle.join().ok())
                .collect()
        });
        self.progress.round_sent = 0;
        let lost = results.len() < count;
        let mut total = Sent::default();
        let mut failure = None;
        for done in results {
            self.delivered(&done.runs, done.sent);
            total.add(done.sent);
            failure = failure.or(done.error);
        }
        match failure {
            Some(error) => Err(error.into()),
            None if lost => Err(SourceError::guest(
                "sending on a lane",
                "a sender thread panicked".into(),
            )),
            None => self.check_cancel().map(|()| total),
        }
    }

    /// Takes what has arrived, without waiting: acknowledgements, or the peer's reason to give up.
    fn take_acks(&mut self) -> Result<(), SourceError> {
        while self.control.link().readable().map_err(WireError::Io)? {
            self.take_ack()?;
        }
        Ok(())
    }

    /// Waits for the next acknowledgement.
    pub(super) fn take_ack(&mut self) -> Result<(), SourceError> {
        let header = self.control.recv_header()?;
        let expected = self.in_flight.front().copied();
        match expected {
            Some(flight) if header.kind == FrameType::RoundAck && header.round == flight.round => {
                self.in_flight.pop_front();
                let now = self.now();
                let took = now.saturating_sub(flight.started);
                // What the link took: the time in its calls and until the last byte was placed.
                let lanes = u32::try_from(self.lanes.len().max(1)).unwrap_or(1);
                let sending = flight.sent.link + flight.sent.coding;
                let link = sending / lanes + now.saturating_sub(flight.ended);
                if flight.sent.bytes < MEASURABLE {
                    // A small round measures the round trip, and the greeting's was measured while
                    // the destination had other things to do.
                    self.rtt = self.rtt.min(now.saturating_sub(flight.ended));
                }
                if flight.sent.data_pages * PAGE_BYTES >= MEASURABLE
                    || self.bandwidth.estimate().is_none() && flight.sent.pages() > 0
                {
                    // Of pages as they are in memory: it is pending pages that the estimate is for.
                    let bytes = flight.sent.bytes.max(flight.sent.data_pages * PAGE_BYTES);
                    self.bandwidth.record(bytes.max(1), link);
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
