//! A VMM: one guest, and who owns it.
//!
//! ```text
//!              arrived                    pause
//!  Receiving ─────────────────▶ Running ◀────────▶ Paused
//!    │    │                      │    ▲   resume
//!    │    │ the source           │    │
//!    │    │ fell silent          │    │ failed, cancelled
//!    │    ▼              migrate │    │
//!    │ArrivalInDoubt ▶ Running  ▼   │
//!    │    arrived,            Migrating ──completed──▶ Moved      (the VMM ends)
//!    │    take over              │  │                    ▲
//!    │                  in doubt │  │ interrupted        │ recover
//!    ▼                           │  └─▶ Interrupted ─────┤
//!  Ended ◀── stop, its end    InDoubt ───────────────────┤
//!            (from anywhere)                             │ take over
//!                                                        ▼
//!                                                     Running
//! ```
//!
//! `Moved` and `InDoubt` have no way back by `resume`: there may be a second copy of the guest that
//! runs. In `Interrupted` there is one: pages that only this side has are missing there. Only an
//! operator who says so (`take_over`) lets a guest in doubt run here; the same holds for
//! `ArrivalInDoubt`, which is what the destination has of the same doubt.
//!
//! ```no_run
//! use ferry_vmm::api::server::{Limits, Server};
//! use ferry_vmm::machine::Machine;
//! use ferry_vmm::vmm::{MachineGuest, Vmm};
//! use std::path::Path;
//! use std::sync::Arc;
//!
//! # fn run(machine: Machine) -> Result<(), Box<dyn std::error::Error>> {
//! let guest = MachineGuest::new(Arc::new(machine)); // built and loaded, and paused still
//! let vmm = Vmm::new(guest.clone(), false)?;
//! guest.watch(&vmm)?;
//! // `ferry status`, `ferry resume`, `ferry migrate` reach it at this socket.
//! let control = Arc::new(vmm.clone());
//! let server = Server::bind(Path::new("/run/user/1000/vm.sock"), control, Limits::default())?;
//! while vmm.outcome().is_none() {
//!     // Of an event loop, when `server` or `vmm.finished_event()` is readable.
//!     server.accept();
//! }
//! # Ok(())
//! # }
//! ```
//!
//! One lock (`Core::inner`) guards the state, and is held for moments only: never while a machine
//! is paused, as a device may be slow to stop, and never while a migration runs. Requests that
//! begin something take turns (`Core::turn`, before `inner`); a status and a stop wait for none of
//! them. A listener's queue is locked inside it, never the other way round. What takes the guest
//! from a receiver is called without it: the guest [arrives](Vmm::arrived) before that returns.

#![forbid(unsafe_code)]

mod arrival;
mod configuration;
mod control;
mod doubt;
mod feed;
mod guest;
mod history;
mod machine;
mod recording;
mod snapshot;
mod state;

pub use crate::api::types::Missing;
pub use crate::record::Recording;
pub use guest::{
    Guest, GuestBalloon, GuestConsole, GuestSnapshots, Migration, MigrationHandle, TakeOver,
};
pub use machine::{Arrivals, MachineGuest};
pub use state::{Ending, Outcome};

use crate::api::events::Publisher;
use crate::api::metrics::{Totals, dirty_rate};
use crate::api::types::{Setup, What};
use crate::priority::in_background;
use feed::Feed;
use ferry_devices::sync::lock;
use ferry_migration::options::Options;
use ferry_migration::report::{self, Event, Phase, Report};
use guest::caught;
use history::History;
use state::{Lost, State};
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::time::Instant;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

struct Inner {
    state: State,
    guest: Option<Arc<dyn Guest>>,
    report: Option<Report>,
    /// Of the last migration, for its recovery.
    options: Options,
    /// What shall become of the guest when the running migration has left it here.
    ending: Option<Ending>,
    /// The guest's dirty trace is being recorded: the dirty log is taken.
    recording: bool,
    /// The guest is being written to a file: the file, and how to end that.
    snapshot: Option<(PathBuf, Arc<AtomicBool>)>,
    /// The last migration that left or was to.
    migration: Option<String>,
    history: History,
    totals: Totals,
    feed: Arc<Feed>,
}

struct Core {
    /// Held by a request that begins something or waits for the guest to stop: one at a time. Taken
    /// before `inner`.
    turn: Mutex<()>,
    inner: Mutex<Inner>,
    /// The destination of a guest in doubt was asked in the background.
    asked: Condvar,
    finished: EventFd,
    feed: Arc<Feed>,
    /// See [`Vmm::linger`].
    lingers: AtomicBool,
    /// A VMM whose guest has moved was asked to end.
    released: AtomicBool,
    /// Of the running migration, in bytes per second. A lock of its own: a migration waits for
    /// nothing that a status may take its time for.
    dirty_rate: Mutex<Option<f64>>,
    serial: OnceLock<String>,
    console: OnceLock<String>,
    setup: OnceLock<Setup>,
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
    pub fn receiving(listening: String) -> io::Result<Self> {
        Self::with(State::Receiving { listening }, None)
    }

