//! The smallest VMs: plain pages, no processor.

use crate::page::{Gfn, PAGE_SIZE, PageSet, RamLayout, Run};
use crate::port::{
    DestinationVm, Link, PageSink, PageSource, Pausable, Paused, PortError, SourceVm, pause,
};
use crate::sync::lock;
use crate::wire::SessionId;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

type Page = [u8; PAGE_SIZE];

const DESCRIPTION: &[u8] = b"pages";
const STATE: &[u8] = b"state";

/// Pages that several threads can fill, with a lock for each. Clones share them.
#[derive(Clone, Debug)]
pub struct Memory {
    pages: Arc<[Mutex<Page>]>,
    /// The state was restored: the guest is complete.
    complete: Arc<AtomicBool>,
    late: Arc<AtomicU64>,
}

impl Memory {
    fn new(pages: usize) -> Self {
        Self {
            pages: (0..pages).map(|_| Mutex::new([0; PAGE_SIZE])).collect(),
            complete: Arc::default(),
            late: Arc::default(),
        }
    }

    fn pages(&self) -> u64 {
        self.pages.len() as u64
    }

    /// A page.
    ///
    /// # Panics
    /// When there is no such page: the engines ask for pages of the layout only.
    pub fn page(&self, gfn: Gfn) -> MutexGuard<'_, Page> {
        let page = &self.pages[usize::try_from(gfn).unwrap_or(usize::MAX)];
        lock(page)
    }

    /// A page that the destination is about to write.
    fn filled(&self, gfn: Gfn) -> MutexGuard<'_, Page> {
        if self.complete.load(Ordering::SeqCst) {
            self.late.fetch_add(1, Ordering::SeqCst);
        }
        self.page(gfn)
    }
}

impl PartialEq for Memory {
    fn eq(&self, other: &Self) -> bool {
        self.pages() == other.pages()
            && (0..self.pages()).all(|gfn| *self.page(gfn) == *other.page(gfn))
    }
}

fn each(runs: &[Run]) -> impl Iterator<Item = Gfn> + '_ {
    runs.iter().flat_map(|run| run.first..run.end())
}

/// A source VM whose every fifth page is written once while it is migrated.
#[derive(Debug)]
pub struct TestSource {
    memory: Memory,
    log: Mutex<PageSet>,
    collections: AtomicUsize,
    runs: AtomicBool,
    copied_stopped: AtomicUsize,
}

impl TestSource {
    /// So many pages, of which every seventh is zero.
    #[must_use]
    pub fn new(pages: usize) -> Self {
        Self::with(pages, |index, page| {
            if index % 7 != 0 {
                page[..8].copy_from_slice(&(index as u64).to_le_bytes());
                page[PAGE_SIZE - 1] = 1;
            }
        })
    }

    /// With pages that `fill` makes, by number.
    #[must_use]
    pub fn with(pages: usize, mut fill: impl FnMut(usize, &mut [u8; PAGE_SIZE])) -> Self {
        let memory = Memory::new(pages);
        for (index, gfn) in (0..pages).zip(0..) {
            fill(index, &mut memory.page(gfn));
        }
        Self {
            log: Mutex::new(PageSet::new(memory.pages())),
            memory,
            collections: AtomicUsize::new(0),
            runs: AtomicBool::new(true),
            copied_stopped: AtomicUsize::new(0),
        }
    }

    /// How many pages were copied to be looked at while the guest stood still.
    #[must_use]
    pub fn copied_while_stopped(&self) -> usize {
        self.copied_stopped.load(Ordering::SeqCst)
    }

    /// Its memory.
    #[must_use]
    pub const fn memory(&self) -> &Memory {
        &self.memory
    }

    /// How many pages it has.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.memory.pages.len()
    }

    /// Whether the guest runs here.
    #[must_use]
    pub fn runs(&self) -> bool {
        self.runs.load(Ordering::SeqCst)
    }

    fn log(&self) -> MutexGuard<'_, PageSet> {
        lock(&self.log)
    }

    fn write(&self, gfn: Gfn) {
        self.memory.page(gfn)[100] ^= 0x55;
        self.log().insert(gfn);
    }
}

impl<L: Link> PageSource<L> for TestSource {
    fn transmit(&self, link: &mut L, head: &[u8], runs: &[Run]) -> io::Result<()> {
        link.send(head, &[])?;
        each(runs).try_for_each(|gfn| link.send(&*self.memory.page(gfn), &[]))
    }

    fn copy_page(&self, gfn: Gfn, into: &mut Page) -> Result<(), PortError> {
        if !self.runs() {
            self.copied_stopped.fetch_add(1, Ordering::SeqCst);
        }
        *into = *self.memory.page(gfn);
        Ok(())
    }

