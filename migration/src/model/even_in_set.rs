//! The guest that gives the STORD paper's figures.

use super::activity::{Activity, Touch};
use crate::page::{Gfn, PageSet};
use crate::rng::Rng;

/// The guest of the STORD paper (section 3): in every round it dirties as many pages as a share of
/// what the link carries meanwhile, evenly spread *over the set that is being sent*. A set is what
/// is pending when the first of its `pieces` is sent; pre-copy's is each round's.
///
/// Writes within a round hit different pages. [`EvenShare`](super::EvenShare) spreads the same
/// writes over all memory instead, of which STORD saves less.
#[derive(Clone, Debug)]
pub struct EvenInSet {
    /// The set's pages; the first `written` of them are those of this round.
    set: Vec<Gfn>,
    written: usize,
    pieces: u32,
    rounds: u32,
    /// Pages per second.
    rate: f64,
    taken: u64,
    rng: Rng,
    next: Option<Touch>,
}

impl EvenInSet {
    /// A guest that dirties `share` (0.9 is 90 %) of what a link of `pages_per_second` carries, in
    /// sets that are sent in so many pieces.
    #[must_use]
    pub fn new(share: f64, pieces: u32, pages_per_second: f64, seed: u64) -> Self {
        Self {
            set: Vec::new(),
            written: 0,
            pieces: pieces.max(1),
            rounds: 0,
            rate: share * pages_per_second,
            taken: 0,
            rng: Rng::new(seed),
            next: None,
        }
    }

    /// Draws the page of the next write, without repeating one of this round while others are left.
    fn draw(&mut self) {
        if self.set.is_empty() || self.rate <= 0.0 || !self.rate.is_finite() {
            self.next = None;
            return;
        }
        if self.written == self.set.len() {
            self.written = 0;
        }
        let left = (self.set.len() - self.written) as u64;
        let at = self.written + usize::try_from(self.rng.below(left)).unwrap_or(0);
        self.set.swap(self.written, at);
        self.next = Some(Touch {
            at: self.taken as f64 / self.rate,
            gfn: self.set[self.written],
        });
        self.written += 1;
    }
}

impl Activity for EvenInSet {
    fn peek(&mut self) -> Option<Touch> {
        self.next
    }

    fn pop(&mut self) {
        self.taken += 1;
        self.draw();
    }

    fn round_begins(&mut self, pending: &PageSet) {
        if self.rounds.is_multiple_of(self.pieces) {
            self.set.clear();
            self.set
                .extend(pending.runs().flat_map(|run| run.first..run.end()));
        }
        self.rounds += 1;
        self.written = 0;
        // The write that was drawn is of the last round.
        self.draw();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::Run;

    #[test]
    fn writes_stay_in_the_set_and_do_not_repeat_in_a_round() {
        let mut pending = PageSet::new(1000);
        pending.insert_run(Run::new(100, 400));
        let mut guest = EvenInSet::new(0.5, 2, 1000.0, 3);
        let mut round = |pending: &PageSet, to: f64| {
            guest.round_begins(pending);
            let mut marks = PageSet::new(1000);
            guest.advance(to, &mut marks);
            marks
        };
        // 500 pages per second for 0.4 s.
        let first = round(&pending, 0.4);
        assert_eq!(first.len(), 200);
        assert!(first.iter().all(|gfn| (100..500).contains(&gfn)));
        // The second piece: the set is the first round's still, whatever is pending now.
        let second = round(&first, 0.8);
        assert_eq!(second.len(), 200);
        let mut outside = second.clone();
        outside.subtract(&first);
        assert!((60..140).contains(&outside.len()), "{}", outside.len());
        // A new set.
        let mut third = round(&second, 1.1);
        assert_eq!(third.len(), 150);
        third.subtract(&second);
        assert!(third.is_empty());
    }
}
