//! Waiting for a guest: accepting a migration's channels and building its machine.
//!
//! ```text
//!  accept thread ── each connection ──▶ greet ──▶ role control: runs the engine, in its own thread
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

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ferry_migration::destination::{
    self, DataChannelSet, Destination, DestinationError, MissingPages, State, Step,
};
use ferry_migration::net::Unsecured;
use ferry_migration::net::tls::{Admission, Secret};
use ferry_migration::options::Tracking;
use ferry_migration::wire::{AbortCode, Channel, Preamble, Role, SessionId};

use super::arrival::{Arrival, Following, GuestInDoubt, Owner, Sent};
use super::gate::Gate;
use super::host::{MachineHost, RamSink};
use super::listener::{Incoming, Listener, ReceiveError};
use super::newcomers::{Address, Newcomers};
use super::{MonotonicClock, StreamLink, Uri};
use crate::machine::Backends;

pub use super::host::SerialFactory;

/// How long a new connection may take to say what it is.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How long a new migration waits for one that is ending.
const SETTLING: Duration = Duration::from_secs(2);
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
    /// A guest is complete here, and nobody knows whether it may run.
    InDoubt,
    /// A guest runs here, and its pages follow.
    Following,
    /// A guest runs here and lacks pages: the connection to the source is lost.
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
    state: ReceiveState,
    /// The source was sent that the guest runs here, and is sent nothing more.
    told: bool,
    /// The engine, when it has no connection: in doubt or complete.
    parked: Option<Box<Engine>>,
}

pub(super) struct Shared {
    active: Mutex<Option<Active>>,
    changed: Condvar,
    serial: SerialFactory,
    backends: Backends,
    dirty: Tracking,
    owner: Arc<dyn Owner>,
    stop: AtomicBool,
    /// The source knows that the guest runs here: no question comes any more.
    settled: AtomicBool,
    newcomers: Newcomers,
    gate: Gate,
}

/// Listens for migrations until it is dropped.
pub struct Receiver {
    shared: Arc<Shared>,
    /// Where no owner hears of arrivals.
    arrivals: Option<Mutex<mpsc::Receiver<Arrival>>>,
    uri: Uri,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Receiver {
    /// Listens on `uri` for a guest without disks and network cards; `serial` makes its console.
    /// What happens is heard by [`wait`](Self::wait).
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
            // Nobody listens any more while the receiver is being dropped.
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
            stop: AtomicBool::new(false),
            settled: AtomicBool::new(false),
            newcomers: Newcomers::default(),
            gate: listener.gate().clone(),
        });
        let worker = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("ferry-accept".into())
            .spawn(move || {
                let stop =
                    || worker.stop.load(Ordering::SeqCst) || worker.settled.load(Ordering::SeqCst);
                listener.accept_until(stop, |link| spawn(&worker, link));
            })
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

    /// Waits for the next thing to happen; `None` when nothing did in time, and where an owner
    /// hears of it instead.
    #[must_use]
    pub fn wait(&self, timeout: Duration) -> Option<Arrival> {
        self.arrivals
            .as_ref()?
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .recv_timeout(timeout)
            .ok()
    }

    /// Where it stands.
    #[must_use]
    pub fn state(&self) -> ReceiveState {
        self.shared
            .active()
            .as_ref()
            .map_or(ReceiveState::Waiting, |active| active.state)
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
        self.shared.take_over(force)
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
        self.shared.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn active(&self) -> MutexGuard<'_, Option<Active>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
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
        self.owner.arrival(arrival);
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
            let Some(parked) = parked.filter(|a| a.state == ReceiveState::InDoubt) else {
                return Err("no guest is in doubt here".into());
            };
            // The thread that polls it reads what the source has said.
            let free = |engine: &mut Box<Engine>| !engine.has_word();
            if let Some(engine) = parked.parked.take_if(free) {
                return Ok(engine);
            }
            active = self
                .changed
                .wait_timeout(active, POLL)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    pub(super) fn take_over(self: &Arc<Self>, force: bool) -> Result<(), String> {
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
        let state = match &result {
            Ok(()) => {
                self.arrived(&mut engine);
                ReceiveState::Done
            }
            Err(_) => ReceiveState::InDoubt,
        };
        park(&mut self.active(), engine, state);
        self.changed.notify_all();
        if let Err(why) = &result {
            // The owner may have claimed the guest already: it is in doubt as before.
            self.tell(Arrival::InDoubt {
                why: format!("the guest is complete here and does not run: {why}"),
                guest: GuestInDoubt(Arc::downgrade(self)),
            });
        }
        result
    }

    fn has_guest(&self) -> bool {
        let active = self.active();
        active
            .as_ref()
            .is_some_and(|a| matches!(a.state, ReceiveState::Done | ReceiveState::Following))
    }
}

