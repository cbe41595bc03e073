//! Following and Interrupted: the guest runs, and the missing pages follow it.

use super::error::DestinationError;
use super::pages::tell_placed;
use super::phase::{End, Guest, Next, Phase, Push, Started, Stepped};
use super::session::{Parts, Session};
use super::state::Step;
use super::timeouts::TICK;
use crate::port::{DestinationVm, Link, PageSink};
use crate::wire::{Arrived, FrameType, WireError};
use std::io;
use std::time::Duration;

impl<L: Link, S: PageSink<L> + 'static> Push<L, S> {
    pub fn step<H: DestinationVm<L, Sink = S>>(
        mut self,
        parts: &mut Parts<'_, L, H>,
    ) -> Stepped<L, S> {
        parts.session.wait_for_transfer();
        match self.frame(parts.session) {
            Ok(Frame::Commit) => Ok(self.started(parts.session)),
            Ok(Frame::Push | Frame::None) => self.completed(parts),
            Err(error) => Err(self.interrupt(parts.session, error)),
        }
    }

    /// On a new connection: the source says the commit again.
    pub fn resume<H: DestinationVm<L, Sink = S>>(
        self,
        parts: &mut Parts<'_, L, H>,
    ) -> Stepped<L, S> {
        parts.session.wait_for_commit();
        match parts.session.commit() {
            Ok(()) => Ok(self.started(parts.session)),
            Err(error) => Err(self.interrupt(parts.session, error)),
        }
    }

    /// Saying the commit twice changes nothing.
    fn started(self, session: &Session<L>) -> Next<L, S> {
        let guest = Guest {
            data_channels: self.data_channels.clone(),
            push: Some(self),
        };
        let started = Started::at(session.now());
        (Phase::Started(guest, started), Step::Running)
    }

    /// The connection is lost, and with it its other channels. The guest is here.
    pub fn interrupt(self, session: &mut Session<L>, error: DestinationError) -> Box<End<L, S>> {
        self.missing_pages.lose(&error.to_string());
        if let Some(data_channels) = &self.data_channels {
            data_channels.close();
        }
        if !error.is_io() {
            session.explain(&error);
        }
        End::new(Phase::Interrupted(self), error)
    }

    /// Another connection has taken the place of the first: what it brings is one push.
    pub fn reattach(&mut self) {
        (self.round, self.pushed, self.data_channels) = (0, false, None);
        self.reattached = true;
        self.missing_pages.reconnect();
    }

    /// Whether everything has come.
    pub fn can_complete(&self) -> bool {
        (self.pushed || self.missing_pages.is_dismissed()) && self.missing_pages.is_complete()
    }

    /// Waits for the next frame of the push, or (`false`) for the last page, which may come on
    /// another channel, or for a fault channel's failure.
    fn wait_for_frame(&self, session: &mut Session<L>) -> Result<bool, DestinationError> {
        const LAST: Duration = Duration::from_millis(1);
        let mut until = session.now() + session.timeouts.transfer;
        let mut before = u64::MAX;
        loop {
            if self.can_complete() {
                return Ok(false);
            }
            // Before any frame: a push without a pause would hide it.
            if let Some(why) = self.missing_pages.lost() {
                return Err(DestinationError::FaultChannel(why));
            }
            let left = self.missing_pages.left();
            if left < before {
                // Pages come on another channel: the source lives.
                (before, until) = (left, session.now() + session.timeouts.transfer);
            }
            let last = self.pushed && left > 0;
            let wait = if last { LAST } else { TICK };
            let ready = session.channel.link().wait_readable(wait);
            if ready.map_err(WireError::Io)? {
                return Ok(true);
            }
            if session.now() >= until {
                return Err(if last {
                    DestinationError::Incomplete { pages: left }
                } else {
                    WireError::Io(io::ErrorKind::TimedOut.into()).into()
                });
            }
        }
    }

    fn frame(&mut self, session: &mut Session<L>) -> Result<Frame, DestinationError> {
        if !self.wait_for_frame(session)? {
            return Ok(Frame::None);
        }
        let channel = &mut session.channel;
        let header = channel.recv_header()?;
        match header.kind {
            FrameType::Commit => return Ok(Frame::Commit),
            FrameType::Pages | FrameType::Zero if !self.pushed => {
                self.receiver
                    .receive_to(channel, &header, &self.missing_pages)?;
                tell_placed(channel, &header)?;
            }
            FrameType::RoundEnd if !self.pushed && header.round == self.round + 1 => {
                if let Some(data_channels) = &self.data_channels {
                    data_channels.end_round(header.round)?;
                }
                self.round = header.round;
                self.pushed = true;
            }
            FrameType::Verify if self.pushed => {
                channel.recv_payload(&header, &mut session.buffer)?;
                let hashes = session.buffer.as_chunks::<8>().0;
                for (gfn, hash) in (header.gfn..).zip(hashes) {
                    self.missing_pages.compare(gfn, *hash);
                }
            }
            FrameType::Alive => {}
            _ => {
                let expected = "pages of the running guest, or their end";
                return Err(channel.refuse(&header, expected).into());
            }
        }
        Ok(Frame::Push)
    }

    /// Tells the source once everything is in place and compared.
    fn completed<H: DestinationVm<L, Sink = S>>(
        self,
        parts: &mut Parts<'_, L, H>,
    ) -> Stepped<L, S> {
        let done = self.can_complete().then(|| self.missing_pages.complete());
        let Some((faults, different)) = done.flatten() else {
            return Ok((Phase::Following(self), Step::Continue));
        };
        let arrived = Arrived {
            faults,
            different,
            ended: self.missing_pages.is_dismissed(),
        };
        // The guest is complete, whether the source is told or not.
        self.finish(parts.host);
        let channel = &mut parts.session.channel;
        match channel.send_json(FrameType::Arrived, &arrived) {
            Ok(()) => Ok((Phase::Complete, Step::Complete)),
            Err(error) => Err(End::new(Phase::Complete, error.into())),
        }
    }

    /// Nothing is missing any more.
    pub fn finish<H: DestinationVm<L, Sink = S>>(self, host: &mut H) {
        self.missing_pages.end();
        if let Some(vm) = host.post_copy() {
            vm.end();
        }
    }
}

/// What a frame was.
enum Frame {
    /// There was none: everything is here.
    None,
    Push,
    Commit,
}
