//! Holes of the memory file: pages for which it holds nothing, which are zeros that need not be
//! read, or are waited for. How they are made, and how they are found.

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::time::Duration;

use ferry_migration::page::Run;
use vm_memory::{Bytes, GuestAddress};

use super::{
    GuestRam, HUGE_PAGE_SIZE, PAGE_SIZE, PAGE_SIZE_USIZE, PageKind, RamError, RangeError, memfd,
};

impl GuestRam {
    /// Makes pages zero and gives their memory back to the host. They count as written by the VMM,
    /// since what a migration has already sent of them is out of date.
    ///
    /// # Errors
    /// [`RamError::Range`] when any of the pages is not RAM, [`RamError::Punch`] from the kernel.
    pub fn discard(&self, first_gfn: u64, count: u64) -> Result<(), RamError> {
        let unit = match self.pages.kind {
            PageKind::Hugetlb => HUGE_PAGE_SIZE,
            PageKind::Small | PageKind::Transparent => PAGE_SIZE,
        };
        self.make_zero(first_gfn, count, unit)
    }

    /// Makes pages zero, as [`discard`](Self::discard) does, and splits no 2 MiB page for it.
    ///
    /// # Errors
    /// As there.
    pub fn clear(&self, first_gfn: u64, count: u64) -> Result<(), RamError> {
        let unit = match self.pages.kind {
            PageKind::Transparent if self.fills_huge() => HUGE_PAGE_SIZE,
            PageKind::Hugetlb => HUGE_PAGE_SIZE,
            PageKind::Small | PageKind::Transparent => PAGE_SIZE,
        };
        self.make_zero(first_gfn, count, unit)
    }

