//! Driving the engine of an arriving migration, and keeping it while it has no connection to drive.

use std::sync::Arc;

use ferry_migration::destination::{DestinationError, State, Step};
use ferry_migration::wire::SessionId;

use super::{Active, Engine, POLL, Shared, Stage};
use crate::migrate::arrival::Arrival;

/// Waits until the source says that it knows that the guest runs here, and ends the listening: no
/// question comes any more. A connection that is lost before says nothing, and the source may ask
/// on another.
pub(super) fn await_source(shared: &Shared, session: SessionId) {
    // Where it is not here, a thread has it that does the same afterwards.
    let waits =
        |active: &Active| active.stage == Stage::Done { told: true } && active.parked.is_some();
    if let Some(mut engine) = next_word(shared, session, waits) {
        let known = engine.take_acknowledgement();
        park(&mut shared.active(), engine, Stage::Done { told: true });
        shared.changed.notify_all();
        if known {
            shared.stop.set();
        }
    }
}

/// Polls the connection of a parked engine while `waits` says so, and takes the engine once its
/// source has said something; `None` when it is not waited for any more, or the connection is lost.
/// Polls, since a channel over TLS may have the word in its buffer, where no descriptor tells.
fn next_word(
    shared: &Shared,
    session: SessionId,
    waits: impl Fn(&Active) -> bool,
) -> Option<Box<Engine>> {
    while !shared.stop.is_set() {
        {
            let mut active = shared.active();
            let waiting = active
                .as_mut()
                .filter(|a| a.session == session && waits(a))?;
            if let Some(engine) = waiting.parked.take_if(|engine| engine.has_word()) {
                return Some(engine);
            }
            if waiting.parked.as_ref().is_some_and(|e| !e.is_connected()) {
                return None;
            }
        }
        std::thread::sleep(POLL);
    }
    None
}

/// A panic while an engine is driven ends its migration, and keeps no place: the next may come
/// where no guest runs here.
struct Driving<'a>(&'a Shared);

impl Drop for Driving<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let mut active = self.0.active();
        if let Some(a) = active.as_mut() {
            match a.stage {
                Stage::Following => a.stage = Stage::Interrupted,
                Stage::Interrupted | Stage::Done { .. } => {}
                Stage::Receiving | Stage::InDoubt => *active = None,
            }
        }
        self.0.changed.notify_all();
    }
}

/// Runs an engine that has a connection, and does what its end means.
pub(super) fn drive(shared: &Arc<Shared>, engine: Box<Engine>) {
    let _driving = Driving(shared);
    // Declared after the guard, so that its memory is free when the next migration may come.
    let mut engine = engine;
    let result = loop {
        match engine.step() {
            Ok(Step::Continue) => {
                let mut guard = shared.active();
                let Some(active) = guard.as_mut() else {
                    continue;
                };
                if active.policy.is_empty() {
                    engine.policy().clone_into(&mut active.policy);
                }
                if active.data_channels.is_none() && engine.data_channels().is_some()
                    || active.missing_pages.is_none() && engine.missing_pages().is_some()
                {
                    active.data_channels = engine.data_channels().cloned();
                    active.missing_pages = engine.missing_pages().cloned();
                    shared.changed.notify_all();
                }
            }
            Ok(Step::Running) => {
                let now = match engine.follows() {
                    true => Stage::Following,
                    false => Stage::Done { told: false },
                };
                let known = {
                    let mut guard = shared.active();
                    let stage = guard.as_mut().map(|a| &mut a.stage);
                    stage.map(|s| std::mem::replace(s, now))
                };
                // The source is told by the next step: it must not hear of the guest before its
                // owner here does.
                if matches!(known, Some(Stage::Receiving | Stage::InDoubt)) {
                    shared.arrived(&mut engine);
                }
                shared.changed.notify_all();
            }
            Ok(Step::Complete) => break None,
            Err(error) => break Some(error),
        }
    };
    settle(shared, engine, result);
}

fn settle(shared: &Arc<Shared>, engine: Box<Engine>, error: Option<DestinationError>) {
    let why = error.map_or_else(String::new, |e| e.to_string());
    let (stage, arrival) = match engine.state() {
        ended @ (State::Running | State::Complete) => {
            let known = shared.active().as_ref().map(|a| a.stage);
            let followed = known == Some(Stage::Following);
            let told = ended == State::Complete;
            (Stage::Done { told }, followed.then_some(Arrival::Complete))
        }
        State::Interrupted => {
            let left = engine.missing_pages().map_or(0, |a| a.left());
            let sentence = format!(
                "the guest runs here and {left} of its pages are missing: the connection to the source is lost ({why}); it waits \
                 where it needs one; `ferry recover` at the source sends them"
            );
            (Stage::Interrupted, Some(Arrival::Interrupted(sentence)))
        }
        State::InDoubt | State::Ready => {
            let why = format!(
                "the guest is complete here and does not run, for the source fell silent before it handed it over ({why})"
            );
            let guest = shared.guest_in_doubt();
            (Stage::InDoubt, Some(Arrival::InDoubt { why, guest }))
        }
        State::Waiting | State::Filling | State::Discarded => {
            // Also after a doubt: the next one waits for this end, and is not refused.
            enter(shared, Stage::Receiving);
            // The memory of what had arrived goes first: the next migration needs it.
            drop(engine);
            // The owner is told before the next migration may come, and report its own end.
            shared.tell(Arrival::Failed(format!(
                "a migration ended and the source keeps its guest: {why}"
            )));
            *shared.active() = None;
            shared.changed.notify_all();
            return;
        }
    };
    // The owner is told before another thread can take the engine: what that thread reports
    // follows.
    enter(shared, stage);
    if let Some(arrival) = arrival {
        shared.tell(arrival);
    }
    let session = engine.session();
    park(&mut shared.active(), engine, stage);
    shared.changed.notify_all();
    if stage == Stage::InDoubt {
        poll_parked(shared, session);
    }
}

/// A source that was only slow commits, or aborts, on the connection that it has: polls the
/// parked engine's connection until the guest is no longer in doubt or the connection is gone.
fn poll_parked(shared: &Arc<Shared>, session: SessionId) {
    // Where there is no engine another thread has it: a source that has reconnected, or an
    // operator. It may be parked again, in doubt as before.
    let waits = |active: &Active| active.stage == Stage::InDoubt;
    if let Some(engine) = next_word(shared, session, waits) {
        drive(shared, engine);
    }
}

fn enter(shared: &Shared, stage: Stage) {
    if let Some(active) = shared.active().as_mut() {
        active.stage = stage;
    }
}

pub(super) fn park(active: &mut Option<Active>, engine: Box<Engine>, stage: Stage) {
    if let Some(active) = active {
        active.parked = Some(engine);
        active.data_channels = None;
        active.stage = stage;
    }
}
