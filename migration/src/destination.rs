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
//! Where the source shares the guest's memory itself (`Features::SHARED_MEMORY`), no page comes in Filling. Where it offers
//! the open files of the guest's devices too (`Features::SHARED_FILES`), Waiting is left when those have come.
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
//! Entering Running is a step of its own: RUNNING is sent by the one after it, so that at this end the guest is booked
//! before anybody at the other can know that it has arrived.
//!
//! The guest runs only after a commit was read. Between Ready and the commit nothing but the
//! source's word (or an operator's) ends the doubt: the machine is kept.
//!
//! The engine handles one frame per [`Destination::step`], so that a simulator can drive it; a
//! real destination calls [`Destination::run`].

mod blocks;
mod data_channels;
mod doubt;
mod error;
mod faults;
mod following;
mod hello;
mod missing_pages;
mod pages;

pub use blocks::BlocksError;
pub use data_channels::{DataChannel, DataChannelSet};
pub use error::DestinationError;
pub use faults::FaultChannel;
pub use missing_pages::MissingPages;

use crate::page::{PAGE_SIZE, PageSet, RamLayout};
use crate::port::{Clock, DestinationVm, Link, PageSink};
use crate::verify::page_hash;
use crate::wire::{
    AbortCode, Channel, FrameType, Header, Hello, Preamble, Ready, Role, Running, SessionId,
    WireError, send_set,
};
use blocks::Disks;
use pages::PageReceiver;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// How often a wait looks whether it is over.
const TICK: Duration = Duration::from_millis(100);

/// Where the destination stands; see the module's figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    /// The guest runs and lacks pages, and the connection to the source is lost.
    Interrupted,
}

/// How long the destination waits for the source.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// For all of the handshake, until the machine is built.
    pub handshake: Duration,
    /// For the next frame on any channel while memory arrives; the source is then taken for dead. A frame takes
    /// [`FRAME_TIMEOUTS`] times as long at most, however its bytes trickle.
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
pub enum Step {
    /// More frames are expected.
    Continue,
    /// The guest runs from now on. The source is told so by the next step, not before: whoever drives the engine has
    /// noted whose guest it is when the source hears of it.
    Running,
    /// The guest runs and the source was told.
    Complete,
}

