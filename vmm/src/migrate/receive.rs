//! Waiting for a guest: accepting a migration's channels and building its machine.
//!
//! ```text
//!  accept thread ── each connection ──▶ preamble ──▶ role control: runs the engine, in a thread
//!                                              ├▶ role data:    fills memory, in its own thread
//!                                              ├▶ role fault:   asks for pages, in its own thread
//!                                              └▶ role recover: handed to the engine that has lost its connection
//! ```
//!
//! While a guest is in doubt its engine is *parked* ([`Active::parked`]): the thread that drove it
//! polls its connection, on which a slow source may still commit; a source that reconnects takes
//! it, and so does an operator, in that order.
//!
//! One migration at a time: a second is told that the receiver is busy. After a failure that leaves
//! the guest with the source, the next may come. After the guest runs here the receiver goes on
//! answering sources of *that* session that ask whether it does, until the source says that it
//! knows. The receiver stops listening then: the next one, of a newer ferry, can use the same
//! place.

mod connections;
mod engine;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use ferry_devices::sync::{lock, wait_timeout};
use ferry_devices::thread;
use ferry_migration::destination::{DataChannelSet, Destination, MissingPages};
use ferry_migration::net::tls::Secret;
use ferry_migration::options::Tracking;
use ferry_migration::probe::Turn;
use ferry_migration::report::Faults;
use ferry_migration::wire::SessionId;

use super::arrival::{Arrival, Following, GuestInDoubt, Incoming, KeepsGuest, Owner, Sent};
use super::gate::Gate;
use super::host::MachineHost;
use super::listener::{Listener, ReceiveError, Stop};
use super::newcomers::Newcomers;
use super::sink::RamSink;
use super::{StreamLink, Uri};
use crate::machine::Backends;
use engine::park;

pub use super::host::SerialFactory;

/// How often a parked engine's connection is polled: far less often than a source waits for an
/// answer.
const POLL: Duration = Duration::from_millis(50);

/// Where a receiver stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReceiveState {
    /// For a migration.
    Waiting,
    /// One arrives.
    Receiving,
    /// A guest is complete here, and whether it may run is unknown.
    InDoubt,
    /// A guest runs here, and its pages follow.
    Following,
    /// A guest runs here, pages are missing, and the connection to the source is lost.
    Interrupted,
    /// A guest has arrived.
    Done,
}

type Engine = Destination<StreamLink, MachineHost>;
type DataChannels = Arc<DataChannelSet<StreamLink, RamSink>>;

/// The migration that arrives.
struct Active {
    session: SessionId,
    /// Of its first connection, where connections are secured.
    secret: Option<Secret>,
    data_channels: Option<DataChannels>,
    missing_pages: Option<Arc<MissingPages<StreamLink, RamSink>>>,
    stage: Stage,
    begun: Instant,
    /// As the source has named it.
    policy: String,
    /// Of [`Shared::received`], what came before.
    received_before: u64,
    /// The engine, when it has no connection: in doubt or complete. `None` while a thread has it.
    parked: Option<Box<Engine>>,
}

/// Where a migration stands that has begun. The engine's phase says who owns the guest; this
/// follows it, for status requests and new connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Receiving,
    InDoubt,
    Following,
    Interrupted,
    /// The guest is here.
    Done {
        /// The source was sent that, and is sent nothing more.
        told: bool,
    },
}

impl From<Stage> for ReceiveState {
    fn from(stage: Stage) -> Self {
        match stage {
            Stage::Receiving => Self::Receiving,
            Stage::InDoubt => Self::InDoubt,
            Stage::Following => Self::Following,
            Stage::Interrupted => Self::Interrupted,
            Stage::Done { .. } => Self::Done,
        }
    }
}

pub(super) struct Shared {
    active: Mutex<Option<Active>>,
    changed: Condvar,
    serial: SerialFactory,
    backends: Backends,
    dirty: Tracking,
    owner: Arc<dyn Owner>,
    /// Bytes, on all connections.
    received: Arc<AtomicU64>,
    /// The receiver is dropped, or its source knows that the guest runs here: no question comes any
    /// more.
    stop: Stop,
    newcomers: Newcomers,
    /// One at a time: two would measure each other.
    probing: Turn,
    gate: Gate,
}

