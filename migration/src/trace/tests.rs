use super::*;
use crate::page::{PageSet, Run};
use proptest::prelude::*;
use std::time::Duration;

fn header() -> Header {
    Header {
        layout: RamLayout::new(vec![Run::new(0, 160), Run::new(256, 100)]).unwrap(),
        memory_bytes: 260 << 12,
        cpus: 1,
        name: Some("one".into()),
        workload: None,
        empty_pages: None,
        interval_us: 100_000,
    }
}

fn set(pages: impl IntoIterator<Item = u64>) -> PageSet {
    let mut set = PageSet::new(356);
    pages.into_iter().for_each(|gfn| {
        set.insert(gfn);
    });
    set
}

/// A trace of these sets, a frame each tenth of a second.
fn written(sets: &[PageSet], ended: bool) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer = Writer::new(&mut bytes, &header()).unwrap();
    let mut at = Duration::ZERO;
    for set in sets {
        at += Duration::from_millis(100);
        writer.frame(at, set).unwrap();
    }
    if ended {
        writer.finish(at).unwrap();
    }
    bytes
}

fn sets_of(trace: &Trace) -> Vec<PageSet> {
    let decode = |frame| {
        let mut set = PageSet::new(356);
        trace.pages_of(frame, &mut set);
        set
    };
    trace.frames().iter().map(decode).collect()
}

#[test]
fn a_trace_comes_back() {
    let sets = [
        set([]),
        set(0..160),
        set((0..160).step_by(2)),
        set([3, 159, 256, 355]),
    ];
    let trace = Trace::read(written(&sets, true).as_slice()).unwrap();
    assert_eq!(trace.header(), &header());
    assert_eq!(sets_of(&trace), sets);
    assert!(trace.is_whole());
    assert_eq!(trace.duration(), Duration::from_millis(400));
    assert_eq!(trace.frames()[2].pages(), 80);
    assert_eq!(trace.frames()[2].from(), Duration::from_millis(200));
}

#[test]
fn the_smaller_form_is_taken() {
    // 45 bytes of bitmap; every other page is 320 bytes of runs, one run is two.
    let empty = written(&[set([])], false).len();
    assert_eq!(written(&[set(10..100)], false).len(), empty + 2);
    assert_eq!(
        written(&[set((0..160).step_by(2))], false).len(),
        empty + 20
    );
}

#[test]
fn what_was_broken_off_can_be_used() {
    let sets = [set(0..10), set(20..30)];
    let bytes = written(&sets, false);
    let trace = Trace::read(bytes.as_slice()).unwrap();
    assert_eq!((trace.frames().len(), trace.is_whole()), (2, false));
    let trace = Trace::read(&bytes[..bytes.len() - 1]).unwrap();
    assert_eq!((trace.frames().len(), trace.is_whole()), (1, false));
    assert_eq!(sets_of(&trace), sets[..1]);
}

#[test]
fn other_files_and_versions_are_named() {
    assert!(matches!(Trace::read(&b""[..]), Err(TraceError::Foreign)));
    assert!(matches!(
        Trace::read(&[0x7f; 100][..]),
        Err(TraceError::Foreign)
    ));
    let mut bytes = written(&[], true);
    bytes[8] = 9;
    let error = Trace::read(bytes.as_slice()).unwrap_err().to_string();
    assert!(
        error.contains("version 9") && error.contains("version 1"),
        "{error}"
    );
}