fn spawn(shared: &Arc<Shared>, incoming: Incoming) {
    let Incoming {
        link,
        address,
        socket,
    } = incoming;
    let id = shared.newcomers.admit(address, socket);
    let worker = Arc::clone(shared);
    let result = std::thread::Builder::new()
        .name("ferry-receive".into())
        .spawn(move || connection(&worker, link, (id, address)));
    if let Err(error) = result {
        shared.newcomers.leave(id);
        tracing::warn!(%error, "a connection was closed");
    }
}

fn connection(shared: &Arc<Shared>, link: StreamLink, (id, address): (u64, Address)) {
    let greeted = admit(shared, link, address);
    let stays = shared.newcomers.leave(id);
    match greeted {
        Ok((channel, preamble, admission)) => {
            serve(shared, channel, &preamble, admission);
            if admission.is_some() {
                shared.restore_token();
            }
        }
        // Closed to make room: that was said then.
        Err(_) if !stays => {}
        Err(why) => {
            let from = address.map_or_else(|| "this host".to_owned(), |ip| ip.to_string());
            shared.tell(Arrival::Refused(format!(
                "a connection from {from} was refused: {why}"
            )));
        }
    }
}

/// A connection that may be a channel, what it says it is, and why it may be one; or a sentence.
fn admit(
    shared: &Shared,
    mut link: StreamLink,
    address: Address,
) -> Result<(Channel<StreamLink>, Preamble, Option<Admission>), String> {
    if !shared.gate.admits(address) {
        return Err("its address is none of --accept-from".into());
    }
    let admission = match &shared.gate.tls {
        None => None,
        Some(tls) => match link.secure_as_receiver(tls) {
            Ok(admission) => Some(admission),
            Err(Unsecured::Refused(why)) => {
                let why = why.to_string();
                destination::turn_away(link, HANDSHAKE, &why);
                return Err(why);
            }
            Err(error) => return Err(error.to_string()),
        },
    };
    let (channel, preamble) =
        destination::greet(link, HANDSHAKE).map_err(|error| error.to_string())?;
    Ok((channel, preamble, admission))
}

/// Does what a connection is for, if it may.
fn serve(
    shared: &Arc<Shared>,
    channel: Channel<StreamLink>,
    preamble: &Preamble,
    admission: Option<Admission>,
) {
    let control_channel = preamble.role == Role::Control;
    let proven = match admission {
        None => true,
        Some(Admission::Session(secret)) => {
            let ours = {
                let active = shared.active();
                let active = active.as_ref().filter(|a| a.session == preamble.session);
                active.and_then(|a| a.secret)
            };
            !control_channel && ours.is_some_and(|ours| ours.matches(&secret))
        }
        Some(_) => control_channel,
    };
    if !proven {
        let why = "this connection does not prove that it belongs to a migration that arrives here";
        refuse(channel, AbortCode::UnknownSession, why);
        return shared.tell(Arrival::Refused(format!(
            "a connection was refused: it is secured, and does not prove that it belongs to migration {}",
            preamble.session
        )));
    }
    match preamble.role {
        Role::Control => control(shared, channel, preamble),
        Role::Data => data(shared, channel, preamble),
        Role::Recover => recover(shared, channel, preamble),
        Role::Fault => faults(shared, channel, preamble),
    }
}

