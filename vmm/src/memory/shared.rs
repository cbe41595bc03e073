//! Guest memory that two processes map: handed to another VMM of this host, and who of the two may
//! run the guest.
//!
//! ```text
//!          share                       adopt
//!  source ───────▶ SharedRam ═ socket ═══════▶ destination     both map the same memfd
//!
//!  run:     take the file's lock ─▶ has the other side run since the memory was shared? ─▶ say so oneself ─▶ run
//!  commit:  give the file's lock up
//! ```
//!
//! Two copies of a guest that run are a nuisance; two machines that run in one memory destroy it.
//! So the kernel is asked to keep them apart, by two things that do not depend on what either side
//! believes of the other:
//!
//! - a **lock** on the memory file (flock(2)), held by the side that runs the guest. It belongs to
//!   an open file, so each side has one of its own, and it goes when its process dies.
//! - a **word** (an eventfd(2)) for each time that the memory was shared: the side that runs the
//!   guest first says so on it. The saved state of the other side is then older than the memory,
//!   and must not be run in it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};

use ferry_devices::sync::lock;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{
    FlockOperation, OFlags, SealFlags, fcntl_get_seals, fcntl_getfl, fcntl_setfl, flock, fstat,
    fstatfs,
};
use rustix::io::Errno;
use rustix::process::geteuid;

use super::{GuestRam, PageKind, Pages, RamError, RamLayout, backing};

/// What another process of this host needs in order to map a guest's memory.
#[derive(Debug)]
pub struct SharedRam {
    /// The memory file, opened for this purpose: the lock that its new owner takes is its own.
    pub memory: OwnedFd,
    /// The word that the guest has run since.
    pub word: OwnedFd,
    /// The memory file, opened more often: for a new owner that may not open it itself, to hand it
    /// on once for each.
    pub spares: Vec<OwnedFd>,
}

impl SharedRam {
    /// The most spares: as many times memory can be handed on before it is copied again. (The
    /// kernel passes at most 253 files at once, `SCM_MAX_FD`.)
    pub const SPARES: usize = 64;
}

/// Why memory cannot be shared, or what was given is not the guest's memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ShareError {
    /// The memory file cannot be opened once more.
    #[error(
        "the guest's memory file could not be opened for the destination: {0}; /proc must be mounted"
    )]
    Reopen(#[source] io::Error),
    /// No eventfd.
    #[error("no event could be made for handing the guest's memory over: {0}")]
    Word(#[source] io::Error),
    /// What was given cannot be asked what it is.
    #[error("what was given as the guest's memory cannot be examined: {0}")]
    Examine(#[source] io::Error),
    /// Not a memory file at all.
    #[error("what was given as the guest's memory is not a memory file (memfd)")]
    Kind,
    /// Of another size.
    #[error("the memory file that was given has {found} bytes, but the guest's memory has {bytes}")]
    Size {
        /// What the guest has.
        bytes: u64,
        /// What the file has.
        found: i64,
    },
    /// It could be cut under the guest.
    #[error(
        "the memory file that was given is neither sealed against shrinking nor a nameless file of this user: a process that has it could crash this one"
    )]
    Unsealed,
    /// It cannot be written, or not for long.
    #[error("the memory file that was given cannot be written to")]
    ReadOnly,
    /// Huge pages where the guest has none, or the other way round.
    #[error(
        "the memory file that was given is not made of the pages that the guest's description names"
    )]
    Pages,
    /// It cannot be mapped.
    #[error(transparent)]
    Ram(#[from] RamError),
}

/// Why a guest must not run in this memory now.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClaimError {
    /// The other side runs it, or may.
    #[error(
        "another process has the guest's memory and may run the guest: end that process first, or leave the guest to it"
    )]
    Held,
    /// The other side has run it.
    #[error(
        "another process has run the guest since its state was saved here, so that its memory has gone on without it: this side has nothing left to run; end it with `ferry stop`"
    )]
    Stale,
    /// The lock or the word does not work.
    #[error("the lock on the guest's memory could not be taken: {0}")]
    Io(#[from] io::Error),
}

