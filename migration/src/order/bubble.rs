//! Bubbles: the push stream grows around the pages that the guest missed.
//!
//! ```text
//!            ◀── low      pivot      high ──▶
//!   · · · · · [###########*###########] · · · · · [##*##] · ·      [ ] pages that this bubble has passed
//! ```
//!
//! A fault is a *pivot*: the guest will touch its neighbours next. A bubble begins there and grows
//! by turns above and below its pivot, in steps that double, so that the nearest pages leave first and
//! the stream soon consists of long runs. One bubble per stream of faults: a fault close to a bubble's
//! edge is the same stream running ahead of it, and moves that bubble. An edge ends where it meets
//! pages that another bubble has passed. Bubbles take turns, the newest first.

use crate::page::{Gfn, PageSet, Run};
use std::collections::VecDeque;

#[derive(Clone, Copy, Debug)]
struct Bubble {
    /// Passed: `low..high`.
    low: Gfn,
    high: Gfn,
    /// Which edges still grow.
    down: bool,
    up: bool,
    /// Pages in the next step.
    step: u64,
    /// The next step goes up.
    turn_up: bool,
}

/// Several bubbles, the one whose turn it is first.
#[derive(Debug)]
pub(super) struct Bubbles {
    list: VecDeque<Bubble>,
    most: usize,
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
        }
    }

    /// A fault: its bubble is next.
    pub(super) fn pivot(&mut self, gfn: Gfn) {
        let near = |b: &Bubble| {
            gfn.saturating_add(Self::SAME_STREAM) >= b.low
                && gfn <= b.high.saturating_add(Self::SAME_STREAM)
        };
        if let Some(at) = self.list.iter().position(near) {
            self.list.remove(at);
        } else if self.list.len() >= self.most {
            // The one that had its turn last is the oldest news.
            self.list.pop_back();
        }
        self.list.push_front(Bubble {
            low: gfn,
            high: gfn.saturating_add(1),
            down: true,
            up: true,
            step: Self::FIRST_STEP,
            turn_up: true,
        });
    }

    /// The next step of the bubble whose turn it is; `None` when no edge can grow.
    pub(super) fn next(&mut self, remaining: &PageSet, limit: u64) -> Option<Run> {
        while let Some(mut bubble) = self.list.pop_front() {
            let step = bubble.step.min(limit);
            let up = if bubble.turn_up {
                bubble.up
            } else {
                !bubble.down
            };
            let run = if up {
                self.grow_up(&mut bubble, remaining, step)
            } else {
                self.grow_down(&mut bubble, remaining, step)
            };
            bubble.turn_up = !up;
            if !up || !bubble.down {
                // One step on each side that grows was made.
                bubble.step = bubble
                    .step
                    .saturating_mul(2)
                    .min(limit.max(Self::FIRST_STEP));
            }
            match run {
                Some(run) => {
                    self.list.push_back(bubble);
                    return Some(run);
                }
                // This edge ended without a page; perhaps the other goes on.
                None if bubble.up || bubble.down => self.list.push_front(bubble),
                None => {}
            }
        }
        None
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
