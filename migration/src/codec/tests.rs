//! The encoder against the decoder: what goes in comes out, and nothing else is believed.

use super::content::{self, Content};
use super::patch::{Page, ZEROS};
use super::*;
use crate::options::{Compress, Options};
use crate::page::{AtomicPageSet, Gfn, PAGE_BYTES, PAGE_SIZE};
use crate::testing::TestClock;
use crate::wire::{
    Encoding, Features, HEADER_BYTES, Header, Limits, RUN_BYTES, check_crc, decode_runs,
};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

const END: Gfn = 600;

/// A source's memory and a destination's, and the wire between.
struct Pair {
    encoder: Encoder,
    decoder: Decoder,
    memory: BTreeMap<Gfn, Page>,
    arrived: BTreeMap<Gfn, Page>,
    round: u32,
    warmer: u64,
    /// In how many runs raw pages went last.
    raw_runs: usize,
}

impl Pair {
    fn new(compress: Compress, cache_pages: u64) -> Self {
        let options = Options {
            compress,
            delta_cache: cache_pages * PAGE_BYTES,
            ..Options::default()
        };
        Self {
            encoder: Coding::new(&options, Features::SUPPORTED, END, END).encoder(),
            decoder: Decoder::new(Features::SUPPORTED, Arc::new(AtomicPageSet::new(END))),
            memory: BTreeMap::new(),
            arrived: BTreeMap::new(),
            round: 1,
            warmer: 0,
            raw_runs: 0,
        }
    }

    /// Sends pages as one batch; what was made of it.
    fn send(&mut self, gfns: &[Gfn]) -> Result<Coded, CodecError> {
        let mut data = Vec::new();
        gfns.iter()
            .for_each(|gfn| append(&mut data, Run::new(*gfn, 1), 0));
        let mut out = Vec::new();
        let mut reads: BTreeMap<Gfn, u32> = BTreeMap::new();
        let memory = std::mem::take(&mut self.memory);
        let mut batch = Batch {
            data: &mut data,
            round: self.round,
            warmer: self.warmer,
            data_channels: 1,
            copy: &mut |gfn, into: &mut Page| {
                *reads.entry(gfn).or_default() += 1;
                *into = memory.get(&gfn).copied().unwrap_or(ZEROS);
                Ok(())
            },
            out: &mut out,
        };
        let coded = self
            .encoder
            .encode(&mut batch, &TestClock::still())
            .unwrap();
        // In the order of the batch, whatever was made of its pages: a snapshot's tables ascend.
        let ascending = |data: &[Run]| data.is_sorted_by(|a, b| a.end() <= b.first);
        assert!(ascending(&data), "{data:?}");
        let raw: u64 = data.iter().map(|run| run.count).sum();
        self.raw_runs = data.len();
        assert_eq!((coded.pages, coded.raw), (gfns.len() as u64, raw));
        let received = self.receive(&out);
        for gfn in data.iter().flat_map(|run| run.first..run.end()) {
            let page = memory.get(&gfn).copied().unwrap_or(ZEROS);
            self.arrived.insert(gfn, page);
        }
        self.memory = memory;
        received?;
        self.decoder.arrived_otherwise(&data);
        let bytes = out.len() as u64 + raw * PAGE_BYTES;
        self.encoder.sent(&coded, bytes, Duration::ZERO);
        // What is coded is one snapshot: each page of it was read once. (A sample reads a few, and
        // nothing is sent.)
        assert!(reads.values().all(|&n| n == 1), "read twice: {reads:?}");
        Ok(coded)
    }

