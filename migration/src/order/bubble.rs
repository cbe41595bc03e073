//! Bubbles: the push stream grows around the pages that the guest missed.
//!
//! ```text
//!            ◀── low      pivot      high ──▶
//!   · · · · · [###########*###########] · · · · · [##*##] · ·      [ ] pages that this bubble has passed
//! ```
//!
//! A fault is a *pivot*: the guest will touch its neighbours next. A bubble begins there and grows
//! by turns above and below its pivot, in steps that double, so that the nearest pages leave first
//! and the stream soon consists of long runs. One bubble per stream of faults: a fault close to a
//! bubble's edge is the same stream running ahead of it, and moves that bubble; where the stream
//! runs upwards, say, the bubble grows upwards three turns of four. An edge ends where it meets
//! pages that another bubble has passed. Every second turn is the newest bubble's, since there the
//! guest is waiting or about to; the others share the rest.

use crate::page::{Gfn, PageSet, Run};
use std::collections::VecDeque;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Heading {
    Unknown,
    Up,
    Down,
}

#[derive(Clone, Copy, Debug)]
struct Bubble {
    pivot: Gfn,
    /// Passed: `low..high`.
    low: Gfn,
    high: Gfn,
    /// Which edges still grow.
    down: bool,
    up: bool,
    heading: Heading,
    /// Pages in the next step.
    step: u64,
    /// Steps so far.
    turn: u32,
}

/// Several bubbles.
#[derive(Debug)]
pub(super) struct Bubbles {
    /// The newest first; the others take turns, the one whose turn it is first.
    list: VecDeque<Bubble>,
    most: usize,
    /// The next step is one of the others'.
    others: bool,
}

impl Bubbles {
    /// Pages in the first step on each side.
    const FIRST_STEP: u64 = 8;
    /// A fault at most so many pages beyond an edge belongs to that bubble's stream.
    const SAME_STREAM: u64 = 256;

    pub(super) const fn new(most: usize) -> Self {
        Self {
            list: VecDeque::new(),
            most,
            others: false,
        }
    }

    /// A fault: its bubble is next.
    pub(super) fn pivot(&mut self, gfn: Gfn) {
        let near = |b: &Bubble| {
            gfn.saturating_add(Self::SAME_STREAM) >= b.low
                && gfn <= b.high.saturating_add(Self::SAME_STREAM)
        };
        let mut heading = Heading::Unknown;
        if let Some(at) = self.list.iter().position(near) {
            if let Some(old) = self.list.remove(at) {
                heading = if gfn >= old.pivot {
                    Heading::Up
                } else {
                    Heading::Down
                };
            }
        } else if self.list.len() >= self.most {
            // The one that had its turn last is the oldest news.
            self.list.pop_back();
        }
        self.list.push_front(Bubble {
            pivot: gfn,
            low: gfn,
            high: gfn.saturating_add(1),
            down: true,
            up: true,
            heading,
            step: Self::FIRST_STEP,
            turn: 0,
        });
        self.others = false;
    }

    /// The next step of the bubble whose turn it is; `None` when no edge can grow.
    pub(super) fn next(&mut self, remaining: &PageSet, limit: u64) -> Option<Run> {
        loop {
            let newest = !self.others || self.list.len() < 2;
            self.others = newest;
            let mut bubble = self.list.remove(usize::from(!newest))?;
            let wants_up = match bubble.heading {
                Heading::Unknown => bubble.turn % 2 == 0,
                Heading::Up => bubble.turn % 4 != 3,
                Heading::Down => bubble.turn % 4 == 3,
            };
            let up = if wants_up { bubble.up } else { !bubble.down };
            let step = bubble.step.min(limit);
            let run = if up {
                self.grow_up(&mut bubble, remaining, step)
            } else {
                self.grow_down(&mut bubble, remaining, step)
            };
            if bubble.turn % 2 == 1 {
                bubble.step = (bubble.step * 2).min(limit.max(Self::FIRST_STEP));
            }
            bubble.turn = bubble.turn.wrapping_add(1);
            // An edge that ended without a page may leave the other; a bubble without edges is
            // done.
            if run.is_some() || bubble.up || bubble.down {
                if newest {
                    self.list.push_front(bubble);
                } else {
                    self.list.push_back(bubble);
                }
            }
            if run.is_some() {
                return run;
            }
        }
    }

    fn grow_up(&self, bubble: &mut Bubble, remaining: &PageSet, step: u64) -> Option<Run> {
        let wall = self
            .list
            .iter()
            .filter(|other| other.low >= bubble.high)
            .map(|other| other.low)
            .min()
            .unwrap_or(Gfn::MAX);
        let run = remaining
            .next_run(bubble.high, step)
            .filter(|run| run.first < wall);
        let Some(mut run) = run else {
            bubble.up = false;
            return None;
        };
        run.count = run.count.min(wall - run.first);
        bubble.high = run.end();
        Some(run)
    }

    fn grow_down(&self, bubble: &mut Bubble, remaining: &PageSet, step: u64) -> Option<Run> {
        let wall = self
            .list
            .iter()
            .filter(|other| other.high <= bubble.low)
            .map(|other| other.high)
            .max()
            .unwrap_or(0);
        let run = bubble
            .low
            .checked_sub(1)
            .and_then(|below| remaining.previous_run(below, step))
            .filter(|run| run.end() > wall);
        let Some(mut run) = run else {
            bubble.down = false;
            return None;
        };
        let first = run.first.max(wall);
        run = Run::new(first, run.end() - first);
        bubble.low = run.first;
        Some(run)
    }
}
