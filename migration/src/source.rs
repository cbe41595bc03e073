//! The source engine.
//!
//! ```text
//!              HELLO-ACK        policy: stop      drained        READY, written down   RUNNING
//!  Connecting ─(Disks)──▶ Running ──────▶ Draining ──────▶ Stopped ──────▶ Committed ──────▶ Discardable
//!      │                   │  ▲             │ │               │               │
//!      │                   │  └─────────────┘ │ (pending      │               │ no answer
//!      │   any failure, cancel, give up       │  grew again)  │ resumes       ▼
//!      └──────────┬────────┴──────────────────┴───────────────┘            InDoubt ── recover ──▶ Discardable
//!                 ▼
//!              Aborted (the guest runs here)
//! ```
//!
//! Disks that move with the guest (`source/blocks.rs`) are sent before memory is logged.
//! Where the destination takes the guest's memory itself (`Features::SHARED_MEMORY`), Running goes on with Stopped at once.
//!
//! In post-copy the guest is handed over before its pages, and Committed goes on with
//!
//! ```text
//!             RUNNING             ARRIVED
//!  Committed ────────▶ PostCopy ──────────▶ Discardable
//!                        │   ▲
//!        connection lost ▼   │ recover: the pages that the destination lists as missing
//!                     Interrupted
//! ```
//!
//! Up to and including Stopped, every failure ends in Aborted with the guest running at the
//! source. From Committed on the source never runs the guest by itself.

mod blocks;
mod data_channels;
mod error;
mod handshake;
mod live;
pub(crate) mod post_copy;
mod push;
mod recover;
mod stop;
mod window;

pub use error::SourceError;
pub use recover::recover;

use crate::bandwidth::Bandwidth;
use crate::data_channels::{Channels, DataChannels};
use crate::options::Options;
use crate::order::PushOrder;
use crate::page::{Heat, PageSet, RamLayout};
use crate::policy::{self, Policy, View};
use crate::port::{Clock, Link, SourceVm};
use crate::report::{
    Codecs, Downtime, Event, Faults, Pages, Phase, Progress, Report, Round, Status,
};
use crate::sender::{Pacer, Sender, Sent};
use crate::wire::{Channel, FrameType, Header, Role, SessionId, WireError};
use blocks::Disks;
use post_copy::FaultChannel;
use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

/// Where the source stands; see the module's figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Shaking hands.
    Connecting,
    /// The guest runs, its disks go out.
    Disks,
    /// The guest runs, pages go out.
    Running,
    /// The guest runs; the link is being emptied before the pause.
    Draining,
    /// The guest stands still; the source still owns it.
    Stopped,
    /// Written down and (perhaps) sent.
    Committed,
    /// The destination runs the guest; its pages follow.
    PostCopy,
    /// The destination runs the guest and has all of it.
    Discardable,
    /// The guest runs here.
    Aborted,
    /// Committed and unanswered.
    InDoubt,
    /// The destination runs the guest and lacks pages; the connection is lost.
    Interrupted,
}

impl State {
    const fn phase(self) -> Phase {
        match self {
            Self::Connecting => Phase::Connecting,
            Self::Disks => Phase::Disks,
            Self::Running => Phase::Live,
            Self::Draining => Phase::Draining,
            Self::Stopped => Phase::Stopped,
            Self::Committed => Phase::Committed,
            Self::PostCopy => Phase::PostCopy,
            Self::Discardable => Phase::Completed,
            Self::Aborted => Phase::Aborted,
            Self::InDoubt => Phase::InDoubt,
            Self::Interrupted => Phase::Interrupted,
        }
    }
}

/// The switch between cancelling and committing: exactly one of the two can win.
#[derive(Debug, Default)]
pub struct CancelSwitch(AtomicU8);

const OPEN: u8 = 0;
const CANCELLED: u8 = 1;
const COMMITTED: u8 = 2;

impl CancelSwitch {
    /// Asks for the migration to end. `false` when it is too late: the guest was committed.
    pub fn cancel(&self) -> bool {
        match self
            .0
            .compare_exchange(OPEN, CANCELLED, Ordering::SeqCst, Ordering::SeqCst)
        {
            Ok(_) => true,
            Err(current) => current == CANCELLED,
        }
    }

    /// Whether it was asked for in time.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::SeqCst) == CANCELLED
    }

    /// Closes the switch for cancelling; `false` when it was cancelled before.
    fn commit(&self) -> bool {
        self.0
            .compare_exchange(OPEN, COMMITTED, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
    }
}

