//! Post-copy with [`Options::free_source`](crate::options::Options::free_source): memory is given
//! back to the source's host while the rest follows the guest, so that it is there once and not
//! twice (Kothari: "duplication is not desirable").
//!
//! ```text
//! sent ──▶ confirmed: PLACED, or the next request on the same fault channel ──▶ all of its piece? ──▶ freed
//! ```
//!
//! The destination runs the guest and has said that these pages are in place. The source's copy is
//! of no more use: a guest that runs elsewhere does not run here again, and what a recovery sends is
//! what the destination lacks.

use crate::page::{PAGE_SIZE, PageSet, RamLayout, Run};
use crate::port::{FreeMemory, FreedPages, Link, PageSource, PortError};
use crate::report::Freed;
use crate::verify::page_hash;
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What follows the guest, piece by piece.
pub(super) struct Freeing<'a> {
    memory: &'a dyn FreeMemory,
    layout: &'a RamLayout,
    /// Pages of a piece.
    piece: u64,
    /// Hashes are sent after the pages.
    verify: bool,
    pieces: Mutex<Pieces>,
}

struct Pieces {
    all: Vec<Piece>,
    /// Those of which the destination has everything, to be given back.
    ready: VecDeque<usize>,
    /// Pages that both hosts hold, and the most that there were.
    twice: u64,
    most: u64,
    freed: u64,
    /// The host did not take a piece: it keeps the rest as well.
    failed: bool,
}

#[derive(Clone, Copy, Default)]
struct Piece {
    /// Pages that the destination is not known to have.
    unconfirmed: u64,
    /// Pages that it has, or was sent, and that hold something here.
    twice: u64,
}

impl<'a> Freeing<'a> {
    /// Of a guest that lacks these pages at the destination.
    pub(super) fn new<L: Link, G: PageSource<L>>(
        memory: &'a dyn FreeMemory,
        guest: &G,
        layout: &'a RamLayout,
        missing: &PageSet,
        verify: bool,
    ) -> Self {
        let piece = memory.piece().max(1);
        let count = usize::try_from(layout.end().div_ceil(piece)).unwrap_or(0);
        let mut pieces = Pieces {
            all: vec![Piece::default(); count],
            ready: VecDeque::new(),
            twice: 0,
            most: 0,
            freed: 0,
            failed: false,
        };
        let freed = lock(memory.freed());
        for region in layout.runs() {
            let mut first = region.first;
            while first < region.end() {
                let at = first / piece;
                let end = region.end().min((at + 1) * piece);
                let part = Run::new(first, end - first);
                let Some(piece) = index(at).and_then(|at| pieces.all.get_mut(at)) else {
                    break;
                };
                let lacks = missing.count_in(part);
                piece.unconfirmed += lacks;
                if !freed.contains(first) {
                    piece.twice += part.count - lacks - empty(guest, part, missing);
                }
                first = end;
            }
        }
        for (at, piece) in pieces.all.iter().enumerate() {
            pieces.twice += piece.twice;
            if piece.unconfirmed == 0 && piece.twice > 0 {
                pieces.ready.push_back(at);
            }
        }
        pieces.most = pieces.twice;
        drop(freed);
        Self {
            memory,
            layout,
            piece,
            verify,
            pieces: Mutex::new(pieces),
        }
    }

    fn pieces(&self) -> MutexGuard<'_, Pieces> {
        lock(&self.pieces)
    }

    /// These pages were sent.
    pub(super) fn sent(&self, runs: &[Run]) {
        let mut pieces = self.pieces();
        self.each_part(runs, |at, pages| {
            if let Some(piece) = pieces.all.get_mut(at) {
                piece.twice += pages;
                pieces.twice += pages;
            }
        });
        pieces.most = pieces.most.max(pieces.twice);
    }

    /// The destination has these pages.
    pub(super) fn confirmed(&self, runs: &[Run]) {
        let mut pieces = self.pieces();
        self.each_part(runs, |at, pages| {
            if let Some(piece) = pieces.all.get_mut(at) {
                piece.unconfirmed = piece.unconfirmed.saturating_sub(pages);
                if piece.unconfirmed == 0 {
                    pieces.ready.push_back(at);
                }
            }
        });
    }

    /// Calls with each piece that the runs lie in, and how many of their pages do.
    fn each_part(&self, runs: &[Run], mut part: impl FnMut(usize, u64)) {
        for run in runs {
            let mut first = run.first;
            while first < run.end() {
                let at = first / self.piece;
                let end = run.end().min((at + 1) * self.piece);
                if let Some(at) = index(at) {
                    part(at, end - first);
                }
                first = end;
            }
        }
    }

    /// Gives a piece back, if there is one that the destination has.
    pub(super) fn free_one<L: Link, G: PageSource<L>>(&self, guest: &G) {
        let at = {
            let mut pieces = self.pieces();
            if pieces.failed {
                return;
            }
            pieces.ready.pop_front()
        };
        let Some(at) = at else { return };
        let first = at as u64 * self.piece;
        let whole = Run::new(first, self.piece);
        for region in self.layout.runs() {
            let part = Run::new(
                region.first.max(whole.first),
                region
                    .end()
                    .min(whole.end())
                    .saturating_sub(region.first.max(whole.first)),
            );
            if part.count == 0 {
                continue;
            }
            if let Err(error) = self.free(guest, part) {
                tracing::warn!(%error, "memory of the guest that has left is not given back to this host before the end");
                self.pieces().failed = true;
                return;
            }
        }
        let mut pieces = self.pieces();
        if let Some(piece) = pieces.all.get_mut(at) {
            let pages = std::mem::take(&mut piece.twice);
            pieces.twice -= pages;
            pieces.freed += pages;
        }
    }

    fn free<L: Link, G: PageSource<L>>(&self, guest: &G, part: Run) -> Result<(), PortError> {
        let end = self.layout.end();
        if self.verify {
            let mut page = [0; PAGE_SIZE];
            let mut hashes = Vec::new();
            for gfn in part.first..part.end() {
                guest.copy_page(gfn, &mut page)?;
                hashes.push(page_hash(gfn, &page));
            }
            lock(self.memory.freed()).keep_hashes(part, &hashes, end);
        }
        // Known before it is so: what is half given back must not be sent any more.
        lock(self.memory.freed()).insert(part, end);
        self.memory.free(part)
    }

    /// What came of it.
    pub(super) fn report(&self) -> Freed {
        let pieces = self.pieces();
        Freed {
            bytes: pieces.freed * PAGE_SIZE as u64,
            twice_bytes: pieces.most * PAGE_SIZE as u64,
        }
    }
}

/// How many pages of the run hold nothing here and are not missing there.
fn empty<L: Link, G: PageSource<L>>(guest: &G, run: Run, missing: &PageSet) -> u64 {
    let (mut at, mut pages) = (run.first, 0);
    while let Some(hole) = guest.unpopulated(Run::new(at, run.end() - at)) {
        let hole = Run::new(hole.first, hole.end().min(run.end()) - hole.first);
        pages += hole.count - missing.count_in(hole);
        at = hole.end();
        if at >= run.end() {
            break;
        }
    }
    pages
}

fn index(piece: u64) -> Option<usize> {
    usize::try_from(piece).ok()
}

/// What was given back, or what of it is known after a panic.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What of this memory was given back.
pub(super) fn freed(memory: Option<&dyn FreeMemory>) -> Option<MutexGuard<'_, FreedPages>> {
    memory.map(|memory| lock(memory.freed()))
}
