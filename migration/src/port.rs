//! What the engines need from a virtual machine monitor: the traits to implement in order to
//! migrate a guest of your own.
//!
//! ```text
//! source:       SourceVm::collect_dirty → PageSet → Policy → batch → PageSource::transmit → Link
//! destination:  Link → PageSink::receive → memory;   STATE → DestinationVm::restore;   COMMIT → DestinationVm::run
//! ```
//!
//! The engines never hold a reference into guest memory, because a running guest writes to it:
//! pages go from [`PageSource`] to [`Link`] and from [`Link`] to [`PageSink`] behind these traits.

mod blocks;

pub use blocks::{BLOCK_BYTES, BlockSink, BlockSource, blocks_in};

use crate::page::{Gfn, PAGE_SIZE, PageSet, RamLayout, Run};
use crate::wire::SessionId;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// Why something behind a port failed: the message goes to the user as it is.
pub type PortError = Box<dyn std::error::Error + Send + Sync>;

/// A reliable, ordered stream of bytes in both directions.
pub trait Link: Send {
    /// Sends `head`, then `body`, in one write where possible.
    ///
    /// # Errors
    /// When the connection is gone, the peer takes nothing for too long (`TimedOut`), or the
    /// user interrupted a wait (`Interrupted`).
    fn send(&mut self, head: &[u8], body: &[u8]) -> io::Result<()>;

    /// Receives exactly `buf.len()` bytes.
    ///
    /// # Errors
    /// As [`Link::send`]; the end of the stream is `UnexpectedEof`.
    fn recv(&mut self, buf: &mut [u8]) -> io::Result<()>;

    /// Waits at most so long until bytes can be received (or the peer has hung up); says whether
    /// they can.
    ///
    /// # Errors
    /// When the connection is gone.
    fn wait_readable(&mut self, timeout: Duration) -> io::Result<bool>;

    /// Whether bytes can be received without waiting (also when the peer has hung up).
    ///
    /// # Errors
    /// As [`Link::wait_readable`].
    fn readable(&mut self) -> io::Result<bool> {
        self.wait_readable(Duration::ZERO)
    }

    /// Asks that no more than about `bytes` wait here unsent: what is sent on another channel must not queue behind
    /// them for long. Best effort.
    fn bound_queue(&mut self, bytes: u32) {
        let _ = bytes;
    }

    /// How long a send or receive may wait; `None` is for ever.
    fn set_timeout(&mut self, timeout: Option<Duration>);
}

/// Time, as the engines see it.
pub trait Clock: Sync {
    /// Monotonic time since some start.
    fn now(&self) -> Duration;
    /// Waits.
    fn sleep(&self, duration: Duration);
}

/// Guest memory that can be read while the guest runs.
pub trait PageSource<L: Link>: Sync {
    /// Sends `head` and then the pages of `runs`, straight from guest memory, without a copy.
    /// The runs are RAM (the engine took them from the layout).
    ///
    /// # Errors
    /// As [`Link::send`].
    fn transmit(&self, link: &mut L, head: &[u8], runs: &[Run]) -> io::Result<()>;

    /// Copies one page out.
    ///
    /// # Errors
    /// When the page is not RAM.
    fn copy_page(&self, gfn: Gfn, into: &mut [u8; PAGE_SIZE]) -> Result<(), PortError>;

    /// Whether the page holds only zeros. Must look at memory anew each time.
    fn is_zero(&self, gfn: Gfn) -> bool;

    /// The first part of the run that holds nothing (never written, or given back to the host), if that is known without
    /// reading it: reading would make the host populate it. Must be true at the time of the call. A page that comes to
    /// hold nothing must be in the dirty log afterwards, like one that is written.
    fn unpopulated(&self, run: Run) -> Option<Run> {
        let _ = run;
        None
    }
}

