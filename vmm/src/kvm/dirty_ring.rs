//! KVM's dirty rings: one per vCPU, into which KVM writes each page that it finds dirtied
//! (Documentation/virt/kvm/api.rst, KVM_CAP_DIRTY_LOG_RING).
//!
//! ```text
//!            KVM: a write faulted                 user space
//!   empty ─────────────────────────▶ dirty ─────────────────────────▶ harvested
//!     ▲                                                                   │
//!     └─────────────────────── KVM_RESET_DIRTY_RINGS ─────────────────────┘
//!                     the page is write-protected again: the next write is told
//! ```
//!
//! What was harvested goes into the bitmap of the VMM's own writes, which is where
//! [`DirtyLog`](super::DirtyLog) looks and clears. **In this order: harvest, reset, and only then
//! set the bit.** Between harvest and reset the page is still writable, and writes to it are not
//! reported. A sender that clears the bit *before* it is set reads the page too early perhaps, but
//! the bit comes after that and the page is sent again. A sender that clears the bit *after* it is
//! set reads the page when it is protected: a write after the reading is told by the ring, one
//! before it is read. Were the bit set before the reset, a sender could clear and read in between,
//! and the next write would be lost.
//!
//! A vCPU whose ring is full comes out of KVM_RUN until some of it was reset. Its own thread
//! harvests its own ring then and goes on: no thread has to be woken for it, no
//! other vCPU stands still, and a pause, which waits for the vCPU threads to come out, waits for
//! one harvest at most. A burst larger than the ring costs such exits, and loses nothing.
//!
//! Complete is a harvest only while the vCPUs are outside of KVM_RUN: where the processor collects
//! dirty pages itself (Intel's PML) KVM moves them to the ring on each exit. A pause gets all of
//! them out.
//!
//! KVM writes to guest memory on its own only for a vCPU (its clock, its steal time), and puts that
//! into the vCPU's ring. The writes without a vCPU, for which KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP
//! keeps a bitmap beside the rings, are those of arm64's interrupt controller; x86 has neither.

use std::io;
use std::os::fd::RawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use ferry_devices::sync::lock;
use kvm_bindings::{KVM_DIRTY_LOG_PAGE_OFFSET, KVMIO, kvm_dirty_gfn};
use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::ioctl_io_nr;

use super::error::IoctlError;
use super::vm::{Vm, VmRef};
use crate::memory::PAGE_SIZE;

ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);

/// Size of an entry: what the capability and its argument count in.
pub(super) const ENTRY_BYTES: u32 = 16;
const _: () = assert!(size_of::<kvm_dirty_gfn>() == ENTRY_BYTES as usize);

/// Of [`kvm_dirty_gfn::flags`]: KVM has filled the entry in.
const DIRTY: u32 = 1 << 0;
/// It was harvested, and may be reset.
const HARVESTED: u32 = 1 << 1;

/// Entries of all rings together where the machine does not say: 16 MiB of the kernel's memory.
const TOTAL_ENTRIES: u32 = 1 << 20;
/// The fewest of one ring: KVM keeps up to 576 back for what the processor reports at once.
pub(super) const MIN_ENTRIES: u32 = 1024;
/// Harvested at most before they are reset and marked, so that memory is bounded on any machine.
const STAGED: usize = 64 << 10;

/// How many entries the ring of each vCPU has, of `max` that the host can: as many as it can on a
/// machine of up to 16 vCPUs, and fewer each on larger ones.
pub(super) fn default_entries(max: u32, cpus: u32) -> u32 {
    fit(TOTAL_ENTRIES / cpus.max(1), max)
}

/// The nearest number of entries below `wish` that KVM takes (a power of two), at least
/// [`MIN_ENTRIES`].
pub(super) fn fit(wish: u32, max: u32) -> u32 {
    let wish = wish.min(max).max(MIN_ENTRIES);
    1 << wish.ilog2()
}