    fn receive(&mut self, mut stream: &[u8]) -> Result<(), CodecError> {
        let mut runs = Vec::new();
        while let Some((head, rest)) = stream.split_first_chunk::<HEADER_BYTES>() {
            let header = Header::decode(head, Limits { end: END }).unwrap();
            let (payload, rest) = rest.split_at(header.length as usize);
            stream = rest;
            check_crc(&header, crc32c::crc32c(payload)).unwrap();
            let (table, body) = payload.split_at(header.count as usize * RUN_BYTES);
            decode_runs(table, &mut runs);
            let arrived = &self.arrived;
            let pages = self
                .decoder
                .decode(header.encoding(), &runs, body, &mut |gfn, into| {
                    *into = arrived.get(&gfn).copied().unwrap_or(ZEROS);
                    Ok(())
                })?
                .to_vec();
            let (pages, rest) = pages.as_chunks::<PAGE_SIZE>();
            assert!(rest.is_empty());
            let gfns = runs.iter().flat_map(|run| run.first..run.end());
            for (gfn, page) in gfns.zip(pages) {
                self.arrived.insert(gfn, *page);
            }
            self.decoder.placed(&runs);
        }
        Ok(())
    }

    fn check(&self, gfns: &[Gfn]) {
        for gfn in gfns {
            let sent = self.memory.get(gfn).copied().unwrap_or(ZEROS);
            assert!(self.arrived[gfn] == sent, "page {gfn} arrived damaged");
        }
    }
}

const KINDS: [Compress; 5] = [
    Compress::None,
    Compress::Auto,
    Compress::Zstd,
    Compress::Delta,
    Compress::Adaptive,
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Batches of changing pages, zero pages and raw ones between them, failed sendings: what
    /// arrives is what was sent.
    #[test]
    fn what_is_sent_arrives(
        kind in 0..KINDS.len(),
        cache in 0..40_u64,
        rounds in proptest::collection::vec(
            (proptest::collection::btree_set(0..60_u64, 1..40), 0..Content::ALL.len(), any::<u64>(), 0..12_u8), 1..12),
    ) {
        let mut pair = Pair::new(KINDS[kind], cache);
        for (gfns, content, seed, event) in rounds {
            for &gfn in &gfns {
                let fresh = content::page(Content::ALL[content], seed ^ (gfn / 3));
                let page = pair.memory.entry(gfn).or_insert(fresh);
                // Some pages are rewritten, some change a little, some not at all.
                match (seed >> (gfn % 60)) & 3 {
                    0 => *page = fresh,
                    1 | 2 => page[(seed % 4000) as usize] ^= 1,
                    _ => {}
                }
            }
            let gfns: Vec<Gfn> = gfns.into_iter().collect();
            match event {
                // Zero pages go out by another frame.
                0 => {
                    let runs: Vec<Run> = gfns.iter().map(|gfn| Run::new(*gfn, 1)).collect();
                    pair.encoder.zeroed(&runs);
                    pair.decoder.arrived_otherwise(&runs);
                    for gfn in &gfns {
                        pair.memory.insert(*gfn, ZEROS);
                        pair.arrived.insert(*gfn, ZEROS);
                    }
                }
                // A sending that failed: nothing of it has arrived.
                1 => {
                    let arrived = pair.arrived.clone();
                    let decoder = std::mem::replace(
                        &mut pair.decoder,
                        Decoder::new(Features::SUPPORTED, Arc::new(AtomicPageSet::new(END))),
                    );
                    // Whether this throw-away destination could follow does not matter.
                    let _ = pair.send(&gfns);
                    pair.encoder.failed();
                    pair.decoder = decoder;
                    pair.arrived = arrived;
                }
                _ => {
                    let coded = pair.send(&gfns);
                    prop_assert!(coded.is_ok(), "{:?}", coded);
                    pair.check(&gfns);
                }
            }
            pair.round += 1;
        }
    }

    /// A damaged body (the checksums of the wire set aside) is refused or yields pages of the
    /// announced size.
    #[test]
    fn damage_never_panics(
        content in 0..Content::ALL.len(), seed in any::<u64>(), patches in any::<bool>(),
        at in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(),
    ) {
        let kind = if patches { Compress::Delta } else { Compress::Zstd };
        let mut pair = Pair::new(kind, 100);
        let gfns: Vec<Gfn> = (10..20).collect();
        for &gfn in &gfns {
            pair.memory.insert(gfn, content::page(Content::ALL[content], seed ^ gfn));
        }
        pair.send(&gfns).unwrap();
        let mut data = vec![Run::new(10, 10)];
        let mut out = Vec::new();
        let memory = &pair.memory;
        let mut batch = Batch {
            data: &mut data,
            round: 2,
            warmer: 0,
            data_channels: 1,
            copy: &mut |gfn, into: &mut Page| { *into = memory[&gfn]; into[5] ^= 1; Ok(()) },
            out: &mut out,
        };
        pair.encoder.encode(&mut batch, &TestClock::still()).unwrap();
        if out.is_empty() {
            return Ok(());
        }
        let header = Header::decode(out.first_chunk().unwrap(), Limits { end: END }).unwrap();
        let mut body = out[HEADER_BYTES + header.table_bytes()..].to_vec();
        for (index, value) in at {
            let index = index.index(body.len());
            body[index] = value;
        }
        for body in [&body[..], &body[..cut.index(body.len())]] {
            let decoded = pair.decoder.decode(header.encoding(), &[Run::new(10, 10)], body, &mut |_, page| {
                page.fill(1);
                Ok(())
            });
            if let Ok(pages) = decoded {
                prop_assert_eq!(pages.len(), 10 * PAGE_SIZE);
            }
        }
    }
}

