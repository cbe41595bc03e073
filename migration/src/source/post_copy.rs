//! The post-copy phase: the guest runs at the destination, its pages follow, each once.
//!
//! ```text
//!             ┌───────────── Outgoing (one lock): pages not sent yet, push order ─────────────┐
//!             │ take what is pushed next                          take what was asked for     │
//!   push: this thread, or one per data channel            answer: one thread per fault channel
//!             │                                                                │
//!             ▼ control or data channel                                        ▼ fault channel
//! ```
//!
//! Where the destination says when batches are in place, the push keeps no more under way than the
//! link needs (`source/window.rs`): answers do not wait behind it.
//!
//! The guest stands still here, so pages are read without a lock. A page is taken out of the set
//! before it is sent: what a broken connection loses with it, the destination lists as missing when
//! the source reconnects.

use super::engine::Source;
use super::error::SourceError;
use super::freeing::{Freeing, freed};
use super::page_server::{PageServer, TICK};
use super::push::{Pushed, Pusher, Stream};
use super::record::ms;
use super::setup::Setup;
use crate::options::Options;
use crate::order::{Push, PushOrder};
use crate::page::{PageSet, RamLayout};
use crate::port::{Link, SourceVm};
use crate::report::{Event, Phase, Round};
use crate::wire::{Arrived, FrameType, Header, WireError};
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

/// How much of the push stream may wait in a socket, not yet sent.
const QUEUE: u32 = 128 << 10;
/// How long after a failed send the destination's last word may take.
const PARTING: Duration = Duration::from_millis(500);

/// Ends the threads of the phase.
struct EndOnDrop<'a, 'b>(&'a PageServer<'b>);

impl Drop for EndOnDrop<'_, '_> {
    fn drop(&mut self) {
        self.0.end();
    }
}

