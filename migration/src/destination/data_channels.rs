//! Data channels at the destination: each in a thread of its own, meeting at the end of a round.
//!
//! What a channel may do is what the set gives it for a frame:
//!
//! ```text
//!                   STATE                      post-copy: STATE
//!  Filling ────────────────────────────▶ Sealed ───────────────▶ Following
//!  writes guest memory                   writes nothing          places missing pages, each once
//! ```
//!
//! So before READY no channel can write into the guest, and what is written after it was compared
//! counts as not compared.

use super::error::DestinationError;
use super::hashes::Hashes;
use super::missing_pages::MissingPages;
use super::pages::{PageReceiver, tell_placed};
use super::timeouts::FRAME_TIMEOUTS;
use crate::codec::Decoder;
use crate::page::{AtomicPageSet, RamLayout};
use crate::port::{Clock, Link, PageSink};
use crate::sync::{lock, wait_timeout};
use crate::wire::{Channel, Features, FrameType, Header, WireError};
use std::marker::PhantomData;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// How often a wait looks whether it is over.
const TICK: Duration = Duration::from_millis(100);

/// Where the pages of a frame go.
enum Target<L, S> {
    /// Into the memory of a guest that does not run.
    Filling(Arc<S>),
    /// Nowhere.
    Sealed,
    /// Into the memory of a guest at which they are missing.
    Following(Arc<MissingPages<L, S>>),
}

impl<L, S> Clone for Target<L, S> {
    fn clone(&self) -> Self {
        match self {
            Self::Filling(sink) => Self::Filling(Arc::clone(sink)),
            Self::Sealed => Self::Sealed,
            Self::Following(missing_pages) => Self::Following(Arc::clone(missing_pages)),
        }
    }
}

/// Where the data channels stand.
struct SetState<L, S> {
    /// The last round that each data channel has ended, the control channel's last.
    rounds: Vec<u32>,
    attached: Vec<bool>,
    failed: Option<(u16, String)>,
    closed: bool,
    target: Target<L, S>,
    /// Channels that are in the middle of a frame of pages.
    writing: usize,
    /// Counts the frames of all channels, the control channel's included.
    frames: u64,
}

/// The meeting point of a migration's data channels.
pub struct DataChannelSet<L, S> {
    layout: RamLayout,
    agreed: Features,
    copies: Arc<AtomicPageSet>,
    hashes: Option<Arc<Hashes>>,
    timeout: Duration,
    clock: Arc<dyn Clock + Send + Sync>,
    state: Mutex<SetState<L, S>>,
    change: Condvar,
    link: PhantomData<fn(L)>,
}

/// One data channel.
pub struct DataChannel<L, S> {
    channel: Channel<L>,
    index: u16,
    set: Arc<DataChannelSet<L, S>>,
    receiver: PageReceiver,
}

/// A data channel is in the middle of pages.
struct PagesFrame<'a, L: Link, S: PageSink<L>> {
    set: &'a DataChannelSet<L, S>,
    target: Target<L, S>,
}

impl<L: Link, S: PageSink<L>> Drop for PagesFrame<'_, L, S> {
    fn drop(&mut self) {
        // The set may be sealed next: nothing of the target is held then.
        if matches!(
            std::mem::replace(&mut self.target, Target::Sealed),
            Target::Sealed
        ) {
            return;
        }
        let mut state = self.set.state();
        state.writing -= 1;
        state.frames += 1;
    }
}

/// Notices that no channel of a migration has brought anything for too long.
pub(super) struct Silence {
    frames: u64,
    since: Duration,
}

impl<L: Link, S: PageSink<L>> DataChannelSet<L, S> {
    pub(super) fn new(
        sink: Arc<S>,
        layout: RamLayout,
        (agreed, copies, hashes): (Features, Arc<AtomicPageSet>, Option<Arc<Hashes>>),
        count: u16,
        timeout: Duration,
        clock: Arc<dyn Clock + Send + Sync>,
    ) -> Self {
        let state = SetState {
            rounds: vec![0; usize::from(count) + 1],
            attached: vec![false; usize::from(count)],
            failed: None,
            closed: false,
            target: Target::Filling(sink),
            writing: 0,
            frames: 0,
        };
        Self {
            layout,
            agreed,
            copies,
            hashes,
            timeout,
            clock,
            state: Mutex::new(state),
            change: Condvar::new(),
            link: PhantomData,
        }
    }

