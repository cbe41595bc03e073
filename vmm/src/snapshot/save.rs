//! Writing a machine's guest to a file: whole, under its name, or not at all.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ferry_migration::port::{Clock, PortError};
use ferry_migration::snapshot::{self as format, SaveError, SaveOptions, SaveSetup};

use super::{Contents, DiskMark, ms, threads};
use crate::api::types::{SnapshotReport, SnapshotRequest, Then};
use crate::machine::{Machine, OLDEST_STATE_VERSION, STATE_VERSION, StateError};
use crate::migrate::guest::MachineGuest;
use crate::migrate::{MonotonicClock, session_id};
use crate::new_file::{Making, NewFile, NewFileError};
use crate::sandbox::{Outside, may_make};

/// The pause that ends a live snapshot's rounds.
const LIVE_DOWNTIME: Duration = Duration::from_millis(50);

/// Why there is no snapshot.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// There is a file.
    #[error("{} exists already; choose another name, or replace it with --force", .0.display())]
    Exists(PathBuf),
    /// No file can be made.
    #[error("no snapshot can be made: {0}; the guest goes on as before")]
    File(NewFileError),
    /// It must not be made there.
    #[error("no snapshot can be made: {0}; the guest goes on as before")]
    Outside(#[from] Outside),
    /// It cannot be of that version.
    #[error("no snapshot can be made: {0}; the guest goes on as before")]
    Version(#[from] StateError),
    /// It was not written to the end.
    #[error("the snapshot {} was not written: {source}; the guest goes on as before", path.display())]
    Save {
        /// The file.
        path: PathBuf,
        /// Why.
        source: SaveError,
    },
    /// A disk did not take what was written to it.
    #[error("the snapshot {} was not written: {source}; the guest goes on as before", path.display())]
    Disk {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Writes the machine's guest to a file, unless `cancelled` is set meanwhile. Blocks. The guest
/// stands still while it is written, or for the last part of it only (live). Afterwards it is as
/// the request says: as before, or paused; a guest that is to be stopped is left paused for the
/// caller to stop.
///
/// The file has its name only when it is complete and on the disk, and can be read by this user
/// alone.
///
/// # Errors
/// [`SnapshotError`]: there is no file then (a file that was to be replaced is untouched), and the
/// guest goes on as before.
pub fn save(
    machine: &Arc<Machine>,
    request: &SnapshotRequest,
    cancelled: &AtomicBool,
) -> Result<SnapshotReport, SnapshotError> {
    let began = Instant::now();
    let path = &request.path;
    let version = request.state_version.unwrap_or(STATE_VERSION);
    if !(OLDEST_STATE_VERSION..=STATE_VERSION).contains(&version) {
        return Err(StateError::Unwritable { wanted: version }.into());
    }
    let making = Making {
        replace: request.force,
        private: true,
    };
    may_make(path)?;
    let file = NewFile::create(path, making)?;
    // Most of what the disks hold back goes out while the guest runs.
    flush(machine).map_err(|source| SnapshotError::Disk {
        path: path.clone(),
        source,
    })?;
    let session = session_id();
    let clock = MonotonicClock::new();
    let guest = MachineGuest::new(machine).with_state_version(version);
    let mut downtime = Duration::ZERO;
    let setup = SaveSetup {
        session,
        options: SaveOptions {
            compress: request.compress,
            threads: threads(),
            live: request.live,
            downtime: LIVE_DOWNTIME,
        },
        clock: &clock,
        cancelled: &|| cancelled.load(Ordering::Relaxed),
        describe: &mut || describe(machine),
        resume: request.then == Then::Resume,
        released: &mut |saved| {
            // A guest that did not run before, or is to stand still, has no first instruction.
            let runs = machine.run_state() == crate::machine::RunState::Running;
            let first = runs.then(|| machine.wait_first_entry(Duration::from_secs(1)));
            let since = first.flatten().map_or(Duration::ZERO, |at| at.elapsed());
            let all = clock.now().saturating_sub(saved.paused_at);
            downtime = all.saturating_sub(since);
        },
    };
    let (saved, paused) =
        format::save(&guest, file.file(), setup).map_err(|source| SnapshotError::Save {
            path: path.clone(),
            source,
        })?;
    // Where this fails, the guard that is dropped lets the guest go on.
    file.publish()?;
    if let Some(paused) = paused {
        paused.keep();
    }
    tracing::info!(%session, path = %path.display(), bytes = saved.bytes, "the guest was written to a file");
    Ok(SnapshotReport {
        schema: 1,
        path: path.clone(),
        session: session.to_string(),
        total_ms: ms(began.elapsed()),
        downtime_ms: ms(downtime),
        quiesce_ms: ms(saved.quiesce),
        pages_ms: ms(saved.pages_took),
        state_ms: ms(saved.state_took),
        bytes: saved.bytes,
        pages: saved.pages,
        data_pages: saved.data_pages,
        superseded: saved.superseded,
        rounds: saved.rounds,
        codecs: saved.codecs,
    })
}

/// What the file says of the machine, in the pause.
fn describe(machine: &Machine) -> Result<Vec<u8>, PortError> {
    // The disks as of this pause belong to the snapshot, and must outlast a crash as it does.
    flush(machine)?;
    let marks = machine.disks().iter().map(|disk| DiskMark::of(disk));
    let contents = Contents {
        description: serde_json::to_value(machine.description_to_send().anywhere())?,
        disks: marks.collect::<io::Result<_>>()?,
    };
    Ok(serde_json::to_vec(&contents)?)
}

/// Writes what the guest's disks hold back.
fn flush(machine: &Machine) -> io::Result<()> {
    for disk in machine.disks() {
        disk.settle().map_err(io::Error::other)?;
    }
    Ok(())
}

impl From<NewFileError> for SnapshotError {
    fn from(error: NewFileError) -> Self {
        match error {
            NewFileError::Exists(path) => Self::Exists(path),
            error => Self::File(error),
        }
    }
}
