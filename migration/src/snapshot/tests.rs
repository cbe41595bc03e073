mod recorded;

use super::*;
use crate::codec::content::{self, Content};
use crate::options::Compress;
use crate::page::{PAGE_SIZE, PageSet, RamLayout, Run};
use crate::port::{
    PageFault, PageSink, PageSource, Pausable, Paused, PortError, PostCopySink, SourceVm, pause,
};
use crate::testing::{Loopback, TestClock};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

type Page = [u8; PAGE_SIZE];
type Memory = BTreeMap<Gfn, Page>;

fn ticks() -> TestClock {
    TestClock::ticking(Duration::from_micros(1))
}

/// A guest that writes pages while it is looked at.
struct Writer {
    layout: RamLayout,
    memory: Mutex<Memory>,
    dirty: Mutex<Option<PageSet>>,
    /// Writes still to come, one at each look.
    writes: Mutex<Vec<(Gfn, Page)>>,
    paused: Mutex<bool>,
}

impl Writer {
    fn new(layout: &RamLayout, memory: &Memory) -> Self {
        Self {
            layout: layout.clone(),
            memory: Mutex::new(memory.clone()),
            dirty: Mutex::default(),
            writes: Mutex::default(),
            paused: Mutex::new(false),
        }
    }

    fn write_one(&self) {
        if *self.paused.lock().unwrap() {
            return;
        }
        if let Some((gfn, page)) = self.writes.lock().unwrap().pop() {
            self.memory.lock().unwrap().insert(gfn, page);
            if let Some(dirty) = &mut *self.dirty.lock().unwrap() {
                dirty.insert(gfn);
            }
        }
    }
}

impl PageSource<Loopback> for Writer {
    fn transmit(&self, _: &mut Loopback, _: &[u8], _: &[Run]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn copy_page(&self, gfn: Gfn, into: &mut Page) -> Result<(), PortError> {
        *into = self
            .memory
            .lock()
            .unwrap()
            .get(&gfn)
            .copied()
            .unwrap_or([0; PAGE_SIZE]);
        self.write_one();
        Ok(())
    }
    fn is_zero(&self, gfn: Gfn) -> bool {
        let zero = self
            .memory
            .lock()
            .unwrap()
            .get(&gfn)
            .is_none_or(|p| *p == [0; PAGE_SIZE]);
        self.write_one();
        zero
    }
    fn unpopulated(&self, run: Run) -> Option<Run> {
        let memory = self.memory.lock().unwrap();
        let first = (run.first..run.end()).find(|gfn| !memory.contains_key(gfn))?;
        let end = (first..run.end()).find(|gfn| memory.contains_key(gfn));
        Some(Run::new(first, end.unwrap_or(run.end()) - first))
    }
}

impl SourceVm<Loopback> for Writer {
    fn layout(&self) -> RamLayout {
        self.layout.clone()
    }
    fn description(&self) -> Result<Vec<u8>, PortError> {
        Ok(b"machine".to_vec())
    }
    fn state_bytes(&self) -> u64 {
        5
    }
    fn start_tracking(&self) -> Result<(), PortError> {
        *self.dirty.lock().unwrap() = Some(self.layout.all());
        Ok(())
    }
    fn stop_tracking(&self) {
        *self.dirty.lock().unwrap() = None;
    }
    fn collect_dirty(&self, into: &mut PageSet) -> Result<(), PortError> {
        into.union_with(self.dirty.lock().unwrap().as_ref().unwrap());
        Ok(())
    }
    fn clear_dirty(&self, runs: &[Run], _: &mut Vec<u64>) -> Result<(), PortError> {
        let mut dirty = self.dirty.lock().unwrap();
        runs.iter()
            .for_each(|run| dirty.as_mut().unwrap().remove_run(*run));
        Ok(())
    }
    fn pause(&self) -> Result<Paused<'_>, PortError> {
        pause(self)
    }
}

impl Pausable for Writer {
    fn stop(&self) -> Result<(), PortError> {
        *self.paused.lock().unwrap() = true;
        Ok(())
    }
    fn resume(&self) -> Result<(), PortError> {
        *self.paused.lock().unwrap() = false;
        Ok(())
    }
    fn save(&self, _newest: Option<u32>) -> Result<Vec<u8>, PortError> {
        Ok(b"state".to_vec())
    }
    fn give_away(&self, _: crate::wire::SessionId) -> Result<(), PortError> {
        Err("a snapshot commits nothing".into())
    }
    fn release(&self) {}
}

/// Memory that is filled; a page that was placed keeps what it has.
#[derive(Default)]
struct Sink(Mutex<Memory>);

