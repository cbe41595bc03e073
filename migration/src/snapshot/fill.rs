//! Filling a guest's memory from a snapshot: all at once, or on demand while the guest runs.
//!
//! ```text
//!                     next_fault                         claim            read, check, decode
//!  page is touched ─────────────▶ in no frame ─▶ zeros     ┌────▶ frame ─────────────────────▶ place: those who
//!                                 not claimed ─────────────┤                                   wait go on
//!                                 claimed: its frame is on its way
//!  push: bubbles around the faults ────────────────────────┘
//! ```
//!
//! A frame is *claimed* by one thread, which places all of its pages; a page is *missing* until it
//! is in place. So each frame is read once and each page placed once, and zeros are never put where
//! contents are on their way.

use super::{Block, BlockReader, ReadAt, Snapshot, SnapshotError};
use crate::order::{Push, PushOrder};
use crate::page::{Gfn, PAGE_SIZE, PageSet, Run};
use crate::port::{Clock, Link, PageFault, PageSink, post_copy};
use crate::report::{Faults, Latencies};
use crate::sync::lock;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

/// How often a thread without faults looks whether it is over.
const TICK: Duration = Duration::from_millis(100);
/// Pages that the push asks for at once.
const PUSH_PAGES: u64 = super::BLOCK_PAGES;
/// Fault streams that are bubbled around.
const PIVOTS: usize = 8;

/// Writes all pages of a snapshot into memory that is not used yet, unless `cancelled` says so
/// meanwhile; returns the bytes that were read.
///
/// # Errors
/// [`SnapshotError`]; the memory is then worth nothing.
pub fn fill_all<L: Link, S: PageSink<L>, F: ReadAt>(
    snapshot: &Snapshot<F>,
    sink: &S,
    threads: u16,
    cancelled: &(dyn Fn() -> bool + Sync),
) -> Result<u64, SnapshotError> {
    let frames = Mutex::new(snapshot.frames());
    let failed = AtomicBool::new(false);
    let read = AtomicU64::new(0);
    let work = || {
        let mut reader = BlockReader::default();
        while !failed.load(Ordering::Relaxed) {
            let next = lock(&frames).next();
            let Some(frame) = next else { break };
            if cancelled() {
                return Err(SnapshotError::Cancelled);
            }
            let block = reader.read(snapshot, frame)?;
            for (run, bytes) in block.pieces() {
                sink.write(run, bytes)
                    .map_err(|source| SnapshotError::Place {
                        gfn: run.first,
                        source,
                    })?;
            }
            read.fetch_add(block.read, Ordering::Relaxed);
        }
        Ok(())
    };
    let work = || {
        let result = work();
        if result.is_err() {
            failed.store(true, Ordering::Relaxed);
        }
        result
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (1..threads.clamp(1, 64))
            // Fewer threads than there might be: the others do their part.
            .map_while(|_| std::thread::Builder::new().spawn_scoped(scope, work).ok())
            .collect();
        let mut result = work();
        for thread in threads {
            // A thread that panicked has filled what it says it has not.
            result = result.and(thread.join().unwrap_or(Err(SnapshotError::Cancelled)));
        }
        result
    })?;
    Ok(read.into_inner())
}

/// What an on-demand restore did.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Filled {
    /// Pages that were placed.
    pub pages: u64,
    /// Bytes that were read of the file for them.
    pub bytes: u64,
    /// Faults on pages that had contents.
    pub faults: Faults,
    /// Faults on pages without.
    pub zero_faults: u64,
}

/// A running guest's memory, being read from a snapshot.
pub struct Filling<L, S, F> {
    snapshot: Snapshot<F>,
    sink: Arc<S>,
    clock: Arc<dyn Clock + Send + Sync>,
    pages: Mutex<Pages>,
    link: PhantomData<fn() -> L>,
}

