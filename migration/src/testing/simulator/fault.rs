//! What can go wrong in the simulated world.

use super::Rng;
use crate::options::{OnTimeout, PolicyKind};
use crate::steering::Change;
use std::time::Duration;

/// A fault of the link or of a process, at a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The index of the message that it hits, counted over both directions.
    pub at: u64,
    /// What happens.
    pub kind: FaultKind,
}

/// What can go wrong at a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FaultKind {
    /// The connection breaks and the message is lost; the sender is told.
    CutBefore,
    /// The message arrives, then the connection breaks.
    CutAfter,
    /// A part of the message arrives, then the connection breaks.
    CutWithin,
    /// The sender believes that it was sent, but the connection is broken and it is lost.
    LostSilently,
    /// A bit flips (in what a checksum guards; anywhere when memory is verified).
    Flip(u32),
    /// Nothing arrives any more, without an error.
    Stall,
    /// Everything arrives, and each message takes seconds.
    Slow,
    /// The source's process is killed.
    SourceDies,
    /// The destination's process is killed.
    DestinationDies,
    /// The user cancels.
    Cancel,
}

impl FaultKind {
    pub(super) fn random(rng: &mut Rng) -> Self {
        match rng.below(10) {
            0 => Self::CutBefore,
            1 => Self::CutAfter,
            2 => Self::CutWithin,
            3 => Self::LostSilently,
            4 => Self::Flip(u32::try_from(rng.below(1 << 20)).unwrap_or(0)),
            5 => Self::Stall,
            6 => Self::SourceDies,
            7 => Self::DestinationDies,
            8 => Self::Slow,
            _ => Self::Cancel,
        }
    }
}

/// What a user asks of the source's VMM while the guest is migrated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApiCall {
    /// Cancel the migration.
    Cancel,
    /// Pause the guest.
    Pause,
    /// Resume the guest.
    Resume,
    /// Steer the migration.
    Steer(Change),
}

/// Some change of a running migration, small values among them.
#[must_use]
pub fn random_change(rng: &mut Rng) -> Change {
    let mut change = Change::default();
    match rng.below(7) {
        0 => {
            let rate = rng.chance(0.7).then(|| 4_000 + rng.below(50_000_000));
            change.bandwidth = Some(rate);
        }
        1 => change.downtime = Some(Duration::from_millis(rng.below(50))),
        2 => change.timeout = Some(Duration::from_millis(rng.below(3000))),
        3 => {
            let actions = [
                OnTimeout::Stop,
                OnTimeout::Cancel,
                OnTimeout::Postcopy,
                OnTimeout::Throttle,
            ];
            change.on_timeout = Some(actions[usize::try_from(rng.below(4)).unwrap_or(0)]);
            if rng.chance(0.5) {
                change.throttle = u8::try_from(rng.below(101)).ok();
            }
        }
        4 | 5 => {
            let kinds = PolicyKind::ALL;
            let at = usize::try_from(rng.below(kinds.len() as u64)).unwrap_or(0);
            change.policy = kinds.get(at).copied();
        }
        _ => change.switchover = true,
    }
    change
}

/// A call at a point in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// Since the simulation began.
    pub at: Duration,
    /// What is asked for.
    pub what: ApiCall,
}

impl Call {
    fn some_time(rng: &mut Rng) -> Duration {
        let micros = if rng.chance(0.7) {
            rng.below(40_000)
        } else {
            rng.below(1_500_000)
        };
        Duration::from_micros(micros)
    }

    pub(super) fn random_steering(rng: &mut Rng) -> Self {
        Self {
            at: Self::some_time(rng),
            what: ApiCall::Steer(random_change(rng)),
        }
    }

    pub(super) fn random(rng: &mut Rng) -> Self {
        let at = Self::some_time(rng);
        let what = [ApiCall::Cancel, ApiCall::Pause, ApiCall::Resume];
        Self {
            at,
            what: what[usize::try_from(rng.below(3)).unwrap_or(0)],
        }
    }
}

/// A fault behind a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortFault {
    /// The dirty log cannot be started.
    StartTracking,
    /// The n-th reading of the dirty log fails.
    Collect(u64),
    /// The n-th clearing of the dirty log fails.
    Clear(u64),
    /// The guest cannot be paused.
    Pause,
    /// Its state cannot be saved.
    Save,
    /// The commit cannot be written down.
    Commit,
    /// The destination refuses the guest.
    Prepare,
    /// The state does not fit.
    Restore,
    /// The guest does not start at the destination.
    Run,
    /// The destination has no room for the disk.
    TakeDisks,
    /// The n-th reading of the disk fails.
    DiskRead(u64),
    /// The n-th writing of the disk at the destination fails.
    DiskWrite(u64),
    /// The destination cannot flush its disk.
    DiskFlush,
    /// The n-th flush of the disk at the source fails.
    Flush(u64),
    /// The destination cannot do post-copy.
    CheckPostCopy,
    /// Missing pages cannot be made to fault.
    BeginPostCopy,
    /// The n-th placing of a page finds no memory.
    Place(u64),
}

impl PortFault {
    pub(super) fn random_disk(rng: &mut Rng) -> Self {
        match rng.below(5) {
            0 => Self::Flush(rng.below(3)),
            4 => Self::TakeDisks,
            1 => Self::DiskRead(rng.below(8)),
            2 => Self::DiskWrite(rng.below(8)),
            _ => Self::DiskFlush,
        }
    }

    pub(super) fn random(rng: &mut Rng) -> Self {
        match rng.below(12) {
            0 => Self::StartTracking,
            1 => Self::Collect(rng.below(6)),
            2 => Self::Clear(rng.below(12)),
            3 => Self::Pause,
            4 => Self::Save,
            5 => Self::Commit,
            6 => Self::Prepare,
            7 => Self::Restore,
            8 => Self::CheckPostCopy,
            9 => Self::BeginPostCopy,
            10 => Self::Place(rng.below(40)),
            _ => Self::Run,
        }
    }
}
