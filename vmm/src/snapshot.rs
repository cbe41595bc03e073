//! A machine's guest in a file, and back: [`ferry_migration::snapshot`] over a
//! [`Machine`](crate::machine::Machine).
//!
//! The disks are not in the file: a snapshot has the size and the time of change of each, as of the
//! guest's pause, and is only restored with disks that are as they were then, for a guest whose
//! disk changed behind its back destroys it. What is restored is the guest as it was, and its clock
//! goes on where it stood; but it is another guest than the one that was saved, and it is told so by
//! its VM generation id ([`crate::machine::GenerationId`]).
//!
//! ```no_run
//! use ferry_vmm::api::types::SnapshotRequest;
//! use ferry_vmm::machine::{Backends, Machine};
//! use ferry_vmm::snapshot::{RestoreOptions, restore, save};
//! use std::sync::Arc;
//! use std::sync::atomic::AtomicBool;
//!
//! # fn example(machine: Arc<Machine>, request: SnapshotRequest, options: RestoreOptions)
//! # -> Result<(), Box<dyn std::error::Error>> {
//! let written = save(&machine, &request, &AtomicBool::new(false))?;
//! println!("{} bytes, the guest stood still for {} ms", written.bytes, written.downtime_ms);
//! drop(machine);
//! let console = Arc::new(|| Ok(Box::new(std::io::stdout()) as _));
//! let restored = restore(&options, console, Backends::default(), &|| false)?;
//! println!("it runs: {}", restored.is_running());
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

mod cancel;
mod reading;
mod restore;
mod save;

pub use restore::{RestoreError, RestoreOptions, RestoreReport, Restored, restore};
pub use save::{SnapshotError, save};

use std::path::Path;
use std::time::UNIX_EPOCH;

use ferry_devices::block::Disk;
use serde::{Deserialize, Serialize};

/// What a snapshot's configuration holds, as JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Contents {
    /// A [`MachineDescription`](crate::machine::MachineDescription), whose format is looked at
    /// before it is read.
    description: serde_json::Value,
    #[serde(default)]
    disks: Vec<DiskMark>,
}

/// By what a disk is known again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct DiskMark {
    bytes: u64,
    /// When it was changed last, in nanoseconds since 1970; `null` where that tells nothing, as of
    /// a block device.
    modified_ns: Option<u64>,
    /// Where it was, for people.
    path: String,
}

impl DiskMark {
    fn of(disk: &Disk) -> std::io::Result<Self> {
        let path = disk.path();
        Ok(Self {
            bytes: disk.bytes(),
            modified_ns: modified(path)?,
            path: path.display().to_string(),
        })
    }
}

fn modified(path: &Path) -> std::io::Result<Option<u64>> {
    let metadata = std::fs::metadata(path)?;
    let since = metadata.is_file().then(|| metadata.modified());
    let since = since
        .transpose()?
        .and_then(|at| at.duration_since(UNIX_EPOCH).ok());
    Ok(since.and_then(|since| u64::try_from(since.as_nanos()).ok()))
}

/// Threads that code and decode: one for each of the host's processors, within reason.
fn threads() -> u16 {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    u16::try_from(processors).unwrap_or(u16::MAX).clamp(1, 8)
}

/// In milliseconds.
fn ms(time: std::time::Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
