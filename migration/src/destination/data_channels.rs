//! Data channels at the destination: each in a thread of its own, meeting at the end of a round.

use super::DestinationError;
use super::following::tell_placed;
use super::missing_pages::MissingPages;
use super::pages::PageReceiver;
use crate::codec::Decoder;
use crate::codec::marks::Marks;
use crate::page::RamLayout;
use crate::port::{Link, PageSink};
use crate::wire::{Channel, Features, FrameType, WireError};
use std::marker::PhantomData;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What the data channels have told.
#[derive(Debug, Default)]
struct Told {
    /// The last round that each data channel has ended, the control channel's last.
    rounds: Vec<u32>,
    attached: Vec<bool>,
    failed: Option<(u16, String)>,
    closed: bool,
}

/// The meeting point of a migration's data channels.
pub struct DataChannelSet<L, S> {
    sink: Arc<S>,
    layout: RamLayout,
    agreed: Features,
    copies: Arc<Marks>,
    /// In post-copy, once the guest runs.
    missing_pages: Option<Arc<MissingPages<L, S>>>,
    timeout: Duration,
    told: Mutex<Told>,
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

impl<L: Link, S: PageSink<L>> DataChannelSet<L, S> {
    pub(super) fn new(
        sink: Arc<S>,
        layout: RamLayout,
        (agreed, copies): (Features, Arc<Marks>),
        missing_pages: Option<Arc<MissingPages<L, S>>>,
        count: u16,
        timeout: Duration,
    ) -> Self {
        let told = Told {
            rounds: vec![0; usize::from(count) + 1],
            attached: vec![false; usize::from(count)],
            ..Told::default()
        };
        Self {
            sink,
            layout,
            agreed,
            copies,
            missing_pages,
            timeout,
            told: Mutex::new(told),
            change: Condvar::new(),
            link: PhantomData,
        }
    }

    fn told(&self) -> std::sync::MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
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
            let mut told = self.told();
            match told.attached.get_mut(usize::from(index)) {
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
            receiver: PageReceiver::new(Decoder::new(self.agreed, Arc::clone(&self.copies))),
        })
    }

    /// The control channel has ended `round`; waits until every data channel has.
    pub(super) fn end_round(&self, round: u32) -> Result<(), DestinationError> {
        if let Some(ended) = self.told().rounds.last_mut() {
            *ended = round;
        }
        self.change.notify_all();
        self.wait(round)
    }

    /// Waits until every data channel and the control channel have ended `round`.
    fn wait(&self, round: u32) -> Result<(), DestinationError> {
        let until = Instant::now() + self.timeout;
        let mut told = self.told();
        loop {
            if let Some((index, reason)) = &told.failed {
                return Err(DestinationError::DataChannel {
                    index: *index,
                    reason: reason.clone(),
                });
            }
            let missing = told.rounds.iter().filter(|&&ended| ended < round).count();
            if missing == 0 {
                return Ok(());
            }
            if told.closed {
                return Err(DestinationError::DataChannelSilent { round, missing });
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(DestinationError::DataChannelSilent { round, missing });
            }
            told = self
                .change
                .wait_timeout(told, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// The migration is over: data channels that fail from now on do not matter.
    pub(super) fn close(&self) {
        self.told().closed = true;
        self.change.notify_all();
    }
}

impl<L: Link, S: PageSink<L>> DataChannel<L, S> {
    /// Handles frames until the channel ends.
    pub fn run(mut self) {
        if let Err(error) = self.receive() {
            let mut told = self.set.told();
            if !told.closed {
                told.failed.get_or_insert((self.index, error.to_string()));
            }
            drop(told);
            self.set.change.notify_all();
        }
    }

    fn receive(&mut self) -> Result<(), DestinationError> {
        loop {
            let header = self.channel.recv_header()?;
            match header.kind {
                FrameType::Pages | FrameType::Zero => {
                    let missing_pages = self.set.missing_pages.as_ref().filter(|a| a.begun());
                    match missing_pages {
                        Some(missing_pages) => {
                            self.receiver
                                .receive_to(&mut self.channel, &header, missing_pages)?;
                            tell_placed(&mut self.channel, &header)?;
                        }
                        None => self.receiver.receive(
                            &mut self.channel,
                            &header,
                            self.set.sink.as_ref(),
                            &self.set.layout,
                        )?,
                    }
                }
                FrameType::Alive => {}
                FrameType::RoundEnd => {
                    let mut told = self.set.told();
                    let ended = &mut told.rounds[usize::from(self.index)];
                    if header.round != *ended + 1 {
                        return Err(WireError::Unexpected {
                            kind: header.kind,
                            round: header.round,
                            expected: "the end of the next round",
                        }
                        .into());
                    }
                    *ended = header.round;
                    drop(told);
                    self.set.change.notify_all();
                    // A page of the next round may have been sent in this one on another channel, and be still on its
                    // way there: it must not be placed over the newer one, and it may be what that one differs from.
                    self.set.wait(header.round)?;
                }
                _ => {
                    return Err(self
                        .channel
                        .refuse(&header, "pages or the end of a round")
                        .into());
                }
            }
        }
    }
}
