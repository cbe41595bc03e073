//! After the control channel was lost around the commit or in post-copy: telling the destination what was decided, and
//! sending what it lacks.

use super::post_copy::FaultChannel;
use super::{Setup, Source, SourceError, State};
use crate::page::PageSet;
use crate::port::{Link, SourceVm};
use crate::report::{Report, Status};
use crate::wire::{Channel, FrameType, Role, SessionId, recv_set};
use std::io;
use std::time::Duration;

/// How long each answer may take.
const TIMEOUT: Duration = Duration::from_secs(10);

fn attach<L: Link>(
    connect: &mut dyn FnMut(Role, u16) -> io::Result<L>,
    session: SessionId,
) -> Result<Channel<L>, SourceError> {
    let mut link = connect(Role::Recover, 0).map_err(SourceError::Connect)?;
    link.set_timeout(Some(TIMEOUT));
    let mut channel = Channel::new(link);
    channel.open(Role::Recover, 0, session)?;
    Ok(channel)
}

/// For a source that is in doubt or was interrupted: says the commit again on a new connection, and
/// sends what the destination lacks. The destination runs the guest if it does not run it yet.
/// Blocks until the destination has everything.
///
/// The report's status is `Completed`; `InDoubt` when the destination cannot be reached, belongs to another migration or
/// no longer has the guest; `Interrupted` when it runs the guest and the connection was lost again.
/// Its numbers are those of this connection.
pub fn recover<L: Link, G: SourceVm<L>>(guest: &G, setup: Setup<'_, L>) -> Report {
    let name = setup.options.policy.name();
    let session = setup.session.to_string();
    match Source::connect(guest, setup, Role::Recover, name) {
        Ok(mut source) => {
            let result = source.reattach();
            source.finish(result)
        }
        Err(error) => Report::bare(session, name.to_owned(), Status::InDoubt, error.to_string()),
    }
}

impl<L: Link, G: SourceVm<L>> Source<'_, '_, L, G> {
    fn reattach(&mut self) -> Result<(), SourceError> {
        self.state = State::Committed;
        self.pending.clear();
        self.control.link().set_timeout(Some(TIMEOUT));
        self.control.set_end(self.layout.end());
        self.control.open(Role::Recover, 0, self.setup.session)?;
        let running = self.commit()?;
        if running.missing == 0 && !running.verify {
            self.why = Some("the destination has all of the guest".into());
            self.enter(State::Discardable);
            return Ok(());
        }
        self.enter(State::PostCopy);
        let total = self.layout.pages();
        if running.missing > total {
            return Err(SourceError::Lacks {
                missing: running.missing,
                total,
            });
        }
        let mut missing = PageSet::new(self.layout.end());
        while missing.len() < running.missing {
            let listed = missing.len();
            let header = self.control.recv_header()?;
            if !matches!(header.kind, FrameType::MissingRuns | FrameType::MissingBits) {
                return Err(self.control.refuse(&header, "the missing pages").into());
            }
            recv_set(&mut self.control, &header, &self.layout, &mut missing)?;
            if missing.len() == listed {
                let expected = "missing pages that were not listed before";
                return Err(self.control.refuse(&header, expected).into());
            }
        }
        self.why = Some(format!("the destination lacked {} pages", missing.len()));
        for index in 0..self
            .guest
            .fault_channels()
            .clamp(1, Self::MOST_FAULT_CHANNELS)
        {
            let channel = self.open_channel(Role::Fault, index)?;
            self.faults.push(FaultChannel::new(channel));
        }
        // Rounds were acknowledged by number; this one is known by being the only one.
        self.round = 1;
        let layout = self.layout.clone();
        let order = self.setup.options.order;
        let serving = Self::serving(&layout, &self.setup, missing.clone(), order, self.round);
        // Hashes of pages that came before the connection was lost are still owed.
        let hashes = running.verify.then(|| layout.all());
        self.while_answering(&serving, |source| {
            source.push_all(&serving, hashes.as_ref())
        })
    }
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
