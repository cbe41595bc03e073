//! Snapshots, with a guest whose writing ends when the test says so.

use super::*;
use crate::api::types::{RecordRequest, SnapshotReport, SnapshotRequest, Then};
use ferry_migration::options::Compress;
use std::sync::atomic::AtomicBool;

/// Writes until it is told how that ended; a channel that closed ends it by the cancel flag.
struct Slow {
    calls: Mutex<Vec<&'static str>>,
    ends: Mutex<mpsc::Receiver<Result<(), String>>>,
    missing: Option<Missing>,
}

impl Slow {
    fn note(&self, call: &'static str) {
        self.calls.lock().unwrap().push(call);
    }
}

impl Guest for Slow {
    fn info(&self) -> GuestInfo {
        GuestInfo::default()
    }
    fn pause(&self) -> Result<(), String> {
        self.note("pause");
        Ok(())
    }
    fn resume(&self) -> Result<(), String> {
        self.note("resume");
        Ok(())
    }
    fn take_over(&self) -> Result<(), String> {
        self.note("take over");
        Ok(())
    }
    fn is_running(&self) -> bool {
        true
    }
    fn stop(&self) {
        self.note("stop");
    }
    fn power_button(&self) -> Result<(), String> {
        Ok(())
    }
    fn input(&self, bytes: &[u8]) -> usize {
        bytes.len()
    }
    fn migration(&self, _: &str, _: &Security) -> Result<Box<dyn Migration>, String> {
        Err("there is none".into())
    }
    fn recovery(&self, _: &str, _: &str, _: &Security) -> Result<Box<dyn Migration>, String> {
        Err("there is none".into())
    }
    fn recording(&self) -> Result<Box<dyn Recording>, String> {
        Err("there is none".into())
    }
    fn snapshots(&self) -> Option<&dyn GuestSnapshots> {
        Some(self)
    }
    fn missing(&self) -> Option<Missing> {
        self.missing.clone()
    }
}

impl GuestSnapshots for Slow {
    fn save(
        &self,
        request: &SnapshotRequest,
        cancelled: &AtomicBool,
    ) -> Result<SnapshotReport, String> {
        self.note("snapshot");
        let end = self.ends.lock().unwrap().recv();
        end.unwrap_or_else(|_| {
            while !cancelled.load(Ordering::Relaxed) {
                std::thread::yield_now();
            }
            Err("cancelled".into())
        })?;
        Ok(SnapshotReport {
            path: request.path.clone(),
            ..SnapshotReport::default()
        })
    }
}

fn rig(missing: Option<Missing>) -> (Vmm, Arc<Slow>, mpsc::Sender<Result<(), String>>) {
    let (end, ends) = mpsc::channel();
    let guest = Arc::new(Slow {
        calls: Mutex::default(),
        ends: Mutex::new(ends),
        missing,
    });
    (Vmm::new(Arc::clone(&guest) as _, true).unwrap(), guest, end)
}

fn wish(then: Then) -> SnapshotRequest {
    SnapshotRequest {
        path: "/tmp/guest.snap".into(),
        compress: Compress::Auto,
        live: false,
        force: false,
        then,
        state_version: None,
    }
}

/// Begins one, and returns once it is being written.
fn begin(
    vmm: &Vmm,
    guest: &Slow,
    then: Then,
) -> std::thread::JoinHandle<Result<SnapshotReport, Refusal>> {
    let writing = vmm.clone();
    let thread = std::thread::spawn(move || writing.snapshot(&wish(then)));
    while !guest.calls.lock().unwrap().contains(&"snapshot") && !thread.is_finished() {
        std::thread::yield_now();
    }
    thread
}

#[test]
fn meanwhile_no_other_operation_has_the_guest() {
    let (vmm, guest, end) = rig(None);
    let thread = begin(&vmm, &guest, Then::Resume);
    for sentence in [
        is_conflict(vmm.pause()),
        is_conflict(vmm.resume()),
        is_conflict(vmm.migrate(&request("tcp:there:1"))),
        is_conflict(vmm.record(&RecordRequest::default())),
        is_conflict(vmm.snapshot(&wish(Then::Resume))),
        vmm.status().explanation,
    ] {
        assert!(
            sentence.contains("being written to /tmp/guest.snap"),
            "{sentence}"
        );
    }
    assert_eq!(vmm.status().state, StateName::Running);
    end.send(Ok(())).unwrap();
    thread.join().unwrap().unwrap();
    assert_eq!(vmm.status().state, StateName::Running);
    vmm.pause().unwrap();
    assert_eq!(*guest.calls.lock().unwrap(), ["snapshot", "pause"]);
}

#[test]
fn what_becomes_of_the_guest_is_what_was_asked_for() {
    for (then, result, state) in [
        (Then::Pause, Ok(()), StateName::Paused),
        (Then::Stop, Ok(()), StateName::Ended),
        (
            Then::Pause,
            Err("the disk is full".to_owned()),
            StateName::Running,
        ),
        (
            Then::Stop,
            Err("the disk is full".to_owned()),
            StateName::Running,
        ),
    ] {
        let (vmm, guest, end) = rig(None);
        end.send(result.clone()).unwrap();
        let outcome = begin(&vmm, &guest, then).join().unwrap();
        assert_eq!(outcome.is_ok(), result.is_ok());
        assert_eq!(vmm.status().state, state, "{then:?} {result:?}");
        assert_eq!(vmm.outcome().is_some(), state == StateName::Ended);
    }
}

#[test]
fn cancel_and_stop_end_it() {
    let (vmm, guest, end) = rig(None);
    drop(end);
    let thread = begin(&vmm, &guest, Then::Stop);
    vmm.cancel().unwrap();
    assert!(thread.join().unwrap().is_err());
    assert_eq!(vmm.status().state, StateName::Running);
    is_conflict(vmm.cancel());
    let (vmm, guest, end) = rig(None);
    drop(end);
    let thread = begin(&vmm, &guest, Then::Resume);
    vmm.stop().unwrap();
    assert!(thread.join().unwrap().is_err());
    assert_eq!(vmm.status().state, StateName::Ended);
}

#[test]
fn a_guest_that_lacks_pages_is_not_written() {
    let missing = Missing {
        pages: 77,
        file: Some("/tmp/old.snap".into()),
        ..Missing::default()
    };
    let (vmm, guest, _end) = rig(Some(missing));
    let sentence = is_conflict(vmm.snapshot(&wish(Then::Resume)));
    assert!(sentence.contains("77 pages"), "{sentence}");
    let status = vmm.status();
    assert!(
        status
            .explanation
            .contains("77 of its pages are still to be read from /tmp/old.snap")
    );
    assert_eq!(status.missing.map(|missing| missing.pages), Some(77));
    assert!(guest.calls.lock().unwrap().is_empty());
}
