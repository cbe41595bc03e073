//! The bodies of the fuzz targets on a few thousand mutations of good input, the same ones every time.
#![allow(clippy::unwrap_used, clippy::panic)]

use ferry_migration::codec::patch::encode;
use ferry_migration::codec::words::pack;
use ferry_migration::destination::State;
use ferry_migration::page::{RamLayout, Run};
use ferry_migration::wire::{
    Encoding, FLAG_CRC, Features, FrameType, Header, Hello, Preamble, Role, SessionId, encode_runs,
};
use ferry_tests::{fuzz_bodies, guests_run};
use ferry_vmm::machine::{Backends, Machine};

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % n.max(1) as u64).unwrap()
    }

    /// What a fuzzer does to its input.
    fn mutate(&mut self, bytes: &mut Vec<u8>) {
        const EDGES: [u64; 8] = [0, 1, 0x7f, 0xff, 0xffff, 0x7fff_ffff, 0xffff_ffff, u64::MAX];
        for _ in 0..=self.below(4) {
            let at = self.below(bytes.len());
            match self.below(7) {
                0 if !bytes.is_empty() => bytes[at] ^= 1 << self.below(8),
                1 if !bytes.is_empty() => bytes[at] = self.next().to_le_bytes()[0],
                2 => bytes.truncate(at),
                3 => {
                    let more = self.below(64);
                    let random: Vec<u8> = (0..more).map(|_| self.next().to_le_bytes()[0]).collect();
                    bytes.splice(at..at, random);
                }
                4 => {
                    let end = (at + self.below(200)).min(bytes.len());
                    bytes.drain(at..end);
                }
                5 => {
                    let end = (at + self.below(200)).min(bytes.len());
                    let copy = bytes[at..end].to_vec();
                    let to = self.below(bytes.len());
                    bytes.splice(to..to, copy);
                }
                _ => {
                    let width = 1 << self.below(4);
                    let edge = EDGES[self.below(EDGES.len())].to_le_bytes();
                    if let Some(place) = bytes.get_mut(at..at + width) {
                        place.copy_from_slice(&edge[..width]);
                    }
                }
            }
        }
    }
}

fn mutations(seeds: &[Vec<u8>], count: u64, body: fn(&[u8])) {
    for seed in seeds {
        body(seed);
    }
    for n in 0..count {
        let mut random = Random(n);
        let mut bytes = seeds[random.below(seeds.len())].clone();
        random.mutate(&mut bytes);
        body(&bytes);
    }
}

/// What a source says, with a leading byte that has the checksums mended.
struct Stream(Vec<u8>);

impl Stream {
    /// Of a guest of two times 32 pages.
    fn open(required: Features, channels: u16, faults: u16) -> Self {
        Self::open_with(required, channels, faults, Vec::new())
    }

    /// As [`open`](Self::open), with disks of so many bytes.
    fn open_with(required: Features, channels: u16, faults: u16, stores: Vec<u64>) -> Self {
        let hello = Hello {
            offered: Features::SUPPORTED,
            required,
            layout: RamLayout::new(vec![Run::new(0, 32), Run::new(64, 32)]).unwrap(),
            channels,
            faults,
            stores,
            policy: "precopy".into(),
            machine: b"a machine".to_vec(),
        };
        let mut stream = Self(vec![1]);
        let preamble = Preamble::new(Role::Control, 0, SessionId([7; 16]));
        stream.0.extend(preamble.encode());
        stream.put(FrameType::Hello, 0, 0, 0, &hello.encode());
        stream
    }

    fn put(&mut self, kind: FrameType, round: u32, gfn: u64, count: u32, payload: &[u8]) {
        self.put_coded(Encoding::Raw, kind, round, gfn, count, payload);
    }

    fn put_coded(
        &mut self,
        encoding: Encoding,
        kind: FrameType,
        round: u32,
        gfn: u64,
        count: u32,
        payload: &[u8],
    ) {
        let header = Header {
            gfn,
            count,
            encoding: encoding as u8,
            length: u32::try_from(payload.len()).unwrap(),
            flags: if payload.is_empty() { 0 } else { FLAG_CRC },
            payload_crc: crc32c::crc32c(payload),
            ..Header::bare(kind, round)
        };
        self.0.extend(header.encode());
        self.0.extend_from_slice(payload);
    }

