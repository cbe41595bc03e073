//! The pause: last pages, state, and handing the guest over.

use super::{Source, SourceError, State, ms};
use crate::page::{Gfn, PAGE_SIZE};
use crate::policy::SendOrder;
use crate::port::{Guest, Link};
use crate::wire::{FrameType, Header, Ready, Running, WireError};
use std::io;
use std::time::Duration;

/// Hashes in one VERIFY frame (1 MiB of them).
const VERIFY_PAGES: u64 = 128 << 10;

impl<L: Link, G: Guest<L>> Source<'_, '_, L, G> {
    /// Pauses the guest, sends what is left, and commits.
    pub(super) fn stop_and_copy(&mut self) -> Result<(), SourceError> {
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
        self.collect()?;
        let collected = self.now();
        self.downtime.quiesce_ms = ms(collected.saturating_sub(stopped_at));

        // The state is small: it follows the pages without waiting for them.
        self.send_round(self.pending.clone(), SendOrder::Address, true)?;
        if self.setup.options.verify {
            self.send_hashes()?;
        }
        let state = self
            .guest
            .save()
            .map_err(|e| SourceError::guest("saving the machine's state", e))?;
        self.control
            .send(Header::bare(FrameType::State, self.round), &state)?;
        while !self.in_flight.is_empty() {
            self.take_ack()
                .map_err(|e| silent(e, "that the last pages arrived"))?;
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
        self.commit(ready_at)
    }

    /// Sends the commit and waits for the guest to run.
    fn commit(&mut self, ready_at: Duration) -> Result<(), SourceError> {
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
        let told = self.now().saturating_sub(ready_at);
        // Half a round trip and what the destination spent since the first instruction are not
        // part of the pause.
        let since = Duration::from_micros(running.since_us) + self.rtt / 2;
        self.downtime.start_ms = ms(told.saturating_sub(since.min(told)));
        self.enter(State::Discardable);
        Ok(())
    }

    /// Sends a hash of every page, so that the destination can compare.
    fn send_hashes(&mut self) -> Result<(), SourceError> {
        let mut page = [0; PAGE_SIZE];
        let mut hashes: Vec<u8> = Vec::new();
        let runs = self.layout.runs().to_vec();
        for region in runs {
            let mut first = region.first;
            while first < region.end() {
                let count = (region.end() - first).min(VERIFY_PAGES);
                hashes.clear();
                for gfn in first..first + count {
                    self.guest
                        .copy_page(gfn, &mut page)
                        .map_err(|e| SourceError::guest("hashing guest memory", e))?;
                    hashes.extend_from_slice(&page_hash(gfn, &page).to_le_bytes());
                }
                let header = Header {
                    gfn: first,
                    count: u32::try_from(count).unwrap_or(u32::MAX),
                    ..Header::bare(FrameType::Verify, self.round)
                };
                self.control.send(header, &hashes)?;
                first += count;
            }
        }
        Ok(())
    }
}

/// The hash by which `--verify` compares a page; the frame number is its seed, so that pages that
/// were swapped do not pass.
pub(crate) fn page_hash(gfn: Gfn, page: &[u8; PAGE_SIZE]) -> u64 {
    xxhash_rust::xxh3::xxh3_64_with_seed(page, gfn)
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