struct Pages {
    /// Pages whose frame no thread reads yet.
    unclaimed: PageSet,
    /// Pages that are not in place.
    missing: PageSet,
    left: u64,
    push: Push,
    /// Who waits for which page, and since when.
    waiting: Vec<(Gfn, u32, Duration)>,
    latencies: Latencies,
    filled: Filled,
    failed: Option<String>,
    /// The guest has ended: nothing more is needed.
    dismissed: bool,
}

/// What is to be done about a fault.
enum FaultIs {
    /// Read this frame.
    Claimed(u64),
    /// It is being read.
    Known,
    /// There is nothing in it, or it is in place.
    Empty,
}

impl<L: Link, S: PageSink<L>, F: ReadAt> Filling<L, S, F> {
    /// All pages are missing. `sink` places pages; the guest may run as soon as there are threads
    /// in [`serve`](Self::serve).
    pub fn new(snapshot: Snapshot<F>, sink: Arc<S>, clock: Arc<dyn Clock + Send + Sync>) -> Self {
        let missing = snapshot.data();
        let pages = Pages {
            left: missing.len(),
            unclaimed: missing.clone(),
            missing,
            push: Push::new(PushOrder::Bubble, PIVOTS),
            waiting: Vec::new(),
            latencies: Latencies::default(),
            filled: Filled::default(),
            failed: None,
            dismissed: false,
        };
        Self {
            snapshot,
            sink,
            clock,
            pages: Mutex::new(pages),
            link: PhantomData,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Pages> {
        lock(&self.pages)
    }

    /// Pages that are not in place.
    pub fn left(&self) -> u64 {
        self.lock().left
    }

    /// How many waits for a page are under way.
    pub fn waiting(&self) -> usize {
        self.lock().waiting.len()
    }

    /// Why the rest cannot be had, when that is so.
    pub fn failed(&self) -> Option<String> {
        self.lock().failed.clone()
    }

    /// The rest cannot be had, for this reason: the threads end.
    pub fn fail(&self, why: &str) {
        self.lock().failed.get_or_insert_with(|| why.to_owned());
    }

    /// The guest has ended: the threads end.
    pub fn dismiss(&self) {
        self.lock().dismissed = true;
    }

    /// What was done so far.
    pub fn filled(&self) -> Filled {
        let pages = self.lock();
        Filled {
            faults: pages.latencies.faults(),
            ..pages.filled.clone()
        }
    }

    /// Whether there is nothing more to do.
    pub fn is_over(&self) -> bool {
        let pages = self.lock();
        pages.left == 0 || pages.dismissed || pages.failed.is_some()
    }

    /// Serves page faults until every page is in place: the work of one thread, of which there
    /// should be as many as the guest has processors.
    ///
    /// # Errors
    /// [`SnapshotError`]: the guest must not run on, for it would wait for ever. The other threads
    /// end too.
    pub fn serve(&self) -> Result<(), SnapshotError> {
        let mut reader = BlockReader::default();
        while !self.is_over() {
            let fault = post_copy(&*self.sink).and_then(|memory| memory.next_fault(TICK));
            let fault = fault.map_err(|source| SnapshotError::Place { gfn: 0, source });
            let done = match fault {
                Ok(Some(fault)) => self.fault(fault, &mut reader),
                Ok(None) => Ok(()),
                Err(error) => Err(error),
            };
            self.noting(done)?;
        }
        Ok(())
    }

    /// Reads what is not waited for yet, the neighbourhood of the faults first, until every page is
    /// claimed: the work of one thread.
    ///
    /// # Errors
    /// As [`serve`](Self::serve).
    pub fn push(&self) -> Result<(), SnapshotError> {
        let mut reader = BlockReader::default();
        while let Some((gfn, frame)) = self.next_push() {
            let done = self.read(frame, gfn, &mut reader);
            self.noting(done)?;
        }
        Ok(())
    }

    /// An error ends all threads.
    fn noting(&self, result: Result<(), SnapshotError>) -> Result<(), SnapshotError> {
        if let Err(error) = &result {
            self.fail(&error.to_string());
        }
        result
    }

    fn next_push(&self) -> Option<(Gfn, u64)> {
        let mut guard = self.lock();
        let pages = &mut *guard;
        if pages.dismissed || pages.failed.is_some() {
            return None;
        }
        let run = pages.push.next(&pages.unclaimed, PUSH_PAGES)?;
        let frame = self.snapshot.frame_of(run.first)?;
        self.claim(pages, frame);
        Some((run.first, frame))
    }

    fn claim(&self, pages: &mut Pages, frame: u64) {
        for run in self.snapshot.pages_of(frame) {
            pages.unclaimed.remove_run(run);
        }
    }

    /// One fault. For those who drive a filling without threads.
    ///
    /// # Errors
    /// As [`serve`](Self::serve).
    pub fn fault(&self, fault: PageFault, reader: &mut BlockReader) -> Result<(), SnapshotError> {
        match self.note_fault(fault) {
            FaultIs::Claimed(frame) => self.read(frame, fault.gfn, reader),
            FaultIs::Known => Ok(()),
            FaultIs::Empty => post_copy(&*self.sink)
                .and_then(|memory| memory.place_zero(Run::new(fault.gfn, 1)))
                .map_err(|source| SnapshotError::Place {
                    gfn: fault.gfn,
                    source,
                }),
        }
    }

    fn note_fault(&self, PageFault { gfn, waiter }: PageFault) -> FaultIs {
        let now = self.clock.now();
        let mut guard = self.lock();
        let pages = &mut *guard;
        if !pages.missing.contains(gfn) {
            pages.filled.zero_faults += u64::from(self.snapshot.frame_of(gfn).is_none());
            return FaultIs::Empty;
        }
        // A thread that looks again waits since it looked first.
        if !pages.waiting.iter().any(|w| (w.0, w.1) == (gfn, waiter)) {
            pages.waiting.push((gfn, waiter, now));
        }
        pages.push.fault(gfn);
        match self.snapshot.frame_of(gfn) {
            Some(frame) if pages.unclaimed.contains(gfn) => {
                self.claim(pages, frame);
                FaultIs::Claimed(frame)
            }
            _ => FaultIs::Known,
        }
    }

    /// Reads a frame and places its pages, the one at `first` before the others.
    fn read(&self, frame: u64, first: Gfn, reader: &mut BlockReader) -> Result<(), SnapshotError> {
        let block = reader.read(&self.snapshot, frame)?;
        let one = block.pieces().find_map(|(run, bytes)| {
            let at = usize::try_from(first.checked_sub(run.first)?).ok()? * PAGE_SIZE;
            (first < run.end()).then_some(())?;
            bytes.get(at..at + PAGE_SIZE)
        });
        if let Some(page) = one {
            // Who waits for it need not wait for the others.
            self.place(Run::new(first, 1), page)?;
            self.lock().arrived(Run::new(first, 1), self.clock.now());
        }
        let mut placed = 0;
        for (run, bytes) in block.pieces() {
            self.place(run, bytes)?;
            self.lock().arrived(run, self.clock.now());
            placed += run.count;
        }
        self.count(&block, placed);
        Ok(())
    }

    fn count(&self, block: &Block<'_>, placed: u64) {
        let mut pages = self.lock();
        pages.filled.pages += placed;
        pages.filled.bytes += block.read;
        // Only now: who sees that nothing is left sees the counts of all.
        pages.left = pages.left.saturating_sub(placed);
    }

    /// A page that is there keeps what it has: the guest may have written to it since.
    fn place(&self, run: Run, bytes: &[u8]) -> Result<(), SnapshotError> {
        post_copy(&*self.sink)
            .and_then(|memory| memory.place(run, bytes))
            .map_err(|source| SnapshotError::Place {
                gfn: run.first,
                source,
            })
    }
}

impl Pages {
    fn arrived(&mut self, run: Run, now: Duration) {
        self.missing.remove_run(run);
        let latencies = &mut self.latencies;
        self.waiting.retain(|(gfn, _, since)| {
            let came = (run.first..run.end()).contains(gfn);
            if came {
                latencies.record(now.saturating_sub(*since));
            }
            !came
        });
    }
}
