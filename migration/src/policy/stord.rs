//! STORD: split transfer omitting redundant dirty pages (Cha, Shin and Kim 2014).
//!
//! The set to send is split into *k* pieces. Round *i* sends piece *i* and the pages that are at
//! the destination already and were dirtied since; a page that is dirty but lies in a piece that is
//! still to come is omitted: it crosses once, with its piece. After the last piece the dirty set
//! becomes the new set and is split again.
//!
//! The paper's line 17 intersects with what the *previous* round sent. Read literally, a page that
//! was sent in round 1 and dirtied in round 3 is forgotten. Here everything that is pending and not
//! in a later piece is sent, which is what the paper's prose describes, and loses nothing.

use super::limits::Limits;
use super::{Decision, Policy, SendOrder, View};
use crate::options::Options;
use crate::page::PageSet;

/// Split transfer omitting redundant dirty pages.
#[derive(Debug)]
pub struct Stord {
    limits: Limits,
    order: SendOrder,
    split: u32,
    /// The pieces of the current set that are still to be sent, the next one last.
    pieces: Vec<PageSet>,
}

impl Stord {
    /// With the split and the limits of the options.
    #[must_use]
    pub const fn new(options: &Options) -> Self {
        Self {
            limits: Limits::new(options, options.split),
            order: SendOrder::from_options(options),
            split: options.split,
            pieces: Vec::new(),
        }
    }

    /// Splits a set into pieces of equal size, by address.
    pub(crate) fn split(set: &PageSet, pieces: u32) -> Vec<PageSet> {
        let size = set.len().div_ceil(u64::from(pieces.max(1))).max(1);
        let mut list = Vec::new();
        let mut at = 0;
        loop {
            let mut piece = PageSet::new(set.end());
            let mut room = size;
            while let Some(run) = set.next_run(at, room).filter(|_| room > 0) {
                piece.insert_run(run);
                room -= run.count;
                at = run.end();
            }
            if piece.is_empty() {
                break;
            }
            list.push(piece);
        }
        list.reverse();
        list
    }
}

impl Policy for Stord {
    fn name(&self) -> &'static str {
        "stord"
    }

    fn next(&mut self, view: &View<'_>) -> Decision {
        // Mid-split too: the unsent pieces are pending, and so count as dirty in the pause.
        if view.round > 0
            && let Some(stop) = self.limits.check(view)
        {
            return stop;
        }
        if self.pieces.is_empty() {
            self.pieces = Self::split(view.pending, self.split);
        }
        // The next piece is taken off; those that remain are omitted from this round.
        self.pieces.pop();
        let mut pages = view.pending.clone();
        for later in &self.pieces {
            pages.subtract(later);
        }
        Decision::Send {
            pages,
            order: self.order,
        }
    }

    fn tune(&mut self, options: &Options) {
        self.limits.tune(options);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::Run;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn pieces_are_disjoint_equal_and_everything(list in proptest::collection::vec(0..500u64, 0..300), k in 1..12u32) {
            let mut set = PageSet::new(500);
            for gfn in list {
                set.insert(gfn);
            }
            let pieces = Stord::split(&set, k);
            prop_assert!(pieces.len() <= k as usize);
            let mut union = PageSet::new(500);
            for piece in &pieces {
                let mut common = piece.clone();
                common.intersect_with(&union);
                prop_assert!(common.is_empty());
                prop_assert!(piece.len() <= set.len().div_ceil(u64::from(k)));
                union.union_with(piece);
            }
            prop_assert_eq!(union, set);
        }
    }

    #[test]
    fn the_first_piece_has_the_lowest_addresses() {
        let mut set = PageSet::new(100);
        set.insert_run(Run::new(10, 10));
        let pieces = Stord::split(&set, 2);
        assert_eq!(
            pieces.last().unwrap().iter().collect::<Vec<_>>(),
            (10..15).collect::<Vec<_>>()
        );
    }
}
