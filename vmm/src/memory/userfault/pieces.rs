//! Parts of the memory of which nothing has come: they are filled as whole 2 MiB pages although
//! their pages come one by one.
//!
//! ```text
//!  bytes ─▶ write to the memory file ─▶ UFFDIO_CONTINUE: mapped, who waits goes on
//!           (the first one takes a 2 MiB page)
//! ```
//!
//! A page that the file has and that is not mapped faults as well there (a *minor* fault), so that
//! the rest of the 2 MiB page is waited for as if it were absent. Copied into place by UFFDIO_COPY
//! each page would be one of its own: that takes twice as long, and the guest would run on 4 KiB
//! pages until they are put together.

use std::os::unix::fs::FileExt;
use std::sync::Mutex;

use ferry_devices::sync::lock;
use ferry_migration::page::Run;

use super::super::{GuestRam, HUGE_PAGE_SIZE, PAGE_SIZE};
use super::error::PlaceError;
use super::{Placed, Userfault, sys};

/// Pages of a piece.
pub(super) const PAGES: u64 = HUGE_PAGE_SIZE / PAGE_SIZE;
/// Every run of pieces splits the mapping, of whose parts a process has 65,530.
const MOST_RUNS: usize = 256;

/// Which pieces are filled like that, and what of them has come.
#[derive(Debug, Default)]
pub(super) struct Pieces(Vec<Option<Mutex<Came>>>);

/// A bit for each page.
pub(super) type Came = [u64; (PAGES / 64) as usize];

impl Pieces {
    /// The whole pieces of runs of which no page is there.
    pub(super) fn whole(ram: &GuestRam, empty: &[Run]) -> Vec<Run> {
        let mut runs = Vec::new();
        for run in empty {
            let start = run.first.next_multiple_of(PAGES);
            let end = run.end() / PAGES * PAGES;
            if start >= end || runs.len() >= MOST_RUNS {
                continue;
            }
            // A 2 MiB page of the file lies at a multiple of its size there, too.
            let offset = ram.layout.find(start, end - start).ok();
            let offset = offset.map(|(region, page)| ram.layout.regions()[region].offset_of(page));
            if offset.is_some_and(|offset| offset % HUGE_PAGE_SIZE == 0) {
                runs.push(Run::new(start, end - start));
            }
        }
        runs
    }

    /// These are filled as pieces.
    pub(super) fn add(&mut self, run: Run) {
        for piece in run.first / PAGES..run.end() / PAGES {
            let Ok(piece) = usize::try_from(piece) else {
                return;
            };
            if self.0.len() <= piece {
                self.0.resize_with(piece + 1, || None);
            }
            self.0[piece] = Some(Mutex::default());
        }
    }

    fn of(&self, gfn: u64) -> Option<&Mutex<Came>> {
        let piece = usize::try_from(gfn / PAGES).ok()?;
        self.0.get(piece)?.as_ref()
    }

    /// The first part of a run that lies in one piece, or in none; and what of the piece has come.
    pub(super) fn part(&self, first: u64, count: u64) -> (u64, Option<&Mutex<Came>>) {
        let rest = |gfn: u64| PAGES - gfn % PAGES;
        let piece = self.of(first);
        let mut part = rest(first).min(count);
        while piece.is_none() && part < count && self.of(first + part).is_none() {
            part = (part + PAGES).min(count);
        }
        (part, piece)
    }
}

impl Userfault {
    /// Fills pages of a piece: with bytes, or with zeros.
    pub(super) fn fill_piece(
        &self,
        came: &Mutex<Came>,
        Run { first, count }: Run,
        bytes: Option<&[u8]>,
    ) -> Result<Placed, PlaceError> {
        // Held meanwhile: a page that has come belongs to the guest, and is not written again.
        let mut came = lock(came);
        let mut result = Placed::default();
        let mut at = 0;
        while at < count {
            let is_there = |page: u64| {
                let page = (first + page) % PAGES;
                came[(page / 64) as usize] >> (page % 64) & 1 == 1
            };
            let there = is_there(at);
            let alike = (at..count).take_while(|page| is_there(*page) == there);
            let run = Run::new(first + at, alike.count() as u64);
            if there {
                // Who touches it may wait all the same: the kernel has unmapped it since.
                self.map_filled(run)?;
                result.present += run.count;
            } else {
                self.fill_absent(run, bytes.map(|bytes| part_of(bytes, at, run.count)))?;
                for page in (run.first..run.end()).map(|gfn| gfn % PAGES) {
                    came[(page / 64) as usize] |= 1 << (page % 64);
                }
                result.placed += run.count;
            }
            at += run.count;
        }
        Ok(result)
    }

    fn fill_absent(&self, run: Run, bytes: Option<&[u8]>) -> Result<(), PlaceError> {
        const ZERO: [u8; 4096] = [0; 4096];
        let mut next = run.first;
        if let Some(bytes) = bytes {
            self.write(run.first, bytes)?;
        }
        // A page of the file is zero until it is written to; where there is none, writing takes
        // one.
        while next < run.end() {
            next = self.map_filled(Run::new(next, run.end() - next))?;
            if next < run.end() {
                self.write(next, &ZERO)?;
            }
        }
        Ok(())
    }

    /// Into the memory file, past the mapping: who waits does not see it before it is whole.
    fn write(&self, gfn: u64, bytes: &[u8]) -> Result<(), PlaceError> {
        let (region, page) = self.ram.layout.find(gfn, bytes.len() as u64 / PAGE_SIZE)?;
        let offset = self.ram.layout.regions()[region].offset_of(page);
        let written = self.ram.file().write_all_at(bytes, offset);
        written.map_err(|error| PlaceError::kernel(gfn, error))
    }

    /// Maps pages that the file has, and wakes who waits for them; returns the first page that it
    /// does not have, or the end.
    fn map_filled(&self, Run { first, count }: Run) -> Result<u64, PlaceError> {
        let (start, len) = self.bytes_of(first, count)?;
        let (mut done, mut mapped_before) = (0, false);
        let mut result = Ok(());
        while done < len {
            match sys::map_filled(&self.fd, start + done, len - done) {
                Ok(bytes) => done += bytes,
                Err(error) => match error.raw_os_error() {
                    Some(libc::EEXIST) => {
                        mapped_before = true;
                        done += PAGE_SIZE;
                    }
                    Some(libc::EFAULT) => break,
                    // The memory's layout is being changed by another thread.
                    Some(libc::EAGAIN) => std::thread::yield_now(),
                    _ => {
                        let gfn = first + done / PAGE_SIZE;
                        result = Err(PlaceError::kernel(gfn, error));
                        break;
                    }
                },
            }
        }
        if mapped_before {
            let woken = sys::wake(&self.fd, start, done);
            result = result.and(woken.map_err(|error| PlaceError::kernel(first, error)));
        }
        result.map(|()| first + done / PAGE_SIZE)
    }
}

pub(super) fn part_of(bytes: &[u8], first: u64, count: u64) -> &[u8] {
    let at = |page: u64| usize::try_from(page * PAGE_SIZE).unwrap_or(usize::MAX);
    bytes.get(at(first)..at(first + count)).unwrap_or_default()
}
