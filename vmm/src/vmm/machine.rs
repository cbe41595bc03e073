//! A [`Machine`] as a [`SourceVm`].

use super::configuration;
use super::{
    Ending, Guest, GuestBalloon, GuestConsole, GuestSnapshots, Migration, MigrationHandle, Missing,
    Recording, TakeOver, Vmm,
};
use crate::api::Refusal;
use crate::api::types::{
    ArrivalOutcome, BalloonRequest, BalloonStatus, Configuration, GuestInfo, IncomingReport,
    MemoryInfo, RecordStatus, Security, SnapshotReport, SnapshotRequest,
};
use crate::machine::{Exit, Machine, RunState};
use crate::migrate::{
    Arrival, Following, GuestInDoubt, Handle, Incoming, Owner, Peer, Uri, migrate, recover,
};
use crate::record::MachineRecording;
use crate::snapshot;
use ferry_devices::sync::lock;
use ferry_devices::thread;
use ferry_migration::options::Options;
use ferry_migration::report::{Event, Progress, Report};
use ferry_migration::source::Owner as GuestOwner;
use ferry_migration::steering::{Change, SteeringError};
use std::io;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

/// A machine, owned by a [`Vmm`].
#[derive(Debug)]
pub struct MachineGuest {
    machine: Arc<Machine>,
    workload: Option<String>,
    /// Its pages that are not here yet.
    following: Option<Following>,
    /// Where its last migration went.
    peer: Mutex<Option<Peer>>,
}

impl MachineGuest {
    /// Wraps the machine.
    #[must_use]
    pub fn new(machine: Arc<Machine>) -> Arc<Self> {
        Self::with(machine, None, None)
    }

    /// Wraps the machine, knowing what it runs (for people).
    #[must_use]
    pub fn with_workload(machine: Arc<Machine>, workload: Option<String>) -> Arc<Self> {
        Self::with(machine, None, workload)
    }

    /// Wraps a machine whose pages follow it.
    #[must_use]
    pub fn followed(machine: Arc<Machine>, following: Option<Following>) -> Arc<Self> {
        Self::with(machine, following, None)
    }

    fn with(
        machine: Arc<Machine>,
        following: Option<Following>,
        workload: Option<String>,
    ) -> Arc<Self> {
        Arc::new(Self {
            machine,
            workload,
            following,
            peer: Mutex::default(),
        })
    }

    /// Books what a [`Receiver`](crate::migrate::Receiver) at `listening` tells: the state is the
    /// new one when this returns. Returns what happened, a sentence for people.
    pub fn book(vmm: &Vmm, listening: &str, arrival: Arrival) -> String {
        let outcome = match &arrival {
            Arrival::Refused(_) => ArrivalOutcome::Refused,
            Arrival::Interrupted(_) => ArrivalOutcome::Interrupted,
            Arrival::Failed(_) => ArrivalOutcome::Failed,
            Arrival::Unreachable(_) => ArrivalOutcome::Unreachable,
            Arrival::InDoubt { .. } => ArrivalOutcome::InDoubt,
            Arrival::Complete => ArrivalOutcome::Complete,
            Arrival::Arrived { .. } => ArrivalOutcome::Arrived,
        };
        let sentence = Self::book_only(vmm, listening, arrival);
        vmm.tell_arrival(outcome, sentence.clone());
        sentence
    }

    fn book_only(vmm: &Vmm, listening: &str, arrival: Arrival) -> String {
        match arrival {
            Arrival::Refused(sentence) | Arrival::Interrupted(sentence) => sentence,
            Arrival::Failed(sentence) => {
                vmm.arrival_failed(listening.to_owned());
                sentence
            }
            Arrival::Unreachable(why) => {
                let sentence = format!("no guest can arrive at {listening} any more: {why}");
                vmm.listening_ended(&sentence);
                sentence
            }
            Arrival::InDoubt { why, guest } => {
                vmm.arrival_in_doubt(why.clone(), Arc::new(guest));
                why
            }
            Arrival::Complete => "all of the guest's memory has arrived".into(),
            Arrival::Arrived { machine, following } => {
                let running = machine.run_state() == RunState::Running;
                let guest = Self::followed(machine, following);
                vmm.arrived(Arc::clone(&guest) as _, running);
                // It runs, and that matters more than its own end.
                match (guest.watch(vmm), running) {
                    (Err(e), _) => format!(
                        "the guest has arrived; its end cannot be watched for ({e}): end it with `ferry stop`"
                    ),
                    (Ok(()), true) => "the guest has arrived and runs here".into(),
                    (Ok(()), false) => {
                        "the guest has arrived, paused as it was; `ferry resume` lets it run".into()
                    }
                }
            }
        }
    }

    /// From now on the VMM is told when the guest ends by itself.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn watch(&self, vmm: &Vmm) -> io::Result<()> {
        let (machine, vmm) = (Arc::clone(&self.machine), vmm.clone());
        let following = self.following.clone();
        let failed = vmm.clone();
        let watch = move || {
            let exit = machine.wait();
            if let Some(following) = following.filter(|f| f.left() > 0) {
                following.abandon();
            }
            if let Some(ending) = ending(exit) {
                vmm.guest_ended(ending);
            }
            Ok(())
        };
        // Without its watcher a guest that has ended would keep its VMM for ever.
        let failure = move |why| failed.guest_ended(Ending::Failed(why));
        thread::spawn(thread::Kind::Vmm, "ferry-watch", watch, failure).map(drop)
    }
}