    /// Punches out what is whole units of the file, and overwrites the rest.
    fn make_zero(&self, first_gfn: u64, count: u64, unit: u64) -> Result<(), RamError> {
        let (region, page) = self.layout.find(first_gfn, count)?;
        let start = self.layout.regions()[region].offset_of(page);
        let end = start + count * PAGE_SIZE;
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

    /// Makes pages absent: what they held is stale, and who touches them is to wait for what is to
    /// come (see [`Userfault`](super::Userfault)). They do not count as written.
    ///
    /// # Errors
    /// [`RamError::Range`] when any of the pages is not RAM, [`RamError::Punch`] from the kernel,
    /// and [`RamError::NotAbsent`] when a page stays there.
    pub fn drop_pages(&self, first_gfn: u64, count: u64) -> Result<(), RamError> {
        let (region, page) = self.layout.find(first_gfn, count)?;
        if count == 0 {
            return Ok(());
        }
        let start = self.layout.regions()[region].offset_of(page);
        // Of a 2 MiB page that it cannot split, since a system call uses it just now, the kernel
        // overwrites the part with zeros instead: the guest would then read zeros and never wait.
        // That would be silent, so it is asked for.
        const TRIES: u32 = 50;
        const PAUSE: Duration = Duration::from_millis(1);
        let mut there = None;
        for _ in 0..TRIES {
            self.punch(first_gfn, count, &(start..start + count * PAGE_SIZE))?;
            match self.next_data(first_gfn) {
                Some(next) if next >= first_gfn + count => return Ok(()),
                next => there = next,
            }
            std::thread::sleep(PAUSE);
        }
        Err(RamError::NotAbsent {
            gfn: there.unwrap_or(first_gfn),
        })
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

    /// The first part of the pages for which the memory file holds nothing: zeros without reading.
    /// Exact at the time of the call; of the host's pool a long part may come in pieces.
    #[must_use]
    pub fn unpopulated(&self, first_gfn: u64, count: u64) -> Option<Run> {
        let (mut at, end) = (first_gfn, first_gfn.checked_add(count)?);
        loop {
            let seems = self.seems_unpopulated(at, end - at)?;
            if self.hugepages() {
                return Some(seems);
            }
            self.await_collapse(seems.first, seems.count);
            if let Some(run) = self.seems_unpopulated(seems.first, seems.count) {
                return Some(run);
            }
            at = seems.end();
        }
    }

    /// As [`unpopulated`](Self::unpopulated), but for memory whose 2 MiB pages are being put
    /// together.
    ///
    /// Two questions, since neither answers alone: `SEEK_DATA` is quick where nothing is, and says
    /// how far that goes; `mincore` is quick for memory that is there, but takes a page that was
    /// swapped out for absent, and looks for each absent page by itself. Huge pages are never
    /// swapped out, and their files take all for data: there `mincore` answers, unless pages may
    /// have come by another mapping.
    fn seems_unpopulated(&self, first_gfn: u64, count: u64) -> Option<Run> {
        const CHUNK: usize = 512;
        if self.hugepages() && self.adopted {
            return None;
        }
        let mut at = first_gfn;
        let end = first_gfn.checked_add(count)?;
        let hole_at = |at| {
            let data = self.next_data(at)?.min(end);
            (data > at).then(|| Run::new(at, data - at))
        };
        if !self.hugepages()
            && let Some(hole) = hole_at(at)
        {
            return Some(hole);
        }
        let mut resident = [0_u8; CHUNK];
        while at < end {
            let pages = (end - at).min(CHUNK as u64);
            let resident = &mut resident[..usize::try_from(pages).unwrap_or(CHUNK)];
            let base = self.host_address(at, pages).ok()?;
            let len = resident.len() * PAGE_SIZE_USIZE;
            // SAFETY: the range is mapped (checked by `host_address`), and the kernel writes one
            // byte for each of its pages into `resident`, which is as long.
            if unsafe { libc::mincore(base.as_ptr().cast(), len, resident.as_mut_ptr()) } != 0 {
                return None;
            }
            let Some(skip) = resident.iter().position(|state| state & 1 == 0) else {
                at += pages;
                continue;
            };
            let absent = resident[skip..]
                .iter()
                .take_while(|state| **state & 1 == 0)
                .count() as u64;
            let first = at + skip as u64;
            if self.hugepages() {
                return Some(Run::new(first, absent));
            }
            if let Some(hole) = hole_at(first) {
                return Some(hole);
            }
            // Swapped out: it has contents.
            at = first + 1;
        }
        None
    }

    /// The first part of the pages, all of one region, that may have contents.
    #[must_use]
    pub fn populated(&self, mut first_gfn: u64, count: u64) -> Option<Run> {
        let end = first_gfn.checked_add(count)?;
        if !self.hugepages() {
            // Where the file cannot tell, all of it may.
            let first = self.next_data(first_gfn).unwrap_or(first_gfn);
            let after = self.seek(first, libc::SEEK_HOLE).unwrap_or(end).min(end);
            return (first < after).then(|| Run::new(first, after - first));
        }
        while first_gfn < end {
            let hole = self
                .unpopulated(first_gfn, end - first_gfn)
                .unwrap_or(Run::new(end, 0));
            if hole.first > first_gfn {
                return Some(Run::new(first_gfn, hole.first - first_gfn));
            }
            first_gfn = hole.end();
        }
        None
    }

    /// The first page at or after `gfn`, in its region, that has contents in the memory file.
    pub(super) fn next_data(&self, gfn: u64) -> Option<u64> {
        self.seek(gfn, libc::SEEK_DATA)
    }

    fn seek(&self, gfn: u64, whence: libc::c_int) -> Option<u64> {
        let (region, page) = self.layout.find(gfn, 1).ok()?;
        let region = &self.layout.regions()[region];
        let from = libc::off_t::try_from(region.offset_of(page)).ok()?;
        // SAFETY: lseek takes no pointers. The file's position, which it moves, is unused:
        // all access is by mapping and by offset.
        let at = unsafe { libc::lseek(self.file.as_raw_fd(), from, whence) };
        match u64::try_from(at) {
            Ok(at) => Some(
                region.first_gfn + (at / PAGE_SIZE).saturating_sub(region.file_offset / PAGE_SIZE),
            ),
            // ENXIO: nothing up to the end of the file.
            Err(_) if io::Error::last_os_error().raw_os_error() == Some(libc::ENXIO) => {
                Some(region.first_gfn + region.pages)
            }
            Err(_) => None,
        }
    }
}
