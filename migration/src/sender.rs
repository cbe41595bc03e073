//! Sending sets of pages: batches, zero pages, pacing. One [`Sender`] per data channel; nothing is
//! allocated per page, and nothing is copied that is not coded.

mod batches;

use crate::codec::{Batch, Encoder, MAX_CODED_PAGES, append};
use crate::numbers::{pages_in, seconds};
use crate::page::{Gfn, PAGE_BYTES, PAGE_SIZE, Run};
use crate::port::{Clock, Link, PageSource, PortError, SourceVm};
use crate::report::Codecs;
use crate::sync::lock;
use crate::wire::{
    Channel, FLAG_CRC, FLAG_TELL, FrameType, HEADER_BYTES, Header, MAX_RUNS, RUN_BYTES, WireError,
    encode_runs,
};
pub(crate) use batches::Batches;
use std::sync::Mutex;
use std::time::Duration;

/// Pages in a batch: 1 MiB keeps system calls rare and cancelling quick. With every second page
/// zero a batch has half as many runs, which is within [`MAX_RUNS`].
pub(crate) const BATCH_PAGES: u64 = 256;
const _: () = assert!(BATCH_PAGES <= MAX_RUNS as u64 && BATCH_PAGES <= MAX_CODED_PAGES);

/// Why a batch was not sent.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SendError {
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("{0}")]
    Guest(PortError),
}

/// What a batch amounted to.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sent {
    pub data_pages: u64,
    pub zero_pages: u64,
    /// Known to hold nothing without a look at them, and told as such.
    pub skipped_pages: u64,
    pub bytes: u64,
    /// Time spent on the link and waiting for the user's cap, summed over the data channels;
    /// looking for zero pages and coding are not part of it.
    pub link: Duration,
    /// Time spent on coding, summed over the data channels.
    pub coding: Duration,
    /// What the coders did.
    pub codecs: Codecs,
}

impl Sent {
    pub(crate) const fn add(&mut self, other: Self) {
        self.data_pages += other.data_pages;
        self.zero_pages += other.zero_pages;
        self.skipped_pages += other.skipped_pages;
        self.bytes += other.bytes;
        self.link = self.link.saturating_add(other.link);
        self.coding = self.coding.saturating_add(other.coding);
        self.codecs.join(&other.codecs);
    }

    pub(crate) const fn pages(&self) -> u64 {
        self.data_pages + self.zero_pages + self.skipped_pages
    }
}

/// The user's bandwidth cap: a token bucket over virtual time. Shared by the data channels.
#[derive(Debug)]
pub(crate) struct Pacer(Mutex<Paid>);

#[derive(Debug)]
struct Paid {
    /// Bytes per second; `None` is no cap.
    rate: Option<f64>,
    /// When the bytes granted so far will have been paid for.
    until: Duration,
}

impl Pacer {
    /// Idle time is credited up to this much, so that short waits elsewhere do not cost rate.
    const BURST: Duration = Duration::from_millis(20);

    pub(crate) const fn new(rate: Option<u64>) -> Self {
        Self(Mutex::new(Paid {
            rate: match rate {
                Some(rate) => Some(rate as f64),
                None => None,
            },
            until: Duration::ZERO,
        }))
    }

    /// Another cap from now on. What was charged by the old one is paid for.
    pub(crate) fn set_rate(&self, rate: Option<u64>, clock: &dyn Clock) {
        let mut paid = self.paid();
        paid.rate = rate.map(|rate| rate as f64);
        paid.until = paid.until.min(clock.now());
    }

    /// Pages in a batch: as many as the cap lets through in a moment, so that cancelling is quick
    /// and the link sees no bursts. At least one: a batch of none would be sent for ever.
    pub(crate) fn batch_pages(&self) -> u64 {
        const MOMENT: f64 = 0.05;
        self.paid().rate.map_or(BATCH_PAGES, |rate| {
            pages_in(rate * MOMENT / PAGE_BYTES as f64).max(1)
        })
    }

    /// Waits until more may be sent, or `cancelled`; says how long that took.
    pub(crate) fn wait(&self, clock: &dyn Clock, cancelled: &dyn Fn() -> bool) -> Duration {
        const SLICE: Duration = Duration::from_millis(100);
        if self.paid().rate.is_none() {
            return Duration::ZERO;
        }
        let began = clock.now();
        loop {
            let now = clock.now();
            let left = self.paid().until.saturating_sub(now);
            if left.is_zero() || cancelled() {
                return now.saturating_sub(began);
            }
            clock.sleep(left.min(SLICE));
        }
    }

    /// Charges what was sent: what goes next waits until that is paid for. Charged afterwards,
    /// since it is not known before how many bytes pages make.
    pub(crate) fn charge(&self, bytes: u64, clock: &dyn Clock) {
        let mut paid = self.paid();
        if let Some(rate) = paid.rate {
            let from = paid.until.max(clock.now().saturating_sub(Self::BURST));
            paid.until = from + seconds(bytes as f64 / rate);
        }
    }