/// Which process may run the guest in this memory; see the [module](self).
#[derive(Debug, Default)]
pub(super) struct Tenure {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    held: bool,
    /// Words that were unsaid at the last look.
    words: Vec<OwnedFd>,
    /// Open files of the memory with locks of their own, as they came.
    spares: Vec<OwnedFd>,
}

impl Tenure {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl GuestRam {
    /// Makes what another process needs in order to map this memory. The guest may run on. A
    /// process that got it before has lost its claim.
    ///
    /// # Errors
    /// [`ShareError`]; nothing has changed.
    pub fn share(&self) -> Result<SharedRam, ShareError> {
        let (memory, spares) = self.open_anew()?;
        let word = |e: Errno| ShareError::Word(e.into());
        let ours = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(word)?;
        let theirs = ours.try_clone().map_err(ShareError::Word)?;
        self.begin();
        self.tenure.lock().words.push(ours);
        Ok(SharedRam {
            memory,
            word: theirs,
            spares,
        })
    }

    /// The memory file, opened once more, and spares.
    ///
    /// Not a duplicate: a lock belongs to an open file, and the two sides must not have one in
    /// common.
    fn open_anew(&self) -> Result<(OwnedFd, Vec<OwnedFd>), ShareError> {
        let path = format!("/proc/self/fd/{}", self.file().as_raw_fd());
        let open = || OpenOptions::new().read(true).write(true).open(&path);
        let error = match open() {
            Ok(memory) => {
                // Landlock lets a memfd be opened anew, and a file of a foreign mount not.
                let sealed = fcntl_get_seals(&memory).is_ok_and(|s| s.contains(SealFlags::SHRINK));
                let wanted = if sealed { 0 } else { SharedRam::SPARES };
                let spares = std::iter::repeat_with(open)
                    .take(wanted)
                    .map_while(Result::ok);
                return Ok((memory.into(), spares.map(OwnedFd::from).collect()));
            }
            Err(error) => error,
        };
        let mut state = self.tenure.lock();
        while error.kind() == io::ErrorKind::PermissionDenied
            && let Some(memory) = state.spares.pop()
        {
            // While this side has the lock, another open file cannot take it; a duplicate of this
            // side's can.
            let held = state.held;
            if held && flock(&memory, FlockOperation::NonBlockingLockExclusive).is_err() {
                return Ok((memory, std::mem::take(&mut state.spares)));
            }
        }
        Err(ShareError::Reopen(error))
    }

    /// The memory of a guest of `bytes` bytes that another process has shared. Nothing of it is
    /// believed, and no byte of it is changed.
    ///
    /// # Errors
    /// [`ShareError`]: it is not what the guest needs, or cannot be mapped.
    pub fn adopt(bytes: u64, hugepages: bool, shared: SharedRam) -> Result<Self, ShareError> {
        let layout = RamLayout::new(bytes, hugepages)?;
        let sealed = check(&shared.memory, bytes, hugepages)?;
        // A word that cannot be said at once must not block.
        let flags = fcntl_getfl(&shared.word).map_err(|e| ShareError::Examine(e.into()))?;
        fcntl_setfl(&shared.word, flags | OFlags::NONBLOCK)
            .map_err(|e| ShareError::Examine(e.into()))?;
        let pages = Pages::new(match hugepages {
            true => PageKind::Hugetlb,
            false => backing::adopted_kind(sealed),
        });
        let mut ram = Self::map(layout, Arc::new(File::from(shared.memory)), pages)?;
        ram.adopted = true;
        let own = fstat(ram.file()).map_err(|e| ShareError::Examine(e.into()))?;
        let same = |spare: &OwnedFd| {
            fstat(spare).is_ok_and(|file| (file.st_dev, file.st_ino) == (own.st_dev, own.st_ino))
        };
        let mut state = ram.tenure.lock();
        state.words.push(shared.word);
        state.spares = shared.spares.into_iter().filter(same).collect();
        drop(state);
        Ok(ram)
    }

