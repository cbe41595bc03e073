//! A stream of pushes in post-copy: what is pushed next goes out as the user's cap and the
//! [`Window`] allow.

use super::error::SourceError;
use super::page_server::{Next, PageServer};
use super::window::Window;
use crate::order::PUSH_PAGES;
use crate::page::Run;
use crate::port::{Link, SourceVm};
use crate::sender::{Pacer, Sender};
use crate::wire::{Channel, FrameType, Header, WireError};
use std::collections::VecDeque;
use std::time::Duration;

/// What a stream of pushes remembers from batch to batch.
pub(super) struct Stream {
    runs: Vec<Run>,
    /// When something was sent last.
    sent_at: Duration,
    /// Where the destination tells what is in place.
    window: Option<Window>,
    /// What is in the window, where memory is given back.
    unacknowledged: VecDeque<Vec<Run>>,
}

impl Stream {
    pub(super) fn new(tells: bool, now: Duration) -> Self {
        Self {
            runs: Vec::with_capacity(64),
            sent_at: now,
            window: tells.then(|| Window::new(now)),
            unacknowledged: VecDeque::new(),
        }
    }
}

/// What became of a turn of the push.
pub(super) enum Pushed {
    /// There may be more.
    More,
    /// Everything has been taken.
    All,
    /// The destination has said this, which is not about what is in place.
    Received(Header),
}

/// One stream of pushes: takes, waits for the cap and for the window, sends, until nothing is left.
pub(super) struct Pusher<'a, 'b, L, G> {
    pub(super) server: &'a PageServer<'b>,
    pub(super) pacer: &'a Pacer,
    pub(super) guest: &'a G,
    pub(super) channel: &'a mut Channel<L>,
    pub(super) sender: &'a mut Sender,
    pub(super) stream: &'a mut Stream,
    /// How long the destination may say nothing of what it was sent, and how often the source says
    /// that it lives.
    pub(super) timeout: Duration,
    pub(super) alive: Duration,
}

impl<L: Link, G: SourceVm<L>> Pusher<'_, '_, L, G> {
    /// One batch, or a wait of at most `wait` for the destination's word.
    pub(super) fn push(&mut self, wait: Duration) -> Result<Pushed, SourceError> {
        let clock = self.server.clock;
        if let Some(header) = self.receive(wait)? {
            return Ok(Pushed::Received(header));
        }
        if let Some(freeing) = &self.server.freeing {
            freeing.free_one(self.guest);
        }
        if self.is_full() {
            return Ok(if self.server.goes_on()? {
                Pushed::More
            } else {
                Pushed::All
            });
        }
        let most = self
            .stream
            .window
            .as_ref()
            .map_or(PUSH_PAGES, |w| w.batch_pages(PUSH_PAGES));
        let limit = most.min(self.pacer.batch_pages());
        match self.server.next_push(limit, &mut self.stream.runs)? {
            Next::Done => return Ok(Pushed::All),
            Next::Wait => {
                clock.sleep(Duration::from_millis(1));
                if clock.now().saturating_sub(self.stream.sent_at) >= self.alive {
                    self.channel.send(Header::bare(FrameType::Alive, 0), &[])?;
                    self.stream.sent_at = clock.now();
                }
            }
            Next::Send => {
                self.pacer.wait(clock, &|| self.server.stopped());
                let (runs, mode) = (
                    &self.stream.runs,
                    self.server.mode(self.stream.window.is_some()),
                );
                let began = clock.now();
                let sent = self
                    .sender
                    .send(self.channel, self.guest, runs, mode, clock)?;
                self.pacer.charge(sent.bytes, clock);
                self.server.pushed(sent);
                self.stream.sent_at = clock.now();
                if let Some(window) = &mut self.stream.window {
                    window.sent(sent.bytes, began);
                    if let Some(freeing) = &self.server.freeing {
                        freeing.sent(&self.stream.runs);
                        self.stream
                            .unacknowledged
                            .push_back(self.stream.runs.clone());
                    }
                }
            }
        }
        Ok(Pushed::More)
    }

    fn is_full(&mut self) -> bool {
        self.stream.window.as_mut().is_some_and(Window::is_full)
    }

    /// Takes the destination's words about what is in place, waiting for one if the window is full;
    /// returns another word of its.
    fn receive(&mut self, wait: Duration) -> Result<Option<Header>, SourceError> {
        let mut wait = if self.is_full() { wait } else { Duration::ZERO };
        while self
            .channel
            .link()
            .wait_readable(wait)
            .map_err(WireError::Io)?
        {
            let header = self.channel.recv_header()?;
            if header.kind == FrameType::Alive {
                wait = Duration::ZERO;
                continue;
            }
            if header.kind != FrameType::Placed {
                return Ok(Some(header));
            }
            let now = self.server.clock.now();
            let known = self.stream.window.as_mut().map(|w| w.placed(now));
            if known != Some(true) {
                let expected = "a word about pages that were sent";
                return Err(self.channel.refuse(&header, expected).into());
            }
            if let (Some(freeing), Some(runs)) =
                (&self.server.freeing, self.stream.unacknowledged.pop_front())
            {
                freeing.confirmed(&runs);
            }
            wait = Duration::ZERO;
        }
        let now = self.server.clock.now();
        let waiting = self.stream.window.as_ref().map(|w| w.waiting(now));
        if waiting.is_some_and(|waiting| waiting >= self.timeout) {
            return Err(SourceError::Silent("that pages are in place"));
        }
        Ok(None)
    }
}
