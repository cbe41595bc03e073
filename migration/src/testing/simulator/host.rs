//! The simulated destination host.

use super::disk::SimCopy;
use super::fault::PortFault;
use super::guest::{page_of, version_of};
use super::link::SimLink;
use super::lock;
use super::world::{STATE, World};
use crate::page::{Gfn, PAGE_SIZE, PageSet, RamLayout, Run};
use crate::port::{
    AdoptMemory, BlockSink, DestinationDisks, DestinationVm, Link, PageFault, PageSink, PortError,
    PostCopySink, PostCopyVm,
};
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

pub(super) struct SimHost {
    world: Arc<Mutex<World>>,
}

impl SimHost {
    pub const fn new(world: Arc<Mutex<World>>) -> Self {
        Self { world }
    }
}

pub(super) struct SimSink {
    world: Arc<Mutex<World>>,
}

fn index(gfn: Gfn) -> usize {
    usize::try_from(gfn).unwrap_or(usize::MAX)
}

impl PageSink<SimLink> for SimSink {
    fn receive(&self, link: &mut SimLink, runs: &[Run]) -> io::Result<()> {
        for gfn in runs.iter().flat_map(|run| run.first..run.end()) {
            let mut version = [0; 8];
            link.recv(&mut version)?;
            lock(&self.world).fill(gfn, u64::from_le_bytes(version));
        }
        Ok(())
    }

    fn write(&self, run: Run, bytes: &[u8]) -> Result<(), PortError> {
        let (pages, rest) = bytes.as_chunks::<PAGE_SIZE>();
        let mut world = lock(&self.world);
        let mut whole = [0; PAGE_SIZE];
        for (gfn, page) in (run.first..run.end()).zip(pages) {
            let version = u64::from_le_bytes(*page.first_chunk().unwrap_or(&[0; 8]));
            page_of(version, &mut whole);
            if *page != whole {
                let wrong = format!("page {gfn} was decoded to what no page ever was");
                world.violations.push(wrong);
            }
            world.fill(gfn, version);
        }
        if pages.len() as u64 != run.count || !rest.is_empty() {
            let wrong = format!("{} bytes were decoded for {run:?}", bytes.len());
            world.violations.push(wrong);
        }
        Ok(())
    }

    fn zero(&self, run: Run) -> Result<(), PortError> {
        let mut world = lock(&self.world);
        (run.first..run.end()).for_each(|gfn| world.fill(gfn, 0));
        Ok(())
    }

    fn copy_page(&self, gfn: Gfn, into: &mut [u8; PAGE_SIZE]) -> Result<(), PortError> {
        page_of(lock(&self.world).at_destination(gfn), into);
        Ok(())
    }

    fn fetch(&self, link: &mut SimLink, runs: &[Run], into: &mut Vec<u8>) -> io::Result<()> {
        into.clear();
        for _ in runs.iter().flat_map(|run| run.first..run.end()) {
            let (mut version, mut page) = ([0; 8], [0; PAGE_SIZE]);
            link.recv(&mut version)?;
            page_of(u64::from_le_bytes(version), &mut page);
            into.extend_from_slice(&page);
        }
        Ok(())
    }

    fn post_copy(&self) -> Option<&dyn PostCopySink> {
        Some(self)
    }
}

impl PostCopySink for SimSink {
    fn place(&self, run: Run, bytes: &[u8]) -> Result<(), PortError> {
        let mut world = lock(&self.world);
        world.port_fails(PortFault::Place(0))?;
        for (gfn, page) in (run.first..run.end()).zip(bytes.as_chunks::<PAGE_SIZE>().0) {
            world.place(gfn, version_of(page));
        }
        Ok(())
    }

    fn place_zero(&self, run: Run) -> Result<(), PortError> {
        let mut world = lock(&self.world);
        world.port_fails(PortFault::Place(0))?;
        for gfn in run.first..run.end() {
            // A fault that was received late: its page has come.
            if world.missing.as_ref().is_some_and(|set| set.contains(gfn)) {
                world.place(gfn, 0);
            }
        }
        Ok(())
    }

    fn next_fault(&self, _: Duration) -> Result<Option<PageFault>, PortError> {
        let gfn = lock(&self.world).faults_heard.pop_front();
        Ok(gfn.map(|gfn| PageFault { gfn, waiter: 0 }))
    }
}

impl DestinationVm<SimLink> for SimHost {
    type Sink = SimSink;

    fn prepare(&mut self, layout: &RamLayout, _: &[u8]) -> Result<Arc<SimSink>, PortError> {
        let mut world = lock(&self.world);
        world.port_fails(PortFault::Prepare)?;
        world.destination_memory = vec![0; index(layout.end())];
        world.destination_has = true;
        Ok(Arc::new(SimSink {
            world: Arc::clone(&self.world),
        }))
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), PortError> {
        let mut world = lock(&self.world);
        world.port_fails(PortFault::Restore)?;
        if state != STATE {
            world
                .violations
                .push("a damaged state reached the machine".into());
        }
        world.complete = true;
        Ok(())
    }

    fn run(&mut self) -> Result<Option<Duration>, PortError> {
        let mut world = lock(&self.world);
        world.port_fails(PortFault::Run)?;
        if world.shared {
            world.claim()?;
        }
        world.destination_starts();
        Ok(Some(Duration::ZERO))
    }

    fn discard(&mut self) {
        let mut world = lock(&self.world);
        if world.destination_runs {
            world
                .violations
                .push("the destination discarded a running guest".into());
        }
        world.destination_has = false;
        world.destination_memory = Vec::new();
        world.disks.discard();
    }

    fn disks(&mut self) -> Option<&mut dyn DestinationDisks> {
        Some(self)
    }

    fn sharing(&mut self) -> Option<&mut dyn AdoptMemory<SimLink, SimSink>> {
        Some(self)
    }

    fn post_copy(&mut self) -> Option<&mut dyn PostCopyVm> {
        Some(self)
    }
}

impl DestinationDisks for SimHost {
    fn take_disks(&mut self, bytes: &[u64]) -> Result<Vec<Arc<dyn BlockSink>>, PortError> {
        lock(&self.world).port_fails(PortFault::TakeDisks)?;
        let make = |bytes: &u64| SimCopy::make(&self.world, *bytes);
        Ok(bytes.iter().map(make).collect())
    }
}

impl AdoptMemory<SimLink, SimSink> for SimHost {
    fn wants_files(&mut self, _: &mut SimLink) -> Result<bool, PortError> {
        Ok(lock(&self.world).shares)
    }

    fn adopt(
        &mut self,
        _: &mut SimLink,
        layout: &RamLayout,
        machine: &[u8],
    ) -> Result<Option<Arc<SimSink>>, PortError> {
        if !lock(&self.world).shares {
            return Ok(None);
        }
        let sink = self.prepare(layout, machine)?;
        lock(&self.world).shared = true;
        Ok(Some(sink))
    }
}

impl PostCopyVm for SimHost {
    fn check(&self) -> Result<(), PortError> {
        lock(&self.world).port_fails(PortFault::CheckPostCopy)
    }

    fn drop_stale(&mut self, pages: &PageSet) -> Result<(), PortError> {
        lock(&self.world).drop_stale(pages);
        Ok(())
    }

    fn begin(&mut self, missing: &PageSet) -> Result<(), PortError> {
        let mut world = lock(&self.world);
        world.port_fails(PortFault::BeginPostCopy)?;
        world.begin_post_copy(missing);
        Ok(())
    }

    fn end(&mut self) {}
}