/// The cache has room for half of what is sent: for what comes last, where that is likelier to be
/// sent again.
#[test]
fn places_are_kept_for_warmer_pages() {
    let changes = |warmer| {
        let mut pair = Pair::new(Compress::Delta, 128);
        let (cold, warm): (Vec<Gfn>, Vec<Gfn>) = (0..256).partition(|gfn| gfn % 2 == 0);
        for gfn in cold.iter().chain(&warm) {
            pair.memory
                .insert(*gfn, content::page(Content::Noise, *gfn));
        }
        pair.warmer = warmer;
        pair.send(&cold).unwrap();
        pair.warmer = 0;
        pair.send(&warm).unwrap();
        pair.round = 2;
        for gfn in &warm {
            pair.memory.get_mut(gfn).unwrap()[7] ^= 1;
        }
        let coded = pair.send(&warm).unwrap();
        assert_eq!(pair.arrived, pair.memory);
        coded.codecs.delta.pages
    };
    assert_eq!(changes(0), 0, "the first took all places");
    assert_eq!(changes(128), 128, "places are kept");
}

/// Every coder gets what it is for, and makes it small.
#[test]
fn pages_find_their_coder() {
    let ratio = |kind, content| {
        let mut pair = Pair::new(kind, 0);
        let gfns: Vec<Gfn> = (0..256).collect();
        for &gfn in &gfns {
            pair.memory.insert(gfn, content::page(content, gfn));
        }
        let coded = pair.send(&gfns).unwrap();
        pair.check(&gfns);
        let codecs = coded.codecs;
        let wire = codecs.zstd.bytes_wire + codecs.sparse.bytes_wire + coded.raw * PAGE_BYTES;
        (wire as f64 / (256 * PAGE_BYTES) as f64, codecs)
    };
    for (content, limit) in [
        (Content::Half, 0.52),
        (Content::Sparse, 0.15),
        (Content::Text, 0.35),
        (Content::Pointers, 0.55),
        (Content::Repeated, 0.05),
    ] {
        for kind in [Compress::Zstd, Compress::Adaptive] {
            let (ratio, codecs) = ratio(kind, content);
            assert!(ratio < limit, "{kind:?} {content:?}: {ratio} {codecs:?}");
        }
    }
    for kind in [Compress::Zstd, Compress::Adaptive, Compress::None] {
        let (ratio, codecs) = ratio(kind, Content::Noise);
        assert!(codecs.is_empty(), "{kind:?} {codecs:?}");
        assert!((ratio - 1.0).abs() < 1e-9);
    }
    let (_, codecs) = ratio(Compress::Adaptive, Content::Half);
    assert_eq!((codecs.sparse.pages, codecs.zstd.pages), (256, 0));
    let (_, codecs) = ratio(Compress::Adaptive, Content::Text);
    assert_eq!((codecs.sparse.pages, codecs.zstd.pages), (0, 256));
}

