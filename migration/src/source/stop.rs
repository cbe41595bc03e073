//! The pause: last pages (or what will follow), state, and handing the guest over.

use super::{InFlight, Source, SourceError, State, ms};
use crate::order::PushOrder;
use crate::page::{PAGE_SIZE, PageSet, Run};
use crate::policy::SendOrder;
use crate::port::{Link, SourceVm};
use crate::sender::Sent;
use crate::verify::page_hash;
use crate::wire::{FrameType, Header, Ready, Running, WireError, send_set};
use std::io;
use std::time::Duration;

/// Hashes in one VERIFY frame (1 MiB of them).
const VERIFY_PAGES: u64 = 128 << 10;

impl<L: Link, G: SourceVm<L>> Source<'_, '_, L, G> {
    /// Pauses the guest, sends what is left, and commits.
    pub(super) fn stop_and_copy(&mut self) -> Result<(), SourceError> {
        let collected = self.stop()?;
        // The state is small: it follows the pages without waiting for them.
        self.send_round(self.pending.clone(), SendOrder::Address, true)?;
        if self.setup.options.verify {
            self.send_block_hashes()?;
            self.send_hashes(&self.layout.all())?;
        }
        self.move_guest(collected)?;
        self.enter(State::Discardable);
        Ok(())
    }

    /// Pauses the guest and commits: the destination has its memory.
    pub(super) fn hand_memory_over(&mut self) -> Result<(), SourceError> {
        self.why = Some(
            "both processes are on this host and map the same memory, so that no page was sent"
                .into(),
        );
        let stopped_at = self.pause()?;
        let stopped = self.now();
        self.downtime.quiesce_ms = ms(stopped.saturating_sub(stopped_at));
        if self.setup.options.verify {
            self.send_hashes(&self.layout.all())?;
        }
        self.move_guest(stopped)?;
        self.enter(State::Discardable);
        Ok(())
    }

    /// Pauses the guest, moves it, and lets what is left follow.
    pub(super) fn hand_over(&mut self, order: PushOrder) -> Result<(), SourceError> {
        // What is dirty already will be missing in any case: the destination drops it before the pause.
        // From here on each page is sent once, to where nothing can be read: no page is a base any more.
        self.sender.without_bases();
        self.data_channels
            .iter_mut()
            .for_each(|(_, sender)| sender.without_bases());
        let known = self.pending.clone();
        send_set(&mut self.control, &known)?;
        self.settle()?;
        let collected = self.stop()?;
        let missing = self.pending.clone();
        let mut news = missing.clone();
        news.subtract(&known);
        send_set(&mut self.control, &news)?;
        let mut again = missing.clone();
        again.intersect_with(&self.sent_once);
        self.pages.resent += again.len();
        if self.setup.options.verify {
            let mut there = self.layout.all();
            there.subtract(&missing);
            self.send_block_hashes()?;
            self.send_hashes(&there)?;
        }
        let layout = self.layout.clone();
        let serving = Self::serving(&layout, &self.setup, missing.clone(), order, self.round + 1);
        // From the restoring on the destination may touch a page that it lacks.
        self.while_answering(&serving, |source| {
            let running = source.move_guest(collected)?;
            if running.missing == 0 && !running.verify {
                // Nothing was pending: as after stop-and-copy, nothing follows.
                source.enter(State::Discardable);
                return Ok(());
            }
            // What was compared so far is not all.
            source.verified = None;
            source.round += 1;
            source.enter(State::PostCopy);
            let hashes = source.setup.options.verify.then_some(&missing);
            source.push_all(&serving, hashes)
        })
    }

    /// Waits until the destination has done everything that it was sent: a round without pages.
    fn settle(&mut self) -> Result<(), SourceError> {
        self.round += 1;
        self.barrier(self.round)?;
        let now = self.now();
        self.in_flight.push_back(InFlight {
            round: self.round,
            sent: Sent::default(),
            link: Duration::ZERO,
            started: now,
            ended: now,
            beside: (0, Duration::ZERO),
        });
        self.take_ack()
    }

    /// Pauses the guest and takes the last of the dirty log; returns when that was done.
    fn stop(&mut self) -> Result<Duration, SourceError> {
        let stopped_at = self.pause()?;
        self.collect()?;
        let collected = self.now();
        self.downtime.quiesce_ms = ms(collected.saturating_sub(stopped_at));
        // The last of the disks: the guest must not run there without it.
        self.disks.collect()?;
        self.send_blocks(true)?;
        Ok(collected)
    }

