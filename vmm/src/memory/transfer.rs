//! Moving pages between guest memory and sockets without a copy in between, and looking at pages
//! that a running guest may be writing to.
//!
//! Guest memory is never borrowed as a slice: the guest (and the kernel on its behalf) changes it
//! at any time. It is handed to the kernel by address, or read word by word.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use ferry_migration::page::Run;

use super::{GuestRam, PAGE_SIZE, PAGE_SIZE_USIZE, PageKind, RangeError};

/// Segments of one vectored system call; Linux takes 1,024 (`IOV_MAX`).
const SEGMENTS: usize = 640;

/// Segments in a fixed array, so that a transfer allocates nothing.
struct Segments {
    vec: [libc::iovec; SEGMENTS],
    len: usize,
    done: usize,
}

impl Segments {
    fn new() -> Self {
        let none = libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        };
        Self {
            vec: [none; SEGMENTS],
            len: 0,
            done: 0,
        }
    }

    fn push(&mut self, base: *mut u8, len: usize) -> bool {
        if self.len == SEGMENTS {
            return false;
        }
        self.vec[self.len] = libc::iovec {
            iov_base: base.cast(),
            iov_len: len,
        };
        self.len += 1;
        true
    }

    fn rest(&mut self) -> &mut [libc::iovec] {
        &mut self.vec[self.done..self.len]
    }

    /// Takes `n` transferred bytes off the front.
    fn advance(&mut self, mut n: usize) {
        while n > 0 && self.done < self.len {
            let segment = &mut self.vec[self.done];
            let step = n.min(segment.iov_len);
            // Stays within the segment: step ≤ iov_len.
            segment.iov_base = segment.iov_base.cast::<u8>().wrapping_add(step).cast();
            segment.iov_len -= step;
            n -= step;
            if segment.iov_len == 0 {
                self.done += 1;
            }
        }
    }
}

/// A pipe for [`GuestRam::splice_pages`]: empty between calls.
#[derive(Debug)]
pub struct SplicePipe {
    read: OwnedFd,
    write: OwnedFd,
}

impl SplicePipe {
    /// As large as an unprivileged user's pipe may be.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn new() -> io::Result<Self> {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        // A smaller pipe only means more calls.
        let _ = rustix::pipe::fcntl_setpipe_size(&write, 1 << 20);
        Ok(Self { read, write })
    }
}

/// A message of these segments alone.
fn message(segments: &mut [libc::iovec]) -> io::Result<libc::msghdr> {
    // SAFETY: an all-zero msghdr is a valid one without address, control data and segments.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = segments.as_mut_ptr();
    let count = segments.len();
    // The number's type is not the same in glibc and musl.
    #[allow(clippy::useless_conversion)]
    let count = count.try_into().map_err(io::Error::other)?;
    message.msg_iovlen = count;
    Ok(message)
}

fn bad_range(error: RangeError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, error)
}