/// The rings of a VM's vCPUs.
#[derive(Debug)]
pub(super) struct DirtyRings {
    entries: u32,
    state: Mutex<State>,
    /// How often a vCPU came out because its ring was full.
    full: AtomicU64,
}

#[derive(Debug)]
struct State {
    rings: Vec<Ring>,
    /// Pages that were harvested of each ring so far.
    taken: Vec<u64>,
    /// Harvested pages, as slot and page in it, that are not marked yet.
    staged: Vec<(u32, u64)>,
    /// Entries that were harvested and that KVM has not reset yet.
    unreset: u64,
}

impl DirtyRings {
    pub(super) fn new(entries: u32) -> Self {
        Self {
            entries,
            state: Mutex::new(State {
                rings: Vec::new(),
                taken: Vec::new(),
                staged: Vec::with_capacity(STAGED),
                unreset: 0,
            }),
            full: AtomicU64::new(0),
        }
    }

    /// Entries of each ring.
    pub(super) const fn entries(&self) -> u32 {
        self.entries
    }

    /// How often a vCPU came out because its ring was full.
    pub(super) fn full_exits(&self) -> u64 {
        self.full.load(Ordering::Relaxed)
    }

    /// Pages that were harvested of each ring so far.
    pub(super) fn taken(&self) -> Vec<u64> {
        self.lock().taken.clone()
    }

    /// Maps the ring of the vCPU `fd`; the number by which it is harvested alone.
    pub(super) fn add(&self, vcpu: RawFd) -> io::Result<usize> {
        let ring = Ring::map(vcpu, self.entries)?;
        let mut state = self.lock();
        state.rings.push(ring);
        state.taken.push(0);
        Ok(state.rings.len() - 1)
    }

    /// Marks what is in all rings as dirty in the RAM's own bitmaps, and has KVM watch those pages
    /// again. The guest may be running. At most a ring's worth of each ring, so that it ends.
    ///
    /// # Errors
    /// The kernel's refusal to reset. What was harvested is marked, but writes to it may go
    /// unnoticed from now on.
    pub(super) fn harvest(&self, vm: &Vm) -> Result<(), IoctlError> {
        let mut state = self.lock();
        for ring in 0..state.rings.len() {
            state.take(vm, ring)?;
        }
        state.settle(vm)
    }

    /// Makes room in the ring of one vCPU, which is outside of KVM_RUN.
    ///
    /// # Errors
    /// As [`harvest`](Self::harvest).
    pub(super) fn make_room(&self, vm: &Vm, ring: usize) -> Result<(), IoctlError> {
        self.full.fetch_add(1, Ordering::Relaxed);
        let mut state = self.lock();
        state.take(vm, ring)?;
        state.settle(vm)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each step leaves the state whole: a harvested page is staged, and a staged one gets
        // marked.
        lock(&self.state)
    }
}

impl State {
    /// Stages what is in a ring.
    fn take(&mut self, vm: &Vm, ring: usize) -> Result<(), IoctlError> {
        let entries = self.rings.get(ring).map_or(0, |ring| ring.entries);
        for _ in 0..entries {
            if self.staged.len() == STAGED {
                self.settle(vm)?;
            }
            let Some(page) = self.rings.get_mut(ring).and_then(Ring::take) else {
                break;
            };
            self.staged.push(page);
            self.unreset += 1;
            if let Some(taken) = self.taken.get_mut(ring) {
                *taken += 1;
            }
        }
        Ok(())
    }

    /// Resets what was harvested, and marks it. See the module for the order.
    fn settle(&mut self, vm: &Vm) -> Result<(), IoctlError> {
        let result = self.reset(vm);
        let regions = vm.ram().regions();
        let mut pages = self.staged.drain(..).peekable();
        while let Some((slot, first)) = pages.next() {
            let mut end = first.saturating_add(1);
            while pages.next_if_eq(&(slot, end)).is_some() {
                end += 1;
            }
            // Slots are numbered as the regions are, in the one address space that has any.
            match usize::try_from(slot) {
                Ok(index) if regions.get(index).is_some_and(|r| end <= r.pages) => {
                    vm.ram().dirty_bitmap(index).set_pages(first, end - first);
                }
                // No page of ours: whatever was meant, nothing is lost this way.
                _ => vm.ram().mark_all_dirty(),
            }
        }
        result
    }

