//! What a page costs on its way, piece by piece:
//! `cargo bench -p ferry-migration --bench page_path`.
//!
//! Every figure is the median of several passes over the pages of a 1 GiB guest.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, missing_docs)]

use ferry_migration::codec::content::{Content, page};
use ferry_migration::codec::patch::Page;
use ferry_migration::codec::{classify, patch, words};
use ferry_migration::page::{PAGE_SIZE, PageSet, Run};
use ferry_migration::wire::{FrameType, Header, Limits, decode_runs, encode_runs};
use std::hint::black_box;
use std::time::{Duration, Instant};
use zstd::bulk::{Compressor, Decompressor};

const PAGES: u64 = (1 << 30) / PAGE_SIZE as u64;
const PASSES: usize = 9;

/// Prints the median time of a pass over the pages of 1 GiB.
fn bench(name: &str, pass: impl FnMut()) {
    bench_of(name, PAGES, pass);
}

/// The same of a pass over so many pages, scaled to 1 GiB.
fn bench_of(name: &str, pages: u64, mut pass: impl FnMut()) {
    pass();
    let mut times: Vec<Duration> = (0..PASSES)
        .map(|_| {
            let began = Instant::now();
            pass();
            began.elapsed()
        })
        .collect();
    times.sort_unstable();
    let median = times[PASSES / 2].as_secs_f64();
    println!(
        "{name:<44} {:>12.1} µs/GiB {:>10.3} ns/page {:>8.2} GB/s",
        median * 1e6 * PAGES as f64 / pages as f64,
        median * 1e9 / pages as f64,
        (pages * PAGE_SIZE as u64) as f64 / median / 1e9
    );
}

/// Every other run of a set is `run` pages long, the gaps between them too.
fn striped(run: u64) -> PageSet {
    let mut set = PageSet::new(PAGES);
    for first in (0..PAGES).step_by(usize::try_from(2 * run).unwrap()) {
        set.insert_run(Run::new(first, run));
    }
    set
}

fn sets() {
    let all = {
        let mut set = PageSet::new(PAGES);
        set.insert_run(Run::new(0, PAGES));
        set
    };
    let other = striped(3);
    let mut set = PageSet::new(PAGES);
    bench("set: clear", || black_box(&mut set).clear());
    bench("set: unite", || set.union_with(black_box(&other)));
    bench("set: subtract", || set.subtract(black_box(&other)));
    bench("set: unite with a dirty log's words", || {
        set.insert_words(0, black_box(other.words()));
    });
    bench("set: count", || {
        black_box(black_box(&other).len());
    });
    bench("set: insert page by page", || {
        set.clear();
        for gfn in 0..PAGES {
            black_box(&mut set).insert(gfn);
        }
    });
    bench("set: remove in runs of 256", || {
        set.union_with(&all);
        for first in (0..PAGES).step_by(256) {
            set.remove_run(Run::new(first, 256));
        }
    });
    for (name, set) in [
        ("all", &all),
        ("every other page", &striped(1)),
        ("3 of 6", &other),
    ] {
        bench(&format!("set: walk the runs, {name}"), || {
            black_box(black_box(set).runs().map(|run| run.count).sum::<u64>());
        });
    }
}

fn frames() {
    for run in [1, 16, 256] {
        let runs: Vec<Run> = striped(run).runs().collect();
        let mut bytes = Vec::with_capacity(8 << 20);
        // Half of the pages are in the set: two passes make a GiB.
        bench(&format!("runs of {run}: encode"), || {
            for _ in 0..2 {
                bytes.clear();
                encode_runs(black_box(&runs), &mut bytes);
            }
        });
        let mut back = Vec::with_capacity(runs.len());
        bench(&format!("runs of {run}: decode"), || {
            for _ in 0..2 {
                black_box(decode_runs(black_box(&bytes), &mut back));
            }
        });
    }
    let header = Header {
        count: 1,
        length: 8 + 256 * 4096,
        ..Header::bare(FrameType::Pages, 1)
    };
    bench("header: encode and check, one per 256 pages", || {
        for _ in 0..PAGES / 256 {
            let bytes = black_box(&header).encode();
            black_box(Header::decode(&bytes, Limits { end: PAGES })).unwrap();
        }
    });
}

