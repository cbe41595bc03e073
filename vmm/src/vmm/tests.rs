//! Every state against every request, with a guest and a migration that do as the test says.

mod busy;
mod looking_on;
mod recording;
mod snapshot;
mod without;

use super::*;
use crate::api::events::{Next, Subscription};
use crate::api::types::{GuestInfo, MigrateRequest, RecoverRequest, Security, StateName};
use crate::api::{Control, Refusal};
use ferry_migration::report::{Phase, Progress};
use ferry_migration::source::Owner;
use ferry_migration::steering::{Change, SteeringError};
use std::sync::mpsc;
use std::time::Duration;

/// What the scripted migration does next.
enum Step {
    Event(Event),
    End(report::Status),
    Panic(Phase),
}

#[derive(Default)]
struct Journal {
    calls: Mutex<Vec<&'static str>>,
    progress: Mutex<Progress>,
    /// The guest's processors stand still.
    stands: AtomicBool,
    /// The guest's disks were written on the other side.
    written: AtomicBool,
}

impl Journal {
    fn note(&self, call: &'static str) {
        self.calls.lock().unwrap().push(call);
    }
    fn calls(&self) -> Vec<&'static str> {
        std::mem::take(&mut *self.calls.lock().unwrap())
    }
}

struct FakeGuest {
    journal: Arc<Journal>,
    steps: Mutex<Option<mpsc::Receiver<Step>>>,
}

struct FakeMigration {
    journal: Arc<Journal>,
    steps: mpsc::Receiver<Step>,
}

impl Guest for FakeGuest {
    fn info(&self) -> GuestInfo {
        GuestInfo {
            name: None,
            memory_bytes: 4096,
            memory: None,
            cpus: 1,
        }
    }
    fn pause(&self) -> Result<(), String> {
        self.journal.note("pause");
        Ok(())
    }
    fn resume(&self) -> Result<(), String> {
        self.journal.note("resume");
        Ok(())
    }
    fn take_over(&self) -> Result<(), String> {
        self.journal.note("take over");
        Ok(())
    }
    fn is_running(&self) -> bool {
        !self.journal.stands.load(Ordering::SeqCst)
    }
    fn check_disks(&self) -> Result<(), String> {
        if self.journal.written.load(Ordering::SeqCst) {
            return Err("the disk was written; --force insists".into());
        }
        Ok(())
    }
    fn stop(&self) {
        self.journal.note("stop");
    }
    fn power_button(&self) -> Result<(), String> {
        self.journal.note("power-button");
        Ok(())
    }
    fn input(&self, bytes: &[u8]) -> usize {
        self.journal.note("input");
        bytes.len()
    }
    fn migration(&self, uri: &str, _: &Security) -> Result<Box<dyn Migration>, String> {
        if uri == "bad" {
            return Err("bad is no URI".into());
        }
        let steps = self.steps.lock().unwrap().take().unwrap();
        Ok(Box::new(FakeMigration {
            journal: Arc::clone(&self.journal),
            steps,
        }))
    }

    fn recording(&self) -> Result<Box<dyn Recording>, String> {
        self.journal.note("log on");
        Ok(recording::fake(&self.journal))
    }

    fn recovery(&self, uri: &str, _: &str, _: &Security) -> Result<Box<dyn Migration>, String> {
        self.journal.note("recovery");
        let status = match uri {
            "tcp:there:1" => report::Status::InDoubt,
            "tcp:half:1" => report::Status::Interrupted,
            _ => report::Status::Completed,
        };
        Ok(Box::new(FakeRecovery(Arc::clone(&self.journal), status)))
    }
}

/// A recovery that ends like this.
struct FakeRecovery(Arc<Journal>, report::Status);

impl Migration for FakeRecovery {
    fn handle(&self) -> Arc<dyn MigrationHandle> {
        Arc::clone(&self.0) as _
    }
    fn run(self: Box<Self>, _: &Options, _: &mut dyn FnMut(Event)) -> Report {
        let error = (self.1 != report::Status::Completed).then(|| "no answer from there".into());
        Report {
            status: self.1,
            error,
            ..Report::broken(&Progress::default(), Owner::Source, "a fake")
        }
    }
}

impl TakeOver for Journal {
    fn take_over(&self, _: bool) -> Result<(), String> {
        self.note("take over");
        Ok(())
    }
}

