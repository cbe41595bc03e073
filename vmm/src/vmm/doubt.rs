//! A guest in doubt: who decides, and asking the destination until it answers.
//!
//! COMMIT is idempotent. The VMM repeats it by itself, less and less often; `ferry recover` asks at
//! once, and `--take-over` waits for a question that is under way: the commit may be on its way
//! with it.

use super::control::explanation;
use super::guest::caught;
use super::state::{Asking, Lost, State, conflict};
use super::{Core, Inner, Migration};
use crate::api::Refusal;
use crate::api::types::{RecordStatus, RecoverRequest, Security};
use ferry_devices::sync::wait_while;
use ferry_devices::thread;
use ferry_migration::options::Options;
use ferry_migration::report::{self, Event};
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

/// The pauses between two questions, doubled from the first to the last.
const AGAIN: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(60)];

/// A recovery that is about to begin.
struct Question {
    to: String,
    recovery: Box<dyn Migration>,
    options: Options,
}

impl Core {
    pub(super) fn take_over(&self, force: bool) -> Result<(), Refusal> {
        let mut inner = self.answered();
        match (&inner.state, &inner.guest) {
            (State::ArrivalInDoubt { guest, .. }, _) => {
                let guest = Arc::clone(guest);
                // The guest arrives before this returns, and that takes the lock.
                drop(inner);
                guest.take_over(force).map_err(Refusal::Failed)?;
            }
            (State::InDoubt(Lost { to, asking, .. }), _) if asking.is_some() => {
                return Err(Refusal::Conflict(format!(
                    "{to} is being asked about the guest right now; wait for the answer"
                )));
            }
            (State::Interrupted(Lost { to, .. }), _) => {
                return Err(Refusal::Conflict(format!(
                    "the guest runs at {to}: a second copy would destroy its data; `ferry recover` sends it the pages \
                     that are missing there"
                )));
            }
            (State::InDoubt(Lost { session, .. }), Some(guest)) => {
                let session = session.clone();
                if !force {
                    guest.check_disks().map_err(Refusal::Conflict)?;
                }
                guest.take_over().map_err(Refusal::Failed)?;
                inner.history.resolved(&session, RecordStatus::Failed);
                inner.enter(State::Running);
            }
            (state, Some(guest)) => {
                let Some(missing) = guest.missing() else {
                    return Err(conflict("recover, nothing is in doubt", state));
                };
                return Err(Refusal::Conflict(format!(
                    "cannot take over {} pages that only the source has: {}",
                    missing.pages,
                    explanation(state, Some(&missing))
                )));
            }
            (state, _) => return Err(conflict("recover, nothing is in doubt", state)),
        }
        tracing::warn!("the guest in doubt runs here on the operator's word");
        Ok(())
    }

    /// Without the lock while the destination is asked and sent missing pages: that may take long.
    pub(super) fn ask_again(&self, request: &RecoverRequest) -> Result<(), Refusal> {
        drop(self.answered());
        let Some(question) = self.begin_asking(request, false)? else {
            return Ok(());
        };
        self.ask(question).1
    }