impl Sink {
    fn put(&self, run: Run, bytes: &[u8], keep: bool) {
        let (pages, rest) = bytes.as_chunks::<PAGE_SIZE>();
        assert!(rest.is_empty() && pages.len() as u64 == run.count);
        let mut memory = self.0.lock().unwrap();
        for (gfn, page) in (run.first..run.end()).zip(pages) {
            let before = memory.get(&gfn);
            assert!(before.is_none() || keep, "page {gfn} is written twice");
            if before.is_none() {
                memory.insert(gfn, *page);
            }
        }
    }
}

impl PageSink<Loopback> for Sink {
    fn receive(&self, _: &mut Loopback, _: &[Run]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn write(&self, run: Run, bytes: &[u8]) -> Result<(), PortError> {
        self.put(run, bytes, false);
        Ok(())
    }
    fn zero(&self, _: Run) -> Result<(), PortError> {
        Ok(())
    }
    fn copy_page(&self, _: Gfn, _: &mut Page) -> Result<(), PortError> {
        Err("not read".into())
    }
    fn post_copy(&self) -> Option<&dyn PostCopySink> {
        Some(self)
    }
}

impl PostCopySink for Sink {
    fn place(&self, run: Run, bytes: &[u8]) -> Result<(), PortError> {
        self.put(run, bytes, true);
        Ok(())
    }
    fn place_zero(&self, run: Run) -> Result<(), PortError> {
        self.put(run, &[0; PAGE_SIZE], true);
        Ok(())
    }
    fn next_fault(&self, _: Duration) -> Result<Option<PageFault>, PortError> {
        Ok(None)
    }
}

fn layout() -> RamLayout {
    RamLayout::new(vec![Run::new(0, 300), Run::new(500, 150)]).unwrap()
}

const HOW: SaveOptions = SaveOptions {
    compress: Compress::None,
    threads: 1,
    live: false,
    downtime: Duration::ZERO,
};

fn saved(guest: &Writer, options: SaveOptions) -> (Vec<u8>, Saved) {
    let file = Mutex::default();
    let setup = SaveSetup {
        session: SessionId([7; 16]),
        options,
        clock: &ticks(),
        cancelled: &|| false,
        describe: &mut || Ok(b"machine".to_vec()),
        resume: false,
        released: &mut |_| {},
    };
    let (saved, paused) = save::<Loopback, _, _>(guest, &file, setup).unwrap();
    assert!(*guest.paused.lock().unwrap());
    drop(paused);
    assert!(!*guest.paused.lock().unwrap());
    (file.into_inner().unwrap(), saved)
}

/// Everything in a file, without a guest: what a naive reader would restore.
fn restored(bytes: Vec<u8>) -> Result<Memory, SnapshotError> {
    let snapshot = Snapshot::open(bytes)?;
    let sink = Sink::default();
    fill_all::<Loopback, _, _>(&snapshot, &sink, 2, &|| false)?;
    Ok(sink.0.into_inner().unwrap())
}

fn without_zeros(memory: &Memory) -> Memory {
    let all = memory.iter().filter(|(_, page)| **page != [0; PAGE_SIZE]);
    all.map(|(gfn, page)| (*gfn, *page)).collect()
}

fn kind(n: u8) -> Content {
    [
        Content::Sparse,
        Content::Half,
        Content::Pointers,
        Content::Noise,
    ][usize::from(n % 4)]
}

/// What a guest of our layout may hold: runs of pages of one kind.
fn memories() -> impl Strategy<Value = Memory> {
    let run = (0u64..450, 1u64..90, 0u8..6, any::<u32>());
    proptest::collection::vec(run, 0..8).prop_map(|runs| {
        let mut memory = Memory::new();
        for (at, count, what, seed) in runs {
            for n in at..(at + count).min(450) {
                let gfn = if n < 300 { n } else { n + 200 };
                let page = match what {
                    4 => [0; PAGE_SIZE],
                    5 => content::page(Content::Weak, u64::from(seed) + n),
                    what => content::page(kind(what), u64::from(seed) + n % 7),
                };
                memory.insert(gfn, page);
            }
        }
        memory
    })
}

fn coders() -> impl Strategy<Value = Compress> {
    prop_oneof![
        Just(Compress::None),
        Just(Compress::Zstd),
        Just(Compress::Auto),
        Just(Compress::Adaptive),
        Just(Compress::Delta),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn what_was_saved_is_restored(memory in memories(), compress in coders(), threads in 1u16..4) {
        let guest = Writer::new(&layout(), &memory);
        let (bytes, saved) = saved(&guest, SaveOptions { compress, threads, ..HOW });
        let expected = without_zeros(&memory);
        prop_assert_eq!(saved.data_pages, expected.len() as u64);
        prop_assert_eq!((saved.pages, saved.superseded, saved.bytes), (450, 0, bytes.len() as u64));
        let snapshot = Snapshot::open(bytes.clone()).unwrap();
        prop_assert_eq!((snapshot.machine(), snapshot.state()), (&b"machine"[..], &b"state"[..]));
        prop_assert_eq!(snapshot.data().iter().collect::<Vec<_>>(), expected.keys().copied().collect::<Vec<_>>());
        for gfn in 0..700 {
            let frame = snapshot.frame_of(gfn);
            prop_assert_eq!(frame.is_some(), expected.contains_key(&gfn));
            let lists = |frame| snapshot.pages_of(frame).any(|run| (run.first..run.end()).contains(&gfn));
            prop_assert!(frame.is_none_or(lists));
        }
        prop_assert!(restored(bytes).unwrap() == expected);
    }

    #[test]
    fn a_live_snapshot_is_the_guest_at_its_pause(
        memory in memories(),
        compress in coders(),
        writes in proptest::collection::vec((0u64..300, any::<bool>(), any::<u16>()), 0..300),
    ) {
        let guest = Writer::new(&layout(), &memory);
        *guest.writes.lock().unwrap() = writes
            .iter()
            .map(|(gfn, zero, seed)| {
                let page = content::page(Content::Half, u64::from(*seed));
                (*gfn, if *zero { [0; PAGE_SIZE] } else { page })
            })
            .collect();
        let (bytes, saved) = saved(&guest, SaveOptions { compress, live: true, threads: 2, ..HOW });
        let expected = without_zeros(&guest.memory.lock().unwrap());
        prop_assert!(restored(bytes).unwrap() == expected);
        prop_assert!(saved.rounds >= 2);
        prop_assert!(guest.dirty.lock().unwrap().is_none());
    }

    #[test]
    fn pages_come_on_demand_in_any_order(memory in memories(), faults in proptest::collection::vec((0u64..300, any::<bool>()), 0..60)) {
        let guest = Writer::new(&layout(), &memory);
        let (bytes, _) = saved(&guest, SaveOptions { compress: Compress::Adaptive, ..HOW });
        let expected = without_zeros(&memory);
        let sink = Arc::new(Sink::default());
        let filling = Filling::<Loopback, _, _>::new(Snapshot::open(bytes).unwrap(), Arc::clone(&sink), Arc::new(ticks()));
        prop_assert_eq!(filling.left(), expected.len() as u64);
        let mut reader = BlockReader::default();
        for (gfn, write) in faults {
            filling.fault(PageFault { gfn, waiter: 1 }, &mut reader).unwrap();
            let mut memory = sink.0.lock().unwrap();
            let page = memory.get_mut(&gfn).expect("a page that was waited for is there");
            if page[100] != 0xee {
                prop_assert!(*page == expected.get(&gfn).copied().unwrap_or([0; PAGE_SIZE]));
            }
            if write {
                page[100] = 0xee;
            }
        }
        filling.push().unwrap();
        let filled = filling.filled();
        prop_assert_eq!((filling.left(), filling.waiting(), filled.pages), (0, 0, expected.len() as u64));
        let memory = without_zeros(&sink.0.lock().unwrap());
        for (gfn, page) in memory {
            // What the guest wrote stays.
            prop_assert!(page[100] == 0xee || Some(&page) == expected.get(&gfn), "{gfn}");
        }
    }
}

/// Pages that no coder shrinks are found out at different times; a block's table ascends all the
/// same.
#[test]
fn what_did_not_shrink_is_restored() {
    for compress in [
        Compress::None,
        Compress::Zstd,
        Compress::Auto,
        Compress::Adaptive,
        Compress::Delta,
    ] {
        for weak_at in [0, 1, 5, 63] {
            let page = |gfn| {
                let weak = gfn % 64 == weak_at || gfn % 64 == weak_at + 1;
                let content = [Content::Noise, Content::Weak][usize::from(weak)];
                (gfn, content::page(content, gfn))
            };
            let memory: Memory = (0..300).chain(500..650).map(page).collect();
            let guest = Writer::new(&layout(), &memory);
            let how = SaveOptions { compress, ..HOW };
            let restored = restored(saved(&guest, how).0);
            assert!(
                restored.as_ref().is_ok_and(|found| *found == memory),
                "{compress:?} {:?}",
                restored.as_ref().err()
            );
        }
    }
}

/// A small file with a frame of every kind.
fn small() -> (Vec<u8>, Memory) {
    let layout = RamLayout::new(vec![Run::new(0, 12)]).unwrap();
    let mut memory = Memory::new();
    for gfn in [1, 2, 5, 6, 9] {
        memory.insert(gfn, content::page(kind(u8::try_from(gfn).unwrap()), gfn));
    }
    let guest = Writer::new(&layout, &memory);
    let how = SaveOptions {
        compress: Compress::Adaptive,
        ..HOW
    };
    (saved(&guest, how).0, memory)
}

#[test]
fn a_file_cut_at_any_length_is_refused() {
    let (bytes, memory) = small();
    assert!(restored(bytes.clone()).unwrap() == memory);
    for length in 0..bytes.len() {
        let error = restored(bytes[..length].to_vec()).expect_err("a part of a file");
        match error {
            SnapshotError::Truncated { bytes } => assert_eq!(bytes, length as u64),
            SnapshotError::Magic(_) => assert!(length < 8),
            error => panic!("{length}: {error}"),
        }
    }
    // Nor one with something after it.
    let long = [&bytes[..], b"x"].concat();
    assert!(matches!(
        restored(long),
        Err(SnapshotError::Truncated { .. })
    ));
}

#[test]
fn a_flipped_bit_anywhere_is_found() {
    let (bytes, _) = small();
    for at in 0..bytes.len() {
        let mut bad = bytes.clone();
        bad[at] ^= 1 << (at % 8);
        let error = restored(bad).expect_err("a damaged file").to_string();
        assert!(
            !error.is_empty() && !error.contains("peer"),
            "{at}: {error}"
        );
    }
}

#[test]
fn another_version_is_refused_by_name() {
    let (mut bytes, _) = small();
    bytes[8..12].copy_from_slice(&[9, 0, 9, 0]);
    let error = restored(bytes).unwrap_err().to_string();
    assert!(
        error.contains("format 9") && error.contains("format 1"),
        "{error}"
    );
    let (mut bytes, _) = small();
    bytes[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\x00");
    let error = restored(bytes).unwrap_err().to_string();
    assert!(error.starts_with("it is not a ferry snapshot"), "{error}");
}

#[test]
fn a_damaged_page_names_itself_and_its_place_and_ends_the_filling() {
    let (mut bytes, _) = small();
    let snapshot = Snapshot::open(bytes.clone()).unwrap();
    let frame = snapshot.frame_of(5).unwrap();
    bytes[usize::try_from(frame).unwrap() + 60] ^= 1;
    let sink = Arc::new(Sink::default());
    let snapshot = Snapshot::open(bytes).unwrap();
    let filling = Filling::<Loopback, _, _>::new(snapshot, Arc::clone(&sink), Arc::new(ticks()));
    let error = filling.push().unwrap_err().to_string();
    assert!(error.contains(&format!("byte {}", frame + 32)), "{error}");
    assert!(error.starts_with("page 0x"), "{error}");
    assert!(filling.is_over() && filling.failed().as_deref() == Some(&error));
    // Serving faults ends too, and nothing wrong was placed.
    filling.serve().unwrap();
    let (_, memory) = small();
    assert!(
        sink.0
            .lock()
            .unwrap()
            .iter()
            .all(|(gfn, page)| memory.get(gfn) == Some(page))
    );
}

#[test]
fn a_guest_goes_on_when_the_file_is_full() {
    struct Full;
    impl WriteAt for Full {
        fn write_at(&self, _: &[u8], offset: u64) -> io::Result<()> {
            let room = offset < 3 * PAGE_SIZE as u64;
            if room {
                Ok(())
            } else {
                Err(io::ErrorKind::StorageFull.into())
            }
        }
    }
    let memory = (0..300)
        .map(|gfn| (gfn, content::page(Content::Noise, gfn)))
        .collect();
    for live in [false, true] {
        let guest = Writer::new(&layout(), &memory);
        let setup = SaveSetup {
            session: SessionId([7; 16]),
            options: SaveOptions {
                live,
                threads: 2,
                ..HOW
            },
            clock: &ticks(),
            cancelled: &|| false,
            describe: &mut || Ok(Vec::new()),
            resume: true,
            released: &mut |_| panic!("it is not there"),
        };
        let error = save::<Loopback, _, _>(&guest, &Full, setup)
            .map(drop)
            .unwrap_err();
        assert!(matches!(error, SaveError::Write { .. }), "{error}");
        assert!(!*guest.paused.lock().unwrap());
        assert!(guest.dirty.lock().unwrap().is_none());
    }
}
