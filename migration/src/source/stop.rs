//! The pause: last pages (or what will follow), state, and handing the guest over.
//!
//! The guest is a value here ([`Paused`]): every `?` drops it, and it runs again at the source
//! before the error is looked at. A deadline
//! ([`Options::max_pause`](crate::options::Options::max_pause)) holds from the pause to the commit,
//! whatever the destination sends or takes meanwhile.

use super::commit::{CommitSent, Confirmed};
use super::engine::Source;
use super::error::SourceError;
use super::phases::{End, Moved, Tracking};
use super::record::ms;
use crate::numbers::seconds;
use crate::order::PushOrder;
use crate::page::{PAGE_BYTES, PageSet};
use crate::policy::SendOrder;
use crate::port::{Link, Paused, SourceVm};
use crate::report::Phase;
use crate::wire::{FrameType, Header, Ready, WireError, send_set};
use std::time::Duration;

/// The longest pause where the user has set none: this, and four times what was predicted.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
const PREDICTED: u32 = 4;
/// Bytes per second at which `--verify` reads and hashes at least.
const HASH_RATE: f64 = 50e6;

/// How the guest is moved.
pub(super) enum How {
    /// What is pending is sent in the pause.
    Copy,
    /// The pending pages follow in this order.
    Follow(PushOrder),
    /// The destination has the memory already.
    Shared,
}

/// The guest runs; everything that can be done before the pause was done.
pub(super) struct Stopping<'s, 'a, 'g, L: Link, G: SourceVm<L>> {
    pub(super) source: &'s mut Source<'a, 'g, L, G>,
    /// `None` where memory is shared: nothing is logged.
    pub(super) tracking: Option<Tracking<'g, L, G>>,
    pub(super) how: How,
}

/// The guest stands still and belongs to the source.
struct Stopped<'s, 'a, 'g, L: Link, G: SourceVm<L>> {
    source: &'s mut Source<'a, 'g, L, G>,
    /// Dropped before the log is stopped: that can take as long as the guest has memory.
    paused: Paused<'g>,
    tracking: Option<Tracking<'g, L, G>>,
    /// When the last of the dirty log was taken.
    collected: Duration,
}

impl<'s, 'a, 'g, L: Link, G: SourceVm<L>> Stopping<'s, 'a, 'g, L, G> {
    /// Pauses the guest and hands it over.
    pub(super) fn move_guest(mut self) -> Result<Moved<'g>, End<'g>> {
        match std::mem::replace(&mut self.how, How::Copy) {
            How::Copy => self.stop_and_copy(),
            How::Shared => self.hand_memory_over(),
            How::Follow(order) => self.let_follow(order),
        }
    }

    /// Sends what is left in the pause.
    fn stop_and_copy(self) -> Result<Moved<'g>, End<'g>> {
        let stopped = self.stop()?;
        let last_pages = |source: &mut Source<'a, 'g, L, G>| {
            // The state is small: it follows the pages without waiting for them.
            source.send_round(source.memory.pending.clone(), SendOrder::Address, true)?;
            source.send_all_hashes(source.memory.layout.all())
        };
        stopped.hand_over(last_pages).map(Confirmed::complete)
    }

    /// The destination has the memory.
    fn hand_memory_over(self) -> Result<Moved<'g>, End<'g>> {
        self.source.record.why = Some(
            "both processes are on this host and map the same memory, so that no page was sent"
                .into(),
        );
        let stopped = self.pause()?;
        let hashes =
            |source: &mut Source<'a, 'g, L, G>| source.send_all_hashes(source.memory.layout.all());
        stopped.hand_over(hashes).map(Confirmed::complete)
    }

    /// Moves the guest, and lets what is left follow.
    fn let_follow(self, order: PushOrder) -> Result<Moved<'g>, End<'g>> {
        let known = self.source.list_known().map_err(End::Here)?;
        // Sets are as large as the guest's memory asks for: in the pause none is made anew, but
        // with `--verify`.
        let (mut missing, mut news) = (known.clone(), known);
        let Stopped {
            source,
            paused,
            tracking,
            collected,
        } = self.stop()?;
        missing.clone_from(&source.memory.pending);
        news.become_difference(&missing);
        source.record.pages.resent += missing.count_common(&source.memory.sent_once);
        let verify = source.session.setup.options.verify;
        let there = verify.then(|| {
            let mut there = source.memory.layout.all();
            there.subtract(&missing);
            there
        });
        let hashed = verify.then(|| missing.clone());
        let layout = source.memory.layout.clone();
        let round = source.flight.round + 1;
        let server = Source::page_server(
            (source.guest, &layout),
            (&source.session.setup, &source.helm.options),
            missing,
            (order, round),
            verify,
        );
        // From the restoring on the destination may touch a missing page.
        let moved = source.while_answering(&server, |source| {
            let stopped = Stopped {
                source,
                paused,
                tracking,
                collected,
            };
            let lists = |source: &mut Source<'a, 'g, L, G>| source.list_news(&news, there);
            let confirmed = stopped.hand_over(lists)?;
            if confirmed.is_complete() {
                // Nothing was pending: as after stop-and-copy, nothing follows.
                return Ok(confirmed.complete());
            }
            let Confirmed {
                source, committed, ..
            } = confirmed;
            // What was compared so far is not all.
            source.record.verified = None;
            source.flight.round += 1;
            source.enter(Phase::PostCopy);
            let error = source
                .push_all(&server, hashed.as_ref())
                .map_err(End::Interrupted)?;
            Ok(Moved { committed, error })
        });
        // Without a thread the guest was not handed over: its guard is dropped.
        moved.map_err(End::Here)?
    }

