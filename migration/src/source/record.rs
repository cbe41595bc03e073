//! What the user is told: progress while it runs, and the report. It decides nothing.

use super::{Owner, Setup, Source, ms};
use crate::port::{Link, SourceVm};
use crate::report::{
    Codecs, Downtime, Event, Faults, Freed, Pages, Phase, Progress, Report, Round, Slowed, Status,
};
use std::time::Duration;

/// What was measured and counted so far.
pub(super) struct Record {
    pub(super) policy: &'static str,
    pub(super) began: Duration,
    /// When memory began to move.
    pub(super) memory_began: Duration,
    pub(super) paused_at: Option<Duration>,
    /// When the source became discardable.
    pub(super) ended: Option<Duration>,
    pub(super) rounds: Vec<Round>,
    pub(super) rounds_omitted: u64,
    pub(super) pages: Pages,
    pub(super) codecs: Codecs,
    pub(super) downtime: Downtime,
    /// What hashing took in the pause, with `--verify`.
    pub(super) hashing: Duration,
    /// The last flush of the disks: how long it took, when it ended, and how many there were.
    pub(super) flush_took: Duration,
    pub(super) flushed_at: Option<Duration>,
    pub(super) flushes: u32,
    /// The guest's page faults, as the destination measured them.
    pub(super) faults_there: Faults,
    pub(super) verified: Option<bool>,
    pub(super) why: Option<String>,
    /// How the guest was slowed.
    pub(super) slowed: Option<Slowed>,
    /// What was given back of the guest's memory while it followed.
    pub(super) freed: Option<Freed>,
    pub(super) last_event: Duration,
    pub(super) progress: Progress,
}

impl Record {
    pub(super) fn new<L: Link>(
        setup: &Setup<'_, L>,
        policy: &'static str,
        pages: u64,
        now: Duration,
    ) -> Self {
        Self {
            policy,
            began: now,
            memory_began: now,
            paused_at: None,
            ended: None,
            rounds: Vec::new(),
            rounds_omitted: 0,
            pages: Pages {
                total: pages,
                ..Pages::default()
            },
            codecs: Codecs::default(),
            downtime: Downtime::default(),
            hashing: Duration::ZERO,
            flush_took: Duration::ZERO,
            flushed_at: None,
            flushes: 0,
            faults_there: Faults::default(),
            verified: None,
            why: None,
            slowed: None,
            freed: None,
            last_event: now,
            progress: Progress {
                session: setup.session.to_string(),
                policy: policy.to_owned(),
                round: 1,
                pages_total: pages,
                ..Progress::default()
            },
        }
    }
}

impl<L: Link, G: SourceVm<L>> Source<'_, '_, L, G> {
    fn bytes_wire(&self) -> u64 {
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

    pub(super) fn report(&mut self, status: Status, error: Option<String>) -> Report {
        self.drop_unacknowledged();
        let bytes_wire = self.bytes_wire();
        let now = self.now();
        let record = &mut self.record;
        let total = record.ended.unwrap_or(now).saturating_sub(record.began);
        let d = &record.downtime;
        Report {
            guest_ended: false,
            schema: Report::SCHEMA,
            session: self.session.setup.session.to_string(),
            policy: record.policy.to_owned(),
            status,
            error,
            total_ms: ms(total),
            downtime_ms: d.quiesce_ms + d.last_pages_ms + d.verify_ms + d.state_ms + d.start_ms,
            downtime: d.clone(),
            rounds: std::mem::take(&mut record.rounds),
            rounds_omitted: record.rounds_omitted,
            pages: record.pages.clone(),
            codecs: record.codecs,
            channels: self.transport.channels(),
            disk: self.disks.report(),
            bytes_wire,
            mbps: bytes_wire as f64 / total.as_secs_f64().max(1e-6) / 1e6,
            faults: std::mem::take(&mut record.faults_there),
            verified: record.verified,
            why: record.why.take(),
            steered: std::mem::take(&mut self.helm.list),
            slowed: record.slowed.take(),
            freed: record.freed,
            retry_commit: false,
            abort_untold: None,
        }
    }
}

impl Report {
    /// The report of an engine that panicked: its numbers by its last progress, its end by who owns
    /// the guest.
    #[must_use]
    pub fn broken(progress: &Progress, owner: Owner, error: &str) -> Self {
        let status = match owner {
            Owner::Source => Status::Failed,
            Owner::InDoubt => Status::InDoubt,
            Owner::Destination => Status::Interrupted,
        };
        Self {
            total_ms: progress.elapsed_ms,
            bytes_wire: progress.bytes_wire,
            mbps: progress.mbps,
            ..Self::bare(
                progress.session.clone(),
                progress.policy.clone(),
                status,
                error.to_owned(),
            )
        }
    }
}
