use std::io;
use std::path::PathBuf;

/// Why a kernel could not be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// There is no such file.
    #[error("the {what} {path} does not exist: check the path")]
    Missing {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// It could not be opened or read.
    #[error("the {what} {path} could not be read: {source}")]
    Unreadable {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// A directory, a pipe, a device.
    #[error("the {what} {path} is not a regular file: name the file itself")]
    NotAFile {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// Not a kernel that can be booted here.
    #[error(
        "{path} is not a kernel that ferry can boot ({why}): it takes an x86-64 ELF (PVH or vmlinux) or a bzImage"
    )]
    NotAKernel {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// No room.
    #[error(
        "the kernel {path} needs memory up to {need:#x}, but the guest's ends at {have:#x}: give the guest more memory"
    )]
    TooBig {
        /// The file.
        path: PathBuf,
        /// Address after the last byte needed.
        need: u64,
        /// Address after the last byte there is below 4 GiB.
        have: u64,
    },
    /// It wants to be where the loader's own data is.
    #[error(
        "the kernel {path} wants to be loaded at {address:#x}, which is taken by {by}: link it at 1 MiB or above"
    )]
    Overlap {
        /// The file.
        path: PathBuf,
        /// Where.
        address: u64,
        /// What is there.
        by: &'static str,
    },
    /// No room for the initrd.
    #[error(
        "the initrd {path} of {size} bytes does not fit beside the kernel, which leaves {room} bytes: give the guest more memory"
    )]
    InitrdTooBig {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// The room there is.
        room: u64,
    },
    /// The command line is too long.
    #[error("the command line has {len} bytes, but the kernel {path} takes {max}: shorten it")]
    CmdlineTooLong {
        /// The kernel.
        path: PathBuf,
        /// Its length in bytes.
        len: usize,
        /// The most the kernel takes.
        max: usize,
    },
    /// The command line has a NUL in it.
    #[error("the command line for the kernel {path} contains a NUL character: remove it")]
    CmdlineNul {
        /// The kernel.
        path: PathBuf,
    },
}
