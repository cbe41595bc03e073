//! Puts 2 MiB pages back together that post-copy has filled page by page.
//!
//! A thread of low priority goes over the memory once. It sleeps three times as long as it works,
//! since while a 2 MiB page is put together the guest waits that touches it.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use ferry_devices::thread;

use super::{GuestRam, HUGE_PAGE_SIZE, PAGE_SIZE};
use crate::priority::in_background;

/// Pages of a 2 MiB page.
const TOGETHER: u64 = HUGE_PAGE_SIZE / PAGE_SIZE;
/// `include/uapi/asm-generic/mman-common.h` of Linux 6.1; libc does not have it for musl.
const MADV_COLLAPSE: libc::c_int = 25;
/// How much longer it sleeps than it works.
const REST: u32 = 3;
/// The shortest sleep, so that the processor is left at all.
const SHORTEST: Duration = Duration::from_micros(200);

impl GuestRam {
    /// Starts to put the memory's 2 MiB pages together, if it is made of such. Ends by itself: at
    /// the end of the memory, with the memory, or when 2 MiB pages are
    /// [forbidden](Self::fills_huge) again.
    pub(super) fn collapse_in_background(self: &Arc<Self>) {
        if !self.fills_huge() {
            return;
        }
        let ram = Arc::downgrade(self);
        let work = move || {
            in_background();
            collapse_all(&ram);
            Ok(())
        };
        let failed = |why| tracing::error!("{why}");
        if let Err(error) = thread::spawn(thread::Kind::Migration, "ferry-collapse", work, failed) {
            tracing::warn!(%error, "the guest's memory stays in 4 KiB pages");
        }
    }

    /// Puts the 2 MiB page from `first_gfn` on together. `false` when nothing is there to be put
    /// together.
    ///
    /// # Errors
    /// The kernel's: `InvalidInput` where it cannot do so at all.
    pub fn collapse(&self, first_gfn: u64) -> io::Result<bool> {
        if self.populated(first_gfn, TOGETHER).is_none() {
            return Ok(false);
        }
        let base = self
            .host_address(first_gfn, TOGETHER)
            .map_err(io::Error::other)?;
        let size = usize::try_from(HUGE_PAGE_SIZE).map_err(io::Error::other)?;
        // SAFETY: `host_address` has checked that as much is mapped there; collapsing changes no
        // contents.
        match unsafe { libc::madvise(base.as_ptr().cast(), size, MADV_COLLAPSE) } {
            0 => Ok(true),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Returns when no 2 MiB page that lies under these pages is being put together any more. Linux
    /// before 6.3 (`mm/khugepaged.c`, `collapse_file`) puts the new page in place of the old ones
    /// before it has their contents. Until then the file seems to hold nothing there, and a read
    /// waits for the first of them.
    pub(super) fn await_collapse(&self, first_gfn: u64, count: u64) {
        let mut gfn = first_gfn - first_gfn % TOGETHER;
        while gfn < first_gfn + count {
            // Part of a 2 MiB page at the begin of a region is never put together.
            if let Ok((region, page)) = self.layout.find(gfn, 1) {
                let offset = self.layout.regions()[region].offset_of(page);
                // What is read does not matter.
                let _ = self.file.read_at(&mut [0], offset);
            }
            gfn += TOGETHER;
        }
    }
}

fn collapse_all(ram: &Weak<GuestRam>) {
    let Some(regions) = ram.upgrade().map(|ram| ram.regions().to_vec()) else {
        return;
    };
    for region in regions {
        for first in (region.first_gfn..).step_by(512) {
            if first + TOGETHER > region.end_gfn() {
                break;
            }
            let began = Instant::now();
            let Some(ram) = ram.upgrade().filter(|ram| ram.fills_huge()) else {
                return;
            };
            match ram.collapse(first) {
                // Before Linux 6.1.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => return,
                // No 2 MiB page to be had now, or a page that is in use elsewhere: the next may do.
                Ok(true) | Err(_) => {
                    drop(ram);
                    std::thread::sleep((began.elapsed() * REST).max(SHORTEST));
                }
                Ok(false) => {}
            }
        }
    }
}
