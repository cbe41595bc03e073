//! Which pages were dirtied: KVM's dirty log or rings, united with what the VMM itself wrote.
//!
//! Two operations matter, and they are apart on purpose:
//!
//! - [`DirtyLog::collect`] reads the log and clears nothing. It can be done at any time and as
//!   often as one likes, also to look at the dirty rate.
//! - [`DirtyLog::clear`] clears exactly the pages that are about to be read for sending, and is
//!   called right before they are read. A page dirtied after that is dirty again; one dirtied
//!   before, but after the last `collect`, is sent with its newest bytes and not a second time. So
//!   a bit stays set until the very moment its page is sent, and an error anywhere before that
//!   loses nothing.
//!
//! Where KVM has KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 this is what its log does itself, and
//! write-protecting pages costs the guest only while they are being sent. With
//! KVM_DIRTY_LOG_INITIALLY_SET even turning the log on protects nothing yet.
//!
//! Where KVM has only the plain log, KVM_GET_DIRTY_LOG clears what it reads (and protects those
//! pages again); what it returned is then kept in the bitmap of the VMM's own writes until it is
//! cleared there. The pages are then cleared earlier than need be, and so sent twice more often:
//! correct, and slower. So it is with [rings](super::dirty_ring), out of which a page must be taken
//! to be seen.
//!
//! | | turning it on protects | collecting costs | protected again |
//! |---|---|---|---|
//! | manual log, all set at first | nothing | a bit per page there is | just before the page is sent |
//! | manual log | all | a bit per page there is | just before the page is sent |
//! | plain log | all | a bit per page there is | when collected |
//! | rings | all | an entry per page dirtied | when collected |
//!
//! A page that is protected again when it is collected is likely to be dirty once more by the time
//! it is sent, and then it is sent twice; with the manual log the same writes come before its
//! sending and cost nothing. That is why `--dirty auto` takes to rings only where there is no
//! manual log; `cargo bench -p ferry-tests --bench dirty` measures both. What rings are better at
//! is a large memory of which little is dirtied: their cost does not grow with it.
//!
//! **Huge pages** behind the guest's memory have to be split before KVM can tell small ones apart.
//! It does so when a write faults, in the vCPU's time, unless its parameter `eager_page_split` is
//! on (Linux 5.18 and later have it on; `ferry doctor` looks): then it splits when pages are
//! protected, in the time of the thread that turns the log on, or, with all bits set at first, of
//! the sender that clears a range, a batch ahead of the guest. User space has no other say in it.
//!
//! From [`start`](DirtyLog::start) on, *every* page counts as dirty until it is first cleared, on
//! any KVM: the first round of a migration is nothing special.
//!
//! Threads: one may collect while others clear and the guest runs. Only `start`, `stop` and the
//! buffer of `collect` are behind a lock, so that two collectors wait for each other.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use ferry_devices::sync::lock;
use ferry_migration::options::Tracking;
use kvm_bindings::{
    KVM_DIRTY_LOG_INITIALLY_SET, KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1,
    kvm_dirty_log, kvm_dirty_log__bindgen_ty_1,
};
use serde::Serialize;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::{ioctl_iow_nr, ioctl_iowr_nr};

use super::error::IoctlError;
use super::vm::{Vm, VmError, VmRef};
use crate::memory::RangeError;

ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);