/// A guest at the source. All but the methods of [`PageSource`] are called from the engine's own
/// thread; those also from threads that answer page faults, while the guest stands still.
///
/// Dirty pages: [`collect_dirty`](SourceVm::collect_dirty) only *reads* the log; a page stays in it
/// until [`clear_dirty`](SourceVm::clear_dirty), which the engine calls right before it reads the
/// page for sending. So what was not sent is still dirty, whatever fails in between.
pub trait SourceVm<L: Link>: PageSource<L> {
    /// Where the guest has RAM.
    fn layout(&self) -> RamLayout;
    /// The machine's configuration, for [`DestinationVm::prepare`].
    ///
    /// # Errors
    /// When it cannot be described.
    fn description(&self) -> Result<Vec<u8>, PortError>;
    /// About how many bytes [`SourceVm::save`] will return: part of the downtime's estimate.
    fn state_bytes(&self) -> u64;
    /// Starts the dirty log with every page dirty (or: every page that must be sent).
    ///
    /// # Errors
    /// When the host cannot log.
    fn start_tracking(&self) -> Result<(), PortError>;
    /// Stops the dirty log, if it was started; the guest may run or not. Not called for a guest that has moved: it writes
    /// nothing here any more, and when all of it is there it is [released](Self::release), with its log.
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
    /// Stops all vCPUs and devices. Returns how long ago the last guest instruction was.
    ///
    /// # Errors
    /// When it cannot be stopped; it then runs on.
    fn pause(&self) -> Result<Duration, PortError>;
    /// The paused machine's state.
    ///
    /// # Errors
    /// When it cannot be read.
    fn save(&self) -> Result<Vec<u8>, PortError>;
    /// Lets the guest run again at the source, after a failure before the commit.
    fn resume(&self);
    /// Writes down that the guest belongs to the destination: from now on this side never runs
    /// it by itself. Called before the commit is sent.
    ///
    /// # Errors
    /// When it cannot be written down; nothing was sent then, and the guest stays.
    fn commit(&self, session: SessionId) -> Result<(), PortError>;
    /// The destination runs the guest, perhaps on this very host: what is left here, the dirty log included, may be
    /// discarded, and that should not take the guest's processor.
    fn release(&self);
    /// What the guest keeps outside its memory and can move with it, in the order in which it knows them: asked for where
    /// [`Options::copy_disk`](crate::options::Options::copy_disk) is set.
    fn disks(&self) -> Vec<Arc<dyn BlockSource>> {
        Vec::new()
    }

    /// Has the guest's memory itself go to the destination beside what is sent next on `link`, so that both sides map it
    /// and no page need be sent; `false` where the link cannot carry it. The guest runs on, here.
    ///
    /// After that, whatever happens, one side at most may run the guest in this memory, and a side whose state is older
    /// than the memory must not: that is for the implementation to see to, in [`resume`](Self::resume),
    /// [`commit`](Self::commit) and [`DestinationVm::run`].
    ///
    /// # Errors
    /// Why it cannot be, although the link can carry it.
    fn share_memory(&self, link: &mut L) -> Result<bool, PortError> {
        let _ = link;
        Ok(false)
    }
    /// Whether the guest's devices use open files that can go with [shared memory](Self::share_memory).
    fn has_files(&self) -> bool {
        false
    }
    /// Has those files go to the destination beside what is sent next on `link`. Both sides have them then: only the one
    /// whose guest runs may use them.
    ///
    /// # Errors
    /// Why they cannot go.
    fn share_files(&self, link: &mut L) -> Result<(), PortError> {
        let _ = link;
        Err("this guest's devices use no files".into())
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

/// Somebody has begun to wait for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageFault {
    /// The page.
    pub gfn: Gfn,
    /// Who waits: any number that tells threads apart. One that looks again is told of again.
    pub waiter: u32,
}

fn no_post_copy<T>() -> Result<T, PortError> {
    Err("this destination has no post-copy".into())
}

/// Guest memory at the destination. Data channels fill it in parallel: pages of one round are disjoint.
///
/// The last three methods are post-copy's, after [`DestinationVm::begin_post_copy`]: whoever touches a page
/// that is not in place waits for it.
pub trait PageSink<L: Link>: Send + Sync {
    /// Receives the pages of `runs` from the link straight into guest memory. The engine has
    /// checked that the runs are RAM.
    ///
    /// # Errors
    /// As [`Link::recv`].
    fn receive(&self, link: &mut L, runs: &[Run]) -> io::Result<()>;
    /// Writes pages that were decoded: `bytes` are those of the run, one page after the other. The engine has checked
    /// that the run is RAM.
    ///
    /// # Errors
    /// When memory cannot be written.
    fn write(&self, run: Run, bytes: &[u8]) -> Result<(), PortError>;
    /// Makes the pages zero.
    ///
    /// # Errors
    /// When memory cannot be written.
    fn zero(&self, run: Run) -> Result<(), PortError>;
    /// Copies one page out.
    ///
    /// # Errors
    /// When the page is not RAM.
    fn copy_page(&self, gfn: Gfn, into: &mut [u8; PAGE_SIZE]) -> Result<(), PortError>;
    /// Receives the pages of `runs` from the link into a buffer, to be placed as a whole later.
    ///
    /// # Errors
    /// As [`Link::recv`].
    fn fetch(&self, link: &mut L, runs: &[Run], into: &mut Vec<u8>) -> io::Result<()> {
        // Grows while bytes arrive: a count that was lied about costs what the liar really sends.
        const STEP: usize = 256 << 10;
        let bytes: u64 = runs.iter().map(Run::bytes).sum();
        let length = usize::try_from(bytes).map_err(io::Error::other)?;
        into.clear();
        while into.len() < length {
            let at = into.len();
            into.resize(length.min(at + STEP), 0);
            link.recv(&mut into[at..])?;
        }
        Ok(())
    }
    /// Puts pages in place, each as a whole: nobody sees a part of it. Those who wait go on.
    ///
    /// # Errors
    /// When there is no memory for them; none of them is lost then, and it can be tried again.
    fn place(&self, run: Run, bytes: &[u8]) -> Result<(), PortError> {
        let _ = (run, bytes);
        no_post_copy()
    }
    /// As [`place`](Self::place), with zeros; pages that are in place already stay as they are.
    ///
    /// # Errors
    /// As there.
    fn place_zero(&self, run: Run) -> Result<(), PortError> {
        let _ = run;
        no_post_copy()
    }
    /// The next page that somebody has begun to wait for; `None` after the time. Called from
    /// several threads.
    ///
    /// # Errors
    /// When faults cannot be heard of.
    fn next_fault(&self, timeout: Duration) -> Result<Option<PageFault>, PortError> {
        let _ = timeout;
        no_post_copy()
    }
}

/// The destination host.
pub trait DestinationVm<L: Link> {
    /// The guest's memory here.
    type Sink: PageSink<L> + 'static;