    fn reset(&mut self, vm: &Vm) -> Result<(), IoctlError> {
        let mut idle = 0;
        while self.unreset > 0 {
            // SAFETY: takes no argument; KVM reads and writes only the rings, which are its own
            // memory.
            let done = unsafe { ioctl(&VmRef(vm), KVM_RESET_DIRTY_RINGS()) };
            if done < 0 {
                let error = IoctlError::last("KVM_RESET_DIRTY_RINGS");
                if error.source.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
            // Linux 6.16 and later stop in the middle when a signal is pending, such as a kick.
            let done = u64::try_from(done).unwrap_or(0);
            self.unreset = self.unreset.saturating_sub(done);
            idle = if done > 0 { 0 } else { idle + 1 };
            if idle > 1000 {
                return Err(IoctlError::errno("KVM_RESET_DIRTY_RINGS", libc::EINTR));
            }
        }
        Ok(())
    }
}

/// The ring of one vCPU, mapped.
#[derive(Debug)]
struct Ring {
    base: NonNull<kvm_dirty_gfn>,
    entries: u32,
    /// Of the entry that is dirtied next; only its remainder by `entries` counts.
    next: u32,
}

// SAFETY: the mapping is valid from any thread until it is dropped, and `take` needs `&mut self`.
unsafe impl Send for Ring {}

impl Ring {
    fn map(vcpu: RawFd, entries: u32) -> io::Result<Self> {
        // Where the rings lie in a vCPU's file is counted in pages.
        let offset = u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE_SIZE;
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: a fresh shared mapping at an address of the kernel's choice; it replaces nothing.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                Self::bytes(entries),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu,
                offset,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mapped at 0"))?;
        Ok(Self {
            base,
            entries,
            next: 0,
        })
    }

    fn bytes(entries: u32) -> usize {
        usize::try_from(entries).unwrap_or(0) * size_of::<kvm_dirty_gfn>()
    }

    /// The next page, as slot and page in it; its entry is harvested then.
    fn take(&mut self) -> Option<(u32, u64)> {
        let index = usize::try_from(self.next % self.entries).ok()?;
        // SAFETY: the index is below `entries`, which is what is mapped.
        let entry = unsafe { self.base.add(index) }.as_ptr();
        // SAFETY: `flags` lies inside the mapping, which lives as long as `self`, is aligned as a
        // u32, and is accessed by this process only here, as an atomic; the kernel disks to it as a
        // whole.
        let flags = unsafe { AtomicU32::from_ptr(&raw mut (*entry).flags) };
        // KVM writes the page first, and then this with release order.
        if flags.load(Ordering::Acquire) != DIRTY {
            return None;
        }
        // SAFETY: inside the mapping; KVM leaves an entry that is dirty alone until it is
        // harvested.
        let page = unsafe {
            (
                (&raw const (*entry).slot).read_volatile(),
                (&raw const (*entry).offset).read_volatile(),
            )
        };
        flags.store(HARVESTED, Ordering::Release);
        self.next = self.next.wrapping_add(1);
        Some(page)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: our own mapping, of this size, of which no pointer leaves `take`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), Self::bytes(self.entries)) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_are_powers_of_two_within_the_hosts_bounds() {
        assert_eq!(default_entries(65536, 1), 65536);
        assert_eq!(default_entries(65536, 16), 65536);
        assert_eq!(default_entries(65536, 17), 32768);
        assert_eq!(default_entries(65536, 254), 4096);
        assert_eq!(default_entries(4096, 2), 4096);
        assert_eq!(fit(1, 65536), MIN_ENTRIES);
        assert_eq!(fit(5000, 65536), 4096);
        assert_eq!(fit(u32::MAX, 65536), 65536);
    }
}
