//! ABORT on a connection of its own: the guest stays here.

use super::error::SourceError;
use super::setup::{Setup, Timeouts};
use crate::port::Link;
use crate::wire::{Channel, Role, SessionId, WireError};
use std::io;

/// What became of an ABORT on a connection of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AbortTold {
    /// The destination has taken it, or does not know the migration: it keeps nothing.
    Answered,
    /// The destination was not reached or was busy: it may keep a guest in doubt, and is to be told
    /// again.
    Unanswered,
}

/// For a source that keeps its guest although the destination may be ready: says ABORT on a new
/// connection, so that the destination does not stay in doubt. ABORT is idempotent: a VMM repeats
/// this until it is answered.
pub fn tell_abort<L: Link>(setup: &mut Setup<'_, L>, reason: &str) -> AbortTold {
    let mut answer = say_abort(setup, reason);
    // The network may have cut the connection before ABORT was there, or before its answer was
    // here. A destination that took it answers the next one that it does not know the migration.
    if matches!(&answer, SourceError::Wire(WireError::Io(e)) if e.kind() == io::ErrorKind::UnexpectedEof)
    {
        answer = say_abort(setup, reason);
    }
    match answer {
        SourceError::Wire(error)
            if error.is_from_peer() && !matches!(error, WireError::Busy(_)) =>
        {
            AbortTold::Answered
        }
        error => {
            tracing::warn!(session = %setup.session, %error, "the destination could not be told that the guest stays here");
            AbortTold::Unanswered
        }
    }
}

/// Says ABORT on a new connection; returns what came instead of a connection that goes on.
fn say_abort<L: Link>(setup: &mut Setup<'_, L>, reason: &str) -> SourceError {
    let mut channel = match attach(setup) {
        Ok(channel) => channel,
        Err(error) => return error,
    };
    channel.send_abort(reason);
    match channel.recv_header() {
        Ok(header) => channel.refuse(&header, "the answer to ABORT"),
        Err(error) => error,
    }
    .into()
}

fn attach<L: Link>(setup: &mut Setup<'_, L>) -> Result<Channel<L>, SourceError> {
    let Timeouts {
        commit, handshake, ..
    } = setup.timeouts;
    let session: SessionId = setup.session;
    let mut link = (setup.connect)(Role::Recover, 0).map_err(SourceError::Connect)?;
    link.set_timeout(Some(commit));
    link.set_deadline(Some(handshake));
    let mut channel = Channel::new(link);
    channel.open(Role::Recover, 0, session)?;
    Ok(channel)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::Options;
    use crate::source::Ownership;
    use crate::steering::Steering;
    use crate::testing::{RecordedPeer, Seen, TestClock};
    use crate::wire::{AbortCode, FrameType, Header, Preamble};

    const SESSION: SessionId = SessionId([7; 16]);

    /// A destination that answers the preamble and then says this.
    fn answering(code: Option<AbortCode>) -> Vec<u8> {
        let mut stream = Preamble::new(Role::Recover, 0, SESSION).encode().to_vec();
        if let Some(code) = code {
            let header = Header {
                count: code as u32,
                ..Header::bare(FrameType::Abort, 0)
            };
            stream.extend(header.encode());
        }
        stream
    }

    /// What becomes of an ABORT when the attempts to reach the destination end like this.
    fn told(attempts: &[Option<Vec<u8>>]) -> AbortTold {
        let mut attempts = attempts.iter();
        let told = tell_abort(
            &mut Setup {
                connect: &mut |_, _| match attempts.next() {
                    Some(Some(stream)) => Ok(RecordedPeer::new(stream.clone(), Seen::AtOnce)),
                    _ => Err(io::ErrorKind::ConnectionRefused.into()),
                },
                clock: &TestClock::still(),
                options: &Options::default(),
                session: SESSION,
                owner: &Ownership::default(),
                steering: &Steering::default(),
                events: &mut |_| {},
                timeouts: Timeouts::default(),
                threads: false,
            },
            "the guest stays here",
        );
        assert_eq!(attempts.next(), None, "attempts that were not made");
        told
    }

    #[test]
    fn a_cut_connection_answers_no_abort() {
        let cut = || Some(answering(None));
        let says = |code| Some(answering(Some(code)));
        assert_eq!(told(&[None]), AbortTold::Unanswered);
        assert_eq!(told(&[cut(), None]), AbortTold::Unanswered);
        assert_eq!(told(&[cut(), cut()]), AbortTold::Unanswered);
        assert_eq!(told(&[says(AbortCode::Busy)]), AbortTold::Unanswered);
        assert_eq!(told(&[cut(), says(AbortCode::Busy)]), AbortTold::Unanswered);

        assert_eq!(told(&[says(AbortCode::GaveUp)]), AbortTold::Answered);
        let unknown = || says(AbortCode::UnknownSession);
        assert_eq!(told(&[unknown()]), AbortTold::Answered);
        assert_eq!(told(&[cut(), unknown()]), AbortTold::Answered);
    }
}
