//! After the control channel was lost around the commit: telling the destination what was decided.

use super::{Setup, SourceError};
use crate::port::Link;
use crate::wire::{Channel, FrameType, Header, Role, Running, SessionId};
use std::io;
use std::time::Duration;

/// How long each answer may take.
const PATIENCE: Duration = Duration::from_secs(10);

fn attach<L: Link>(
    connect: &mut dyn FnMut(Role, u16) -> io::Result<L>,
    session: SessionId,
) -> Result<Channel<L>, SourceError> {
    let mut link = connect(Role::Recover, 0).map_err(SourceError::Connect)?;
    link.set_timeout(Some(PATIENCE));
    let mut channel = Channel::new(link);
    channel.open(Role::Recover, 0, session)?;
    Ok(channel)
}

/// For a source that is in doubt: says the commit again on a new connection. The destination
/// runs the guest if it does not run it yet; both answers are the same.
///
/// # Errors
/// When the destination cannot be reached, belongs to another migration, or no longer has the
/// guest: still in doubt then.
pub fn recover_commit<L: Link>(
    connect: &mut dyn FnMut(Role, u16) -> io::Result<L>,
    session: SessionId,
) -> Result<Running, SourceError> {
    let mut channel = attach(connect, session)?;
    channel.send(Header::bare(FrameType::Commit, 0), &[])?;
    let header = channel.recv_header()?;
    if header.kind != FrameType::Running {
        return Err(channel
            .refuse(&header, "the confirmation that the guest runs")
            .into());
    }
    Ok(channel.recv_json(&header)?)
}

/// For a source that resumed its guest although the destination may be ready: says so on a new
/// connection, so that the destination need not stay in doubt. Best effort.
pub(super) fn tell_abort<L: Link>(setup: &mut Setup<'_, L>, reason: &str) {
    match attach(setup.connect, setup.session) {
        Ok(mut channel) => channel.send_abort(reason),
        Err(error) => {
            tracing::warn!(session = %setup.session, %error, "the destination could not be told that the guest stays here");
        }
    }
}