    /// Two pages, coded.
    fn coded(&mut self, round: u32, first: u64, encoding: Encoding, body: &[u8]) {
        let mut payload = Vec::new();
        encode_runs(&[Run::new(first, 2)], &mut payload);
        payload.extend_from_slice(body);
        self.put_coded(encoding, FrameType::Pages, round, first, 1, &payload);
    }

    /// Pages of these runs; with contents, they are zero too.
    fn pages(&mut self, round: u32, runs: &[Run], contents: bool) {
        let mut table = Vec::new();
        encode_runs(runs, &mut table);
        let count = u32::try_from(runs.len()).unwrap();
        let kind = if contents {
            let pages: u64 = runs.iter().map(|run| run.count).sum();
            table.resize(table.len() + usize::try_from(pages).unwrap() * 4096, 0);
            FrameType::Pages
        } else {
            FrameType::Zero
        };
        self.put(kind, round, runs[0].first, count, &table);
    }
}

/// A whole pre-copy migration.
fn migration(verify: bool, channels: u16) -> Vec<u8> {
    let required = if verify {
        Features::VERIFY
    } else {
        Features::default()
    };
    let mut stream = Stream::open(required, channels, 0);
    stream.pages(1, &[Run::new(0, 4), Run::new(64, 32)], false);
    for (encoding, body) in coded_bodies() {
        stream.coded(1, 5, encoding, &body);
    }
    // In the end all of memory is zero.
    stream.pages(1, &[Run::new(5, 2)], true);
    let round = u32::from(channels == 0);
    if channels == 0 {
        stream.put(FrameType::RoundEnd, 1, 0, 0, &[]);
    }
    if verify {
        for first in [0, 64] {
            let hash = |gfn| xxhash_rust::xxh3::xxh3_64_with_seed(&[0; 4096], gfn);
            let hashes: Vec<u8> = (first..first + 32)
                .flat_map(|gfn| hash(gfn).to_le_bytes())
                .collect();
            stream.put(FrameType::Verify, round, first, 32, &hashes);
        }
    }
    stream.put(FrameType::State, round, 0, 0, b"a state");
    stream.put(FrameType::Commit, round, 0, 0, &[]);
    stream.0
}

/// A whole migration with two disks, of one block and a bit, and of four.
fn with_disks() -> Vec<u8> {
    const BLOCK: usize = 64 << 10;
    let required = Features::STORES.or(Features::VERIFY);
    let mut stream = Stream::open_with(required, 0, 0, vec![(BLOCK + 512) as u64, 4 << 16]);
    let blocks = |kind, store, first, count| Header::of_blocks(kind, store, Run::new(first, count));
    let mut put = |header: Header, encoding, payload: &[u8]| {
        stream.put_coded(encoding, header.kind, 0, header.gfn, header.count, payload);
    };
    let two = blocks(FrameType::Blocks, 0, 0, 2);
    put(two, Encoding::Raw, &vec![7; BLOCK + 512]);
    put(blocks(FrameType::BlocksZero, 1, 0, 4), Encoding::Raw, &[]);
    let packed = zstd::bulk::compress(&vec![9; 2 * BLOCK], 1).unwrap();
    put(blocks(FrameType::Blocks, 1, 1, 2), Encoding::Zstd, &packed);
    stream.put(FrameType::BlocksEnd, 1, 0, 0, &[]);
    let hash = |store: u64, block: u64, bytes: &[u8]| {
        xxhash_rust::xxh3::xxh3_64_with_seed(bytes, store << 48 ^ block).to_le_bytes()
    };
    for (store, first, bytes) in [
        (0, 0, &[7; BLOCK][..]),
        (0, 1, &[7; 512]),
        (1, 1, &[9; BLOCK]),
    ] {
        let header = blocks(FrameType::BlocksHash, store, first, 1);
        let hash = hash(store as u64, first, bytes);
        stream.put(header.kind, 0, header.gfn, header.count, &hash);
    }
    let hash = hash(1, 2, &[9; BLOCK]);
    let header = blocks(FrameType::BlocksHash, 1, 2, 1);
    stream.put(header.kind, 0, header.gfn, header.count, &hash);
    for first in [0, 3] {
        let header = blocks(FrameType::BlocksHash, 1, first, 1);
        stream.put(header.kind, 0, header.gfn, header.count, &[]);
    }
    stream.pages(1, &[Run::new(0, 32), Run::new(64, 32)], false);
    stream.put(FrameType::RoundEnd, 1, 0, 0, &[]);
    for first in [0, 64] {
        let hash = |gfn| xxhash_rust::xxh3::xxh3_64_with_seed(&[0; 4096], gfn);
        let hashes: Vec<u8> = (first..first + 32)
            .flat_map(|gfn| hash(gfn).to_le_bytes())
            .collect();
        stream.put(FrameType::Verify, 1, first, 32, &hashes);
    }
    stream.put(FrameType::State, 1, 0, 0, b"a state");
    stream.put(FrameType::Commit, 1, 0, 0, &[]);
    stream.0
}

