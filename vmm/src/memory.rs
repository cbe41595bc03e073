//! Guest memory: one memfd, mapped shared, laid out around the hole below 4 GiB.
//!
//! ```text
//!  guest-physical              memfd
//!  0          ┌──────────┐ 0
//!             │ low RAM  │
//!  ≤ 3 GiB    └──────────┘ ≤ 3 GiB ─┐
//!             │ hole: APICs, MMIO   │ (no bytes in the file)
//!  4 GiB      ┌──────────┐ ─────────┘
//!             │ high RAM │
//!             └──────────┘
//! ```
//!
//! A memfd and not anonymous memory: it can be handed to another process, and `fallocate` gives pages
//! back to the host. What the VMM itself writes (boot data, device queues) is marked page by page in a
//! [`DirtyBitmap`], since KVM's dirty log only sees the guest's own writes.

mod bitmap;
mod error;
mod layout;
mod memfd;
mod shared;
mod transfer;
mod userfault;

use std::fs::File;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use vm_memory::bitmap::NewBitmap as _;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

pub use bitmap::DirtyBitmap;
pub use error::{RamError, RangeError};
pub use layout::{HIGH_RAM_START, LOW_RAM_END, MAX_RAM, RamLayout, RamRegion};
pub(crate) use memfd::{available_memory, check_available};
pub use shared::{ClaimError, ShareError, SharedRam};
pub use transfer::{PageRun, SplicePipe};
pub use userfault::{
    Fault, PlaceError, Placed, Userfault, UserfaultBy, UserfaultError, Waited, check_userfault,
};

/// Size of a guest page as the dirty log, the wire and this crate count them, in bytes.
pub const PAGE_SIZE: u64 = 4096;
/// Size of a huge page of the pool that `--hugepages` uses, in bytes.
pub const HUGE_PAGE_SIZE: u64 = 2 << 20;

/// Guest memory as `vm-memory` sees it; writes through it are tracked.
pub type GuestMemory = GuestMemoryMmap<DirtyBitmap>;

/// The guest's RAM.
#[derive(Debug)]
pub struct GuestRam {
    memory: GuestMemory,
    layout: RamLayout,
    /// Host address of each region's first byte, beside `layout.regions()`.
    bases: Vec<NonNull<u8>>,
    bitmaps: Vec<DirtyBitmap>,
    file: Arc<File>,
    hugepages: bool,
    /// Another process had it before: it may hold pages that were never touched through this mapping.
    adopted: bool,
    tenure: shared::Tenure,
}

// SAFETY: `bases` are addresses of mappings that `memory` owns for as long as `self` lives; they are
// handed out as raw pointers only, and whoever dereferences them answers for it. Everything else in
// here is Send and Sync by itself.
unsafe impl Send for GuestRam {}
// SAFETY: as above; `&GuestRam` gives no access to guest memory that is not through raw pointers or
// vm-memory's volatile accesses, both meant for memory shared with a running guest.
unsafe impl Sync for GuestRam {}

impl GuestRam {
    /// Creates `bytes` of zeroed RAM. With `hugepages`, it comes from the host's pool of 2 MiB pages
    /// and is reserved there at once; without, pages are taken from the host as they are touched.
    ///
    /// # Errors
    /// [`RamError`]: a size that cannot be, more than the host has, a pool that is too small, or a
    /// refusal of the kernel.
    pub fn new(bytes: u64, hugepages: bool) -> Result<Self, RamError> {
        let layout = RamLayout::new(bytes, hugepages)?;
        if !hugepages {
            // A pool's shortage is found by mmap; ordinary memory is overcommitted silently, and the
            // OOM killer would find it in the middle of a run.
            check_available(bytes)?;
        }
        let file = memfd::create(bytes, hugepages)?;
        Self::map(layout, Arc::new(file), hugepages)
    }

