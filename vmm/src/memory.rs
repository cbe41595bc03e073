//! Guest memory: one memory file, mapped shared, laid out around the hole below 4 GiB.
//!
//! ```text
//!  guest-physical              memory file
//!  0          ┌──────────┐ 0
//!             │ low RAM  │
//!  ≤ 3 GiB    └──────────┘ ≤ 3 GiB ─┐
//!             │ hole: APICs, MMIO   │ (no bytes in the file)
//!  4 GiB      ┌──────────┐ ─────────┘
//!             │ high RAM │
//!             └──────────┘
//! ```
//!
//! A file and not anonymous memory: it can be handed to another process, and `fallocate` gives
//! pages back to the host. It is made of 2 MiB pages where the host has them ([`Backing`]). What
//! the VMM itself writes (boot data, device queues) is marked page by page in a [`DirtyBitmap`],
//! since KVM's dirty log only sees the guest's own writes.

mod available;
mod backing;
mod bitmap;
mod collapse;
mod error;
mod holes;
mod huge_mount;
mod layout;
mod memfd;
mod nodes;
mod shared;
mod transfer;
mod userfault;
mod zero;

use std::fs::File;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ferry_devices::sync::lock;
use vm_memory::bitmap::NewBitmap as _;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

pub use available::available_memory;
pub(crate) use available::check_available;
pub(crate) use available::field as meminfo_field;
pub use backing::{Backing, MemoryOptions, Resident};
use backing::{PageKind, Pages};
pub use bitmap::DirtyBitmap;
pub use error::{RamError, RangeError};
pub(crate) use huge_mount::root as private_mount;
pub use layout::{HIGH_RAM_START, LOW_RAM_END, MAX_RAM, RamLayout, RamRegion};
pub use nodes::NodeMemory;
pub use shared::{ClaimError, ShareError, SharedRam};
pub use transfer::SplicePipe;
pub use userfault::{
    Fault, PlaceError, Placed, Userfault, UserfaultBy, UserfaultError, Waited, check_userfault,
};

/// Size of a guest page as the dirty log, the wire and this crate count them, in bytes.
pub const PAGE_SIZE: u64 = 4096;
const PAGE_SIZE_USIZE: usize = 4096;
/// Size of a huge page, in bytes.
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
    pages: Pages,
    /// All of it was taken from the host when it was made.
    preallocated: bool,
    /// Whether a 2 MiB page may be filled where one page comes. Off from the first page that
    /// post-copy drops until all are in place.
    fills_huge: AtomicBool,
    /// Whether holes in the memory file mean something: the same time.
    keeps_holes: AtomicBool,
    /// Another process had it before: it may hold pages that were never touched through this
    /// mapping.
    adopted: bool,
    /// When it was last asked how much of it is there, and the answer: the kernel walks all page
    /// tables for it.
    resident: Mutex<Option<(Instant, Resident)>>,
    tenure: shared::Tenure,
}

// SAFETY: `bases` are addresses of mappings that `memory` owns for as long as `self` lives; they
// are handed out as raw pointers only, and a caller that dereferences one argues for it. Everything
// else in here is Send and Sync by itself.
unsafe impl Send for GuestRam {}
// SAFETY: as above; `&GuestRam` gives no access to guest memory that is not through raw pointers or
// vm-memory's volatile accesses, both meant for memory shared with a running guest.
unsafe impl Sync for GuestRam {}

impl GuestRam {
    /// Creates `bytes` of zeroed RAM. The pool's pages are reserved at once; others are taken from
    /// the host as they are touched. Where the host has no 2 MiB pages to give, the RAM is made of
    /// 4 KiB pages, and [`note`](Self::note) says why.
    ///
    /// # Errors
    /// [`RamError`]: a size that cannot be, more than the host has, a pool that is too small, or a
    /// refusal of the kernel.
    pub fn new(bytes: u64, backing: Backing) -> Result<Self, RamError> {
        let pool = backing == Backing::Hugetlb;
        let layout = RamLayout::new(bytes, pool)?;
        if pool {
            let pages = Pages::new(PageKind::Hugetlb);
            return Self::map(layout, Arc::new(memfd::create(bytes, true)?), pages);
        }
        // A pool's shortage is found by mmap; ordinary memory is overcommitted silently, and the
        // OOM killer would find it in the middle of a run.
        check_available(bytes)?;
        let (file, pages) = match backing {
            Backing::Auto | Backing::Transparent if backing::has_room(bytes) => {
                backing::transparent_file(bytes)?
            }
            _ => (memfd::create(bytes, false)?, Pages::new(PageKind::Small)),
        };
        Self::map(layout, Arc::new(file), pages)
    }

    /// As [`new`](Self::new), and takes all of it from the host at once if that is wished.
    ///
    /// # Errors
    /// As there, and [`RamError::Prealloc`].
    pub fn with_options(bytes: u64, options: MemoryOptions) -> Result<Self, RamError> {
        Self::bound(bytes, options, &[])
    }

    /// As [`with_options`](Self::with_options), of the host's nodes.
    fn bound(bytes: u64, options: MemoryOptions, parts: &[NodeMemory]) -> Result<Self, RamError> {
        let mut ram = Self::new(bytes, options.backing)?;
        ram.bind(parts)?;
        if options.prealloc {
            ram.prealloc()?;
        }
        Ok(ram)
    }

    /// The RAM of a guest that had `hugepages` of a pool where it comes from, or had none: what is
    /// asked for here counts. With [`Backing::Auto`] such a guest gets the pool's pages, or others
    /// where the pool has too few.
    ///
    /// # Errors
    /// As for [`with_options`](Self::with_options).
    pub fn arriving(bytes: u64, hugepages: bool, options: MemoryOptions) -> Result<Self, RamError> {
        Self::on_nodes(bytes, hugepages, options, &[])
    }