/// A whole post-copy migration, its missing pages listed in both ways.
fn post_copy() -> Vec<u8> {
    let mut stream = Stream::open(Features::POST_COPY, 0, 1);
    let mut table = Vec::new();
    encode_runs(&[Run::new(0, 32)], &mut table);
    stream.put(FrameType::MissingRuns, 0, 0, 1, &table);
    stream.put(FrameType::RoundEnd, 1, 0, 0, &[]);
    stream.put(FrameType::MissingBits, 0, 64, 1, &0xff_u64.to_le_bytes());
    stream.put(FrameType::State, 1, 0, 0, b"a state");
    stream.put(FrameType::Commit, 1, 0, 0, &[]);
    stream.pages(2, &[Run::new(0, 28), Run::new(64, 8)], false);
    stream.put(FrameType::Alive, 0, 0, 0, &[]);
    let (encoding, body) = &coded_bodies()[0];
    stream.coded(2, 28, *encoding, body);
    stream.pages(2, &[Run::new(30, 2)], true);
    stream.put(FrameType::RoundEnd, 2, 0, 0, &[]);
    stream.0
}

/// Two pages, coded in every way: compressed, as patches of zeros with one page as it is, and as differences to what
/// came before.
fn coded_bodies() -> Vec<(Encoding, Vec<u8>)> {
    let mut pages = vec![0; 2 * 4096];
    for (i, byte) in pages.iter_mut().enumerate().step_by(3) {
        *byte = u8::try_from(i % 251).unwrap();
    }
    let (first, second) = pages.split_at(4096);
    let first: &[u8; 4096] = first.try_into().unwrap();
    let mut sparse = vec![0; 4];
    let mut bytes = Vec::new();
    let mut half = *first;
    half[1000..3000].fill(0);
    assert!(pack(&half, &mut bytes));
    let tag = |kind: u16, bytes: usize| (kind << 14 | u16::try_from(bytes).unwrap()).to_le_bytes();
    sparse.extend(tag(1, bytes.len()));
    sparse.extend(tag(2, 4096));
    sparse.extend_from_slice(&bytes);
    sparse.extend_from_slice(second);
    let mut changed = half;
    changed[100..120].fill(9);
    bytes.clear();
    assert!(encode(&half, &changed, 4096, &mut bytes));
    let crc = crc32c::crc32c_append(crc32c::crc32c(&changed), second);
    let mut delta = crc.to_le_bytes().to_vec();
    delta.extend(tag(0, bytes.len()));
    delta.extend(tag(0, 0));
    delta.extend_from_slice(&bytes);
    vec![
        (Encoding::Zstd, zstd::bulk::compress(&pages, 1).unwrap()),
        (Encoding::Patch, sparse),
        (Encoding::Patch, delta),
    ]
}

#[test]
fn codecs() {
    let seeds: Vec<Vec<u8>> = coded_bodies()
        .into_iter()
        .map(|(encoding, body)| [&[encoding as u8 - 1, 0, 0][..], &body].concat())
        .collect();
    mutations(&seeds, 6000, fuzz_bodies::codec);
}

#[test]
fn frames() {
    let whole = migration(false, 0);
    let seeds: Vec<Vec<u8>> = (0..whole.len().min(1200))
        .step_by(7)
        .map(|at| whole[at..].to_vec())
        .collect();
    mutations(&seeds, 6000, fuzz_bodies::frame);
}

