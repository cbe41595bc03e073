//! Push orders of post-copy: which pages the source sends without being asked.
//!
//! A faulted page is sent at once, whatever the order; what is decided here is the stream beside
//! it. The caller keeps the set of pages that were not sent yet and takes away what it is given:
//! so each page crosses once, whatever an order decides.

mod bubble;

use crate::page::{Gfn, PageSet, Run};
use bubble::Bubbles;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Pages in a batch of the push stream at most: an answer waits behind one of them for the
/// processor that both need.
pub(crate) const PUSH_PAGES: u64 = 64;
/// Demand paging ends when the guest has missed nothing for so long: what it has not touched
/// by then follows by address, so that the source may go.
pub(crate) const QUIET: Duration = Duration::from_secs(2);

/// In which order post-copy pushes pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
#[serde(rename_all = "lowercase")]
pub enum PushOrder {
    /// Nothing is pushed: every page waits until the guest touches it (demand paging).
    Demand,
    /// By address, beside the faults (active push, "flushing").
    Flush,
    /// Around the last faults, outwards in both directions (pre-paging with bubbling,
    /// Hines and Gopalan 2009).
    #[default]
    Bubble,
}

impl PushOrder {
    /// The name that the command line and the report use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Demand => "demand",
            Self::Flush => "flush",
            Self::Bubble => "bubble",
        }
    }
}

/// The stream of one post-copy.
#[derive(Debug)]
pub struct Push {
    order: PushOrder,
    bubbles: Bubbles,
    /// Where the stream by address stands.
    cursor: Gfn,
}

impl Push {
    /// The most pivots: more fault streams than this have no locality to speak of.
    pub const MAX_PIVOTS: usize = 64;

    /// A stream in this order; bubbling keeps `pivots` bubbles (1 is the single-pivot form, more
    /// serve several streams of faults).
    #[must_use]
    pub fn new(order: PushOrder, pivots: usize) -> Self {
        Self {
            order,
            bubbles: Bubbles::new(pivots.clamp(1, Self::MAX_PIVOTS)),
            cursor: 0,
        }
    }

    /// The guest missed this page, and it was sent.
    pub fn fault(&mut self, gfn: Gfn) {
        if self.order == PushOrder::Bubble {
            self.bubbles.pivot(gfn);
        }
    }

    /// Pushes by address from now on: the rest of a demand-paged guest, once it is to be ended.
    pub const fn flush(&mut self) {
        if matches!(self.order, PushOrder::Demand) {
            self.order = PushOrder::Flush;
        }
    }

    /// The next pages to push, at most `limit` of them, all of `remaining`; `None` when this order
    /// pushes nothing (more). The caller takes them out of `remaining`.
    pub fn next(&mut self, remaining: &PageSet, limit: u64) -> Option<Run> {
        let by_address = match self.order {
            PushOrder::Demand => return None,
            PushOrder::Flush => None,
            PushOrder::Bubble => self.bubbles.next(remaining, limit.max(1)),
        };
        by_address.or_else(|| self.by_address(remaining, limit))
    }

    fn by_address(&mut self, remaining: &PageSet, limit: u64) -> Option<Run> {
        let run = remaining
            .next_run(self.cursor, limit)
            // Pages may have come back behind the cursor: what a broken connection lost.
            .or_else(|| remaining.next_run(0, limit))?;
        self.cursor = run.end();
        Some(run)
    }
}

#[cfg(test)]
mod tests;