    /// Pauses the guest and takes the last of the dirty log and of the disks.
    fn stop(self) -> Result<Stopped<'s, 'a, 'g, L, G>, End<'g>> {
        let mut stopped = self.pause()?;
        let source = &mut *stopped.source;
        let collect = source.collect();
        stopped.collected = source.now();
        let rest = collect.and_then(|()| {
            let pause = source.record.paused_at.unwrap_or(stopped.collected);
            source.record.downtime.quiesce_ms = ms(stopped.collected.saturating_sub(pause));
            // The last of the disks: the guest must not run there without it.
            source.disks.collect()?;
            source.send_blocks(true)
        });
        match rest {
            Ok(()) => Ok(stopped),
            Err(error) => Err(stopped.fail(error)),
        }
    }

    /// Pauses the guest.
    fn pause(self) -> Result<Stopped<'s, 'a, 'g, L, G>, End<'g>> {
        let Self {
            source, tracking, ..
        } = self;
        source.session.check().map_err(End::Here)?;
        let longest = source.longest_pause();
        let asked = source.now();
        let paused = source
            .guest
            .pause()
            .map_err(|e| End::Here(SourceError::guest("pausing the guest", e)))?;
        let now = source.now();
        let ago = paused.stopped_for();
        let stopped_at = ago.map_or(asked, |ago| now.saturating_sub(ago));
        source.record.paused_at = Some(stopped_at);
        source.record.downtime.quiesce_ms = ms(now.saturating_sub(stopped_at));
        source.enter(Phase::Stopped);
        source.bound_pause(stopped_at + longest);
        Ok(Stopped {
            source,
            paused,
            tracking,
            collected: now,
        })
    }
}

impl<'s, 'a, 'g, L: Link, G: SourceVm<L>> Stopped<'s, 'a, 'g, L, G> {
    /// Sends what `last` sends, flushes the disks, sends the state, and commits once the
    /// destination is ready.
    fn hand_over(
        self,
        last: impl FnOnce(&mut Source<'a, 'g, L, G>) -> Result<(), SourceError>,
    ) -> Result<Confirmed<'s, 'a, 'g, L, G>, End<'g>> {
        let ready = last(self.source)
            .and_then(|()| self.source.flush_stopped())
            .and_then(|()| {
                self.paused
                    .save(self.source.session.reads_state)
                    .map_err(|e| SourceError::guest("saving the machine's state", e))
            })
            .and_then(|state| self.source.send_state(&state, self.collected));
        match ready {
            Ok(ready_at) => self.commit(ready_at),
            Err(error) => Err(self.fail(error)),
        }
    }

    /// Writes the commit down, sends it, and waits for the guest to run.
    fn commit(self, ready_at: Duration) -> Result<Confirmed<'s, 'a, 'g, L, G>, End<'g>> {
        if let Err(error) = self.source.session.check() {
            return Err(self.fail(error));
        }
        let owner = self.source.session.setup.owner;
        if !owner.commit() {
            return Err(self.fail(SourceError::Cancelled));
        }
        let Self {
            source,
            paused,
            tracking,
            ..
        } = self;
        // From here on this side runs the guest only on the destination's word.
        let committed = paused.commit(source.session.setup.session);
        source.end_pause();
        let committed = committed.map_err(|e| {
            owner.take_back();
            End::Here(SourceError::guest("writing down the commit", e))
        })?;
        source.record.progress.phase = Phase::Committed;
        source.emit_progress();
        let confirmed = CommitSent { source, committed }.confirm()?;
        // The log of a guest that runs elsewhere goes with what is left of it.
        if let Some(log) = tracking {
            log.leave();
        }
        let source = &mut *confirmed.source;
        let told = source.now().saturating_sub(ready_at);
        // Half a round trip and what the destination spent since the first instruction are not
        // part of the pause.
        let since = Duration::from_micros(confirmed.running.since_us) + source.session.rtt / 2;
        source.record.downtime.start_ms = ms(told.saturating_sub(since.min(told)));
        Ok(confirmed)
    }

