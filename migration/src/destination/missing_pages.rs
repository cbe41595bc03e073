//! Pages that follow a guest which runs already: what has come, who waits for what.
//!
//! Shared by the control channel, the data channels and the fault channels of a post-copy:
//!
//! ```text
//!  next_fault ─▶ fault ─▶ asked ──▶ PAGE-REQUEST … answer ─▶ place ─┐
//!                                     pushed on other channels ─▶ place ─┴▶ in place, waiters go on
//! ```
//!
//! A page is *expected* until its bytes were received and *missing* until it is in place: the
//! second set is what a source that reconnects is told.

use super::error::DestinationError;
use crate::page::{Gfn, PAGE_SIZE, PageSet, RamLayout, Run};
use crate::port::{Clock, Link, PageFault, PageSink, post_copy};
use crate::report::{Faults, Latencies};
use crate::sync::{lock, wait_while};
use crate::verify::page_hash;
use std::marker::PhantomData;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// What has come, who waits for what.
pub struct MissingPages<L, S> {
    pub(super) layout: RamLayout,
    clock: Arc<dyn Clock + Send + Sync>,
    verify: bool,
    pages: Mutex<Option<Pages<S>>>,
    /// Sets whose memory is there already.
    spares: Mutex<Vec<PageSet>>,
    /// Which of the announced fault channels are connected. Locked before `pages`.
    attached: Mutex<Vec<bool>>,
    change: Condvar,
    link: PhantomData<fn() -> L>,
}

struct Pages<S> {
    sink: Arc<S>,
    /// All that were to follow.
    handed: PageSet,
    expected: PageSet,
    missing: PageSet,
    left: u64,
    /// Pages that are waited for, and since when.
    waiting: Vec<Waiting>,
    latencies: Latencies,
    on_their_way: u64,
    /// Faults whose page was in place when they were received.
    late: u64,
    /// By frame number, with verification only: of a page in place, or what the source says of one
    /// that is not.
    hashes: Vec<u64>,
    /// Pages that were not compared yet, and how many; none without verification.
    uncompared: PageSet,
    left_to_compare: u64,
    /// Those of them whose hash came before the page did: an answer to a fault may still be on its
    /// way.
    told: PageSet,
    different: u64,
    /// Why no more comes: the connection is lost.
    lost: Option<String>,
    /// Counts connections: what an older one still does is ignored.
    era: u64,
    /// The guest has ended: nothing more is needed.
    dismissed: bool,
    over: bool,
}

#[derive(Clone, Copy)]
struct Waiting {
    gfn: Gfn,
    waiter: u32,
    since: Duration,
    /// The source was asked, on this era's connection.
    asked: Option<u64>,
}

/// What is to be done about a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FaultIs {
    /// Ask the source.
    New,
    /// It was asked, or the page is being placed.
    Known,
    /// The page is in place, or holds nothing and never will by itself: zeros are placed where it
    /// is absent.
    Local,
}

