//! Making pages smaller, and back.

use super::measure::{Cost, timed};
use super::{Table, batches};
use anyhow::{Context, Result};
use ferry_migration::codec::{Batch, Coding, Decoder, Encoder};
use ferry_migration::net::MonotonicClock;
use ferry_migration::options::{Compress, Options};
use ferry_migration::page::{AtomicPageSet, PAGE_SIZE, Run};
use ferry_migration::wire::{Features, HEADER_BYTES, Header, Limits, decode_runs};
use ferry_vmm::memory::{Backing, GuestRam};
use std::sync::Arc;
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress};

/// One side's coder and the other's.
struct Pair<'a> {
    from: &'a GuestRam,
    to: GuestRam,
    encoder: Encoder,
    decoder: Decoder,
    clock: MonotonicClock,
    end: u64,
    round: u32,
}

/// What a round through a pair came to.
#[derive(Default)]
struct Passed {
    encode: Cost,
    decode: Cost,
    wire: u64,
    decoded: u64,
}

/// Encodes all of `ram` by each coder, and decodes what came of it; what the patches are against
/// goes first.
pub fn coders(table: &Table, content: &str, ram: &GuestRam) -> Result<()> {
    for (compress, name) in [
        (Compress::Zstd, "zstd"),
        (Compress::Adaptive, "adaptive"),
        (Compress::Delta, "delta, 4 words changed"),
    ] {
        let mut pair = Pair::new(ram, compress)?;
        if compress == Compress::Delta {
            pair.round()?;
        }
        let mut decodes = Vec::new();
        let mut wire = 0;
        table.stage("encode", &format!("{content}: {name}"), || {
            if compress == Compress::Delta {
                pair.change()?;
            }
            let passed = pair.round()?;
            wire = passed.wire;
            if passed.decoded > 0 {
                decodes.push((passed.decoded, passed.decode));
            }
            Ok((ram.size(), passed.encode))
        })?;
        let share = wire as f64 / ram.size() as f64;
        if decodes.is_empty() {
            println!("           (all of it stays raw)");
        } else {
            let what = format!("{content}: {name} (sent: {share:.2})");
            table.line("decode", &what, &decodes);
        }
    }
    Ok(())
}

impl<'a> Pair<'a> {
    fn new(from: &'a GuestRam, compress: Compress) -> Result<Self> {
        let end = from.regions().iter().map(|region| region.end_gfn()).max();
        let end = end.context("a guest without memory")?;
        let options = Options {
            compress,
            delta_cache: 2 * from.size(),
            ..Options::default()
        };
        let agreed = Features::ZSTD.or(Features::PATCH);
        let pages = from.size() / PAGE_SIZE as u64;
        Ok(Self {
            from,
            to: GuestRam::new(from.size(), Backing::Small)?,
            encoder: Coding::new(&options, agreed, pages, end).encoder(),
            decoder: Decoder::new(agreed, Arc::new(AtomicPageSet::new(end))),
            clock: MonotonicClock::new(),
            end,
            round: 0,
        })
    }

    /// A few words of each page.
    fn change(&self) -> Result<()> {
        for gfn in batches(self.from)
            .iter()
            .flat_map(|run| run.first..run.end())
        {
            for at in [8, 1000, 2000, 4000] {
                let word =
                    gfn.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(self.round) << (at % 48);
                let address = GuestAddress(gfn * PAGE_SIZE as u64 + at);
                self.from.memory().write_obj(word | 1, address)?;
            }
        }
        Ok(())
    }

    fn round(&mut self) -> Result<Passed> {
        self.round += 1;
        let mut passed = Passed::default();
        let mut out = Vec::new();
        for run in batches(self.from) {
            out.clear();
            let mut raw = vec![run];
            let (from, clock) = (self.from, &self.clock);
            let mut batch = Batch {
                data: &mut raw,
                round: self.round,
                warmer: 0,
                data_channels: 1,
                copy: &mut |gfn, into| Ok(from.copy_page(gfn, into)?),
                out: &mut out,
            };
            let encoder = &mut self.encoder;
            let (coded, cost) = timed(|| encoder.encode(&mut batch, clock));
            let coded = coded.map_err(|e| anyhow::anyhow!("encoding: {e}"))?;
            passed.encode += cost;
            // As over a link that is slow enough for coding to pay.
            let bytes = out.len() as u64 + coded.raw * PAGE_SIZE as u64;
            passed.wire += bytes;
            let link = Duration::from_secs_f64(bytes as f64 / 125e6);
            self.encoder.sent(&coded, bytes, link);
            self.decode(&out, &mut passed)?;
            self.decoder.arrived_otherwise(&raw);
        }
        Ok(passed)
    }

    /// Takes the frames apart as a channel does, decodes them, and places the pages.
    fn decode(&mut self, mut frames: &[u8], passed: &mut Passed) -> Result<()> {
        let mut runs: Vec<Run> = Vec::new();
        while let Some((header, rest)) = frames.split_first_chunk::<HEADER_BYTES>() {
            let header = Header::decode(header, Limits { end: self.end })?;
            let cut = "a frame that was cut short";
            let (table, rest) = rest.split_at_checked(header.table_bytes()).context(cut)?;
            let (body, rest) = rest.split_at_checked(header.body_bytes()).context(cut)?;
            frames = rest;
            decode_runs(table, &mut runs);
            let to = &self.to;
            let base = &mut |gfn, page: &mut _| Ok(to.copy_page(gfn, page)?);
            let decoder = &mut self.decoder;
            let (pages, cost) = timed(|| decoder.decode(header.encoding(), &runs, body, base));
            let mut pages = pages?;
            passed.decode += cost;
            passed.decoded += pages.len() as u64;
            for run in &runs {
                let (these, rest) = pages
                    .split_at_checked(usize::try_from(run.bytes())?)
                    .context("fewer pages than the table has")?;
                to.write_decoded(run.first, these, false)?;
                pages = rest;
            }
            self.decoder.placed(&runs);
        }
        Ok(())
    }
}
