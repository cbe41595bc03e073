//! What the destination engine needs from a virtual machine monitor.

use super::{BlockSink, Link, PortError};
use crate::page::{Gfn, PAGE_SIZE, PageSet, RamLayout, Run};
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// A thread of the guest, or of its host, has begun to wait for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageFault {
    /// The page.
    pub gfn: Gfn,
    /// What waits: any number that tells threads apart. One that looks again is told of again.
    pub waiter: u32,
}

/// Guest memory at the destination. Data channels fill it in parallel: pages of one round are
/// disjoint. What only post-copy needs is a trait of its own: [`PostCopySink`].
pub trait PageSink<L: Link>: Send + Sync {
    /// Receives the pages of `runs` from the link straight into guest memory. The engine has
    /// checked that the runs are RAM.
    ///
    /// By default a page is received and then written; a VMM with mapped memory receives into it.
    ///
    /// # Errors
    /// As [`Link::recv`].
    fn receive(&self, link: &mut L, runs: &[Run]) -> io::Result<()> {
        let mut page = [0; PAGE_SIZE];
        for gfn in runs.iter().flat_map(|run| run.first..run.end()) {
            link.recv(&mut page)?;
            self.write(Run::new(gfn, 1), &page)
                .map_err(io::Error::other)?;
        }
        Ok(())
    }
    /// Writes pages that were decoded: `bytes` are those of the run, one page after the other. The
    /// engine has checked that the run is RAM.
    ///
    /// # Errors
    /// When memory cannot be written.
    fn write(&self, run: Run, bytes: &[u8]) -> Result<(), PortError>;
    /// Makes the pages zero.
    ///
    /// # Errors
    /// When memory cannot be written.
    fn zero(&self, run: Run) -> Result<(), PortError> {
        (run.first..run.end()).try_for_each(|gfn| self.write(Run::new(gfn, 1), &[0; PAGE_SIZE]))
    }
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
        let bytes: u64 = runs.iter().map(Run::bytes).sum();
        let length = usize::try_from(bytes).map_err(io::Error::other)?;
        link.recv_into(length, into)
    }
    /// The same memory for a guest that runs before all of it is here; `None` where that cannot be.
    fn post_copy(&self) -> Option<&dyn PostCopySink> {
        None
    }
}

/// Guest memory of which pages are missing ([`PostCopyVm::begin`]): what touches one waits for it.
pub trait PostCopySink: Send + Sync {
    /// Puts pages in place, each as a whole: no part of one is ever seen. What waits for them goes
    /// on.
    ///
    /// # Errors
    /// When there is no memory for them; none of them is lost then, and it can be tried again.
    fn place(&self, run: Run, bytes: &[u8]) -> Result<(), PortError>;
    /// As [`place`](Self::place), with zeros; pages that are in place already stay as they are.
    ///
    /// # Errors
    /// As there.
    fn place_zero(&self, run: Run) -> Result<(), PortError>;
    /// The next page that is waited for since now; `None` after the time. Called from several
    /// threads.
    ///
    /// # Errors
    /// When faults cannot be received.
    fn next_fault(&self, timeout: Duration) -> Result<Option<PageFault>, PortError>;
}

fn no_post_copy() -> PortError {
    "this destination has no post-copy".into()
}

/// A sink's memory for post-copy.
///
/// # Errors
/// It has none.
pub(crate) fn post_copy<L: Link>(sink: &impl PageSink<L>) -> Result<&dyn PostCopySink, PortError> {
    sink.post_copy().ok_or_else(no_post_copy)
}

/// The destination host. What only some hosts can do is a trait of its own: [`DestinationDisks`],
/// [`AdoptMemory`], [`PostCopyVm`].
pub trait DestinationVm<L: Link> {
    /// The guest's memory here.
    type Sink: PageSink<L> + 'static;

