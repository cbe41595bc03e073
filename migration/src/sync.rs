//! What threads share, and the one way to take a lock in this crate.
//!
//! Who owns the guest and what a user was promised are decided by `source/owner.rs` and
//! `steering/switch.rs`. These two take their primitives from here, so that
//! `tests/interleavings.rs` can compile them with others, which try every order of the threads.

pub(crate) use std::sync::{Mutex, MutexGuard, atomic};

use std::sync::{Condvar, PoisonError};
use std::time::Duration;

/// Takes the lock, also after a panic of its holder: what a lock guards is valid between any two
/// statements.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for a change, at most `time`.
pub(crate) fn wait_timeout<'a, T>(
    change: &Condvar,
    guard: MutexGuard<'a, T>,
    time: Duration,
) -> MutexGuard<'a, T> {
    let waited = change.wait_timeout(guard, time);
    waited.unwrap_or_else(PoisonError::into_inner).0
}

/// Waits while `condition` holds, at most `time`, or for ever where there is none; says whether it
/// has ceased to hold.
pub(crate) fn wait_while<'a, T>(
    change: &Condvar,
    guard: MutexGuard<'a, T>,
    time: Option<Duration>,
    condition: impl FnMut(&mut T) -> bool,
) -> (MutexGuard<'a, T>, bool) {
    let Some(time) = time else {
        let waited = change.wait_while(guard, condition);
        return (waited.unwrap_or_else(PoisonError::into_inner), true);
    };
    let waited = change.wait_timeout_while(guard, time, condition);
    let (guard, result) = waited.unwrap_or_else(PoisonError::into_inner);
    (guard, !result.timed_out())
}
