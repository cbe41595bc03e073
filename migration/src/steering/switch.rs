//! What users and the engine share: users change, the engine takes.

use super::{Change, SteeringError};
use crate::options::{OnTimeout, Options, PolicyKind};
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Mutex, MutexGuard, lock};

/// How far the migration is, as far as steering goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Stage {
    #[default]
    Before,
    Disks,
    Memory,
    Over,
}

/// A migration's steering: users change, the engine takes.
#[derive(Debug, Default)]
pub struct Steering {
    /// Something was accepted: what the engine looks at between two batches, without the lock.
    /// Written under the lock alone, which orders all that needs an order.
    news: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    stage: Stage,
    /// With everything that was accepted.
    options: Options,
    /// The destination may be given the guest before its memory.
    post_copy: bool,
    /// The guest can be slowed down.
    throttle: bool,
    accepted: Vec<Change>,
}

impl Steering {
    /// Changes that the engine may be behind.
    pub(super) const BACKLOG: usize = 64;

    /// Asks for a change. An accepted one the engine makes before it leaves the live phase.
    ///
    /// # Errors
    /// Why nothing is changed.
    pub fn change(&self, change: &Change) -> Result<(), SteeringError> {
        let mut state = self.state();
        match state.stage {
            Stage::Before => return Err(SteeringError::TooEarly),
            Stage::Disks if change.switchover => return Err(SteeringError::Disks),
            Stage::Disks | Stage::Memory => {}
            Stage::Over => return Err(SteeringError::TooLate),
        }
        if *change == Change::default() {
            return Err(SteeringError::Nothing);
        }
        if state.accepted.len() >= Self::BACKLOG {
            return Err(SteeringError::Busy(state.accepted.len()));
        }
        let options = change.applied_to(&state.options);
        options.check()?;
        if change.policy == Some(PolicyKind::Auto) && state.options.policy != PolicyKind::Auto {
            return Err(SteeringError::Auto);
        }
        if options.needs_post_copy() && !state.post_copy {
            return Err(SteeringError::NoPostCopy(options.policy.name()));
        }
        if options.on_timeout == OnTimeout::Throttle && !state.throttle {
            return Err(SteeringError::NoThrottle);
        }
        state.options = options;
        state.accepted.push(*change);
        self.news.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// The engine can be steered from now on.
    pub(crate) fn open(&self, options: &Options, post_copy: bool, throttle: bool) {
        let mut state = self.state();
        state.stage = Stage::Disks;
        state.options = options.clone();
        state.post_copy = post_copy;
        state.throttle = throttle;
    }

    /// Memory is being sent.
    pub(crate) fn memory(&self) {
        self.state().stage = Stage::Memory;
    }

    /// What was accepted since the last time, in order.
    pub(crate) fn take(&self) -> Vec<Change> {
        if !self.has_news() {
            return Vec::new();
        }
        let mut state = self.state();
        self.news.store(false, Ordering::Relaxed);
        std::mem::take(&mut state.accepted)
    }

    /// Whether there is something to take.
    pub(crate) fn has_news(&self) -> bool {
        self.news.load(Ordering::Relaxed)
    }

    /// Nothing is accepted any more; `false` where something is still to be taken first.
    pub(crate) fn close(&self) -> bool {
        let mut state = self.state();
        let empty = state.accepted.is_empty();
        if empty {
            state.stage = Stage::Over;
        }
        empty
    }

    /// The migration has ended, whatever was accepted.
    pub(crate) fn end(&self) {
        self.state().stage = Stage::Over;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}
