//! A bootable Linux: Debian's kernel for clouds, unchanged, and an initial RAM disk with the
//! modules that ferry's devices need and a static `/init` ([`INIT`]).
//!
//! The kernel comes from Debian's archive by apt, which checks its signature; no root is needed and
//! nothing is installed. It is kept in a cache ([`cache_dir`]) with the checksums of all its files,
//! which are checked whenever one is used. The RAM disk is made anew each time, in milliseconds.
//!
//! ```no_run
//! use ferry_guest_images::linux::{GUEST_MODULES, Kernel, RamDisk};
//!
//! let kernel = Kernel::get(&|what| eprintln!("{what}"))?;
//! let disk = RamDisk::new(&kernel.modules(GUEST_MODULES)?)?;
//! std::fs::write("/tmp/initrd", disk.finish())?;
//! println!("boot {} with /tmp/initrd", kernel.image()?.display());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod cpio;
mod fetch;
mod kernel;
mod modules;
mod ram_disk;

use std::io;
use std::path::PathBuf;

pub use kernel::{Kernel, cache_dir};
pub use ram_disk::RamDisk;

/// The first process: a static x86-64 Linux program. Its crate, `ferry-linux-init`, says what it
/// does.
pub const INIT: &[u8] = include_bytes!(env!("FERRY_LINUX_INIT"));

/// Modules that a guest of ferry needs for its devices; what they depend on comes by itself.
pub const GUEST_MODULES: &[&str] = &[
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "virtio_balloon",
    "virtio-rng",
    "button",
    "evdev",
];

/// Modules that a guest with a vsock device needs besides.
pub const VSOCK_MODULES: &[&str] = &["vmw_vsock_virtio_transport"];

/// Modules that a guest with a virtio console needs besides.
pub const CONSOLE_MODULES: &[&str] = &["virtio_console"];

/// Why there is no Linux to boot.
#[derive(Debug, thiserror::Error)]
pub enum LinuxError {
    /// No place for the cache.
    #[error("there is no directory to keep the kernel in: set FERRY_CACHE, XDG_CACHE_HOME or HOME")]
    NoCache,
    /// The package cannot be had.
    #[error(
        "Debian's kernel cannot be downloaded: {0}; it needs apt-get, dpkg-deb and a way to deb.debian.org once"
    )]
    Download(String),
    /// A file of the cache.
    #[error("{path} cannot be {what} ({source})")]
    Io {
        /// Read, written or made.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A file of the cache is not what was downloaded.
    #[error(
        "{0} is not the file that was downloaded (its checksum differs): remove the directory and start again"
    )]
    Changed(PathBuf),
    /// A module that is neither there nor built in.
    #[error("the kernel {release} has no module {name}")]
    NoModule {
        /// The kernel.
        release: String,
        /// The module.
        name: String,
    },
    /// A module that cannot be unpacked.
    #[error("the module {0} is damaged: remove the directory and start again")]
    Module(PathBuf),
    /// An initial RAM disk cannot hold a file of 4 GiB.
    #[error("{0} is too large for an initial RAM disk")]
    TooLarge(String),
}

impl LinuxError {
    fn io(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { what, path, source }
    }
}