    fn state(&self) -> MutexGuard<'_, SetState<L, S>> {
        lock(&self.state)
    }

    /// Takes a data channel whose preamble was answered; `index` is the preamble's.
    ///
    /// # Errors
    /// When there is no such channel or it is attached already.
    pub fn attach(
        self: &Arc<Self>,
        mut channel: Channel<L>,
        index: u16,
    ) -> Result<DataChannel<L, S>, DestinationError> {
        {
            let mut state = self.state();
            match state.attached.get_mut(usize::from(index)) {
                Some(attached) if !*attached => *attached = true,
                _ => {
                    return Err(DestinationError::DataChannel {
                        index,
                        reason: "no such data channel was announced, or it is connected already"
                            .into(),
                    });
                }
            }
        }
        channel.set_end(self.layout.end());
        channel.link().set_timeout(Some(self.timeout));
        Ok(DataChannel {
            channel,
            index,
            set: Arc::clone(self),
            receiver: PageReceiver::new(
                Decoder::new(self.agreed, Arc::clone(&self.copies)),
                self.hashes.clone(),
            ),
        })
    }

    /// From now on no data channel writes into the guest. Every channel has ended the last round.
    ///
    /// # Errors
    /// A channel is in the middle of pages that belong to no round.
    pub(super) fn seal(&self) -> Result<(), DestinationError> {
        let mut state = self.state();
        if state.writing > 0 {
            return Err(DestinationError::PagesAfterState);
        }
        state.target = Target::Sealed;
        Ok(())
    }

    /// From now on the channels bring what is missing.
    pub(super) fn follow(&self, missing_pages: &Arc<MissingPages<L, S>>) {
        self.state().target = Target::Following(Arc::clone(missing_pages));
    }

    /// Begins a frame of pages, which ends when the value is dropped, also by a panic: a set that
    /// counts a writer that is gone could never be sealed.
    fn begin_pages(&self) -> PagesFrame<'_, L, S> {
        let mut state = self.state();
        if !matches!(state.target, Target::Sealed) {
            state.writing += 1;
        }
        PagesFrame {
            set: self,
            target: state.target.clone(),
        }
    }

    /// A frame has come on a channel.
    pub(super) fn received(&self) {
        self.state().frames += 1;
    }

    /// Begins to watch for silence.
    pub(super) fn silence(&self) -> Silence {
        Silence {
            frames: self.state().frames,
            since: self.clock.now(),
        }
    }

    /// Whether every channel has been silent for too long. One that is in the middle of a frame is
    /// not: its link notices that by itself.
    pub(super) fn is_silent(&self, silence: &mut Silence) -> bool {
        self.silent(&self.state(), silence)
    }

    fn silent(&self, state: &SetState<L, S>, silence: &mut Silence) -> bool {
        let now = self.clock.now();
        if state.frames != silence.frames || state.writing > 0 {
            (silence.frames, silence.since) = (state.frames, now);
        }
        now.saturating_sub(silence.since) >= self.timeout
    }

    /// The control channel has ended `round`; waits until every data channel has.
    pub(super) fn end_round(&self, round: u32) -> Result<(), DestinationError> {
        if let Some(ended) = self.state().rounds.last_mut() {
            *ended = round;
        }
        self.change.notify_all();
        self.wait(round)
    }

    /// Waits until every data channel and the control channel have ended `round`, for as long as
    /// any channel brings something.
    fn wait(&self, round: u32) -> Result<(), DestinationError> {
        let mut silence = self.silence();
        let mut state = self.state();
        loop {
            if let Some((index, reason)) = &state.failed {
                return Err(DestinationError::DataChannel {
                    index: *index,
                    reason: reason.clone(),
                });
            }
            let missing = state.rounds.iter().filter(|&&ended| ended < round).count();
            if missing == 0 {
                return Ok(());
            }
            if state.closed || self.silent(&state, &mut silence) {
                return Err(DestinationError::DataChannelSilent { round, missing });
            }
            state = wait_timeout(&self.change, state, TICK.min(self.timeout));
        }
    }

    fn is_closed(&self) -> bool {
        self.state().closed
    }

    /// The migration is over: data channels that fail from now on do not matter.
    pub(super) fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        state.target = Target::Sealed;
        drop(state);
        self.change.notify_all();
    }
}

impl<L: Link, S: PageSink<L>> DataChannel<L, S> {
    /// Handles frames until the channel ends.
    pub fn run(mut self) {
        if let Err(error) = self.receive() {
            let mut state = self.set.state();
            if !state.closed {
                state.failed.get_or_insert((self.index, error.to_string()));
            }
            drop(state);
            self.set.change.notify_all();
        }
    }

    fn receive(&mut self) -> Result<(), DestinationError> {
        while self.wait_for_frame()? {
            let header = self.channel.recv_header()?;
            match header.kind {
                FrameType::Pages | FrameType::Zero => self.pages(&header)?,
                FrameType::Alive => self.set.received(),
                FrameType::RoundEnd => self.round_end(&header)?,
                _ => {
                    return Err(self
                        .channel
                        .refuse(&header, "pages or the end of a round")
                        .into());
                }
            }
        }
        Ok(())
    }

    /// Waits for a frame while any channel brings something; `false` when the migration is over.
    fn wait_for_frame(&mut self) -> Result<bool, DestinationError> {
        let mut silence = self.set.silence();
        loop {
            let ready = self.channel.link().wait_readable(TICK);
            if ready.map_err(WireError::Io)? {
                let deadline = self.set.timeout * FRAME_TIMEOUTS;
                self.channel.link().set_deadline(Some(deadline));
                return Ok(true);
            }
            if self.set.is_closed() {
                return Ok(false);
            }
            if self.set.is_silent(&mut silence) {
                return Err(WireError::Io(std::io::ErrorKind::TimedOut.into()).into());
            }
        }
    }

    fn pages(&mut self, header: &Header) -> Result<(), DestinationError> {
        let Self {
            channel,
            set,
            receiver,
            ..
        } = self;
        let frame = set.begin_pages();
        match &frame.target {
            Target::Sealed => Err(channel
                .refuse(header, "nothing more: the guest is complete")
                .into()),
            Target::Filling(sink) => receiver.receive(channel, header, sink.as_ref(), &set.layout),
            Target::Following(missing_pages) => receiver
                .receive_to(channel, header, missing_pages)
                .and_then(|()| tell_placed(channel, header)),
        }
    }

    fn round_end(&mut self, header: &Header) -> Result<(), DestinationError> {
        let mut state = self.set.state();
        let ended = &mut state.rounds[usize::from(self.index)];
        if header.round != *ended + 1 {
            return Err(WireError::Unexpected {
                kind: header.kind,
                round: header.round,
                expected: "the end of the next round",
            }
            .into());
        }
        *ended = header.round;
        state.frames += 1;
        drop(state);
        self.set.change.notify_all();
        // A page of the next round may have been sent in this one on another channel, and be still
        // on its way there: it must not be placed over the newer one, and it may be what that one
        // differs from.
        self.set.wait(header.round)
    }
}