impl<L: Link, S: PageSink<L>> MissingPages<L, S> {
    pub(super) fn new(
        layout: RamLayout,
        clock: Arc<dyn Clock + Send + Sync>,
        verify: bool,
        channels: u16,
    ) -> Self {
        Self {
            layout,
            clock,
            verify,
            pages: Mutex::new(None),
            spares: Mutex::new(Vec::new()),
            attached: Mutex::new(vec![false; usize::from(channels)]),
            change: Condvar::new(),
            link: PhantomData,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Pages<S>>> {
        lock(&self.pages)
    }

    fn attached(&self) -> MutexGuard<'_, Vec<bool>> {
        lock(&self.attached)
    }

    /// Takes a fault channel of the present connection; returns the connection's era.
    pub(super) fn attach(&self, index: u16) -> Result<u64, DestinationError> {
        // Held while the era is read: it changes under this lock.
        let mut attached = self.attached();
        match attached.get_mut(usize::from(index)) {
            Some(attached) if !*attached => *attached = true,
            _ => return Err(DestinationError::NotAnnounced { index }),
        }
        Ok(self.lock().as_ref().map_or(0, |p| p.era))
    }

    /// Pages will follow: makes the sets for that, which would take some milliseconds of the pause
    /// of a large guest.
    pub(super) fn prepare(&self) {
        let mut spares = lock(&self.spares);
        if spares.is_empty() {
            spares.resize_with(3, || self.layout.all());
        }
    }

    /// From now on these pages are expected.
    pub(super) fn begin(&self, sink: Arc<S>, missing: &PageSet) {
        let mut spares = std::mem::take(&mut *lock(&self.spares));
        let mut copy = || match spares.pop() {
            Some(mut spare) => {
                spare.clone_from(missing);
                spare
            }
            None => missing.clone(),
        };
        let hashes = if self.verify {
            vec![0; usize::try_from(self.layout.end()).unwrap_or(0)]
        } else {
            Vec::new()
        };
        let none = || PageSet::new(self.layout.end());
        let uncompared = if self.verify { missing.clone() } else { none() };
        *self.lock() = Some(Pages {
            sink,
            handed: copy(),
            expected: copy(),
            left: missing.len(),
            missing: copy(),
            waiting: Vec::new(),
            latencies: Latencies::default(),
            on_their_way: 0,
            late: 0,
            hashes,
            left_to_compare: uncompared.len(),
            uncompared,
            told: none(),
            different: 0,
            lost: None,
            era: 0,
            dismissed: false,
            over: false,
        });
        self.change.notify_all();
    }

    /// Waits until pages are expected; `None` when that does not happen in time.
    pub(crate) fn wait_begun(&self, timeout: Duration) -> Option<Arc<S>> {
        let (guard, _) = wait_while(&self.change, self.lock(), Some(timeout), |pages| {
            pages.is_none()
        });
        guard.as_ref().map(|p| Arc::clone(&p.sink))
    }

    /// Whether channels of this era have nothing more to do.
    pub(crate) fn ended(&self, era: u64) -> bool {
        self.lock()
            .as_ref()
            .is_none_or(|p| p.over || p.lost.is_some() || p.era != era)
    }

    /// Pages that are not in place.
    pub fn left(&self) -> u64 {
        self.lock().as_ref().map_or(0, |p| p.left)
    }

    /// How many waits for a page have not ended.
    pub fn waiting(&self) -> usize {
        self.lock().as_ref().map_or(0, |p| p.waiting.len())
    }

    /// What the faults were like so far.
    pub fn faults(&self) -> Faults {
        let pages = self.lock();
        pages.as_ref().map_or_else(Faults::default, |pages| Faults {
            on_their_way: pages.on_their_way,
            ..pages.latencies.faults()
        })
    }

    /// The pages that are not in place.
    pub(super) fn missing(&self) -> PageSet {
        let end = self.layout.end();
        self.lock()
            .as_ref()
            .map_or_else(|| PageSet::new(end), |p| p.missing.clone())
    }

    /// The connection is lost: its channels end, waiters wait.
    pub fn lose(&self, why: &str) {
        if let Some(pages) = self.lock().as_mut() {
            pages.lost.get_or_insert_with(|| why.to_owned());
        }
        self.change.notify_all();
    }

    /// Why, when it is.
    pub fn lost(&self) -> Option<String> {
        self.lock().as_ref().and_then(|p| p.lost.clone())
    }

    /// Whether the connection of this era is lost and no other has come.
    pub(super) fn is_lost(&self, era: u64) -> bool {
        self.lock()
            .as_ref()
            .is_some_and(|p| !p.over && p.lost.is_some() && p.era == era)
    }

    /// A new connection: what is missing comes on it, and its fault channels are others.
    pub(super) fn reconnect(&self) {
        let mut attached = self.attached();
        attached.fill(false);
        if let Some(pages) = self.lock().as_mut() {
            pages.lost = None;
            pages.era += 1;
            pages.expected = pages.missing.clone();
        }
        self.change.notify_all();
    }

    /// Every page is in place, or the guest is gone.
    pub(super) fn end(&self) {
        if let Some(pages) = self.lock().as_mut() {
            pages.over = true;
        }
        self.change.notify_all();
    }

    /// The guest has ended: what has not come is not needed, and the source is told so.
    pub fn dismiss(&self) {
        if let Some(pages) = self.lock().as_mut() {
            pages.dismissed = true;
        }
    }

    /// Whether the source was told that every page is in place or not needed, or need not be.
    pub fn is_over(&self) -> bool {
        self.lock()
            .as_ref()
            .is_none_or(|pages| pages.over || pages.lost.is_some())
    }

    pub(super) fn is_dismissed(&self) -> bool {
        self.lock().as_ref().is_some_and(|pages| pages.dismissed)
    }

    /// A thread waits for a page, as a fault channel of this era has received. One whose connection
    /// is lost cannot ask: it leaves that to the next.
    pub(super) fn fault(&self, fault: PageFault, era: u64) -> FaultIs {
        let gfn = fault.gfn;
        let now = self.clock.now();
        let mut guard = self.lock();
        let Some(pages) = guard.as_mut() else {
            return FaultIs::Known;
        };
        if !pages.missing.contains(gfn) {
            pages.late += u64::from(pages.handed.contains(gfn));
            return FaultIs::Local;
        }
        let waiting = || pages.waiting.iter().filter(|w| w.gfn == gfn);
        if waiting().any(|w| w.waiter == fault.waiter) {
            // The same thread looked again: a signal makes it.
            return FaultIs::Known;
        }
        let known = waiting().any(|w| w.asked.is_some());
        let expected = pages.expected.contains(gfn);
        let ask = !known && expected && era == pages.era && pages.lost.is_none();
        if known || !expected {
            pages.on_their_way += 1;
        }
        pages.waiting.push(Waiting {
            gfn,
            waiter: fault.waiter,
            since: now,
            asked: ask.then_some(pages.era),
        });
        if ask { FaultIs::New } else { FaultIs::Known }
    }

    /// Whether a new connection has to ask for something again.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn has_unasked(&self) -> bool {
        let guard = self.lock();
        guard
            .as_ref()
            .is_some_and(|p| p.era > 0 && p.waiting.iter().any(|w| w.asked != Some(p.era)))
    }

