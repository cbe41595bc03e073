//! A VMM: one guest, and who owns it.
//!
//! ```text
//!                       arrived                    pause
//!          Receiving ─────────────────▶ Running ◀────────▶ Paused
//!              │                         │    ▲   resume
//!              │                 migrate │    │ failed, cancelled
//!              │                         ▼    │
//!              │                       Migrating ──completed──▶ Moved      (the VMM ends)
//!              │                         │
//!              │                         └──in doubt──▶ InDoubt ──recover, take over──▶ Running
//!              ▼
//!            Ended ◀── stop (from anywhere), the guest's own end
//! ```
//!
//! `Moved` and `InDoubt` have no way back by `resume`: there may be a second copy of the guest that runs. Only an
//! operator who says so (`take_over`) lets a guest in doubt run here.
//!
//! One lock (`Core::inner`) guards the state. It is held while a machine is paused or resumed, which takes microseconds
//! unless a device blocks; never while a migration runs. A listener's queue is locked inside it, never the other way round.

#![forbid(unsafe_code)]

mod machine;

pub use machine::MachineGuest;

use crate::api::events::{Publisher, Subscription};
use crate::api::types::{
    GuestInfo, MigrateRequest, MigrationStatus, RecoverRequest, StateName, Status,
};
use crate::api::{Control, Refusal};
use ferry_migration::options::Options;
use ferry_migration::report::{self, Event, Phase, Progress, Report};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// A guest, as its VMM sees it. Errors are sentences for the user.
pub trait Guest: Send + Sync + 'static {
    /// Name and size.
    fn info(&self) -> GuestInfo;

    /// Stops the processors until [`Guest::resume`].
    ///
    /// # Errors
    /// A sentence; the guest then still runs.
    fn pause(&self) -> Result<(), String>;

    /// Lets the processors run.
    ///
    /// # Errors
    /// A sentence; the guest then still stands.
    fn resume(&self) -> Result<(), String>;

    /// Ends the guest for good.
    fn stop(&self);

    /// Bytes typed at the guest's console; returns how many of them it took.
    fn input(&self, bytes: &[u8]) -> usize;

    /// Prepares a migration to `uri`; nothing has happened yet when this returns.
    ///
    /// # Errors
    /// A sentence about the URI.
    fn migration(&self, uri: &str) -> Result<Box<dyn Migration>, String>;

    /// For a guest in doubt: says the commit of `session` again to whoever listens on `uri`. Blocks for some seconds
    /// at most.
    ///
    /// # Errors
    /// A sentence; the guest is then still in doubt.
    fn confirm(&self, uri: &str, session: &str) -> Result<(), String>;
}

/// Where guests arrive from.
pub trait Incoming: Send + Sync + 'static {
    /// Runs a guest that is complete here and was never handed over, on the operator's word.
    ///
    /// # Errors
    /// A sentence; nothing has changed then.
    fn take_over(&self) -> Result<(), String>;
}

/// A migration that has not begun.
pub trait Migration: Send {
    /// For others to look on and cancel, before it begins and while it runs.
    fn handle(&self) -> Arc<dyn MigrationHandle>;

    /// Migrates; blocks until the end. Afterwards the guest runs on here as before, unless the report's status is
    /// `Completed` or `InDoubt`: then it stands still and must not run here.
    fn run(self: Box<Self>, options: &Options, events: &mut dyn FnMut(Event)) -> Report;
}

/// A running migration, for others.
pub trait MigrationHandle: Send + Sync {
    /// Asks it to give up; without effect after the commit.
    fn cancel(&self);
    /// Where it stands.
    fn progress(&self) -> Progress;
}

/// How a guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The guest switched itself off.
    Shutdown,
    /// The guest asked for a reset, which ends a VMM without firmware.
    Reset,
    /// Somebody asked for it, and how ("on SIGTERM").
    Stopped(String),
    /// It cannot go on; the text is a sentence.
    Failed(String),
}

impl Ending {
    fn sentence(&self) -> String {
        match self {
            Self::Shutdown => "the guest has shut down".into(),
            Self::Reset => "the guest has asked for a reset and was ended".into(),
            Self::Stopped(how) => format!("the guest was ended {how}"),
            Self::Failed(why) => format!("the guest cannot go on: {why}"),
        }
    }
}

/// Why a VMM has nothing more to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// One sentence for the user.
    pub sentence: String,
    /// Whether that is a good end.
    pub success: bool,
}

