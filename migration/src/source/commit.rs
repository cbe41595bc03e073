//! From the commit on: the source never runs the guest by itself, and repeats COMMIT until it is
//! answered.
//!
//! COMMIT is idempotent, so the source repeats it on new connections ([`Role::Recover`]): for
//! [`Timeouts::doubt`](super::setup::Timeouts::doubt) before [`migrate`](super::migrate) returns,
//! and then whenever the VMM calls [`recover`](super::recover).

use super::engine::Source;
use super::error::SourceError;
use super::freeing::freed;
use super::page_server::FaultChannel;
use super::phases::{End, Moved};
use crate::page::PageSet;
use crate::port::{Committed, Link, SourceVm, TakeBackError};
use crate::report::Phase;
use crate::wire::{FrameType, Header, Role, Running, recv_set};
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
            .map_err(|e| e.or_silent("that the guest runs"))?;
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

    /// Repeats the commit on new connections until it is answered, or
    /// [`Timeouts::doubt`](super::setup::Timeouts::doubt) is over.
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
