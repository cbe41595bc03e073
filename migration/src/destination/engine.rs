//! The engine: one frame after the other goes to the phase that it finds.

use super::data_channels::DataChannelSet;
use super::error::DestinationError;
use super::faults::FaultChannel;
use super::missing_pages::MissingPages;
use super::phase::{Phase, Waiting};
use super::session::{Parts, Session};
use super::state::{State, Step};
use super::timeouts::Timeouts;
use crate::port::{Clock, DestinationVm, Link};
use crate::wire::{Channel, Preamble, SessionId};
use std::sync::Arc;

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
    pub(super) session: Session<L>,
    pub(super) host: H,
    pub(super) phase: Phase<L, H::Sink>,
}

impl<L: Link, H: DestinationVm<L>> Destination<L, H> {
    /// Takes a control channel whose preamble was answered by
    /// [`exchange_preamble`](super::exchange_preamble).
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
    pub(super) fn advance_with<T>(
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