/// What the exit of a machine says of its guest; `None` when the VMM itself has stopped it, and
/// knows.
fn ending(exit: Exit) -> Option<Ending> {
    match exit {
        Exit::Shutdown => Some(Ending::Shutdown),
        Exit::Reset => Some(Ending::Reset),
        Exit::TripleFault => Some(Ending::TripleFault),
        Exit::Failure(why) => Some(Ending::Failed(why)),
        Exit::Stopped => None,
    }
}

impl Guest for MachineGuest {
    fn info(&self) -> GuestInfo {
        let d = self.machine.description();
        GuestInfo {
            name: Some(d.name.clone()),
            memory_bytes: d.memory,
            cpus: d.cpus,
            memory: Some(MemoryInfo::of(self.machine.ram())),
        }
    }

    fn pause(&self) -> Result<(), String> {
        if let Some(missing) = self.missing().filter(|missing| missing.lost.is_some()) {
            return Err(format!(
                "{} pages of the guest are missing here; it may be waiting for one, which a pause cannot end; \
                 `ferry recover` at the source brings them",
                missing.pages
            ));
        }
        self.machine
            .pause()
            .map_err(|e| e.to_string())?
            .keep_paused();
        Ok(())
    }

    fn resume(&self) -> Result<(), String> {
        self.machine.resume().map_err(|e| e.to_string())
    }

    fn take_over(&self) -> Result<(), String> {
        self.machine.take_over().map_err(|e| e.to_string())
    }

    fn is_running(&self) -> bool {
        self.machine.run_state() == RunState::Running
    }

    fn check_disks(&self) -> Result<(), String> {
        self.machine.check_disks()
    }

    fn stop(&self) {
        self.machine.stop();
        // In this order: a vCPU that waits for a page goes on with zeros, straight out of the
        // guest.
        if let Some(following) = self.following.as_ref().filter(|f| f.left() > 0) {
            following.abandon();
        }
    }

    fn missing(&self) -> Option<Missing> {
        let following = self.following.as_ref()?;
        let pages = following.left();
        (pages > 0).then(|| Missing {
            pages,
            waiting: following.waiting() as u64,
            lost: following.lost(),
            file: following.file().map(Path::to_owned),
        })
    }

    fn configuration(&self) -> Option<Configuration> {
        Some(configuration::of(&self.machine))
    }

    fn ending(&self) -> Option<Ending> {
        self.machine.exit_reason().and_then(ending)
    }

    fn balloon(&self) -> Option<&dyn GuestBalloon> {
        self.machine.has_balloon().then_some(self)
    }

    fn console(&self) -> Option<&dyn GuestConsole> {
        self.machine.has_console().then_some(self)
    }

    fn snapshots(&self) -> Option<&dyn GuestSnapshots> {
        Some(self)
    }

    fn serial_output_lost(&self) -> u64 {
        self.machine.serial_output_lost()
    }

    fn power_button(&self) -> Result<(), String> {
        self.machine
            .press_power_button()
            .map_err(|e| format!("the power button's interrupt cannot be raised ({e})"))
    }

    fn input(&self, bytes: &[u8]) -> usize {
        self.machine.serial_input(bytes)
    }

    fn migration(&self, uri: &str, security: &Security) -> Result<Box<dyn Migration>, String> {
        if let Some(missing) = self.missing() {
            return Err(format!(
                "{} pages of the guest have not arrived here yet; migrate it on when they have",
                missing.pages
            ));
        }
        let uri = uri.parse::<Uri>().map_err(|e| e.to_string())?;
        let peer = Peer::new(uri, security)?;
        *lock(&self.peer) = Some(peer.clone());
        Ok(Box::new(MachineMigration {
            machine: Arc::clone(&self.machine),
            peer,
            handle: Handle::new(),
            session: None,
        }))
    }

    fn recovery(
        &self,
        uri: &str,
        session: &str,
        security: &Security,
    ) -> Result<Box<dyn Migration>, String> {
        let uri = uri.parse::<Uri>().map_err(|e| e.to_string())?;
        let peer = match &*lock(&self.peer) {
            Some(before) => before.again(uri, security)?,
            None => Peer::new(uri, security)?,
        };
        Ok(Box::new(MachineMigration {
            machine: Arc::clone(&self.machine),
            peer,
            handle: Handle::in_doubt(),
            session: Some(session.to_owned()),
        }))
    }

    fn recording(&self) -> Result<Box<dyn Recording>, String> {
        let recording = MachineRecording::begin(Arc::clone(&self.machine), self.workload.clone());
        Ok(Box::new(recording.map_err(|e| e.to_string())?))
    }
}

impl GuestBalloon for MachineGuest {
    fn status(&self) -> BalloonStatus {
        self.machine
            .balloon()
            .map(BalloonStatus::from)
            .unwrap_or_default()
    }

