//! The phases of a migration, as types that consume themselves: `fn(self) -> Result<Next, End>`.
//!
//! | phase | has | goes on with |
//! |---|---|---|
//! | `Connecting` | the guest runs | `Live`, or `Stopping` where memory is shared |
//! | `Live` | the dirty log | `Stopping` |
//! | `Stopping` | the dirty log, how to move | `Stopped` |
//! | `Stopped` | a [`Paused`](crate::port::Paused) guest: dropping it resumes | `CommitSent` |
//! | `CommitSent` | a [`Committed`](crate::port::Committed) guest | `Confirmed`, or itself on a new connection |
//! | `Confirmed` | a [`Committed`](crate::port::Committed) guest and the destination's word | [`Moved`] |
//!
//! Each is in the file of its steps; here is what several of them have. Every phase borrows the
//! [`Source`](super::engine::Source): its parts are what any phase may use. An error drops what the
//! phase has, and so resumes the guest and stops its log, before the error is reported.

use super::error::SourceError;
use crate::port::{Committed, Link, SourceVm};
use std::marker::PhantomData;

/// How a migration ended that did not complete.
pub(super) enum End<'g> {
    /// The guest runs at the source.
    Here(SourceError),
    /// The guest was committed and nothing is known of the destination.
    InDoubt {
        error: SourceError,
        /// `None` when the guest was taken back and cannot run.
        committed: Option<Committed<'g>>,
    },
    /// The destination runs the guest, and pages are missing there.
    Interrupted(SourceError),
}

/// The destination runs the guest and has all of it.
pub(super) struct Moved<'g> {
    pub(super) committed: Committed<'g>,
    /// What is wrong with it all the same.
    pub(super) error: Option<SourceError>,
}

/// A dirty log that was started; dropping it stops it.
pub(super) struct Tracking<'g, L: Link, G: SourceVm<L>> {
    guest: &'g G,
    link: PhantomData<fn(L)>,
}

impl<'g, L: Link, G: SourceVm<L>> Tracking<'g, L, G> {
    /// Starts it.
    pub(super) fn start(guest: &'g G) -> Result<Self, SourceError> {
        // A log that could not be started may have been started in part.
        let log = Self {
            guest,
            link: PhantomData,
        };
        guest
            .start_tracking()
            .map_err(|e| SourceError::guest("starting the dirty log", e))?;
        Ok(log)
    }

    /// Leaves it as it is: the guest runs elsewhere, and its log goes with what is left of it.
    pub(super) fn leave(self) {
        std::mem::forget(self);
    }
}

impl<L: Link, G: SourceVm<L>> Drop for Tracking<'_, L, G> {
    fn drop(&mut self) {
        self.guest.stop_tracking();
    }
}
