//! The destination engine.
//!
//! ```text
//!            HELLO, machine built     STATE, last pages, checked      COMMIT          guest runs
//!  Waiting ─────────────────▶ Filling ────────────────▶ Ready ────────────▶ Running ─────────▶ Complete
//!                                │                        │  │                │
//!                 any failure    │      ABORT from source │  │ connection     │ the guest cannot
//!                                ▼            ◀───────────┘  ▼ lost           ▼ be started
//!                            Discarded                     InDoubt ◀──────────┘
//!                                ▲          recover: ABORT   │ recover: COMMIT ──▶ Running
//!                                └───────────────────────────┘
//! ```
//!
//! Where the source shares the guest's memory itself (`Features::SHARED_MEMORY`), no page comes in
//! Filling. Where it offers the open files of the guest's devices too (`Features::SHARED_FILES`),
//! Waiting is left when those have come.
//!
//! In post-copy the pages follow the guest: Running waits for them.
//!
//! ```text
//!            every page in place, ARRIVED sent
//!  Running ─────────────────────────────────────▶ Complete
//!    │  ▲
//!    │  │ recover: COMMIT; MISSING is sent, the rest comes
//!    ▼  │
//!  Interrupted (connection lost: the guest runs on until it needs a page that is not here)
//! ```
//!
//! Entering Running is a step of its own: RUNNING is sent by the one after it, so that at this end
//! the guest is booked before the source can know that it has arrived.
//!
//! The guest runs only after a commit was read, and after the host has claimed it. Between Ready
//! and the commit nothing but the source's word (or an operator's) resolves it: the machine is
//! kept.
//!
//! Each phase is a type (`destination/phase.rs`) that has what it needs and nothing else, and a
//! step consumes it: only Filling has the guest's memory and a channel that writes there, only a
//! guest that was Ready can run, and only one that does not run can be discarded.
//!
//! The engine handles one frame per [`Destination::step`], so that a simulator can drive it; a
//! real destination calls [`Destination::run`].

mod blocks;
mod data_channels;
mod error;
mod faults;
mod filling;
mod guest;
mod hashes;
mod in_doubt;
mod missing_pages;
mod pages;
mod phase;
mod push;
mod session;
mod waiting;

pub use blocks::BlocksError;
pub use data_channels::{DataChannel, DataChannelSet};
pub use error::DestinationError;
pub use faults::FaultChannel;
pub use missing_pages::MissingPages;

use crate::port::{Clock, DestinationVm, Link};
use crate::wire::{Channel, Preamble, Role, SessionId, WireError};
use phase::Phase;
use session::{Parts, Session};
use std::sync::Arc;
use std::time::Duration;
use waiting::Waiting;

/// How often a wait looks whether it is over.
const TICK: Duration = Duration::from_millis(100);

/// Where the destination stands; see the module's figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
// Exhaustive: a VMM decides by it what becomes of the guest, and must decide for every value.
pub enum State {
    /// Connected; no handshake yet.
    Waiting,
    /// The machine stands, memory arrives.
    Filling,
    /// The guest is complete and checked; the source owns it until its commit is read.
    Ready,
    /// The guest runs; the source may not know yet, or the guest's pages follow.
    Running,
    /// The source was told.
    Complete,
    /// Nothing was kept; the source owns the guest.
    Discarded,
    /// Ready, and the source is silent: the machine is kept and does not run.
    InDoubt,
    /// The guest runs, pages are missing, and the connection to the source is lost.
    Interrupted,
}

/// How long the destination waits for the source.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// For all of the handshake, until the machine is built.
    pub handshake: Duration,
    /// For the next frame on any channel while memory arrives; the source is then taken for dead. A
    /// frame takes [`FRAME_TIMEOUTS`] times as long at most, however its bytes trickle.
    pub transfer: Duration,
    /// For the commit; then the migration is in doubt.
    pub commit: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(20),
            transfer: Duration::from_secs(60),
            commit: Duration::from_secs(30),
        }
    }
}

/// How many times the transfer timeout a frame may take: 16 MiB in 10 min is 28 kB/s.
pub const FRAME_TIMEOUTS: u32 = 10;

