//! Guests that do what a trace has recorded.

use super::*;
use crate::trace::{Header, Trace};

fn trace() -> Trace {
    let layout = RamLayout::new(vec![Run::new(0, 100)]).unwrap();
    let header = Header {
        layout,
        memory_bytes: 100 << 12,
        cpus: 1,
        name: None,
        workload: None,
        empty_pages: None,
        interval_us: 1_000_000,
    };
    let mut writer = crate::trace::Writer::new(Vec::new(), &header).unwrap();
    for (at, run) in [
        (1, Run::new(0, 50)),
        (2, Run::new(0, 0)),
        (3, Run::new(40, 20)),
    ] {
        let mut set = PageSet::new(100);
        set.insert_run(run);
        writer.frame(Duration::from_secs(at), &set).unwrap();
    }
    Trace::read(writer.finish(Duration::from_secs(3)).unwrap().as_slice()).unwrap()
}

#[test]
fn a_replay_dirties_what_was_recorded_and_begins_anew() {
    let trace = trace();
    let marked = |replay: &mut Replay, to| {
        let mut marks = PageSet::new(100);
        replay.advance(to, &mut marks);
        marks.len()
    };
    let replay = &mut Replay::new(&trace, 1);
    assert_eq!(marked(replay, 0.5), 25, "half of the first interval");
    assert_eq!(marked(replay, 1.0), 25);
    assert_eq!(marked(replay, 2.0), 0);
    assert_eq!(marked(replay, 2.25), 5);
    assert_eq!(marked(replay, 4.0), 15 + 50 - 10 + overlap(&trace));
    assert_eq!(replay.passes(), 1);
    // In one step or in a thousand: the same pages.
    let (mut once, mut often) = (Replay::new(&trace, 1), Replay::new(&trace, 1));
    let mut marks = [PageSet::new(100), PageSet::new(100)];
    once.advance(7.4, &mut marks[0]);
    for step in 1..=740 {
        often.advance(f64::from(step) / 100.0, &mut marks[1]);
    }
    assert_eq!(marks[0], marks[1]);
    assert_eq!(once.passes(), often.passes());
}

/// Of the last interval's pages 40..50 some were among its first quarter, and are then not marked
/// twice.
fn overlap(trace: &Trace) -> u64 {
    let mut replay = Replay::new(trace, 1);
    let mut before = PageSet::new(100);
    replay.advance(2.0, &mut before);
    let mut quarter = PageSet::new(100);
    replay.advance(2.25, &mut quarter);
    quarter.iter().filter(|gfn| (40..50).contains(gfn)).count() as u64
}

#[test]
fn an_empty_trace_is_an_idle_guest() {
    let layout = RamLayout::new(vec![Run::new(0, 100)]).unwrap();
    let header = Header {
        layout,
        ..trace().header().clone()
    };
    let idle = |frames: &[(u64, bool)]| {
        let mut writer = crate::trace::Writer::new(Vec::new(), &header).unwrap();
        for &(at, dirty) in frames {
            let mut set = PageSet::new(100);
            if dirty {
                set.insert(1);
            }
            writer.frame(Duration::from_secs(at), &set).unwrap();
        }
        let bytes = writer.finish(Duration::from_secs(9)).unwrap();
        Trace::read(bytes.as_slice()).unwrap()
    };
    for frames in [&[][..], &[(0, true)], &[(1, false), (2, false)]] {
        let trace = idle(frames);
        let mut replay = Replay::new(&trace, 1);
        assert_eq!(replay.peek(), None, "{frames:?}");
        let mut marks = PageSet::new(100);
        replay.advance(100.0, &mut marks);
        assert!(marks.is_empty());
    }
}