    /// Takes the right to run the guest in this memory: to be called before each start. Returns
    /// whether it is news. [`begin`](Self::begin) follows, or [`give_up`](Self::give_up).
    ///
    /// # Errors
    /// [`ClaimError`]; the guest must not run here.
    pub fn claim(&self) -> Result<bool, ClaimError> {
        let mut state = self.tenure.lock();
        let news = !state.held;
        if news {
            match flock(self.file(), FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => state.held = true,
                Err(Errno::WOULDBLOCK) => return Err(ClaimError::Held),
                Err(error) => return Err(io::Error::from(error).into()),
            }
        }
        for word in &state.words {
            if is_said(word)? {
                if news {
                    self.unlock(&mut state)?;
                }
                return Err(ClaimError::Stale);
            }
        }
        Ok(news)
    }

    /// Says to everybody who was given this memory that the guest has run here since: after
    /// [`claim`](Self::claim), at the last moment.
    pub fn begin(&self) {
        for word in self.tenure.lock().words.drain(..) {
            // An eventfd that was just found at zero takes a one. Of another thing, from a peer
            // that means no good, nothing is expected.
            if let Err(error) = rustix::io::write(&word, &1_u64.to_ne_bytes()) {
                tracing::warn!(%error, "the other side of a memory hand-over cannot be told that the guest runs here");
            }
        }
    }

    /// Drops the right to run the guest: a process that maps this memory may take it. No effect
    /// where it is not held.
    ///
    /// # Errors
    /// The kernel's refusal; it is then held still.
    pub fn give_up(&self) -> io::Result<()> {
        let mut state = self.tenure.lock();
        if state.held {
            self.unlock(&mut state)?;
        }
        Ok(())
    }

    fn unlock(&self, state: &mut State) -> io::Result<()> {
        flock(self.file(), FlockOperation::Unlock)?;
        state.held = false;
        Ok(())
    }
}

/// `TMPFS_MAGIC` and `HUGETLBFS_MAGIC` of linux/magic.h: the file systems that memory files lie in.
const TMPFS: u64 = 0x0102_1994;
const HUGETLBFS: u64 = 0x9584_58f6;

/// Whether what was given is memory for this guest, and stays so. Returns whether seals say the
/// latter.
///
/// Files of a tmpfs know no seals. A process that has such a file writable could truncate it; which
/// that is depends on its owner: a nameless file of this user (or of root) was given to this
/// process by one that could end it anyway.
fn check(memory: &OwnedFd, bytes: u64, hugepages: bool) -> Result<bool, ShareError> {
    let examine = |e: Errno| ShareError::Examine(e.into());
    // Only files in memory know seals.
    let seals = fcntl_get_seals(memory).map_err(|_| ShareError::Kind)?;
    let file = fstat(memory).map_err(examine)?;
    let found = file.st_size;
    if u64::try_from(found) != Ok(bytes) {
        return Err(ShareError::Size { bytes, found });
    }
    let sealed = seals.contains(SealFlags::SHRINK);
    let ours = file.st_uid == 0 || file.st_uid == geteuid().as_raw();
    let unsealable = seals == SealFlags::SEAL && file.st_nlink == 0 && !hugepages;
    if !(sealed || unsealable && ours) {
        return Err(ShareError::Unsealed);
    }
    let mode = fcntl_getfl(memory).map_err(examine)? & OFlags::ACCMODE;
    if mode != OFlags::RDWR || seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE) {
        return Err(ShareError::ReadOnly);
    }
    let system = fstatfs(memory).map_err(examine)?;
    let kind = (
        u64::try_from(system.f_type).unwrap_or(0),
        u64::try_from(system.f_bsize).unwrap_or(0),
    );
    let fits = match hugepages {
        true => kind == (HUGETLBFS, super::HUGE_PAGE_SIZE),
        false => kind.0 == TMPFS,
    };
    if fits {
        Ok(sealed)
    } else {
        Err(ShareError::Pages)
    }
}

/// Whether a word was said; does not wait, whatever it is.
fn is_said(word: &impl AsFd) -> io::Result<bool> {
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let mut fds = [PollFd::new(word, PollFlags::IN)];
    poll(&mut fds, Some(&now))?;
    Ok(fds[0].revents().contains(PollFlags::IN))
}

#[cfg(test)]
mod tests;