    fn paid(&self) -> std::sync::MutexGuard<'_, Paid> {
        lock(&self.0)
    }
}

/// Reusable buffers of one data channel, and its encoder.
#[derive(Debug, Default)]
pub(crate) struct Sender {
    encoder: Encoder,
    head: Vec<u8>,
    data: Vec<Run>,
    zero: Vec<Run>,
    scratch: Vec<u64>,
}

/// How the pages of a batch are to be sent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BatchMode {
    pub round: u32,
    /// The guest stands still: nothing needs to be cleared, and checksums can cover the pages.
    pub paused: bool,
    /// The destination is asked to say when the batch is in place.
    pub tell: bool,
    /// Pages of a first pass that come later and are likelier to be sent again.
    pub warmer: u64,
    /// Data channels that send at the same time, this one included.
    pub data_channels: u16,
}

impl Sender {
    /// A data channel's sender.
    pub(crate) fn new(encoder: Encoder) -> Self {
        Self {
            encoder,
            ..Self::default()
        }
    }

    /// Sends no differences any more.
    pub(crate) fn without_bases(&mut self) {
        self.encoder.without_bases();
    }

    /// Sends the pages of `runs`: at most [`BATCH_PAGES`], or as many as [`Batches`] has found to
    /// hold nothing. Of these, what was written meanwhile goes out in pieces.
    pub(crate) fn send<L: Link, G: SourceVm<L> + ?Sized>(
        &mut self,
        channel: &mut Channel<L>,
        guest: &G,
        runs: &[Run],
        mode: BatchMode,
        clock: &dyn Clock,
    ) -> Result<Sent, SendError> {
        let mut sent = self.look(guest, runs, mode)?;
        let pages: u64 = self.data.iter().map(|run| run.count).sum();
        if pages <= BATCH_PAGES {
            sent.add(self.send_looked_at(channel, guest, mode, clock)?);
            return Ok(sent);
        }
        let written = std::mem::take(&mut self.data);
        for run in written {
            let mut at = run.first;
            while at < run.end() {
                let part = Run::new(at, BATCH_PAGES.min(run.end() - at));
                at = part.end();
                self.data.clear();
                self.data.push(part);
                sent.add(self.send_looked_at(channel, guest, mode, clock)?);
                self.head.clear();
            }
        }
        Ok(sent)
    }

    /// Clears the pages' dirty bits and then looks what they hold: frames for those that are zero
    /// are put into `head`, the others into `data`.
    fn look<L: Link, G: SourceVm<L> + ?Sized>(
        &mut self,
        guest: &G,
        runs: &[Run],
        mode: BatchMode,
    ) -> Result<Sent, SendError> {
        if !mode.paused {
            // Cleared first, read after: what is written from here on is dirty again.
            guest
                .clear_dirty(runs, &mut self.scratch)
                .map_err(SendError::Guest)?;
        }
        let skipped_pages = split(guest, runs, &mut self.zero, &mut self.data);
        let told: u64 = self.zero.iter().map(|run| run.count).sum();
        self.head.clear();
        let zero = std::mem::take(&mut self.zero);
        for part in zero.chunks(MAX_RUNS as usize) {
            let Some(first) = part.first() else { break };
            let at = self.reserve_header();
            encode_runs(part, &mut self.head);
            let crc = crc32c::crc32c(&self.head[at + HEADER_BYTES..]);
            self.put_header(
                at,
                Header {
                    flags: FLAG_CRC,
                    payload_crc: crc,
                    ..table_header(FrameType::Zero, first.first, part.len(), 0, mode.round)
                },
            );
        }
        self.encoder.zeroed(&zero);
        self.zero = zero;
        Ok(Sent {
            zero_pages: told.saturating_sub(skipped_pages),
            skipped_pages,
            ..Sent::default()
        })
    }

