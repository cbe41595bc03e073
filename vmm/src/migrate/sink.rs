//! Memory that is being filled: the engine's [`PageSink`] over a machine's RAM.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ferry_migration::page::{AtomicPageSet, Gfn, PAGE_BYTES, PAGE_SIZE, PageSet, RamLayout, Run};
use ferry_migration::port::{PageFault, PageSink, PortError, PostCopySink};

use super::{StreamLink, copied, lock};
use crate::memory::{GuestRam, Userfault, UserfaultError, Waited};

/// Guest memory being filled.
pub struct RamSink {
    ram: Arc<GuestRam>,
    /// Pages that may hold something; what is placed comes in another way where nothing lies.
    filled: AtomicPageSet,
    faults: Mutex<Faults>,
}

/// How pages of a running guest come into place.
#[derive(Debug)]
enum Faults {
    /// No page of a running guest has been missing.
    NotBegun,
    Served(Arc<Userfault>),
    /// No page is missing any more.
    Over,
}

impl RamSink {
    pub(super) fn new(ram: Arc<GuestRam>, layout: &RamLayout) -> Self {
        let filled = AtomicPageSet::new(layout.end());
        for region in layout.runs() {
            if ram.is_adopted() {
                // To ask what of it holds something takes a system call for each hole, while its
                // guest runs, and no page comes.
                filled.insert_run(*region);
                continue;
            }
            let mut at = region.first;
            while let Some(run) = ram.populated(at, region.end() - at) {
                filled.insert_run(run);
                at = run.end();
            }
        }
        Self {
            ram,
            filled,
            faults: Mutex::new(Faults::NotBegun),
        }
    }

    /// Where to place pages of a running guest; `None` when none is missing: one that comes
    /// late, because the guest has ended while it was on its way, has no place any more.
    fn faults(&self) -> Result<Option<Arc<Userfault>>, PortError> {
        match &*lock(&self.faults) {
            Faults::NotBegun => Err("no page of this guest is missing".into()),
            Faults::Served(faults) => Ok(Some(Arc::clone(faults))),
            Faults::Over => Ok(None),
        }
    }

    /// Makes pages absent that are out of date.
    pub(super) fn drop_stale(&self, pages: &PageSet) -> Result<(), PortError> {
        if self.ram.hugepages() {
            return Err(UserfaultError::Hugepages.into());
        }
        // What comes after this must not fill the holes beside it.
        self.ram.forbid_transparent_hugepages();
        for run in pages.runs() {
            self.ram.drop_pages(run.first, run.count)?;
            self.filled.remove_run(run);
        }
        Ok(())
    }

    /// From now on who touches a missing page waits for it.
    pub(super) fn begin_faults(&self, missing: &PageSet) -> Result<(), PortError> {
        if self.ram.is_preallocated() {
            self.drop_stale(missing)?;
        }
        // All that is missing was dropped, or has never come.
        let empty: Vec<_> = missing.runs().collect();
        let faults = Userfault::register_empty(Arc::clone(&self.ram), &empty)?;
        *lock(&self.faults) = Faults::Served(Arc::new(faults));
        Ok(())
    }

    /// No page is waited for any more: all are in place, or the guest is at its end.
    pub(crate) fn end_faults(&self) {
        let before = std::mem::replace(&mut *lock(&self.faults), Faults::Over);
        // Who waits in there holds it too, and drops it when the wait ends.
        if let Faults::Served(faults) = before
            && let Err(error) = faults.interrupt()
        {
            tracing::warn!(%error, "the threads that serve page faults end later");
        }
    }

    fn read_direct(&self, link: &StreamLink, runs: &[Run]) -> io::Result<()> {
        let (fd, mut timeout) = link.parts();
        self.ram
            .read_pages(fd, runs, |progress| timeout.tick(progress))
            .map_err(|error| link.explain(error))
    }

    /// Whether nothing was written to any page of a run. What was, is remembered: to ask the memory
    /// file would mean waiting for another data channel that writes to it.
    fn is_fresh(&self, run: Run) -> bool {
        self.ram.takes_writes() && self.filled.first_run(run).is_none()
    }
}

impl PageSink<StreamLink> for RamSink {
    fn receive(&self, link: &mut StreamLink, runs: &[Run]) -> io::Result<()> {
        let mut rest = runs;
        // Memory that holds nothing yet has a shorter way; all else is read straight into place. As
        // many runs at once as lie together.
        while let Some(first) = rest.first() {
            let fresh = self.is_fresh(*first);
            let alike = rest.iter().take_while(|run| self.is_fresh(**run) == fresh);
            let (now, later) = rest.split_at(alike.count());
            for run in now {
                self.filled.insert_run(*run);
            }
            if link.is_coded_here() {
                for run in now {
                    copied::receive(&self.ram, link, *run, fresh)?;
                }
                rest = later;
                continue;
            }
            match link.splice_pipe() {
                Some((fd, mut timeout, pipe)) if fresh => {
                    self.ram
                        .splice_pages(fd, pipe, now, |progress| timeout.tick(progress))
                        .map_err(|error| link.explain(error))?;
                }
                _ => self.read_direct(link, now)?,
            }
            let pages: u64 = now.iter().map(|run| run.count).sum();
            link.received(pages * PAGE_BYTES);
            rest = later;
        }
        Ok(())
    }

    fn write(&self, run: Run, bytes: &[u8]) -> Result<(), PortError> {
        let fresh = self.filled.first_run(run).is_none();
        self.filled.insert_run(run);
        Ok(self.ram.write_decoded(run.first, bytes, fresh)?)
    }

    fn zero(&self, mut run: Run) -> Result<(), PortError> {
        // Where nothing was written nothing is to be done: new memory is zero.
        while let Some(filled) = self.filled.first_run(run) {
            self.ram.clear(filled.first, filled.count)?;
            self.filled.remove_run(filled);
            run = Run::new(filled.end(), run.end() - filled.end());
        }
        Ok(())
    }

    fn copy_page(&self, gfn: Gfn, into: &mut [u8; PAGE_SIZE]) -> Result<(), PortError> {
        // Comparing memory must not make the host find memory for empty pages; what a running guest
        // has made of others, the memory file knows.
        let holds = self.filled.contains(gfn) && !self.ram.is_adopted();
        if !holds && self.ram.unpopulated(gfn, 1).is_some() {
            into.fill(0);
            return Ok(());
        }
        Ok(self.ram.copy_page(gfn, into)?)
    }

    fn post_copy(&self) -> Option<&dyn PostCopySink> {
        Some(self)
    }
}

impl PostCopySink for RamSink {
    fn place(&self, run: Run, bytes: &[u8]) -> Result<(), PortError> {
        if let Some(faults) = self.faults()? {
            faults.place(run.first, run.count, bytes)?;
        }
        Ok(())
    }

    fn place_zero(&self, run: Run) -> Result<(), PortError> {
        if let Some(faults) = self.faults()? {
            faults.place_zero(run.first, run.count)?;
        }
        Ok(())
    }

    fn next_fault(&self, timeout: Duration) -> Result<Option<PageFault>, PortError> {
        // Ended while this thread was on its way here: it looks again before long.
        let Ok(Some(faults)) = self.faults() else {
            std::thread::sleep(timeout);
            return Ok(None);
        };
        match faults.wait(timeout)? {
            Waited::Fault(fault) => Ok(Some(PageFault {
                gfn: fault.gfn,
                waiter: fault.thread.unwrap_or(0),
            })),
            Waited::TimedOut | Waited::Interrupted => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests;
