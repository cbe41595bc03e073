//! Page faults of guest RAM that has not arrived yet: the destination of post-copy, over
//! userfaultfd(2).
//!
//! ```text
//!              touch                  wait()            the source           place()
//!  absent page ─────▶ thread sleeps ─────────▶ Fault ─────────────▶ bytes ───────────▶ page is there,
//!                     in the kernel                                                    thread goes on
//! ```
//!
//! What touches an absent page sleeps: a vCPU in ring 3, KVM on its behalf (also when it walks
//! the guest's page tables), a system call that reads or writes guest memory. So the threads that
//! serve faults must not touch guest memory before it is there, nor hold a lock that a sleeper's
//! progress depends on.
//!
//! "Absent" means that the memory file has no page there. A page that is in the file but not yet
//! mapped (it came through [`GuestRam::splice_pages`], say) does not fault, but for memory that
//! is filled with 2 MiB pages (`userfault/pieces.rs`): there it waits until it is mapped.
//!
//! What the kernel's interface leaves to its user, and how it is answered here:
//! - A page may be reported more than once: by several threads, or by one that looks again. The
//!   requester of pages has to remember what it requested.
//! - A vCPU whose own access waits leaves KVM_RUN when it is kicked (since Linux 6.2). One for
//!   which KVM emulates the access does not: with a signal pending the kernel starts that access
//!   anew, over and over, each time with a report, on a full processor, until the page comes. So a
//!   pause may have to wait for a page, and a machine can only be ended after its [`Userfault`] was
//!   dropped.
//! - A report can be read after the page has come. Placing wakes those who wait, so nothing is to
//!   be done; [`Userfault::wake`] is for a page that came another way.
//! - Filling stops at a page that is there (EEXIST) and, now and then, half way (EAGAIN): one loop
//!   goes on.

mod error;
mod pieces;
mod sys;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use ferry_migration::page::Run;

use super::{Backing, GuestRam, PAGE_SIZE, RangeError};
use pieces::Pieces;

pub use error::{PlaceError, UserfaultError};

/// How a userfaultfd can be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UserfaultBy {
    /// Through /dev/userfaultfd (Linux 6.1), whose file permissions decide.
    Device,
    /// Through the system call, which needs CAP_SYS_PTRACE or `vm.unprivileged_userfaultfd=1`.
    Syscall,
}

/// Asks, before anything is sent, whether this process can serve a guest's page faults, and how.
///
/// # Errors
/// [`UserfaultError`]: it may not, or the kernel lacks something.
pub fn check_userfault() -> Result<UserfaultBy, UserfaultError> {
    sys::open().map(|(_, by)| by)
}

/// A thread waits for an absent page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// The page's frame number.
    pub gfn: u64,
    /// The thread that waits, by its ID (gettid(2)). Usually the vCPU's; it may be a kernel thread
    /// that works for KVM (asynchronous page faults). `None` when it is not of this process' PID
    /// namespace.
    pub thread: Option<u32>,
    /// Whether it wants to write.
    pub write: bool,
}

/// How a wait ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waited {
    /// With a fault, which this caller alone was told of.
    Fault(Fault),
    /// Nothing happened in time.
    TimedOut,
    /// By [`Userfault::interrupt`].
    Interrupted,
}

/// What became of the pages of a run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Placed {
    /// Pages that were absent and have their contents now.
    pub placed: u64,
    /// Pages that were there already, and stayed as they were.
    pub present: u64,
}

/// The missing pages of a guest's RAM. All methods may be called from several threads at once,
/// while the guest runs.
///
/// Dropping it ends the reports: absent pages are zero again, and a thread that waited for one goes
/// on with zeros. So it may only be dropped when all pages have come, or when no vCPU will run
/// again.
#[derive(Debug)]
pub struct Userfault {
    fd: OwnedFd,
    /// An eventfd, readable for ever once it is written to.
    stop: OwnedFd,
    ram: Arc<GuestRam>,
    pieces: Pieces,
}

impl Userfault {
    /// From now on, what touches a page that is absent waits for it.
    ///
    /// Transparent huge pages are switched off for the RAM until this is dropped: they would fill 2
    /// MiB where one page came.
    ///
    /// # Errors
    /// [`UserfaultError`]; then nothing is changed.
    pub fn register(ram: Arc<GuestRam>) -> Result<Self, UserfaultError> {
        Self::register_empty(ram, &[])
    }

