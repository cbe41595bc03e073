//! A small guest that looks after its rights.

use ferry_migration::page::{Gfn, PAGE_SIZE, PageSet, RamLayout, Run};
use ferry_migration::port::{
    BLOCK_BYTES, BlockSource, Link, NotStarted, PageSource, Pausable, Paused, PortError,
    SourceDisks, SourceVm, pause,
};
use ferry_migration::testing::RecordedPeer;
use ferry_migration::wire::SessionId;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

/// Where a guest stands.
#[derive(Debug, Default)]
pub(super) struct Standing {
    pub(super) logged: bool,
    pub(super) paused: bool,
    pub(super) committed: bool,
    pub(super) released: bool,
    dirty: Option<PageSet>,
    written: u64,
}

/// A guest of two regions that writes to a few pages, and has a disk.
pub(crate) struct StandIn {
    pages: Vec<[u8; PAGE_SIZE]>,
    layout: RamLayout,
    standing: Mutex<Standing>,
}

impl StandIn {
    /// With these pages from 0 on, and none behind.
    pub(crate) fn of(pages: Vec<[u8; PAGE_SIZE]>) -> Self {
        let layout = RamLayout::new(vec![Run::new(0, pages.len() as u64)]).unwrap();
        Self {
            pages,
            layout,
            standing: Mutex::default(),
        }
    }

    /// Of 48 pages of each kind, with a hole.
    pub(super) fn busy() -> Self {
        let mut pages = vec![[0; PAGE_SIZE]; 96];
        for (gfn, page) in pages.iter_mut().enumerate().filter(|(gfn, _)| gfn % 3 > 0) {
            for (at, byte) in page.iter_mut().enumerate() {
                *byte = u8::try_from((at * gfn * 31) % 255).unwrap();
            }
        }
        Self {
            layout: RamLayout::new(vec![Run::new(0, 32), Run::new(80, 16)]).unwrap(),
            ..Self::of(pages)
        }
    }

    pub(super) fn standing(&self) -> MutexGuard<'_, Standing> {
        self.standing.lock().unwrap()
    }

    /// What is left of it after a commit.
    fn page(&self, gfn: Gfn) -> &[u8; PAGE_SIZE] {
        assert!(
            self.layout.contains(Run::new(gfn, 1)),
            "page {gfn} is no RAM"
        );
        &self.pages[usize::try_from(gfn).unwrap()]
    }
}

impl PageSource<RecordedPeer> for StandIn {
    fn transmit(&self, link: &mut RecordedPeer, head: &[u8], runs: &[Run]) -> io::Result<()> {
        for gfn in runs.iter().flat_map(|run| run.first..run.end()) {
            self.page(gfn);
        }
        link.send(head, &[])
    }

    fn copy_page(&self, gfn: Gfn, into: &mut [u8; PAGE_SIZE]) -> Result<(), PortError> {
        *into = *self.page(gfn);
        Ok(())
    }

    fn is_zero(&self, gfn: Gfn) -> bool {
        self.page(gfn).iter().all(|byte| *byte == 0)
    }
}

impl SourceVm<RecordedPeer> for StandIn {
    fn layout(&self) -> RamLayout {
        self.layout.clone()
    }

    fn description(&self) -> Result<Vec<u8>, PortError> {
        Ok(b"machine".to_vec())
    }

    fn state_bytes(&self) -> u64 {
        5
    }

    fn start_tracking(&self) -> Result<(), PortError> {
        let mut standing = self.standing();
        standing.logged = true;
        standing.dirty = Some(self.layout.all());
        Ok(())
    }

    fn stop_tracking(&self) {
        self.standing().logged = false;
    }

    fn collect_dirty(&self, into: &mut PageSet) -> Result<(), PortError> {
        let mut standing = self.standing();
        let (paused, written) = (standing.paused, standing.written);
        standing.written += 1;
        if let Some(dirty) = &mut standing.dirty {
            if !paused {
                dirty.insert(written % 5);
            }
            into.union_with(dirty);
        }
        Ok(())
    }

    fn clear_dirty(&self, runs: &[Run], _: &mut Vec<u64>) -> Result<(), PortError> {
        if let Some(dirty) = &mut self.standing().dirty {
            runs.iter().for_each(|run| dirty.remove_run(*run));
        }
        Ok(())
    }

    fn pause(&self) -> Result<Paused<'_>, PortError> {
        pause(self)
    }

    fn disks(&self) -> Option<&dyn SourceDisks> {
        Some(self)
    }

    fn fault_channels(&self) -> u16 {
        2
    }
}

impl Pausable for StandIn {
    fn stop(&self) -> Result<(), PortError> {
        self.standing().paused = true;
        Ok(())
    }

    fn resume(&self) -> Result<(), PortError> {
        let mut standing = self.standing();
        assert!(
            standing.paused && !standing.committed,
            "a guest that was given away was run"
        );
        standing.paused = false;
        Ok(())
    }

    fn save(&self, _newest: Option<u32>) -> Result<Vec<u8>, PortError> {
        Ok(b"state".to_vec())
    }

    fn give_away(&self, _: SessionId) -> Result<(), PortError> {
        let mut standing = self.standing();
        assert!(standing.paused, "a guest that runs was given away");
        standing.committed = true;
        Ok(())
    }

    fn release(&self) {
        let mut standing = self.standing();
        assert!(standing.committed, "a guest that is here was thrown away");
        standing.released = true;
    }

    fn take_back(&self, _: NotStarted) -> Result<(), PortError> {
        self.standing().committed = false;
        self.resume()
    }
}

impl SourceDisks for StandIn {
    fn flush(&self) -> Result<(), PortError> {
        Ok(())
    }

    fn to_copy(&self) -> Vec<Arc<dyn BlockSource>> {
        vec![Arc::new(Disk)]
    }
}

/// A disk of a block and a bit, never written to.
struct Disk;

impl BlockSource for Disk {
    fn bytes(&self) -> u64 {
        BLOCK_BYTES + 512
    }

    fn start(&self) -> Result<(), PortError> {
        Ok(())
    }

    fn stop(&self) {}

    fn take_written(&self) -> Result<Vec<u64>, PortError> {
        Ok(vec![0])
    }

    fn hole(&self, offset: u64, _: u64) -> u64 {
        BLOCK_BYTES.saturating_sub(offset)
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), PortError> {
        assert!(
            offset + into.len() as u64 <= self.bytes(),
            "beyond the disk's end"
        );
        into.fill(3);
        Ok(())
    }
}