/// What happened in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
// Exhaustive: a VMM that did not know a step would leave the guest standing.
pub enum Step {
    /// More frames are expected.
    Continue,
    /// The guest runs from now on. The source is told so by the next step: the driver of the engine
    /// books the guest before it.
    Running,
    /// The guest runs and the source was told.
    Complete,
}

/// Answers a new connection's preamble and says what the connection is for.
///
/// # Errors
/// When the peer does not speak the protocol or is of another version; it was told ours.
pub fn exchange_preamble<L: Link>(
    mut link: L,
    timeout: Duration,
) -> Result<(Channel<L>, Preamble), WireError> {
    link.set_timeout(Some(timeout));
    link.set_deadline(Some(timeout));
    let mut channel = Channel::new(link);
    let theirs = channel.recv_preamble();
    let (role, index, session) = theirs
        .as_ref()
        .map_or((Role::Control, 0, SessionId::UNREAD), |p| {
            (p.role, p.channel, p.session)
        });
    // Also a peer of another version gets ours, so that it can say both.
    channel.send_preamble(&Preamble::new(role, index, session))?;
    match theirs {
        Ok(theirs) => {
            channel.link().set_deadline(None);
            Ok((channel, theirs))
        }
        Err(error) => {
            channel.send_abort(&error.to_string());
            Err(error)
        }
    }
}

/// Tells the source of a connection that may not be a channel why. All that it can take so long, if
/// its source trickles.
pub fn turn_away<L: Link>(mut link: L, timeout: Duration, why: &str) {
    link.set_timeout(Some(timeout));
    link.set_deadline(Some(timeout));
    let mut channel = Channel::new(link);
    // What the source says first is read: closing with it unread would take the answer away.
    let _ = channel.recv_preamble();
    let unread = Preamble::new(Role::Control, 0, SessionId::UNREAD);
    if channel.send_preamble(&unread).is_ok() {
        channel.send_abort(why);
    }
}

/// One migration, as it arrives.
///
/// ```
/// use ferry_migration::destination::{Destination, State, Step, Timeouts, exchange_preamble};
/// use ferry_migration::net::{self, MonotonicClock};
/// use ferry_migration::options::Options;
/// use ferry_migration::testing::{MemoryLink, TestDestination, TestSource};
/// use std::sync::Arc;
///
/// // A source that connects once: without data channels, everything comes on one link.
/// let (ours, theirs) = MemoryLink::pair();
/// let source = std::thread::spawn(move || {
///     let mut links = Some(ours);
///     let connect = || links.take().ok_or_else(|| std::io::Error::other("one channel only"));
///     net::migrate(&TestSource::new(64), connect, &Options::default())
/// });
///
/// let timeouts = Timeouts::default();
/// let (channel, preamble) = exchange_preamble(theirs, timeouts.handshake)?;
/// let vm = TestDestination::new(64);
/// let clock = Arc::new(MonotonicClock::new());
/// let mut engine = Destination::new(channel, &preamble, vm.clone(), timeouts, clock);
/// assert_eq!(engine.state(), State::Waiting);
/// // One frame after the other, so that the guest is booked before the source is told.
/// while engine.step()? != Step::Running {}
/// assert!(vm.runs());
/// engine.run()?;
/// assert_eq!(engine.state(), State::Complete);
/// # assert_eq!(source.join().unwrap().error, None);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Destination<L: Link, H: DestinationVm<L>> {
    session: Session<L>,
    host: H,
    phase: Phase<L, H::Sink>,
}

impl<L: Link, H: DestinationVm<L>> Destination<L, H> {
    /// Takes a control channel whose preamble was answered by [`exchange_preamble`].
    pub fn new(
        mut channel: Channel<L>,
        preamble: &Preamble,
        host: H,
        timeouts: Timeouts,
        clock: Arc<dyn Clock + Send + Sync>,
    ) -> Self {
        channel.link().set_timeout(Some(timeouts.handshake));
        channel.link().set_deadline(Some(timeouts.handshake));
        Self {
            session: Session {
                channel,
                connected: true,
                id: preamble.session,
                timeouts,
                clock,
                policy: String::new(),
                buffer: Vec::new(),
            },
            host,
            phase: Phase::Waiting(Waiting::default()),
        }
    }