    /// Lets the guest run again, at once, and says why.
    fn fail(self, error: SourceError) -> End<'g> {
        let Self {
            source,
            paused,
            tracking,
            ..
        } = self;
        drop(paused);
        let now = source.now();
        if let Some(at) = source.record.paused_at {
            source.record.downtime.start_ms = ms(now.saturating_sub(at));
        }
        drop(tracking);
        let late = source.session.until.is_some_and(|until| now >= until);
        source.end_pause();
        End::Here(match error {
            SourceError::Wire(WireError::Io(_)) | SourceError::Silent(_) if late => {
                SourceError::PauseTooLong
            }
            error => error,
        })
    }
}

impl<L: Link, G: SourceVm<L>> Source<'_, '_, L, G> {
    /// How long the guest may stand still before it runs here again.
    fn longest_pause(&self) -> Duration {
        let options = self.session.setup.options;
        options.max_pause.unwrap_or_else(|| {
            let predicted = self.view().predicted_downtime().unwrap_or_default();
            let hashed = if options.verify {
                let hashed = self.memory.hashed.as_ref().map_or(0, PageSet::len);
                (self.memory.layout.pages() - hashed) * PAGE_BYTES + self.disks.bytes()
            } else {
                0
            };
            LONGEST_PAUSE + predicted * PREDICTED + seconds(hashed as f64 / HASH_RATE)
        })
    }

    /// Every wait ends then.
    fn bound_pause(&mut self, until: Duration) {
        self.session.until = Some(until);
        let left = until.saturating_sub(self.now());
        let ready = self.session.setup.timeouts.ready;
        self.session.wait_at_most(ready, Some(left));
        for (channel, _) in &mut self.transport.data_channels {
            channel.link().set_deadline(Some(left));
        }
    }

    /// The guest runs again, or was committed.
    fn end_pause(&mut self) {
        self.session.until = None;
        let transfer = self.session.setup.timeouts.transfer;
        self.session.wait_at_most(transfer, None);
        for (channel, _) in &mut self.transport.data_channels {
            channel.link().set_deadline(None);
            channel.link().set_timeout(Some(transfer));
        }
    }

    /// Before the pause of post-copy: what is dirty already will be missing in any case, so the
    /// destination drops it now.
    fn list_known(&mut self) -> Result<PageSet, SourceError> {
        // From here on each page is sent once, to where nothing can be read: no page is a base any
        // more.
        self.transport.sender.without_bases();
        for (_, sender) in &mut self.transport.data_channels {
            sender.without_bases();
        }
        let known = self.memory.pending.clone();
        send_set(&mut self.session.control, &known)?;
        self.settle()?;
        Ok(known)
    }

    /// In the pause of post-copy: the missing pages that the destination does not know of, and with
    /// `--verify` hashes of those that are `there`.
    fn list_news(&mut self, news: &PageSet, there: Option<PageSet>) -> Result<(), SourceError> {
        send_set(&mut self.session.control, news)?;
        there.map_or(Ok(()), |there| self.send_all_hashes(there))
    }

    /// The last flush of the disks: nothing is written any more.
    fn flush_stopped(&mut self) -> Result<(), SourceError> {
        self.flush(false)?;
        self.session.check()
    }

    /// Sends the state and waits until the destination is ready; returns when it was.
    fn send_state(&mut self, state: &[u8], collected: Duration) -> Result<Duration, SourceError> {
        let round = self.flight.round;
        self.session
            .control
            .send(Header::bare(FrameType::State, round), state)?;
        while !self.flight.in_flight.is_empty() || self.disks.is_awaiting() {
            self.take_ack()
                .map_err(|e| e.or_silent("that the last pages and blocks arrived"))?;
        }
        let placed = self.now();
        let hashing = self.record.hashing;
        self.record.downtime.last_pages_ms = ms(placed.saturating_sub(collected + hashing));
        let header = self.session.recv().map_err(|e| e.or_silent("ready"))?;
        if header.kind != FrameType::Ready {
            return Err(self.session.control.refuse(&header, "ready").into());
        }
        let ready: Ready = self.session.control.recv_json(&header)?;
        let ready_at = self.now();
        let state = ready_at.saturating_sub(placed);
        // The destination compares while the source hashes; what it takes longer is part of this.
        let compare = Duration::from_micros(ready.compare_us)
            .saturating_sub(hashing)
            .min(state);
        self.record.downtime.verify_ms = ms(hashing + compare);
        self.record.downtime.state_ms = ms(state - compare);
        if self.session.setup.options.verify {
            if !ready.verified {
                return Err(SourceError::NotVerified);
            }
            self.record.verified = Some(true);
        }
        Ok(ready_at)
    }
}