/// The portable zero check and the checksum; memory of 64 MiB, several times over, so that it comes
/// from RAM.
fn contents() {
    const BLOCK: usize = 64 << 20;
    const TIMES: u64 = PAGES / (BLOCK / PAGE_SIZE) as u64;
    let mut zero = vec![0_u8; BLOCK];
    // Written, so that it is memory of its own: untouched, all of it would be one page in the
    // cache.
    black_box(&mut zero).fill(black_box(0));
    let mut full = vec![0_u8; BLOCK];
    for (index, byte) in full.iter_mut().enumerate() {
        *byte = u8::try_from((index * 31 + (index >> 8)) % 251 + 1).unwrap();
    }
    let each = |memory: &[u8], f: &mut dyn FnMut(&[u8])| {
        for _ in 0..TIMES {
            black_box(memory).chunks_exact(PAGE_SIZE).for_each(&mut *f);
        }
    };
    let is_zero = |page: &[u8]| {
        page.chunks_exact(64).all(|chunk| {
            let words = chunk.chunks_exact(8);
            words.fold(0, |or, w| or | u64::from_ne_bytes(w.try_into().unwrap())) == 0
        })
    };
    bench("zero check: zero pages", || {
        each(&zero, &mut |page| {
            black_box(is_zero(page));
        });
    });
    bench("zero check: full pages", || {
        each(&full, &mut |page| {
            black_box(is_zero(page));
        });
    });
    bench("CRC32C, page by page", || {
        let mut crc = 0;
        each(&full, &mut |page| crc = crc32c::crc32c_append(crc, page));
        black_box(crc);
    });
    let mut copy = vec![0_u8; PAGE_SIZE];
    bench("copy of a page (what CRC in the pause adds)", || {
        each(&full, &mut |page| {
            copy.copy_from_slice(page);
            black_box(&copy);
        });
    });
}

/// Coders on 16 MiB of pages of each kind. Per GiB of memory, whatever it becomes.
fn coders() {
    const COUNT: usize = 4096;
    let whole = |name: &str, pass: &mut dyn FnMut()| bench_of(name, COUNT as u64, pass);
    for content in Content::ALL {
        let pages: Vec<Page> = (0..COUNT as u64).map(|seed| page(content, seed)).collect();
        whole(&format!("{content:?}: class"), &mut || {
            black_box(&pages).iter().for_each(|page| {
                black_box(classify(page));
            });
        });
        let mut out = Vec::with_capacity(2 * PAGE_SIZE);
        let mut changed = pages.clone();
        for (index, page) in changed.iter_mut().enumerate() {
            (0..4).for_each(|at| page[(index * 37 + at * 1000) % PAGE_SIZE] ^= 0x55);
        }
        whole(
            &format!("{content:?}: delta, 4 bytes changed, encode"),
            &mut || {
                for (old, new) in pages.iter().zip(black_box(&changed)) {
                    out.clear();
                    black_box(patch::encode(old, new, PAGE_SIZE, &mut out));
                }
            },
        );
        whole(
            &format!("{content:?}: delta, 4 bytes changed, apply"),
            &mut || {
                for page in black_box(&mut changed) {
                    black_box(patch::apply(&out, page)).unwrap();
                }
            },
        );
        out.clear();
        if words::pack(&pages[0], &mut out) {
            let packed = out.clone();
            println!("  packed to {:.3}", packed.len() as f64 / PAGE_SIZE as f64);
            whole(&format!("{content:?}: pack"), &mut || {
                for page in black_box(&pages) {
                    out.clear();
                    black_box(words::pack(page, &mut out));
                }
            });
            let mut back = [0; PAGE_SIZE];
            whole(&format!("{content:?}: unpack"), &mut || {
                for _ in 0..COUNT {
                    back.fill(0);
                    black_box(words::unpack(black_box(&packed), &mut back));
                }
            });
        }
        for (level, unit) in [(1, 1), (1, 16), (1, 64), (1, 256), (-1, 64), (3, 64)] {
            zstd(content, &pages, level, unit, &whole);
        }
    }
}

/// Measures a pass over all pages.
type Whole<'a> = &'a dyn Fn(&str, &mut dyn FnMut());

fn zstd(content: Content, pages: &[Page], level: i32, unit: usize, whole: Whole<'_>) {
    let mut compressor = Compressor::new(level).unwrap();
    let mut into = vec![0; 2 * unit * PAGE_SIZE];
    let mut packed = Vec::new();
    let units = pages.chunks_exact(unit);
    whole(
        &format!("{content:?}: zstd {level}, {unit} pages, encode"),
        &mut || {
            packed.clear();
            for pages in units.clone() {
                let bytes = black_box(pages).as_flattened();
                let length = compressor.compress_to_buffer(bytes, &mut into[..]).unwrap();
                packed.push(into[..length].to_vec());
            }
        },
    );
    let wire: usize = packed.iter().map(Vec::len).sum();
    println!("  to {:.3}", wire as f64 / (pages.len() * PAGE_SIZE) as f64);
    let mut decompressor = Decompressor::new().unwrap();
    whole(
        &format!("{content:?}: zstd {level}, {unit} pages, decode"),
        &mut || {
            for packed in &packed {
                black_box(decompressor.decompress_to_buffer(packed, &mut into[..])).unwrap();
            }
        },
    );
}

fn main() {
    // `cargo test --all-targets` runs benchmarks too, without this.
    if !std::env::args().any(|argument| argument == "--bench") {
        eprintln!("NOT RUN: benchmark of the page path: use cargo bench");
        return;
    }
    sets();
    frames();
    contents();
    coders();
}