    /// Pauses the guest; returns when it did its last.
    fn pause(&mut self) -> Result<Duration, SourceError> {
        self.check_cancel()?;
        let ago = self
            .guest
            .pause()
            .map_err(|e| SourceError::guest("pausing the guest", e))?;
        let stopped_at = self.now().saturating_sub(ago);
        self.paused_at = Some(stopped_at);
        self.enter(State::Stopped);
        self.control
            .link()
            .set_timeout(Some(self.setup.timeouts.ready));
        Ok(stopped_at)
    }

    /// Sends the state and hands the guest over, once the destination is ready.
    fn move_guest(&mut self, collected: Duration) -> Result<Running, SourceError> {
        let state = self
            .guest
            .save()
            .map_err(|e| SourceError::guest("saving the machine's state", e))?;
        self.control
            .send(Header::bare(FrameType::State, self.round), &state)?;
        while !self.in_flight.is_empty() || self.disks.is_awaiting() {
            self.take_ack()
                .map_err(|e| silent(e, "that the last pages and blocks arrived"))?;
        }
        let placed = self.now();
        self.downtime.last_pages_ms = ms(placed.saturating_sub(collected));

        let header = self
            .control
            .recv_header()
            .map_err(|e| silent(e.into(), "ready"))?;
        if header.kind != FrameType::Ready {
            return Err(self.control.refuse(&header, "ready").into());
        }
        let ready: Ready = self.control.recv_json(&header)?;
        let ready_at = self.now();
        self.downtime.state_ms = ms(ready_at.saturating_sub(placed));
        if self.setup.options.verify {
            if !ready.verified {
                return Err(SourceError::NotVerified);
            }
            self.verified = Some(true);
        }
        if !self.setup.cancel.commit() {
            return Err(SourceError::Cancelled);
        }
        self.guest
            .commit(self.setup.session)
            .map_err(|e| SourceError::guest("writing down the commit", e))?;
        // From here on this side never runs the guest by itself. Nothing may come between this
        // line and the sending that could return early with another state.
        self.state = State::Committed;
        self.progress.phase = crate::report::Phase::Committed;
        let running = self.commit()?;
        let told = self.now().saturating_sub(ready_at);
        // Half a round trip and what the destination spent since the first instruction are not
        // part of the pause.
        let since = Duration::from_micros(running.since_us) + self.rtt / 2;
        self.downtime.start_ms = ms(told.saturating_sub(since.min(told)));
        Ok(running)
    }

    /// Says the commit and waits for the guest to run.
    pub(super) fn commit(&mut self) -> Result<Running, SourceError> {
        self.control
            .link()
            .set_timeout(Some(self.setup.timeouts.commit));
        self.control
            .send(Header::bare(FrameType::Commit, self.round), &[])?;
        let header = self
            .control
            .recv_header()
            .map_err(|e| silent(e.into(), "that the guest runs"))?;
        if header.kind != FrameType::Running {
            return Err(self
                .control
                .refuse(&header, "the confirmation that the guest runs")
                .into());
        }
        let running: Running = self.control.recv_json(&header)?;
        self.tells = running.tells;
        Ok(running)
    }

    /// Sends a hash of every page of the set, so that the destination can compare.
    pub(super) fn send_hashes(&mut self, pages: &PageSet) -> Result<(), SourceError> {
        let mut page = [0; PAGE_SIZE];
        let mut hashes: Vec<u8> = Vec::new();
        let mut at = 0;
        while let Some(run) = pages.next_run(at, VERIFY_PAGES) {
            at = run.end();
            hashes.clear();
            // The guest stands still: what holds nothing stays so, and reading it would make the host populate it.
            let mut hole = self.guest.unpopulated(run);
            for gfn in run.first..run.end() {
                if hole.is_some_and(|hole| gfn >= hole.end()) {
                    hole = self.guest.unpopulated(Run::new(gfn, run.end() - gfn));
                }
                if hole.is_some_and(|hole| gfn >= hole.first) {
                    page.fill(0);
                } else {
                    self.guest
                        .copy_page(gfn, &mut page)
                        .map_err(|e| SourceError::guest("hashing guest memory", e))?;
                }
                hashes.extend_from_slice(&page_hash(gfn, &page).to_le_bytes());
            }
            let header = Header {
                gfn: run.first,
                count: u32::try_from(run.count).unwrap_or(u32::MAX),
                ..Header::bare(FrameType::Verify, self.round)
            };
            self.control.send(header, &hashes)?;
        }
        Ok(())
    }
}

/// A time-out in the pause, said as what was waited for.
fn silent(error: SourceError, what: &'static str) -> SourceError {
    match error {
        SourceError::Wire(WireError::Io(e)) if e.kind() == io::ErrorKind::TimedOut => {
            SourceError::Silent(what)
        }
        other => other,
    }
}