    /// Where it stands.
    #[must_use]
    pub const fn state(&self) -> State {
        self.phase.state()
    }

    /// The migration.
    #[must_use]
    pub const fn session(&self) -> SessionId {
        self.session.id
    }

    /// The policy that the source named.
    #[must_use]
    pub fn policy(&self) -> &str {
        &self.session.policy
    }

    /// The data channels' meeting point, once the handshake was taken and announced some.
    #[must_use]
    pub fn data_channels(&self) -> Option<&Arc<DataChannelSet<L, H::Sink>>> {
        match &self.phase {
            Phase::Filling(filling) => filling.data_channels.as_ref(),
            _ => None,
        }
    }

    /// The pages that follow the guest, in post-copy: for its fault channels and for those who look
    /// on.
    #[must_use]
    pub fn missing_pages(&self) -> Option<&Arc<MissingPages<L, H::Sink>>> {
        match &self.phase {
            Phase::Filling(filling) => filling.to_follow.as_ref().map(|t| &t.missing_pages),
            phase => phase.push().map(|push| &push.missing_pages),
        }
    }

    /// Whether pages follow the guest.
    #[must_use]
    pub const fn follows(&self) -> bool {
        self.phase.push().is_some()
    }

    /// Takes a fault channel whose preamble was answered; `index` is the preamble's.
    ///
    /// # Errors
    /// When there is no such channel or it is attached already; the peer was told.
    pub fn fault_channel(
        missing_pages: &Arc<MissingPages<L, H::Sink>>,
        mut channel: Channel<L>,
        index: u16,
        timeouts: Timeouts,
    ) -> Result<FaultChannel<L, H::Sink>, DestinationError> {
        let era = missing_pages
            .attach(index)
            .inspect_err(|error| channel.send_abort(&error.to_string()))?;
        let missing_pages = Arc::clone(missing_pages);
        Ok(FaultChannel::new(
            channel,
            missing_pages,
            era,
            timeouts.transfer,
        ))
    }

    /// The host.
    pub const fn host(&mut self) -> &mut H {
        &mut self.host
    }

    /// The host, for good: with it goes the machine.
    pub fn into_host(self) -> H {
        self.host
    }

    /// Handles frames until the guest runs and is complete.
    ///
    /// # Errors
    /// [`DestinationError`]; the state then says what that means: `Discarded` (the source owns
    /// the guest) or `InDoubt` (the machine is kept and does not run).
    pub fn run(&mut self) -> Result<(), DestinationError> {
        while self.step()? != Step::Complete {}
        Ok(())
    }

    /// Handles one frame.
    ///
    /// # Errors
    /// As [`Destination::run`].
    pub fn step(&mut self) -> Result<Step, DestinationError> {
        self.advance_with(|phase, parts| match phase.step(parts) {
            Ok((phase, step)) => (phase, Ok(step)),
            Err(end) => (end.phase, Err(end.error)),
        })
    }

    /// Has the phase consumed, and keeps the next.
    fn advance_with<T>(
        &mut self,
        next: impl FnOnce(Phase<L, H::Sink>, &mut Parts<'_, L, H>) -> (Phase<L, H::Sink>, T),
    ) -> T {
        let from = self.phase.state();
        // What is here meanwhile is seen only if the step panics: then this engine runs no guest.
        let phase = std::mem::replace(&mut self.phase, Phase::Discarded);
        let mut parts = Parts {
            session: &mut self.session,
            host: &mut self.host,
        };
        let (phase, result) = next(phase, &mut parts);
        self.phase = phase;
        let to = self.phase.state();
        if from != to {
            tracing::debug!(session = %self.session.id, ?from, ?to, "destination");
        }
        result
    }

    /// Whether the next step needs no frame.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn needs_no_frame(&self) -> bool {
        match &self.phase {
            Phase::Started(..) => true,
            Phase::Following(push) => push.can_complete(),
            _ => false,
        }
    }
}