enum State {
    Receiving {
        listening: String,
        incoming: Arc<dyn Incoming>,
        /// A guest is complete here, and its source fell silent before it handed it over.
        doubt: bool,
    },
    Running,
    Paused,
    Migrating {
        to: String,
        handle: Arc<dyn MigrationHandle>,
        paused_before: bool,
    },
    Moved {
        to: String,
        downtime_ms: f64,
    },
    InDoubt {
        to: String,
        warned: bool,
    },
    Ended(Ending),
}

impl State {
    const fn name(&self) -> StateName {
        match self {
            Self::Receiving { doubt: true, .. } | Self::InDoubt { .. } => StateName::InDoubt,
            Self::Receiving { .. } => StateName::Receiving,
            Self::Running => StateName::Running,
            Self::Paused => StateName::Paused,
            Self::Migrating { .. } => StateName::Migrating,
            Self::Moved { .. } => StateName::Moved,
            Self::Ended(_) => StateName::Ended,
        }
    }

    /// One sentence: what is, and what can be done.
    fn explanation(&self) -> String {
        match self {
            Self::Receiving { doubt: true, .. } => "a guest is complete here, but its source fell silent before it \
                 handed it over; `ferry recover` at the source settles it, or `ferry recover --take-over` here, if the \
                 source certainly does not run it"
                .into(),
            Self::Receiving { listening, .. } => {
                format!("waits on {listening} for a guest to arrive")
            }
            Self::Running => "the guest runs here".into(),
            Self::Paused => "the guest is paused here; `ferry resume` lets it run".into(),
            Self::Migrating { to, .. } => {
                format!("the guest is being migrated to {to}; `ferry cancel` keeps it here")
            }
            Self::Moved { to, .. } => {
                format!("the guest was migrated to {to} and never runs here again")
            }
            Self::InDoubt { to, .. } => format!(
                "the guest was handed over to {to}, which did not confirm; `ferry recover` asks again; if that is \
                 impossible and it does not run there, `ferry recover --take-over` lets it run here, and if it does, `ferry \
                 stop` discards this copy"
            ),
            Self::Ended(ending) => ending.sentence(),
        }
    }
}

struct Inner {
    state: State,
    guest: Option<Arc<dyn Guest>>,
    report: Option<Report>,
    /// What shall become of the guest when the running migration has left it here.
    ending: Option<Ending>,
}

struct Core {
    inner: Mutex<Inner>,
    finished: EventFd,
    since: Instant,
}

/// One guest and the rules of who may run it. Cheap to clone; all clones are the same VMM.
#[derive(Clone)]
pub struct Vmm {
    core: Arc<Core>,
}

impl Vmm {
    /// With a guest that runs already, or stands still.
    ///
    /// # Errors
    /// No eventfd can be made.
    pub fn new(guest: Arc<dyn Guest>, running: bool) -> io::Result<Self> {
        let state = if running {
            State::Running
        } else {
            State::Paused
        };
        Self::with(state, Some(guest))
    }

    /// Without a guest; see [`Vmm::arrived`]. `listening` is the URI that it waits on.
    ///
    /// # Errors
    /// No eventfd can be made.
    pub fn receiving(listening: String, incoming: Arc<dyn Incoming>) -> io::Result<Self> {
        let state = State::Receiving {
            listening,
            incoming,
            doubt: false,
        };
        Self::with(state, None)
    }

    fn with(state: State, guest: Option<Arc<dyn Guest>>) -> io::Result<Self> {
        let inner = Mutex::new(Inner {
            state,
            guest,
            report: None,
            ending: None,
        });
        let finished = EventFd::new(EFD_NONBLOCK)?;
        Ok(Self {
            core: Arc::new(Core {
                inner,
                finished,
                since: Instant::now(),
            }),
        })
    }

    /// A migration has brought the guest. It runs, unless it was paused at the source.
    pub fn arrived(&self, guest: Arc<dyn Guest>, runs: bool) {
        let mut inner = self.core.lock();
        match inner.state {
            State::Receiving { .. } => {
                inner.guest = Some(guest);
                inner.state = if runs { State::Running } else { State::Paused };
            }
            // Stopped while it arrived: that is what "stop" meant.
            _ => guest.stop(),
        }
    }

    /// A guest is complete here and was not handed over.
    pub fn arrival_in_doubt(&self) {
        if let State::Receiving { doubt, .. } = &mut self.core.lock().state {
            *doubt = true;
        }
    }