impl<'a, L: Link, G: SourceVm<L>> Source<'a, '_, L, G> {
    /// What the guest has not got yet, as the push stream will see it.
    pub(super) fn page_server<'s>(
        (guest, layout): (&'s G, &'s RamLayout),
        (setup, options): (&Setup<'a, L>, &Options),
        missing: PageSet,
        (order, round): (PushOrder, u32),
        verify: bool,
    ) -> PageServer<'s>
    where
        'a: 's,
    {
        let push = Push::new(order, usize::from(options.pivots));
        let data_channels = options.channels.unwrap_or(1).max(1);
        let source = (layout, setup.clock);
        // What was begun goes on: what is left of a piece is of no use.
        let begun = freed(guest.freeing()).is_some_and(|freed| !freed.is_empty());
        let freeing = guest.freeing().filter(|_| options.free_source || begun);
        let freeing = freeing.map(|memory| Freeing::new(memory, layout, &missing, verify));
        let mut server = PageServer::new(
            missing,
            (push, data_channels),
            source,
            round,
            options.timeout,
        );
        server.freeing = freeing;
        server
    }

    /// Runs `work` while the fault channels are being answered; not at all where no thread can be
    /// had for that.
    pub(super) fn while_answering<T>(
        &mut self,
        server: &PageServer<'_>,
        work: impl FnOnce(&mut Self) -> T,
    ) -> Result<T, SourceError> {
        if !self.session.setup.threads {
            return Ok(work(self));
        }
        let faults = std::mem::take(&mut self.transport.faults);
        let guest = self.guest;
        std::thread::scope(|scope| {
            // Also after a panic: the threads would wait for ever, and the scope for them.
            let _end = EndOnDrop(server);
            let mut threads = Vec::with_capacity(faults.len());
            let mut started = Ok(());
            for mut fault in faults {
                let thread = std::thread::Builder::new().name("ferry-serve".into());
                let answer = move || {
                    server.answer_all(&mut fault, guest);
                    fault
                };
                match thread.spawn_scoped(scope, answer) {
                    Ok(thread) => threads.push(thread),
                    Err(error) => started = Err(SourceError::no_thread(error)),
                }
            }
            let result = started.map(|()| work(self));
            server.end();
            // The work has ended with the panic of a thread; where everything had arrived before
            // that, the guest is complete.
            self.transport.faults = threads
                .into_iter()
                .filter_map(|thread| thread.join().ok())
                .collect();
            result
        })
    }

    /// Sends what is left, and the hashes of these pages; waits until the destination has
    /// everything. Returns what is wrong with it all the same.
    pub(super) fn push_all(
        &mut self,
        server: &PageServer<'_>,
        hashes: Option<&PageSet>,
    ) -> Result<Option<SourceError>, SourceError> {
        let began = self.now();
        let n = self.record.rounds.last().map_or(1, |last| last.n + 1);
        self.record.progress.round = n;
        if let Some(freeing) = &server.freeing {
            freeing.begin(self.guest);
        }
        let result = self.push_and_confirm(server, hashes);
        let sent = match &result {
            Ok(_) => server.counted(),
            // Who still answers waits for a connection that is gone.
            Err(_) => server.outgoing().sent,
        };
        self.record.pages.sent += sent.data_pages;
        self.record.pages.zero += sent.zero_pages;
        self.record.pages.skipped += sent.skipped_pages;
        self.record.codecs.join(&sent.codecs);
        self.record.freed = server.freeing.as_ref().map(Freeing::report);
        let round = Round {
            n,
            pages: sent.pages(),
            bytes: sent.bytes,
            ms: ms(self.now().saturating_sub(began)),
            dirtied: 0,
            dirtied_regions: Vec::new(),
            follows: true,
        };
        (self.session.setup.events)(Event::Round(round.clone()));
        self.record.rounds.push(round);
        let arrived = result?;
        self.record.faults_there = arrived.faults;
        if arrived.ended {
            self.record.why =
                Some("the guest ended at the destination before all of its pages had come".into());
        } else {
            self.record.verified = hashes.map(|_| arrived.different == 0);
        }
        self.enter(Phase::Completed);
        Ok((arrived.different > 0).then_some(SourceError::Differs(arrived.different)))
    }

    fn push_and_confirm(
        &mut self,
        server: &PageServer<'_>,
        hashes: Option<&PageSet>,
    ) -> Result<Arrived, SourceError> {
        self.session
            .control
            .link()
            .set_timeout(Some(self.session.setup.timeouts.transfer));
        self.session.control.link().bound_queue(QUEUE);
        for (data_channel, _) in &mut self.transport.data_channels {
            data_channel.link().bound_queue(QUEUE);
        }
        match self.send_rest(server, hashes) {
            // A destination whose guest has ended says so and hangs up: that may look like a
            // failure here.
            Err(error) if !matches!(error, SourceError::Wire(WireError::Io(_))) => Err(error),
            Err(error) => self.wait_arrived(server, None, PARTING).map_err(|_| error),
            Ok(said) => self.wait_arrived(server, said, self.session.setup.timeouts.transfer),
        }
    }

    /// The pages that no fault asks for, their end, and the hashes; returns what the destination
    /// says before the end.
    fn send_rest(
        &mut self,
        server: &PageServer<'_>,
        hashes: Option<&PageSet>,
    ) -> Result<Option<Header>, SourceError> {
        // Data channels that the user has not asked for are for rounds: here answers to page faults
        // need link and processors.
        let said = if self.transport.data_channels.is_empty()
            || self.session.setup.options.channels.is_none()
        {
            self.push_here(server)?
        } else {
            self.push_on_data_channels(server)?;
            None
        };
        if said.is_some() {
            return Ok(said);
        }
        self.barrier(server.round)?;
        if let Some(pages) = hashes {
            self.send_hashes(pages)?;
        }
        Ok(None)
    }

    /// Everything on the control channel, from this thread; returns what the destination says
    /// before the end.
    fn push_here(&mut self, server: &PageServer<'_>) -> Result<Option<Header>, SourceError> {
        let mut stream = Stream::new(self.transport.tells, self.now());
        // Without threads faults are answered by this one.
        let wait = if self.session.setup.threads {
            TICK
        } else {
            Duration::from_micros(100)
        };
        loop {
            self.answer_here(server)?;
            let mut pusher = Pusher {
                server,
                pacer: &self.transport.pacer,
                guest: self.guest,
                channel: &mut self.session.control,
                sender: &mut self.transport.sender,
                stream: &mut stream,
                timeout: self.session.setup.timeouts.transfer,
                alive: self.session.setup.timeouts.alive,
            };
            match pusher.push(wait)? {
                Pushed::All => return Ok(None),
                Pushed::More => {}
                // Its guest has ended, or it aborts.
                Pushed::Received(header) => return Ok(Some(header)),
            }
            self.keep_alive()?;
            if self.now().saturating_sub(self.record.last_event) >= TICK {
                self.memory.pending.clone_from(&server.outgoing().remaining);
                self.emit_progress();
            }
        }
    }

    /// Without threads: the faults that have arrived are answered between two batches.
    fn answer_here(&mut self, server: &PageServer<'_>) -> Result<(), SourceError> {
        for fault in &mut self.transport.faults {
            while fault.channel.link().readable().map_err(WireError::Io)? {
                server.answer(fault, self.guest)?;
            }
        }
        Ok(())
    }

    /// Several channels: each takes the next batch when it is free.
    fn push_on_data_channels(&mut self, server: &PageServer<'_>) -> Result<(), SourceError> {
        let (guest, pacer) = (self.guest, &self.transport.pacer);
        let timeouts = self.session.setup.timeouts;
        let tells = self.transport.tells;
        let data_channels = &mut self.transport.data_channels;
        let control = &mut self.session.control;
        std::thread::scope(|scope| {
            let (ended, wait) = std::sync::mpsc::channel::<()>();
            let threads: Vec<_> = data_channels
                .iter_mut()
                .filter_map(|(channel, sender)| {
                    let ended = ended.clone();
                    let push = move || {
                        // Dropped at the end of the thread: the last one ends the wait below.
                        let _ended = ended;
                        let mut stream = Stream::new(tells, server.clock.now());
                        let mut pusher = Pusher {
                            server,
                            pacer,
                            guest,
                            channel,
                            sender,
                            stream: &mut stream,
                            timeout: timeouts.transfer,
                            alive: timeouts.alive,
                        };
                        loop {
                            let error = match pusher.push(TICK) {
                                Ok(Pushed::More) => continue,
                                Ok(Pushed::All) => return,
                                Ok(Pushed::Received(header)) => {
                                    let expected = "a word about pages that were sent";
                                    pusher.channel.refuse(&header, expected).into()
                                }
                                Err(error) => error,
                            };
                            return server.fail(error);
                        }
                    };
                    let thread = std::thread::Builder::new().name("ferry-push".into());
                    let started = thread.spawn_scoped(scope, push);
                    started
                        .map_err(|e| server.fail(SourceError::no_thread(e)))
                        .ok()
                })
                .collect();
            drop(ended);
            // The control channel is silent meanwhile and must not be taken for dead.
            while wait.recv_timeout(timeouts.alive) == Err(RecvTimeoutError::Timeout) {
                if let Err(error) = control.send(Header::bare(FrameType::Alive, 0), &[]) {
                    server.fail(error.into());
                }
            }
            for thread in threads {
                if thread.join().is_err() {
                    let error = "a sender thread panicked".into();
                    server.fail(SourceError::guest("sending on a data channel", error));
                }
            }
        });
        server.outgoing().failed.take().map_or(Ok(()), Err)
    }

    /// Waits for the destination's word that it has everything.
    fn wait_arrived(
        &mut self,
        server: &PageServer<'_>,
        mut said: Option<Header>,
        timeout: Duration,
    ) -> Result<Arrived, SourceError> {
        let mut until = self.now() + timeout;
        let header = loop {
            self.answer_here(server)?;
            server.check_threads()?;
            if let Some(header) = said.take() {
                break header;
            }
            let control = self.session.control.link();
            if control.wait_readable(TICK).map_err(WireError::Io)? {
                let header = self.session.control.recv_header()?;
                match header.kind {
                    // The last batches need no window any more.
                    FrameType::Placed | FrameType::Alive => until = self.now() + timeout,
                    _ => break header,
                }
            }
            if self.now() >= until {
                return Err(SourceError::Silent("that every page has arrived"));
            }
        };
        if header.kind != FrameType::Arrived {
            return Err(self
                .session
                .control
                .refuse(&header, "the confirmation that every page has arrived")
                .into());
        }
        let arrived: Arrived = self.session.control.recv_json(&header)?;
        let left = server.outgoing().left;
        if left > 0 && !arrived.ended {
            return Err(SourceError::TooSoon(left));
        }
        server.end();
        Ok(arrived)
    }
}
