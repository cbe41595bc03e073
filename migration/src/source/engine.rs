//! The engine: the parts that every phase works with, and what any of them does with those.

use super::blocks::Disks;
use super::error::SourceError;
use super::helm::Helm;
use super::parts::{Flight, Memory, Transport};
use super::record::{PROGRESS_EVERY, Record, ms};
use super::session::Session;
use super::setup::Setup;
use crate::page::Run;
use crate::policy::{STOP_AND_START, View};
use crate::port::{Link, SourceVm};
use crate::report::{Event, Phase};
use crate::sender::Sent;
use crate::wire::{Channel, FrameType, Header, Role, WireError};
use std::time::Duration;

/// The source engine: the parts that every phase works with.
pub(super) struct Source<'a, 'g, L: Link, G: SourceVm<L>> {
    pub(super) guest: &'g G,
    pub(super) session: Session<'a, L>,
    pub(super) transport: Transport<L>,
    pub(super) memory: Memory,
    /// Disks that move with the guest.
    pub(super) disks: Disks,
    pub(super) flight: Flight,
    pub(super) helm: Helm,
    pub(super) record: Record,
}

impl<'a, 'g, L: Link, G: SourceVm<L>> Source<'a, 'g, L, G> {
    /// With more fault channels than this, answers wait for the link.
    pub(super) const MOST_FAULT_CHANNELS: u16 = 16;

    /// An engine with nothing but its control channel, whose preamble was not sent yet.
    pub(super) fn connect(
        guest: &'g G,
        setup: Setup<'a, L>,
        role: Role,
        policy: &'static str,
    ) -> Result<Self, SourceError> {
        let began = setup.clock.now();
        let layout = guest.layout();
        let helm = Helm::new(setup.options);
        Ok(Self {
            guest,
            transport: Transport::new(setup.options, began),
            record: Record::new(&setup, policy, layout.pages(), began),
            session: Session::connect(setup, role)?,
            memory: Memory::new(layout, began),
            disks: Disks::none(),
            flight: Flight::default(),
            helm,
        })
    }

    pub(super) fn now(&self) -> Duration {
        self.session.now()
    }

    /// Shows where the migration stands.
    pub(super) fn enter(&mut self, phase: Phase) {
        let (session, from) = (self.session.setup.session, self.record.progress.phase);
        tracing::debug!(%session, ?from, to = ?phase, "source");
        self.record.progress.phase = phase;
        if phase == Phase::Completed {
            self.record.ended = Some(self.now());
        }
        self.emit_progress();
    }

    /// What the policy may look at.
    pub(super) fn view(&self) -> View<'_> {
        View {
            round: self.flight.round,
            total_pages: self.record.pages.total,
            pending: &self.memory.pending,
            pending_pages: self.memory.pending.len(),
            sent: &self.memory.sent_once,
            heat: &self.memory.heat,
            written: &self.memory.written,
            dirtied_pages: self.memory.dirtied.0,
            dirtied_over: self.memory.dirtied.1,
            bandwidth: self.flight.bandwidth.estimate(),
            cap: self.helm.options.bandwidth.map(|cap| cap as f64),
            state_bytes: self.guest.state_bytes(),
            disk_bytes: self.disks.pending_bytes(),
            pause_overhead: 2 * self.session.rtt + STOP_AND_START + self.record.flush_took,
            round_trip: self.session.rtt,
            post_copy: !self.transport.faults.is_empty(),
            elapsed: self.now().saturating_sub(self.record.memory_began),
        }
    }

    pub(super) fn bytes_wire(&self) -> u64 {
        self.session.sent_before + self.session.control.sent() + self.transport.sent()
    }

    pub(super) fn emit_progress(&mut self) {
        let view = self.view();
        let (predicted, pending) = (view.predicted_downtime(), view.pending_pages);
        let disk_pending = self.disks.pending_bytes();
        let (now, wire) = (self.now(), self.bytes_wire());
        let record = &mut self.record;
        let progress = &mut record.progress;
        let moved = progress.phase == Phase::PostCopy;
        progress.predicted_downtime_ms = predicted.map(ms).filter(|_| !moved);
        progress.pending_pages = pending;
        if let Some(disk) = self.disks.report() {
            progress.disk_total = Some(disk.total);
            progress.disk_pending = Some(disk_pending.min(disk.total));
        }
        progress.elapsed_ms = ms(now.saturating_sub(record.began));
        progress.dirtied_pages = self.memory.dirtied.0;
        progress.bytes_wire = wire;
        progress.mbps = self.flight.bandwidth.estimate().unwrap_or(0.0) / 1e6;
        record.last_event = now;
        (self.session.setup.events)(Event::Progress(progress.clone()));
    }

    /// Tells the progress, unless that was done a moment ago.
    pub(super) fn tell_progress(&mut self) {
        if self.now().saturating_sub(self.record.last_event) >= PROGRESS_EVERY {
            self.emit_progress();
        }
    }

    /// Makes the changes that were accepted; whether the round under way is to end for them.
    pub(super) fn steer(&mut self) -> bool {
        let setup = &mut self.session.setup;
        self.helm.take(
            setup.steering,
            (&self.transport.pacer, setup.clock),
            (self.record.began, self.flight.round),
            setup.events,
        )
    }

    /// Opens one more channel of this migration.
    pub(super) fn open_channel(
        &mut self,
        role: Role,
        index: u16,
    ) -> Result<Channel<L>, SourceError> {
        let link = (self.session.setup.connect)(role, index).map_err(SourceError::Connect)?;
        let mut channel = Channel::new(link);
        channel.set_end(self.memory.layout.end());
        let timeouts = self.session.setup.timeouts;
        channel.link().set_timeout(Some(timeouts.handshake));
        channel.link().set_deadline(Some(timeouts.handshake));
        channel.open(role, index, self.session.setup.session)?;
        channel.link().set_deadline(None);
        channel.link().set_timeout(Some(timeouts.transfer));
        Ok(channel)
    }

    /// Says on each channel that the source lives, unless that was done a moment ago.
    pub(super) fn keep_alive(&mut self) -> Result<(), WireError> {
        let now = self.now();
        let last = self.transport.alive_at;
        if now.saturating_sub(last) < self.session.setup.timeouts.alive {
            return Ok(());
        }
        self.transport.alive_at = now;
        let alive = Header::bare(FrameType::Alive, 0);
        for (data_channel, _) in &mut self.transport.data_channels {
            data_channel.send(alive, &[])?;
        }
        self.session.control.send(alive, &[])
    }

    /// Takes pages that were handed to the link off the pending set; before this they are still
    /// pending, whatever failed.
    pub(super) fn delivered(&mut self, runs: &[Run], sent: Sent) {
        for run in runs {
            self.memory.pending.remove_run(*run);
            self.record.pages.resent += self.memory.sent_once.count_in(*run);
            self.memory.sent_once.insert_run(*run);
            self.memory.empty.remove_run(*run);
        }
        self.record.pages.sent += sent.data_pages;
        self.record.pages.zero += sent.zero_pages;
        self.record.pages.skipped += sent.skipped_pages;
        self.record.codecs.join(&sent.codecs);
        self.record.progress.round_sent += sent.pages();
    }
}