/// Listens for migrations until it is dropped.
pub struct Receiver {
    shared: Arc<Shared>,
    /// Where the receiver has no owner.
    arrivals: Option<Mutex<mpsc::Receiver<Arrival>>>,
    uri: Uri,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Receiver {
    /// Listens on `uri` for a guest without disks and network cards; `serial` makes its console.
    /// [`wait`](Self::wait) returns what happens.
    ///
    /// # Errors
    /// [`ReceiveError`].
    pub fn bind(uri: &Uri, serial: SerialFactory) -> Result<Self, ReceiveError> {
        Self::bind_with(uri, serial, Backends::default(), Tracking::Auto)
    }

    /// Listens on `uri`; `serial` makes the console of an arriving guest, `backends` is what is
    /// behind its disks and network cards here, and `dirty` how the pages that it dirties will be
    /// found here.
    ///
    /// # Errors
    /// [`ReceiveError`].
    pub fn bind_with(
        uri: &Uri,
        serial: SerialFactory,
        backends: Backends,
        dirty: Tracking,
    ) -> Result<Self, ReceiveError> {
        let (sender, arrivals) = mpsc::channel();
        let owner = move |arrival| {
            // The other end goes first when the receiver is dropped.
            let _ = sender.send(arrival);
        };
        let listener = Listener::bind(uri)?;
        let mut receiver = Self::of(listener, serial, backends, dirty, Arc::new(owner))?;
        receiver.arrivals = Some(Mutex::new(arrivals));
        Ok(receiver)
    }

    /// Takes what comes to `listener`, and tells `owner`; the rest is as for
    /// [`bind_with`](Self::bind_with).
    ///
    /// # Errors
    /// [`ReceiveError::Thread`].
    pub fn of(
        listener: Listener,
        serial: SerialFactory,
        backends: Backends,
        dirty: Tracking,
        owner: Arc<dyn Owner>,
    ) -> Result<Self, ReceiveError> {
        let uri = listener.local_uri().clone();
        backends.memory.prepare();
        let shared = Arc::new(Shared {
            active: Mutex::new(None),
            changed: Condvar::new(),
            serial,
            backends,
            dirty,
            owner,
            received: Arc::default(),
            stop: Stop::new().map_err(ReceiveError::Thread)?,
            newcomers: Newcomers::default(),
            probing: Turn::default(),
            gate: listener.gate().clone(),
        });
        let worker = Arc::clone(&shared);
        let accept = move || {
            let take = |incoming| connections::spawn(&worker, incoming);
            let done = listener.accept_until(&worker.stop, take);
            done.map_err(|e| format!("connections cannot be waited for ({e})"))
        };
        let deaf = Arc::clone(&shared);
        let failed = move |why| deaf.tell(Arrival::Unreachable(why));
        let thread = thread::spawn(thread::Kind::Migration, "ferry-accept", accept, failed)
            .map_err(ReceiveError::Thread)?;
        Ok(Self {
            shared,
            arrivals: None,
            uri,
            thread: Some(thread),
        })
    }

    /// Where it listens, with the port that was chosen.
    #[must_use]
    pub const fn local_uri(&self) -> &Uri {
        &self.uri
    }

    /// Waits for the next thing to happen; `None` when nothing did in time, and where an owner is
    /// told instead.
    #[must_use]
    pub fn wait(&self, timeout: Duration) -> Option<Arrival> {
        lock(self.arrivals.as_ref()?).recv_timeout(timeout).ok()
    }

    /// Where it stands.
    #[must_use]
    pub fn state(&self) -> ReceiveState {
        self.shared
            .active()
            .as_ref()
            .map_or(ReceiveState::Waiting, |active| active.stage.into())
    }

    /// The session of the migration that arrives, is in doubt or has arrived.
    #[must_use]
    pub fn session(&self) -> Option<String> {
        self.shared
            .active()
            .as_ref()
            .map(|active| active.session.to_string())
    }

    /// An operator's word that the source does not run the guest and never will: runs it here. The
    /// machine comes as [`Arrival::Arrived`]. What the source has said meanwhile counts first.
    /// `force` insists where nothing tells whether the guest's disks have been written since its
    /// state was saved.
    ///
    /// # Errors
    /// No guest is in doubt here, the source keeps it, its disks have been written, or it cannot be
    /// started; a sentence.
    pub fn take_over(&self, force: bool) -> Result<(), String> {
        Arc::clone(&self.shared).take_over(force)
    }

    /// An operator's word that the source has the guest: throws the copy here away and waits for
    /// the next migration.
    ///
    /// # Errors
    /// When no guest is in doubt here.
    pub fn abandon(&self) -> Result<(), String> {
        let mut engine = self.shared.in_doubt()?;
        engine.abandon();
        *self.shared.active() = None;
        self.shared.restore_token();
        self.shared.changed.notify_all();
        Ok(())
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.shared.stop.set();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn active(&self) -> MutexGuard<'_, Option<Active>> {
        lock(&self.active)
    }

    /// A pairing line is good for one guest: while there is none, for the next try.
    fn restore_token(&self) {
        let active = self.active();
        if let Some(tls) = self.gate.tls.as_ref().filter(|_| active.is_none()) {
            tls.restore();
        }
    }

    /// Never under the lock: an owner may ask where this stands, or take a while.
    fn tell(&self, arrival: Arrival) {
        if let Some(incoming) = self.incoming() {
            self.owner.incoming(&incoming, &arrival);
        }
        self.owner.arrival(arrival);
    }

    fn incoming(&self) -> Option<Incoming> {
        let active = self.active();
        let active = active.as_ref()?;
        let pages = active.missing_pages.as_ref();
        let received = self.received.load(Ordering::Relaxed);
        Some(Incoming {
            session: active.session.to_string(),
            policy: active.policy.clone(),
            elapsed: active.begun.elapsed(),
            bytes: received - active.received_before,
            missing_pages: pages.map_or(0, |pages| pages.left()),
            faults: pages.map_or_else(Faults::default, |pages| pages.faults()),
        })
    }

    fn arrived(&self, engine: &mut Engine) {
        if let Some(machine) = engine.host().machine().cloned() {
            let pages = engine.missing_pages().cloned();
            let sink = engine.host().sink().cloned();
            let following = pages
                .zip(sink)
                .map(|(pages, sink)| Following::new(Sent { pages, sink }));
            self.tell(Arrival::Arrived { machine, following });
        }
    }

    /// Takes the engine whose guest is in doubt. Waits while another thread has it, or while its
    /// source has said something that has not been read.
    fn in_doubt(&self) -> Result<Box<Engine>, String> {
        let mut active = self.active();
        loop {
            let parked = active.as_mut();
            let Some(parked) = parked.filter(|a| a.stage == Stage::InDoubt) else {
                return Err("no guest is in doubt here".into());
            };
            // The thread that polls it reads what the source has said.
            let free = |engine: &mut Box<Engine>| !engine.has_word();
            if let Some(engine) = parked.parked.take_if(free) {
                return Ok(engine);
            }
            active = wait_timeout(&self.changed, active, POLL);
        }
    }

    /// For its owner.
    fn guest_in_doubt(self: &Arc<Self>) -> GuestInDoubt {
        let keeper: Arc<dyn KeepsGuest> = Arc::<Self>::clone(self);
        GuestInDoubt(Arc::downgrade(&keeper))
    }

    fn has_guest(&self) -> bool {
        let active = self.active();
        active
            .as_ref()
            .is_some_and(|a| matches!(a.stage, Stage::Done { .. } | Stage::Following))
    }
}

impl KeepsGuest for Shared {
    fn take_over(self: Arc<Self>, force: bool) -> Result<(), String> {
        let mut engine = match self.in_doubt() {
            Ok(engine) => engine,
            // The source's own word has come meanwhile.
            Err(_) if self.has_guest() => return Ok(()),
            Err(why) => return Err(why),
        };
        // Without the lock: a source that reconnects waits for the end of this.
        let result = match engine.host().check_disks(force) {
            Ok(()) => engine.take_over().map_err(|e| e.to_string()),
            Err(why) => Err(why),
        };
        let stage = match &result {
            Ok(()) => {
                self.arrived(&mut engine);
                Stage::Done { told: false }
            }
            Err(_) => Stage::InDoubt,
        };
        park(&mut self.active(), engine, stage);
        self.changed.notify_all();
        if let Err(why) = &result {
            // The owner may have claimed the guest already: it is in doubt as before.
            self.tell(Arrival::InDoubt {
                why: format!("the guest is complete here and does not run: {why}"),
                guest: self.guest_in_doubt(),
            });
        }
        result
    }
}
