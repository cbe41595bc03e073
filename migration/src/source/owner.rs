//! Who owns the guest: one value, shared with those who look on and cancel.
//!
//! ```text
//!            cancel                 commit               RUNNING
//!  Cancelled ◀────── Here (source) ────────▶ InDoubt ──────────────▶ Destination
//!                        ▲                     │
//!                        └─────────────────────┘
//!                  "not started": the destination's own word
//! ```
//!
//! A progress display decides nothing: what a VMM does after a failure or a panic follows from this
//! value, and the guest itself from the guards ([`PausedVm`](crate::port::PausedVm),
//! [`CommittedVm`](crate::port::CommittedVm)).

use crate::sync::atomic::{AtomicU8, Ordering};

/// Who may run the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
// Exhaustive: a VMM decides by it who may run the guest, and must decide for every value.
pub enum Owner {
    /// The source: nothing was committed.
    Source,
    /// The destination, if it has read the commit; it has not answered. Neither side runs the guest
    /// by itself.
    InDoubt,
    /// The destination: it has said that it runs the guest.
    Destination,
}

/// The owner of one migration's guest, and the switch between cancelling and committing: exactly
/// one of the two wins.
#[derive(Debug, Default)]
pub struct Ownership(AtomicU8);

const HERE: u8 = 0;
const CANCELLED: u8 = 1;
const IN_DOUBT: u8 = 2;
const DESTINATION: u8 = 3;

impl Ownership {
    /// Of a guest that was committed by an earlier migration: for
    /// [`recover`](crate::source::recover).
    #[must_use]
    pub fn in_doubt() -> Self {
        Self(AtomicU8::new(IN_DOUBT))
    }

    /// Who owns the guest now.
    #[must_use]
    pub fn owner(&self) -> Owner {
        match self.0.load(Ordering::SeqCst) {
            DESTINATION => Owner::Destination,
            IN_DOUBT => Owner::InDoubt,
            _ => Owner::Source,
        }
    }

    /// Asks for the migration to end. `false` when it is too late: the guest was committed.
    pub fn cancel(&self) -> bool {
        self.swap(HERE, CANCELLED) || self.is_cancelled()
    }

    /// Whether it was asked for in time.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::SeqCst) == CANCELLED
    }

    /// Closes the switch for cancelling; `false` when it was cancelled before.
    pub(super) fn commit(&self) -> bool {
        self.swap(HERE, IN_DOUBT)
    }

    /// The commit could not be written down, so that nothing was sent; or the destination says that
    /// it did not start.
    pub(super) fn take_back(&self) {
        self.0.store(HERE, Ordering::SeqCst);
    }

    /// The destination says that it runs the guest.
    pub(super) fn confirm(&self) {
        self.0.store(DESTINATION, Ordering::SeqCst);
    }

    fn swap(&self, from: u8, to: u8) -> bool {
        self.0
            .compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
    }
}
