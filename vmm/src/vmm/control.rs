//! What the control socket may do with a [`Vmm`], state by state.

use super::recording;
use super::state::{State, conflict};
use super::{Guest, Inner, Missing, Vmm};
use crate::api::events::{Publisher, Subscription};
use crate::api::types::{
    BalloonRequest, BalloonStatus, Configuration, MigrateRequest, MigrationRecord, MigrationStatus,
    Migrations, Notice, RecordRequest, RecordStatus, RecoverRequest, SnapshotReport,
    SnapshotRequest, Status,
};
use crate::api::{Control, Pieces, Refusal};
use ferry_devices::sync::lock;
use ferry_devices::thread;
use ferry_migration::steering::{Change, SteeringError};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// One sentence: what is, and what can be done.
pub(super) fn explanation(state: &State, missing: Option<&Missing>) -> String {
    match (state, missing) {
        (
            State::Running,
            Some(Missing {
                pages, lost: None, ..
            }),
        ) => match missing.and_then(|missing| missing.file.as_ref()) {
            Some(file) => format!(
                "the guest runs here; {pages} of its pages are still to be read from {}",
                file.display()
            ),
            None => format!("the guest runs here; {pages} of its pages follow from the source"),
        },
        (
            State::Running,
            Some(Missing {
                pages,
                waiting,
                lost: Some(why),
                ..
            }),
        ) => format!(
            "the guest runs here and {pages} of its pages are missing ({waiting} waits for one): the connection to the source \
             is lost ({why}); `ferry recover` at the source sends them"
        ),
        (state, _) => state.explanation(),
    }
}

impl Control for Vmm {
    fn status(&self) -> Status {
        // What a guest says of itself is asked without the lock: it may take a moment, and a status
        // waits for nothing.
        let guest = self.core.lock().guest.clone();
        let balloon = guest.as_deref().and_then(Guest::balloon);
        let balloon = balloon.map(|balloon| balloon.status());
        let guest = guest.as_ref();
        let serial_output_lost = guest.map_or(0, |guest| guest.serial_output_lost());
        let console = guest.and_then(|guest| guest.console());
        let console_output_lost = console.map_or(0, |console| console.output_lost());
        let inner = self.core.lock();
        let missing = inner.guest.as_ref().and_then(|guest| guest.missing());
        Status {
            schema: Status::SCHEMA,
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            state: inner.state.name(),
            explanation: match &inner.snapshot {
                Some((path, _)) if matches!(inner.state, State::Running | State::Paused) => {
                    super::snapshot::explanation(path)
                }
                _ => explanation(&inner.state, missing.as_ref()),
            },
            guest: inner.guest.as_ref().map(|g| g.info()),
            uptime_ms: u64::try_from(self.core.since.elapsed().as_millis()).unwrap_or(u64::MAX),
            migration: match &inner.state {
                State::Migrating { handle, .. } => Some(handle.progress()),
                State::InDoubt(lost) | State::Interrupted(lost) => {
                    lost.asking.as_ref().map(|asking| asking.handle.progress())
                }
                _ => None,
            },
            missing,
            balloon,
            serial_output_lost,
            serial: self.core.serial.get().cloned(),
            console_output_lost,
            console: self.core.console.get().cloned(),
            to: inner.state.to().map(str::to_owned),
            listening: match &inner.state {
                State::Receiving { listening } => Some(listening.clone()),
                _ => None,
            },
        }
    }

    fn pause(&self) -> Result<(), Refusal> {
        let _turn = lock(&self.core.turn);
        let guest = {
            let inner = self.core.lock();
            inner.not_in_a_snapshot("pause")?;
            match (&inner.state, &inner.guest) {
                (State::Paused, _) => return Ok(()),
                (State::Running, Some(guest)) => Arc::clone(guest),
                (state, _) => return Err(conflict("pause", state)),
            }
        };
        guest.pause().map_err(Refusal::Failed)?;
        let mut inner = self.core.lock();
        match &inner.state {
            State::Running => inner.enter(State::Paused),
            // It has ended meanwhile.
            state => return Err(conflict("pause", state)),
        }
        Ok(())
    }

    fn resume(&self) -> Result<(), Refusal> {
        let _turn = lock(&self.core.turn);
        let mut inner = self.core.lock();
        inner.not_in_a_snapshot("resume")?;
        match (&inner.state, &inner.guest) {
            (State::Running, _) => Ok(()),
            (State::Paused, Some(guest)) => {
                guest.resume().map_err(Refusal::Failed)?;
                inner.enter(State::Running);
                Ok(())
            }
            (state, _) => Err(conflict("resume", state)),
        }
    }