    /// As [`register`](Self::register); of `empty` no page is there, and all will come. Where
    /// memory is of 2 MiB pages and the kernel has minor faults, it is filled with such.
    ///
    /// # Errors
    /// As there.
    pub fn register_empty(ram: Arc<GuestRam>, empty: &[Run]) -> Result<Self, UserfaultError> {
        if ram.hugepages() {
            return Err(UserfaultError::Hugepages);
        }
        let whole = match ram.backing() {
            Backing::Transparent => Pieces::whole(&ram, empty),
            _ => Vec::new(),
        };
        let minor = if whole.is_empty() {
            None
        } else {
            sys::open_minor()
        };
        let (fd, whole) = match minor {
            Some(fd) => (fd, whole),
            None => (sys::open()?.0, Vec::new()),
        };
        let stop = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)
            .map_err(|e| UserfaultError::Open { source: e.into() })?;
        ram.forbid_transparent_hugepages();
        // An error on the way drops `this`, and with it what is registered so far.
        let mut this = Self {
            fd,
            stop,
            ram,
            pieces: Pieces::default(),
        };
        for region in this.ram.regions() {
            if !this.register_run(Run::new(region.first_gfn, region.pages), sys::MISSING)? {
                return Err(UserfaultError::Unsupported {
                    missing: "UFFDIO_ZEROPAGE for shared memory",
                });
            }
        }
        for run in whole {
            if this.register_run(run, sys::MISSING_OR_UNMAPPED)? {
                this.pieces.add(run);
            } else {
                // What the file has must not be waited for there.
                this.register_run(run, sys::MISSING)?;
            }
        }
        Ok(this)
    }

    /// Has pages reported; whether they can then be filled.
    fn register_run(&self, run: Run, which: sys::Which) -> Result<bool, UserfaultError> {
        let error = |source| UserfaultError::Register {
            first_gfn: run.first,
            pages: run.count,
            source,
        };
        let (start, len) = self
            .bytes_of(run.first, run.count)
            .map_err(|e| error(io::Error::other(e)))?;
        sys::register(&self.fd, start, len, which).map_err(error)
    }

    /// The memory.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Waits for the next fault. Each is told to one caller.
    ///
    /// # Errors
    /// The kernel's, none of which is expected.
    pub fn wait(&self, timeout: Duration) -> io::Result<Waited> {
        let deadline = Instant::now().checked_add(timeout);
        // Several threads wait for the same descriptor, and the wait is in the path of each fault:
        // no event manager, which has its own descriptor and one thread.
        loop {
            // More than the clock can tell is for ever.
            let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
            let time = left.and_then(|left| Timespec::try_from(left).ok());
            let mut fds = [
                PollFd::new(&self.stop, PollFlags::IN),
                PollFd::new(&self.fd, PollFlags::IN),
            ];
            match poll(&mut fds, time.as_ref()) {
                Ok(0) => return Ok(Waited::TimedOut),
                Ok(_) if !fds[0].revents().is_empty() => return Ok(Waited::Interrupted),
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            // Another thread may have been quicker.
            if let Some(message) = sys::read(&self.fd)? {
                let gfn = self.ram.gfn_at(message.address).ok_or_else(|| {
                    io::Error::other(format!(
                        "a page fault at {:#x} was reported, which is not guest memory",
                        message.address
                    ))
                })?;
                return Ok(Waited::Fault(Fault {
                    gfn,
                    thread: (message.thread != 0).then_some(message.thread),
                    write: message.write,
                }));
            }
        }
    }

    /// Ends the waits of all threads, those under way and those to come.
    ///
    /// # Errors
    /// The kernel's, none of which is expected.
    pub fn interrupt(&self) -> io::Result<()> {
        match rustix::io::write(&self.stop, &1_u64.to_ne_bytes()) {
            // EAGAIN: so often interrupted that the counter is full.
            Ok(_) | Err(rustix::io::Errno::AGAIN) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Gives pages of one region their contents, `count` × 4096 `bytes`, and wakes who waits for
    /// them. A page that is there already keeps what it has: it came before, and the guest may have
    /// written to it since.
    ///
    /// # Errors
    /// [`PlaceError`], which is also an [`io::Error`] by `?`. The pages before the one that it
    /// names are there.
    pub fn place(&self, first_gfn: u64, count: u64, bytes: &[u8]) -> Result<Placed, PlaceError> {
        let fits =
            u64::try_from(bytes.len()).is_ok_and(|n| Some(n) == count.checked_mul(PAGE_SIZE));
        if !fits {
            return Err(PlaceError::Length {
                first_gfn,
                count,
                bytes: bytes.len(),
            });
        }
        self.parts(first_gfn, count, |run, came| {
            let bytes = pieces::part_of(bytes, run.first - first_gfn, run.count);
            match came {
                Some(came) => self.fill_piece(came, run, Some(bytes)),
                None => self.fill(run, |address, done, _| {
                    let done = usize::try_from(done).unwrap_or(usize::MAX);
                    sys::copy(&self.fd, address, bytes.get(done..).unwrap_or_default())
                }),
            }
        })
    }

    /// Gives pages of one region zeros, as [`place`](Self::place) does bytes. Each takes a page of
    /// the host's memory; [`release`](Self::release) takes none.
    ///
    /// # Errors
    /// As [`place`](Self::place).
    pub fn place_zero(&self, first_gfn: u64, count: u64) -> Result<Placed, PlaceError> {
        self.parts(first_gfn, count, |run, came| match came {
            Some(came) => self.fill_piece(came, run, None),
            None => self.fill(run, |address, _, left| {
                sys::zeropage(&self.fd, address, left)
            }),
        })
    }

    /// Fills a run by `fill(run, what has come of its piece)`, part by part.
    fn parts(
        &self,
        first_gfn: u64,
        count: u64,
        fill: impl Fn(Run, Option<&Mutex<pieces::Came>>) -> Result<Placed, PlaceError>,
    ) -> Result<Placed, PlaceError> {
        self.bytes_of(first_gfn, count)?;
        let mut result = Placed::default();
        let mut done = 0;
        while done < count {
            let (part, came) = self.pieces.part(first_gfn + done, count - done);
            let placed = fill(Run::new(first_gfn + done, part), came)?;
            result.placed += placed.placed;
            result.present += placed.present;
            done += part;
        }
        Ok(result)
    }

    /// Fills a run by `step(address, bytes done, bytes left)` as often as it takes.
    fn fill(
        &self,
        Run { first, count }: Run,
        step: impl Fn(u64, u64, u64) -> io::Result<u64>,
    ) -> Result<Placed, PlaceError> {
        let (start, len) = self.bytes_of(first, count)?;
        let mut result = Placed::default();
        let mut done = 0;
        let mut error = None;
        while done < len && error.is_none() {
            match step(start + done, done, len - done) {
                Ok(bytes) => {
                    result.placed += bytes / PAGE_SIZE;
                    done += bytes;
                }
                Err(e) if e.raw_os_error() == Some(libc::EEXIST) => {
                    result.present += 1;
                    done += PAGE_SIZE;
                }
                // The memory's layout is being changed by another thread.
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => std::thread::yield_now(),
                Err(e) => error = Some(PlaceError::kernel(first + done / PAGE_SIZE, e)),
            }
        }
        if result.present > 0 {
            // If such a page came another way than by this descriptor, the threads that
            // wait were not woken.
            let woken = sys::wake(&self.fd, start, done);
            error = error.or(woken.err().map(|e| PlaceError::kernel(first, e)));
        }
        error.map_or(Ok(result), Err)
    }

    /// Wakes threads that wait for pages of one region: for pages that came another way than
    /// by [`place`](Self::place). Who finds the page absent still is reported again.
    ///
    /// # Errors
    /// `InvalidInput` when it is not RAM; the kernel's, none of which is expected.
    pub fn wake(&self, first_gfn: u64, count: u64) -> io::Result<()> {
        self.ranged(first_gfn, count, sys::wake)
    }

    /// Ends the reports for pages of one region: those that are absent are zero from now on, at no
    /// cost in memory until the guest writes to them. Who waits for one goes on. For long runs:
    /// each splits the mapping, of whose pieces a process has 65,530 (`vm.max_map_count`), and
    /// stops all other faults for a moment.
    ///
    /// # Errors
    /// `InvalidInput` when it is not RAM; the kernel's, `OutOfMemory` when there are too many
    /// pieces: [`place_zero`](Self::place_zero) then.
    pub fn release(&self, first_gfn: u64, count: u64) -> io::Result<()> {
        self.ranged(first_gfn, count, sys::unregister)
    }

    fn ranged(
        &self,
        first_gfn: u64,
        count: u64,
        call: impl Fn(&OwnedFd, u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let (start, len) = self
            .bytes_of(first_gfn, count)
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
        // The kernel takes a wake of nothing for a wake of everything, or refuses it.
        if len == 0 {
            return Ok(());
        }
        call(&self.fd, start, len)
    }

    /// Host address and length of a run, in bytes.
    fn bytes_of(&self, first_gfn: u64, count: u64) -> Result<(u64, u64), RangeError> {
        let start = self.ram.host_address(first_gfn, count)?;
        Ok((start.addr().get() as u64, count * PAGE_SIZE))
    }
}

impl Drop for Userfault {
    fn drop(&mut self) {
        // Closing the descriptor would do it, unless a child process that is just being started has
        // a copy.
        for region in self.ram.regions() {
            if let Ok((start, len)) = self.bytes_of(region.first_gfn, region.pages) {
                let _ = sys::unregister(&self.fd, start, len);
            }
        }
        self.ram.allow_transparent_hugepages();
        self.ram.collapse_in_background();
    }
}

#[cfg(test)]
mod tests;