fn refuse(mut channel: Channel<StreamLink>, code: AbortCode, why: &str) {
    channel.send_abort_as(code, why);
}

/// A migration's control channel: runs the engine until it ends.
fn control(shared: &Arc<Shared>, mut channel: Channel<StreamLink>, preamble: &Preamble) {
    let secret = match channel.link().secret() {
        Ok(secret) => secret,
        Err(error) => return refuse(channel, AbortCode::GaveUp, &error.to_string()),
    };
    let busy = {
        // A migration that failed is heard of at its source before its memory here is freed:
        // whoever tries again at once waits for that instead of being refused.
        let until = Instant::now() + SETTLING;
        let mut active = shared.active();
        loop {
            match active.as_ref().map(|a| a.state) {
                None => {
                    *active = Some(Active {
                        session: preamble.session,
                        secret,
                        data_channels: None,
                        missing_pages: None,
                        state: ReceiveState::Receiving,
                        told: false,
                        parked: None,
                    });
                    break None;
                }
                Some(ReceiveState::InDoubt) => {
                    break Some("a guest is in doubt here; end that with ferry recover first");
                }
                Some(ReceiveState::Done | ReceiveState::Following | ReceiveState::Interrupted) => {
                    break Some("this receiver has its guest; start another");
                }
                Some(_) if Instant::now() < until => {
                    let left = until.saturating_duration_since(Instant::now());
                    active = shared
                        .changed
                        .wait_timeout(active, left)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0;
                }
                Some(_) => break Some("another migration is arriving here"),
            }
        }
    };
    if let Some(why) = busy {
        return refuse(channel, AbortCode::Busy, why);
    }
    let host = MachineHost::new(
        Arc::clone(&shared.serial),
        shared.backends.clone(),
        shared.dirty,
    )
    .behind(shared.gate.clone())
    .owned_by(Arc::clone(&shared.owner));
    let timeouts = destination::Timeouts::default();
    let clock = Arc::new(MonotonicClock::new());
    let engine = Destination::new(channel, preamble, host, timeouts, clock);
    drive(shared, Box::new(engine));
    await_source(shared, preamble.session);
}

/// Waits until the source says that it knows that the guest runs here, and ends the listening: no
/// question comes any more. A connection that is lost before says nothing, and the source may ask
/// on another.
fn await_source(shared: &Shared, session: SessionId) {
    while !shared.stop.load(Ordering::SeqCst) {
        let mut active = shared.active();
        let done = active
            .as_mut()
            .filter(|a| a.session == session && a.state == ReceiveState::Done && a.told);
        // Where it is not here, a thread has it that does the same afterwards.
        let Some(engine) = done.and_then(|a| a.parked.as_mut()) else {
            return;
        };
        if !engine.is_connected() {
            return;
        }
        if engine.has_word() {
            let Some(mut engine) = active.as_mut().and_then(|a| a.parked.take()) else {
                return;
            };
            drop(active);
            let known = engine.take_acknowledgement();
            park(&mut shared.active(), engine, ReceiveState::Done);
            shared.changed.notify_all();
            if known {
                shared.settled.store(true, Ordering::SeqCst);
            }
            return;
        }
        drop(active);
        std::thread::sleep(POLL);
    }
}