/// What looked regular and does not shrink goes raw, in its place among what was raw at once.
#[test]
fn what_does_not_shrink_goes_raw_in_its_place() {
    for kind in [Compress::Zstd, Compress::Adaptive] {
        for weak_first in [true, false] {
            let mut pair = Pair::new(kind, 0);
            let gfns: Vec<Gfn> = (0..256).filter(|gfn| gfn % 50 != 9).collect();
            for &gfn in &gfns {
                let weak = (gfn % 2 == 0) == weak_first;
                let content = [Content::Noise, Content::Weak][usize::from(weak)];
                pair.memory.insert(gfn, content::page(content, gfn));
            }
            let coded = pair.send(&gfns).unwrap();
            pair.check(&gfns);
            assert_eq!((coded.raw, coded.codecs.is_empty()), (251, true));
            // As if nothing had been tried.
            assert_eq!(pair.raw_runs, 6);
        }
    }
}

/// A page that changes a little costs a little, from the second time on where the cache had a place
/// for it.
#[test]
fn small_changes_cost_little() {
    for cache in [300, 600] {
        let mut pair = Pair::new(Compress::Delta, cache);
        let gfns: Vec<Gfn> = (0..200).collect();
        for round in 1..6_u32 {
            pair.round = round;
            for &gfn in &gfns {
                let page = pair
                    .memory
                    .entry(gfn)
                    .or_insert_with(|| content::page(Content::Noise, gfn));
                page[(round * 600) as usize..][..16].fill(round as u8);
            }
            let coded = pair.send(&gfns).unwrap();
            pair.check(&gfns);
            let delta = coded.codecs.delta;
            if round < 2 {
                assert_eq!(delta.pages, 0, "round {round}");
            } else {
                assert_eq!(delta.pages, 200, "round {round}");
                assert!(delta.bytes_wire < 200 * 24, "{delta:?}");
            }
        }
    }
}

/// What was entered because there was room makes way for what comes again.
#[test]
fn the_first_pass_drives_no_entry_out() {
    let mut pair = Pair::new(Compress::Delta, 64);
    for gfn in 0..512 {
        pair.memory.insert(gfn, content::page(Content::Noise, gfn));
    }
    pair.send(&(0..512).collect::<Vec<Gfn>>()).unwrap();
    // One of each shard, and none of those that came first.
    let again: Vec<Gfn> = (256..512).step_by(16).collect();
    for (round, deltas) in [(2, 0), (3, 16), (4, 16)] {
        pair.round = round;
        for gfn in &again {
            pair.memory.get_mut(gfn).unwrap()[9] ^= 1;
        }
        let coded = pair.send(&again).unwrap();
        pair.check(&again);
        assert_eq!(coded.codecs.delta.pages, deltas, "round {round}");
    }
}

#[test]
fn what_the_destination_lacks_is_no_base() {
    let mut pair = Pair::new(Compress::Delta, 600);
    let gfns = [7, 8];
    pair.memory.insert(7, content::page(Content::Noise, 7));
    pair.memory.insert(8, content::page(Content::Noise, 8));
    pair.send(&gfns).unwrap();
    pair.memory.get_mut(&7).unwrap()[9] ^= 1;
    // A destination that never got the page, and one on which it is another.
    let mut other = Pair::new(Compress::Delta, 600);
    std::mem::swap(&mut pair.decoder, &mut other.decoder);
    let refused = pair.send(&gfns).unwrap_err().to_string();
    assert!(
        refused.contains("0x7") && refused.contains("never sent"),
        "{refused}"
    );
    std::mem::swap(&mut pair.decoder, &mut other.decoder);
    pair.arrived.get_mut(&8).unwrap()[0] ^= 1;
    let refused = pair.send(&gfns).unwrap_err();
    assert!(matches!(refused, CodecError::Differs { .. }), "{refused}");
    // A raw arrival in between: the source keeps that book, so the destination catches one that
    // does not.
    let mut pair = Pair::new(Compress::Delta, 600);
    pair.memory.insert(7, content::page(Content::Noise, 7));
    pair.send(&[7]).unwrap();
    pair.decoder.arrived_otherwise(&[Run::new(7, 1)]);
    let refused = pair.send(&[7]).unwrap_err();
    assert!(
        matches!(refused, CodecError::NoBase { gfn: 7 }),
        "{refused}"
    );
}