impl MigrationHandle for Journal {
    fn cancel(&self) -> bool {
        self.note("cancel");
        self.progress().phase != Phase::Committed
    }
    fn steer(&self, change: &Change) -> Result<(), SteeringError> {
        self.note("steer");
        match self.owner() {
            Owner::Source => change
                .applied_to(&Options::default())
                .check()
                .map_err(SteeringError::from),
            _ => Err(SteeringError::TooLate),
        }
    }
    fn session(&self) -> String {
        "m1".into()
    }
    fn progress(&self) -> Progress {
        self.progress.lock().unwrap().clone()
    }
    fn owner(&self) -> Owner {
        match self.progress().phase {
            Phase::Committed => Owner::InDoubt,
            _ => Owner::Source,
        }
    }
}

impl Migration for FakeMigration {
    fn handle(&self) -> Arc<dyn MigrationHandle> {
        Arc::clone(&self.journal) as _
    }
    fn run(self: Box<Self>, _: &Options, events: &mut dyn FnMut(Event)) -> Report {
        loop {
            match self.steps.recv().unwrap() {
                Step::Event(event) => events(event),
                Step::End(status) => {
                    let report = Report {
                        status,
                        downtime_ms: 12.34,
                        ..Report::broken(&Progress::default(), Owner::Source, "a fake")
                    };
                    // Engines may or may not say it themselves: it must arrive once.
                    events(Event::Report(Box::new(report.clone())));
                    return report;
                }
                Step::Panic(phase) => {
                    self.journal.progress.lock().unwrap().phase = phase;
                    panic!("the test's own");
                }
            }
        }
    }
}