/// Runs an engine that has a connection, and does what its end means.
fn drive(shared: &Arc<Shared>, mut engine: Box<Engine>) {
    let result = loop {
        match engine.step() {
            Ok(Step::Continue) => {
                let mut guard = shared.active();
                let Some(active) = guard.as_mut() else {
                    continue;
                };
                if active.data_channels.is_none() && engine.data_channels().is_some()
                    || active.missing_pages.is_none() && engine.missing_pages().is_some()
                {
                    active.data_channels = engine.data_channels().cloned();
                    active.missing_pages = engine.missing_pages().cloned();
                    shared.changed.notify_all();
                }
            }
            Ok(Step::Running) => {
                let now = match engine.follows() {
                    true => ReceiveState::Following,
                    false => ReceiveState::Done,
                };
                let known = {
                    let mut guard = shared.active();
                    let state = guard.as_mut().map(|a| &mut a.state);
                    state.map(|s| std::mem::replace(s, now))
                };
                // The source is told by the next step: it must not hear of the guest before its
                // owner here does.
                if matches!(known, Some(ReceiveState::Receiving | ReceiveState::InDoubt)) {
                    shared.arrived(&mut engine);
                }
                shared.changed.notify_all();
            }
            Ok(Step::Complete) => break None,
            Err(error) => break Some(error),
        }
    };
    settle(shared, engine, result);
}

fn settle(shared: &Arc<Shared>, engine: Box<Engine>, error: Option<DestinationError>) {
    let why = error.map_or_else(String::new, |e| e.to_string());
    let (state, arrival) = match engine.state() {
        State::Running | State::Complete => {
            let known = shared.active().as_ref().map(|a| a.state);
            let followed = known == Some(ReceiveState::Following);
            (ReceiveState::Done, followed.then_some(Arrival::Complete))
        }
        State::Interrupted => {
            let left = engine.missing_pages().map_or(0, |a| a.left());
            let sentence = format!(
                "the guest runs here and lacks {left} pages, for the connection to the source is lost ({why}); it waits where \
                 it needs one; `ferry recover` at the source sends them"
            );
            (
                ReceiveState::Interrupted,
                Some(Arrival::Interrupted(sentence)),
            )
        }
        State::InDoubt | State::Ready => {
            let why = format!(
                "the guest is complete here and does not run, for the source fell silent before it handed it over ({why})"
            );
            let guest = GuestInDoubt(Arc::downgrade(shared));
            (ReceiveState::InDoubt, Some(Arrival::InDoubt { why, guest }))
        }
        State::Waiting | State::Filling | State::Discarded => {
            // Also after a doubt: the next one waits for this end, and is not refused.
            enter(shared, ReceiveState::Receiving);
            // The memory of what had arrived goes first: the next migration needs it.
            drop(engine);
            // Heard of before the next may come, and its end with it.
            shared.tell(Arrival::Failed(format!(
                "a migration ended and the source keeps its guest: {why}"
            )));
            *shared.active() = None;
            shared.changed.notify_all();
            return;
        }
    };
    // Heard of before the engine can be had: what comes of that is heard of later.
    enter(shared, state);
    if let Some(arrival) = arrival {
        shared.tell(arrival);
    }
    let session = engine.session();
    if let Some(active) = shared.active().as_mut() {
        active.told = engine.state() == State::Complete;
    }
    park(&mut shared.active(), engine, state);
    shared.changed.notify_all();
    if state == ReceiveState::InDoubt {
        poll_parked(shared, session);
    }
}

/// A source that was only slow commits, or gives up, on the connection that it has: polls the
/// parked engine's connection until the guest is no longer in doubt or the connection is gone.
fn poll_parked(shared: &Arc<Shared>, session: SessionId) {
    loop {
        std::thread::sleep(POLL);
        let mut active = shared.active();
        let parked = active.as_mut();
        let Some(parked) =
            parked.filter(|a| a.session == session && a.state == ReceiveState::InDoubt)
        else {
            return;
        };
        if shared.stop.load(Ordering::SeqCst) {
            return;
        }
        if let Some(engine) = parked.parked.take_if(|engine| engine.has_word()) {
            drop(active);
            return drive(shared, engine);
        }
        // Where there is none another thread has it: a source that has reconnected, or an operator.
        let lost = parked.parked.as_ref().is_some_and(|e| !e.is_connected());
        if lost {
            return;
        }
    }
}

fn enter(shared: &Shared, state: ReceiveState) {
    if let Some(active) = shared.active().as_mut() {
        active.state = state;
    }
}

