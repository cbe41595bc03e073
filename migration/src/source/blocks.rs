//! Disks that move with the guest ([`Options::copy_disk`](crate::options::Options::copy_disk)): the
//! case without shared storage, as between two sites (Svärd 2012, ch. 2).
//!
//! ```text
//!  guest runs   every block once ─▶ what was written meanwhile, round by round, until little is left or it shrinks no more
//!               (only now memory is logged)
//!               rounds of pages, before each of them the blocks written since
//!  pause        the blocks written since ─▶ flushed there ─▶ pages, state, READY, COMMIT
//! ```
//!
//! The disks are complete at the destination before it says READY, whatever the policy: no block
//! follows a guest that was moved by post-copy. Their loop is apart from the policies, which see of
//! it only the bytes that are still to be sent
//! ([`View::disk_bytes`](crate::policy::View::disk_bytes)): they are part of the predicted pause.
//!
//! Why no write is lost: a block is pending until it was handed to the link, and is read after it
//! was taken from what was written. A write that was done before it was taken is in what is read;
//! one that was not is marked when it is done, and is found the next time. The last time is in the
//! pause, when the devices have drained. A failure before the commit leaves the guest with its own
//! disk, which was only read.

use super::coder::Coder;
use super::error::SourceError;
use crate::options::Options;
use crate::page::{PageSet, Run};
use crate::port::{BLOCK_BYTES, BlockSource, PortError, blocks_in};
use crate::report::Disk;
use crate::wire::{Features, FrameType, Header};
use std::sync::Arc;
use std::time::Duration;

/// A disk and what is known of it.
pub(super) struct CopiedDisk {
    pub(super) source: Arc<dyn BlockSource>,
    pub(super) bytes: u64,
    pub(super) pending: PageSet,
    pub(super) sent_once: PageSet,
}

impl CopiedDisk {
    /// Bytes of a run of blocks; the last block may be short.
    pub(super) const fn bytes_of(&self, run: Run) -> u64 {
        let end = run.end().saturating_mul(BLOCK_BYTES);
        let end = if end < self.bytes { end } else { self.bytes };
        end.saturating_sub(run.first * BLOCK_BYTES)
    }

    /// The first blocks of the run that are zero and need not be read.
    pub(super) fn hole(&self, run: Run) -> Run {
        let len = self.bytes_of(run);
        let hole = self.source.hole(run.first * BLOCK_BYTES, len);
        let blocks = if hole >= len {
            run.count
        } else {
            hole / BLOCK_BYTES
        };
        Run::new(run.first, blocks)
    }
}

/// The disks of a guest that move with it.
pub(super) struct Disks {
    pub(super) all: Vec<CopiedDisk>,
    pub(super) coder: Coder,
    pub(super) buffer: Vec<u8>,
    /// Ends of rounds that were sent, and that were answered.
    pub(super) asked: u32,
    pub(super) answered: u32,
    pub(super) since_asked: u64,
    pub(super) asked_at: Duration,
    /// Bytes that went out since the last round of pages, and how long that took.
    pub(super) since_round: (u64, Duration),
    pub(super) report: Disk,
}

impl Disks {
    /// None.
    pub(super) fn none() -> Self {
        Self {
            all: Vec::new(),
            coder: Coder::default(),
            buffer: Vec::new(),
            asked: 0,
            answered: 0,
            since_asked: 0,
            asked_at: Duration::ZERO,
            since_round: (0, Duration::ZERO),
            report: Disk::default(),
        }
    }

    /// Those of a guest; nothing of them was sent.
    pub(super) fn new(sources: Vec<Arc<dyn BlockSource>>) -> Self {
        let all: Vec<_> = sources
            .into_iter()
            .map(|source| {
                let bytes = source.bytes();
                let end = blocks_in(bytes);
                let mut pending = PageSet::new(end);
                pending.insert_run(Run::new(0, end));
                CopiedDisk {
                    source,
                    bytes,
                    pending,
                    sent_once: PageSet::new(end),
                }
            })
            .collect();
        let report = Disk {
            disks: all.len() as u64,
            total: all.iter().map(|copy| copy.bytes).sum(),
            ..Disk::default()
        };
        Self {
            all,
            report,
            ..Self::none()
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Bytes of all of them.
    pub(super) const fn bytes(&self) -> u64 {
        self.report.total
    }

    /// Their sizes, for the handshake.
    pub(super) fn sizes(&self) -> Vec<u64> {
        self.all.iter().map(|copy| copy.bytes).collect()
    }

    /// Codes blocks as the options want and the destination can.
    pub(super) fn agree(&mut self, options: &Options, agreed: Features) {
        self.coder = Coder::new(options, agreed);
    }

    /// Bytes that are known to be pending.
    pub(super) fn pending_bytes(&self) -> u64 {
        let blocks: u64 = self.all.iter().map(|copy| copy.pending.len()).sum();
        blocks * BLOCK_BYTES
    }

    /// Whether an answer to the end of a round is still to come.
    pub(super) const fn is_awaiting(&self) -> bool {
        self.answered < self.asked
    }

    /// Takes an answer to the end of a round; whether it is the one that comes next.
    pub(super) const fn take_answer(&mut self, header: &Header) -> bool {
        let expected = matches!(header.kind, FrameType::BlocksStored)
            && self.is_awaiting()
            && header.round == self.answered + 1;
        if expected {
            self.answered += 1;
        }
        expected
    }

    /// What went out since the last round of pages: that round's time on the link is measured with
    /// it.
    pub(super) fn take_since_round(&mut self) -> (u64, Duration) {
        std::mem::take(&mut self.since_round)
    }

    pub(super) fn report(&self) -> Option<Disk> {
        (!self.is_empty()).then_some(self.report)
    }

    pub(super) fn start(&self) -> Result<(), PortError> {
        self.all.iter().try_for_each(|copy| copy.source.start())
    }

    /// Writes are not remembered any more.
    pub(super) fn stop(&self) {
        self.all.iter().for_each(|copy| copy.source.stop());
    }

    /// Unites what was written with what is pending.
    pub(super) fn collect(&mut self) -> Result<(), SourceError> {
        for copy in &mut self.all {
            let words = copy
                .source
                .take_written()
                .map_err(|e| SourceError::guest("asking which blocks of a disk were written", e))?;
            copy.pending.insert_words(0, &words);
        }
        Ok(())
    }

    /// Blocks of this run went out.
    pub(super) fn delivered(&mut self, copy: usize, run: Run, zero: bool, paused: bool) {
        let bytes = run.count * BLOCK_BYTES;
        let report = &mut self.report;
        *(if zero {
            &mut report.zero
        } else {
            &mut report.sent
        }) += bytes;
        if paused {
            report.in_pause += bytes;
        }
        if !zero {
            self.since_round.0 += bytes;
        }
        let Some(copy) = self.all.get_mut(copy) else {
            return;
        };
        copy.pending.remove_run(run);
        let mut at = run.first;
        while let Some(again) = copy
            .sent_once
            .next_run(at, u64::MAX)
            .filter(|again| again.first < run.end())
        {
            report.resent += (again.end().min(run.end()) - again.first) * BLOCK_BYTES;
            at = again.end();
        }
        copy.sent_once.insert_run(run);
    }
}