    fn with(state: State, guest: Option<Arc<dyn Guest>>) -> io::Result<Self> {
        let feed = Arc::new(Feed::default());
        let inner = Mutex::new(Inner {
            state,
            guest,
            report: None,
            options: Options::default(),
            ending: None,
            recording: false,
            snapshot: None,
            migration: None,
            history: History::default(),
            totals: Totals::default(),
            feed: Arc::clone(&feed),
        });
        let finished = EventFd::new(EFD_NONBLOCK)?;
        Ok(Self {
            core: Arc::new(Core {
                turn: Mutex::new(()),
                inner,
                asked: Condvar::new(),
                finished,
                feed,
                lingers: AtomicBool::new(false),
                released: AtomicBool::new(false),
                dirty_rate: Mutex::default(),
                serial: OnceLock::new(),
                console: OnceLock::new(),
                setup: OnceLock::new(),
                since: Instant::now(),
            }),
        })
    }

    /// Says where the guest's serial port goes, for a status; the first word stands.
    pub fn set_serial(&self, serial: String) {
        let _ = self.core.serial.set(serial);
    }

    /// Says where the guest's console goes, for a status; the first word stands.
    pub fn set_console(&self, console: String) {
        let _ = self.core.console.set(console);
    }

    /// Says what the program that embeds the VMM knows of it, for `GET /v1/vm`; the first word
    /// stands.
    pub fn set_setup(&self, setup: Setup) {
        let _ = self.core.setup.set(setup);
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
            | State::ArrivalInDoubt { .. }
            | State::Starting
            | State::Moved { .. }
            | State::InDoubt(_)
            | State::Interrupted(_)
            | State::Ended(_) => {}
        }
    }

    /// Bytes typed at the guest's console; returns how many were taken. Where no guest is they are
    /// dropped.
    pub fn input(&self, bytes: &[u8]) -> usize {
        let guest = self.core.lock().guest.clone();
        guest.map_or(bytes.len(), |guest| guest.input(bytes))
    }

    /// As [`input`](Self::input), at the guest's virtio console. Where it has none they are
    /// dropped.
    pub fn console_input(&self, bytes: &[u8]) -> usize {
        let guest = self.core.lock().guest.clone();
        let console = guest.as_deref().and_then(Guest::console);
        console.map_or(bytes.len(), |console| console.input(bytes))
    }

    /// Says how large the terminal at the guest's virtio console is; whether the console took it.
    pub fn set_console_size(&self, columns: u16, rows: u16) -> bool {
        let guest = self.core.lock().guest.clone();
        let console = guest.as_deref().and_then(Guest::console);
        console.is_some_and(|console| console.set_size(columns, rows))
    }

    /// A request to end from outside (a signal, the console's quit key). Ends the guest, except
    /// that a guest in doubt is kept the first time. Returns what to tell the user now, if the end
    /// itself will not.
    pub fn interrupt(&self, how: &str) -> Option<String> {
        let mut inner = self.core.lock();
        if let State::InDoubt(Lost { warned, .. })
        | State::Interrupted(Lost { warned, .. })
        | State::ArrivalInDoubt { warned, .. } = &mut inner.state
            && !std::mem::replace(warned, true)
        {
            let what = inner.state.explanation();
            return Some(format!(
                "kept, because it may be the only copy: {what}; ask again to discard it"
            ));
        }
        self.core.stop(&mut inner, how).unwrap_or_else(Some)
    }

    /// Readable once the VMM has nothing more to do.
    #[must_use]
    pub fn finished_event(&self) -> &EventFd {
        &self.core.finished
    }

    /// The guest has moved, and this VMM lingers: drops what it holds of the guest here. The
    /// [event](Self::finished_event) is set again once it is [asked to end](Self::is_released).
    pub fn linger(&self) {
        let guest = self.core.lock().guest.take();
        // Outside the lock, as a machine's threads are waited for when the last holder drops it.
        if let Some(guest) = guest {
            guest.stop();
        }
        // In this order, or a request to end that comes now would be slept through.
        self.core.lingers.store(true, Ordering::SeqCst);
        // An event loop would wake for it again and again.
        let _ = self.core.finished.read();
    }

    /// Whether a VMM whose guest has moved was asked to end.
    #[must_use]
    pub fn is_released(&self) -> bool {
        self.core.released.load(Ordering::SeqCst)
    }

    /// Why it has nothing more to do, once that is so.
    #[must_use]
    pub fn outcome(&self) -> Option<Outcome> {
        self.core.lock().state.outcome()
    }
}

impl Inner {
    /// Every change of state goes through here: listeners are told.
    fn enter(&mut self, state: State) {
        self.state = state;
        let event = self.state_event();
        self.feed.tell(|| event);
    }