    fn stop(&self) -> Result<(), Refusal> {
        let how = "by a request on its control socket";
        let stopped = self.core.stop(&mut self.core.lock(), how);
        stopped.map(drop).map_err(Refusal::Conflict)
    }

    fn power_button(&self) -> Result<(), Refusal> {
        let inner = self.core.lock();
        match (&inner.state, &inner.guest) {
            (State::Running, Some(guest)) => guest.power_button().map_err(Refusal::Failed),
            (state, _) => Err(conflict("press the power button", state)),
        }
    }

    fn cancel(&self) -> Result<(), Refusal> {
        let inner = self.core.lock();
        if let Some((_, cancelled)) = &inner.snapshot {
            cancelled.store(true, Ordering::Relaxed);
            return Ok(());
        }
        match &inner.state {
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
        let _turn = lock(&self.core.turn);
        let mut inner = self.core.lock();
        let (guest, paused_before) = match (&inner.state, &inner.guest) {
            (State::Running, Some(guest)) => (Arc::clone(guest), false),
            (State::Paused, Some(guest)) => (Arc::clone(guest), true),
            (state, _) => return Err(conflict("migrate", state)),
        };
        inner.not_in_a_snapshot("migrate")?;
        if inner.recording {
            return Err(Refusal::Conflict(
                "cannot migrate: the guest's dirty trace is being recorded; end `ferry record` or wait for its end"
                    .into(),
            ));
        }
        let migration = guest
            .migration(&request.uri, &request.security())
            .map_err(Refusal::Invalid)?;
        let handle = migration.handle();
        let id = handle.session();
        let mut publisher = Publisher::default();
        let subscription = publisher.subscribe();
        let core = Arc::clone(&self.core);
        let (to, options) = (request.uri.clone(), request.options.clone());
        let seen = Arc::clone(&handle);
        let work = move || {
            core.migrate(migration, &to, &options, publisher, &*seen);
            Ok(())
        };
        // A panic of the engine is caught below it, where its report is made.
        let failure = |why| tracing::error!("the end of a migration could not be booked: {why}");
        let before = inner.migration.replace(id.clone());
        // Listeners are told of the state before the migration.
        inner.enter(State::Migrating {
            to: request.uri.clone(),
            handle,
            paused_before,
        });
        // Its end waits for the lock that we hold.
        let spawned = thread::spawn(thread::Kind::Migration, "ferry-migrate", work, failure);
        if let Err(e) = spawned {
            inner.migration = before;
            inner.enter(match paused_before {
                true => State::Paused,
                false => State::Running,
            });
            let sentence = format!("cannot start a thread to migrate ({e})");
            return Err(Refusal::Failed(sentence));
        }
        let policy = request.options.policy.name();
        inner.history.leave(&id, &request.uri, policy);
        inner.report = None;
        inner.options = request.options.clone();
        inner.ending = None;
        Ok(subscription)
    }

    fn steer(&self, change: &Change) -> Result<(), Refusal> {
        let inner = self.core.lock();
        let (to, refused) = match &inner.state {
            State::Migrating { to, handle, .. } => match handle.steer(change) {
                Ok(()) => return Ok(()),
                Err(refused) => (to, refused),
            },
            State::InDoubt(_) | State::Interrupted(_) | State::Moved { .. } => {
                return Err(Refusal::Coded {
                    status: 409,
                    code: SteeringError::TooLate.code(),
                    sentence: format!("cannot steer a migration: {}", inner.state.explanation()),
                });
            }
            state => {
                return Err(Refusal::Coded {
                    status: 409,
                    code: "not-migrating",
                    sentence: format!(
                        "cannot steer a migration, none is under way: {}",
                        state.explanation()
                    ),
                });
            }
        };
        let invalid = matches!(refused, SteeringError::Nothing | SteeringError::Options(_));
        Err(Refusal::Coded {
            status: if invalid { 400 } else { 409 },
            code: refused.code(),
            sentence: if invalid {
                refused.to_string()
            } else {
                format!("cannot steer the migration to {to}: {refused}")
            },
        })
    }

    fn migration(&self) -> MigrationStatus {
        let inner = self.core.lock();
        let progress = match &inner.state {
            State::Migrating { handle, .. } => Some(handle.progress()),
            _ => None,
        };
        MigrationStatus {
            id: inner.migration.clone(),
            progress,
            report: inner.report.clone(),
        }
    }

    fn migrations(&self) -> Migrations {
        let inner = self.core.lock();
        let mut all = inner.history.all();
        for record in &mut all.migrations {
            inner.add_progress(record);
        }
        all
    }

    fn migration_record(&self, id: &str) -> Option<MigrationRecord> {
        let inner = self.core.lock();
        let mut record = inner.history.get(id)?.clone();
        inner.add_progress(&mut record);
        Some(record)
    }

    fn configuration(&self) -> Result<Configuration, Refusal> {
        let (guest, none) = {
            let inner = self.core.lock();
            let none = conflict("tell of a guest", &inner.state);
            (inner.guest.clone(), none)
        };
        let mut configuration = guest.and_then(|g| g.configuration()).ok_or(none)?;
        configuration.serial = self.core.serial.get().cloned();
        if let (Some(console), Some(place)) = (&mut configuration.console, self.core.console.get())
        {
            console.clone_from(place);
        }
        if let Some(setup) = self.core.setup.get() {
            configuration.boot.clone_from(&setup.boot);
            configuration.sandbox.clone_from(&setup.sandbox);
            configuration.metrics.clone_from(&setup.metrics);
            for (network, tap) in configuration.networks.iter_mut().zip(&setup.taps) {
                network.tap.clone_from(tap);
            }
        }
        Ok(configuration)
    }

    fn events(&self) -> Result<Subscription<Notice>, Refusal> {
        let inner = self.core.lock();
        self.core.feed.subscribe(inner.state_event())
    }

    fn metrics(&self) -> String {
        let status = self.status();
        let totals = self.core.lock().totals.clone();
        let dirty_rate = *lock(&self.core.dirty_rate);
        totals.page(&status, dirty_rate)
    }

    fn recover(&self, request: &RecoverRequest) -> Result<(), Refusal> {
        if request.take_over {
            self.core.take_over(request.force)
        } else {
            self.core.ask_again(request)
        }
    }

    fn record(&self, request: &RecordRequest) -> Result<Pieces, Refusal> {
        request.check().map_err(Refusal::Invalid)?;
        let _turn = lock(&self.core.turn);
        let mut inner = self.core.lock();
        inner.not_in_a_snapshot("record")?;
        let guest = match (&inner.state, &inner.guest) {
            (State::Running | State::Paused, Some(guest)) => Arc::clone(guest),
            (state, _) => return Err(conflict("record", state)),
        };
        if inner.recording {
            return Err(Refusal::Conflict(
                "cannot record: another `ferry record` is recording this guest; end it or wait for its end".into(),
            ));
        }
        let pieces = recording::Frames::begin(&self.core, &*guest, request)?;
        inner.recording = true;
        Ok(Box::new(pieces))
    }

    fn snapshot(&self, request: &SnapshotRequest) -> Result<SnapshotReport, Refusal> {
        self.core.snapshot(request)
    }

    fn balloon(&self) -> Result<BalloonStatus, Refusal> {
        let inner = self.core.lock();
        let Some(guest) = inner.guest.clone() else {
            return Err(conflict("tell of a balloon", &inner.state));
        };
        drop(inner);
        Ok(guest.balloon().ok_or_else(no_balloon)?.status())
    }

    fn set_balloon(&self, request: &BalloonRequest) -> Result<(), Refusal> {
        let inner = self.core.lock();
        let guest = match (&inner.state, &inner.guest) {
            (state, Some(guest)) if state.keeps_changes() => Arc::clone(guest),
            (state, _) => return Err(conflict("set a balloon", state)),
        };
        // The device may be at work for a while; no other request is to wait for it.
        drop(inner);
        let balloon = guest.balloon().ok_or_else(no_balloon)?;
        balloon.set(request).map_err(|refused| {
            let state = &self.core.lock().state;
            match refused {
                // It was handed over meanwhile: the state says where to.
                Refusal::Conflict(_) if !state.keeps_changes() => conflict("set a balloon", state),
                refused => refused,
            }
        })
    }
}

impl Inner {
    fn add_progress(&self, record: &mut MigrationRecord) {
        if let State::Migrating { handle, .. } = &self.state
            && record.status == RecordStatus::UnderWay
            && self.migration.as_deref() == Some(record.id.as_str())
        {
            record.progress = Some(handle.progress());
        }
    }
}

fn no_balloon() -> Refusal {
    Refusal::Conflict(
        "the guest has no balloon; start it with `ferry run --balloon` or `--memory SIZE,max=MAX`"
            .into(),
    )
}
