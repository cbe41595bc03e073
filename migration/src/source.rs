//! The source engine.
//!
//! ```text
//!              HELLO-ACK      policy: stop, drained    pause         READY, written down    RUNNING
//!  Connecting ─(disks)──▶ Live ───────────▶ Stopping ──────▶ Stopped ───────────▶ CommitSent ────────▶ Confirmed ─▶ Moved
//!      │                   │                   │               │                    │    │                ▲
//!      │   any failure, cancel, the policy     │   resumes     │        NOT STARTED │    │ no answer      │
//!      └──────────┬────────┴───────────────────┴───────────────┘◀───────────────────┘    ▼                │
//!                 ▼                                                     InDoubt ── COMMIT again, recover ─┘
//!              the guest runs here
//! ```
//!
//! Every box is a type (`source/phases.rs`) that consumes itself and owns what it needs: the
//! started log, the [`Paused`](crate::port::Paused) guest, the
//! [`Committed`](crate::port::Committed) guest. What it drops on an error is undone: up to and
//! including Stopped, every failure leaves the guest running at the source. From CommitSent on the
//! source never runs the guest by itself; [`Ownership`] says so to everybody else.
//!
//! Disks that move with the guest (`source/blocks.rs`) are sent before memory is logged. Where the
//! destination takes the guest's memory itself (`Features::SHARED_MEMORY`), Connecting goes on with
//! Stopping at once.
//!
//! In post-copy the guest is handed over before its pages, and Confirmed goes on with
//!
//! ```text
//!             RUNNING             ARRIVED
//!  CommitSent ───────▶ Confirmed ──────────▶ Moved
//!                        │   ▲
//!        connection lost ▼   │ recover: the pages that the destination lists as missing
//!                     Interrupted
//! ```

mod blocks;
mod commit;
mod data_channels;
mod error;
mod flush;
mod freeing;
mod handshake;
mod helm;
mod live;
mod owner;
// Here, as `owner.rs` is compiled with other atomics too.
#[cfg(test)]
#[path = "source/owner/tests.rs"]
mod owner_tests;
mod parts;
mod phases;
pub(crate) mod post_copy;
mod push;
mod record;
mod round;
mod session;
mod stop;
mod throttle;
mod window;

pub use commit::{AbortTold, recover, tell_abort};
pub use error::SourceError;
pub use owner::{Owner, Ownership};

use crate::model::policy_of;
use crate::options::Options;
use crate::policy::{Policy, STOP_AND_START, View};
use crate::port::{Clock, Link, SourceVm};
use crate::report::{Event, Phase, Report, Status};
use crate::steering::Steering;
use crate::wire::{FrameType, Role, SessionId, WireError};
use blocks::Disks;
use helm::Helm;
use parts::{Flight, InFlight, Memory, Transport};
use phases::{Agreed, Connecting, End, Moved};
use record::Record;
use session::Session;
use std::io;
use std::time::Duration;

/// What the report calls a migration whose memory was handed over: no policy had anything to
/// decide.
const HANDOVER: &str = "handover";

/// How long the engine waits for a peer.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// For the whole handshake: the destination builds the machine meanwhile.
    pub handshake: Duration,
    /// For any progress of the link while the guest runs.
    pub transfer: Duration,
    /// For any progress in the pause, which [`Options::max_pause`] bounds as a whole; the guest
    /// then resumes at the source.
    pub ready: Duration,
    /// For the confirmation of the commit, on each connection that it is sent on.
    pub commit: Duration,
    /// For as long the commit is repeated before the migration is reported as in doubt.
    pub doubt: Duration,
    /// The source says at least so often on each channel that it lives.
    pub alive: Duration,
}

impl Timeouts {
    /// What `ferry` uses.
    pub const DEFAULT: Self = Self {
        handshake: Duration::from_secs(20),
        transfer: Duration::from_secs(30),
        ready: Duration::from_secs(30),
        commit: Duration::from_secs(10),
        doubt: Duration::from_secs(10),
        // A twelfth of what the destination waits.
        alive: Duration::from_secs(5),
    };
}

impl Default for Timeouts {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// What the engine works with.
pub struct Setup<'a, L: Link> {
    /// Opens a channel: the role and its index.
    pub connect: &'a mut dyn FnMut(Role, u16) -> io::Result<L>,
    /// Time.
    pub clock: &'a dyn Clock,
    /// What the user asked for.
    pub options: &'a Options,
    /// Names the migration; random.
    pub session: SessionId,
    /// Who owns the guest, for those who look on, and the user's way to cancel.
    pub owner: &'a Ownership,
    /// The user's way to change what the options say while it runs.
    pub steering: &'a Steering,
    /// Takes progress and the finished rounds; the report is returned.
    pub events: &'a mut dyn FnMut(Event),
    /// How long to wait for the peer.
    pub timeouts: Timeouts,
    /// Whether page faults are answered by threads of their own. Without, they are answered between
    /// two batches: for simulators, where all must happen in one order.
    pub threads: bool,
}