    /// Makes room for copies of the guest's disks, of so many bytes each, or refuses in one sentence. Called before
    /// [`DestinationVm::prepare`], if the disks are to move; what was made is to go with [`DestinationVm::discard`].
    ///
    /// # Errors
    /// Why this host cannot take them.
    fn take_disks(&mut self, bytes: &[u64]) -> Result<Vec<Arc<dyn BlockSink>>, PortError> {
        let _ = bytes;
        Err("this destination takes no copies of disks".into())
    }
    /// Builds the machine, paused, with empty memory, or refuses in one sentence: everything
    /// that can be checked before a page is sent is checked here (CPU features, memory).
    ///
    /// # Errors
    /// Why this host cannot take the guest.
    fn prepare(&mut self, layout: &RamLayout, machine: &[u8])
    -> Result<Arc<Self::Sink>, PortError>;

    /// Whether the files that the guest's devices use are wanted, which the source offers: they come beside what is received
    /// next on `link`, and [`adopt`](Self::adopt) follows.
    ///
    /// # Errors
    /// What came so far is not this guest's memory.
    fn wants_files(&mut self, link: &mut L) -> Result<bool, PortError> {
        let _ = link;
        Ok(false)
    }

    /// As [`prepare`](Self::prepare), over the memory itself, which came beside what was received last on `link`; `None`
    /// where none came. Until [`run`](Self::run) no byte of it may be changed: the guest runs in it, at the source.
    ///
    /// # Errors
    /// As there, and that what came is not this guest's memory.
    fn adopt(
        &mut self,
        link: &mut L,
        layout: &RamLayout,
        machine: &[u8],
    ) -> Result<Option<Arc<Self::Sink>>, PortError> {
        let _ = (link, layout, machine);
        Ok(None)
    }
    /// Whether this host can run a guest whose memory is not there yet; asked before anything is sent.
    ///
    /// # Errors
    /// Why not, and what to do.
    fn check_post_copy(&self) -> Result<(), PortError> {
        no_post_copy()
    }
    /// What memory holds of these pages is stale, and is dropped. Called for all pages that will follow the
    /// guest, for most of them before the guest's pause.
    ///
    /// # Errors
    /// Why that cannot be.
    fn drop_stale(&mut self, pages: &PageSet) -> Result<(), PortError> {
        let _ = pages;
        no_post_copy()
    }
    /// From now on these pages are missing, and whoever touches one waits. Called before [`DestinationVm::restore`].
    ///
    /// # Errors
    /// Why that cannot be.
    fn begin_post_copy(&mut self, missing: &PageSet) -> Result<(), PortError> {
        let _ = missing;
        no_post_copy()
    }
    /// All pages are in place.
    fn end_post_copy(&mut self) {}
    /// Puts the state into the machine and checks it.
    ///
    /// # Errors
    /// Why it does not fit.
    fn restore(&mut self, state: &[u8]) -> Result<(), PortError>;
    /// The source has committed: runs the guest. Returns how long ago its first instruction was.
    ///
    /// # Errors
    /// Why it does not run.
    fn run(&mut self) -> Result<Duration, PortError>;
    /// Throws the machine away; the source still owns the guest.
    fn discard(&mut self);
}
