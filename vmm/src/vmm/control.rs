//! What the control socket may do with a [`Vmm`], state by state.

use super::state::State;
use super::{Core, Guest, Vmm};
use crate::api::events::{Publisher, Subscription};
use crate::api::types::{MigrateRequest, MigrationStatus, RecoverRequest, Status};
use crate::api::{Control, Refusal};
use std::sync::Arc;

/// A refusal that says what is and what can be done.
fn conflict(wish: &str, state: &State) -> Refusal {
    Refusal::Conflict(format!("cannot {wish}: {}", state.explanation()))
}

impl Control for Vmm {
    fn status(&self) -> Status {
        let inner = self.core.lock();
        Status {
            schema: Status::SCHEMA,
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            state: inner.state.name(),
            explanation: inner.state.explanation(),
            guest: inner.guest.as_ref().map(|g| g.info()),
            uptime_ms: u64::try_from(self.core.since.elapsed().as_millis()).unwrap_or(u64::MAX),
            migration: match &inner.state {
                State::Migrating { handle, .. } => Some(handle.progress()),
                _ => None,
            },
            listening: match &inner.state {
                State::Receiving { listening } => Some(listening.clone()),
                _ => None,
            },
        }
    }

    fn pause(&self) -> Result<(), Refusal> {
        let mut inner = self.core.lock();
        match (&inner.state, &inner.guest) {
            (State::Paused, _) => Ok(()),
            (State::Running, Some(guest)) => {
                guest.pause().map_err(Refusal::Failed)?;
                inner.state = State::Paused;
                Ok(())
            }
            (state, _) => Err(conflict("pause", state)),
        }
    }

    fn resume(&self) -> Result<(), Refusal> {
        let mut inner = self.core.lock();
        match (&inner.state, &inner.guest) {
            (State::Running, _) => Ok(()),
            (State::Paused, Some(guest)) => {
                guest.resume().map_err(Refusal::Failed)?;
                inner.state = State::Running;
                Ok(())
            }
            (state, _) => Err(conflict("resume", state)),
        }
    }

    fn stop(&self) -> Result<(), Refusal> {
        let how = "by a request on its control socket";
        self.core.stop(&mut self.core.lock(), how);
        Ok(())
    }

    fn power_button(&self) -> Result<(), Refusal> {
        let inner = self.core.lock();
        match (&inner.state, &inner.guest) {
            (State::Running, Some(guest)) => guest.power_button().map_err(Refusal::Failed),
            (state, _) => Err(conflict("press the power button", state)),
        }
    }

    fn cancel(&self) -> Result<(), Refusal> {
        match &self.core.lock().state {
            State::Migrating { handle, .. } if handle.cancel() => Ok(()),
            State::Migrating { to, .. } => Err(Refusal::Conflict(format!(
                "too late to cancel: the guest was just handed over to {to}"
            ))),
            state => Err(conflict("cancel a migration, none is under way", state)),
        }
    }

    fn migrate(&self, request: &MigrateRequest) -> Result<Subscription, Refusal> {
        request
            .options
            .check()
            .map_err(|e| Refusal::Invalid(e.to_string()))?;
        let mut inner = self.core.lock();
        let (guest, paused_before) = match (&inner.state, &inner.guest) {
            (State::Running, Some(guest)) => (guest, false),
            (State::Paused, Some(guest)) => (guest, true),
            (state, _) => return Err(conflict("migrate", state)),
        };
        let migration = guest.migration(&request.uri).map_err(Refusal::Invalid)?;
        let handle = migration.handle();
        let mut publisher = Publisher::default();
        let subscription = publisher.subscribe();
        let core = Arc::clone(&self.core);
        let (to, options) = (request.uri.clone(), request.options.clone());
        let seen = Arc::clone(&handle);
        let work = move || core.migrate(migration, &to, &options, publisher, &*seen);
        // Its end waits for the lock that we hold, so the state below is there before.
        std::thread::Builder::new()
            .name("ferry-migrate".into())
            .spawn(work)
            .map_err(|e| Refusal::Failed(format!("cannot start a thread to migrate ({e})")))?;
        inner.report = None;
        inner.ending = None;
        inner.state = State::Migrating {
            to: request.uri.clone(),
            handle,
            paused_before,
        };
        Ok(subscription)
    }

    fn migration(&self) -> MigrationStatus {
        let inner = self.core.lock();
        let progress = match &inner.state {
            State::Migrating { handle, .. } => Some(handle.progress()),
            _ => None,
        };
        MigrationStatus {
            progress,
            report: inner.report.clone(),
        }
    }

    fn recover(&self, request: &RecoverRequest) -> Result<(), Refusal> {
        if request.take_over {
            self.core.take_over()
        } else {
            self.core.ask_again(request)
        }
    }
}

impl Core {
    fn take_over(&self) -> Result<(), Refusal> {
        let mut inner = self.lock();
        match (&inner.state, &inner.guest) {
            (State::Unconfirmed { doubt, .. }, _) => {
                doubt.take_over().map_err(Refusal::Failed)?;
            }
            (
                State::InDoubt {
                    to, asking: true, ..
                },
                _,
            ) => {
                return Err(Refusal::Conflict(format!(
                    "{to} is being asked about the guest right now; wait for the answer"
                )));
            }
            (State::InDoubt { .. }, Some(guest)) => {
                guest.resume().map_err(Refusal::Failed)?;
                inner.state = State::Running;
            }
            (state, _) => return Err(conflict("recover, nothing is in doubt", state)),
        }
        tracing::warn!("the guest in doubt runs here on the operator's word");
        Ok(())
    }

    /// Without the lock while the destination is asked: it may take long to answer.
    fn ask_again(&self, request: &RecoverRequest) -> Result<(), Refusal> {
        let (to, session, guest) = self.begin_asking(request)?;
        let answer = guest.confirm(&to, &session);
        let mut inner = self.lock();
        // Stopped meanwhile, perhaps: then there is nothing to change.
        if let State::InDoubt { asking, .. } = &mut inner.state {
            *asking = false;
            if answer.is_ok() {
                let downtime_ms = inner.report.as_ref().map(|report| report.downtime_ms);
                let moved = State::Moved { to, downtime_ms };
                self.finish(&mut inner, moved);
            }
        }
        answer.map_err(Refusal::Failed)
    }

    fn begin_asking(
        &self,
        request: &RecoverRequest,
    ) -> Result<(String, String, Arc<dyn Guest>), Refusal> {
        let mut inner = self.lock();
        let inner = &mut *inner;
        match (&mut inner.state, &inner.guest) {
            (
                State::InDoubt {
                    asking: true, to, ..
                },
                _,
            ) => Err(Refusal::Conflict(format!(
                "{to} is being asked about the guest already; wait for the answer"
            ))),
            (
                State::InDoubt {
                    to,
                    session,
                    asking,
                    ..
                },
                Some(guest),
            ) => {
                *asking = true;
                let to = request.uri.clone().unwrap_or_else(|| to.clone());
                Ok((to, session.clone(), Arc::clone(guest)))
            }
            (state, _) => Err(conflict(
                "recover, nothing is in doubt that this side can ask about",
                state,
            )),
        }
    }
}
