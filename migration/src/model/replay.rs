//! A recorded guest: its dirty trace, replayed.

use super::{Activity, Touch};
use crate::page::{Gfn, PageSet};
use crate::rng::Rng;
use crate::trace::{Frame, Trace};

/// Replays a trace, and begins anew at its end.
///
/// A trace says in which interval a page was dirtied, not when in it: the pages of an interval are
/// spread over it evenly, in an order drawn from the seed. So the interval of the recording bounds
/// what a replay can tell: a page that is written all the time is dirtied once per interval.
#[derive(Debug)]
pub struct Replay<'a> {
    trace: &'a Trace,
    seed: u64,
    frame: usize,
    /// When the current pass through the trace began, in seconds.
    epoch: f64,
    passes: u32,
    /// The frame's pages in the order of time, once they are needed one by one …
    order: Option<Vec<Gfn>>,
    /// … and how many of them are over.
    taken: usize,
}

impl<'a> Replay<'a> {
    /// A replay from the trace's beginning.
    #[must_use]
    pub fn new(trace: &'a Trace, seed: u64) -> Self {
        Self {
            trace,
            seed,
            frame: 0,
            epoch: 0.0,
            passes: 0,
            order: None,
            taken: 0,
        }
    }

    /// A replay from the frame of that number on, which begins at guest time 0.
    #[must_use]
    pub fn from_frame(trace: &'a Trace, seed: u64, frame: usize) -> Self {
        let mut replay = Self::new(trace, seed);
        if let Some(first) = trace.frames().get(frame) {
            replay.frame = frame;
            replay.epoch = -first.from().as_secs_f64();
        }
        replay
    }

    /// How often the trace has been replayed to its end.
    #[must_use]
    pub const fn passes(&self) -> u32 {
        self.passes
    }

    fn current(&self) -> Option<&'a Frame> {
        // A trace that lasts no time would repeat for ever without time passing.
        if self.trace.duration().is_zero() {
            return None;
        }
        self.trace.frames().get(self.frame)
    }

    fn next_frame(&mut self) {
        self.order = None;
        self.taken = 0;
        self.frame += 1;
        if self.frame >= self.trace.frames().len() {
            self.frame = 0;
            self.passes += 1;
            self.epoch += self.trace.duration().as_secs_f64();
        }
    }

    fn shuffled(&self, frame: &Frame) -> Vec<Gfn> {
        let mut pages = PageSet::new(self.trace.header().layout.end());
        self.trace.pages_of(frame, &mut pages);
        let mut order: Vec<Gfn> = pages.iter().collect();
        // Of its own for each interval: the order does not depend on how time was cut into steps.
        let interval = u64::from(self.passes) << 32 | self.frame as u64;
        let mut rng = Rng::new(self.seed ^ Rng::new(interval).next());
        for at in (1..order.len()).rev() {
            let other = rng.below(at as u64 + 1);
            order.swap(at, usize::try_from(other).unwrap_or(0));
        }
        order
    }
}

impl Activity for Replay<'_> {
    fn peek(&mut self) -> Option<Touch> {
        // A trace in which nothing is ever dirtied ends after one pass of looking.
        for _ in 0..=self.trace.frames().len() {
            let frame = self.current()?;
            let order = match self.order.take() {
                Some(order) => order,
                None => self.shuffled(frame),
            };
            let next = order.get(self.taken).copied();
            let count = order.len();
            self.order = Some(order);
            if let Some(gfn) = next {
                let (from, to) = (frame.from().as_secs_f64(), frame.to().as_secs_f64());
                let share = (self.taken as f64 + 0.5) / count as f64;
                let at = self.epoch + from + (to - from) * share;
                return Some(Touch { at, gfn });
            }
            self.next_frame();
        }
        None
    }

    fn pop(&mut self) {
        self.taken += 1;
    }

    fn advance(&mut self, to: f64, marks: &mut PageSet) {
        loop {
            // Whole intervals at once.
            while self.taken == 0
                && let Some(frame) = self.current()
                && self.epoch + frame.to().as_secs_f64() <= to
            {
                self.trace.pages_of(frame, marks);
                self.next_frame();
            }
            match self.peek() {
                Some(touch) if touch.at < to => {
                    marks.insert(touch.gfn);
                    self.pop();
                    // The end of this interval may be followed by whole ones.
                    let over = self.order.as_ref().is_some_and(|o| self.taken >= o.len());
                    if over {
                        self.next_frame();
                    }
                }
                _ => return,
            }
        }
    }
}