    fn is_zero(&self, gfn: Gfn) -> bool {
        self.memory.page(gfn).iter().all(|byte| *byte == 0)
    }
}

impl<L: Link> SourceVm<L> for TestSource {
    fn layout(&self) -> RamLayout {
        RamLayout::new(vec![Run::new(0, self.memory.pages())])
            .unwrap_or_else(|error| unreachable!("one run is a layout: {error}"))
    }

    fn description(&self) -> Result<Vec<u8>, PortError> {
        Ok(DESCRIPTION.to_vec())
    }

    fn state_bytes(&self) -> u64 {
        STATE.len() as u64
    }

    fn start_tracking(&self) -> Result<(), PortError> {
        self.log().insert_run(Run::new(0, self.memory.pages()));
        Ok(())
    }

    fn stop_tracking(&self) {}

    /// The second look finds that every fifth page was written since the first.
    fn collect_dirty(&self, into: &mut PageSet) -> Result<(), PortError> {
        if self.collections.fetch_add(1, Ordering::Relaxed) == 1 {
            (0..self.memory.pages())
                .step_by(5)
                .for_each(|gfn| self.write(gfn));
        }
        into.union_with(&self.log());
        Ok(())
    }

    fn clear_dirty(&self, runs: &[Run], _: &mut Vec<u64>) -> Result<(), PortError> {
        let mut log = self.log();
        runs.iter().for_each(|run| log.remove_run(*run));
        Ok(())
    }

    fn pause(&self) -> Result<Paused<'_>, PortError> {
        pause(self)
    }
}

impl Pausable for TestSource {
    fn stop(&self) -> Result<(), PortError> {
        self.runs.store(false, Ordering::SeqCst);
        Ok(())
    }

    fn resume(&self) -> Result<(), PortError> {
        self.runs.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn save(&self, _newest: Option<u32>) -> Result<Vec<u8>, PortError> {
        Ok(STATE.to_vec())
    }

    fn give_away(&self, _: SessionId) -> Result<(), PortError> {
        Ok(())
    }

    fn release(&self) {}
}

/// A destination VM of as many pages; clones share them.
#[derive(Clone, Debug)]
pub struct TestDestination {
    memory: Memory,
    runs: Arc<AtomicBool>,
}

impl TestDestination {
    /// For a guest of so many pages.
    #[must_use]
    pub fn new(pages: usize) -> Self {
        Self {
            memory: Memory::new(pages),
            runs: Arc::default(),
        }
    }

    /// Its memory.
    #[must_use]
    pub const fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Whether the guest runs here.
    #[must_use]
    pub fn runs(&self) -> bool {
        self.runs.load(Ordering::SeqCst)
    }

    /// Pages that were written after the state: they would change a guest that was complete.
    #[must_use]
    pub fn late_writes(&self) -> u64 {
        self.memory.late.load(Ordering::SeqCst)
    }
}

impl<L: Link> PageSink<L> for Memory {
    fn receive(&self, link: &mut L, runs: &[Run]) -> io::Result<()> {
        each(runs).try_for_each(|gfn| link.recv(&mut *self.filled(gfn)))
    }

    fn write(&self, run: Run, bytes: &[u8]) -> Result<(), PortError> {
        for (gfn, page) in (run.first..run.end()).zip(bytes.as_chunks().0) {
            *self.filled(gfn) = *page;
        }
        Ok(())
    }

    fn zero(&self, run: Run) -> Result<(), PortError> {
        each(&[run]).for_each(|gfn| self.filled(gfn).fill(0));
        Ok(())
    }

    fn copy_page(&self, gfn: Gfn, into: &mut Page) -> Result<(), PortError> {
        *into = *self.page(gfn);
        Ok(())
    }
}

impl<L: Link> DestinationVm<L> for TestDestination {
    type Sink = Memory;

    fn prepare(&mut self, layout: &RamLayout, machine: &[u8]) -> Result<Arc<Memory>, PortError> {
        if machine != DESCRIPTION || layout.end() != self.memory.pages() {
            return Err("this destination was made for another guest".into());
        }
        Ok(Arc::new(self.memory.clone()))
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), PortError> {
        if state != STATE {
            return Err("the state arrived damaged".into());
        }
        self.memory.complete.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn run(&mut self) -> Result<Option<Duration>, PortError> {
        self.runs.store(true, Ordering::SeqCst);
        Ok(Some(Duration::ZERO))
    }

    fn discard(&mut self) {}
}
