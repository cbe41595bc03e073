//! Why a disk cannot be used.

use std::io;
use std::path::PathBuf;

use super::SECTOR;

/// Why a disk cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// It cannot be opened.
    #[error("the disk {path} cannot be opened: {source}; {hint}")]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
        /// What to do.
        hint: &'static str,
    },
    /// Not something that has blocks.
    #[error("the disk {path} is neither a file nor a block device: give a raw image")]
    Kind {
        /// The file.
        path: PathBuf,
    },
    /// An odd size.
    #[error(
        "the disk {path} has {bytes} bytes, which is no multiple of {SECTOR} (or none at all): is it a raw image? \
         `truncate -s` makes one of any size"
    )]
    Size {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// Another process has it.
    #[error(
        "the disk {path} is in use by another process, perhaps another virtual machine: stop that one, or give both \
         the disk read-only"
    )]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// Another process has the file that a copy is to be made into.
    #[error(
        "the disk {path} is in use (by the guest at the source, if it is the same file), and a copy would overwrite it: give \
         another path with --disk, or leave --copy-disk out where both hosts share the disk"
    )]
    Target {
        /// The file.
        path: PathBuf,
    },
    /// What a copy is to be made into is something else.
    #[error(
        "the disk {path} has {here} bytes, and a disk of {wanted} bytes is to be copied into it: remove the file, or give one of \
         exactly that size, which is overwritten"
    )]
    OtherSize {
        /// The file.
        path: PathBuf,
        /// Its size.
        here: u64,
        /// The size of the guest's disk.
        wanted: u64,
    },
    /// It cannot be locked, or given up.
    #[error("the disk {path} could not be {what}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}
