//! What the engine is started with.

use super::owner::Ownership;
use crate::options::Options;
use crate::port::{Clock, Link};
use crate::report::Event;
use crate::steering::Steering;
use crate::wire::{Role, SessionId};
use std::io;
use std::time::Duration;

/// How long the engine waits for a peer.
///
/// Built by functional update, `Timeouts { …, ..Timeouts::default() }`:
/// a new field has a default and breaks no caller. `#[non_exhaustive]` would forbid just that.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// For the whole handshake: the destination builds the machine meanwhile.
    pub handshake: Duration,
    /// For any progress of the link while the guest runs.
    pub transfer: Duration,
    /// For any progress in the pause, which [`Options::max_pause`] bounds as a whole; the guest
    /// then resumes at the source.
    pub ready: Duration,
    /// For the confirmation of the commit, on each connection that it is sent on.
    pub commit: Duration,
    /// For as long the commit is repeated before the migration is reported as in doubt.
    pub doubt: Duration,
    /// The source says at least so often on each channel that it lives.
    pub alive: Duration,
}

impl Timeouts {
    /// What `ferry` uses.
    pub const DEFAULT: Self = Self {
        handshake: Duration::from_secs(20),
        transfer: Duration::from_secs(30),
        ready: Duration::from_secs(30),
        commit: Duration::from_secs(10),
        doubt: Duration::from_secs(10),
        // A twelfth of what the destination waits.
        alive: Duration::from_secs(5),
    };
}

impl Default for Timeouts {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// What the engine works with.
///
/// Not `#[non_exhaustive]`: a migration needs every field, and none has a default.
pub struct Setup<'a, L: Link> {
    /// Opens a channel: the role and its index.
    pub connect: &'a mut dyn FnMut(Role, u16) -> io::Result<L>,
    /// Time.
    pub clock: &'a dyn Clock,
    /// What the user asked for.
    pub options: &'a Options,
    /// Names the migration; random.
    pub session: SessionId,
    /// Who owns the guest, for those who look on, and the user's way to cancel.
    pub owner: &'a Ownership,
    /// The user's way to change what the options say while it runs.
    pub steering: &'a Steering,
    /// Takes progress and the finished rounds; the report is returned.
    pub events: &'a mut dyn FnMut(Event),
    /// How long to wait for the peer.
    pub timeouts: Timeouts,
    /// Whether page faults are answered by threads of their own. Without, they are answered between
    /// two batches: for simulators, where all must happen in one order.
    pub threads: bool,
}
