//! From the commit on: the source never runs the guest by itself, and repeats COMMIT until it is
//! answered.
//!
//! COMMIT is idempotent, so the source repeats it on new connections ([`Role::Recover`]): for
//! [`Timeouts::doubt`] before [`migrate`](super::migrate) returns, and then whenever the VMM calls
//! [`recover`].

use super::freeing::freed;
use super::phases::{End, Moved};
use super::post_copy::FaultChannel;
use super::{Setup, Source, SourceError, Timeouts, stop::silent};
use crate::page::PageSet;
use crate::port::{Committed, Link, SourceVm, TakeBackError};
use crate::report::{Phase, Report, Status};
use crate::wire::{Channel, FrameType, Header, Role, Running, SessionId, WireError, recv_set};
use std::io;
use std::time::Duration;

/// Pauses between two attempts to reach a destination, doubled from the first to the last.
const RETRY: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(2)];

/// The guest was given to the destination, which has not answered the commit.
pub(super) struct CommitSent<'s, 'a, 'g, L: Link, G: SourceVm<L>> {
    pub(super) source: &'s mut Source<'a, 'g, L, G>,
    pub(super) committed: Committed<'g>,
}

impl<'s, 'a, 'g, L: Link, G: SourceVm<L>> CommitSent<'s, 'a, 'g, L, G> {
    /// Says the commit on the control channel and waits for RUNNING.
    pub(super) fn confirm(self) -> Result<Confirmed<'s, 'a, 'g, L, G>, End<'g>> {
        let Self { source, committed } = self;
        match source.say_commit() {
            Ok(running) => {
                source.session.setup.owner.confirm();
                let transfer = source.session.setup.timeouts.transfer;
                source.session.wait_at_most(transfer, None);
                Ok(Confirmed {
                    source,
                    committed,
                    running,
                })
            }
            Err(error) => Err(refused(source, error, committed)),
        }
    }

    /// Opens the recovery on the control channel, says the commit, and sends the missing pages.
    pub(super) fn ask(self) -> Result<Moved<'g>, End<'g>> {
        if let Err(error) = self.source.open_recovery() {
            return Err(End::InDoubt {
                error,
                committed: Some(self.committed),
            });
        }
        let confirmed = self.confirm()?;
        if confirmed.is_complete() {
            confirmed.source.record.why = Some("the destination has all of the guest".into());
            return Ok(confirmed.complete());
        }
        confirmed.send_missing()
    }
}

/// What an answer other than RUNNING means for the guest.
fn refused<'g, L: Link, G: SourceVm<L>>(
    source: &Source<'_, 'g, L, G>,
    error: SourceError,
    committed: Committed<'g>,
) -> End<'g> {
    let word = match &error {
        SourceError::Wire(wire) => wire.not_started(),
        _ => None,
    };
    let Some(word) = word else {
        return End::InDoubt {
            error,
            committed: Some(committed),
        };
    };
    match committed.take_back(word) {
        Ok(()) => {
            source.session.setup.owner.take_back();
            End::Here(error)
        }
        Err(stands @ TakeBackError::StandsStill(_)) => {
            source.session.setup.owner.take_back();
            let what = "resuming the guest, which the destination did not start,";
            End::Here(SourceError::guest(
                what,
                format!("{stands} (at the destination: {error})").into(),
            ))
        }
        Err(TakeBackError::Lost(reason)) => End::InDoubt {
            error: SourceError::guest(
                "resuming the guest, which the destination did not start,",
                reason,
            ),
            committed: None,
        },
    }
}

/// The destination has said that it runs the guest.
pub(super) struct Confirmed<'s, 'a, 'g, L: Link, G: SourceVm<L>> {
    pub(super) source: &'s mut Source<'a, 'g, L, G>,
    pub(super) committed: Committed<'g>,
    pub(super) running: Running,
}

impl<'g, L: Link, G: SourceVm<L>> Confirmed<'_, '_, 'g, L, G> {
    /// Whether nothing follows the guest.
    pub(super) const fn is_complete(&self) -> bool {
        self.running.missing == 0 && !self.running.verify
    }

    /// The source is discardable.
    pub(super) fn complete(self) -> Moved<'g> {
        // The destination need not wait for this question again. Without it, it does.
        let known = Header::bare(FrameType::Alive, self.source.flight.round);
        let _ = self.source.session.control.send(known, &[]);
        self.source.enter(Phase::Completed);
        Moved {
            committed: self.committed,
            error: None,
        }
    }

    /// On a new connection: takes the list of missing pages and sends those.
    fn send_missing(self) -> Result<Moved<'g>, End<'g>> {
        let Self {
            source,
            committed,
            running,
        } = self;
        source.enter(Phase::PostCopy);
        let missing = source.take_missing(&running).map_err(End::Interrupted)?;
        source.record.why = Some(format!(
            "{} pages were missing at the destination",
            missing.len()
        ));
        source.open_fault_channels().map_err(End::Interrupted)?;
        // Rounds were acknowledged by number; this one is known by being the only one.
        source.flight.round = 1;
        let layout = source.memory.layout.clone();
        let order = source.session.setup.options.order;
        let round = source.flight.round;
        let server = Source::page_server(
            (source.guest, &layout),
            (&source.session.setup, &source.helm.options),
            missing,
            (order, round),
            running.verify,
        );
        // Hashes of pages that came before the connection was lost are still owed.
        let hashes = running.verify.then(|| layout.all());
        let error = source
            .while_answering(&server, |source| source.push_all(&server, hashes.as_ref()))
            .and_then(|sent| sent)
            .map_err(End::Interrupted)?;
        Ok(Moved { committed, error })
    }
}

