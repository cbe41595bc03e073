//! The simulated guest at the source.

use super::disk::SimDisk;
use super::fault::PortFault;
use super::link::SimLink;
use super::lock;
use super::world::{STATE, World, weight_of};
use crate::codec::content::{self, Content};
use crate::page::{Gfn, PAGE_SIZE, PageSet, RamLayout, Run};
use crate::port::{
    BlockSource, Committed, CommittedVm, FreeMemory, FreedPages, NotStarted, PageSource, Paused,
    PausedVm, PortError, ShareMemory, SourceDisks, SourceVm, TakeBackError, Throttle,
};
use crate::wire::SessionId;
use std::io;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

pub(super) struct SimGuest {
    world: Arc<Mutex<World>>,
    freed: Arc<Mutex<FreedPages>>,
}

impl SimGuest {
    pub fn new(world: Arc<Mutex<World>>) -> Self {
        let freed = Arc::clone(&lock(&world).freed);
        Self { world, freed }
    }
}

fn index(gfn: Gfn) -> usize {
    usize::try_from(gfn).unwrap_or(usize::MAX)
}

/// What a page of this version looks like: the version, and then one of a few bodies of different
/// kinds, so that every coder has its pages and a page often differs little from what it was.
pub(super) fn page_of(version: u64, into: &mut [u8; PAGE_SIZE]) {
    static BODIES: LazyLock<Vec<[u8; PAGE_SIZE]>> = LazyLock::new(|| {
        let kinds = [
            Content::Sparse,
            Content::Half,
            Content::Pointers,
            Content::Noise,
        ];
        (0..2 * kinds.len() as u64)
            .zip(kinds.into_iter().cycle())
            .map(|(seed, kind)| content::page(kind, seed))
            .collect()
    });
    if version == 0 {
        into.fill(0);
    } else {
        // Many versions in a row have one body.
        *into = BODIES[index(version / 16) % BODIES.len()];
        into[..8].copy_from_slice(&version.to_le_bytes());
    }
}

/// The version that a page shows.
pub(super) fn version_of(page: &[u8; PAGE_SIZE]) -> u64 {
    let mut version = [0; 8];
    version.copy_from_slice(&page[..8]);
    u64::from_le_bytes(version)
}

impl PageSource<SimLink> for SimGuest {
    fn transmit(&self, link: &mut SimLink, head: &[u8], runs: &[Run]) -> io::Result<()> {
        let mut bytes = head.to_vec();
        let mut pages = 0;
        let mut world = lock(&self.world);
        for gfn in runs.iter().flat_map(|run| run.first..run.end()) {
            bytes.extend_from_slice(&world.read(gfn).to_le_bytes());
            // The guest runs on while its memory is being read.
            world.sneak_a_write();
            pages += 1;
        }
        drop(world);
        link.send_weighed(&bytes, weight_of(head.len(), pages), head.len())
    }

    fn copy_page(&self, gfn: Gfn, into: &mut [u8; PAGE_SIZE]) -> Result<(), PortError> {
        let mut world = lock(&self.world);
        page_of(world.read(gfn), into);
        world.sneak_a_write();
        Ok(())
    }

    fn is_zero(&self, gfn: Gfn) -> bool {
        let mut world = lock(&self.world);
        let zero = world.read(gfn) == 0;
        world.sneak_a_write();
        zero
    }

    fn unpopulated(&self, run: Run) -> Option<Run> {
        let mut world = lock(&self.world);
        let hole = world.holes.next_run(run.first, run.count);
        let hole = hole.filter(|hole| hole.first < run.end());
        let hole = hole.map(|hole| Run::new(hole.first, hole.end().min(run.end()) - hole.first));
        world.sneak_a_write();
        hole
    }
}

impl SourceVm<SimLink> for SimGuest {
    fn layout(&self) -> RamLayout {
        lock(&self.world).layout.clone()
    }

    fn description(&self) -> Result<Vec<u8>, PortError> {
        Ok(b"a simulated machine".to_vec())
    }

    fn state_bytes(&self) -> u64 {
        STATE.len() as u64
    }

    fn start_tracking(&self) -> Result<(), PortError> {
        let mut world = lock(&self.world);
        world.port_fails(PortFault::StartTracking)?;
        world.log = Some(world.layout.all());
        Ok(())
    }

    fn stop_tracking(&self) {
        lock(&self.world).log = None;
    }

