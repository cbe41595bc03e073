use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use ferry_devices::balloon::auto::Settings;
use ferry_devices::balloon::{Balloon, FreePages, PAGE, Statistics};
use ferry_devices::sync::{read, write};

use crate::memory::GuestRam;

/// What a balloon holds.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct BalloonInfo {
    /// Bytes that the guest was asked for.
    pub target_bytes: u64,
    /// Bytes in the balloon, as the guest says.
    pub actual_bytes: u64,
    /// Whether the guest has a driver for it: without one nothing goes in or out.
    pub driver: bool,
    /// Bytes that were given back to the host so far, inflated or reported free, each time that
    /// they were.
    pub discarded_bytes: u64,
    /// Whether and how the size is moved automatically.
    pub auto: Option<Settings>,
    /// What the guest last said about its memory.
    pub statistics: Option<Statistics>,
    /// How long ago it said that; `None` when it said it before it came here.
    pub statistics_age: Option<Duration>,
}

impl BalloonInfo {
    pub(super) fn of(balloon: &Balloon, pages: &HostPages) -> Self {
        Self {
            target_bytes: u64::from(balloon.target()) * PAGE,
            actual_bytes: u64::from(balloon.actual()) * PAGE,
            driver: balloon.has_driver(),
            discarded_bytes: pages.discarded.load(Ordering::Relaxed) * PAGE,
            auto: balloon.auto(),
            statistics: balloon.statistics().cloned(),
            statistics_age: balloon.told().map(|told| told.at.elapsed()),
        }
    }
}

/// Gives the guest's free pages back to the host.
///
/// A page that was given back is a hole in the memory file until the guest touches it again, and
/// what is a hole the migration knows without reading ([`GuestRam::unpopulated`]) and does not
/// send. So the file itself is the set of pages known to be free; a set beside it would have to be
/// told of pages that the guest takes back without a word, which the balloon allows.
///
/// # Around a migration's pause
///
/// A page goes through these steps, in this order, and the device's worker does the first three
/// under the device's lock:
/// 1. its contents go: a hole is punched;
/// 2. it is marked as written by the VMM, so that what was sent of it before is out of date;
/// 3. the driver gets its request back, and only from here on may the guest use a page that it
///    *reported* (one that it *inflated* stays unused until it deflates);
/// 4. the guest uses the page: the touch brings a zero page, and the write is in the dirty log.
///
/// The sender clears a page's dirty bits first and looks at the page afterwards. Whatever it sees,
/// then, is either what the page still holds in the end or is followed by 2 or by 4, which make it
/// dirty again: contents that were read before 1 are overwritten by zeros, zeros that were read
/// before 4 by what the guest wrote. The order of 1 and 2 matters: were the mark first, a sender
/// could clear it, read the old contents, and never notice the hole.
///
/// The pause stops the vCPUs, then the device, then collects dirt for the last time: so a request
/// has either come through to 3, and its marks are collected, or it lies in the queue untouched and
/// moves there with the guest, which does not use these pages before the destination's device has
/// answered. Nothing is punched in between, for the worker rests.
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
        *write(&self.kept) = keep;
    }

    /// Whether pages stay where they are at present.
    pub(super) fn keeps(&self) -> bool {
        *read(&self.kept)
    }

    fn discard(&self, first: u64, count: u64) {
        let kept = read(&self.kept);
        if *kept {
            return;
        }
        match self.ram.discard(first, count) {
            Ok(()) => {
                self.discarded.fetch_add(count, Ordering::Relaxed);
            }
            // Once: the pages stay with the guest, which is harmless.
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
    use crate::memory::Backing;
    use ferry_migration::page::Run;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn pages_that_were_given_back_are_known_to_be_empty() {
        let ram = Arc::new(GuestRam::new(1 << 20, Backing::Small).unwrap());
        let pages = HostPages::new(Arc::clone(&ram));
        ram.memory()
            .write_slice(&[7; 1 << 20], GuestAddress(0))
            .unwrap();
        assert_eq!(ram.unpopulated(0, 256), None);
        pages.inflated(16, 8);
        assert_eq!(ram.unpopulated(0, 256), Some(Run::new(16, 8)));
        // While pages are to stay where they are, they do.
        pages.keep(true);
        pages.reported(100, 4);
        assert_eq!(ram.unpopulated(24, 232), None);
        pages.keep(false);
        pages.reported(100, 4);
        assert_eq!(ram.unpopulated(24, 232), Some(Run::new(100, 4)));
        assert_eq!(pages.discarded.load(Ordering::Relaxed), 12);
        // The guest takes one back without a word, and another after it has told.
        ram.memory()
            .write_slice(&[1], GuestAddress(17 * 4096))
            .unwrap();
        pages.deflated(18, 1);
        assert_eq!(ram.unpopulated(0, 24), Some(Run::new(16, 1)));
        // What the device vouches for is checked once more: nothing happens to what is not RAM.
        pages.inflated(1 << 30, 1);
    }
}