/// Changes the header's JSON or a frame and repairs the checksums: a hostile file.
#[test]
fn absurd_claims_are_refused_before_anything_is_allocated() {
    let refused = |bytes: Vec<u8>| Trace::read(bytes.as_slice()).unwrap_err().to_string();
    let mut long = written(&[], true);
    long[10..14].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(refused(long).contains("at most 65536"));

    let head = |kind: u8, length: u32, payload: &[u8]| {
        let mut head = vec![kind, 0, 0, 0];
        head.extend_from_slice(&1_u64.to_le_bytes());
        head.extend_from_slice(&length.to_le_bytes());
        head.extend_from_slice(&crc32c::crc32c(payload).to_le_bytes());
        head.extend_from_slice(&crc32c::crc32c(&head).to_le_bytes());
        [written(&[], false), head, payload.to_vec()].concat()
    };
    assert!(refused(head(1, u32::MAX, &[])).contains("longer than a bitmap"));
    assert!(refused(head(7, 0, &[])).contains("unknown kind"));
    assert!(refused(head(3, 1, &[0])).contains("is an end"));
    assert!(refused(head(1, 3, &[0, 0xe4, 0x02])).contains("beyond the guest's memory"));
    assert!(refused(head(1, 3, &[0xa0, 0x01, 0])).contains("no RAM"));
    let late = u64::MAX.to_le_bytes();
    assert!(
        refused(head(1, 10, &[&[0xff; 9][..], &[1]].concat())).contains("does not end"),
        "{late:?}"
    );

    let mut big = header();
    big.layout = RamLayout::new(vec![Run::new(0, MAX_GFN + 1)]).unwrap();
    assert!(Writer::new(Vec::new(), &big).is_err());
}

#[test]
fn time_does_not_run_backwards() {
    let mut bytes = Vec::new();
    let mut writer = Writer::new(&mut bytes, &header()).unwrap();
    writer.frame(Duration::from_secs(2), &set([])).unwrap();
    writer.frame(Duration::from_secs(1), &set([])).unwrap();
    let error = Trace::read(bytes.as_slice()).unwrap_err().to_string();
    assert!(
        error.contains("frame 1") && error.contains("older"),
        "{error}"
    );
}

proptest! {
    #[test]
    fn any_flipped_bit_is_found(frames in proptest::collection::vec(proptest::collection::vec(0..160_u64, 0..120), 1..4), at: prop::sample::Index, bit in 0..8_u32) {
        let sets: Vec<PageSet> = frames.into_iter().map(set).collect();
        let mut bytes = written(&sets, true);
        let index = at.index(bytes.len());
        bytes[index] ^= 1 << bit;
        prop_assert!(Trace::read(bytes.as_slice()).is_err());
    }

    #[test]
    fn any_truncation_is_a_shorter_trace_or_refused(at: prop::sample::Index) {
        let sets = [set(0..10), set((0..160).step_by(3)), set([300])];
        let bytes = written(&sets, true);
        match Trace::read(&bytes[..at.index(bytes.len())]) {
            Ok(trace) => {
                prop_assert!(!trace.is_whole());
                let read = sets_of(&trace);
                prop_assert_eq!(&read[..], &sets[..read.len()]);
            }
            Err(error) => prop_assert!(!matches!(error, TraceError::Frame { .. }), "{}", error),
        }
    }

    #[test]
    fn any_bytes_are_read_or_refused_in_a_sentence(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let bytes = [written(&[], false), bytes].concat();
        if let Err(error) = Trace::read(bytes.as_slice()) {
            prop_assert!(!error.to_string().contains('\n'));
        }
    }
}

/// A frame costs what it holds, not what the header claims of the guest: else this would not end.
#[test]
fn many_small_frames_of_a_large_guest_are_read() {
    let large = Header {
        layout: RamLayout::new(vec![Run::new(0, MAX_GFN)]).unwrap(),
        ..header()
    };
    let mut writer = Writer::new(Vec::new(), &large).unwrap();
    let none = PageSet::new(0);
    for _ in 0..50_000 {
        writer.frame(Duration::ZERO, &none).unwrap();
    }
    let bytes = writer.finish(Duration::ZERO).unwrap();
    let trace = Trace::read(bytes.as_slice()).unwrap();
    assert_eq!((trace.frames().len(), trace.is_whole()), (50_000, true));
}