/// What the report calls a migration whose memory was handed over: no policy had anything to decide.
const HANDOVER: &str = "handover";

/// How long the engine waits for a peer.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// For the answer to the handshake: the destination builds the machine meanwhile.
    pub handshake: Duration,
    /// For any progress of the link while the guest runs.
    pub transfer: Duration,
    /// For "ready" in the pause; the guest then resumes at the source.
    pub ready: Duration,
    /// For the confirmation of the commit; then the migration is in doubt.
    pub commit: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(20),
            transfer: Duration::from_secs(30),
            ready: Duration::from_secs(30),
            commit: Duration::from_secs(10),
        }
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
    /// The user's way to end it.
    pub cancel: &'a CancelSwitch,
    /// Takes progress and the finished rounds; the report is returned.
    pub events: &'a mut dyn FnMut(Event),
    /// How long to wait for the peer.
    pub timeouts: Timeouts,
    /// Whether page faults are answered by threads of their own. Without, they are answered between
    /// two batches: for simulators, where all must happen in one order.
    pub threads: bool,
}

/// A round that was sent and not yet acknowledged.
#[derive(Clone, Copy, Debug)]
struct InFlight {
    round: u32,
    sent: Sent,
    /// Of the time until `ended`, what the link took.
    link: Duration,
    started: Duration,
    /// When its last byte was handed to the link.
    ended: Duration,
    /// Bytes of disks that went out right before it, and how long that took.
    beside: (u64, Duration),
}

/// How the live phase ended.
enum LiveEnd {
    /// Stop and copy.
    Stop,
    /// Move the guest; its pages follow in this order.
    HandOver(PushOrder),
    /// There was none: the destination has the memory already.
    Shared,
}

/// The source engine: owns everything about one migration but the guest.
pub(crate) struct Source<'a, 'g, L: Link, G: SourceVm<L>> {
    setup: Setup<'a, L>,
    guest: &'g G,
    control: Channel<L>,
    data_channels: Vec<(Channel<L>, Sender)>,
    data_channels_used: DataChannels,
    /// Why so many.
    data_channels_why: String,
    /// When something was last sent on all of them.
    data_channels_at: Duration,
    /// Post-copy's page requests come in on these.
    faults: Vec<FaultChannel<L>>,
    /// Disks that move with the guest.
    disks: Disks,
    sender: Sender,
    pacer: Pacer,
    policy: &'static str,
    /// The destination maps the guest's memory itself.
    shared: bool,
    state: State,
    layout: RamLayout,
    pending: PageSet,
    sent_once: PageSet,
    heat: Heat,
    fresh: PageSet,
    began: Duration,
    /// When memory began to move.
    memory_began: Duration,
    rtt: Duration,
    collected_at: Duration,
    /// Pages found dirty since the round before, over which time, and after which round that was.
    dirtied: (u64, Duration),
    dirtied_round: u32,
    round: u32,
    in_flight: VecDeque<InFlight>,
    /// When the destination's word was there, which was not read yet.
    answered_at: Option<Duration>,
    bandwidth: Bandwidth,
    rounds: Vec<Round>,
    rounds_omitted: u64,
    pages: Pages,
    codecs: Codecs,
    why: Option<String>,
    verified: Option<bool>,
    downtime: Downtime,
    paused_at: Option<Duration>,
    /// When the source became discardable.
    ended: Option<Duration>,
    /// The guest's page faults, as the destination measured them.
    faults_there: Faults,
    /// The destination says when pages that follow the guest are in place.
    tells: bool,
    /// A frame that was read while the push went on, and ends it.
    heard: Option<Header>,
    last_event: Duration,
    progress: Progress,
}

