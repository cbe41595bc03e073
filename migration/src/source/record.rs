//! What the user is told: progress while it runs, and the report. It decides nothing.

use super::owner::Owner;
use super::setup::Setup;
use crate::port::Link;
use crate::report::{
    Codecs, Downtime, Faults, Freed, Pages, Progress, Report, Round, Slowed, Status,
};
use std::time::Duration;

/// Progress is told this often.
pub(super) const PROGRESS_EVERY: Duration = Duration::from_millis(100);

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

pub(super) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
