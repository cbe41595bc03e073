//! How long the destination waits.

use std::time::Duration;

/// How often a wait looks whether it is over.
pub(super) const TICK: Duration = Duration::from_millis(100);

/// How long the destination waits for the source.
///
/// Built by functional update, `Timeouts { …, ..Timeouts::default() }`:
/// a new field has a default and breaks no caller. `#[non_exhaustive]` would forbid just that.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// For all of the handshake, until the machine is built.
    pub handshake: Duration,
    /// For the next frame on any channel while memory arrives; the source is then taken for dead. A
    /// frame takes [`FRAME_TIMEOUTS`] times as long at most, however its bytes trickle.
    pub transfer: Duration,
    /// For the commit; then the migration is in doubt.
    pub commit: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(20),
            transfer: Duration::from_secs(60),
            commit: Duration::from_secs(30),
        }
    }
}

/// How many times the transfer timeout a frame may take: 16 MiB in 10 min is 28 kB/s.
pub const FRAME_TIMEOUTS: u32 = 10;
