//! Both ends of a plain VMM in one trait: [`SourceVm`] and [`DestinationVm`] follow from it.

use super::{
    DestinationVm, Link, PageSink, PageSource, Pausable, Paused, PortError, SourceVm, pause,
};
use crate::page::{Gfn, PAGE_SIZE, PageSet, RamLayout, Run};
use std::sync::Arc;
use std::time::Duration;

/// A VM that reads and writes its memory page by page and keeps a dirty log: an `Arc` of it is a
/// [`SourceVm`] and a [`DestinationVm`].
///
/// Each page is copied once at either side. A VMM with mapped memory, post-copy, disks, or a
/// machine that is built when the source has described it implements the two traits themselves.
pub trait SimpleVm: Pausable + Send + 'static {
    /// See [`SourceVm::layout`].
    fn layout(&self) -> RamLayout;
    /// What must be the same at both sides, besides the layout: kernel, devices, CPU model.
    ///
    /// # Errors
    /// When it cannot be described.
    fn description(&self) -> Result<Vec<u8>, PortError>;
    /// About how many bytes [`Pausable::save`] returns; 64 KiB by default. Part of the downtime's
    /// estimate.
    fn state_bytes(&self) -> u64 {
        64 << 10
    }

    /// Copies a page out, while the guest runs.
    ///
    /// # Errors
    /// When the page is not RAM.
    fn read_page(&self, gfn: Gfn, into: &mut [u8; PAGE_SIZE]) -> Result<(), PortError>;
    /// Puts a page in place. The guest does not run.
    ///
    /// # Errors
    /// When the page is not RAM.
    fn write_page(&self, gfn: Gfn, page: &[u8; PAGE_SIZE]) -> Result<(), PortError>;

    /// See [`SourceVm::start_tracking`].
    ///
    /// # Errors
    /// When the host cannot log.
    fn start_tracking(&self) -> Result<(), PortError>;
    /// See [`SourceVm::stop_tracking`].
    fn stop_tracking(&self);
    /// See [`SourceVm::collect_dirty`]: the pages stay in the log.
    ///
    /// # Errors
    /// When the log cannot be read.
    fn collect_dirty(&self, into: &mut PageSet) -> Result<(), PortError>;
    /// See [`SourceVm::clear_dirty`].
    ///
    /// # Errors
    /// When the log cannot be written.
    fn clear_dirty(&self, runs: &[Run]) -> Result<(), PortError>;

    /// The destination is to take a guest of this layout and description. By default it was built
    /// beforehand and takes its like; its memory must hold zeros.
    ///
    /// # Errors
    /// Why it cannot.
    fn prepare(&self, layout: &RamLayout, description: &[u8]) -> Result<(), PortError> {
        if self.layout() != *layout {
            return Err(
                "the source's guest has another memory layout; start this one with the same memory"
                    .into(),
            );
        }
        if self.description()? != description {
            return Err(
                "the source's machine is another; start this one with the same options".into(),
            );
        }
        Ok(())
    }
    /// The destination takes the machine's state; [`Pausable::resume`] then runs the guest.
    ///
    /// # Errors
    /// When it is damaged or does not fit.
    fn restore(&self, state: &[u8]) -> Result<(), PortError>;
    /// The destination does not get the guest: what has come of it is dropped.
    fn discard(&self);
}

impl<L: Link, V: SimpleVm> PageSource<L> for Arc<V> {
    fn copy_page(&self, gfn: Gfn, into: &mut [u8; PAGE_SIZE]) -> Result<(), PortError> {
        self.read_page(gfn, into)
    }
}

impl<L: Link, V: SimpleVm> SourceVm<L> for Arc<V> {
    fn layout(&self) -> RamLayout {
        V::layout(self)
    }

    fn description(&self) -> Result<Vec<u8>, PortError> {
        V::description(self)
    }

    fn state_bytes(&self) -> u64 {
        V::state_bytes(self)
    }

    fn start_tracking(&self) -> Result<(), PortError> {
        V::start_tracking(self)
    }

    fn stop_tracking(&self) {
        V::stop_tracking(self);
    }

    fn collect_dirty(&self, into: &mut PageSet) -> Result<(), PortError> {
        V::collect_dirty(self, into)
    }

    fn clear_dirty(&self, runs: &[Run], _: &mut Vec<u64>) -> Result<(), PortError> {
        V::clear_dirty(self, runs)
    }

    fn pause(&self) -> Result<Paused<'_>, PortError> {
        pause::<V>(self)
    }
}

impl<L: Link, V: SimpleVm> PageSink<L> for V {
    fn write(&self, run: Run, bytes: &[u8]) -> Result<(), PortError> {
        let (pages, rest) = bytes.as_chunks();
        if pages.len() as u64 != run.count || !rest.is_empty() {
            return Err(format!("{} bytes are not the pages of {run:?}", bytes.len()).into());
        }
        (run.first..run.end())
            .zip(pages)
            .try_for_each(|(gfn, page)| self.write_page(gfn, page))
    }

    fn copy_page(&self, gfn: Gfn, into: &mut [u8; PAGE_SIZE]) -> Result<(), PortError> {
        self.read_page(gfn, into)
    }
}

impl<L: Link, V: SimpleVm> DestinationVm<L> for Arc<V> {
    type Sink = V;

    fn prepare(&mut self, layout: &RamLayout, machine: &[u8]) -> Result<Self, PortError> {
        V::prepare(self, layout, machine)?;
        Ok(Self::clone(self))
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), PortError> {
        V::restore(self, state)
    }

    fn run(&mut self) -> Result<Option<Duration>, PortError> {
        self.resume()?;
        Ok(None)
    }

    fn discard(&mut self) {
        V::discard(self);
    }
}

#[cfg(test)]
mod tests;