    fn state_event(&self) -> What {
        let migration = self.state.to().and(self.migration.as_deref());
        feed::state(&self.state, migration)
    }
}

impl Core {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }

    fn finish(&self, inner: &mut Inner, state: State) {
        inner.enter(state);
        self.feed.end();
        self.wake();
    }

    fn wake(&self) {
        if let Err(e) = self.finished.write(1) {
            tracing::error!("cannot wake the main loop: {e}");
        }
    }

    /// Ends the guest, or has its migration cancelled first, which the note says; an error says why
    /// not.
    fn stop(&self, inner: &mut Inner, how: &str) -> Result<Option<String>, String> {
        match &inner.state {
            State::Ended(_) => Ok(None),
            State::Moved { .. } => {
                self.released.store(true, Ordering::SeqCst);
                if self.lingers.load(Ordering::SeqCst) {
                    self.wake();
                }
                Ok(None)
            }
            State::Starting => {
                inner
                    .ending
                    .get_or_insert_with(|| Ending::Stopped(how.to_owned()));
                Ok(Some(
                    "the guest was just handed over; it is ended as soon as it runs".into(),
                ))
            }
            State::Migrating { to, handle, .. } => {
                if !handle.cancel() {
                    // This side may have the only copy of pages that are missing there.
                    return Err(format!(
                        "cannot end the guest: it was just handed over to {to}; this VMM ends by itself when the guest \
                         has all of its memory there"
                    ));
                }
                let note = format!("cancelling the migration to {to} before the guest is ended");
                inner
                    .ending
                    .get_or_insert_with(|| Ending::Stopped(how.to_owned()));
                Ok(Some(note))
            }
            State::Receiving { .. }
            | State::ArrivalInDoubt { .. }
            | State::Running
            | State::Paused
            | State::InDoubt(_)
            | State::Interrupted(_) => {
                if let Some((_, cancelled)) = &inner.snapshot {
                    cancelled.store(true, Ordering::Relaxed);
                }
                if let Some(guest) = &inner.guest {
                    guest.stop();
                }
                self.finish(inner, State::Ended(Ending::Stopped(how.to_owned())));
                Ok(None)
            }
        }
    }

    /// The migration's thread.
    fn migrate(
        self: &Arc<Self>,
        migration: Box<dyn Migration>,
        to: &str,
        options: &Options,
        mut publisher: Publisher,
        handle: &dyn MigrationHandle,
    ) {
        // The report is published below, after the state has changed: a client that reads it may
        // ask for the status next.
        let mut forward = |event: Event| {
            if matches!(&event, Event::Progress(progress) if progress.phase == Phase::Completed) {
                in_background();
            }
            if let Event::Round(round) = &event {
                *lock(&self.dirty_rate) = dirty_rate(round);
            }
            if !matches!(event, Event::Report(_)) {
                publisher.publish(&event);
                self.feed.migration(&event);
            }
        };
        let mut report = caught(handle, || migration.run(options, &mut forward));
        tracing::info!(status = ?report.status, session = report.session, "the migration to {to} has ended");
        let mut inner = self.lock();
        if let report::Status::Failed | report::Status::Cancelled = report.status {
            // The engine may notice that the guest has ended before the one who watches it.
            let own = inner.guest.as_ref().and_then(|guest| guest.ending());
            inner.ending = inner.ending.take().or(own);
            if let Some(ending) = &inner.ending {
                report.guest_ended = true;
                report.error = Some(ending.sentence());
            }
        }
        *lock(&self.dirty_rate) = None;
        inner.report = Some(report.clone());
        inner.totals.left(&report);
        if let Some(id) = inner.migration.clone() {
            inner.history.left(&id, &report);
        }
        let next = after(&mut inner, to, &report);
        let retry = report.retry_commit;
        let told = Event::Report(Box::new(report));
        publisher.publish(&told);
        self.feed.migration(&told);
        drop(publisher);
        match next {
            State::Moved { .. } | State::Ended(_) => self.finish(&mut inner, next),
            next => inner.enter(next),
        }
        drop(inner);
        if retry {
            self.keep_asking();
        }
    }
}

/// The state after a migration.
fn after(inner: &mut Inner, to: &str, report: &Report) -> State {
    let ending = inner.ending.take();
    match report.status {
        report::Status::Completed => State::Moved {
            to: to.to_owned(),
            downtime_ms: Some(report.downtime_ms),
        },
        // A request to stop was about a guest that was here; this may be its only copy, so it must
        // be said again.
        report::Status::InDoubt => State::InDoubt(Lost::new(to, &report.session)),
        report::Status::Interrupted => State::Interrupted(Lost::new(to, &report.session)),
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
            // The engine has resumed it, which may have failed.
            None if inner.guest.as_ref().is_some_and(|guest| guest.is_running()) => State::Running,
            None => State::Paused,
        },
    }
}

#[cfg(test)]
mod tests;
