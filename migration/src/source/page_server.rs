//! What is still to be sent, and who sends it: the push stream takes what comes next, and an answer
//! takes what was asked for. A page is taken once.

use super::error::SourceError;
use super::freeing::Freeing;
use crate::order::{PUSH_PAGES, Push, QUIET};
use crate::page::{PageSet, RamLayout, Run};
use crate::port::{Clock, Link, SourceVm};
use crate::sender::{BatchMode, Sender, Sent};
use crate::sync::lock;
use crate::wire::{Channel, FrameType, Header, WireError};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

/// How often threads look whether it is over.
pub(super) const TICK: Duration = Duration::from_millis(100);

/// What is still to be sent.
pub(super) struct Outgoing {
    pub(super) remaining: PageSet,
    pub(super) left: u64,
    push: Push,
    /// Pushed, and sent in answer to faults.
    pub(super) sent: Sent,
    /// Answers that were taken and are not counted in `sent` yet.
    answering: u32,
    /// When the guest last missed a page.
    last_fault: Duration,
    pub(super) failed: Option<SourceError>,
    /// A thread that answers faults has panicked: the pages that it had taken are lost.
    panicked: bool,
}

impl Outgoing {
    /// Takes those of the run that were not sent yet.
    fn take(&mut self, wanted: Run, into: &mut Vec<Run>) {
        into.clear();
        let mut at = wanted.first;
        while let Some(run) = self
            .remaining
            .next_run(at, wanted.end().saturating_sub(at).max(1))
        {
            if run.first >= wanted.end() {
                break;
            }
            let run = Run::new(run.first, run.end().min(wanted.end()) - run.first);
            self.remove(run);
            into.push(run);
            at = run.end();
        }
    }

    /// Takes the next pages of the push stream; `false` when nothing is pushed (now).
    fn next_push(&mut self, limit: u64, into: &mut Vec<Run>) -> bool {
        into.clear();
        let mut room = limit;
        while room > 0 {
            let Some(run) = self.push.next(&self.remaining, room) else {
                break;
            };
            self.remove(run);
            room -= run.count;
            into.push(run);
        }
        !into.is_empty()
    }

    fn check_threads(&self) -> Result<(), SourceError> {
        if self.panicked {
            let error = "a thread that answers page faults panicked".into();
            return Err(SourceError::guest(
                "sending the pages that the guest waits for",
                error,
            ));
        }
        Ok(())
    }

    fn remove(&mut self, run: Run) {
        self.remaining.remove_run(run);
        self.left -= run.count;
    }
}

/// What the threads of the phase share.
pub(super) struct PageServer<'a> {
    outgoing: Mutex<Outgoing>,
    stop: AtomicBool,
    layout: &'a RamLayout,
    pub(super) clock: &'a dyn Clock,
    pub(super) round: u32,
    /// That push at the same time.
    data_channels: u16,
    timeout: Duration,
    began: Duration,
    /// Where memory is given back meanwhile.
    pub(super) freeing: Option<Freeing<'a>>,
}

impl<'a> PageServer<'a> {
    pub(super) fn new(
        missing: PageSet,
        (push, data_channels): (Push, u16),
        source: (&'a RamLayout, &'a dyn Clock),
        round: u32,
        timeout: Duration,
    ) -> Self {
        let (layout, clock) = source;
        let outgoing = Outgoing {
            left: missing.len(),
            remaining: missing,
            push,
            sent: Sent::default(),
            answering: 0,
            last_fault: clock.now(),
            failed: None,
            panicked: false,
        };
        Self {
            outgoing: Mutex::new(outgoing),
            stop: AtomicBool::new(false),
            layout,
            clock,
            round,
            data_channels,
            timeout,
            began: clock.now(),
            freeing: None,
        }
    }