    /// Sends what [`look`](Self::look) has found, at most [`BATCH_PAGES`] that hold something, in
    /// one write: the frames for the zero pages, then those of the coded ones, then one for the
    /// others.
    fn send_looked_at<L: Link, G: SourceVm<L> + ?Sized>(
        &mut self,
        channel: &mut Channel<L>,
        guest: &G,
        mode: BatchMode,
        clock: &dyn Clock,
    ) -> Result<Sent, SendError> {
        let uncoded = self.head.len();
        let coded = self
            .encoder
            .encode(
                &mut Batch {
                    data: &mut self.data,
                    round: mode.round,
                    warmer: mode.warmer,
                    data_channels: mode.data_channels,
                    copy: &mut |gfn, into| guest.copy_page(gfn, into),
                    out: &mut self.head,
                },
                clock,
            )
            .map_err(SendError::Guest)?;
        let began;
        let result = if let Some(first) = self.data.first().copied() {
            let at = self.reserve_header();
            encode_runs(&self.data, &mut self.head);
            let mut crc = crc32c::crc32c(&self.head[at + HEADER_BYTES..]);
            let mut flags = 0;
            if mode.paused {
                flags = FLAG_CRC;
                crc = self.crc_of_pages(guest, crc)?;
            }
            if mode.tell {
                flags |= FLAG_TELL;
            }
            let header = Header {
                flags,
                payload_crc: crc,
                ..table_header(
                    FrameType::Pages,
                    first.first,
                    self.data.len(),
                    coded.raw,
                    mode.round,
                )
            };
            self.put_header(at, header);
            began = clock.now();
            guest.transmit(channel.link(), &self.head, &self.data)
        } else {
            if mode.tell {
                self.ask_at_the_end();
            }
            began = clock.now();
            channel.link().send(&self.head, &[])
        };
        if let Err(error) = result {
            self.encoder.failed();
            return Err(WireError::Io(error).into());
        }
        let bytes = self.head.len() as u64 + coded.raw * PAGE_SIZE as u64;
        channel.count(bytes);
        let link = clock.now().saturating_sub(began);
        self.encoder.sent(&coded, bytes - uncoded as u64, link);
        Ok(Sent {
            data_pages: coded.pages,
            bytes,
            link,
            coding: coded.took,
            codecs: coded.codecs,
            ..Sent::default()
        })
    }

    fn crc_of_pages<L: Link, G: SourceVm<L> + ?Sized>(
        &self,
        guest: &G,
        mut crc: u32,
    ) -> Result<u32, SendError> {
        let mut page = [0; PAGE_SIZE];
        for gfn in self.data.iter().flat_map(|run| run.first..run.end()) {
            guest.copy_page(gfn, &mut page).map_err(SendError::Guest)?;
            crc = crc32c::crc32c_append(crc, &page);
        }
        Ok(crc)
    }

    /// The last frame of the batch asks the destination for PLACED; all of them are in `head`.
    fn ask_at_the_end(&mut self) {
        let mut rest = self.head.as_mut_slice();
        while let Some((header, after)) = rest.split_first_chunk_mut::<HEADER_BYTES>() {
            let length = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
            let length = usize::try_from(length).unwrap_or(usize::MAX);
            if length >= after.len() {
                Header::add_flags(header, FLAG_TELL);
                return;
            }
            rest = &mut after[length..];
        }
    }

    fn reserve_header(&mut self) -> usize {
        let at = self.head.len();
        self.head.resize(at + HEADER_BYTES, 0);
        at
    }

    fn put_header(&mut self, at: usize, header: Header) {
        self.head[at..at + HEADER_BYTES].copy_from_slice(&header.encode());
    }
}

/// Sorts pages into runs of zeros and of data, by what they hold now; returns how many of the zero
/// ones were not read.
///
/// Those are told too, at a few bytes a run: the destination may have what they held before they
/// were given back.
pub(crate) fn split<L: Link, S: PageSource<L> + ?Sized>(
    source: &S,
    runs: &[Run],
    zero: &mut Vec<Run>,
    data: &mut Vec<Run>,
) -> u64 {
    let mut skipped = 0;
    zero.clear();
    data.clear();
    for run in runs {
        let mut gfn = run.first;
        let mut hole = source.unpopulated(*run);
        while gfn < run.end() {
            if let Some(empty) = hole
                && gfn >= empty.first
            {
                append(zero, Run::new(gfn, empty.end() - gfn), run.first);
                skipped += empty.end() - gfn;
                gfn = empty.end();
                hole = source.unpopulated(Run::new(gfn, run.end() - gfn));
                continue;
            }
            let list = if source.is_zero(gfn) {
                &mut *zero
            } else {
                &mut *data
            };
            append(list, Run::new(gfn, 1), run.first);
            gfn += 1;
        }
    }
    skipped
}

/// A page frame's header. A batch is at most 1 MiB, so nothing here can exceed its field.
pub(crate) fn table_header(
    kind: FrameType,
    gfn: Gfn,
    runs: usize,
    pages: u64,
    round: u32,
) -> Header {
    let length = runs as u64 * RUN_BYTES as u64 + pages * PAGE_SIZE as u64;
    Header {
        gfn,
        count: u32::try_from(runs).unwrap_or(u32::MAX),
        length: u32::try_from(length).unwrap_or(u32::MAX),
        ..Header::bare(kind, round)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_cap_still_sends_a_page() {
        for rate in [1, 4096, 50_000] {
            assert_eq!(Pacer::new(Some(rate)).batch_pages(), 1, "{rate} bytes/s");
        }
        assert_eq!(Pacer::new(None).batch_pages(), BATCH_PAGES);
    }
}
