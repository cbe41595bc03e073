//! The simulated destination host.

use super::guest::page_of;
use super::link::SimLink;
use super::lock;
use super::world::{PortFault, STATE, World};
use crate::page::{Gfn, PAGE_SIZE, RamLayout, Run};
use crate::port::{Host, Link, PageSink, PortError};
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
            lock(&self.world).destination_memory[index(gfn)] = u64::from_le_bytes(version);
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
            world.destination_memory[index(gfn)] = version;
        }
        if pages.len() as u64 != run.count || !rest.is_empty() {
            let wrong = format!("{} bytes were decoded for {run:?}", bytes.len());
            world.violations.push(wrong);
        }
        Ok(())
    }

    fn zero(&self, run: Run) -> Result<(), PortError> {
        let mut world = lock(&self.world);
        world.destination_memory[index(run.first)..index(run.end())].fill(0);
        Ok(())
    }

    fn copy_page(&self, gfn: Gfn, into: &mut [u8; PAGE_SIZE]) -> Result<(), PortError> {
        page_of(lock(&self.world).destination_memory[index(gfn)], into);
        Ok(())
    }
}

impl Host<SimLink> for SimHost {
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
        Ok(())
    }

    fn run(&mut self) -> Result<Duration, PortError> {
        let mut world = lock(&self.world);
        world.port_fails(PortFault::Run)?;
        world.destination_starts();
        Ok(Duration::ZERO)
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
    }
}