impl<'g, L: Link, G: SourceVm<L>> Source<'_, 'g, L, G> {
    /// Says the commit and waits for the guest to run.
    fn say_commit(&mut self) -> Result<Running, SourceError> {
        let commit = self.session.setup.timeouts.commit;
        self.session.wait_at_most(commit, Some(commit));
        let round = self.flight.round;
        self.session
            .control
            .send(Header::bare(FrameType::Commit, round), &[])?;
        let header = self
            .session
            .recv()
            .map_err(|e| silent(e, "that the guest runs"))?;
        if header.kind != FrameType::Running {
            let expected = "the confirmation that the guest runs";
            return Err(self.session.control.refuse(&header, expected).into());
        }
        let running: Running = self.session.control.recv_json(&header)?;
        self.transport.tells = running.tells;
        Ok(running)
    }

    /// Shakes hands on a connection that was opened to recover.
    fn open_recovery(&mut self) -> Result<(), SourceError> {
        let timeouts = self.session.setup.timeouts;
        self.session
            .wait_at_most(timeouts.commit, Some(timeouts.handshake));
        self.session.control.set_end(self.memory.layout.end());
        let id = self.session.setup.session;
        self.session.control.open(Role::Recover, 0, id)?;
        Ok(())
    }

    /// Repeats the commit on new connections until it is answered, or [`Timeouts::doubt`] is over.
    pub(super) fn resolve(
        &mut self,
        mut result: Result<Moved<'g>, End<'g>>,
    ) -> Result<Moved<'g>, End<'g>> {
        let until = self.now() + self.session.setup.timeouts.doubt;
        let mut pause = RETRY[0];
        loop {
            match result {
                Err(End::InDoubt {
                    error,
                    committed: Some(committed),
                }) if error.may_retry() && self.now() < until => {
                    tracing::info!(session = %self.session.setup.session, %error, "COMMIT is repeated");
                    self.session.setup.clock.sleep(pause);
                    pause = (pause * 2).min(RETRY[1]);
                    result = match self.reconnect() {
                        Ok(()) => CommitSent {
                            source: self,
                            committed,
                        }
                        .ask(),
                        Err(error) => Err(End::InDoubt {
                            error,
                            committed: Some(committed),
                        }),
                    };
                }
                result => return result,
            }
        }
    }

    /// A new control channel; the other channels of the migration are gone with the old one.
    fn reconnect(&mut self) -> Result<(), SourceError> {
        self.session.reconnect()?;
        self.session.sent_before += self.transport.close();
        self.memory.pending.clear();
        self.flight.in_flight.clear();
        Ok(())
    }

    /// The pages that the destination lists as missing.
    fn take_missing(&mut self, running: &Running) -> Result<PageSet, SourceError> {
        let total = self.memory.layout.pages();
        if running.missing > total {
            return Err(SourceError::Missing {
                missing: running.missing,
                total,
            });
        }
        let mut missing = PageSet::new(self.memory.layout.end());
        while missing.len() < running.missing {
            let listed = missing.len();
            let header = self.session.recv()?;
            let control = &mut self.session.control;
            if !matches!(header.kind, FrameType::MissingRuns | FrameType::MissingBits) {
                return Err(control.refuse(&header, "the missing pages").into());
            }
            recv_set(control, &header, &self.memory.layout, &mut missing)?;
            if missing.len() == listed {
                let expected = "missing pages that were not listed before";
                return Err(control.refuse(&header, expected).into());
            }
        }
        match freed(self.guest.freeing()).and_then(|freed| freed.first_of(&missing)) {
            Some(gfn) => Err(SourceError::GivenBack { gfn }),
            None => Ok(missing),
        }
    }

    fn open_fault_channels(&mut self) -> Result<(), SourceError> {
        let count = self.guest.fault_channels();
        for index in 0..count.clamp(1, Self::MOST_FAULT_CHANNELS) {
            let channel = self.open_channel(Role::Fault, index)?;
            self.transport.faults.push(FaultChannel::new(channel));
        }
        Ok(())
    }
}

/// For a source that is in doubt or was interrupted: says the commit again on a new connection, and
/// sends the missing pages. The destination runs the guest if it does not run it yet.
/// Blocks until the destination has everything. `committed` is what is left of the guest here.
///
/// The report's status is `Completed`; `Failed` when the destination says that it did not start the
/// guest, which runs here again; `InDoubt` when the destination cannot be reached, belongs to
/// another migration or no longer has the guest; `Interrupted` when it runs the guest and the
/// connection was lost again. Its numbers are those of this connection.
pub fn recover<'g, L: Link, G: SourceVm<L>>(
    guest: &'g G,
    committed: Committed<'g>,
    setup: Setup<'_, L>,
) -> Report {
    let name = setup.options.policy.name();
    let session = setup.session.to_string();
    match Source::connect(guest, setup, Role::Recover, name) {
        Ok(mut source) => {
            source.memory.pending.clear();
            source.record.progress.phase = Phase::Committed;
            let asked = CommitSent {
                source: &mut source,
                committed,
            }
            .ask();
            source.finish(asked)
        }
        Err(error) => Report {
            retry_commit: error.may_retry(),
            ..Report::bare(session, name.to_owned(), Status::InDoubt, error.to_string())
        },
    }
}

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
    use crate::wire::{AbortCode, Preamble};

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
