use std::io;

use vm_memory::mmap::MmapRegionError;

use super::{HUGE_PAGE_SIZE, MAX_RAM, PAGE_SIZE};

/// Pages that are not (all) RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "{count} pages from guest page {first_gfn:#x} are not all inside one region of the guest's RAM"
)]
pub struct RangeError {
    /// First page asked for.
    pub first_gfn: u64,
    /// Number of pages asked for.
    pub count: u64,
}

impl RangeError {
    pub(crate) fn new(first_gfn: u64, count: u64) -> Self {
        Self { first_gfn, count }
    }
}

/// Why guest RAM could not be made or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RamError {
    /// No memory was asked for.
    #[error("a guest needs memory, but 0 bytes were asked for: give a size such as 512M")]
    Zero,
    /// The size is not a whole number of pages.
    #[error(
        "the memory size of {bytes} bytes is not a multiple of the page size of {page} bytes: round it to one"
    )]
    NotPageMultiple {
        /// Size asked for.
        bytes: u64,
        /// The page size it has to be a multiple of: 4 KiB, or 2 MiB with huge pages.
        page: u64,
    },
    /// More than any guest can have.
    #[error(
        "the memory size of {bytes} bytes is more than a guest can have ({MAX_RAM} bytes): ask for less"
    )]
    TooBig {
        /// Size asked for.
        bytes: u64,
    },
    /// More than the host has free.
    #[error(
        "the guest's {} MiB of memory are more than {by} has available ({} MiB): ask for less or free memory",
        bytes >> 20,
        available >> 20
    )]
    NotAvailable {
        /// Size asked for.
        bytes: u64,
        /// What there is, in bytes.
        available: u64,
        /// Who has no more: "this host", or the memory cgroup.
        by: String,
    },
    /// The huge page pool is too small.
    #[error(
        "the host's pool of 2 MiB pages cannot give the {} pages that {} MiB of guest memory need: raise vm.nr_hugepages, or run without huge pages",
        bytes / HUGE_PAGE_SIZE,
        bytes >> 20
    )]
    PoolTooSmall {
        /// Size asked for.
        bytes: u64,
    },
    /// The memfd could not be made.
    #[error("a memory file of {bytes} bytes could not be created: {source}")]
    Memfd {
        /// Size asked for.
        bytes: u64,
        /// The kernel's reason.
        source: io::Error,
    },
    /// Not all of it could be taken from the host at once.
    #[error(
        "the guest's {bytes} bytes of memory could not be taken from the host at once, as --memory-prealloc asks: {source}"
    )]
    Prealloc {
        /// Size asked for.
        bytes: u64,
        /// The kernel's reason.
        source: io::Error,
    },
    /// It cannot be kept on a node of the host.
    #[error(
        "the guest's memory cannot be kept on this host's NUMA node {node}: {source}; choose another node, or none"
    )]
    Node {
        /// The node.
        node: u32,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The memfd could not be mapped.
    #[error("the guest's {bytes} bytes of memory could not be mapped: {source}")]
    Map {
        /// Size asked for.
        bytes: u64,
        /// Why.
        source: MmapRegionError,
    },
    /// Pages could not be given back to the host.
    #[error(
        "{count} pages from guest page {first_gfn:#x} could not be given back to the host: {source}"
    )]
    Punch {
        /// First page.
        first_gfn: u64,
        /// Number of pages.
        count: u64,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The kernel kept a page that it was told to drop.
    #[error(
        "guest page {gfn:#x} could not be dropped, since it is part of a huge page that is in use: give --memory-backing 4k to the destination and migrate again"
    )]
    NotAbsent {
        /// The page.
        gfn: u64,
    },
    /// Not RAM.
    #[error(transparent)]
    Range(#[from] RangeError),
}

impl RamError {
    /// What a failed mmap of `bytes` means.
    pub(super) fn map(error: MmapRegionError, bytes: u64, hugepages: bool) -> Self {
        match error {
            MmapRegionError::Mmap(e) if hugepages && e.raw_os_error() == Some(libc::ENOMEM) => {
                Self::PoolTooSmall { bytes }
            }
            source => Self::Map { bytes, source },
        }
    }

    pub(super) fn not_page_multiple(bytes: u64, hugepages: bool) -> Self {
        let page = if hugepages { HUGE_PAGE_SIZE } else { PAGE_SIZE };
        Self::NotPageMultiple { bytes, page }
    }
}