    /// Asks, and books the answer; whether the question is to be repeated.
    fn ask(&self, question: Question) -> (bool, Result<(), Refusal>) {
        let Question {
            to,
            recovery,
            options,
        } = question;
        let handle = recovery.handle();
        // Its report is that of the recovery, and the migration has one.
        let mut forward = |event: Event| {
            if !matches!(event, Event::Report(_)) {
                self.feed.migration(&event);
            }
        };
        let report = caught(&*handle, || recovery.run(&options, &mut forward));
        let mut inner = self.lock();
        // Stopped meanwhile, perhaps: then there is nothing to change.
        let (State::InDoubt(lost) | State::Interrupted(lost)) = &mut inner.state else {
            return (false, Ok(()));
        };
        lost.asking = None;
        let id = lost.session.clone();
        self.asked.notify_all();
        let mut renewed = Lost::new(&to, &lost.session);
        renewed.warned = lost.warned;
        let result = report
            .error
            .clone()
            .map_or(Ok(()), |error| Err(Refusal::Failed(error)));
        if report.status != report::Status::InDoubt {
            inner.history.resolved(&id, report.status.into());
        }
        match report.status {
            report::Status::Completed => {
                let downtime_ms = inner.report.as_ref().map(|report| report.downtime_ms);
                let moved = State::Moved { to, downtime_ms };
                self.finish(&mut inner, moved);
            }
            report::Status::Interrupted => inner.enter(State::Interrupted(renewed)),
            // The destination did not start the guest: it runs here again.
            report::Status::Failed | report::Status::Cancelled => {
                let runs = inner.guest.as_ref().is_some_and(|guest| guest.is_running());
                inner.enter(if runs { State::Running } else { State::Paused });
            }
            report::Status::InDoubt => {}
        }
        (report.retry_commit, result)
    }

    fn begin_asking(
        &self,
        request: &RecoverRequest,
        in_background: bool,
    ) -> Result<Option<Question>, Refusal> {
        let mut inner = self.lock();
        let options = inner.options.clone();
        let guest = inner.guest.clone();
        match (&mut inner.state, guest) {
            (State::InDoubt(lost) | State::Interrupted(lost), Some(guest)) => {
                if lost.asking.is_some() {
                    return Err(Refusal::Conflict(format!(
                        "{} is being asked about the guest already; wait for the answer",
                        lost.to
                    )));
                }
                let security = Security {
                    tls: request.tls.clone(),
                    pair: None,
                };
                let to = request.uri.clone().unwrap_or_else(|| lost.to.clone());
                let recovery = guest
                    .recovery(&to, &lost.session, &security)
                    .map_err(Refusal::Invalid)?;
                lost.asking = Some(Asking {
                    handle: recovery.handle(),
                    in_background,
                });
                Ok(Some(Question {
                    to,
                    recovery,
                    options,
                }))
            }
            // The answer came while this waited for it.
            (State::Moved { .. }, _) if request.uri.is_none() => Ok(None),
            (state, _) => Err(conflict(
                "recover, nothing is in doubt that this side can ask about",
                state,
            )),
        }
    }

    /// The state, once the VMM has no question of its own under way.
    fn answered(&self) -> MutexGuard<'_, Inner> {
        let asking = |inner: &mut Inner| match &inner.state {
            State::InDoubt(lost) | State::Interrupted(lost) => {
                lost.asking.as_ref().is_some_and(|a| a.in_background)
            }
            _ => false,
        };
        wait_while(&self.asked, self.lock(), asking)
    }

    /// Asks the destination of a guest in doubt until it answers or an operator decides.
    pub(super) fn keep_asking(self: &Arc<Self>) {
        let core = Arc::downgrade(self);
        let ask = move || {
            let mut pause = AGAIN[0];
            loop {
                std::thread::sleep(pause);
                pause = (pause * 2).min(AGAIN[1]);
                match core.upgrade() {
                    Some(core) if core.ask_in_background() => {}
                    _ => return Ok(()),
                }
            }
        };
        let failed =
            |why| tracing::error!("only `ferry recover` asks the destination again: {why}");
        if let Err(error) = thread::spawn(thread::Kind::Migration, "ferry-ask", ask, failed) {
            tracing::warn!(%error, "only `ferry recover` asks the destination again");
        }
    }

    /// Whether there is a reason to ask again.
    fn ask_in_background(&self) -> bool {
        match &self.lock().state {
            State::InDoubt(Lost { asking: None, .. }) => {}
            // An operator asks right now.
            State::InDoubt(_) => return true,
            _ => return false,
        }
        match self.begin_asking(&RecoverRequest::default(), true) {
            Ok(Some(question)) => self.ask(question).0,
            Ok(None) => false,
            Err(_) => true,
        }
    }
}
