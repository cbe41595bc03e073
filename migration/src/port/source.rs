//! What the source engine needs from a virtual machine monitor.

use super::{BlockSource, FreeMemory, Link, PortError, SessionId, Throttle};
use crate::page::{Gfn, PAGE_SIZE, PageSet, RamLayout, Run};
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// Guest memory that can be read while the guest runs.
pub trait PageSource<L: Link>: Sync {
    /// Sends `head` and then the pages of `runs`, straight from guest memory, without a copy.
    /// The runs are RAM (the engine took them from the layout).
    ///
    /// By default the pages are copied first; a VMM with mapped memory hands them to the kernel
    /// instead.
    ///
    /// # Errors
    /// As [`Link::send`].
    fn transmit(&self, link: &mut L, head: &[u8], runs: &[Run]) -> io::Result<()> {
        let mut body = Vec::new();
        let mut page = [0; PAGE_SIZE];
        for gfn in runs.iter().flat_map(|run| run.first..run.end()) {
            self.copy_page(gfn, &mut page).map_err(io::Error::other)?;
            body.extend_from_slice(&page);
        }
        link.send(head, &body)
    }

    /// Copies one page out.
    ///
    /// # Errors
    /// When the page is not RAM.
    fn copy_page(&self, gfn: Gfn, into: &mut [u8; PAGE_SIZE]) -> Result<(), PortError>;

    /// Whether the page holds only zeros. Must look at memory anew each time; by default at a copy.
    fn is_zero(&self, gfn: Gfn) -> bool {
        let mut page = [0; PAGE_SIZE];
        self.copy_page(gfn, &mut page).is_ok() && page.iter().all(|byte| *byte == 0)
    }

    /// The first part of the run that holds nothing (never written, or given back to the host), if
    /// that is known without reading it: reading would make the host populate it. Must be true at
    /// the time of the call. A page that comes to hold nothing must be in the dirty log afterwards,
    /// like one that is written.
    fn unpopulated(&self, run: Run) -> Option<Run> {
        let _ = run;
        None
    }
}

/// The parts of a run that hold nothing.
pub(crate) fn holes<L: Link, G: PageSource<L>>(guest: &G, run: Run) -> impl Iterator<Item = Run> {
    let mut at = run.first;
    std::iter::from_fn(move || {
        let rest = Run::new(at, run.end().checked_sub(at).filter(|count| *count > 0)?);
        let hole = guest.unpopulated(rest)?.overlap(rest)?;
        at = hole.end();
        Some(hole)
    })
}

/// A guest at the source. The engine calls these methods from its own thread; those of
/// [`PageSource`] also from threads that answer page faults, while the guest stands still.
///
/// Dirty pages: [`collect_dirty`](SourceVm::collect_dirty) only *reads* the log; a page stays in it
/// until [`clear_dirty`](SourceVm::clear_dirty), which the engine calls right before it reads the
/// page for sending. So what was not sent is still dirty, whatever fails in between.
///
/// What only some guests have is a trait of its own: [`SourceDisks`], [`ShareMemory`],
/// [`Throttle`].
pub trait SourceVm<L: Link>: PageSource<L> {
    /// Where the guest has RAM.
    fn layout(&self) -> RamLayout;
    /// The machine's configuration, for [`DestinationVm::prepare`](super::DestinationVm::prepare).
    ///
    /// # Errors
    /// When it cannot be described.
    fn description(&self) -> Result<Vec<u8>, PortError>;
    /// Whether the state can be written for a destination that reads versions up to `newest`, as
    /// [`PausedVm::save`] will be asked to. Asked in the handshake, while the guest runs.
    ///
    /// # Errors
    /// Why not.
    fn check_reader(&self, newest: Option<u32>) -> Result<(), PortError> {
        let _ = newest;
        Ok(())
    }
    /// About how many bytes [`PausedVm::save`] will return: part of the downtime's estimate.
    fn state_bytes(&self) -> u64;
    /// Starts the dirty log with every page dirty (or: every page that must be sent).
    ///
    /// # Errors
    /// When the host cannot log.
    fn start_tracking(&self) -> Result<(), PortError>;
    /// Stops the dirty log, if it was started; the guest may run or not. Not called for a guest
    /// that has moved: it writes nothing here any more, and its log goes with what is
    /// [released](CommittedVm::release).
    fn stop_tracking(&self);
    /// Adds all pages of the log to `into`, those that the VMM itself wrote included.
    ///
    /// # Errors
    /// When the log cannot be read.
    fn collect_dirty(&self, into: &mut PageSet) -> Result<(), PortError>;
    /// Takes the pages off the log. `scratch` is for the implementation, so that it need not
    /// allocate: it belongs to the calling sender and keeps its size.
    ///
    /// # Errors
    /// When the log cannot be written.
    fn clear_dirty(&self, runs: &[Run], scratch: &mut Vec<u64>) -> Result<(), PortError>;
    /// Stops all vCPUs and devices.
    ///
    /// # Errors
    /// When it cannot be stopped; it then runs on.
    fn pause(&self) -> Result<Paused<'_>, PortError>;
    /// The guest's disks; `None` where it has none.
    fn disks(&self) -> Option<&dyn SourceDisks> {
        None
    }
    /// The way to slow the guest down; `None` where there is none.
    fn throttle(&self) -> Option<&dyn Throttle> {
        None
    }
    /// The way to give the guest's memory itself to a process on this host; `None` where there is
    /// none.
    fn sharing(&self) -> Option<&dyn ShareMemory<L>> {
        None
    }
    /// The way to give memory back to this host while the guest runs at the destination; `None`
    /// where there is none.
    fn freeing(&self) -> Option<&dyn FreeMemory> {
        None
    }
    /// Channels for page faults that are worth having: about as many as the guest has vCPUs.
    fn fault_channels(&self) -> u16 {
        1
    }
    /// Processors of this host that data channels of pages may be sent with.
    fn processors(&self) -> u16 {
        1
    }
}