/// The source engine: the parts that every phase works with.
pub(crate) struct Source<'a, 'g, L: Link, G: SourceVm<L>> {
    guest: &'g G,
    session: Session<'a, L>,
    transport: Transport<L>,
    memory: Memory,
    /// Disks that move with the guest.
    disks: Disks,
    flight: Flight,
    helm: Helm,
    record: Record,
}

/// Moves a guest by the policy that the options name; see [`migrate_with`].
pub fn migrate<L: Link, G: SourceVm<L>>(guest: &G, setup: Setup<'_, L>) -> Report {
    let mut policy = policy_of(setup.options);
    migrate_with(guest, setup, policy.as_mut())
}

/// Moves a guest by a policy of the caller's; blocks until the end. The guest runs on here unless
/// the report's status is `Completed` or `Interrupted` (it runs at the destination) or `InDoubt`
/// (it runs nowhere).
///
/// Of the options the engine itself uses all but [`Options::policy`] and what only a policy reads.
/// A user who [steers](crate::steering) to another policy gets the one that the options name.
/// Post-copy ([`Decision::HandOver`](crate::policy::Decision::HandOver)) must be agreed on in the
/// handshake: it is where [`Options::may_post_copy`] holds.
///
/// ```
/// use ferry_migration::net::{self, MonotonicClock};
/// use ferry_migration::policy::{Decision, Policy, View};
/// use ferry_migration::source::{Ownership, Setup, Timeouts, migrate_with};
/// use ferry_migration::testing::{MemoryLink, TestDestination, TestSource};
/// use ferry_migration::{destination, options::Options, report::Status, steering::Steering};
///
/// /// Sends nothing while the guest runs: all of it goes out in the pause.
/// struct StopAtOnce;
///
/// impl Policy for StopAtOnce {
///     fn name(&self) -> &'static str {
///         "stop-at-once"
///     }
///
///     fn next(&mut self, view: &View<'_>) -> Decision {
///         let why = format!("{} pages are sent in the pause", view.pending_pages);
///         Decision::Stop { why }
///     }
/// }
///
/// // A guest of 64 pages, and a destination behind a link in memory.
/// let (guest, there) = (TestSource::new(64), TestDestination::new(64));
/// let (ours, theirs) = MemoryLink::pair();
/// let vm = there.clone();
/// let receiver = std::thread::spawn(move || {
///     let mut links = Some(theirs);
///     let accept = |_| Ok(links.take());
///     net::receive(accept, vm, destination::Timeouts::default()).is_ok()
/// });
///
/// let mut links = Some(ours);
/// let setup = Setup {
///     connect: &mut |_, _| links.take().ok_or_else(|| std::io::Error::other("one channel only")),
///     clock: &MonotonicClock::new(),
///     options: &Options::default(),
///     session: net::session_id(),
///     owner: &Ownership::default(),
///     steering: &Steering::default(),
///     events: &mut |event| println!("{event:?}"),
///     timeouts: Timeouts::default(),
///     threads: true,
/// };
/// let report = migrate_with(&guest, setup, &mut StopAtOnce);
/// assert_eq!(report.status, Status::Completed, "{:?}", report.error);
/// assert_eq!(report.policy, "stop-at-once");
/// assert!(receiver.join().unwrap() && there.runs() && !guest.runs());
/// ```
pub fn migrate_with<L: Link, G: SourceVm<L>>(
    guest: &G,
    setup: Setup<'_, L>,
    policy: &mut dyn Policy,
) -> Report {
    let name = policy.name();
    let session = setup.session.to_string();
    let refused = |error: SourceError| {
        let (status, why) = (error.status(), error.to_string());
        Report::bare(session.clone(), name.to_owned(), status, why)
    };
    if let Err(error) = setup.options.check() {
        return refused(error.into());
    }
    match Source::connect(guest, setup, Role::Control, name) {
        Ok(mut source) => {
            let end = source.run(policy);
            let end = source.resolve(end);
            source.finish(end)
        }
        Err(error) => refused(error),
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

impl<'a, 'g, L: Link, G: SourceVm<L>> Source<'a, 'g, L, G> {
    /// An engine with nothing but its control channel, whose preamble was not sent yet.
    fn connect(
        guest: &'g G,
        setup: Setup<'a, L>,
        role: Role,
        policy: &'static str,
    ) -> Result<Self, SourceError> {
        let began = setup.clock.now();
        let layout = guest.layout();
        let helm = Helm::new(setup.options);
        Ok(Self {
            guest,
            transport: Transport::new(setup.options, began),
            record: Record::new(&setup, policy, layout.pages(), began),
            session: Session::connect(setup, role)?,
            memory: Memory::new(layout, began),
            disks: Disks::none(),
            flight: Flight::default(),
            helm,
        })
    }

    fn now(&self) -> Duration {
        self.session.now()
    }

    /// Shows where the migration stands.
    fn enter(&mut self, phase: Phase) {
        let (session, from) = (self.session.setup.session, self.record.progress.phase);
        tracing::debug!(%session, ?from, to = ?phase, "source");
        self.record.progress.phase = phase;
        if phase == Phase::Completed {
            self.record.ended = Some(self.now());
        }
        self.emit_progress();
    }

    fn run(&mut self, policy: &mut dyn Policy) -> Result<Moved<'g>, End<'g>> {
        let stopping = match (Connecting { source: self }).shake_hands()? {
            Agreed::Send(live) => live.run(policy)?,
            Agreed::Share(stopping) => stopping,
        };
        stopping.move_guest()
    }

    /// What the end means for who owns the guest. The guest runs already where it can: this only
    /// explains and tells.
    fn finish(&mut self, end: Result<Moved<'g>, End<'g>>) -> Report {
        self.session.setup.steering.end();
        let mut retry_commit = false;
        let mut abort_untold = None;
        let (status, error, moved) = match end {
            Ok(Moved { committed, error }) => (Status::Completed, error, Some(committed)),
            Err(End::Here(error)) => {
                let lost = matches!(
                    error,
                    SourceError::Wire(WireError::Io(_))
                        | SourceError::Silent(_)
                        | SourceError::PauseTooLong
                );
                let error = self.explain(error);
                abort_untold = self.abort(&error, lost);
                (error.status(), Some(error), None)
            }
            Err(End::InDoubt { error, committed }) => {
                retry_commit = committed.is_some() && error.may_retry();
                let error = self.explain(error);
                self.enter(Phase::InDoubt);
                (Status::InDoubt, Some(error), None)
            }
            Err(End::Interrupted(error)) => {
                let error = self.explain(error);
                if !matches!(error, SourceError::Wire(_)) {
                    self.session.control.send_abort(&error.to_string());
                }
                self.enter(Phase::Interrupted);
                (Status::Interrupted, Some(error), None)
            }
        };
        self.disks.stop();
        let mut report = self.report(status, error.map(|error| error.to_string()));
        report.retry_commit = retry_commit;
        report.abort_untold = abort_untold;
        if let Some(committed) = moved {
            committed.release();
        }
        report
    }

    /// What the user wants to know: a connection that the peer closed often holds its reason.
    fn explain(&mut self, error: SourceError) -> SourceError {
        const LAST_WORDS: Duration = Duration::from_millis(200);
        self.session.wait_at_most(LAST_WORDS, None);
        if !matches!(error, SourceError::Wire(WireError::Io(_))) {
            return error;
        }
        // A wait that the user ended looks like a broken connection.
        if self.session.setup.owner.is_cancelled() {
            return SourceError::Cancelled;
        }
        let control = &mut self.session.control;
        if !control.link().readable().unwrap_or(false) {
            return error;
        }
        // Acknowledgements may still lie before it.
        for _ in 0..4 {
            match control.recv_header() {
                Ok(header)
                    if matches!(
                        header.kind,
                        FrameType::RoundAck | FrameType::BlocksStored | FrameType::Alive
                    ) => {}
                Ok(header) if header.kind == FrameType::Abort => {
                    return control.refuse(&header, "").into();
                }
                _ => break,
            }
        }
        error
    }

    /// Tells the peer that the guest stays here; on a new connection where the old one is `lost`.
    /// Returns what a destination that may be ready could not be told.
    fn abort(&mut self, error: &SourceError, lost: bool) -> Option<String> {
        let told = matches!(error, SourceError::Wire(error) if error.is_from_peer());
        let reason = error.for_peer();
        if !told {
            self.session.control.send_abort(&reason);
        }
        self.enter(Phase::Aborted);
        // The destination may be ready and wait for a commit that will never come.
        if self.record.paused_at.is_none() || !lost || told {
            return None;
        }
        match tell_abort(&mut self.session.setup, &reason) {
            AbortTold::Answered => None,
            AbortTold::Unanswered => Some(reason),
        }
    }

    /// What the policy may look at.
    fn view(&self) -> View<'_> {
        View {
            round: self.flight.round,
            total_pages: self.record.pages.total,
            pending: &self.memory.pending,
            pending_pages: self.memory.pending.len(),
            sent: &self.memory.sent_once,
            heat: &self.memory.heat,
            written: &self.memory.written,
            dirtied_pages: self.memory.dirtied.0,
            dirtied_over: self.memory.dirtied.1,
            bandwidth: self.flight.bandwidth.estimate(),
            cap: self.helm.options.bandwidth.map(|cap| cap as f64),
            state_bytes: self.guest.state_bytes(),
            disk_bytes: self.disks.pending_bytes(),
            pause_overhead: 2 * self.session.rtt + STOP_AND_START + self.record.flush_took,
            round_trip: self.session.rtt,
            post_copy: !self.transport.faults.is_empty(),
            elapsed: self.now().saturating_sub(self.record.memory_began),
        }
    }
}
