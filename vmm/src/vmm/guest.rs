//! What a VMM needs of its guest: the traits behind which a machine, a migration and a guest in
//! doubt stand.

use super::{Ending, Recording};
use crate::api::Refusal;
use crate::api::types::{
    BalloonRequest, BalloonStatus, Configuration, GuestInfo, Missing, Security, SnapshotReport,
    SnapshotRequest,
};
use ferry_migration::options::Options;
use ferry_migration::report::{Event, Progress, Report};
use ferry_migration::source::Owner;
use ferry_migration::steering::{Change, SteeringError};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// A guest, as its VMM sees it. Errors are sentences for the user.
///
/// What only some guests have is a trait of its own: [`GuestBalloon`], [`GuestConsole`],
/// [`GuestSnapshots`].
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

    /// Lets a guest that was handed over run here, on an operator's word that it runs nowhere else.
    ///
    /// # Errors
    /// A sentence; the guest then still stands.
    fn take_over(&self) -> Result<(), String>;

    /// Whether its processors run, whatever was asked of them.
    fn is_running(&self) -> bool;

    /// Whether its disks are still those that fit its memory, for a guest that was handed over and
    /// not confirmed.
    ///
    /// # Errors
    /// They were written on the other side, or nothing tells; a sentence.
    fn check_disks(&self) -> Result<(), String> {
        Ok(())
    }

    /// Ends the guest for good.
    fn stop(&self);

    /// Presses the power button of its machine; what that does is up to the guest.
    ///
    /// # Errors
    /// A sentence; nothing was pressed.
    fn power_button(&self) -> Result<(), String>;

    /// Bytes typed at the guest's console; returns how many of them it took.
    fn input(&self, bytes: &[u8]) -> usize;

    /// Prepares a migration to `uri`; nothing has happened yet when this returns.
    ///
    /// # Errors
    /// A sentence about the URI or its security.
    fn migration(&self, uri: &str, security: &Security) -> Result<Box<dyn Migration>, String>;

    /// Prepares to tell the destination of a migration in doubt once more that the guest is its
    /// own, and to send the missing pages.
    ///
    /// # Errors
    /// A sentence about the URI or its security. Without any given it is that of the migration.
    fn recovery(
        &self,
        uri: &str,
        session: &str,
        security: &Security,
    ) -> Result<Box<dyn Migration>, String>;

    /// Begins to watch which pages the guest dirties; dropping what is returned ends it.
    ///
    /// # Errors
    /// A sentence.
    fn recording(&self) -> Result<Box<dyn Recording>, String>;

    /// Its balloon; `None` where it has none.
    fn balloon(&self) -> Option<&dyn GuestBalloon> {
        None
    }

    /// Its virtio console; `None` where it has none.
    fn console(&self) -> Option<&dyn GuestConsole> {
        None
    }

    /// The way to write it to a file; `None` where it cannot be.
    fn snapshots(&self) -> Option<&dyn GuestSnapshots> {
        None
    }

    /// What has not arrived of a guest that runs already (post-copy); `None` when it is complete.
    fn missing(&self) -> Option<Missing> {
        None
    }

    /// What its machine is made of; what only the embedding program knows is left out.
    fn configuration(&self) -> Option<Configuration> {
        None
    }

    /// How it has ended, if it has.
    fn ending(&self) -> Option<Ending> {
        None
    }

    /// Bytes of its serial output that were dropped, because nothing took them in time.
    fn serial_output_lost(&self) -> u64 {
        0
    }
}

/// A guest's balloon.
pub trait GuestBalloon {
    /// What it holds, and what the guest says of its memory; returns at once.
    fn status(&self) -> BalloonStatus;

    /// Sets its size, or has it moved automatically.
    ///
    /// # Errors
    /// [`Refusal`]: of the request, or because the guest is not here any more.
    fn set(&self, request: &BalloonRequest) -> Result<(), Refusal>;
}

/// A guest's virtio console.
pub trait GuestConsole {
    /// Bytes typed at it; returns how many of them it took.
    fn input(&self, bytes: &[u8]) -> usize;

    /// Says how large its terminal is; whether it took that.
    fn set_size(&self, columns: u16, rows: u16) -> bool;

    /// Bytes of its output that were dropped.
    fn output_lost(&self) -> u64;
}

/// Writing a guest to a file.
pub trait GuestSnapshots {
    /// Writes it, unless `cancelled` is set meanwhile; blocks. Afterwards the guest stands still if
    /// the request says so, and else goes on as before.
    ///
    /// # Errors
    /// A sentence; the guest goes on as before.
    fn save(
        &self,
        request: &SnapshotRequest,
        cancelled: &AtomicBool,
    ) -> Result<SnapshotReport, String>;
}

/// A guest that is complete here and was never handed over.
pub trait TakeOver: Send + Sync {
    /// Runs it, on the operator's word that it does not run at the source; it has
    /// [arrived](super::Vmm::arrived) when this returns.
    ///
    /// # Errors
    /// A sentence. `force` insists where only its disks speak against it.
    fn take_over(&self, force: bool) -> Result<(), String>;
}

/// A migration that has not begun.
pub trait Migration: Send {
    /// For progress and cancelling, before it begins and while it runs.
    fn handle(&self) -> Arc<dyn MigrationHandle>;

    /// Migrates; blocks until the end. Afterwards the guest runs on here as before, unless the
    /// report's status is `Completed`, `InDoubt` or `Interrupted`: then it stands still and must
    /// not run here.
    fn run(self: Box<Self>, options: &Options, events: &mut dyn FnMut(Event)) -> Report;
}

/// A running migration, for others.
pub trait MigrationHandle: Send + Sync {
    /// Cancels it; false, and without effect, after the commit.
    fn cancel(&self) -> bool;
    /// Changes what its options say.
    ///
    /// # Errors
    /// Why nothing is changed.
    fn steer(&self, change: &Change) -> Result<(), SteeringError>;
    /// The session that both sides know it by.
    fn session(&self) -> String;
    /// Where it stands, for people.
    fn progress(&self) -> Progress;
    /// Who owns the guest.
    fn owner(&self) -> Owner;
}

/// The report of an engine that runs: a defect in it is one, too. The guest itself needs no care
/// then: what the engine held of it was dropped.
pub(super) fn caught(handle: &dyn MigrationHandle, run: impl FnOnce() -> Report) -> Report {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| {
        Report::broken(
            &handle.progress(),
            handle.owner(),
            "the migration engine failed inside; the VMM's output says where",
        )
    })
}
