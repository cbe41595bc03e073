//! Sending the disks that move with the guest: rounds of blocks, of which `blocks.rs` keeps count.

use super::engine::Source;
use super::error::SourceError;
use super::record::ms;
use crate::page::{PAGE_BYTES, Run};
use crate::port::{BLOCK_BYTES, Link, SourceVm};
use crate::report::Phase;
use crate::verify::{all_zero, block_hashes};
use crate::wire::{Encoding, FrameType, HEADER_BYTES, Header, MAX_BLOCKS};
use std::time::Duration;

/// The destination is asked to flush after so many bytes or so much time, and is never more than
/// two such pieces behind: a flush then takes seconds at most, and a destination that has fallen
/// silent is noticed.
const PIECE: u64 = 32 << 20;
const PIECE_TIME: Duration = Duration::from_secs(5);
/// What is left when the live rounds end: little beside any memory.
const LITTLE: u64 = 1 << 20;
/// A round that leaves more than this share of what it found has shrunk nothing worth another.
const SHRUNK: f64 = 0.9;

impl<L: Link, G: SourceVm<L>> Source<'_, '_, L, G> {
    /// Sends the disks while the guest runs, until little of them is left. Memory is not logged
    /// yet: it would only slow the guest down.
    pub(super) fn copy_disks(&mut self) -> Result<(), SourceError> {
        if self.disks.is_empty() {
            return Ok(());
        }
        self.enter(Phase::Disks);
        let began = self.now();
        self.disks
            .start()
            .map_err(|e| SourceError::guest("watching what is written to a disk", e))?;
        loop {
            let found = self.disks.pending_bytes();
            self.send_blocks(false)?;
            // What the destination has not taken yet is being written over meanwhile.
            self.await_blocks(self.disks.asked)?;
            self.disks.collect()?;
            let left = self.disks.pending_bytes();
            if left <= LITTLE || left as f64 > found as f64 * SHRUNK {
                break;
            }
        }
        self.disks.report.ms = ms(self.now().saturating_sub(began));
        self.disks.since_round = (0, Duration::ZERO);
        Ok(())
    }

    /// Sends the blocks written since the last time, before a round of pages.
    pub(super) fn send_written_blocks(&mut self) -> Result<(), SourceError> {
        let began = self.now();
        self.disks.collect()?;
        self.send_blocks(false)?;
        self.disks.since_round.1 += self.now().saturating_sub(began);
        Ok(())
    }

    /// Sends all blocks that are pending, and ends the round.
    pub(super) fn send_blocks(&mut self, paused: bool) -> Result<(), SourceError> {
        if self.disks.pending_bytes() == 0 {
            return Ok(());
        }
        for copy in 0..self.disks.all.len() {
            self.send_disk(copy, paused)?;
        }
        self.disks.report.rounds += 1;
        self.end_blocks(paused)
    }

    /// As many as the cap lets through in a moment, and at least one.
    fn batch_blocks(&self, paused: bool) -> u64 {
        let most = u64::from(MAX_BLOCKS);
        if paused {
            return most;
        }
        (self.transport.pacer.batch_pages() * PAGE_BYTES / BLOCK_BYTES).clamp(1, most)
    }

    fn send_disk(&mut self, number: usize, paused: bool) -> Result<(), SourceError> {
        let mut at = 0;
        while let Some(copy) = self.disks.all.get(number)
            && let Some(run) = copy.pending.next_run(at, u64::from(u32::MAX))
        {
            self.session.check()?;
            let hole = copy.hole(run);
            at = if hole.count > 0 {
                self.send_zero_blocks(number, hole, paused)?;
                hole.end()
            } else {
                if !paused {
                    // A change that cuts rounds short is for the live phase of memory.
                    self.steer();
                    let (owner, steering) = (self.session.setup.owner, self.session.setup.steering);
                    self.transport.pacer.wait(self.session.setup.clock, &|| {
                        owner.is_cancelled() || steering.has_news()
                    });
                }
                let run = Run::new(run.first, run.count.min(self.batch_blocks(paused)));
                self.send_read_blocks(number, run, paused)?;
                run.end()
            };
            self.take_acks()?;
            // Data channels are silent while blocks go out on this one, and must not be taken for
            // dead.
            self.keep_alive()?;
            self.tell_progress();
            let due = self.disks.since_asked >= PIECE
                || self.now().saturating_sub(self.disks.asked_at) >= PIECE_TIME;
            if due && !paused {
                self.end_blocks(false)?;
            }
        }
        Ok(())
    }