    /// Builds the machine, paused, with empty memory, or refuses in one sentence: everything
    /// that can be checked before a page is sent is checked here (CPU features, memory).
    ///
    /// # Errors
    /// Why this host cannot take the guest.
    fn prepare(&mut self, layout: &RamLayout, machine: &[u8])
    -> Result<Arc<Self::Sink>, PortError>;
    /// The newest version of the machine's state that [`restore`](Self::restore) reads, for
    /// [`PausedVm::save`](super::PausedVm::save); `None` where there is only one.
    fn state_version(&self) -> Option<u32> {
        None
    }
    /// Puts the state into the machine and checks it.
    ///
    /// # Errors
    /// Why it does not fit.
    fn restore(&mut self, state: &[u8]) -> Result<(), PortError>;
    /// Asked when the source has committed, before [`run`](Self::run): whether the guest may run
    /// here. After an error it never does: the engine tells the source so and
    /// [discards](Self::discard) the machine.
    ///
    /// # Errors
    /// Why not: this VMM was told to stop, for example.
    fn claim(&mut self) -> Result<(), PortError> {
        Ok(())
    }
    /// The source has committed: runs the guest. Returns how long ago its first instruction was;
    /// `None` where that is not known: the engine then counts from this call.
    ///
    /// # Errors
    /// Why it does not run.
    fn run(&mut self) -> Result<Option<Duration>, PortError>;
    /// Throws the machine away; the source still owns the guest.
    fn discard(&mut self);
    /// For disks that move with the guest; `None` where this host takes no copies.
    fn disks(&mut self) -> Option<&mut dyn DestinationDisks> {
        None
    }
    /// For memory that is handed over on one host; `None` where it is always copied.
    fn sharing(&mut self) -> Option<&mut dyn AdoptMemory<L, Self::Sink>> {
        None
    }
    /// For a guest that runs before its memory is here; `None` where that cannot be. A host that
    /// has this has [`PageSink::post_copy`] as well.
    fn post_copy(&mut self) -> Option<&mut dyn PostCopyVm> {
        None
    }
}

/// Takes copies of the guest's disks.
pub trait DestinationDisks {
    /// Makes room for copies of so many bytes each, or refuses in one sentence. Called before
    /// [`DestinationVm::prepare`]; what was made is to go with [`DestinationVm::discard`].
    ///
    /// # Errors
    /// Why this host cannot take them.
    fn take_disks(&mut self, bytes: &[u64]) -> Result<Vec<Arc<dyn BlockSink>>, PortError>;
}

/// Takes the source's memory itself, on one host.
pub trait AdoptMemory<L: Link, S> {
    /// Whether the files that the guest's devices use are wanted, which the source offers: they
    /// come beside what is received next on `link`, and [`adopt`](Self::adopt) follows.
    ///
    /// # Errors
    /// What came so far is not this guest's memory.
    fn wants_files(&mut self, link: &mut L) -> Result<bool, PortError>;
    /// As [`prepare`](DestinationVm::prepare), over the memory itself, which came beside what was
    /// received last on `link`; `None` where none came. Until [`run`](DestinationVm::run) no byte
    /// of it may be changed: the guest runs in it, at the source.
    ///
    /// # Errors
    /// As there, and that what came is not this guest's memory.
    fn adopt(
        &mut self,
        link: &mut L,
        layout: &RamLayout,
        machine: &[u8],
    ) -> Result<Option<Arc<S>>, PortError>;
}

/// Runs a guest whose memory is not there yet.
pub trait PostCopyVm {
    /// Whether that can be here; asked before anything is sent.
    ///
    /// # Errors
    /// Why not, and what to do.
    fn check(&self) -> Result<(), PortError>;
    /// What memory holds of these pages is stale, and is dropped. Called for all pages that will
    /// follow the guest, for most of them before the guest's pause.
    ///
    /// # Errors
    /// Why that cannot be.
    fn drop_stale(&mut self, pages: &PageSet) -> Result<(), PortError>;
    /// From now on these pages are missing, and what touches one waits. Called before
    /// [`DestinationVm::restore`].
    ///
    /// # Errors
    /// Why that cannot be.
    fn begin(&mut self, missing: &PageSet) -> Result<(), PortError>;
    /// All pages are in place.
    fn end(&mut self);
}

/// A host's post-copy.
///
/// # Errors
/// It has none.
pub(crate) fn post_copy_vm<L: Link, H: DestinationVm<L>>(
    host: &mut H,
) -> Result<&mut dyn PostCopyVm, PortError> {
    host.post_copy().ok_or_else(no_post_copy)
}