    /// A migration has ended and its source keeps the guest: back to waiting.
    pub fn arrival_failed(&self) {
        if let State::Receiving { doubt, .. } = &mut self.core.lock().state {
            *doubt = false;
        }
    }

    /// The guest has ended by itself.
    pub fn guest_ended(&self, ending: Ending) {
        let mut inner = self.core.lock();
        match &inner.state {
            State::Running | State::Paused => self.core.finish(&mut inner, State::Ended(ending)),
            State::Migrating { handle, .. } => {
                handle.cancel();
                inner.ending.get_or_insert(ending);
            }
            // Not this VMM's guest any more, or ended before.
            State::Receiving { .. }
            | State::Moved { .. }
            | State::InDoubt { .. }
            | State::Ended(_) => {}
        }
    }

    /// Bytes typed at the guest's console; returns how many were taken. Where no guest is they are dropped.
    pub fn input(&self, bytes: &[u8]) -> usize {
        let guest = self.core.lock().guest.clone();
        guest.map_or(bytes.len(), |guest| guest.input(bytes))
    }

    /// A request to end from outside (a signal, the console's quit key). Ends the guest, except that a guest in doubt is
    /// kept the first time. Returns what to tell the user now, if the end itself will not.
    pub fn interrupt(&self, how: &str) -> Option<String> {
        let mut inner = self.core.lock();
        if let State::InDoubt { warned, .. } = &mut inner.state
            && !std::mem::replace(warned, true)
        {
            let what = inner.state.explanation();
            return Some(format!(
                "kept, because it may be the only copy: {what}; ask again to discard it"
            ));
        }
        self.core.stop(&mut inner, how)
    }

    /// Readable once the VMM has nothing more to do.
    #[must_use]
    pub fn finished_event(&self) -> &EventFd {
        &self.core.finished
    }

    /// Why it has nothing more to do, once that is so.
    #[must_use]
    pub fn outcome(&self) -> Option<Outcome> {
        let inner = self.core.lock();
        match &inner.state {
            State::Moved { to, downtime_ms } => Some(Outcome {
                sentence: format!("the guest has moved to {to} (downtime {downtime_ms:.1} ms)"),
                success: true,
            }),
            State::Ended(ending) => Some(Outcome {
                sentence: ending.sentence(),
                success: !matches!(ending, Ending::Failed(_)),
            }),
            _ => None,
        }
    }
}

impl Core {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Every transition is one assignment: whoever panicked left a valid state.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn finish(&self, inner: &mut Inner, state: State) {
        inner.state = state;
        if let Err(e) = self.finished.write(1) {
            tracing::error!("cannot wake the main loop: {e}");
        }
    }

    fn stop(&self, inner: &mut Inner, how: &str) -> Option<String> {
        match &inner.state {
            State::Moved { .. } | State::Ended(_) => None,
            State::Migrating { to, handle, .. } => {
                handle.cancel();
                let note = format!("cancelling the migration to {to} before the guest is ended");
                inner
                    .ending
                    .get_or_insert_with(|| Ending::Stopped(how.to_owned()));
                Some(note)
            }
            State::Receiving { .. } | State::Running | State::Paused | State::InDoubt { .. } => {
                if let Some(guest) = &inner.guest {
                    guest.stop();
                }
                self.finish(inner, State::Ended(Ending::Stopped(how.to_owned())));
                None
            }
        }
    }

    /// The migration's thread.
    fn migrate(
        &self,
        migration: Box<dyn Migration>,
        to: &str,
        options: &Options,
        mut publisher: Publisher,
        handle: &dyn MigrationHandle,
    ) {
        // The report is published below, after the state has changed: whoever reads it may ask for the status next.
        let mut forward = |event: Event| {
            if !matches!(event, Event::Report(_)) {
                publisher.publish(&event);
            }
        };
        let run = AssertUnwindSafe(|| migration.run(options, &mut forward));
        let report = catch_unwind(run).unwrap_or_else(|_| broken(&handle.progress()));
        tracing::info!(status = ?report.status, session = report.session, "the migration to {to} has ended");
        let mut inner = self.lock();
        inner.report = Some(report.clone());
        let next = after(&mut inner, to, &report);
        publisher.publish(&Event::Report(Box::new(report)));
        drop(publisher);
        match next {
            State::Moved { .. } | State::Ended(_) => self.finish(&mut inner, next),
            next => inner.state = next,
        }
    }
}

