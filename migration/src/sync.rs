//! The one way to take a lock in this crate.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Takes the lock, also after a panic of its holder: what a lock guards is valid between any two
/// statements.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