fn park(active: &mut Option<Active>, engine: Box<Engine>, state: ReceiveState) {
    if let Some(active) = active {
        active.parked = Some(engine);
        active.data_channels = None;
        active.state = state;
    }
}

/// A data channel: waits until its migration's handshake was taken, then fills memory.
fn data(shared: &Shared, channel: Channel<StreamLink>, preamble: &Preamble) {
    let Some(data_channels) = wait_for(shared, preamble.session, |active| {
        active.data_channels.clone()
    }) else {
        let why = "no migration here has announced this data channel";
        return refuse(channel, AbortCode::UnknownSession, why);
    };
    match data_channels.attach(channel, preamble.channel) {
        Ok(data_channel) => data_channel.run(),
        Err(error) => tracing::warn!(%error, "a data channel was closed"),
    }
}

/// What a migration's handshake announces, once it was taken.
fn wait_for<T>(
    shared: &Shared,
    session: SessionId,
    announced: impl Fn(&Active) -> Option<T>,
) -> Option<T> {
    let until = Instant::now() + HANDSHAKE;
    let mut active = shared.active();
    loop {
        match active.as_ref().filter(|a| a.session == session) {
            Some(a) => {
                if let Some(found) = announced(a) {
                    return Some(found);
                }
            }
            None => return None,
        }
        let left = until.checked_duration_since(Instant::now())?;
        active = shared
            .changed
            .wait_timeout(active, left)
            .unwrap_or_else(PoisonError::into_inner)
            .0;
    }
}

/// A fault channel: waits until its migration's handshake was taken, then asks for the pages that
/// the guest waits for.
fn faults(shared: &Shared, channel: Channel<StreamLink>, preamble: &Preamble) {
    let Some(missing_pages) = wait_for(shared, preamble.session, |active| {
        active.missing_pages.clone()
    }) else {
        let why = "no migration here has announced this fault channel";
        return refuse(channel, AbortCode::UnknownSession, why);
    };
    let timeouts = destination::Timeouts::default();
    match Engine::fault_channel(&missing_pages, channel, preamble.channel, timeouts) {
        Ok(data_channel) => data_channel.run(&|| {
            let active = shared.active();
            active
                .as_ref()
                .is_some_and(|a| a.session == preamble.session)
        }),
        Err(error) => tracing::warn!(%error, "a fault channel was closed"),
    }
}

/// A source that asks, or tells, what became of a guest.
fn recover(shared: &Arc<Shared>, channel: Channel<StreamLink>, preamble: &Preamble) {
    match parked(shared, preamble.session) {
        Ok(mut engine) => {
            engine.reattach(channel, preamble);
            drive(shared, engine);
            await_source(shared, preamble.session);
        }
        Err((code, why)) => refuse(channel, code, why),
    }
}

/// Takes the engine of a migration that has lost its connection, or is about to notice that.
fn parked(shared: &Shared, session: SessionId) -> Result<Box<Engine>, (AbortCode, &'static str)> {
    let until = Instant::now() + HANDSHAKE;
    let mut active = shared.active();
    if let Some(a) = active.as_ref().filter(|a| a.session == session)
        && a.state == ReceiveState::Following
        && let Some(missing_pages) = &a.missing_pages
    {
        // The source has dropped the old connection.
        missing_pages.lose("the source has opened another");
    }
    loop {
        let Some(a) = active.as_mut().filter(|a| a.session == session) else {
            let why = "this receiver does not know that migration";
            return Err((AbortCode::UnknownSession, why));
        };
        if let Some(engine) = a.parked.take() {
            return Ok(engine);
        }
        if Instant::now() >= until {
            let why = "that migration is being worked on here; retry in some seconds";
            return Err((AbortCode::Busy, why));
        }
        active = shared
            .changed
            .wait_timeout(active, POLL)
            .unwrap_or_else(PoisonError::into_inner)
            .0;
    }
}