/// The state after a migration.
fn after(inner: &mut Inner, to: &str, report: &Report) -> State {
    let ending = inner.ending.take();
    match report.status {
        report::Status::Completed => State::Moved {
            to: to.to_owned(),
            downtime_ms: report.downtime_ms,
        },
        // A request to stop was about a guest that was here; this may be its only copy, so it must be said again.
        report::Status::InDoubt => State::InDoubt {
            to: to.to_owned(),
            warned: false,
        },
        report::Status::Failed | report::Status::Cancelled => match ending {
            Some(ending) => {
                if let Some(guest) = &inner.guest {
                    guest.stop();
                }
                State::Ended(ending)
            }
            None if matches!(
                inner.state,
                State::Migrating {
                    paused_before: true,
                    ..
                }
            ) =>
            {
                State::Paused
            }
            None => State::Running,
        },
    }
}

/// The report of an engine that panicked. What it had committed is not known better than by its progress; in doubt,
/// doubt.
fn broken(progress: &Progress) -> Report {
    let committed = matches!(
        progress.phase,
        Phase::Committed | Phase::Completed | Phase::InDoubt
    );
    Report {
        schema: Report::SCHEMA,
        session: progress.session.clone(),
        policy: progress.policy.clone(),
        status: if committed {
            report::Status::InDoubt
        } else {
            report::Status::Failed
        },
        error: Some("the migration engine failed inside; the VMM's output says where".into()),
        total_ms: progress.elapsed_ms,
        downtime_ms: 0.0,
        downtime: report::Downtime::default(),
        rounds: Vec::new(),
        rounds_omitted: 0,
        pages: report::Pages::default(),
        bytes_wire: progress.bytes_wire,
        mbps: progress.mbps,
        faults: report::Faults::default(),
        verified: None,
        why: None,
    }
}

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
                State::Receiving { listening, .. } => Some(listening.clone()),
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
        self.core
            .stop(&mut self.core.lock(), "by a request on its control socket");
        Ok(())
    }

    fn cancel(&self) -> Result<(), Refusal> {
        match &self.core.lock().state {
            State::Migrating { handle, .. } => {
                handle.cancel();
                Ok(())
            }
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
        let (core, to, options) = (
            Arc::clone(&self.core),
            request.uri.clone(),
            request.options.clone(),
        );
        let seen = Arc::clone(&handle);
        let work = move || core.migrate(migration, &to, &options, publisher, &*seen);
        // The thread waits for the lock that we hold, so the state below is there before its end can be.
        std::thread::Builder::new()
            .name("ferry-migrate".into())
            .spawn(work)
            .map_err(|e| {
                Refusal::Failed(format!("cannot start a thread for the migration ({e})"))
            })?;
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
        let mut inner = self.core.lock();
        if let State::Receiving {
            incoming,
            doubt: true,
            ..
        } = &inner.state
        {
            if !request.take_over {
                return Err(Refusal::Conflict(
                    "only the source can be asked to settle this: run `ferry recover` there, or here with --take-over if it \
                     certainly does not run the guest"
                        .into(),
                ));
            }
            let incoming = Arc::clone(incoming);
            drop(inner);
            tracing::warn!("the guest that was not handed over runs here on the operator's word");
            return incoming.take_over().map_err(Refusal::Failed);
        }
        let (State::InDoubt { to, .. }, Some(guest)) = (&inner.state, &inner.guest) else {
            return Err(conflict("recover, nothing is in doubt", &inner.state));
        };
        if request.take_over {
            guest.resume().map_err(Refusal::Failed)?;
            tracing::warn!("the guest in doubt runs here on the operator's word");
            inner.state = State::Running;
            return Ok(());
        }
        let to = request.uri.clone().unwrap_or_else(|| to.clone());
        let report = inner.report.clone();
        let session = report
            .as_ref()
            .map_or_else(String::new, |report| report.session.clone());
        let guest = Arc::clone(guest);
        drop(inner);
        guest.confirm(&to, &session).map_err(Refusal::Failed)?;
        let mut inner = self.core.lock();
        if matches!(inner.state, State::InDoubt { .. }) {
            guest.stop();
            let downtime_ms = report.map_or(0.0, |report| report.downtime_ms);
            self.core
                .finish(&mut inner, State::Moved { to, downtime_ms });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