fn refused(steered: Result<(), Refusal>) -> (u16, &'static str, String) {
    match steered {
        Err(Refusal::Coded {
            status,
            code,
            sentence,
        }) => (status, code, sentence),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_migration_is_steered_while_it_runs_and_at_no_other_time() {
    let change = Change {
        downtime: Some(Duration::from_secs(1)),
        ..Change::default()
    };
    let rig = Rig::new();
    let (status, code, sentence) = refused(rig.vmm.steer(&change));
    assert_eq!((status, code), (409, "not-migrating"), "{sentence}");
    let events = rig.begin();
    assert_eq!(rig.vmm.steer(&change), Ok(()));
    let slow = Change {
        bandwidth: Some(Some(1)),
        ..Change::default()
    };
    let (status, code, sentence) = refused(rig.vmm.steer(&slow));
    assert_eq!((status, code), (400, "invalid"), "{sentence}");
    assert!(sentence.contains("4096"), "{sentence}");
    rig.journal.progress.lock().unwrap().phase = Phase::Committed;
    let (status, code, sentence) = refused(rig.vmm.steer(&change));
    assert_eq!((status, code), (409, "too-late"), "{sentence}");
    assert!(sentence.contains("tcp:there:1"), "{sentence}");
    rig.end(&events, Step::End(report::Status::Completed));
    assert_eq!(refused(rig.vmm.steer(&change)).1, "too-late");
}

struct Rig {
    vmm: Vmm,
    journal: Arc<Journal>,
    steps: mpsc::Sender<Step>,
}

impl Rig {
    fn new() -> Self {
        let journal = Arc::new(Journal::default());
        let (steps, receiver) = mpsc::channel();
        let guest = FakeGuest {
            journal: Arc::clone(&journal),
            steps: Mutex::new(Some(receiver)),
        };
        Self {
            vmm: Vmm::new(Arc::new(guest), true).unwrap(),
            journal,
            steps,
        }
    }

    fn begin(&self) -> Subscription {
        self.vmm.migrate(&request("tcp:there:1")).unwrap()
    }

    /// Ends the migration; what its listener heard.
    fn end(&self, events: &Subscription, step: Step) -> Vec<Event> {
        self.steps.send(step).unwrap();
        let heard = drain(events);
        // The report comes with the state changed, or about to be under the lock we take next.
        assert_ne!(self.vmm.status().state, StateName::Migrating);
        heard
    }

    fn migrated(status: report::Status) -> Self {
        let rig = Self::new();
        let events = rig.begin();
        rig.end(&events, Step::End(status));
        rig.journal.calls();
        rig
    }

    fn state(&self) -> StateName {
        self.vmm.status().state
    }
}

fn drain(events: &Subscription) -> Vec<Event> {
    let mut heard = Vec::new();
    loop {
        match events.next(Duration::from_secs(60)) {
            Next::Event(e) => heard.push(*e),
            Next::Closed => return heard,
            Next::Lost(_) => {}
            Next::Idle => panic!("the migration's end was not told"),
        }
    }
}

fn request(uri: &str) -> MigrateRequest {
    MigrateRequest {
        uri: uri.into(),
        ..MigrateRequest::default()
    }
}

fn is_conflict<T>(result: Result<T, Refusal>) -> String {
    match result {
        Err(Refusal::Conflict(sentence)) => sentence,
        Err(e) => panic!("{e:?} is no conflict"),
        Ok(_) => panic!("it was allowed"),
    }
}

#[test]
fn pauses_and_resumes_once() {
    let rig = Rig::new();
    rig.vmm.pause().unwrap();
    rig.vmm.pause().unwrap();
    assert_eq!(rig.state(), StateName::Paused);
    rig.vmm.resume().unwrap();
    rig.vmm.resume().unwrap();
    assert_eq!(rig.journal.calls(), ["pause", "resume"]);
    is_conflict(rig.vmm.cancel());
    is_conflict(rig.vmm.recover(&RecoverRequest {
        take_over: true,
        ..RecoverRequest::default()
    }));
}

#[test]
fn a_migrating_guest_is_left_alone() {
    let rig = Rig::new();
    let events = rig.begin();
    rig.steps
        .send(Step::Event(Event::Progress(Progress {
            round: 3,
            ..Progress::default()
        })))
        .unwrap();
    assert_eq!(rig.state(), StateName::Migrating);
    assert!(rig.vmm.status().migration.is_some() && rig.vmm.migration().progress.is_some());
    is_conflict(rig.vmm.pause());
    is_conflict(rig.vmm.resume());
    is_conflict(rig.vmm.recover(&RecoverRequest {
        take_over: true,
        ..RecoverRequest::default()
    }));
    let sentence = is_conflict(rig.vmm.migrate(&request("tcp:elsewhere:1")));
    assert!(
        sentence.contains("tcp:there:1") && sentence.contains("ferry cancel"),
        "{sentence}"
    );
    assert_eq!(rig.journal.calls(), [""; 0]);
    rig.vmm.cancel().unwrap();
    assert_eq!(rig.journal.calls(), ["cancel"]);
    let heard = rig.end(&events, Step::End(report::Status::Cancelled));
    assert_eq!(heard.len(), 2, "progress and one report: {heard:?}");
    assert_eq!(rig.state(), StateName::Running);
    assert!(rig.vmm.outcome().is_none());
    assert_eq!(
        rig.vmm.migration().report.unwrap().status,
        report::Status::Cancelled
    );
}

#[test]
fn bad_requests_change_nothing() {
    let rig = Rig::new();
    let result = rig.vmm.migrate(&request("bad")).map(drop);
    assert_eq!(result, Err(Refusal::Invalid("bad is no URI".into())));
    let options = Options {
        channels: Some(0),
        ..Options::default()
    };
    let result = rig.vmm.migrate(&MigrateRequest {
        options,
        ..request("tcp:there:1")
    });
    assert!(matches!(result, Err(Refusal::Invalid(_))));
    assert_eq!(rig.state(), StateName::Running);
}

#[test]
fn a_moved_guest_never_runs_here_again() {
    let rig = Rig::migrated(report::Status::Completed);
    assert_eq!(rig.state(), StateName::Moved);
    is_conflict(rig.vmm.resume());
    is_conflict(rig.vmm.pause());
    is_conflict(rig.vmm.migrate(&request("tcp:there:1")));
    is_conflict(rig.vmm.recover(&RecoverRequest {
        take_over: true,
        ..RecoverRequest::default()
    }));
    rig.vmm.stop().unwrap();
    rig.vmm.guest_ended(Ending::Shutdown);
    assert_eq!(rig.journal.calls(), [""; 0]);
    let outcome = rig.vmm.outcome().unwrap();
    assert!(outcome.success);
    assert_eq!(
        outcome.sentence,
        "the guest has moved to tcp:there:1 (downtime 12.3 ms)"
    );
    assert_eq!(rig.vmm.finished_event().read().unwrap(), 1);
}

#[test]
fn a_guest_in_doubt_runs_only_on_the_operators_word() {
    let rig = Rig::migrated(report::Status::InDoubt);
    assert_eq!(rig.state(), StateName::InDoubt);
    assert!(
        rig.vmm.outcome().is_none(),
        "the VMM stays and keeps everything"
    );
    let sentence = is_conflict(rig.vmm.resume());
    assert!(sentence.contains("--take-over"), "{sentence}");
    is_conflict(rig.vmm.pause());
    is_conflict(rig.vmm.migrate(&request("tcp:there:1")));
    rig.vmm.guest_ended(Ending::Shutdown);
    assert_eq!(rig.journal.calls(), [""; 0]);
    rig.vmm
        .recover(&RecoverRequest {
            take_over: true,
            ..RecoverRequest::default()
        })
        .unwrap();
    assert_eq!(
        (rig.state(), rig.journal.calls()),
        (StateName::Running, vec!["take over"])
    );
}

#[test]
fn a_guest_in_doubt_is_discarded_only_when_asked_twice_or_by_stop() {
    let rig = Rig::migrated(report::Status::InDoubt);
    let told = rig.vmm.interrupt("on SIGTERM").unwrap();
    assert!(told.contains("only copy"), "{told}");
    assert_eq!(rig.state(), StateName::InDoubt);
    assert_eq!(rig.vmm.interrupt("on SIGTERM"), None);
    assert_eq!(
        (rig.state(), rig.journal.calls()),
        (StateName::Ended, vec!["stop"])
    );

    let rig = Rig::migrated(report::Status::InDoubt);
    rig.vmm.stop().unwrap();
    assert_eq!(
        (rig.state(), rig.journal.calls()),
        (StateName::Ended, vec!["stop"])
    );
}

#[test]
fn stop_waits_for_the_migration_it_cancels() {
    for (status, state, stopped) in [
        (report::Status::Cancelled, StateName::Ended, vec!["stop"]),
        (report::Status::Failed, StateName::Ended, vec!["stop"]),
        // Too late: it is over there, or may be.
        (report::Status::Completed, StateName::Moved, vec![]),
        (report::Status::InDoubt, StateName::InDoubt, vec![]),
    ] {
        let rig = Rig::new();
        let events = rig.begin();
        rig.vmm.stop().unwrap();
        assert_eq!(
            (rig.state(), rig.journal.calls()),
            (StateName::Migrating, vec!["cancel"])
        );
        rig.end(&events, Step::End(status));
        assert_eq!(
            (rig.state(), rig.journal.calls()),
            (state, stopped),
            "{status:?}"
        );
    }
}

#[test]
fn a_guest_that_ends_while_it_migrates_has_ended() {
    let rig = Rig::new();
    let events = rig.begin();
    rig.vmm.guest_ended(Ending::Shutdown);
    rig.vmm.stop().unwrap();
    rig.end(&events, Step::End(report::Status::Cancelled));
    assert_eq!(
        rig.vmm.outcome().unwrap().sentence,
        "the guest has shut down"
    );
}

#[test]
fn a_paused_guest_is_paused_again_after_a_failure() {
    let rig = Rig::new();
    rig.vmm.pause().unwrap();
    let events = rig.begin();
    rig.end(&events, Step::End(report::Status::Failed));
    assert_eq!(rig.state(), StateName::Paused);
}

#[test]
fn an_engine_that_panics_leaves_doubt_only_after_the_commit() {
    for (phase, state) in [
        (Phase::Live, StateName::Running),
        (Phase::Committed, StateName::InDoubt),
    ] {
        let rig = Rig::new();
        let events = rig.begin();
        let heard = rig.end(&events, Step::Panic(phase));
        assert!(matches!(heard.last(), Some(Event::Report(_))), "{heard:?}");
        assert_eq!(rig.state(), state);
    }
}

#[test]
fn endings_are_told() {
    let rig = Rig::new();
    rig.vmm
        .guest_ended(Ending::Failed("the CPU gave up".into()));
    rig.vmm.guest_ended(Ending::Shutdown);
    let outcome = rig.vmm.outcome().unwrap();
    assert_eq!(
        (outcome.success, outcome.sentence.as_str()),
        (false, "the guest cannot go on: the CPU gave up")
    );
    is_conflict(rig.vmm.resume());
    is_conflict(rig.vmm.pause());
    is_conflict(rig.vmm.migrate(&request("tcp:there:1")));
}

#[test]
fn the_destination_can_be_asked_again() {
    let rig = Rig::migrated(report::Status::InDoubt);
    let asked = rig.vmm.recover(&RecoverRequest::default());
    assert_eq!(asked, Err(Refusal::Failed("no answer from there".into())));
    assert_eq!(rig.state(), StateName::InDoubt, "no answer is no knowledge");
    let elsewhere = RecoverRequest {
        uri: Some("tcp:moved:2".into()),
        take_over: false,
        ..RecoverRequest::default()
    };
    rig.vmm.recover(&elsewhere).unwrap();
    assert_eq!(rig.journal.calls(), ["recovery", "recovery"]);
    assert_eq!(
        rig.vmm.outcome().unwrap().sentence,
        "the guest has moved to tcp:moved:2 (downtime 12.3 ms)"
    );
    is_conflict(rig.vmm.recover(&RecoverRequest {
        take_over: true,
        ..RecoverRequest::default()
    }));
    is_conflict(rig.vmm.resume());
}

#[test]
fn a_cancel_that_comes_too_late_is_told_so() {
    let rig = Rig::new();
    let events = rig.begin();
    rig.journal.progress.lock().unwrap().phase = Phase::Committed;
    assert!(is_conflict(rig.vmm.cancel()).starts_with("too late"));
    // The pages that are here may be the only ones.
    let kept = is_conflict(rig.vmm.stop());
    assert!(kept.contains("ends by itself"), "{kept}");
    assert_eq!(rig.vmm.interrupt("on SIGTERM"), Some(kept));
    let told = rig.vmm.status().explanation;
    assert!(!told.contains("cancel"), "{told}");
    rig.end(&events, Step::End(report::Status::Completed));
}

#[test]
fn a_guest_that_was_not_handed_over_waits_for_a_word() {
    let journal = Arc::new(Journal::default());
    let doubtful = || {
        let vmm = Vmm::receiving("tcp:0.0.0.0:7".into()).unwrap();
        vmm.arrival_in_doubt("the source fell silent".into(), Arc::clone(&journal) as _);
        assert_eq!(vmm.status().state, StateName::InDoubt);
        vmm
    };
    let guest = || FakeGuest {
        journal: Arc::clone(&journal),
        steps: Mutex::new(None),
    };
    let vmm = doubtful();
    for result in [
        vmm.pause(),
        vmm.resume(),
        vmm.cancel(),
        vmm.recover(&RecoverRequest::default()),
    ] {
        assert!(is_conflict(result).contains("the source fell silent"));
    }
    vmm.recover(&RecoverRequest {
        take_over: true,
        ..RecoverRequest::default()
    })
    .unwrap();
    assert_eq!(journal.calls(), ["take over"]);
    vmm.arrived(Arc::new(guest()), true);
    assert_eq!(vmm.status().state, StateName::Running);

    // The source has spoken: it keeps its guest.
    let vmm = doubtful();
    vmm.arrival_failed("tcp:0.0.0.0:7".into());
    assert_eq!(vmm.status().state, StateName::Receiving);

    // The source has found its word again.
    let vmm = doubtful();
    vmm.arrived(Arc::new(guest()), false);
    assert_eq!(vmm.status().state, StateName::Paused);

    let vmm = doubtful();
    assert!(vmm.interrupt("on SIGINT").unwrap().contains("only copy"));
    assert_eq!(vmm.status().state, StateName::InDoubt);
    assert_eq!(vmm.interrupt("on SIGINT"), None);
    assert_eq!(vmm.status().state, StateName::Ended);
}

#[test]
fn receives_one_guest() {
    let vmm = Vmm::receiving("tcp:0.0.0.0:7".into()).unwrap();
    assert_eq!(vmm.status().listening.as_deref(), Some("tcp:0.0.0.0:7"));
    assert!(vmm.status().guest.is_none());
    for result in [
        vmm.pause(),
        vmm.resume(),
        vmm.cancel(),
        vmm.migrate(&request("x")).map(drop),
    ] {
        assert!(is_conflict(result).contains("waits on tcp:0.0.0.0:7"));
    }
    assert_eq!(vmm.input(b"dropped"), 7);
    let journal = Arc::new(Journal::default());
    let guest = || FakeGuest {
        journal: Arc::clone(&journal),
        steps: Mutex::new(None),
    };
    vmm.arrived(Arc::new(guest()), true);
    assert_eq!(vmm.status().state, StateName::Running);
    assert_eq!(vmm.input(b"x"), 1);
    assert_eq!(journal.calls(), ["input"]);

    let vmm = Vmm::receiving("tcp:0.0.0.0:7".into()).unwrap();
    vmm.stop().unwrap();
    vmm.arrived(Arc::new(guest()), true);
    assert_eq!(
        (vmm.status().state, journal.calls()),
        (StateName::Ended, vec!["stop"])
    );
}

#[test]
fn an_interrupted_guest_is_kept_until_its_pages_are_there() {
    let rig = Rig::migrated(report::Status::Interrupted);
    assert_eq!(rig.state(), StateName::Interrupted);
    let recover = |uri: &str, take_over| {
        rig.vmm.recover(&RecoverRequest {
            uri: Some(uri.into()),
            take_over,
            ..RecoverRequest::default()
        })
    };
    // The guest runs over there: no second copy, on any request.
    let refusal = recover("tcp:b:1", true).unwrap_err().to_string();
    assert!(refusal.contains("second copy"), "{refusal}");
    assert!(rig.vmm.resume().is_err());
    let kept = rig.vmm.interrupt("on SIGTERM").unwrap();
    assert!(
        kept.contains("only copy") && kept.contains("pages"),
        "{kept}"
    );
    // Broken again: as before. No listener there: as before.
    for uri in ["tcp:half:1", "tcp:there:1"] {
        assert!(recover(uri, false).is_err());
        assert_eq!(rig.state(), StateName::Interrupted);
    }
    recover("tcp:b:1", false).unwrap();
    assert_eq!(rig.state(), StateName::Moved);
}

/// A receiver that was told to stop takes no guest: the source is told before it commits, or that
/// it was not started.
#[test]
fn a_stopped_receiver_claims_no_guest() {
    let vmm = Vmm::receiving("tcp:0.0.0.0:7".into()).unwrap();
    vmm.wants_arrival().unwrap();
    vmm.stop().unwrap();
    assert!(vmm.wants_arrival().unwrap_err().contains("was ended"));
    assert!(vmm.claim_arrival().unwrap_err().contains("was ended"));
    assert_eq!(vmm.status().state, StateName::Ended);
}

/// From the commit on the guest is this VMM's: a stop waits until it runs and ends it then, and is
/// not the end of a receiver without a guest.
#[test]
fn a_stop_while_the_guest_starts_is_about_the_guest() {
    let journal = Arc::new(Journal::default());
    let guest = || FakeGuest {
        journal: Arc::clone(&journal),
        steps: Mutex::new(None),
    };
    let starting = || {
        let vmm = Vmm::receiving("tcp:0.0.0.0:7".into()).unwrap();
        vmm.claim_arrival().unwrap();
        vmm
    };
    let vmm = starting();
    assert!(vmm.interrupt("on SIGTERM").unwrap().contains("handed over"));
    assert!(vmm.outcome().is_none());
    vmm.arrived(Arc::new(guest()), true);
    assert_eq!(vmm.status().state, StateName::Ended);
    assert_eq!(journal.calls(), ["stop"]);

    let vmm = starting();
    vmm.arrived(Arc::new(guest()), true);
    assert_eq!(vmm.status().state, StateName::Running);

    // It could not be started: it may be the only copy, and is kept.
    let vmm = starting();
    vmm.stop().unwrap();
    vmm.arrival_in_doubt("it did not start".into(), Arc::clone(&journal) as _);
    assert_eq!(vmm.status().state, StateName::InDoubt);
}

/// After a migration that failed the machine is asked: a resume may have failed too.
#[test]
fn a_guest_that_could_not_be_resumed_is_paused() {
    let rig = Rig::new();
    let events = rig.begin();
    rig.journal.stands.store(true, Ordering::SeqCst);
    rig.end(&events, Step::End(report::Status::Failed));
    assert_eq!(rig.state(), StateName::Paused);
}

#[test]
fn a_take_over_of_old_memory_over_a_newer_disk_is_refused() {
    let rig = Rig::migrated(report::Status::InDoubt);
    rig.journal.written.store(true, Ordering::SeqCst);
    let mut request = RecoverRequest {
        take_over: true,
        ..RecoverRequest::default()
    };
    let why = is_conflict(rig.vmm.recover(&request));
    assert!(why.contains("--force"), "{why}");
    assert_eq!(
        (rig.state(), rig.journal.calls()),
        (StateName::InDoubt, vec![])
    );
    request.force = true;
    rig.vmm.recover(&request).unwrap();
    assert_eq!(rig.state(), StateName::Running);
}