/// Frames whose contents are not of the announced size, each refused with a sentence.
#[test]
fn lies_about_sizes_are_refused() {
    let mut decoder = Decoder::new(Features::SUPPORTED, Arc::default());
    let mut refused = |encoding, pages: u64, body: &[u8]| {
        let error = decoder
            .decode(encoding, &[Run::new(0, pages)], body, &mut |_, _| Ok(()))
            .map(<[u8]>::len)
            .unwrap_err();
        error.to_string()
    };
    let two = zstd::bulk::compress(&[7; 2 * PAGE_SIZE], 1).unwrap();
    // More than it says; a bomb is nothing else.
    assert!(refused(Encoding::Zstd, 1, &two).contains("decompressed"));
    let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap();
    assert!(refused(Encoding::Zstd, 1, &bomb).contains("decompressed"));
    // Less.
    assert!(refused(Encoding::Zstd, 3, &two).contains("8192 bytes for 3 pages"));
    assert!(refused(Encoding::Zstd, 1, &[]).contains("0 bytes for 1 pages"));
    assert!(refused(Encoding::Zstd, 1, b"no zstd at all").contains("decompressed"));
    // Too many pages, or bytes.
    assert!(refused(Encoding::Zstd, 257, &two).contains("at most 256"));
    assert!(refused(Encoding::Patch, 1, &vec![0; MAX_CODED_BYTES + 1]).contains("at most 256"));
    let tag = |kind: Kind, bytes: usize| kind.tag(bytes).to_le_bytes();
    let patches = |tags: &[[u8; 2]], bytes: &[u8]| [&[0; 4][..], &tags.concat(), bytes].concat();
    for (pages, body) in [
        (1, vec![0; 3]),
        (2, patches(&[tag(Kind::Sparse, 1)], &[0])),
        (1, patches(&[tag(Kind::Sparse, 3)], &[0, 1])),
        (1, patches(&[tag(Kind::Sparse, 1)], &[0, 9])),
        (1, patches(&[tag(Kind::Literal, 5)], &[9; 5])),
        (1, patches(&[0xc000_u16.to_le_bytes()], &[])),
    ] {
        let said = refused(Encoding::Patch, pages, &body);
        assert!(said.contains("lengths do not fit"), "{said}");
    }
    let said = refused(
        Encoding::Patch,
        1,
        &patches(&[tag(Kind::Sparse, 2)], &[0, 0]),
    );
    assert!(said.contains("do not fit their map"), "{said}");
    // What was not agreed on.
    let mut decoder = Decoder::new(Features::ZSTD, Arc::default());
    for encoding in [Encoding::Patch, Encoding::Raw] {
        let refused = decoder.decode(encoding, &[Run::new(0, 1)], &[0; 6], &mut |_, _| Ok(()));
        assert!(matches!(refused, Err(CodecError::NotAgreed { .. })));
    }
}

#[test]
fn what_the_destination_cannot_is_not_used() {
    let encoder = |compress, agreed| {
        let options = Options {
            compress,
            ..Options::default()
        };
        Coding::new(&options, agreed, END, END).encoder()
    };
    for kind in KINDS {
        assert!(!encoder(kind, Features::VERIFY).is_on(), "{kind:?}");
        assert_eq!(
            encoder(kind, Features::SUPPORTED).is_on(),
            kind != Compress::None
        );
    }
    for (agreed, zstd) in [(Features::ZSTD, true), (Features::PATCH, false)] {
        let mut pair = Pair::new(Compress::Adaptive, 100);
        pair.encoder = encoder(Compress::Adaptive, agreed);
        pair.decoder = Decoder::new(agreed, Arc::new(AtomicPageSet::new(END)));
        let gfns: Vec<Gfn> = (0..100).collect();
        for &gfn in &gfns {
            let content = Content::ALL[(gfn % 6) as usize];
            pair.memory.insert(gfn, content::page(content, gfn));
        }
        let codecs = pair.send(&gfns).unwrap().codecs;
        pair.check(&gfns);
        assert_eq!(
            (codecs.zstd.pages > 0, codecs.sparse.pages > 0),
            (zstd, !zstd)
        );
    }
}