/// Moves a guest; blocks until the end. The guest runs on here unless the report's status is
/// `Completed` or `Interrupted` (it runs at the destination) or `InDoubt` (it runs nowhere).
pub fn migrate<L: Link, G: SourceVm<L>>(guest: &G, setup: Setup<'_, L>) -> Report {
    let mut policy = policy::from_options(setup.options);
    let name = policy.name();
    let session = setup.session.to_string();
    let refused = |error: SourceError| {
        Report::bare(
            session.clone(),
            name.to_owned(),
            error.status(),
            error.to_string(),
        )
    };
    if let Err(error) = setup.options.check() {
        return refused(error.into());
    }
    match Source::connect(guest, setup, Role::Control, name) {
        Ok(mut source) => source.run(policy.as_mut()),
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
        let link = (setup.connect)(role, 0).map_err(SourceError::Connect)?;
        let end = layout.end();
        Ok(Self {
            pacer: Pacer::new(setup.options.bandwidth),
            guest,
            control: Channel::new(link),
            data_channels: Vec::new(),
            data_channels_used: DataChannels::new(0, true),
            data_channels_why: String::new(),
            data_channels_at: began,
            faults: Vec::new(),
            disks: Disks::none(),
            sender: Sender::default(),
            policy,
            shared: false,
            state: State::Connecting,
            pending: layout.all(),
            sent_once: PageSet::new(end),
            heat: Heat::new(end),
            fresh: PageSet::new(end),
            began,
            memory_began: began,
            rtt: Duration::ZERO,
            collected_at: began,
            dirtied: (0, Duration::ZERO),
            dirtied_round: 0,
            round: 0,
            in_flight: VecDeque::new(),
            answered_at: None,
            bandwidth: Bandwidth::default(),
            rounds: Vec::new(),
            rounds_omitted: 0,
            pages: Pages {
                total: layout.pages(),
                ..Pages::default()
            },
            codecs: Codecs::default(),
            why: None,
            verified: None,
            downtime: Downtime::default(),
            paused_at: None,
            ended: None,
            faults_there: Faults::default(),
            tells: false,
            heard: None,
            last_event: began,
            progress: Progress {
                session: setup.session.to_string(),
                policy: policy.to_owned(),
                pages_total: layout.pages(),
                ..Progress::default()
            },
            layout,
            setup,
        })
    }

    fn now(&self) -> Duration {
        self.setup.clock.now()
    }

    fn enter(&mut self, state: State) {
        tracing::debug!(session = %self.setup.session, from = ?self.state, to = ?state, "source");
        self.state = state;
        if state == State::Discardable {
            self.ended = Some(self.now());
        }
        self.progress.phase = state.phase();
        self.emit_progress();
    }

    fn run(&mut self, policy: &mut dyn Policy) -> Report {
        let result = self
            .handshake()
            .and_then(|()| self.copy_disks())
            .and_then(|()| {
                if self.shared {
                    return Ok(LiveEnd::Shared);
                }
                self.start_tracking()?;
                self.live(policy)
            })
            .and_then(|end| match end {
                LiveEnd::Stop => self.stop_and_copy(),
                LiveEnd::HandOver(order) => self.hand_over(order),
                LiveEnd::Shared => self.hand_memory_over(),
            });
        self.finish(result)
    }

    /// What the end means for who owns the guest.
    fn finish(&mut self, result: Result<(), SourceError>) -> Report {
        let broken = matches!(&result, Err(SourceError::Wire(WireError::Io(_))));
        let error = result.err().map(|error| self.explain(error));
        let status = match (&error, self.state) {
            (None, _) | (Some(_), State::Discardable) => Status::Completed,
            (Some(_), State::Committed) => {
                self.guest.stop_tracking();
                self.enter(State::InDoubt);
                Status::InDoubt
            }
            (Some(error), State::PostCopy) => {
                if !matches!(error, SourceError::Wire(_)) {
                    self.control.send_abort(&error.to_string());
                }
                self.enter(State::Interrupted);
                Status::Interrupted
            }
            (Some(error), _) => {
                let status = error.status();
                self.abort(error, broken);
                status
            }
        };
        self.disks.stop();
        let report = self.report(status, error.map(|error| error.to_string()));
        if self.state == State::Discardable {
            self.guest.release();
        }
        report
    }

    /// What the user wants to know: a connection that the peer closed often holds its reason.
    fn explain(&mut self, error: SourceError) -> SourceError {
        // A wait that the user ended looks like a broken connection.
        if matches!(error, SourceError::Wire(WireError::Io(_))) && self.setup.cancel.is_cancelled()
        {
            return SourceError::Cancelled;
        }
        if !matches!(error, SourceError::Wire(WireError::Io(_)))
            || !self.control.link().readable().unwrap_or(false)
        {
            return error;
        }
        self.control
            .link()
            .set_timeout(Some(Duration::from_millis(200)));
        // Acknowledgements may still lie before it.
        for _ in 0..4 {
            match self.control.recv_header() {
                Ok(header)
                    if matches!(header.kind, FrameType::RoundAck | FrameType::BlocksStored) => {}
                Ok(header) if header.kind == FrameType::Abort => {
                    return self.control.refuse(&header, "").into();
                }
                _ => break,
            }
        }
        error
    }

    /// Ends a migration that was not committed: the guest runs here, the peer is told; on a new connection where the
    /// old one is `broken`.
    fn abort(&mut self, error: &SourceError, broken: bool) {
        let was = self.state;
        if was == State::Stopped {
            self.guest.resume();
            if let Some(at) = self.paused_at {
                self.downtime.start_ms = ms(self.now().saturating_sub(at));
            }
        }
        if was != State::Connecting {
            self.guest.stop_tracking();
        }
        let told = matches!(error, SourceError::Wire(error) if error.is_from_peer());
        if !told {
            self.control.send_abort(&error.for_peer());
        }
        self.enter(State::Aborted);
        if was == State::Stopped && broken && !told {
            // The destination may be ready and wait for a commit that will never come.
            recover::tell_abort(&mut self.setup, &error.for_peer());
        }
    }

    fn check_cancel(&self) -> Result<(), SourceError> {
        if self.setup.cancel.is_cancelled() {
            Err(SourceError::Cancelled)
        } else {
            Ok(())
        }
    }

    /// What the policy may look at.
    fn view(&self) -> View<'_> {
        View {
            round: self.round,
            total_pages: self.pages.total,
            pending: &self.pending,
            pending_pages: self.pending.len(),
            sent: &self.sent_once,
            heat: &self.heat,
            dirtied_pages: self.dirtied.0,
            dirtied_over: self.dirtied.1,
            bandwidth: self.bandwidth.estimate(),
            cap: self.setup.options.bandwidth.map(|cap| cap as f64),
            state_bytes: self.guest.state_bytes(),
            disk_bytes: self.disks.pending_bytes(),
            pause_overhead: 2 * self.rtt + policy::STOP_AND_START,
            elapsed: self.now().saturating_sub(self.memory_began),
        }
    }

    fn bytes_wire(&self) -> u64 {
        self.control.sent()
            + self
                .data_channels
                .iter()
                .map(|(channel, _)| channel.sent())
                .sum::<u64>()
            + self
                .faults
                .iter()
                .map(|fault| fault.channel.sent())
                .sum::<u64>()
    }

    fn emit_progress(&mut self) {
        let view = self.view();
        let (predicted, pending) = (view.predicted_downtime(), view.pending_pages);
        let moved = self.state == State::PostCopy;
        self.progress.predicted_downtime_ms = predicted.map(ms).filter(|_| !moved);
        self.progress.pending_pages = pending;
        if let Some(disk) = self.disks.report() {
            self.progress.disk_total = Some(disk.total);
            self.progress.disk_pending = Some(self.disks.pending_bytes().min(disk.total));
        }
        self.progress.round = self.round + 1;
        self.progress.elapsed_ms = ms(self.now().saturating_sub(self.began));
        self.progress.dirtied_pages = self.dirtied.0;
        self.progress.bytes_wire = self.bytes_wire();
        self.progress.mbps = self.bandwidth.estimate().unwrap_or(0.0) / 1e6;
        self.last_event = self.now();
        (self.setup.events)(Event::Progress(self.progress.clone()));
    }

    fn channels(&self) -> Channels {
        let opened = u16::try_from(self.data_channels.len()).unwrap_or(u16::MAX);
        let used = self.data_channels_used.used().min(opened);
        Channels {
            opened,
            used,
            bytes: self
                .data_channels
                .iter()
                .map(|(data_channel, _)| data_channel.sent())
                .collect(),
            why: self.data_channels_used.reason(&self.data_channels_why),
        }
    }

    fn report(&mut self, status: Status, error: Option<String>) -> Report {
        self.drop_unacknowledged();
        let ended = self.ended.unwrap_or_else(|| self.now());
        let total = ended.saturating_sub(self.began);
        let bytes_wire = self.bytes_wire();
        let d = &self.downtime;
        Report {
            guest_ended: false,
            schema: Report::SCHEMA,
            session: self.setup.session.to_string(),
            policy: self.policy.to_owned(),
            status,
            error,
            total_ms: ms(total),
            downtime_ms: d.quiesce_ms + d.last_pages_ms + d.state_ms + d.start_ms,
            downtime: self.downtime.clone(),
            rounds: std::mem::take(&mut self.rounds),
            rounds_omitted: self.rounds_omitted,
            pages: self.pages.clone(),
            codecs: self.codecs,
            channels: self.channels(),
            disk: self.disks.report(),
            bytes_wire,
            mbps: bytes_wire as f64 / total.as_secs_f64().max(1e-6) / 1e6,
            faults: std::mem::take(&mut self.faults_there),
            verified: self.verified,
            why: self.why.take(),
        }
    }
}