    fn set(&self, request: &BalloonRequest) -> Result<(), Refusal> {
        let ram = self.machine.description().memory;
        let set = match (request.size_bytes, request.auto) {
            (Some(size), None) if size <= ram => self.machine.set_balloon(size),
            (Some(size), None) => {
                return Err(Refusal::Invalid(format!(
                    "a balloon of {size} bytes was asked for, but the guest has {ram}; give less"
                )));
            }
            (None, Some(wish)) => {
                let settings = wish.settings(ram).map_err(Refusal::Invalid)?;
                self.machine.set_balloon_auto(settings)
            }
            _ => {
                return Err(Refusal::Invalid(
                    "a balloon has a size_bytes or is moved by auto; give one of the two".into(),
                ));
            }
        };
        set.map(drop).map_err(|e| Refusal::Conflict(e.to_string()))
    }
}

impl GuestConsole for MachineGuest {
    fn input(&self, bytes: &[u8]) -> usize {
        self.machine.console_input(bytes)
    }

    fn set_size(&self, columns: u16, rows: u16) -> bool {
        self.machine.set_console_size(columns, rows)
    }

    fn output_lost(&self) -> u64 {
        self.machine.console_output_lost()
    }
}

impl GuestSnapshots for MachineGuest {
    fn save(
        &self,
        request: &SnapshotRequest,
        cancelled: &AtomicBool,
    ) -> Result<SnapshotReport, String> {
        snapshot::save(&self.machine, request, cancelled).map_err(|e| e.to_string())
    }
}

struct MachineMigration {
    machine: Arc<Machine>,
    peer: Peer,
    handle: Handle,
    /// Of the migration that is to be recovered.
    session: Option<String>,
}

impl Migration for MachineMigration {
    fn handle(&self) -> Arc<dyn MigrationHandle> {
        Arc::new(self.handle.clone())
    }

    fn run(self: Box<Self>, options: &Options, events: &mut dyn FnMut(Event)) -> Report {
        match &self.session {
            None => migrate(&self.machine, self.peer, options, &self.handle, events),
            Some(session) => recover(
                &self.machine,
                self.peer,
                session,
                options,
                &self.handle,
                events,
            ),
        }
    }
}

impl MigrationHandle for Handle {
    fn cancel(&self) -> bool {
        Handle::cancel(self)
    }

    fn steer(&self, change: &Change) -> Result<(), SteeringError> {
        Handle::steer(self, change)
    }

    fn session(&self) -> String {
        Handle::session(self)
    }

    fn progress(&self) -> Progress {
        Handle::progress(self)
    }

    fn owner(&self) -> GuestOwner {
        Handle::owner(self)
    }
}

impl TakeOver for GuestInDoubt {
    fn take_over(&self, force: bool) -> Result<(), String> {
        GuestInDoubt::take_over(self, force)
    }
}

/// Books what a [`Receiver`](crate::migrate::Receiver) tells with a VMM, whose state decides
/// whether a guest is wanted.
pub struct Arrivals<F> {
    vmm: Vmm,
    listening: String,
    say: F,
}

impl<F: Fn(String) + Send + Sync> Arrivals<F> {
    /// For a receiver at `listening`; `say` takes a sentence for people about each arrival, and
    /// must not block.
    pub const fn new(vmm: Vmm, listening: String, say: F) -> Self {
        Self {
            vmm,
            listening,
            say,
        }
    }
}

impl<F: Fn(String) + Send + Sync> Owner for Arrivals<F> {
    fn wants(&self) -> Result<(), String> {
        self.vmm.wants_arrival()
    }

    fn claim(&self) -> Result<(), String> {
        self.vmm.claim_arrival()
    }

    fn incoming(&self, incoming: &Incoming, arrival: &Arrival) {
        let (status, explanation) = match arrival {
            Arrival::Failed(why) => (RecordStatus::Failed, why.clone()),
            Arrival::Interrupted(why) => (RecordStatus::Interrupted, why.clone()),
            Arrival::InDoubt { why, .. } => (RecordStatus::InDoubt, why.clone()),
            Arrival::Complete => (
                RecordStatus::Completed,
                "all of the guest's memory has arrived".into(),
            ),
            Arrival::Arrived { following, .. } => match following {
                Some(_) => (
                    RecordStatus::UnderWay,
                    "the guest runs here, and its pages follow".into(),
                ),
                None => (RecordStatus::Completed, "the guest has arrived".into()),
            },
            Arrival::Refused(_) | Arrival::Unreachable(_) => return,
        };
        let report = IncomingReport {
            total_ms: incoming.elapsed.as_secs_f64() * 1e3,
            bytes_received: incoming.bytes,
            missing_pages: incoming.missing_pages,
            faults: incoming.faults.clone(),
            explanation,
        };
        let (session, policy) = (&incoming.session, &incoming.policy);
        self.vmm.incoming(session, policy, status, report);
    }

    fn arrival(&self, arrival: Arrival) {
        (self.say)(MachineGuest::book(&self.vmm, &self.listening, arrival));
    }
}