    /// As [`arriving`](Self::arriving); parts of it come from nodes of the host.
    ///
    /// # Errors
    /// As there, and [`RamError::Node`].
    pub fn on_nodes(
        bytes: u64,
        hugepages: bool,
        options: MemoryOptions,
        parts: &[NodeMemory],
    ) -> Result<Self, RamError> {
        if !hugepages || options.backing != Backing::Auto {
            return Self::bound(bytes, options, parts);
        }
        let pool = MemoryOptions {
            backing: Backing::Hugetlb,
            ..options
        };
        match Self::bound(bytes, pool, parts) {
            // A kernel without pools says so otherwise.
            Err(error @ (RamError::PoolTooSmall { .. } | RamError::Memfd { .. })) => {
                let mut ram = Self::bound(bytes, options, parts)?;
                ram.add_note(&format!(
                    "the guest had pages of a hugetlb pool, and has none here: {error}"
                ));
                Ok(ram)
            }
            result => result,
        }
    }

    fn prealloc(&mut self) -> Result<(), RamError> {
        let bytes = self.size();
        for (region, base) in self.layout.regions().iter().zip(&self.bases) {
            memfd::populate(*base, region.bytes())
                .map_err(|source| RamError::Prealloc { bytes, source })?;
        }
        self.preallocated = true;
        Ok(())
    }

    /// RAM over a file of its size.
    fn map(layout: RamLayout, file: Arc<File>, pages: Pages) -> Result<Self, RamError> {
        let bytes = layout.size();
        let hugepages = pages.kind == PageKind::Hugetlb;
        let mut mapped = Vec::new();
        let mut bases = Vec::new();
        let mut bitmaps = Vec::new();
        for region in layout.regions() {
            let size = usize::try_from(region.bytes()).map_err(|_| RamError::TooBig { bytes })?;
            let bitmap = DirtyBitmap::with_len(size);
            bitmaps.push(bitmap.clone());
            // The pool's pages must be reserved, so that a shortage is an error now and not a
            // SIGBUS when the guest touches a page.
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
            match pages.kind {
                PageKind::Small => memfd::forbid_transparent_hugepages(base, region.bytes()),
                PageKind::Transparent => memfd::allow_transparent_hugepages(base, region.bytes()),
                PageKind::Hugetlb => {}
            }
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
            fills_huge: AtomicBool::new(pages.kind == PageKind::Transparent),
            keeps_holes: AtomicBool::new(false),
            pages,
            preallocated: false,
            adopted: false,
            resident: Mutex::new(None),
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
        self.pages.kind == PageKind::Hugetlb
    }

    /// What the RAM is made of; never [`Backing::Auto`].
    #[must_use]
    pub fn backing(&self) -> Backing {
        self.pages.kind.backing()
    }

    /// Why it is not made of what it could be, in a sentence.
    #[must_use]
    pub fn note(&self) -> Option<&str> {
        self.pages.note.as_deref()
    }

    /// Whether a 2 MiB page may be filled where one page comes.
    #[must_use]
    pub fn fills_huge(&self) -> bool {
        self.fills_huge.load(Ordering::Acquire)
    }

    /// Whether all of it was taken from the host when it was made.
    #[must_use]
    pub fn is_preallocated(&self) -> bool {
        self.preallocated
    }

    /// How much of it this process has mapped, and how. The answer may be some time old: the more
    /// it costs the kernel, the more seldom it is asked.
    #[must_use]
    pub fn resident(&self) -> Resident {
        /// The least time between two questions.
        const OLD: Duration = Duration::from_secs(1);
        /// At most this part of the time is spent on the answers.
        const SHARE: u32 = 100;
        let mut last = lock(&self.resident);
        let began = Instant::now();
        if let Some((until, answer)) = *last
            && began < until
        {
            return answer;
        }
        let ranges: Vec<_> = self.layout.regions().iter().zip(&self.bases).collect();
        let ranges: Vec<_> = ranges
            .into_iter()
            .map(|(region, base)| {
                let start = base.addr().get() as u64;
                (start, start + region.bytes())
            })
            .collect();
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap_or_default();
        let answer = Resident::of(&smaps, &ranges);
        let cost = began.elapsed();
        *last = Some((Instant::now() + OLD.max(cost * SHARE), answer));
        answer
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

    /// Host address of `count` pages from page number `first_gfn`, contiguous, all inside one
    /// region. Valid as long as `self`; shared with the running guest, hence a raw pointer.
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

    /// Has the host fill the memory page by page from now on. Best effort: a kernel without
    /// transparent huge pages refuses, and needs no telling.
    pub(crate) fn forbid_transparent_hugepages(&self) {
        self.keeps_holes.store(true, Ordering::Release);
        // Those of 4 KiB pages never had them.
        if !self.fills_huge.swap(false, Ordering::AcqRel) {
            return;
        }
        for (region, base) in self.layout.regions().iter().zip(&self.bases) {
            memfd::forbid_transparent_hugepages(*base, region.bytes());
        }
    }

    /// Takes [`forbid_transparent_hugepages`](Self::forbid_transparent_hugepages) back, where 2 MiB
    /// pages were wished.
    fn allow_transparent_hugepages(&self) {
        self.keeps_holes.store(false, Ordering::Release);
        if self.pages.kind != PageKind::Transparent {
            return;
        }
        for (region, base) in self.layout.regions().iter().zip(&self.bases) {
            memfd::allow_transparent_hugepages(*base, region.bytes());
        }
        self.fills_huge.store(true, Ordering::Release);
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
    /// [`RangeError`] when `first_gfn` is no RAM or not so aligned, or the words reach past the
    /// region.
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
}

#[cfg(test)]
mod tests;
