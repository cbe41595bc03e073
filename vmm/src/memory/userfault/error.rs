use std::io;

use super::super::RangeError;

/// Why a guest's missing pages cannot be served on this host.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UserfaultError {
    /// The user may not.
    #[error(
        "this process may not handle a guest's page faults ({source}): run it as root or with CAP_SYS_PTRACE, give its user access to /dev/userfaultfd (chmod, or a udev rule), or set `sudo sysctl vm.unprivileged_userfaultfd=1`"
    )]
    Forbidden {
        /// The kernel's reason.
        source: io::Error,
    },
    /// The kernel cannot.
    #[error(
        "this host's kernel has no {missing}, without which a guest cannot run before its memory has arrived: use Linux 4.14 or later with CONFIG_USERFAULTFD, or migrate by pre-copy"
    )]
    Unsupported {
        /// What it lacks, by its name in `linux/userfaultfd.h`.
        missing: &'static str,
    },
    /// Neither forbidden nor unsupported.
    #[error("a userfaultfd could not be made: {source}")]
    Open {
        /// The kernel's reason.
        source: io::Error,
    },
    /// The guest's memory comes from the huge page pool.
    #[error(
        "a guest with huge pages cannot run before its memory has arrived, since its faults ask for 2 MiB at once: migrate it by \
         pre-copy (and without --on-timeout postcopy), or run it without --hugepages"
    )]
    Hugepages,
    /// The kernel refused the memory.
    #[error(
        "page faults of the {pages} pages from guest page {first_gfn:#x} cannot be handled here: {source}"
    )]
    Register {
        /// First page of the region.
        first_gfn: u64,
        /// Its size in pages.
        pages: u64,
        /// The kernel's reason; EBUSY when another userfaultfd has the region.
        source: io::Error,
    },
}

impl UserfaultError {
    /// What a refused descriptor means.
    pub(super) fn open(source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::Forbidden { source },
            Some(libc::ENOSYS) => Self::Unsupported {
                missing: "userfaultfd",
            },
            _ => Self::Open { source },
        }
    }
}

/// Why pages could not be placed. Those before the page that is named are there; the same call made
/// again skips them and goes on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlaceError {
    /// Not RAM.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// The contents do not fit the pages.
    #[error(
        "{bytes} bytes were given as the contents of {count} pages from guest page {first_gfn:#x}"
    )]
    Length {
        /// First page.
        first_gfn: u64,
        /// Number of pages.
        count: u64,
        /// Bytes given.
        bytes: usize,
    },
    /// The host is out of memory, or the control group that this process is in.
    #[error(
        "this host has no memory left for guest page {gfn:#x}: free memory or raise this process's memory limit; nothing is lost, the page can be placed then"
    )]
    NoMemory {
        /// The first page that was not placed.
        gfn: u64,
    },
    /// The page's absence is not reported any more.
    #[error(
        "guest page {gfn:#x} is not waited for: it was released, and is zero unless the guest wrote to it"
    )]
    Released {
        /// The first page that was not placed.
        gfn: u64,
    },
    /// The kernel refused for another reason.
    #[error("guest page {gfn:#x} could not be placed: {source}")]
    Kernel {
        /// The first page that was not placed.
        gfn: u64,
        /// The kernel's reason.
        source: io::Error,
    },
}

impl PlaceError {
    pub(super) fn kernel(gfn: u64, source: io::Error) -> Self {
        match source.raw_os_error() {
            // A tmpfs has none left, or there is none for a page of it.
            Some(libc::ENOMEM | libc::ENOSPC) => Self::NoMemory { gfn },
            Some(libc::ENOENT) => Self::Released { gfn },
            _ => Self::Kernel { gfn, source },
        }
    }
}

impl From<PlaceError> for io::Error {
    fn from(error: PlaceError) -> Self {
        let kind = match &error {
            PlaceError::Range(_) | PlaceError::Length { .. } => io::ErrorKind::InvalidInput,
            PlaceError::NoMemory { .. } => io::ErrorKind::OutOfMemory,
            PlaceError::Released { .. } => io::ErrorKind::NotFound,
            PlaceError::Kernel { source, .. } => source.kind(),
        };
        Self::new(kind, error)
    }
}
