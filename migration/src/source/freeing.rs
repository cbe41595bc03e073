//! Post-copy with [`Options::free_source`](crate::options::Options::free_source): memory is given
//! back to the source's host while the rest follows the guest, so that it is there once and not
//! twice (Kothari: "duplication is not desirable").
//!
//! ```text
//! sent ──▶ confirmed ──▶ all of its piece? ──▶ freed
//!             └ PLACED, or the next request on the same fault channel
//! ```
//!
//! The destination runs the guest and has said that these pages are in place. The source's copy is
//! of no more use: a guest that runs elsewhere does not run here again, and a recovery sends what
//! is missing at the destination.

use crate::page::{PAGE_SIZE, PageSet, RamLayout, Run};
use crate::port::{FreeMemory, FreedPages, Link, PageSource, PortError, holes};
use crate::report::Freed;
use crate::sync::lock;
use crate::verify::page_hash;
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};

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
    /// What the destination has from the start, until that is [counted](Freeing::begin).
    there: Option<PageSet>,
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
    unacknowledged: u64,
    /// Pages that it has, or was sent, and that hold something here.
    twice: u64,
}

impl Pieces {
    /// Pages of a piece are on both hosts, or may be.
    fn add(&mut self, at: usize, pages: u64) {
        if let Some(piece) = self.all.get_mut(at) {
            piece.twice += pages;
            self.twice += pages;
            self.most = self.most.max(self.twice);
        }
    }
}

impl<'a> Freeing<'a> {
    /// Of a guest at whose destination these pages are missing. The guest may stand still
    /// meanwhile.
    pub(super) fn new(
        memory: &'a dyn FreeMemory,
        layout: &'a RamLayout,
        missing: &PageSet,
        verify: bool,
    ) -> Self {
        let piece = memory.piece().max(1);
        let count = usize::try_from(layout.end().div_ceil(piece)).unwrap_or(0);
        let mut all = vec![Piece::default(); count];
        let mut there = layout.all();
        there.subtract(missing);
        for (at, part) in layout.runs().iter().flat_map(|run| parts(*run, piece)) {
            if let Some(piece) = all.get_mut(at) {
                piece.unacknowledged += part.count - there.count_in(part);
            }
        }
        let ready = (0..count)
            .filter(|at| all[*at].unacknowledged == 0)
            .collect();
        Self {
            memory,
            layout,
            piece,
            verify,
            pieces: Mutex::new(Pieces {
                all,
                ready,
                there: Some(there),
                twice: 0,
                most: 0,
                freed: 0,
                failed: false,
            }),
        }
    }

    /// The guest runs at the destination: counts what that has already and what of it holds
    /// something here, which takes a look at all memory.
    pub(super) fn begin<L: Link, G: PageSource<L>>(&self, guest: &G) {
        let Some(there) = lock(&self.pieces).there.take() else {
            return;
        };
        for (at, part) in self.parts_of(self.layout.runs()) {
            let pages = there.count_in(part);
            if pages == 0 || lock(self.memory.freed()).contains(part.first) {
                continue;
            }
            let empty: u64 = holes(guest, part).map(|hole| there.count_in(hole)).sum();
            lock(&self.pieces).add(at, pages - empty);
        }
    }

    /// These pages were sent.
    pub(super) fn sent(&self, runs: &[Run]) {
        let mut pieces = lock(&self.pieces);
        for (at, part) in self.parts_of(runs) {
            pieces.add(at, part.count);
        }
    }

    /// The destination has these pages.
    pub(super) fn confirmed(&self, runs: &[Run]) {
        let mut pieces = lock(&self.pieces);
        for (at, part) in self.parts_of(runs) {
            if let Some(piece) = pieces.all.get_mut(at) {
                piece.unacknowledged = piece.unacknowledged.saturating_sub(part.count);
                if piece.unacknowledged == 0 {
                    pieces.ready.push_back(at);
                }
            }
        }
    }

    fn parts_of<'r>(&self, runs: &'r [Run]) -> impl Iterator<Item = (usize, Run)> + use<'r> {
        let piece = self.piece;
        runs.iter().flat_map(move |run| parts(*run, piece))
    }

    /// The next piece that the destination has, and that holds something here.
    fn next(&self) -> Option<usize> {
        let mut pieces = lock(&self.pieces);
        while !pieces.failed {
            let at = pieces.ready.pop_front()?;
            if pieces.all.get(at).is_some_and(|piece| piece.twice > 0) {
                return Some(at);
            }
        }
        None
    }

    /// Gives a piece back, if there is one that the destination has.
    pub(super) fn free_one<L: Link, G: PageSource<L>>(&self, guest: &G) {
        let Some(at) = self.next() else { return };
        let whole = Run::new(at as u64 * self.piece, self.piece);
        let regions = self.layout.runs().iter();
        for part in regions.filter_map(|region| region.overlap(whole)) {
            if let Err(error) = self.free(guest, part) {
                tracing::warn!(%error, "memory of the guest that has left is not given back to this host before the end");
                lock(&self.pieces).failed = true;
                return;
            }
        }
        let mut pieces = lock(&self.pieces);
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
        let pieces = lock(&self.pieces);
        Freed {
            bytes: pieces.freed * PAGE_SIZE as u64,
            twice_bytes: pieces.most * PAGE_SIZE as u64,
        }
    }
}

/// The parts of a run by the pieces that they lie in.
fn parts(run: Run, piece: u64) -> impl Iterator<Item = (usize, Run)> {
    let mut first = run.first;
    std::iter::from_fn(move || {
        let at = first / piece;
        let end = run.end().min((at + 1) * piece);
        let part = Run::new(first, end.checked_sub(first).filter(|count| *count > 0)?);
        first = end;
        Some((usize::try_from(at).ok()?, part))
    })
}

/// What of this memory was given back.
pub(super) fn freed(memory: Option<&dyn FreeMemory>) -> Option<MutexGuard<'_, FreedPages>> {
    memory.map(|memory| lock(memory.freed()))
}
