//! Ready, InDoubt and Started: the guest is complete here, but for pages that follow it.

use super::error::DestinationError;
use super::phase::{End, Guest, Phase, Push, Started, Stepped};
use super::session::{Parts, Session, micros};
use super::state::Step;
use crate::page::PageSet;
use crate::port::{DestinationVm, Link, PageSink};
use crate::wire::{AbortCode, FrameType, Running, send_set};

impl<L: Link, S: PageSink<L> + 'static> Guest<L, S> {
    /// One that runs here and is complete.
    pub const fn whole() -> Self {
        Self {
            push: None,
            data_channels: None,
        }
    }

    /// Waits for the source's word: the commit, or that it keeps the guest.
    pub fn decide<H: DestinationVm<L, Sink = S>>(
        self,
        parts: &mut Parts<'_, L, H>,
    ) -> Stepped<L, S> {
        parts.session.wait_for_commit();
        match parts.session.commit() {
            Ok(()) => self.commit(parts),
            Err(error) if error.is_from_peer() => {
                self.discard(parts.host);
                // The source repeats ABORT until it is answered.
                parts.session.channel.send_abort("the guest was discarded");
                Err(End::new(Phase::Discarded, error))
            }
            Err(error) => Err(self.lose(parts.session, error)),
        }
    }

    /// The source's word: the guest belongs here.
    fn commit<H: DestinationVm<L, Sink = S>>(self, parts: &mut Parts<'_, L, H>) -> Stepped<L, S> {
        let asked = parts.session.now();
        if let Err(error) = parts.host.claim() {
            let channel = &mut parts.session.channel;
            channel.send_abort_as(AbortCode::NotStarted, &error.to_string());
            self.discard(parts.host);
            let error = DestinationError::NotStarted(error);
            return Err(End::new(Phase::Discarded, error));
        }
        let called = parts.session.now();
        match parts.host.run() {
            Ok(ago) => {
                let ran = ago.map_or(called, |ago| parts.session.now().saturating_sub(ago));
                let started = Started { asked, ran };
                Ok((Phase::Started(self, started), Step::Running))
            }
            Err(error) => {
                // Not ours to give back: the source has written the commit down.
                let why = format!("the guest could not be started: {error}");
                parts.session.channel.send_abort(&why);
                Err(self.lose(parts.session, DestinationError::Start(error)))
            }
        }
    }

    /// No word came, or none that can be understood: the guest is in doubt.
    pub fn lose(self, session: &mut Session<L>, error: DestinationError) -> Box<End<L, S>> {
        // A source that was only slow still says its word on this connection.
        session.connected = error.is_silence();
        if let Some(push) = &self.push {
            push.missing_pages.lose(&error.to_string());
        }
        if let Some(data_channels) = &self.data_channels {
            data_channels.close();
        }
        End::new(Phase::InDoubt(self), error)
    }

    /// The source keeps the guest.
    pub fn discard<H: DestinationVm<L, Sink = S>>(self, host: &mut H) {
        if let Some(data_channels) = &self.data_channels {
            data_channels.close();
        }
        if let Some(push) = &self.push {
            push.missing_pages.end();
        }
        drop(self);
        host.discard();
    }

    /// Tells the source that the guest runs here.
    pub fn tell<H: DestinationVm<L, Sink = S>>(
        self,
        started: Started,
        parts: &mut Parts<'_, L, H>,
    ) -> Stepped<L, S> {
        parts.session.wait_for_transfer();
        let Some(push) = self.push else {
            return match running(parts.session, started, 0, false) {
                Ok(()) => Ok((Phase::Complete, Step::Complete)),
                Err(error) => Err(End::new(Phase::Owned, error)),
            };
        };
        let missing = push.missing_pages.missing();
        let left = missing.len();
        // Pages may all be here and not all be compared.
        let compare = push.verify && !push.missing_pages.is_complete();
        let told = running(parts.session, started, left, compare);
        if told.is_ok() && left == 0 && !compare {
            push.finish(parts.host);
            return Ok((Phase::Complete, Step::Complete));
        }
        let listed = told.and_then(|()| push.list(parts.session, &missing));
        match listed {
            Ok(()) => Ok((Phase::Following(push), Step::Continue)),
            Err(error) => Err(push.interrupt(parts.session, error)),
        }
    }
}

/// Sends RUNNING.
fn running<L: Link>(
    session: &mut Session<L>,
    started: Started,
    missing: u64,
    verify: bool,
) -> Result<(), DestinationError> {
    let running = Running {
        start_us: micros(started.ran.saturating_sub(started.asked)),
        since_us: micros(session.now().saturating_sub(started.ran)),
        missing,
        verify,
        tells: true,
    };
    Ok(session.channel.send_json(FrameType::Running, &running)?)
}

impl<L: Link, S: PageSink<L> + 'static> Push<L, S> {
    /// To a source that does not know: the pages that are missing.
    fn list(&self, session: &mut Session<L>, missing: &PageSet) -> Result<(), DestinationError> {
        if self.reattached {
            send_set(&mut session.channel, missing)?;
        }
        Ok(())
    }
}