    /// RAM over a file of its size.
    fn map(layout: RamLayout, file: Arc<File>, hugepages: bool) -> Result<Self, RamError> {
        let bytes = layout.size();
        let mut mapped = Vec::new();
        let mut bases = Vec::new();
        let mut bitmaps = Vec::new();
        for region in layout.regions() {
            let size = usize::try_from(region.bytes()).map_err(|_| RamError::TooBig { bytes })?;
            let bitmap = DirtyBitmap::with_len(size);
            bitmaps.push(bitmap.clone());
            // The pool's pages must be reserved, so that a shortage is an error now and not a SIGBUS
            // when the guest touches a page.
            let reserve = if hugepages { 0 } else { libc::MAP_NORESERVE };
            let mapping = MmapRegionBuilder::new_with_bitmap(size, bitmap)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_SHARED | reserve)
                .with_file_offset(FileOffset::from_arc(file.clone(), region.file_offset))
                .with_hugetlbfs(hugepages)
                .build()
                .map_err(|e| RamError::map(e, bytes, hugepages))?;
            let base = NonNull::new(mapping.as_ptr()).ok_or(RamError::TooBig { bytes })?;
            memfd::exclude_from_core_dumps(base, size);
            bases.push(base);
            mapped.push(
                GuestRegionMmap::new(mapping, GuestAddress(region.address()))
                    .ok_or(RamError::TooBig { bytes })?,
            );
        }
        let memory = GuestMemory::from_regions(mapped).map_err(|_| RamError::TooBig { bytes })?;
        Ok(Self {
            memory,
            layout,
            bases,
            bitmaps,
            file,
            hugepages,
            adopted: false,
            tenure: shared::Tenure::default(),
        })
    }

    /// RAM size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.layout.size()
    }

    /// Whether the RAM comes from the huge page pool.
    #[must_use]
    pub fn hugepages(&self) -> bool {
        self.hugepages
    }

    /// Whether another process had it before: it may hold pages that were never touched here.
    #[must_use]
    pub fn is_adopted(&self) -> bool {
        self.adopted
    }

    /// Where the RAM lies in the guest-physical address space.
    #[must_use]
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// The regions, in order of address; also the order of KVM's memory slots.
    #[must_use]
    pub fn regions(&self) -> &[RamRegion] {
        self.layout.regions()
    }

    /// The memory for reads and writes by the VMM; writes are tracked as dirty.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The memfd behind all regions (at each region's `file_offset`).
    #[must_use]
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Host address of `count` pages from page number `first_gfn`, contiguous, all inside one region.
    /// Valid as long as `self`; shared with the running guest, hence a raw pointer.
    ///
    /// # Errors
    /// [`RangeError`] when any of the pages is not RAM, or they cross the hole.
    pub fn host_address(&self, first_gfn: u64, count: u64) -> Result<NonNull<u8>, RangeError> {
        let (region, page) = self.layout.find(first_gfn, count)?;
        let offset =
            usize::try_from(page * PAGE_SIZE).map_err(|_| RangeError::new(first_gfn, count))?;
        // SAFETY: `find` has checked that page + count lies within the region, whose mapping of
        // `region.bytes()` bytes starts at this base and lives as long as `self`; so the result is
        // inside the same mapping.
        Ok(unsafe { self.bases[region].add(offset) })
    }

    /// The page at a host address of guest memory.
    fn gfn_at(&self, address: u64) -> Option<u64> {
        let mut regions = self.layout.regions().iter().zip(&self.bases);
        regions.find_map(|(region, base)| {
            let offset = address.checked_sub(base.addr().get() as u64)?;
            (offset < region.bytes()).then(|| region.first_gfn + offset / PAGE_SIZE)
        })
    }

    /// Has the host fill the memory page by page from now on. Best effort: a kernel without transparent huge pages
    /// refuses, and needs no telling.
    fn forbid_transparent_hugepages(&self) {
        for (region, base) in self.layout.regions().iter().zip(&self.bases) {
            memfd::forbid_transparent_hugepages(*base, region.bytes());
        }
    }

    /// Marks pages as dirtied by the VMM: for writes that go past [`memory`](Self::memory), e.g. a
    /// device's `readv` straight into guest memory.
    ///
    /// # Errors
    /// [`RangeError`] when any of the pages is not RAM.
    pub fn mark_dirty(&self, first_gfn: u64, count: u64) -> Result<(), RangeError> {
        let (region, page) = self.layout.find(first_gfn, count)?;
        self.bitmaps[region].set_pages(page, count);
        Ok(())
    }

    /// Marks all RAM as dirty.
    pub fn mark_all_dirty(&self) {
        for (region, bitmap) in self.layout.regions().iter().zip(&self.bitmaps) {
            bitmap.set_pages(0, region.pages);
        }
    }

    /// Forgets all dirt of the VMM's own writes.
    pub fn clear_all_dirty(&self) {
        for bitmap in &self.bitmaps {
            bitmap.clear_all();
        }
    }

    /// The VMM's own dirt in one region, as words of 64 pages.
    pub(crate) fn dirty_bitmap(&self, region: usize) -> &DirtyBitmap {
        &self.bitmaps[region]
    }

    /// ORs the pages dirtied by the VMM, from `first_gfn` (a multiple of 64 pages into its region),
    /// into `words`; bit `i` of word `j` is page `first_gfn + 64 j + i`. Nothing is cleared.
    ///
    /// # Errors
    /// [`RangeError`] when `first_gfn` is no RAM or not so aligned, or the words reach past the region.
    pub fn or_dirty_words(&self, first_gfn: u64, words: &mut [u64]) -> Result<(), RangeError> {
        let (region, word) = self.layout.find_words(first_gfn, words.len())?;
        self.bitmaps[region].or_into(word, words);
        Ok(())
    }

    /// Clears exactly the pages set in `words` from the VMM's own dirt; laid out as for
    /// [`or_dirty_words`](Self::or_dirty_words).
    ///
    /// # Errors
    /// As there.
    pub fn clear_dirty_words(&self, first_gfn: u64, words: &[u64]) -> Result<(), RangeError> {
        let (region, word) = self.layout.find_words(first_gfn, words.len())?;
        self.bitmaps[region].and_not(word, words);
        Ok(())
    }

    /// Makes pages zero and gives their memory back to the host. They count as written by the VMM,
    /// since what a migration has already sent of them is out of date.
    ///
    /// # Errors
    /// [`RamError::Range`] when any of the pages is not RAM, [`RamError::Punch`] from the kernel.
    pub fn discard(&self, first_gfn: u64, count: u64) -> Result<(), RamError> {
        let (region, page) = self.layout.find(first_gfn, count)?;
        let start = self.layout.regions()[region].file_offset + page * PAGE_SIZE;
        let end = start + count * PAGE_SIZE;
        let unit = if self.hugepages {
            HUGE_PAGE_SIZE
        } else {
            PAGE_SIZE
        };
        // Only whole pages of the file's own size can be punched out; the rest is overwritten.
        let inner = start.next_multiple_of(unit)..(end / unit * unit);
        if inner.is_empty() {
            self.overwrite_with_zeros(first_gfn, count)?;
        } else {
            self.punch(first_gfn, count, &inner)?;
            let head = (inner.start - start) / PAGE_SIZE;
            let tail = (end - inner.end) / PAGE_SIZE;
            self.overwrite_with_zeros(first_gfn, head)?;
            self.overwrite_with_zeros(first_gfn + count - tail, tail)?;
        }
        self.bitmaps[region].set_pages(page, count);
        Ok(())
    }

    /// Makes pages absent: what they held is stale, and who touches them is to wait for what is to come (see
    /// [`Userfault`]). They do not count as written.
    ///
    /// # Errors
    /// [`RamError::Range`] when any of the pages is not RAM, [`RamError::Punch`] from the kernel, and
    /// [`RamError::NotAbsent`] when a page stays there.
    pub fn drop_pages(&self, first_gfn: u64, count: u64) -> Result<(), RamError> {
        let (region, page) = self.layout.find(first_gfn, count)?;
        if count == 0 {
            return Ok(());
        }
        let start = self.layout.regions()[region].file_offset + page * PAGE_SIZE;
        self.punch(first_gfn, count, &(start..start + count * PAGE_SIZE))?;
        // Of a huge page that it cannot split, the kernel overwrites the part with zeros instead: the guest
        // would then read zeros and never wait. That would be silent, so it is asked for.
        match self.next_data(first_gfn) {
            Some(next) if next >= first_gfn + count => Ok(()),
            there => Err(RamError::NotAbsent {
                gfn: there.unwrap_or(first_gfn),
            }),
        }
    }

    /// Punches bytes of the file out, for pages that an error names.
    fn punch(&self, first_gfn: u64, count: u64, bytes: &Range<u64>) -> Result<(), RamError> {
        memfd::punch(&self.file, bytes.start, bytes.end - bytes.start).map_err(|source| {
            RamError::Punch {
                first_gfn,
                count,
                source,
            }
        })
    }

    fn overwrite_with_zeros(&self, first_gfn: u64, count: u64) -> Result<(), RamError> {
        const ZEROS: [u8; 4096] = [0; 4096];
        for gfn in first_gfn..first_gfn + count {
            self.memory
                .write_slice(&ZEROS, GuestAddress(gfn * PAGE_SIZE))
                .map_err(|_| RangeError::new(first_gfn, count))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