    pub(super) fn outgoing(&self) -> MutexGuard<'_, Outgoing> {
        lock(&self.outgoing)
    }

    pub(super) const fn mode(&self, tell: bool) -> BatchMode {
        BatchMode {
            round: self.round,
            paused: true,
            tell,
            warmer: 0,
            data_channels: self.data_channels,
        }
    }

    /// Counts what a stream has sent.
    pub(super) fn pushed(&self, sent: Sent) {
        self.outgoing().sent.add(sent);
    }

    pub(super) fn fail(&self, error: SourceError) {
        self.outgoing().failed.get_or_insert(error);
    }

    pub(super) fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Ends the threads.
    pub(super) fn end(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Whether every thread that answers faults is sound.
    ///
    /// # Errors
    /// One has panicked: a page that it was about to send never leaves.
    pub(super) fn check_threads(&self) -> Result<(), SourceError> {
        self.outgoing().check_threads()
    }

    /// Answers faults until the phase ends. A panic ends the phase.
    pub(super) fn answer_all<L: Link, G: SourceVm<L>>(
        &self,
        fault: &mut FaultChannel<L>,
        guest: &G,
    ) {
        let _sound = TellPanic(self);
        while !self.stopped() {
            let result = match fault.channel.link().wait_readable(TICK) {
                Ok(true) => self.answer(fault, guest),
                Ok(false) => Ok(()),
                Err(error) => Err(WireError::Io(error).into()),
            };
            if let Err(error) = result {
                // The destination hangs up when it has everything.
                if !self.stopped() {
                    self.fail(error);
                }
                return;
            }
        }
    }

    /// Answers one fault, which has arrived.
    pub(super) fn answer<L: Link, G: SourceVm<L>>(
        &self,
        fault: &mut FaultChannel<L>,
        guest: &G,
    ) -> Result<(), SourceError> {
        let header = fault.channel.recv_header()?;
        if header.kind != FrameType::PageRequest {
            return Err(fault.channel.refuse(&header, "a page request").into());
        }
        let wanted = Run::new(header.gfn, u64::from(header.count));
        if !self.layout.contains(wanted) || wanted.count > PUSH_PAGES {
            return Err(SourceError::Request {
                gfn: wanted.first,
                count: wanted.count,
            });
        }
        if let Some(freeing) = &self.freeing {
            // It asks for the next page when the last one is in place.
            freeing.confirmed(&fault.runs);
        }
        {
            let mut outgoing = self.outgoing();
            outgoing.take(wanted, &mut fault.runs);
            outgoing.push.fault(wanted.first);
            outgoing.last_fault = self.clock.now();
            outgoing.answering += u32::from(!fault.runs.is_empty());
        }
        if fault.runs.is_empty() {
            let header = Header {
                gfn: header.gfn,
                count: header.count,
                ..Header::bare(FrameType::OnItsWay, self.round)
            };
            fault.channel.send(header, &[])?;
            return Ok(());
        }
        let sent = fault.sender.send(
            &mut fault.channel,
            guest,
            &fault.runs,
            self.mode(false),
            self.clock,
        );
        {
            let mut outgoing = self.outgoing();
            outgoing.answering -= 1;
            outgoing.sent.add(sent?);
        }
        if let Some(freeing) = &self.freeing {
            freeing.sent(&fault.runs);
        }
        Ok(())
    }

    /// All that was sent: an answer may have arrived, and with it everything, before its thread has
    /// counted it.
    pub(super) fn counted(&self) -> Sent {
        loop {
            let outgoing = self.outgoing();
            // A thread that has panicked counts nothing more.
            if outgoing.answering == 0 || outgoing.panicked {
                return outgoing.sent;
            }
            drop(outgoing);
            self.clock.sleep(Duration::from_micros(100));
        }
    }

    /// Whether there is more to push.
    pub(super) fn goes_on(&self) -> Result<bool, SourceError> {
        self.more(&mut self.outgoing())
    }

    fn more(&self, outgoing: &mut Outgoing) -> Result<bool, SourceError> {
        outgoing.check_threads()?;
        match outgoing.failed.take() {
            Some(error) => Err(error),
            None => Ok(!self.stopped() && outgoing.left > 0),
        }
    }

    /// What the push stream sends next, into `runs`.
    pub(super) fn next_push(&self, limit: u64, runs: &mut Vec<Run>) -> Result<Next, SourceError> {
        let mut outgoing = self.outgoing();
        if !self.more(&mut outgoing)? {
            return Ok(Next::Done);
        }
        if outgoing.next_push(limit, runs) {
            return Ok(Next::Send);
        }
        // Demand paging: until the guest has become quiet, or the user's time is up.
        let now = self.clock.now();
        let over = now.saturating_sub(self.began) >= self.timeout;
        if over || now.saturating_sub(outgoing.last_fault) >= QUIET {
            outgoing.push.flush();
        }
        Ok(Next::Wait)
    }
}

/// Held by a thread that answers faults.
struct TellPanic<'a, 'b>(&'a PageServer<'b>);

impl Drop for TellPanic<'_, '_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.outgoing().panicked = true;
        }
    }
}

/// What the push does next.
pub(super) enum Next {
    Send,
    Wait,
    Done,
}

/// A channel on which the destination asks for pages.
pub(super) struct FaultChannel<L> {
    pub(super) channel: Channel<L>,
    sender: Sender,
    runs: Vec<Run>,
}

impl<L: Link> FaultChannel<L> {
    pub(super) fn new(channel: Channel<L>) -> Self {
        Self {
            channel,
            sender: Sender::default(),
            runs: Vec::new(),
        }
    }
}
