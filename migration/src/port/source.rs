//! What the source engine needs from a virtual machine monitor.

use super::{BlockSource, Link, PortError};
use crate::page::{Gfn, PAGE_SIZE, PageSet, RamLayout, Run};
use crate::wire::SessionId;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// Guest memory that can be read while the guest runs.
pub trait PageSource<L: Link>: Sync {
    /// Sends `head` and then the pages of `runs`, straight from guest memory, without a copy.
    /// The runs are RAM (the engine took them from the layout).
    ///
    /// By default the pages are copied first; a VMM with mapped memory hands them to the kernel instead.
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
    /// The machine's configuration, for [`DestinationVm::prepare`](super::DestinationVm::prepare).
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
    /// [`commit`](Self::commit) and [`DestinationVm::run`](super::DestinationVm::run).
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
