//! Filling: pages, blocks and hashes arrive, and last the state.

use super::error::DestinationError;
use super::hashes::Unequal;
use super::phase::{Compared, End, Filling, Guest, Phase, Push, Stepped, ToFollow};
use super::session::{Parts, Session, micros};
use super::state::Step;
use super::timeouts::TICK;
use crate::page::{PAGE_SIZE, PageSet};
use crate::port::{DestinationVm, Link, PageSink, post_copy_vm};
use crate::wire::{FrameType, Header, Ready, WireError, recv_set};
use std::io;
use std::sync::Arc;
use std::time::Duration;

impl<L: Link, S: PageSink<L> + 'static> Filling<L, S> {
    pub fn step<H: DestinationVm<L, Sink = S>>(
        mut self: Box<Self>,
        parts: &mut Parts<'_, L, H>,
    ) -> Stepped<L, S> {
        parts.session.wait_for_transfer();
        let state = match self.frame(parts) {
            Ok(None) => return Ok((Phase::Filling(self), Step::Continue)),
            Ok(Some(state)) => state,
            Err(error) => return Err(self.discard(parts, error)),
        };
        match self.restore(&state, parts) {
            Ok(restore_us) => self.ready(restore_us, parts),
            Err(error) => Err(self.discard(parts, error)),
        }
    }

    fn discard<H: DestinationVm<L, Sink = S>>(
        self: Box<Self>,
        parts: &mut Parts<'_, L, H>,
        error: DestinationError,
    ) -> Box<End<L, S>> {
        parts.session.explain(&error);
        self.abandon(parts.host);
        End::new(Phase::Discarded, error)
    }

    /// The source keeps the guest.
    pub fn abandon<H: DestinationVm<L, Sink = S>>(self: Box<Self>, host: &mut H) {
        if let Some(data_channels) = &self.data_channels {
            data_channels.close();
        }
        if let Some(to_follow) = &self.to_follow {
            to_follow.missing_pages.end();
        }
        // The memory goes with the machine.
        drop(self);
        host.discard();
    }

    /// Handles a frame; returns the state's.
    fn frame<H: DestinationVm<L, Sink = S>>(
        &mut self,
        parts: &mut Parts<'_, L, H>,
    ) -> Result<Option<Header>, DestinationError> {
        self.wait_while_data_flows(parts.session)?;
        let session = &mut *parts.session;
        let header = session.channel.recv_header()?;
        match header.kind {
            FrameType::Pages | FrameType::Zero if !self.sealed && !self.shared => {
                let sink = self.sink.as_ref();
                self.receiver
                    .receive(&mut session.channel, &header, sink, &self.layout)?;
            }
            // The source lives: it sends on other channels, or is about to.
            FrameType::Alive => {}
            FrameType::RoundEnd if !self.sealed => self.round_end(session, &header)?,
            FrameType::Verify if self.hashes.is_some() => self.compare(session, &header)?,
            FrameType::MissingRuns | FrameType::MissingBits if !self.sealed => {
                self.list_missing(parts, &header)?;
            }
            FrameType::Blocks | FrameType::BlocksZero | FrameType::BlocksHash
                if self.takes_blocks(header.kind) =>
            {
                self.disks.receive(&mut session.channel, &header)?;
            }
            FrameType::BlocksEnd if self.takes_blocks(header.kind) => {
                self.blocks_end(session, &header)?;
            }
            FrameType::State => return Ok(Some(header)),
            _ => return Err(session.channel.refuse(&header, EXPECTED).into()),
        }
        Ok(None)
    }

    /// The control channel may be silent while pages come on others.
    fn wait_while_data_flows(&self, session: &mut Session<L>) -> Result<(), DestinationError> {
        let Some(data_channels) = &self.data_channels else {
            return Ok(());
        };
        data_channels.received();
        let mut silence = data_channels.silence();
        let link = session.channel.link();
        while !link.wait_readable(TICK).map_err(WireError::Io)? {
            if data_channels.is_silent(&mut silence) {
                return Err(WireError::Io(io::ErrorKind::TimedOut.into()).into());
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

    /// Whether blocks of disks may come; their hashes only where they were announced, and nothing
    /// that was compared is written any more.
    fn takes_blocks(&self, kind: FrameType) -> bool {
        let wanted = match kind {
            FrameType::BlocksHash => self.hashes.is_some(),
            _ => !self.disks.is_compared(),
        };
        !self.disks.is_empty() && wanted
    }

    /// All blocks that were sent outlast a crash, and the source is told so.
    fn blocks_end(
        &mut self,
        session: &mut Session<L>,
        header: &Header,
    ) -> Result<(), DestinationError> {
        if header.round != self.block_round + 1 {
            let expected = "the end of the next round of blocks";
            return Err(session.channel.refuse(header, expected).into());
        }
        self.disks.flush()?;
        self.block_round = header.round;
        let stored = Header::bare(FrameType::BlocksStored, header.round);
        Ok(session.channel.send(stored, &[])?)
    }

    /// All pages of a round are in place once every data channel has ended it too.
    fn round_end(
        &mut self,
        session: &mut Session<L>,
        header: &Header,
    ) -> Result<(), DestinationError> {
        if header.round != self.round + 1 {
            let expected = "the end of the next round";
            return Err(session.channel.refuse(header, expected).into());
        }
        if let Some(data_channels) = &self.data_channels {
            data_channels.end_round(header.round)?;
        }
        self.round = header.round;
        if let Some(compared) = &mut self.hashes {
            compared.took = Duration::ZERO;
        }
        let placed = Header::bare(FrameType::RoundAck, header.round);
        Ok(session.channel.send(placed, &[])?)
    }

    /// Pages that will follow the guest.
    fn list_missing<H: DestinationVm<L, Sink = S>>(
        &mut self,
        parts: &mut Parts<'_, L, H>,
        header: &Header,
    ) -> Result<(), DestinationError> {
        let Some(to_follow) = &mut self.to_follow else {
            return Err(parts.session.channel.refuse(header, EXPECTED).into());
        };
        let end = self.layout.end();
        let mut part = PageSet::new(end);
        recv_set(&mut parts.session.channel, header, &self.layout, &mut part)?;
        let dropped = post_copy_vm(parts.host).and_then(|vm| vm.drop_stale(&part));
        dropped.map_err(DestinationError::Unfit)?;
        to_follow.missing_pages.prepare();
        let listed = to_follow.listed.get_or_insert_with(|| PageSet::new(end));
        listed.union_with(&part);
        Ok(())
    }

    /// Compares hashes of the source's pages with the pages here.
    fn compare(
        &mut self,
        session: &mut Session<L>,
        header: &Header,
    ) -> Result<(), DestinationError> {
        let began = session.now();
        let bytes = session.payload(header)?;
        if let Some(compared) = &mut self.hashes {
            let mut page = [0; PAGE_SIZE];
            for (gfn, hash) in (header.gfn..).zip(bytes.chunks_exact(8)) {
                let copied = self.sink.copy_page(gfn, &mut page);
                copied.map_err(DestinationError::Memory)?;
                compared.hashes.compare(gfn, &page, hash);
            }
            compared.took += session.now().saturating_sub(began);
        }
        session.buffer = bytes;
        Ok(())
    }

    /// Takes the state: with it the guest must be complete. Returns how many microseconds restoring
    /// it took.
    fn restore<H: DestinationVm<L, Sink = S>>(
        &mut self,
        header: &Header,
        parts: &mut Parts<'_, L, H>,
    ) -> Result<u64, DestinationError> {
        let bytes = parts.session.payload(header)?;
        if header.round != self.round {
            let expected = "the end of the last round";
            return Err(parts.session.channel.refuse(header, expected).into());
        }
        self.seal()?;
        self.check_complete(parts.session, header)?;
        if let Some(ToFollow {
            missing_pages,
            listed: Some(missing),
        }) = &self.to_follow
        {
            let begun = post_copy_vm(parts.host).and_then(|vm| vm.begin(missing));
            begun.map_err(DestinationError::Unfit)?;
            missing_pages.begin(Arc::clone(&self.sink), missing);
            if let Some(data_channels) = &self.data_channels {
                data_channels.follow(missing_pages);
            }
        }
        let began = parts.session.now();
        let restored = parts.host.restore(&bytes);
        restored.map_err(DestinationError::State)?;
        parts.session.buffer = bytes;
        Ok(micros(parts.session.now().saturating_sub(began)))
    }

    /// Pages and blocks are all here, and as the source has them where that was to be compared.
    fn check_complete(
        &mut self,
        session: &mut Session<L>,
        header: &Header,
    ) -> Result<(), DestinationError> {
        self.disks.complete(self.hashes.is_some())?;
        let Some(Compared { hashes, .. }) = &self.hashes else {
            return Ok(());
        };
        let listed = self.to_follow.as_ref().and_then(|t| t.listed.as_ref());
        match hashes.check(&self.layout, listed) {
            Ok(()) => Ok(()),
            Err(Unequal::Differs { pages, first }) => {
                Err(DestinationError::Differs { pages, first })
            }
            Err(Unequal::NotCompared) => {
                let expected = "the hashes of all pages";
                Err(session.channel.refuse(header, expected).into())
            }
        }
    }

    /// Says READY. From the first byte of it on the source may commit: an error now leaves the
    /// guest in doubt.
    fn ready<H: DestinationVm<L, Sink = S>>(
        self: Box<Self>,
        restore_us: u64,
        parts: &mut Parts<'_, L, H>,
    ) -> Stepped<L, S> {
        let compared = self.hashes.as_ref().map(|compared| compared.took);
        let ready = Ready {
            verified: compared.is_some(),
            compare_us: compared.map_or(0, micros),
            restore_us,
        };
        let guest = self.into_guest();
        parts.session.wait_for_commit();
        let sent = parts.session.channel.send_json(FrameType::Ready, &ready);
        match sent {
            Ok(()) => Ok((Phase::Ready(guest), Step::Continue)),
            Err(error) => Err(guest.lose(parts.session, error.into())),
        }
    }

    /// Nothing that could write into the guest's memory goes along, but what is missing.
    fn into_guest(self: Box<Self>) -> Guest<L, S> {
        let Self {
            layout,
            receiver,
            data_channels,
            to_follow,
            round,
            hashes,
            ..
        } = *self;
        let follows = to_follow.filter(|to_follow| to_follow.listed.is_some());
        let push = follows.map(|to_follow| Push {
            missing_pages: to_follow.missing_pages,
            data_channels: data_channels.clone(),
            receiver,
            end: layout.end(),
            round,
            pushed: false,
            verify: hashes.is_some(),
            reattached: false,
        });
        Guest {
            push,
            data_channels,
        }
    }
}

const EXPECTED: &str =
    "pages, blocks, the end of the next round, hashes, missing pages or the state";
