//! Measuring the way to a receiver that waits for a guest.

use super::link::Dial;
use super::{MonotonicClock, Peer, session_id};
use ferry_migration::probe::{self, Path};
use ferry_migration::wire::Role;

/// Measures the way from this host to a receiver, over a connection of its own. That takes about a
/// second, and as much of the link as it can get.
///
/// # Errors
/// The receiver is not reached, does not let this side in, has a guest, or knows no probes; a
/// sentence.
pub fn measure(peer: &Peer) -> Result<Path, String> {
    let link = Dial::new(peer.clone(), None).connect(Role::Probe, 0);
    let link = link.map_err(|error| error.to_string())?;
    let clock = MonotonicClock::new();
    probe::measure(link, &clock, session_id()).map_err(|error| format!("{}: {error}", peer.uri()))
}
