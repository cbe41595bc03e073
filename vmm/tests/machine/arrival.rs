//! A source hears that its guest has arrived when the destination's owner has it in its books, and
//! not before.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ferry_migration::options::{Handover, Options, PolicyKind, Tracking};
use ferry_migration::report::{Event, Phase, Status};
use ferry_vmm::api::Control;
use ferry_vmm::api::types::StateName;
use ferry_vmm::machine::{Backends, Machine};
use ferry_vmm::migrate::{Arrival, Handle, Listener, Owner, ReceiveState, Receiver, Uri, migrate};
use ferry_vmm::vmm::{MachineGuest, Vmm};

use crate::support::{COUNT, COUNTER, kvm, machine, progresses};

/// How long an owner may take over its books here: far longer than a message takes to get from one
/// side to the other.
const SLOW: Duration = Duration::from_millis(300);

fn moves(uri: &Uri, options: &Options) {
    let source = Arc::new(machine(Machine::builder(), &COUNT));
    source.resume().unwrap();
    progresses(&source, COUNTER);
    let listener = Listener::bind(uri).unwrap();
    let to = listener.local_uri().clone();
    let vmm = Vmm::receiving(to.to_string()).unwrap();
    let booked = Arc::new(AtomicBool::new(false));
    let arrived = Arc::new(Mutex::new(None));
    let (books, done, kept) = (vmm.clone(), Arc::clone(&booked), Arc::clone(&arrived));
    let owner = move |arrival| {
        if let Arrival::Arrived { machine, .. } = &arrival {
            *kept.lock().unwrap() = Some(Arc::clone(machine));
            std::thread::sleep(SLOW);
            MachineGuest::book(&books, "there", arrival);
            done.store(true, Ordering::SeqCst);
        } else {
            MachineGuest::book(&books, "there", arrival);
        }
    };
    let receiver = Receiver::of(
        listener,
        Arc::new(|| Ok(Box::new(std::io::sink()) as _)),
        Backends::default(),
        Tracking::Auto,
        Arc::new(owner),
    )
    .unwrap();
    let mut heard = |event| {
        if let Event::Progress(progress) = event
            && matches!(progress.phase, Phase::PostCopy | Phase::Completed)
        {
            assert!(booked.load(Ordering::SeqCst), "{progress:?}");
        }
    };
    let report = migrate(&source, &to, options, &Handle::new(), &mut heard);
    assert_eq!(report.status, Status::Completed, "{report:#?}");
    assert!(booked.load(Ordering::SeqCst), "{report:#?}");
    let status = vmm.status();
    assert_eq!(status.state, StateName::Running, "{status:#?}");
    assert!(status.missing.is_none(), "{status:#?}");
    drop(receiver);
    let machine = arrived.lock().unwrap().take().unwrap();
    progresses(&machine, COUNTER);
    vmm.pause().unwrap();
    vmm.stop().unwrap();
}

#[test]
fn a_source_hears_of_its_guest_when_that_is_booked() {
    if !kvm() {
        return;
    }
    let tcp = "tcp:127.0.0.1:0".parse().unwrap();
    for policy in [
        PolicyKind::Precopy,
        PolicyKind::Postcopy,
        PolicyKind::Hybrid,
    ] {
        let options = Options {
            policy,
            ..Options::default()
        };
        moves(&tcp, &options);
    }
    let dir = tempfile::tempdir().unwrap();
    let options = Options {
        handover: Handover::On,
        ..Options::default()
    };
    moves(&Uri::Unix(dir.path().join("link")), &options);
}

/// An owner that was told to stop, and says so when it is asked first or last.
struct Stopped {
    wants: bool,
}

const STOPPED: &str = "this receiver was told to stop";

impl Owner for Stopped {
    fn wants(&self) -> Result<(), String> {
        if self.wants {
            Ok(())
        } else {
            Err(STOPPED.into())
        }
    }

    fn claim(&self) -> Result<(), String> {
        Err(STOPPED.into())
    }

    fn arrival(&self, arrival: Arrival) {
        assert!(!matches!(arrival, Arrival::Arrived { .. }), "{arrival:?}");
    }
}

/// A receiver that is stopped in the pause takes no guest: the source is told before its commit, or
/// that its guest was not started.
#[test]
fn a_stopped_receiver_starts_no_guest() {
    if !kvm() {
        return;
    }
    for wants in [false, true] {
        let source = Arc::new(machine(Machine::builder(), &COUNT));
        source.resume().unwrap();
        progresses(&source, COUNTER);
        let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
        let to = listener.local_uri().clone();
        let receiver = Receiver::of(
            listener,
            Arc::new(|| Ok(Box::new(std::io::sink()) as _)),
            Backends::default(),
            Tracking::Auto,
            Arc::new(Stopped { wants }),
        )
        .unwrap();
        let report = migrate(
            &source,
            &to,
            &Options::default(),
            &Handle::new(),
            &mut |_| {},
        );
        assert_ne!(report.status, Status::Completed, "{report:#?}");
        let why = report.error.unwrap();
        assert!(why.contains(STOPPED), "{why}");
        if !wants {
            assert_eq!(report.status, Status::Failed);
            progresses(&source, COUNTER);
        }
        while receiver.state() != ReceiveState::Waiting {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// A panic while a guest arrives fails its migration, the owner hears of it, and the next comes.
#[test]
fn a_panic_of_the_receiver_costs_one_migration() {
    if !kvm() {
        return;
    }
    let source = Arc::new(machine(Machine::builder(), &COUNT));
    source.resume().unwrap();
    progresses(&source, COUNTER);
    let first = AtomicBool::new(true);
    let serial = move || {
        assert!(!first.swap(false, Ordering::SeqCst), "no console today");
        Ok(Box::new(std::io::sink()) as _)
    };
    let uri = "tcp:127.0.0.1:0".parse().unwrap();
    let receiver = Receiver::bind(&uri, Arc::new(serial)).unwrap();
    let to = receiver.local_uri().clone();
    let options = Options::default();
    let report = migrate(&source, &to, &options, &Handle::new(), &mut |_| {});
    assert_eq!(report.status, Status::Failed, "{report:#?}");
    progresses(&source, COUNTER);
    match receiver.wait(Duration::from_secs(30)) {
        Some(Arrival::Failed(why)) => assert!(why.contains("no console today"), "{why}"),
        other => panic!("{other:?}"),
    }
    let report = migrate(&source, &to, &options, &Handle::new(), &mut |_| {});
    assert_eq!(report.status, Status::Completed, "{report:#?}");
    let Some(Arrival::Arrived { machine, .. }) = receiver.wait(Duration::from_secs(30)) else {
        panic!("no guest");
    };
    progresses(&machine, COUNTER);
    machine.stop();
}
