//! Recording, with a guest whose memory does as the test says.

use super::*;
use crate::api::types::RecordRequest;
use ferry_migration::page::{PageSet, RamLayout, Run};
use ferry_migration::trace::{Header, Trace};

pub(super) fn fake(journal: &Arc<Journal>) -> Box<dyn Recording> {
    Box::new(FakeRecording(Arc::clone(journal), 0))
}

/// Dirties page 3 always, and page 5 once.
struct FakeRecording(Arc<Journal>, u32);

impl Recording for FakeRecording {
    fn header(&self) -> Header {
        Header {
            layout: RamLayout::new(vec![Run::new(0, 10)]).unwrap(),
            memory_bytes: 40960,
            cpus: 1,
            name: None,
            workload: Some("pretending".into()),
            empty_pages: None,
            interval_us: 0,
        }
    }
    fn sample(&mut self, into: &mut PageSet) -> Result<(), String> {
        into.insert(3);
        if self.1 == 0 {
            into.insert(5);
        }
        self.1 += 1;
        Ok(())
    }
}

impl Drop for FakeRecording {
    fn drop(&mut self) {
        self.0.note("log off");
    }
}

fn short() -> RecordRequest {
    RecordRequest {
        duration_ms: 30,
        interval_ms: 5,
    }
}

fn pages(trace: &Trace, frame: usize) -> Vec<u64> {
    let mut pages = PageSet::new(10);
    trace.pages_of(&trace.frames()[frame], &mut pages);
    pages.iter().collect()
}

#[test]
fn a_recording_is_a_trace() {
    let rig = Rig::new();
    // On a host that is busy one frame may be as long as the whole of a short recording.
    let lengths = (0..).map(|n| 30 << n);
    let mut recorded = lengths.map(|duration_ms| {
        let request = RecordRequest {
            duration_ms,
            ..short()
        };
        let bytes: Vec<u8> = rig.vmm.record(&request).unwrap().flatten().collect();
        assert_eq!(rig.journal.calls(), ["log on", "log off"]);
        Trace::read(bytes.as_slice()).unwrap()
    });
    let trace = recorded.find(|t| t.frames().len() > 1).unwrap();
    assert!(trace.is_whole());
    assert_eq!(trace.header().interval_us, 5000);
    assert_eq!(trace.header().workload.as_deref(), Some("pretending"));
    assert_eq!(pages(&trace, 0), [3, 5]);
    assert_eq!(pages(&trace, trace.frames().len() - 1), [3]);
    assert!(trace.duration() >= Duration::from_millis(30));
    assert_eq!(rig.state(), StateName::Running);
}

#[test]
fn one_at_a_time_and_no_migration_meanwhile() {
    let rig = Rig::new();
    let mut pieces = rig.vmm.record(&short()).unwrap();
    assert!(pieces.next().is_some());
    assert!(is_conflict(rig.vmm.record(&short()).map(drop)).contains("another `ferry record`"));
    assert!(is_conflict(rig.vmm.migrate(&request("tcp:there:1"))).contains("being recorded"));
    // The client goes away in the middle.
    drop(pieces);
    assert_eq!(rig.journal.calls(), ["log on", "log off"]);
    let events = rig.begin();
    assert!(is_conflict(rig.vmm.record(&short()).map(drop)).contains("cannot record"));
    rig.end(&events, Step::End(report::Status::Cancelled));
    drop(rig.vmm.record(&short()).unwrap());
}

#[test]
fn a_guest_that_ends_ends_the_trace() {
    let rig = Rig::new();
    let mut pieces = rig
        .vmm
        .record(&RecordRequest {
            duration_ms: 3_600_000,
            interval_ms: 5,
        })
        .unwrap();
    let mut bytes: Vec<u8> = pieces.by_ref().take(3).flatten().collect();
    rig.vmm.guest_ended(Ending::Shutdown);
    bytes.extend(pieces.flatten());
    let trace = Trace::read(bytes.as_slice()).unwrap();
    assert!(trace.is_whole() && trace.frames().len() >= 2);
    is_conflict(rig.vmm.record(&short()).map(drop));
}

#[test]
fn absurd_wishes_are_refused() {
    let rig = Rig::new();
    for (duration_ms, interval_ms) in [(100, 0), (100, 200), (u64::MAX, 100), (u64::MAX, u64::MAX)]
    {
        let request = RecordRequest {
            duration_ms,
            interval_ms,
        };
        assert!(matches!(rig.vmm.record(&request), Err(Refusal::Invalid(_))));
    }
    assert!(rig.journal.calls().is_empty());
}
