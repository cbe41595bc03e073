//! Coding at the source: one data channel's encoder.

use super::adaptive::{DataChannel, Level, Outcome};
use super::cache::Proof;
use super::class::{is_regular, is_sparse};
use super::coding::Coding;
use super::frames::{put_frame, put_in_order};
use super::patch::{self, Page, ZEROS};
use super::words;
use super::{Kind, ZSTD_LEVEL, ZSTD_PAGES, append};
use crate::options::Compress;
use crate::page::{Gfn, PAGE_BYTES, PAGE_SIZE, Run};
use crate::port::{Clock, PortError};
use crate::report::Codecs;
use crate::wire::Encoding;
use std::time::Duration;
use zstd::bulk::Compressor;

/// A patch that is longer does not pay: the page is then sent as a page of its own.
const PATCH_LIMIT: usize = PAGE_SIZE * 3 / 4;
/// Pages in a sample.
const SAMPLE: u64 = 8;

/// How a page goes out.
enum Way {
    /// Among the patches.
    Among(Kind),
    /// Through zstd, with others.
    Compress,
    /// Straight from guest memory.
    Raw,
}

/// What was made of a batch.
#[derive(Clone, Copy, Debug, Default)]
pub struct Coded {
    /// Data pages in it, those that stay raw included.
    pub pages: u64,
    /// Of those, how many stay raw.
    pub raw: u64,
    /// Time spent.
    pub took: Duration,
    /// By coder.
    pub codecs: Codecs,
    level: Option<Level>,
    data_channels: u16,
}

/// The encoder of one data channel: buffers that are reused, nothing is allocated for a page.
#[derive(Default)]
pub struct Encoder {
    shared: Coding,
    proof: Proof,
    data_channel: DataChannel,
    /// Copies of pages: those waiting for zstd, and the one in hand after them.
    copies: Vec<Page>,
    tags: Vec<u8>,
    patches: Vec<u8>,
    patch_crc: u32,
    packed: Vec<u8>,
    patch_runs: Vec<Run>,
    zstd_runs: Vec<Run>,
    raw_runs: Vec<Run>,
    zstd: Option<Compressor<'static>>,
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encoder")
            .field("shared", &self.shared)
            .finish_non_exhaustive()
    }
}

/// Where a batch comes from and goes to.
pub struct Batch<'a> {
    /// Its pages that are not zero; those that stay raw are left.
    pub data: &'a mut Vec<Run>,
    /// The round.
    pub round: u32,
    /// Pages of a first pass that come after these and are likelier to be sent again: the cache
    /// keeps places for them.
    pub warmer: u64,
    /// Data channels that send at the same time, this one included.
    pub data_channels: u16,
    /// Copies a page out of guest memory.
    pub copy: &'a mut dyn FnMut(Gfn, &mut Page) -> Result<(), PortError>,
    /// Takes the frames.
    pub out: &'a mut Vec<u8>,
}

impl Coding {
    /// A data channel's encoder.
    #[must_use]
    pub fn encoder(&self) -> Encoder {
        Encoder {
            shared: self.clone(),
            ..Encoder::default()
        }
    }
}