/// Answers a new connection's preamble and says what the connection is for.
///
/// # Errors
/// When the peer does not speak the protocol or is of another version; it was told ours.
pub fn greet<L: Link>(mut link: L, timeout: Duration) -> Result<(Channel<L>, Preamble), WireError> {
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

/// One migration, as it arrives.
pub struct Destination<L: Link, H: DestinationVm<L>> {
    channel: Channel<L>,
    /// The source may still say something on it.
    connected: bool,
    session: SessionId,
    host: H,
    state: State,
    timeouts: Timeouts,
    /// What is coming, while the files that go with it are asked for.
    greeting: Option<Hello>,
    layout: Option<RamLayout>,
    sink: Option<Arc<H::Sink>>,
    data_channels: Option<Arc<DataChannelSet<L, H::Sink>>>,
    clock: Arc<dyn Clock + Send + Sync>,
    /// The guest's memory is the source's own: no page comes.
    shared: bool,
    /// Pages that are to follow the guest, as far as they were listed.
    missing: Option<PageSet>,
    missing_pages: Option<Arc<MissingPages<L, H::Sink>>>,
    /// The connection is one that a source opened to end a doubt: it does not know what is missing.
    reattached: bool,
    /// The guest runs, and the next step tells the source.
    untold: Option<Started>,
    /// The source has said that it pushed everything.
    pushed: bool,
    receiver: PageReceiver,
    /// Disks that move with the guest.
    disks: Disks,
    block_round: u32,
    round: u32,
    /// The pages are all here: what is compared now, or was restored, is not written any more.
    sealed: bool,
    hashes: HashCheck,
    verify: bool,
    policy: String,
    buffer: Vec<u8>,
}

/// When the guest was started, by the engine's clock.
#[derive(Clone, Copy, Debug)]
struct Started {
    /// The commit was read.
    asked: Duration,
    /// The guest's first instruction.
    ran: Duration,
}

/// What comparing hashes has found.
#[derive(Debug, Default)]
struct HashCheck {
    compared: u64,
    different: u64,
    first: Option<u64>,
}

impl<L: Link, H: DestinationVm<L>> Destination<L, H> {
    /// Takes a control channel whose preamble was answered by [`greet`].
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
            channel,
            connected: true,
            session: preamble.session,
            host,
            state: State::Waiting,
            timeouts,
            greeting: None,
            layout: None,
            sink: None,
            data_channels: None,
            clock,
            shared: false,
            missing: None,
            missing_pages: None,
            reattached: false,
            untold: None,
            pushed: false,
            receiver: PageReceiver::default(),
            disks: Disks::none(),
            block_round: 0,
            round: 0,
            sealed: false,
            hashes: HashCheck::default(),
            verify: false,
            policy: String::new(),
            buffer: Vec::new(),
        }
    }

    /// Where it stands.
    #[must_use]
    pub const fn state(&self) -> State {
        self.state
    }

    /// The migration.
    #[must_use]
    pub const fn session(&self) -> SessionId {
        self.session
    }

    /// The policy that the source named.
    #[must_use]
    pub fn policy(&self) -> &str {
        &self.policy
    }

    /// The data channels' meeting point, once the handshake was taken and announced some.
    #[must_use]
    pub const fn data_channels(&self) -> Option<&Arc<DataChannelSet<L, H::Sink>>> {
        self.data_channels.as_ref()
    }

    /// The pages that follow the guest, in post-copy: for its fault channels and for those who look on.
    #[must_use]
    pub const fn missing_pages(&self) -> Option<&Arc<MissingPages<L, H::Sink>>> {
        self.missing_pages.as_ref()
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

    fn enter(&mut self, state: State) {
        tracing::debug!(session = %self.session, from = ?self.state, to = ?state, "destination");
        self.state = state;
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
        let result = self.handle();
        if let Err(error) = &result {
            self.fail(error);
        }
        result
    }

    /// What an error means for who owns the guest.
    fn fail(&mut self, error: &DestinationError) {
        let aborted = matches!(error, DestinationError::Wire(error) if error.is_from_peer());
        match self.state {
            State::Waiting | State::Filling => {
                if !aborted {
                    self.channel.send_abort(&error.to_string());
                }
                self.discard();
            }
            State::Ready | State::InDoubt => {
                if aborted {
                    self.discard();
                } else {
                    // A source that was only slow still says its word on this connection.
                    self.connected = matches!(
                        error,
                        DestinationError::Wire(WireError::Io(e)) if e.kind() == io::ErrorKind::TimedOut
                    );
                    self.lose(error);
                    self.enter(State::InDoubt);
                }
            }
            // Handed over: whatever is wrong with the connection, the guest is here.
            State::Running if self.follows() => {
                self.lose(error);
                if !aborted && !matches!(error, DestinationError::Wire(WireError::Io(_))) {
                    self.channel.send_abort(&error.to_string());
                }
                self.enter(State::Interrupted);
            }
            State::Running | State::Complete | State::Discarded | State::Interrupted => {}
        }
    }

    /// The connection is lost, and with it its other channels.
    fn lose(&self, error: &DestinationError) {
        if let Some(missing_pages) = &self.missing_pages {
            missing_pages.lose(&error.to_string());
        }
        if let Some(data_channels) = &self.data_channels {
            data_channels.close();
        }
    }

    fn discard(&mut self) {
        if let Some(data_channels) = &self.data_channels {
            data_channels.close();
        }
        if let Some(missing_pages) = &self.missing_pages {
            missing_pages.end();
        }
        self.sink = None;
        self.host.discard();
        self.enter(State::Discarded);
    }

    fn handle(&mut self) -> Result<Step, DestinationError> {
        self.set_deadline();
        if let Some(started) = self.untold.take() {
            return self.tell_running(started);
        }
        if self.state == State::Running && self.follows() && !self.wait_for_frame()? {
            return self.completed();
        }
        self.wait_while_data_flows()?;
        let header = self.channel.recv_header()?;
        match (self.state, header.kind) {
            (State::Waiting, kind) if self.greeting.is_some() => {
                let greeting = self.greeting.take().filter(|_| kind == FrameType::Files);
                let files = "the files of the guest's devices";
                let greeting = greeting.ok_or_else(|| self.channel.refuse(&header, files))?;
                self.accept(greeting)?;
            }
            (State::Waiting, FrameType::Hello) => self.hello(&header)?,
            (State::Filling, FrameType::Pages | FrameType::Zero)
                if !self.sealed && !self.shared =>
            {
                self.pages(&header)?
            }
            (State::Filling, FrameType::RoundEnd) if !self.sealed => self.round_end(&header)?,
            (State::Filling, FrameType::Verify) if self.verify => self.compare(&header)?,
            (State::Filling, FrameType::MissingRuns | FrameType::MissingBits)
                if self.missing_pages.is_some() && !self.sealed =>
            {
                self.list_missing(&header)?;
            }
            (State::Filling, FrameType::Blocks | FrameType::BlocksZero | FrameType::BlocksHash)
                if self.takes_blocks(header.kind) =>
            {
                self.disks.receive(&mut self.channel, &header)?;
            }
            (State::Filling, FrameType::BlocksEnd) if self.takes_blocks(header.kind) => {
                self.blocks_end(&header)?;
            }
            (State::Filling, FrameType::State) => self.restore(&header)?,
            (
                State::Ready | State::InDoubt | State::Running | State::Interrupted,
                FrameType::Commit,
            ) => return self.commit(),
            (State::Running, kind) if self.follows() => {
                self.following(&header, kind)?;
                return self.completed();
            }
            (state, _) => return Err(self.channel.refuse(&header, expected_in(state)).into()),
        }
        Ok(Step::Continue)
    }

    /// Nothing that trickles in holds a phase open. The handshake has one deadline for all of it.
    fn set_deadline(&mut self) {
        let deadline = match self.state {
            State::Waiting => return,
            State::Ready | State::InDoubt => self.timeouts.commit,
            _ => self.timeouts.transfer * FRAME_TIMEOUTS,
        };
        self.channel.link().set_deadline(Some(deadline));
    }

    /// The control channel may be silent while pages come on others.
    fn wait_while_data_flows(&mut self) -> Result<(), DestinationError> {
        let Some(data_channels) = &self.data_channels else {
            return Ok(());
        };
        data_channels.heard();
        if self.state != State::Filling {
            return Ok(());
        }
        let mut silence = data_channels.silence();
        while !self
            .channel
            .link()
            .wait_readable(TICK)
            .map_err(WireError::Io)?
        {
            if data_channels.is_silent(&mut silence) {
                return Err(WireError::Io(std::io::ErrorKind::TimedOut.into()).into());
            }
        }
        Ok(())
    }

    /// From now on nothing writes into the guest's memory but what is missing.
    fn seal(&mut self) -> Result<(), DestinationError> {
        if let Some(data_channels) = &self.data_channels {
            data_channels.seal()?;
        }
        self.sealed = true;
        Ok(())
    }

    fn pages(&mut self, header: &Header) -> Result<(), DestinationError> {
        let (Some(sink), Some(layout)) = (&self.sink, &self.layout) else {
            return Err(self.channel.refuse(header, "a greeting").into());
        };
        self.receiver
            .receive(&mut self.channel, header, sink.as_ref(), layout)
    }

    /// Whether blocks of disks may come; their hashes only where they were announced.
    fn takes_blocks(&self, kind: FrameType) -> bool {
        let wanted = match kind {
            FrameType::BlocksHash => self.verify,
            // What was compared is not written any more.
            _ => !self.disks.is_compared(),
        };
        !self.disks.is_empty() && wanted
    }

    /// All blocks that were sent outlast a crash, and the source hears it.
    fn blocks_end(&mut self, header: &Header) -> Result<(), DestinationError> {
        if header.round != self.block_round + 1 {
            return Err(self
                .channel
                .refuse(header, "the end of the next round of blocks")
                .into());
        }
        self.disks.flush()?;
        self.block_round = header.round;
        self.channel
            .send(Header::bare(FrameType::BlocksStored, header.round), &[])?;
        Ok(())
    }

    /// All pages of a round are in place once every data channel has ended it too.
    fn round_end(&mut self, header: &Header) -> Result<(), DestinationError> {
        if header.round != self.round + 1 {
            return Err(self
                .channel
                .refuse(header, "the end of the next round")
                .into());
        }
        if let Some(data_channels) = &self.data_channels {
            data_channels.end_round(header.round)?;
        }
        self.round = header.round;
        self.channel
            .send(Header::bare(FrameType::RoundAck, header.round), &[])?;
        Ok(())
    }

    /// Compares hashes of the source's pages with the pages here.
    fn compare(&mut self, header: &Header) -> Result<(), DestinationError> {
        let Some(sink) = self.sink.clone() else {
            return Err(self.channel.refuse(header, "a greeting").into());
        };
        self.seal()?;
        let mut bytes = std::mem::take(&mut self.buffer);
        self.channel.recv_payload(header, &mut bytes)?;
        let mut page = [0; PAGE_SIZE];
        for (gfn, hash) in (header.gfn..).zip(bytes.chunks_exact(8)) {
            sink.copy_page(gfn, &mut page)
                .map_err(DestinationError::Memory)?;
            if page_hash(gfn, &page).to_le_bytes() != *hash {
                self.hashes.different += 1;
                self.hashes.first.get_or_insert(gfn);
            }
            self.hashes.compared += 1;
        }
        self.buffer = bytes;
        Ok(())
    }

    /// The state is the last thing before "ready": with it the guest must be complete.
    fn restore(&mut self, header: &Header) -> Result<(), DestinationError> {
        let mut bytes = std::mem::take(&mut self.buffer);
        self.channel.recv_payload(header, &mut bytes)?;
        if header.round != self.round {
            return Err(self
                .channel
                .refuse(header, "the end of the last round")
                .into());
        }
        if let Some(first) = self.hashes.first {
            return Err(DestinationError::Differs {
                pages: self.hashes.different,
                first,
            });
        }
        self.seal()?;
        self.disks.complete(self.verify)?;
        let total = self.layout.as_ref().map_or(0, RamLayout::pages);
        let to_follow = self.missing.as_ref().map_or(0, PageSet::len);
        if self.verify && self.hashes.compared != total - to_follow {
            return Err(self
                .channel
                .refuse(header, "the hashes of all pages")
                .into());
        }
        if let (Some(missing), Some(missing_pages), Some(sink)) =
            (self.missing.take(), &self.missing_pages, &self.sink)
        {
            self.host
                .begin_post_copy(&missing)
                .map_err(DestinationError::Unfit)?;
            missing_pages.begin(Arc::clone(sink), missing);
            if let Some(data_channels) = &self.data_channels {
                data_channels.follow(missing_pages);
            }
        }
        let began = self.clock.now();
        self.host.restore(&bytes).map_err(DestinationError::State)?;
        let restore = self.clock.now().saturating_sub(began);
        let ready = Ready {
            verified: self.verify,
            restore_us: u64::try_from(restore.as_micros()).unwrap_or(u64::MAX),
        };
        self.channel.link().set_timeout(Some(self.timeouts.commit));
        // From the first byte of this answer on the source may commit: an error now is a doubt.
        self.enter(State::Ready);
        self.set_deadline();
        self.channel.send_json(FrameType::Ready, &ready)?;
        Ok(())
    }

    /// The source's word: the guest is ours. Saying it twice changes nothing.
    fn commit(&mut self) -> Result<Step, DestinationError> {
        let asked = self.clock.now();
        let mut ran = asked;
        if !matches!(self.state, State::Running | State::Interrupted) {
            if let Err(error) = self.host.claim() {
                self.channel
                    .send_abort_as(AbortCode::NotStarted, &error.to_string());
                self.discard();
                return Err(DestinationError::NotStarted(error));
            }
            match self.host.run() {
                Ok(ago) => ran = self.clock.now().saturating_sub(ago),
                Err(error) => {
                    // Not ours to give back: the source has written the commit down.
                    self.channel
                        .send_abort(&format!("the guest could not be started: {error}"));
                    return Err(DestinationError::Start(error));
                }
            }
        }
        self.enter(State::Running);
        self.untold = Some(Started { asked, ran });
        Ok(Step::Running)
    }

    /// Tells the source that the guest runs here.
    fn tell_running(&mut self, started: Started) -> Result<Step, DestinationError> {
        let missing = self.missing_pages.as_ref().map(|a| a.missing());
        let left = missing.as_ref().map_or(0, PageSet::len);
        let micros = |d: Duration| u64::try_from(d.as_micros()).unwrap_or(u64::MAX);
        // Pages may all be here and not all be compared.
        let compare = self.verify
            && self.follows()
            && self
                .missing_pages
                .as_ref()
                .is_some_and(|a| !a.is_complete());
        let running = Running {
            start_us: micros(started.ran.saturating_sub(started.asked)),
            since_us: micros(self.clock.now().saturating_sub(started.ran)),
            missing: left,
            verify: compare,
            tells: true,
        };
        self.channel
            .link()
            .set_timeout(Some(self.timeouts.transfer));
        self.channel.send_json(FrameType::Running, &running)?;
        if left == 0 && !compare {
            self.finish();
            return Ok(Step::Complete);
        }
        if self.reattached
            && let Some(missing) = missing
        {
            send_set(&mut self.channel, &missing)?;
        }
        Ok(Step::Continue)
    }
}

const fn expected_in(state: State) -> &'static str {
    match state {
        State::Waiting => "a greeting",
        State::Filling => {
            "pages, blocks, the end of the next round, hashes, missing pages or the state"
        }
        State::Ready | State::InDoubt | State::Interrupted => "the commit",
        State::Running | State::Complete | State::Discarded => "nothing more",
    }
}