#[test]
fn handshakes() {
    let seeds = [
        migration(false, 0),
        migration(true, 0),
        migration(false, 2),
        post_copy(),
        with_disks(),
    ];
    // Unchanged they are migrations that succeed; mutations of anything else would test little.
    for (at, seed) in seeds.iter().enumerate() {
        assert_eq!(
            fuzz_bodies::handshake(seed),
            Some(State::Complete),
            "seed {at}"
        );
    }
    let hello = seeds[0][1 + 64 + 32..].to_vec();
    mutations(&[&seeds[..], &[hello]].concat(), 6000, |bytes| {
        fuzz_bodies::handshake(bytes);
    });
}

#[test]
fn machine_states() {
    let mut seeds = vec![
        vec![0; 24],
        [b"FRYSTATE\x01\0\0\0\x01\0\0\0".to_vec(), vec![0; 4000]].concat(),
    ];
    if guests_run() {
        for cpus in [1, 2] {
            let machine = Machine::builder()
                .memory(16 << 20)
                .cpus(cpus)
                .devices(Backends {
                    balloon: true,
                    rng: cpus == 2,
                    ..Backends::default()
                })
                .build()
                .unwrap();
            seeds.push(machine.pause().unwrap().save().unwrap().to_bytes().unwrap());
        }
    }
    mutations(&seeds, 4000, fuzz_bodies::machine_state);
}

/// A driver's first steps, as a script of `fuzz_bodies::virtio`: negotiates, sets each queue up, and offers a chain of a
/// readable and a writable buffer in it.
fn driver(kind: u8, queues: u32) -> Vec<u8> {
    let mut script = vec![kind];
    let register = |script: &mut Vec<u8>, offset: u8, value: u32| {
        script.push(offset / 4);
        script.extend(value.to_le_bytes());
    };
    let store = |script: &mut Vec<u8>, at: u32, bytes: &[u8]| {
        for (at, bytes) in (at..).step_by(32).zip(bytes.chunks(32)) {
            script.push(120);
            script.extend(at.to_le_bytes());
            script.push(u8::try_from(bytes.len()).unwrap());
            script.extend(bytes);
        }
    };
    for (offset, value) in [
        (0x70, 1),
        (0x70, 3),
        (0x24, 1),
        (0x20, 1),
        (0x24, 0),
        (0x20, 0x22),
        (0x70, 11),
    ] {
        register(&mut script, offset, value);
    }
    for queue in 0..queues {
        let base = 0x1_0000 * (queue + 1);
        for (offset, value) in [
            (0x30, queue),
            (0x38, 8),
            (0x80, base),
            (0x90, base + 0x1000),
            (0xa0, base + 0x2000),
            (0x44, 1),
        ] {
            register(&mut script, offset, value);
        }
        let mut chain = Vec::new();
        for (address, len, flags, next) in [
            (base + 0x3000, 528u32, 1u16, 1u16),
            (base + 0x4000, 4096, 2, 0),
        ] {
            chain.extend(u64::from(address).to_le_bytes());
            chain.extend(len.to_le_bytes());
            chain.extend(flags.to_le_bytes());
            chain.extend(next.to_le_bytes());
        }
        store(&mut script, base, &chain);
        store(
            &mut script,
            base + 0x3000,
            &[
                u8::try_from(queue).unwrap(),
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                1,
                0,
                0,
                0,
            ],
        );
        store(&mut script, base + 0x1000, &[0, 0, 1, 0, 0, 0]);
    }
    register(&mut script, 0x70, 15);
    for queue in 0..queues {
        script.push(220 + u8::try_from(queue).unwrap());
    }
    // A pause, and a move.
    script.extend([240, 255]);
    script
}

#[test]
fn virtio_devices() {
    // A device's thread that panics must fail the test, and not only itself.
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        print(info);
        if std::thread::current()
            .name()
            .is_some_and(|name| name.starts_with("virtio-") || name == "disk")
        {
            std::process::abort();
        }
    }));
    let seeds = [
        driver(0, 1),
        driver(4, 1),
        driver(1, 1),
        driver(2, 4),
        driver(3, 3),
    ];
    mutations(&seeds, 1500, fuzz_bodies::virtio);
}
