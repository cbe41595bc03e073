use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use ferry_devices::balloon::{Balloon, FreePages, PAGE, Statistics};
use serde::Serialize;

use crate::memory::GuestRam;

/// What a balloon holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BalloonInfo {
    /// Bytes that the guest was asked for.
    pub target_bytes: u64,
    /// Bytes in the balloon, as the guest says.
    pub actual_bytes: u64,
    /// Bytes that were given back to the host so far, inflated or reported free, each time that they were.
    pub discarded_bytes: u64,
    /// What the guest last said about its memory.
    #[serde(skip)]
    pub statistics: Option<Statistics>,
}

impl BalloonInfo {
    pub(super) fn of(balloon: &Balloon, pages: &HostPages) -> Self {
        Self {
            target_bytes: u64::from(balloon.target()) * PAGE,
            actual_bytes: u64::from(balloon.actual()) * PAGE,
            discarded_bytes: pages.discarded.load(Ordering::Relaxed) * PAGE,
            statistics: balloon.statistics().cloned(),
        }
    }
}

/// Gives the guest's free pages back to the host.
///
/// A page that was given back is a hole in the memory file until the guest touches it again, and what is a hole the
/// migration knows without reading ([`GuestRam::unpopulated`]) and does not send. So the file itself is the set of pages
/// known to be free; a set beside it would have to be told of pages that the guest takes back without a word, which
/// the balloon allows.
#[derive(Debug)]
pub(super) struct HostPages {
    ram: Arc<GuestRam>,
    /// Read while pages are given back: who sets it knows that none are any more.
    kept: RwLock<bool>,
    discarded: AtomicU64,
    failed: AtomicBool,
}

impl HostPages {
    pub(super) fn new(ram: Arc<GuestRam>) -> Self {
        Self {
            ram,
            kept: RwLock::new(false),
            discarded: AtomicU64::new(0),
            failed: AtomicBool::new(false),
        }
    }

    pub(super) fn keep(&self, keep: bool) {
        *self.kept.write().unwrap_or_else(PoisonError::into_inner) = keep;
    }

    fn discard(&self, first: u64, count: u64) {
        let kept = self.kept.read().unwrap_or_else(PoisonError::into_inner);
        if *kept {
            return;
        }
        match self.ram.discard(first, count) {
            Ok(()) => {
                self.discarded.fetch_add(count, Ordering::Relaxed);
            }
            // Once: the pages stay with the guest, and that harms nobody.
            Err(error) if !self.failed.swap(true, Ordering::Relaxed) => {
                tracing::warn!(%error, "memory that the guest gave back stays in use");
            }
            Err(_) => {}
        }
    }
}

impl FreePages for HostPages {
    fn inflated(&self, first: u64, count: u64) {
        self.discard(first, count);
    }

    /// The guest's touch brings them back.
    fn deflated(&self, _first: u64, _count: u64) {}

    fn reported(&self, first: u64, count: u64) {
        self.discard(first, count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn pages_that_were_given_back_are_known_to_be_empty() {
        let ram = Arc::new(GuestRam::new(1 << 20, false).unwrap());
        let pages = HostPages::new(Arc::clone(&ram));
        ram.memory()
            .write_slice(&[7; 1 << 20], GuestAddress(0))
            .unwrap();
        assert_eq!(ram.unpopulated(0, 256), None);
        pages.inflated(16, 8);
        assert_eq!(ram.unpopulated(0, 256), Some((16, 8)));
        // While pages are to stay where they are, they do.
        pages.keep(true);
        pages.reported(100, 4);
        assert_eq!(ram.unpopulated(24, 232), None);
        pages.keep(false);
        pages.reported(100, 4);
        assert_eq!(ram.unpopulated(24, 232), Some((100, 4)));
        assert_eq!(pages.discarded.load(Ordering::Relaxed), 12);
        // The guest takes one back without a word, and another after it has told.
        ram.memory()
            .write_slice(&[1], GuestAddress(17 * 4096))
            .unwrap();
        pages.deflated(18, 1);
        assert_eq!(ram.unpopulated(0, 24), Some((16, 1)));
        // What the device vouches for is checked once more: nothing happens to what is not RAM.
        pages.inflated(1 << 30, 1);
    }
}
