//! A guest of plain bytes that dirties every fifth page once while it is sent, and the host that takes it.

use super::link::MemoryLink;
use ferry_migration::page::{Gfn, PAGE_SIZE, PageSet, RamLayout, Run};
use ferry_migration::port::{DestinationVm, Link, PageSink, PageSource, PortError, SourceVm};
use ferry_migration::wire::SessionId;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

type Page = [u8; PAGE_SIZE];

/// Pages that several threads can fill, a lock for each.
#[derive(Clone)]
pub struct Memory(Arc<[Mutex<Page>]>);

impl Memory {
    pub fn new(pages: usize) -> Self {
        Self((0..pages).map(|_| Mutex::new([0; PAGE_SIZE])).collect())
    }

    pub fn page(&self, gfn: Gfn) -> &Mutex<Page> {
        &self.0[usize::try_from(gfn).unwrap()]
    }
}

impl PartialEq for Memory {
    fn eq(&self, other: &Self) -> bool {
        self.0.len() == other.0.len()
            && self
                .0
                .iter()
                .zip(&*other.0)
                .all(|(a, b)| *a.lock().unwrap() == *b.lock().unwrap())
    }
}

fn each(runs: &[Run]) -> impl Iterator<Item = Gfn> + '_ {
    runs.iter().flat_map(|run| run.first..run.end())
}

pub struct TestGuest {
    memory: Memory,
    log: Mutex<PageSet>,
    collections: AtomicUsize,
}

impl TestGuest {
    /// Every seventh page is zero.
    pub fn new(pages: usize) -> Self {
        Self::with(pages, |index, page| {
            if index % 7 != 0 {
                page[..8].copy_from_slice(&index.to_le_bytes());
                page[PAGE_SIZE - 1] = 1;
            }
        })
    }

    /// With pages of their own, by number.
    pub fn with(pages: usize, mut fill: impl FnMut(usize, &mut Page)) -> Self {
        let memory = Memory::new(pages);
        for (index, page) in memory.0.iter().enumerate() {
            fill(index, &mut page.lock().unwrap());
        }
        Self {
            log: Mutex::new(PageSet::new(pages as u64)),
            memory,
            collections: AtomicUsize::new(0),
        }
    }

    #[allow(dead_code, reason = "not every test that has this file asks")]
    pub fn pages(&self) -> usize {
        self.memory.0.len()
    }

    pub const fn memory(&self) -> &Memory {
        &self.memory
    }

    fn write(&self, gfn: Gfn) {
        self.memory.page(gfn).lock().unwrap()[100] ^= 0x55;
        self.log.lock().unwrap().insert(gfn);
    }
}

impl PageSource<MemoryLink> for TestGuest {
    fn transmit(&self, link: &mut MemoryLink, head: &[u8], runs: &[Run]) -> io::Result<()> {
        link.send(head, &[])?;
        for gfn in each(runs) {
            let page = self.memory.page(gfn).lock().unwrap();
            link.send(&*page, &[])?;
        }
        Ok(())
    }

    fn copy_page(&self, gfn: Gfn, into: &mut Page) -> Result<(), PortError> {
        *into = *self.memory.page(gfn).lock().unwrap();
        Ok(())
    }

    fn is_zero(&self, gfn: Gfn) -> bool {
        self.memory
            .page(gfn)
            .lock()
            .unwrap()
            .iter()
            .all(|byte| *byte == 0)
    }
}

impl SourceVm<MemoryLink> for TestGuest {
    fn layout(&self) -> RamLayout {
        RamLayout::new(vec![Run::new(0, self.memory.0.len() as u64)]).unwrap()
    }

    fn description(&self) -> Result<Vec<u8>, PortError> {
        Ok(b"pages".to_vec())
    }

    fn state_bytes(&self) -> u64 {
        8
    }

    fn start_tracking(&self) -> Result<(), PortError> {
        let all = self.layout().all();
        self.log.lock().unwrap().union_with(&all);
        Ok(())
    }

    fn stop_tracking(&self) {}

    /// The second look finds that every fifth page was written since the first.
    fn collect_dirty(&self, into: &mut PageSet) -> Result<(), PortError> {
        if self.collections.fetch_add(1, Ordering::Relaxed) == 1 {
            (0..self.memory.0.len() as u64)
                .step_by(5)
                .for_each(|gfn| self.write(gfn));
        }
        into.union_with(&self.log.lock().unwrap());
        Ok(())
    }

    fn clear_dirty(&self, runs: &[Run], _: &mut Vec<u64>) -> Result<(), PortError> {
        let mut log = self.log.lock().unwrap();
        runs.iter().for_each(|run| log.remove_run(*run));
        Ok(())
    }

    fn pause(&self) -> Result<Duration, PortError> {
        Ok(Duration::ZERO)
    }

    fn save(&self) -> Result<Vec<u8>, PortError> {
        Ok(b"state".to_vec())
    }

    fn resume(&self) {}

    fn commit(&self, _: SessionId) -> Result<(), PortError> {
        Ok(())
    }

    fn release(&self) {}
}

pub struct TestHost(Arc<TestSink>);

pub struct TestSink(Memory);

impl TestHost {
    pub fn new(memory: Memory) -> Self {
        Self(Arc::new(TestSink(memory)))
    }
}

impl PageSink<MemoryLink> for TestSink {
    fn receive(&self, link: &mut MemoryLink, runs: &[Run]) -> io::Result<()> {
        each(runs).try_for_each(|gfn| link.recv(&mut *self.0.page(gfn).lock().unwrap()))
    }

    fn write(&self, run: Run, bytes: &[u8]) -> Result<(), PortError> {
        for (gfn, page) in (run.first..run.end()).zip(bytes.chunks_exact(PAGE_SIZE)) {
            self.0.page(gfn).lock().unwrap().copy_from_slice(page);
        }
        Ok(())
    }

    fn zero(&self, run: Run) -> Result<(), PortError> {
        each(&[run]).for_each(|gfn| self.0.page(gfn).lock().unwrap().fill(0));
        Ok(())
    }

    fn copy_page(&self, gfn: Gfn, into: &mut Page) -> Result<(), PortError> {
        *into = *self.0.page(gfn).lock().unwrap();
        Ok(())
    }
}

impl DestinationVm<MemoryLink> for TestHost {
    type Sink = TestSink;

    fn prepare(&mut self, _: &RamLayout, machine: &[u8]) -> Result<Arc<TestSink>, PortError> {
        assert_eq!(machine, b"pages");
        Ok(Arc::clone(&self.0))
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), PortError> {
        assert_eq!(state, b"state");
        Ok(())
    }

    fn run(&mut self) -> Result<Duration, PortError> {
        Ok(Duration::ZERO)
    }

    fn discard(&mut self) {}
}