    fn collect_dirty(&self, into: &mut PageSet) -> Result<(), PortError> {
        let mut world = lock(&self.world);
        world.port_fails(PortFault::Collect(0))?;
        world.pass(Duration::from_micros(10));
        world.collect(into);
        Ok(())
    }

    fn clear_dirty(&self, runs: &[Run], _: &mut Vec<u64>) -> Result<(), PortError> {
        let mut world = lock(&self.world);
        world.port_fails(PortFault::Clear(0))?;
        if let Some(log) = &mut world.log {
            for run in runs {
                log.remove_run(*run);
            }
        }
        world.sneak_a_write();
        Ok(())
    }

    fn pause(&self) -> Result<Paused<'_>, PortError> {
        let mut world = lock(&self.world);
        world.port_fails(PortFault::Pause)?;
        world.pass(Duration::from_micros(50));
        world.source_runs = false;
        world.paused_at = Some(world.now);
        world.paused_memory = world.source_memory.clone();
        world.disks.pause();
        Ok(Box::new(SimPaused(Arc::clone(&self.world))))
    }

    fn disks(&self) -> Option<&dyn SourceDisks> {
        (lock(&self.world).disks.bytes > 0).then_some(self)
    }

    fn sharing(&self) -> Option<&dyn ShareMemory<SimLink>> {
        Some(self)
    }

    fn throttle(&self) -> Option<&dyn Throttle> {
        Some(self)
    }

    fn freeing(&self) -> Option<&dyn FreeMemory> {
        Some(self)
    }
}

impl FreeMemory for SimGuest {
    fn piece(&self) -> u64 {
        16
    }

    fn free(&self, pages: Run) -> Result<(), PortError> {
        lock(&self.world).free(pages);
        Ok(())
    }

    fn freed(&self) -> &Mutex<FreedPages> {
        &self.freed
    }
}

impl Throttle for SimGuest {
    fn vcpus(&self) -> usize {
        1
    }

    fn slow(&self, shares: &[f64]) -> Result<(), PortError> {
        lock(&self.world).slowed = shares.first().copied().unwrap_or(0.0);
        Ok(())
    }

    fn rested(&self) -> Vec<Duration> {
        vec![lock(&self.world).rested]
    }
}

/// The guest while it stands still.
struct SimPaused(Arc<Mutex<World>>);

impl Drop for SimPaused {
    fn drop(&mut self) {
        lock(&self.0).source_resumes();
    }
}

impl PausedVm<'_> for SimPaused {
    fn stopped_for(&self) -> Option<Duration> {
        Some(Duration::ZERO)
    }

    fn save(&self, _newest: Option<u32>) -> Result<Vec<u8>, PortError> {
        lock(&self.0).port_fails(PortFault::Save)?;
        Ok(STATE.to_vec())
    }

    fn commit(self: Box<Self>, _: SessionId) -> Result<Committed<'static>, PortError> {
        let mut world = lock(&self.0);
        if let Err(error) = world.port_fails(PortFault::Commit) {
            drop(world);
            return Err(error);
        }
        world.committed = true;
        drop(world);
        let committed = SimCommitted(Arc::clone(&self.0));
        std::mem::forget(self);
        Ok(Box::new(committed))
    }

    fn keep(self: Box<Self>) {
        std::mem::forget(self);
    }
}

/// The guest after the commit.
pub(super) struct SimCommitted(pub(super) Arc<Mutex<World>>);

impl CommittedVm for SimCommitted {
    fn release(self: Box<Self>) {
        let mut world = lock(&self.0);
        if !world.committed {
            world
                .violations
                .push("released a guest that was not committed".into());
        }
    }

    fn take_back(self: Box<Self>, _: NotStarted) -> Result<(), TakeBackError> {
        let mut world = lock(&self.0);
        world.committed = false;
        world.source_resumes();
        Ok(())
    }
}

impl SourceDisks for SimGuest {
    fn flush(&self) -> Result<(), PortError> {
        let mut world = lock(&self.world);
        world.port_fails(PortFault::Flush(0))?;
        world.flush();
        Ok(())
    }

    fn to_copy(&self) -> Vec<Arc<dyn BlockSource>> {
        vec![Arc::new(SimDisk(Arc::clone(&self.world)))]
    }
}

impl ShareMemory<SimLink> for SimGuest {
    fn share_memory(&self, _: &mut SimLink) -> Result<bool, PortError> {
        Ok(lock(&self.world).shares)
    }

    fn has_files(&self) -> bool {
        lock(&self.world).shares
    }

    fn share_files(&self, _: &mut SimLink) -> Result<(), PortError> {
        Ok(())
    }
}
