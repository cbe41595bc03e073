//! What a source says in a whole migration, of each kind.

use crate::fuzz_bodies::joined;
use ferry_migration::codec::patch::encode;
use ferry_migration::codec::words::pack;
use ferry_migration::page::{RamLayout, Run};
use ferry_migration::wire::{
    Arrived, Encoding, FLAG_CRC, Features, FrameType, Header, Hello, HelloAck, Preamble, Role,
    Running, SessionId, encode_runs,
};

/// What a source says, with a leading byte that has the checksums mended.
struct Stream(Vec<u8>);

impl Stream {
    /// Of a guest of two times 32 pages.
    fn open(required: Features, channels: u16, faults: u16) -> Self {
        Self::open_with(required, channels, faults, Vec::new())
    }

    /// As [`open`](Self::open), with disks of so many bytes.
    fn open_with(required: Features, channels: u16, faults: u16, disks: Vec<u64>) -> Self {
        let hello = Hello {
            offered: Features::SUPPORTED,
            required,
            layout: RamLayout::new(vec![Run::new(0, 32), Run::new(64, 32)]).unwrap(),
            channels,
            faults,
            disks,
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

    /// The hashes of all memory, which is zero.
    fn hashes(&mut self, round: u32) {
        for first in [0, 64] {
            let hash = |gfn| xxhash_rust::xxh3::xxh3_64_with_seed(&[0; 4096], gfn);
            let hashes: Vec<u8> = (first..first + 32)
                .flat_map(|gfn| hash(gfn).to_le_bytes())
                .collect();
            self.put(FrameType::Verify, round, first, 32, &hashes);
        }
    }

    /// The guest's state, and the guest.
    fn moved(&mut self, round: u32) {
        self.put(FrameType::State, round, 0, 0, b"a state");
        self.put(FrameType::Commit, round, 0, 0, &[]);
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
pub(super) fn migration(verify: bool, channels: u16) -> Vec<u8> {
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
        stream.hashes(round);
    }
    stream.moved(round);
    stream.0
}

/// A whole migration with two disks, of one block and a bit, and of four.
pub(super) fn with_disks() -> Vec<u8> {
    const BLOCK: usize = 64 << 10;
    let required = Features::DISKS.or(Features::VERIFY);
    let mut stream = Stream::open_with(required, 0, 0, vec![(BLOCK + 512) as u64, 4 << 16]);
    let blocks = |kind, disk, first, count| Header::of_blocks(kind, disk, Run::new(first, count));
    let mut put = |header: Header, encoding, payload: &[u8]| {
        stream.put_coded(encoding, header.kind, 0, header.gfn, header.count, payload);
    };
    let two = blocks(FrameType::Blocks, 0, 0, 2);
    put(two, Encoding::Raw, &vec![7; BLOCK + 512]);
    put(blocks(FrameType::BlocksZero, 1, 0, 4), Encoding::Raw, &[]);
    let packed = zstd::bulk::compress(&vec![9; 2 * BLOCK], 1).unwrap();
    put(blocks(FrameType::Blocks, 1, 1, 2), Encoding::Zstd, &packed);
    stream.put(FrameType::BlocksEnd, 1, 0, 0, &[]);
    let hash = |disk: u64, block: u64, bytes: &[u8]| {
        xxhash_rust::xxh3::xxh3_64_with_seed(bytes, disk << 48 ^ block).to_le_bytes()
    };
    for (disk, first, bytes) in [
        (0, 0, &[7; BLOCK][..]),
        (0, 1, &[7; 512]),
        (1, 1, &[9; BLOCK]),
    ] {
        let header = blocks(FrameType::BlocksHash, disk, first, 1);
        let hash = hash(disk as u64, first, bytes);
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
    stream.hashes(1);
    stream.moved(1);
    stream.0
}

/// A whole post-copy migration, its missing pages listed in both ways.
pub(super) fn post_copy() -> Vec<u8> {
    let mut stream = Stream::open(Features::POST_COPY, 0, 1);
    let mut table = Vec::new();
    encode_runs(&[Run::new(0, 32)], &mut table);
    stream.put(FrameType::MissingRuns, 0, 0, 1, &table);
    stream.put(FrameType::RoundEnd, 1, 0, 0, &[]);
    stream.put(FrameType::MissingBits, 0, 64, 1, &0xff_u64.to_le_bytes());
    stream.moved(1);
    stream.pages(2, &[Run::new(0, 28), Run::new(64, 8)], false);
    stream.put(FrameType::Alive, 0, 0, 0, &[]);
    let (encoding, body) = &coded_bodies()[0];
    stream.coded(2, 28, *encoding, body);
    stream.pages(2, &[Run::new(30, 2)], true);
    stream.put(FrameType::RoundEnd, 2, 0, 0, &[]);
    stream.0
}

/// Two pages, coded in every way: compressed, as patches of zeros with one page as it is, and as
/// differences to what came before.
pub(super) fn coded_bodies() -> Vec<(Encoding, Vec<u8>)> {
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

/// Frames without an opening, of a channel that was opened.
fn frames(write: impl FnOnce(&mut Stream)) -> Vec<u8> {
    let mut stream = Stream(Vec::new());
    write(&mut stream);
    stream.0
}

/// What `fuzz_bodies::data channels` is given: its mode, and what is said on each channel.
fn said(mode: &[u8], channels: &[Vec<u8>]) -> Vec<u8> {
    let channels: Vec<&[u8]> = channels.iter().map(Vec::as_slice).collect();
    [mode.to_vec(), joined(&channels)].concat()
}

/// Migrations over two data channels: pre-copy, post-copy, and post-copy whose connection is lost.
pub(super) fn on_data_channels() -> Vec<Vec<u8>> {
    let bare = |stream: &mut Stream, kind, round| stream.put(kind, round, 0, 0, &[]);
    let round = |round, run: Run, contents: bool| {
        frames(|stream| {
            stream.pages(round, &[run], contents);
            bare(stream, FrameType::RoundEnd, round);
        })
    };
    let listed = |stream: &mut Stream| {
        let mut table = Vec::new();
        encode_runs(&[Run::new(0, 16)], &mut table);
        stream.put(FrameType::MissingRuns, 0, 0, 1, &table);
    };
    let pre_copy = frames(|stream| {
        bare(stream, FrameType::RoundEnd, 1);
        stream.moved(1);
    });
    let following = frames(|stream| {
        listed(stream);
        bare(stream, FrameType::RoundEnd, 1);
        stream.moved(1);
        bare(stream, FrameType::RoundEnd, 2);
    });
    let answers = frames(|stream| {
        for _ in 0..4 {
            stream.put(FrameType::OnItsWay, 2, 0, 1, &[]);
        }
    });
    let lost = frames(|stream| {
        listed(stream);
        bare(stream, FrameType::RoundEnd, 1);
        stream.moved(1);
        stream.pages(2, &[Run::new(4, 8)], true);
    });
    let found = frames(|stream| {
        bare(stream, FrameType::Commit, 0);
        stream.pages(1, &[Run::new(0, 4)], true);
        bare(stream, FrameType::Alive, 0);
        stream.pages(1, &[Run::new(12, 4)], false);
        bare(stream, FrameType::RoundEnd, 1);
    });
    let empty = frames(|stream| bare(stream, FrameType::RoundEnd, 1));
    let (zero, none) = (round(1, Run::new(64, 1), false), Vec::new());
    let [low, high] = [0, 8].map(|first| round(2, Run::new(first, 8), true));
    let pages = [0, 64].map(|first| round(1, Run::new(first, 5), first > 0));
    let [here, there] = pages;
    let quiet = empty.clone();
    vec![
        said(&[1], &[pre_copy, here, none.clone(), there]),
        said(&[3], &[following, zero, low, empty, high, answers.clone()]),
        said(
            &[3],
            &[
                lost,
                quiet.clone(),
                none.clone(),
                quiet,
                none,
                answers.clone(),
                found,
                answers,
            ],
        ),
    ]
}

/// What destinations say that mean well, for `fuzz_bodies::source`: to each policy, after so many
/// rounds; and to a source that recovers.
pub(super) fn answers() -> Vec<Vec<u8>> {
    let json = |stream: &mut Stream, kind, json: &str| stream.put(kind, 0, 0, 0, json.as_bytes());
    let ack = serde_json::to_string(&HelloAck {
        features: Features::SUPPORTED.without(Features::SHARED_MEMORY),
        state: None,
    });
    let ack = ack.unwrap();
    let running = |missing| {
        let running = Running {
            missing,
            tells: true,
            ..Running::default()
        };
        serde_json::to_string(&running).unwrap()
    };
    let requests = || {
        frames(|stream| {
            stream.put(FrameType::PageRequest, 0, 3, 1, &[]);
            stream.put(FrameType::PageRequest, 0, 80, 4, &[]);
        })
    };
    let arrived = serde_json::to_string(&Arrived::default()).unwrap();
    let mut all = Vec::new();
    for kind in 0..5 {
        for rounds in 0..6 {
            for flags in [0, 1, 8] {
                let control = frames(|stream| {
                    json(stream, FrameType::HelloAck, &ack);
                    let disks = u32::from(flags == 8);
                    for round in 1..=disks {
                        stream.put(FrameType::BlocksStored, round, 0, 0, &[]);
                    }
                    for round in 1..=rounds {
                        stream.put(FrameType::RoundAck, round, 0, 0, &[]);
                    }
                    let ready = r#"{"verified":true,"restore_us":1}"#;
                    json(stream, FrameType::Ready, ready);
                    let missing = if kind < 3 { 0 } else { 48 };
                    json(stream, FrameType::Running, &running(missing));
                    for _ in 0..10 * u8::from(kind >= 3) {
                        stream.put(FrameType::Placed, 1 + rounds, 0, 0, &[]);
                    }
                    json(stream, FrameType::Arrived, &arrived);
                });
                let faults = [requests(), requests()];
                // What is dirtied in the last of the rounds does not matter: the first that stops
                // is taken.
                let mode = [kind | 1 << 5, flags | 0x10, 1 + kind];
                all.push(said(&mode, &[&[control][..], &faults].concat()));
            }
        }
    }
    let mut table = Vec::new();
    encode_runs(&[Run::new(2, 20)], &mut table);
    let recovered = frames(|stream| {
        json(stream, FrameType::Running, &running(20));
        stream.put(FrameType::MissingRuns, 0, 2, 1, &table);
        for _ in 0..5 {
            stream.put(FrameType::Placed, 1, 0, 0, &[]);
        }
        json(stream, FrameType::Arrived, &arrived);
    });
    all.push(said(&[0x13, 0x10, 1], &[recovered, requests(), requests()]));
    all
}
