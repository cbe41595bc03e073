//! MPLM: memory-bound pre-copy, multiplexed (Chanchio and Yaothanee 2018).
//!
//! Two groups of pages share the link: those that were never sent, and those that were sent and
//! dirtied since. The live phase ends when the first group is empty; then the guest stops and the
//! second group is sent. So the live phase sends at most memory × (1 + share): it cannot fail to
//! converge, and there is no downtime parameter.
//!
//! The slides move a page that is dirtied before it was ever sent to the dirty group. Here it stays
//! where it is: it has to cross once in any case, and then crosses with its newest contents. (Nor
//! could it be told: until a page is cleared for sending, the log calls it dirty.) The bound is the
//! same.

use super::{Decision, Policy, SendOrder, View};
use crate::options::{OnTimeout, Options};
use crate::order::PushOrder;
use crate::page::{PAGE_BYTES, PageSet};
use std::time::Duration;

/// Memory-bound pre-copy, multiplexed.
#[derive(Debug)]
pub struct Mplm {
    order: SendOrder,
    /// Pages of the dirty group for every 100 of the other.
    share: u64,
    sync: Duration,
    timeout: Duration,
    on_timeout: OnTimeout,
    push: PushOrder,
    /// Where in the dirty group the next turn begins, so that all of it gets its turn.
    cursor: u64,
}

impl Mplm {
    /// The fewest pages of the unsent group in a turn, also while the bandwidth is unknown: 4 MiB.
    const LEAST: u64 = 1024;

    /// With the share and the sync interval of the options.
    #[must_use]
    pub const fn new(options: &Options) -> Self {
        Self {
            order: SendOrder::from_options(options),
            share: options.turn_share as u64,
            sync: options.sync,
            timeout: options.timeout,
            on_timeout: options.on_timeout,
            push: options.order,
            cursor: 0,
        }
    }

    /// Adds at most `count` pages of `from`, beginning at `at`, to `to`; returns where it stopped.
    fn take(from: &PageSet, mut at: u64, mut count: u64, to: &mut PageSet) -> u64 {
        while let Some(run) = from.next_run(at, count).filter(|_| count > 0) {
            to.insert_run(run);
            count -= run.count;
            at = run.end();
        }
        at
    }
}

impl Policy for Mplm {
    fn name(&self) -> &'static str {
        "mplm"
    }

    fn next(&mut self, view: &View<'_>) -> Decision {
        let mut unsent = view.pending.clone();
        unsent.subtract(view.sent);
        let mut dirty = view.pending.clone();
        dirty.intersect_with(view.sent);
        if unsent.is_empty() {
            return Decision::Stop {
                why: format!("all memory was sent once; {} pages are dirty", dirty.len()),
            };
        }
        if view.elapsed >= self.timeout {
            let why = format!(
                "the time limit of {:?} has passed with {} pages never sent",
                self.timeout,
                unsent.len()
            );
            return match self.on_timeout {
                OnTimeout::Stop => Decision::Stop { why },
                OnTimeout::Postcopy => Decision::HandOver {
                    order: self.push,
                    why,
                },
                // What was never sent does not get less by slowing the guest.
                OnTimeout::Cancel | OnTimeout::Throttle => Decision::GiveUp {
                    why: format!(
                        "{why}; raise --timeout or --bandwidth, or use --on-timeout stop or postcopy"
                    ),
                },
            };
        }
        // One turn of both groups takes about one sync interval.
        let bytes = view.live_rate().unwrap_or(0.0) * self.sync.as_secs_f64();
        let both = crate::numbers::pages_in(bytes / PAGE_BYTES as f64);
        let first = (both * 100 / (100 + self.share)).max(Self::LEAST);
        let mut pages = PageSet::new(view.pending.end());
        Self::take(&unsent, 0, first, &mut pages);
        let first = pages.len();
        let second = first * self.share / 100;
        let before = self.cursor;
        self.cursor = Self::take(&dirty, before, second, &mut pages);
        let taken = pages.len() - first;
        if taken < second {
            // Around the end: pages that are in already are not added twice.
            let mut wrapped = PageSet::new(view.pending.end());
            self.cursor = Self::take(&dirty, 0, second - taken, &mut wrapped);
            pages.union_with(&wrapped);
        }
        Decision::Send {
            pages,
            order: self.order,
        }
    }

    fn tune(&mut self, options: &Options) {
        self.timeout = options.timeout;
        self.on_timeout = options.on_timeout;
        self.push = options.order;
    }
}
