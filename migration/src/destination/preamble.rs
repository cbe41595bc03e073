//! A new connection: what it is for, or why it may not be a channel.

use crate::port::Link;
use crate::wire::{Channel, Preamble, Role, SessionId, WireError};
use std::time::Duration;

/// Answers a new connection's preamble and says what the connection is for.
///
/// # Errors
/// When the peer does not speak the protocol or is of another version; it was told ours.
pub fn exchange_preamble<L: Link>(
    mut link: L,
    timeout: Duration,
) -> Result<(Channel<L>, Preamble), WireError> {
    link.set_timeout(Some(timeout));
    link.set_deadline(Some(timeout));
    let mut channel = Channel::new(link);
    let theirs = channel.recv_preamble();
    let (role, index, session) = theirs
        .as_ref()
        .map_or((Role::Control, 0, SessionId::UNREAD), |p| {
            (p.role, p.channel, p.session)
        });
    // Also a peer of another version gets ours, so that it can say both.
    channel.send_preamble(&Preamble::new(role, index, session))?;
    match theirs {
        Ok(theirs) => {
            channel.link().set_deadline(None);
            Ok((channel, theirs))
        }
        Err(error) => {
            channel.send_abort(&error.to_string());
            Err(error)
        }
    }
}

/// Tells the source of a connection that may not be a channel why. All that it can take so long, if
/// its source trickles.
pub fn turn_away<L: Link>(mut link: L, timeout: Duration, why: &str) {
    link.set_timeout(Some(timeout));
    link.set_deadline(Some(timeout));
    let mut channel = Channel::new(link);
    // What the source says first is read: closing with it unread would take the answer away.
    let _ = channel.recv_preamble();
    let unread = Preamble::new(Role::Control, 0, SessionId::UNREAD);
    if channel.send_preamble(&unread).is_ok() {
        channel.send_abort(why);
    }
}