impl GuestRam {
    fn segments_of(&self, segments: &mut Segments, runs: &[Run]) -> io::Result<()> {
        for run in runs {
            let base = self.host_address(run.first, run.count).map_err(bad_range)?;
            let len = usize::try_from(run.bytes()).unwrap_or(usize::MAX);
            if !segments.push(base.as_ptr(), len) {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "too many runs for one transfer",
                ));
            }
        }
        Ok(())
    }

    /// Writes `head` and then the pages of `runs` to a socket. When the socket takes nothing within
    /// its time slice, `stalled` decides whether to go on waiting.
    ///
    /// # Errors
    /// The socket's, `stalled`'s, or `InvalidInput` when a run is not RAM.
    pub fn write_pages(
        &self,
        socket: BorrowedFd<'_>,
        head: &[u8],
        runs: &[Run],
        mut stalled: impl FnMut(bool) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut segments = Segments::new();
        // Only read by the kernel.
        segments.push(head.as_ptr().cast_mut(), head.len());
        self.segments_of(&mut segments, runs)?;
        loop {
            let rest = segments.rest();
            if rest.is_empty() {
                return Ok(());
            }
            let message = message(rest)?;
            // SAFETY: each segment is `head`, which outlives the call, or a range of guest memory
            // that `host_address` has bounds-checked within a mapping that `self` keeps alive. The
            // kernel only reads it; that the guest may write meanwhile concerns the contents, not
            // the validity.
            let n = unsafe { libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL) };
            match usize::try_from(n) {
                Ok(n) => {
                    segments.advance(n);
                    stalled(true)?;
                }
                Err(_) => retry(&mut stalled)?,
            }
        }
    }

    /// Reads the pages of `runs` from a socket straight into guest memory.
    ///
    /// # Errors
    /// As [`write_pages`](Self::write_pages); the end of the stream is `UnexpectedEof`.
    pub fn read_pages(
        &self,
        socket: BorrowedFd<'_>,
        runs: &[Run],
        mut stalled: impl FnMut(bool) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut segments = Segments::new();
        self.segments_of(&mut segments, runs)?;
        loop {
            let rest = segments.rest();
            if rest.is_empty() {
                return Ok(());
            }
            let mut message = message(rest)?;
            // SAFETY: each segment is a range of guest memory that `host_address` has
            // bounds-checked within a mapping that `self` keeps alive; no reference into it
            // exists.
            let n = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_WAITALL) };
            match usize::try_from(n) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => {
                    segments.advance(n);
                    stalled(true)?;
                }
                Err(_) => retry(&mut stalled)?,
            }
        }
    }

    /// Reads runs of pages that hold nothing yet from a socket, through a pipe, into the memory
    /// file.
    ///
    /// `recvmsg` into fresh memory takes a fault for each page, in which the kernel zeroes what the
    /// very next copy overwrites. A write to the file needs neither, and `splice` copies from the
    /// socket's buffers to the file without passing through this process: about half the time
    /// (`ferry bench goals`).
    ///
    /// # Errors
    /// As [`read_pages`](Self::read_pages).
    pub fn splice_pages(
        &self,
        socket: BorrowedFd<'_>,
        pipe: &SplicePipe,
        runs: &[Run],
        mut stalled: impl FnMut(bool) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut left = 0;
        for run in runs {
            left += self.in_file(*run)?.1;
        }
        let mut runs = runs.iter();
        // Of the run in hand: where its next byte belongs in the file, and how many are to come.
        let (mut offset, mut of_run): (libc::loff_t, usize) = (0, 0);
        let none = std::ptr::null_mut();
        let (read_end, write_end) = (pipe.read.as_raw_fd(), pipe.write.as_raw_fd());
        let flags = libc::SPLICE_F_MOVE | libc::SPLICE_F_MORE;
        while left > 0 {
            // SAFETY: no memory of this process is involved; null offsets mean the descriptors'
            // own.
            let n = unsafe { libc::splice(socket.as_raw_fd(), none, write_end, none, left, flags) };
            let mut waiting = match usize::try_from(n) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => n,
                Err(_) => {
                    retry(&mut stalled)?;
                    continue;
                }
            };
            left -= waiting;
            while waiting > 0 {
                if of_run == 0 {
                    let Some(run) = runs.next() else {
                        break;
                    };
                    (offset, of_run) = self.in_file(*run)?;
                }
                // SAFETY: `offset` is a valid loff_t that the kernel reads and advances; it stays
                // within the run's part of the file, since no more than the rest of the run is
                // asked for.
                let n = unsafe {
                    libc::splice(
                        read_end,
                        none,
                        self.file.as_raw_fd(),
                        &mut offset,
                        waiting.min(of_run),
                        flags,
                    )
                };
                match usize::try_from(n) {
                    Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                    Ok(n) => {
                        waiting -= n;
                        of_run -= n;
                    }
                    Err(_) => retry(&mut |_| Ok(()))?,
                }
            }
            stalled(true)?;
        }
        Ok(())
    }

    /// Where pages lie in the memory file, and how many bytes they are.
    fn in_file(&self, run: Run) -> io::Result<(libc::loff_t, usize)> {
        let (region, page) = self.layout.find(run.first, run.count).map_err(bad_range)?;
        let start = self.layout.regions()[region].offset_of(page);
        let bytes = usize::try_from(run.bytes()).map_err(io::Error::other)?;
        Ok((
            libc::loff_t::try_from(start).map_err(io::Error::other)?,
            bytes,
        ))
    }

    /// Writes decoded pages to `first_gfn` and those after it; `bytes` are whole pages. The
    /// guest does not run yet, so that nothing is marked as dirty.
    ///
    /// `fresh` pages hold nothing yet: of 4 KiB, they are written to the memory file, so that they
    /// are neither faulted in one by one nor zeroed before they are overwritten (two thirds of the
    /// time). Others are overwritten where they are mapped: there one fault brings 2 MiB.
    ///
    /// # Errors
    /// `InvalidInput` when a page is not RAM or `bytes` are no whole pages; the file's own error.
    pub fn write_decoded(&self, first_gfn: u64, bytes: &[u8], fresh: bool) -> io::Result<()> {
        if !bytes.len().is_multiple_of(PAGE_SIZE_USIZE) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "decoded bytes are no whole pages",
            ));
        }
        let count = bytes.len() as u64 / PAGE_SIZE;
        let (region, page) = self.layout.find(first_gfn, count).map_err(bad_range)?;
        if fresh && self.takes_writes() {
            let start = self.layout.regions()[region].offset_of(page);
            return self.file.write_all_at(bytes, start);
        }
        let into = self.host_address(first_gfn, count).map_err(bad_range)?;
        // SAFETY: `host_address` has checked that as many pages as `bytes` has are mapped at
        // `into`, and no reference into guest memory exists; `bytes` lie elsewhere.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), into.as_ptr(), bytes.len()) };
        Ok(())
    }

    /// Whether pages that hold nothing yet are better written to the memory file than where they
    /// are mapped. A file of the pool cannot be written to at all. A write may fill 2 MiB where a
    /// host has such for every memfd, whatever the mapping was advised: so none is made while holes
    /// mean something.
    #[must_use]
    pub fn takes_writes(&self) -> bool {
        self.pages.kind == PageKind::Small && !self.keeps_holes.load(Ordering::Acquire)
    }

    /// Copies a page out.
    ///
    /// # Errors
    /// [`RangeError`] when it is not RAM.
    pub fn copy_page(&self, gfn: u64, into: &mut [u8; PAGE_SIZE_USIZE]) -> Result<(), RangeError> {
        let from = self.host_address(gfn, 1)?;
        // SAFETY: a whole page is mapped at `from`, and `into` is a page long and elsewhere. A
        // running guest may write meanwhile: then the copy is a mixture of old and new bytes, as it
        // would be on a wire.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), into.as_mut_ptr(), PAGE_SIZE_USIZE) };
        Ok(())
    }

    /// Lets the host find memory for the pages now, so that no page fault is left for later. Best
    /// effort.
    pub fn populate(&self, first_gfn: u64, count: u64) {
        let Ok(base) = self.host_address(first_gfn, count) else {
            return;
        };
        let len = usize::try_from(count * PAGE_SIZE).unwrap_or(usize::MAX);
        // SAFETY: the range is mapped (checked by `host_address`); populating changes no contents.
        let _ = unsafe { libc::madvise(base.as_ptr().cast(), len, libc::MADV_POPULATE_WRITE) };
    }
}

/// After a failed system call: goes on after signals and time slices, else returns the error.
fn retry(stalled: &mut impl FnMut(bool) -> io::Result<()>) -> io::Result<()> {
    let error = io::Error::last_os_error();
    match error.kind() {
        io::ErrorKind::Interrupted => Ok(()),
        io::ErrorKind::WouldBlock => stalled(false),
        _ => Err(error),
    }
}

#[cfg(test)]
mod tests;