/// A guest that stands still and belongs to the source.
pub type Paused<'g> = Box<dyn PausedVm<'g> + 'g>;
/// A guest that stands still and was given to the destination.
pub type Committed<'g> = Box<dyn CommittedVm + 'g>;

/// The guard of a guest that stands still. **Dropping it lets the guest run again** (if it ran
/// before), whatever made the engine drop it: an error, a cancel, a panic.
pub trait PausedVm<'g> {
    /// How long ago the last guest instruction was; `None` where that is not known: the engine then
    /// counts from when it asked for the pause.
    fn stopped_for(&self) -> Option<Duration> {
        None
    }
    /// The machine's state, in a version that is not newer than
    /// [what the destination reads](super::DestinationVm::state_version); `None` from one that did
    /// not say, and for a snapshot.
    ///
    /// # Errors
    /// When it cannot be read.
    fn save(&self, newest: Option<u32>) -> Result<Vec<u8>, PortError>;
    /// Writes down that the guest belongs to the destination: from now on this side never runs it
    /// by itself. The engine calls it before it sends the commit. Disks were
    /// [flushed](SourceDisks::flush) before: here they are only unlocked.
    ///
    /// # Errors
    /// When it cannot be written down. Nothing was sent then; the implementation drops `self`, and
    /// the guest runs here.
    fn commit(self: Box<Self>, session: SessionId) -> Result<Committed<'g>, PortError>;
    /// Leaves the guest standing: for a snapshot after which it is not to run.
    fn keep(self: Box<Self>);
}

/// A guest that was given to the destination. Dropping it leaves the guest standing: an operator
/// decides.
pub trait CommittedVm {
    /// The destination runs the guest, perhaps on this very host, and has all of it: what is left
    /// here, the dirty log included, may be discarded, and that should not take the guest's
    /// processor.
    fn release(self: Box<Self>);
    /// The destination has not started the guest and never will: it runs here again.
    ///
    /// # Errors
    /// Why it cannot, and whether the guest is here.
    fn take_back(self: Box<Self>, word: NotStarted) -> Result<(), TakeBackError>;
}

/// Why a guest that the destination did not start does not run at the source.
#[derive(Debug, thiserror::Error)]
// Exhaustive: the engine decides by it who owns the guest, and must decide for every value.
pub enum TakeBackError {
    /// The guest is the source's, and stands still: it can be resumed once the reason is gone.
    #[error("{0}; the guest is here, and paused")]
    StandsStill(#[source] PortError),
    /// The guest is not whole here any more.
    #[error(transparent)]
    Lost(PortError),
}

/// The destination's word that it did not start the guest and never will. Only an engine that has
/// read it has one.
#[derive(Debug)]
pub struct NotStarted {
    why: String,
}

impl NotStarted {
    /// As the destination has sent it.
    pub(crate) const fn new(why: String) -> Self {
        Self { why }
    }

    /// The destination's reason.
    #[must_use]
    pub fn why(&self) -> &str {
        &self.why
    }
}

/// The disks of a guest at the source.
pub trait SourceDisks: Sync {
    /// Returns when all that the guest was told is on its disks outlasts a crash of this host, so
    /// that another host can read it. The engine calls it while the guest runs and once more in the
    /// pause, and counts what it takes. May be called from a thread of its own.
    ///
    /// # Errors
    /// When a disk could not be flushed, now or since it was opened: the migration ends and the
    /// guest stays.
    fn flush(&self) -> Result<(), PortError>;
    /// The disks in the order in which the guest knows them: asked for where
    /// [`Options::copy_disk`](crate::options::Options::copy_disk) is set.
    fn to_copy(&self) -> Vec<Arc<dyn BlockSource>>;
}

/// Giving the guest's memory itself to a process on the same host.
///
/// After [`share_memory`](Self::share_memory), whatever happens, one side at most may run the guest
/// in this memory, and a side whose state is older than the memory must not: that is for the
/// implementation to see to, where a [`PausedVm`] is dropped or committed, and in
/// [`DestinationVm::run`](super::DestinationVm::run).
pub trait ShareMemory<L: Link> {
    /// Has the memory go to the destination with what is sent next on `link` (fd passing), so that
    /// both sides map it and no page need be sent; `false` where the link cannot carry it. The
    /// guest runs on, here.
    ///
    /// # Errors
    /// Why it cannot be, although the link can carry it.
    fn share_memory(&self, link: &mut L) -> Result<bool, PortError>;
    /// Whether the guest's devices use open files that can go with the memory.
    fn has_files(&self) -> bool;
    /// Has those files go to the destination with what is sent next on `link`. Both sides have them
    /// then: only the one whose guest runs may use them.
    ///
    /// # Errors
    /// Why they cannot go.
    fn share_files(&self, link: &mut L) -> Result<(), PortError>;
}