    /// Reads blocks and sends them: those that are zero as such.
    fn send_read_blocks(
        &mut self,
        number: usize,
        run: Run,
        paused: bool,
    ) -> Result<(), SourceError> {
        let mut buffer = std::mem::take(&mut self.disks.buffer);
        self.read_blocks(number, run, &mut buffer)?;
        let block = usize::try_from(BLOCK_BYTES).unwrap_or(usize::MAX);
        let is_zero = |n: u64| {
            let at = usize::try_from(n).unwrap_or(0) * block;
            let bytes = buffer.get(at..).unwrap_or_default();
            all_zero(&bytes[..bytes.len().min(block)])
        };
        let mut from = 0;
        while from < run.count {
            let zero = is_zero(from);
            let to = (from + 1..run.count)
                .find(|n| is_zero(*n) != zero)
                .unwrap_or(run.count);
            let part = Run::new(run.first + from, to - from);
            if zero {
                self.send_zero_blocks(number, part, paused)?;
            } else {
                let at = |n| usize::try_from(n).unwrap_or(0) * block;
                let bytes = &buffer[at(from)..at(to).min(buffer.len())];
                self.send_data_blocks(number, part, bytes, paused)?;
            }
            from = to;
        }
        self.disks.buffer = buffer;
        Ok(())
    }

    fn read_blocks(
        &self,
        number: usize,
        run: Run,
        buffer: &mut Vec<u8>,
    ) -> Result<(), SourceError> {
        let Some(copy) = self.disks.all.get(number) else {
            return Ok(());
        };
        buffer.resize(usize::try_from(copy.bytes_of(run)).unwrap_or(0), 0);
        copy.source
            .read(run.first * BLOCK_BYTES, buffer)
            .map_err(|e| SourceError::guest("reading a disk of the guest", e))
    }

    fn send_data_blocks(
        &mut self,
        number: usize,
        run: Run,
        bytes: &[u8],
        paused: bool,
    ) -> Result<(), SourceError> {
        let clock = self.session.setup.clock;
        let mut header = Header::of_blocks(FrameType::Blocks, number, run);
        let (length, began) = {
            let coded = self.disks.coder.code(bytes, &|| clock.now());
            if coded.is_some() {
                header.encoding = Encoding::Zstd as u8;
            }
            let payload = coded.unwrap_or(bytes);
            let began = clock.now();
            self.session.control.send(header, payload)?;
            (payload.len(), began)
        };
        let took = clock.now().saturating_sub(began);
        self.disks.coder.sent(length, took);
        self.charge_blocks((HEADER_BYTES + length) as u64);
        self.disks.delivered(number, run, false, paused);
        Ok(())
    }

    fn send_zero_blocks(
        &mut self,
        number: usize,
        run: Run,
        paused: bool,
    ) -> Result<(), SourceError> {
        let header = Header::of_blocks(FrameType::BlocksZero, number, run);
        self.session.control.send(header, &[])?;
        self.charge_blocks(HEADER_BYTES as u64);
        self.disks.delivered(number, run, true, paused);
        Ok(())
    }

    fn charge_blocks(&mut self, wire: u64) {
        self.transport.pacer.charge(wire, self.session.setup.clock);
        self.disks.report.bytes_wire += wire;
        self.disks.since_asked += wire;
    }

    /// Asks the destination to flush what it has, once it has done so for the piece before.
    fn end_blocks(&mut self, paused: bool) -> Result<(), SourceError> {
        if !paused {
            self.await_blocks(self.disks.asked)?;
        }
        self.disks.asked += 1;
        self.disks.since_asked = 0;
        self.disks.asked_at = self.now();
        let round = self.disks.asked;
        self.session
            .control
            .send(Header::bare(FrameType::BlocksEnd, round), &[])?;
        Ok(())
    }

    /// Waits for the answer to the end of this round.
    pub(super) fn await_blocks(&mut self, round: u32) -> Result<(), SourceError> {
        while self.disks.answered < round {
            self.session.check()?;
            self.take_ack()?;
        }
        Ok(())
    }

    /// Sends hashes of all blocks, in the pause, so that the destination can compare.
    pub(super) fn send_block_hashes(&mut self) -> Result<(), SourceError> {
        let mut buffer = Vec::new();
        for number in 0..self.disks.all.len() {
            let mut at = 0;
            while let Some(copy) = self.disks.all.get(number)
                && at < copy.pending.end()
            {
                let left = (copy.pending.end() - at).min(u64::from(u32::MAX));
                self.session.check()?;
                let hole = copy.hole(Run::new(at, left));
                let mut hashes = Vec::new();
                let run = if hole.count > 0 {
                    hole
                } else {
                    let run = Run::new(at, left.min(u64::from(MAX_BLOCKS)));
                    self.read_blocks(number, run, &mut buffer)?;
                    hashes.extend(block_hashes(number, run.first, &buffer));
                    run
                };
                at = run.end();
                let header = Header::of_blocks(FrameType::BlocksHash, number, run);
                self.session.control.send(header, &hashes)?;
            }
        }
        Ok(())
    }
}