    /// A page that is waited for since before this connection: it has to be requested again.
    pub(super) fn next_unasked(&self, era: u64) -> Option<Gfn> {
        let mut guard = self.lock();
        let pages = guard.as_mut().filter(|p| p.era == era && era > 0)?;
        let waiting = pages.waiting.iter_mut().find(|w| w.asked != Some(era))?;
        waiting.asked = Some(era);
        Some(waiting.gfn)
    }

    /// The source says that what was asked for had left before.
    pub(super) fn on_its_way(&self) {
        if let Some(pages) = self.lock().as_mut() {
            pages.on_their_way += 1;
        }
    }

    /// Puts received pages in place: `bytes` are theirs, or they are zero.
    pub(super) fn place(&self, runs: &[Run], bytes: Option<&[u8]>) -> Result<(), DestinationError> {
        let sink = self.receive(runs)?;
        let memory = post_copy(&*sink).map_err(|error| {
            self.give_back(runs);
            DestinationError::Memory(error)
        })?;
        let mut rest = bytes.unwrap_or_default();
        let mut hashes = Vec::new();
        for (at, run) in runs.iter().enumerate() {
            let length = usize::try_from(run.bytes()).unwrap_or(usize::MAX);
            let body = rest.split_at_checked(length);
            if self.verify {
                hashes.clear();
                hash_run(*run, body.map(|(body, _)| body), &mut hashes);
            }
            let placed = match body {
                Some((body, more)) => {
                    rest = more;
                    memory.place(*run, body)
                }
                None => memory.place_zero(*run),
            };
            if let Err(error) = placed {
                // Not in place: the source has to send them again.
                self.give_back(&runs[at..]);
                return Err(DestinationError::Memory(error));
            }
            self.placed(*run, &hashes);
        }
        Ok(())
    }

    /// Takes pages off the expected ones; each comes once.
    fn receive(&self, runs: &[Run]) -> Result<Arc<S>, DestinationError> {
        let mut guard = self.lock();
        let pages = guard.as_mut().ok_or(DestinationError::NotPostCopy)?;
        for (at, run) in runs.iter().enumerate() {
            if let Some(gfn) = (run.first..run.end()).find(|gfn| !pages.expected.contains(*gfn)) {
                for run in &runs[..at] {
                    pages.expected.insert_run(*run);
                }
                return Err(DestinationError::Duplicate { gfn });
            }
            pages.expected.remove_run(*run);
        }
        Ok(Arc::clone(&pages.sink))
    }