impl Encoder {
    /// Whether it has anything to do.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.shared.kind != Compress::None
    }

    /// Codes each page by itself from now on.
    pub fn without_bases(&mut self) {
        self.shared.cache = None;
    }

    /// Pages that go out as zero pages.
    pub fn zeroed(&self, runs: &[Run]) {
        if let Some(cache) = &self.shared.cache {
            runs.iter().for_each(|run| cache.forget(*run));
        }
    }

    /// Codes what is worth it: frames are appended to `out`, and `data` keeps what is to go raw.
    ///
    /// # Errors
    /// When a page cannot be read, or zstd has no memory; the batch is then not to be sent.
    pub fn encode(&mut self, batch: &mut Batch<'_>, clock: &dyn Clock) -> Result<Coded, PortError> {
        let pages: u64 = batch.data.iter().map(|run| run.count).sum();
        if !self.is_on() || pages == 0 {
            return Ok(Coded {
                pages,
                raw: pages,
                ..Coded::default()
            });
        }
        let began = clock.now();
        let level = self.level();
        let delta = self.uses_cache(pages);
        if !delta && let Some(cache) = &self.shared.cache {
            batch.data.iter().for_each(|run| cache.forget(*run));
        }
        let mut tally = Codecs::default();
        // Patches of what was sent before are worth a try even where all else goes raw.
        let coded = if level > Level::Raw || delta {
            self.code(batch, level, delta, &mut tally)?;
            Some(if level == Level::Raw && tally.is_empty() {
                Level::Raw
            } else {
                level.max(Level::Patch)
            })
        } else {
            if self
                .shared
                .chooser()
                .is_some_and(|chooser| chooser.wants_sample())
            {
                self.sample(batch, clock)?;
            }
            self.mark_seen(batch.data);
            self.shared.chooser.as_ref().map(|_| Level::Raw)
        };
        let raw = batch.data.iter().map(|run| run.count).sum();
        let took = clock.now().saturating_sub(began);
        tally.encode_ms = took.as_secs_f64() * 1e3;
        Ok(Coded {
            pages,
            raw,
            took,
            codecs: tally,
            level: coded,
            data_channels: batch.data_channels,
        })
    }

    /// A batch has been sent: `bytes` for its data pages, in `link`.
    pub fn sent(&mut self, coded: &Coded, bytes: u64, link: Duration) {
        if let (Some(mut chooser), Some(level)) = (self.shared.chooser(), coded.level) {
            let outcome = Outcome {
                level,
                data_channels: coded.data_channels,
                pages: coded.pages,
                bytes,
                // Samples are none of the batch's cost.
                encode: if level == Level::Raw {
                    Duration::ZERO
                } else {
                    coded.took
                },
                link,
            };
            chooser.record(&mut self.data_channel, outcome);
        }
    }

    /// Sending failed: what the destination has is unknown.
    pub fn failed(&self) {
        if let Some(cache) = &self.shared.cache {
            cache.doubt();
        }
    }

    fn level(&self) -> Level {
        match (self.shared.chooser(), self.shared.kind) {
            (Some(chooser), _) if self.shared.zstd => chooser.level(),
            (Some(chooser), _) => chooser.level().min(Level::Patch),
            (None, Compress::Zstd) => Level::Full,
            (None, Compress::Delta) => Level::Patch,
            (None, _) => Level::Raw,
        }
    }

    /// Whether this batch's pages are looked up in the cache and entered.
    fn uses_cache(&mut self, pages: u64) -> bool {
        if self.shared.cache.is_none() {
            return false;
        }
        let Some(has_time) = self.shared.chooser().map(|chooser| chooser.link_has_time()) else {
            return true;
        };
        if !has_time {
            return false;
        }
        self.proof.wants(pages)
    }

    fn code(
        &mut self,
        batch: &mut Batch<'_>,
        level: Level,
        delta: bool,
        tally: &mut Codecs,
    ) -> Result<(), PortError> {
        for list in [
            &mut self.patch_runs,
            &mut self.zstd_runs,
            &mut self.raw_runs,
        ] {
            list.clear();
        }
        self.tags.clear();
        self.patches.clear();
        self.patch_crc = 0;
        let mut waiting = 0;
        let mut all_shrank = true;
        let (mut looked_up, mut saved) = (0, 0);
        for run in batch.data.iter() {
            for gfn in run.first..run.end() {
                let one = Run::new(gfn, 1);
                let again = delta && (self.shared.roomy || self.shared.seen.contains(gfn));
                // A place that is free is better filled: the page may be written to before the
                // cache has others to choose.
                let first = delta && !again && self.shared.has_room(batch.warmer);
                let enters = again || first;
                if level == Level::Raw && !enters {
                    append(&mut self.raw_runs, one, run.first);
                    continue;
                }
                if waiting == self.copies.len() {
                    self.copies.push(ZEROS);
                }
                (batch.copy)(gfn, &mut self.copies[waiting])?;
                let before = self.patches.len();
                if again {
                    looked_up += 1;
                }
                // It counts as unused: the next entry may have its place.
                let round = batch.round.saturating_sub(u32::from(first));
                match self.way_of(gfn, round, waiting, level, enters) {
                    Way::Among(kind) => {
                        let bytes = self.patches.len() - before;
                        self.tags.extend_from_slice(&kind.tag(bytes).to_le_bytes());
                        append(&mut self.patch_runs, one, run.first);
                        let count = match kind {
                            Kind::Delta => &mut tally.delta,
                            Kind::Sparse => &mut tally.sparse,
                            Kind::Literal => &mut tally.copied,
                        };
                        count.add(1, PAGE_BYTES, bytes as u64 + 2);
                        if kind == Kind::Delta {
                            saved += PAGE_BYTES.saturating_sub(bytes as u64);
                        }
                    }
                    Way::Compress => {
                        append(&mut self.zstd_runs, one, run.first);
                        waiting += 1;
                        if waiting == ZSTD_PAGES {
                            all_shrank &= self.compress(batch.round, waiting, batch.out, tally)?;
                            waiting = 0;
                        }
                    }
                    Way::Raw => append(&mut self.raw_runs, one, run.first),
                }
            }
        }
        all_shrank &= self.compress(batch.round, waiting, batch.out, tally)?;
        if !all_shrank {
            put_in_order(&mut self.raw_runs, batch.data);
        }
        self.put_patches(batch.round, batch.out);
        self.proof.record(looked_up, saved);
        std::mem::swap(batch.data, &mut self.raw_runs);
        self.mark_seen(batch.data);
        self.mark_seen(&self.patch_runs);
        Ok(())
    }

    /// Finds a page's way; the bytes of one that goes out among patches are appended.
    fn way_of(&mut self, gfn: Gfn, round: u32, at: usize, level: Level, enters: bool) -> Way {
        let page = &self.copies[at];
        let patches = &mut self.patches;
        let crc = &mut self.patch_crc;
        let mut kind = None;
        if enters && let Some(cache) = &self.shared.cache {
            cache.exchange(gfn, round, page, |base| {
                if let Some(base) = base
                    && patch::encode(base, page, PATCH_LIMIT, patches)
                {
                    *crc = crc32c::crc32c_append(*crc, page);
                    kind = Some(Kind::Delta);
                }
                // It goes out from this copy, whichever way.
                true
            });
        }
        if let Some(kind) = kind {
            return Way::Among(kind);
        }
        if self.shared.patches && is_sparse(page) && words::pack(page, patches) {
            return Way::Among(Kind::Sparse);
        }
        if level == Level::Full && self.wants_zstd(at) {
            return Way::Compress;
        }
        if enters {
            self.patches.extend_from_slice(page);
            return Way::Among(Kind::Literal);
        }
        Way::Raw
    }

    /// Whether a page, known not to be sparse, is for zstd.
    fn wants_zstd(&self, at: usize) -> bool {
        self.shared.zstd && (self.shared.kind == Compress::Zstd || is_regular(&self.copies[at]))
    }

    /// Appends a zstd frame of the first `count` copies, or makes them raw where that saves
    /// nothing; says whether it did not have to. They are then behind raw pages that came after
    /// them.
    fn compress(
        &mut self,
        round: u32,
        count: usize,
        out: &mut Vec<u8>,
        tally: &mut Codecs,
    ) -> Result<bool, PortError> {
        if count == 0 {
            return Ok(true);
        }
        // What does not save a tenth is not worth the decompressing.
        let bytes = count * PAGE_SIZE;
        let Some(packed) = self.pack(count, bytes / 10 * 9)? else {
            if let Some(cache) = &self.shared.cache {
                self.zstd_runs.iter().for_each(|run| cache.forget(*run));
            }
            self.raw_runs.append(&mut self.zstd_runs);
            return Ok(false);
        };
        tally.zstd.add(count as u64, bytes as u64, packed as u64);
        put_frame(Encoding::Zstd, round, &self.zstd_runs, out, |out| {
            out.extend_from_slice(&self.packed[..packed]);
        });
        self.mark_seen(&self.zstd_runs);
        self.zstd_runs.clear();
        Ok(true)
    }

    /// These pages have been sent, or will be before they are looked at again.
    fn mark_seen(&self, runs: &[Run]) {
        if self.shared.cache.is_some() {
            let seen = &self.shared.seen;
            runs.iter().for_each(|run| seen.insert_run(*run));
        }
    }

    /// Compresses the first `count` copies into at most `room` bytes; `None` when it takes more.
    fn pack(&mut self, count: usize, room: usize) -> Result<Option<usize>, PortError> {
        let zstd = match &mut self.zstd {
            Some(zstd) => zstd,
            none => none.insert(Compressor::new(ZSTD_LEVEL)?),
        };
        self.packed.resize(ZSTD_PAGES * PAGE_SIZE, 0);
        let from = self.copies[..count].as_flattened();
        // The only failure of a compressor whose memory is there is that the result does not fit.
        Ok(zstd.compress_to_buffer(from, &mut self.packed[..room]).ok())
    }

    fn put_patches(&self, round: u32, out: &mut Vec<u8>) {
        if self.patch_runs.is_empty() {
            return;
        }
        put_frame(Encoding::Patch, round, &self.patch_runs, out, |out| {
            out.extend_from_slice(&self.patch_crc.to_le_bytes());
            out.extend_from_slice(&self.tags);
            out.extend_from_slice(&self.patches);
        });
    }

    /// Codes a few pages of a batch for what that costs and gives; nothing of it is sent.
    fn sample(&mut self, batch: &mut Batch<'_>, clock: &dyn Clock) -> Result<(), PortError> {
        let total: u64 = batch.data.iter().map(|run| run.count).sum();
        let step = (total / SAMPLE).max(1);
        let began = clock.now();
        let mut kept = 0;
        let mut bytes = 0;
        let (mut taken, mut position) = (0, 0_u64);
        self.patches.clear();
        for run in batch.data.iter() {
            // The pages at multiples of `step`, counted over the runs.
            let mut gfn = run.first + position.next_multiple_of(step) - position;
            while gfn < run.end() && taken < SAMPLE {
                if kept == self.copies.len() {
                    self.copies.push(ZEROS);
                }
                (batch.copy)(gfn, &mut self.copies[kept])?;
                taken += 1;
                let before = self.patches.len();
                let page = &self.copies[kept];
                if self.shared.patches && is_sparse(page) && words::pack(page, &mut self.patches) {
                    bytes += (self.patches.len() - before) as u64;
                } else {
                    kept += 1;
                }
                gfn += step;
            }
            position += run.count;
        }
        let patched = clock.now();
        let mut with_zstd = bytes;
        let mut regular = 0;
        for at in 0..kept {
            if self.wants_zstd(at) {
                self.copies.swap(regular, at);
                regular += 1;
            } else {
                with_zstd += PAGE_BYTES;
            }
        }
        if regular > 0 {
            let room = regular * PAGE_SIZE;
            with_zstd += self.pack(regular, room)?.unwrap_or(room) as u64;
        }
        let compressed = clock.now();
        // While this data channel codes, the others do.
        let data_channels = u32::from(batch.data_channels.max(1));
        let share = |until: Duration| until.saturating_sub(began) / data_channels;
        if let Some(mut chooser) = self.shared.chooser() {
            let bytes = bytes + kept as u64 * PAGE_BYTES;
            chooser.sample(Level::Patch, taken, bytes, share(patched));
            if self.shared.zstd {
                chooser.sample(Level::Full, taken, with_zstd, share(compressed));
            }
        }
        Ok(())
    }
}