/// What the dirty log could not do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DirtyLogError {
    /// It is on.
    #[error(
        "dirty logging is on already: another migration or recording of this guest is under way"
    )]
    AlreadyOn,
    /// It is off.
    #[error("dirty logging is off: start it first")]
    Off,
    /// The kernel refused to turn it on or off.
    #[error("dirty logging could not be switched: {0}")]
    Switch(#[from] VmError),
    /// The kernel refused to read or clear it.
    #[error("the dirty log could not be read or cleared: {0}")]
    Ioctl(#[from] IoctlError),
    /// Pages that are not RAM.
    #[error(transparent)]
    Range(#[from] RangeError),
}

/// How KVM's log works on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum DirtyLogKind {
    /// Manual protection, all pages dirty at the start.
    ManualInitiallySet,
    /// Manual protection, no page dirty at the start.
    Manual,
    /// Reading clears.
    Plain,
    /// Rings of so many entries, one for each vCPU.
    Ring(u32),
}

impl DirtyLogKind {
    /// Whether pages are protected again when they are cleared, and not before.
    const fn is_manual(self) -> bool {
        matches!(self, Self::ManualInitiallySet | Self::Manual)
    }

    /// What `--dirty` calls it.
    #[must_use]
    pub const fn tracking(self) -> Tracking {
        match self {
            Self::ManualInitiallySet | Self::Manual | Self::Plain => Tracking::Log,
            Self::Ring(_) => Tracking::Ring,
        }
    }
}

/// The dirty log of a VM. At most one is on at a time.
#[derive(Debug)]
pub struct DirtyLog {
    vm: Arc<Vm>,
    kind: DirtyLogKind,
    on: AtomicBool,
    /// Room for the largest region's bitmap while the log is on. The lock also serialises
    /// switching.
    buffer: Mutex<Vec<u64>>,
}

impl DirtyLog {
    /// The log of `vm`, off.
    #[must_use]
    pub fn new(vm: Arc<Vm>) -> Self {
        let rings = vm.dirty_rings().map(|rings| rings.entries());
        let kind = match (rings, vm.manual_dirty_log_flags()) {
            (Some(entries), _) => DirtyLogKind::Ring(entries),
            (_, 0) => DirtyLogKind::Plain,
            (_, f) if f & KVM_DIRTY_LOG_INITIALLY_SET != 0 => DirtyLogKind::ManualInitiallySet,
            (..) => DirtyLogKind::Manual,
        };
        Self {
            vm,
            kind,
            on: AtomicBool::new(false),
            buffer: Mutex::new(Vec::new()),
        }
    }

    /// How KVM's log works on this host.
    #[must_use]
    pub fn kind(&self) -> DirtyLogKind {
        self.kind
    }

    /// Whether it is on.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::Acquire)
    }

    /// Turns the log on; the guest may be running. Every page is dirty from now on until cleared.
    ///
    /// # Errors
    /// [`DirtyLogError::AlreadyOn`] or the kernel's refusal; the log is then off.
    pub fn start(&self) -> Result<(), DirtyLogError> {
        let mut buffer = self.lock();
        if self.is_on() {
            return Err(DirtyLogError::AlreadyOn);
        }
        let ram = self.vm.ram();
        let words = ram.regions().iter().map(|r| r.words()).max().unwrap_or(0);
        buffer.resize(words, 0);
        // What an earlier migration left in the rings; whatever it was, all pages are dirty from
        // here on.
        self.harvest()?;
        if self.kind == DirtyLogKind::ManualInitiallySet {
            // KVM's bits say it for all pages.
            ram.clear_all_dirty();
        } else {
            ram.mark_all_dirty();
        }
        if let Err(error) = self.vm.log_dirty_pages(true) {
            // One of the slots may be logging already.
            let _ = self.vm.log_dirty_pages(false);
            return Err(error.into());
        }
        self.on.store(true, Ordering::Release);
        Ok(())
    }

    /// Turns the log off; the guest may be running. No effect when it is off.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn stop(&self) -> Result<(), DirtyLogError> {
        let mut buffer = self.lock();
        if !self.is_on() {
            return Ok(());
        }
        self.on.store(false, Ordering::Release);
        *buffer = Vec::new();
        self.vm.log_dirty_pages(false)?;
        // No vCPU shall come out for a ring that is unused from now on.
        self.harvest()?;
        Ok(())
    }

    /// Calls `f(first_gfn, words)` for each region of RAM with its dirty pages: bit `i` of word `j`
    /// is page `first_gfn + 64 j + i`. Clears nothing. Allocates nothing. Bits past a region's end
    /// are 0.
    ///
    /// # Errors
    /// [`DirtyLogError::Off`] or the kernel's refusal; what was dirty stays dirty.
    pub fn collect(&self, mut f: impl FnMut(u64, &[u64])) -> Result<(), DirtyLogError> {
        let mut buffer = self.lock();
        if !self.is_on() {
            return Err(DirtyLogError::Off);
        }
        let ram = self.vm.ram();
        self.harvest()?;
        for (index, region) in ram.regions().iter().enumerate() {
            let words = &mut buffer[..region.words()];
            if matches!(self.kind, DirtyLogKind::Ring(_)) {
                words.fill(0);
            } else {
                self.get(slot(index), words)?;
            }
            let own = ram.dirty_bitmap(index);
            if self.kind == DirtyLogKind::Plain {
                // KVM has forgotten these bits by now.
                own.or_from(0, words);
            }
            own.or_into(0, words);
            f(region.first_gfn, words);
        }
        Ok(())
    }

    /// Clears exactly the pages set in `words`, laid out from `first_gfn` as in
    /// [`collect`](Self::collect). To be called right before those pages are read for sending.
    /// `first_gfn` must be a multiple of 64 pages into its region. Allocates nothing.
    ///
    /// # Errors
    /// [`DirtyLogError::Range`], [`DirtyLogError::Off`], or the kernel's refusal. Pages may then be
    /// cleared in part: a caller that fails between `clear` and having sent must count them as
    /// dirty itself.
    pub fn clear(&self, first_gfn: u64, words: &[u64]) -> Result<(), DirtyLogError> {
        if !self.is_on() {
            return Err(DirtyLogError::Off);
        }
        let ram = self.vm.ram();
        let (index, word) = ram.layout().find_words(first_gfn, words.len())?;
        // Clean words at the ends need no clearing: KVM takes a lock and walks page tables for
        // them.
        let Some(start) = words.iter().position(|w| *w != 0) else {
            return Ok(());
        };
        let end = words
            .iter()
            .rposition(|w| *w != 0)
            .map_or(start, |last| last + 1);
        let words = &words[start..end];
        let word = word + start;
        ram.dirty_bitmap(index).and_not(word, words);
        if self.kind.is_manual() {
            let region = &ram.regions()[index];
            let first_page = u64::try_from(word).unwrap_or(u64::MAX).saturating_mul(64);
            self.clear_in_kvm(slot(index), first_page, region.pages, words)?;
        }
        Ok(())
    }

    /// Pages that each vCPU has dirtied, as far as they were collected; `None` without rings.
    #[must_use]
    pub fn dirtied_by_vcpu(&self) -> Option<Vec<u64>> {
        self.vm.dirty_rings().map(|rings| rings.taken())
    }

    /// Empties the rings into the RAM's own bitmaps.
    fn harvest(&self) -> Result<(), IoctlError> {
        match self.vm.dirty_rings() {
            Some(rings) => rings.harvest(&self.vm),
            None => Ok(()),
        }
    }

    /// How often a vCPU had to stop to empty its own ring since the machine was built; 0 where
    /// there are none.
    #[must_use]
    pub fn full_rings(&self) -> u64 {
        self.vm.dirty_rings().map_or(0, |rings| rings.full_exits())
    }

    fn get(&self, slot: u32, words: &mut [u64]) -> Result<(), IoctlError> {
        let request = kvm_dirty_log {
            slot,
            padding1: 0,
            __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 {
                dirty_bitmap: words.as_mut_ptr().cast(),
            },
        };
        // SAFETY: KVM writes one bit for each page of the slot, rounded up to 64-bit words; the
        // slot is the region that `words` was cut for, and slots never change their size.
        let r = unsafe { ioctl_with_ref(&VmRef(&self.vm), KVM_GET_DIRTY_LOG(), &request) };
        if r < 0 {
            Err(IoctlError::last("KVM_GET_DIRTY_LOG"))
        } else {
            Ok(())
        }
    }

    fn clear_in_kvm(
        &self,
        slot: u32,
        first_page: u64,
        slot_pages: u64,
        words: &[u64],
    ) -> Result<(), IoctlError> {
        let mut done = 0;
        // KVM counts the pages of a request in 32 bits; 2^24 words are 2^30 pages.
        for chunk in words.chunks(1 << 24) {
            let first = first_page + done;
            let pages = u64::try_from(chunk.len()).unwrap_or(0) * 64;
            // The last word may reach past the slot; KVM wants exactly the slot's end then.
            let pages = pages.min(slot_pages.saturating_sub(first));
            done += pages;
            let request = kvm_clear_dirty_log {
                slot,
                num_pages: u32::try_from(pages).unwrap_or(u32::MAX),
                first_page: first,
                __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                    // KVM only reads it.
                    dirty_bitmap: chunk.as_ptr().cast_mut().cast(),
                },
            };
            // SAFETY: KVM reads `pages` bits rounded up to bytes, which lie within `chunk`.
            let r = unsafe { ioctl_with_ref(&VmRef(&self.vm), KVM_CLEAR_DIRTY_LOG(), &request) };
            if r < 0 {
                return Err(IoctlError::last("KVM_CLEAR_DIRTY_LOG"));
            }
        }
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<u64>> {
        lock(&self.buffer)
    }
}

/// Slots are numbered as the regions are.
fn slot(region: usize) -> u32 {
    u32::try_from(region).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