    fn give_back(&self, runs: &[Run]) {
        if let Some(pages) = self.lock().as_mut() {
            for run in runs {
                pages.expected.insert_run(*run);
            }
        }
    }

    fn placed(&self, run: Run, hashes: &[u64]) {
        let now = self.clock.now();
        let mut guard = self.lock();
        let Some(pages) = guard.as_mut() else { return };
        // A page of a connection that was lost meanwhile may be placed twice; it is the same page.
        let new = (run.first..run.end()).filter(|gfn| pages.missing.remove(*gfn));
        pages.left -= new.count() as u64;
        for (gfn, hash) in (run.first..run.end()).zip(hashes) {
            if pages.told.remove(gfn) {
                pages.compare(gfn, *hash);
            } else {
                pages.keep_hash(gfn, *hash);
            }
        }
        let latencies = &mut pages.latencies;
        pages.waiting.retain(|waiting| {
            let here = waiting.gfn >= run.first && waiting.gfn < run.end();
            if here {
                latencies.record(now.saturating_sub(waiting.since));
            }
            !here
        });
    }

    /// Where the pages go.
    pub(super) fn sink(&self) -> Result<Arc<S>, DestinationError> {
        let guard = self.lock();
        let pages = guard.as_ref().ok_or(DestinationError::NotPostCopy)?;
        Ok(Arc::clone(&pages.sink))
    }

    /// Compares the source's hash of a page with what was placed; pages that were there before the
    /// guest moved were compared then.
    pub(super) fn compare(&self, gfn: Gfn, hash: [u8; 8]) {
        let mut guard = self.lock();
        let Some(pages) = guard.as_mut() else { return };
        if !pages.uncompared.contains(gfn) {
            return;
        }
        let hash = u64::from_le_bytes(hash);
        if pages.missing.contains(gfn) {
            pages.told.insert(gfn);
            pages.keep_hash(gfn, hash);
        } else {
            pages.compare(gfn, hash);
        }
    }

    /// Whether all is there and, where that is wanted, compared.
    pub(super) fn is_complete(&self) -> bool {
        self.lock().as_ref().is_some_and(Pages::is_complete)
    }

    /// Once it is: what the faults were like, and how many pages differ.
    pub(super) fn complete(&self) -> Option<(Faults, u64)> {
        let guard = self.lock();
        let pages = guard.as_ref().filter(|pages| pages.is_complete())?;
        let measured = pages.latencies.faults();
        let faults = Faults {
            count: measured.count + pages.late,
            on_their_way: pages.on_their_way + pages.late,
            ..measured
        };
        Some((faults, pages.different))
    }
}

impl<S> Pages<S> {
    const fn is_complete(&self) -> bool {
        self.dismissed || self.left == 0 && self.left_to_compare == 0
    }

    fn hash(&mut self, gfn: Gfn) -> Option<&mut u64> {
        let at = usize::try_from(gfn).ok()?;
        self.hashes.get_mut(at)
    }

    fn keep_hash(&mut self, gfn: Gfn, hash: u64) {
        if let Some(slot) = self.hash(gfn) {
            *slot = hash;
        }
    }

    /// Compares a hash with the one that was kept.
    fn compare(&mut self, gfn: Gfn, hash: u64) {
        let same = self.hash(gfn).is_some_and(|kept| *kept == hash);
        self.different += u64::from(!same);
        self.left_to_compare -= u64::from(self.uncompared.remove(gfn));
    }
}

/// Hashes of the pages of a run, from its bytes or of zeros.
fn hash_run(run: Run, body: Option<&[u8]>, into: &mut Vec<u64>) {
    const ZEROS: [u8; PAGE_SIZE] = [0; PAGE_SIZE];
    match body {
        Some(body) => {
            let pages = (run.first..).zip(body.as_chunks::<PAGE_SIZE>().0);
            into.extend(pages.map(|(gfn, page)| page_hash(gfn, page)));
        }
        None => into.extend((run.first..run.end()).map(|gfn| page_hash(gfn, &ZEROS))),
    }
}

#[cfg(test)]
mod tests;
