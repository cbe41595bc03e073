//! The writer on the host.

use super::*;
use crate::host::Threads;
use std::sync::Mutex;
use std::sync::atomic::AtomicU64;

/// A clock that moves by itself, and a record of what was reported.
#[derive(Default)]
struct Record {
    now: AtomicU64,
    writes: [AtomicU64; 4],
    corrupt: Mutex<Vec<Corruption>>,
}

impl Hooks for Record {
    fn nanos(&self) -> u64 {
        self.now.fetch_add(1000, Ordering::Relaxed)
    }
    fn wrote(&self, rank: usize, writes: u64) {
        self.writes[rank].store(writes, Ordering::Relaxed);
    }
    fn corrupt(&self, _rank: usize, what: &Corruption) {
        self.corrupt.lock().unwrap().push(*what);
    }
}

fn memory(pages: usize, working_set: usize) -> (Vec<Page>, Vec<u32>) {
    (vec![[7; 512]; pages], vec![7; working_set])
}

#[test]
fn writes_and_verifies_with_every_pattern_fill_and_team() {
    for pattern in [
        Pattern::Sequential,
        Pattern::Uniform,
        Pattern::Zipf { exponent: 0.99 },
    ] {
        for fill in [Fill::Random, Fill::ZeroRich, Fill::Half, Fill::None] {
            for (ranks, part) in [(1, 4096), (3, 4096), (3, 16), (1, 72)] {
                let (mut pages, mut generations) = memory(100, 40);
                let dirty = Dirty {
                    working_set_pages: 40,
                    rate: 1000,
                    pattern,
                    fill,
                    part,
                    seconds: 1,
                    seed: 5,
                };
                let record = Record::default();
                let memory = Memory {
                    pages: &mut pages,
                    generations: &mut generations,
                };
                let verdict = run(&dirty, memory, &Threads::new(ranks), &record).unwrap();
                assert!(verdict.verified, "{dirty:?} {ranks}: {verdict:?}");
                assert_eq!(verdict.pages, if fill == Fill::None { 40 } else { 100 });
                assert!(verdict.writes > 0);
            }
        }
    }
}

#[test]
fn the_rate_is_kept() {
    let (mut pages, mut generations) = memory(10, 10);
    let dirty = Dirty {
        working_set_pages: 10,
        rate: 3000,
        seconds: 2,
        ..Dirty::default()
    };
    let memory = Memory {
        pages: &mut pages,
        generations: &mut generations,
    };
    let verdict = run(&dirty, memory, &Threads::new(1), &Record::default()).unwrap();
    assert!((5990..=6010).contains(&verdict.writes), "{verdict:?}");
}

#[test]
fn a_debt_is_forgiven() {
    let mut pace = Pace::new(1000, 1, 0, 0);
    assert!(pace.due(0));
    assert!(!pace.due(999_000));
    assert!(pace.due(1_000_000));
    // A pause of a second, then one write at once and the next one a period later.
    assert!(pace.due(1_001_000_000));
    assert!(!pace.due(1_001_500_000));
    assert!(pace.due(1_002_000_000));
}

/// Spoils memory between the set-up and the first write.
fn spoiled(fill: Fill, spoil: impl Fn(&mut [Page], &mut [u32])) -> (u64, Vec<Corruption>) {
    let (mut pages, mut generations) = memory(64, 8);
    let record = Record::default();
    let dirty = Dirty {
        working_set_pages: 8,
        fill,
        ..Dirty::default()
    };
    let (working_set, filled) = pages.split_at_mut(8);
    let mut slice = Slice {
        first: 0,
        pages: working_set,
        generations: &mut generations,
        first_filled: 8,
        filled,
        writes: 0,
        corrupt: 0,
    };
    slice.set_up(&dirty, &record, 0);
    spoil(slice.filled, slice.generations);
    slice.verify(&dirty, &record, 0);
    let corrupt = slice.corrupt;
    (corrupt, record.corrupt.into_inner().unwrap())
}

#[test]
fn every_kind_of_damage_is_found() {
    for fill in [Fill::Random, Fill::ZeroRich, Fill::Half] {
        assert_eq!(spoiled(fill, |_, _| ()).0, 0);
        for word in [0, 1, 2, 300, 511] {
            let (count, found) = spoiled(fill, |pages, _| pages[9][word] ^= 1 << 40);
            assert_eq!(count, 1);
            assert_eq!((found[0].page, found[0].word), (17, word as u64));
        }
        // Two pages changed places. (Of zero pages, one cannot tell: take 16 and 17.)
        assert_eq!(spoiled(fill, |pages, _| pages.swap(8, 9)).0, 2);
        // A page of the working set went back to an older generation.
        assert_eq!(spoiled(fill, |_, generations| generations[3] = 1).0, 1);
    }
}

#[test]
fn a_working_set_beyond_memory_is_refused() {
    let (mut pages, mut generations) = memory(10, 20);
    let dirty = Dirty {
        working_set_pages: 20,
        ..Dirty::default()
    };
    let memory = Memory {
        pages: &mut pages,
        generations: &mut generations,
    };
    let error = run(&dirty, memory, &Threads::new(1), &Record::default()).unwrap_err();
    assert!(error.to_string().contains("20 pages"));
}

#[test]
fn a_write_changes_a_part_and_all_is_checked() {
    let shape = Fill::Random.working_set();
    let mut page = [0; WORDS];
    shape.write(&mut page, 1, 7, 0, 8);
    let first = page;
    shape.write(&mut page, 1, 7, 3, 8);
    let changed: Vec<usize> = (0..WORDS).filter(|&i| page[i] != first[i]).collect();
    // The number at word 0 stays.
    assert_eq!(changed, [1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(shape.verify(&page, 1, 7, 3, 8), None);
    assert!(shape.verify(&page, 1, 7, 2, 8).is_some());
    for word in [0, 1, 2, 7, 8, 300, 511] {
        page[word] ^= 1 << 40;
        let found = shape.verify(&page, 1, 7, 3, 8).unwrap();
        assert_eq!(found.word, word as u64);
        assert_eq!(found.found, page[word]);
        page[word] ^= 1 << 40;
        assert_eq!(found.expected, page[word]);
    }
}
