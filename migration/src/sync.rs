//! What threads share, and the one way to take a lock in this crate.
//!
//! Who owns the guest and what a user was promised are decided by `source/owner.rs` and
//! `steering/switch.rs`. These two take their primitives from here, so that
//! `tests/interleavings.rs` can compile them with others, which try every order of the threads.

pub(crate) use std::sync::{Mutex, MutexGuard, atomic};

/// Takes the lock, also after a panic of its holder: what a lock guards is valid between any two
/// statements.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
