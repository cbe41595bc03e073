//! Policies: pure decisions about what to send next and when to stop.
//!
//! A policy sees a read-only [`View`] and returns a [`Decision`]. It does no I/O and reads no
//! clock; the engine alone reads memory, sends, pauses and marks. So a policy can be slow, but
//! it cannot be wrong: whatever it decides, no write is lost and one side runs the guest.

mod hybrid;
mod limits;
mod mplm;
mod post_copy;
mod pre_copy;
mod stall;
mod stord;
mod switchover;

pub use hybrid::Hybrid;
pub use mplm::Mplm;
pub use post_copy::PostCopy;
pub use pre_copy::PreCopy;
pub use stord::Stord;
pub(crate) use switchover::switch_over;

use crate::numbers::seconds;
use crate::options::Options;
use crate::order::PushOrder;
use crate::page::{Heat, PAGE_BYTES, PageSet};
use std::time::Duration;

/// What stopping, saving, restoring and starting takes beside the round trips, before this
/// migration has measured it: a prior for the estimate, not a claim.
pub(crate) const STOP_AND_START: Duration = Duration::from_micros(1500);

/// Beyond this round trip a page fault over the network stalls the guest for too long.
pub(crate) const LONGEST_ROUND_TRIP: Duration = Duration::from_millis(20);

/// What a policy may look at.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct View<'a> {
    /// Rounds sent so far; 0 before the first.
    pub round: u32,
    /// Pages of RAM.
    pub total_pages: u64,
    /// Pages that are missing or stale at the destination.
    pub pending: &'a PageSet,
    /// How many those are.
    pub pending_pages: u64,
    /// Pages that were sent at least once.
    pub sent: &'a PageSet,
    /// How often pages were dirtied.
    pub heat: &'a Heat,
    /// Pages written since their dirty bit was last cleared, by sending them or by
    /// [`Decision::Watch`], pending ones included. Empty before the first watch.
    pub written: &'a PageSet,
    /// Pages found newly dirty by the last collection …
    pub dirtied_pages: u64,
    /// … and the time between it and the one before.
    pub dirtied_over: Duration,
    /// Measured bandwidth in bytes per second; `None` until something was measured.
    pub bandwidth: Option<f64>,
    /// The user's cap in bytes per second, which holds while the guest runs.
    pub cap: Option<f64>,
    /// Bytes of CPU and device state that the pause will have to send.
    pub state_bytes: u64,
    /// Bytes of blocks of disks that are missing or stale at the destination; what is pending of
    /// them is sent before each round.
    pub disk_bytes: u64,
    /// What a pause costs beside sending: a few round trips, stopping and starting.
    pub pause_overhead: Duration,
    /// The link's round trip.
    pub round_trip: Duration,
    /// Whether the destination can run the guest before its pages are there: [`Decision::HandOver`]
    /// is then allowed.
    pub post_copy: bool,
    /// Since the migration of memory began.
    pub elapsed: Duration,
}

impl View<'_> {
    /// The pause that stopping now would cost: pending pages and the machine's state over the
    /// measured bandwidth, and the fixed costs.
    #[must_use]
    pub fn predicted_downtime(&self) -> Option<Duration> {
        let bytes = self.pending_bytes() + self.state_bytes;
        self.bandwidth
            .map(|rate| seconds(bytes as f64 / rate.max(1.0)) + self.pause_overhead)
    }

    /// Bytes that are pending: pages, and blocks of disks.
    #[must_use]
    pub const fn pending_bytes(&self) -> u64 {
        self.pending_pages * PAGE_BYTES + self.disk_bytes
    }

    /// Bytes per second at which rounds go out while the guest runs: the link's, under the cap.
    #[must_use]
    pub fn live_rate(&self) -> Option<f64> {
        match (self.bandwidth, self.cap) {
            (Some(bandwidth), Some(cap)) => Some(bandwidth.min(cap)),
            (bandwidth, cap) => bandwidth.or(cap),
        }
    }

    /// The part of the predicted pause that sending the pending pages and blocks takes: what
    /// another round can save.
    #[must_use]
    pub fn predicted_last_pages(&self) -> Option<Duration> {
        let bytes = self.pending_bytes();
        self.bandwidth
            .map(|rate| seconds(bytes as f64 / rate.max(1.0)))
    }

    /// Pages per second that the guest dirties, by the last collection.
    #[must_use]
    pub fn dirty_rate(&self) -> f64 {
        self.dirtied_pages as f64 / self.dirtied_over.as_secs_f64().max(1e-6)
    }
}

/// In which order a set of pages is sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum SendOrder {
    /// By address: the longest runs.
    #[default]
    Address,
    /// Pages that were dirtied often last: what is written again soon is then sent when it is
    /// needed, not before (dynamic page transfer reordering, Svärd 2012). In the first pass, before
    /// it is known how often: regions that are being written to last, as that pass itself finds
    /// out.
    ColdFirst,
}

impl SendOrder {
    const fn from_options(options: &Options) -> Self {
        if options.reorders() {
            Self::ColdFirst
        } else {
            Self::Address
        }
    }
}

/// What to do next.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Decision {
    /// Send these pages (those of them that are pending) as one round.
    Send {
        /// Which.
        pages: PageSet,
        /// In which order.
        order: SendOrder,
    },
    /// Clear the dirty bits of pending pages, so that [`View::written`] shows which of them are
    /// written from now on. Nothing is sent, and the policy is asked again.
    Watch,
    /// Slow the guest, so that it dirties no more than this; what it last dirtied is the measure.
    /// The policy is asked again. It holds until the live phase ends. Allowed where the options say
    /// [`OnTimeout::Throttle`](crate::options::OnTimeout::Throttle).
    Throttle {
        /// Pages per second.
        dirty_rate: f64,
        /// Why, for the user.
        why: String,
    },
    /// Stop the guest and copy what is pending.
    Stop {
        /// Why, for the report.
        why: String,
    },
    /// Stop the guest, move it, and let what is pending follow (post-copy).
    HandOver {
        /// In which order pages follow that the guest does not ask for.
        order: PushOrder,
        /// Why, for the report.
        why: String,
    },
    /// Leave the guest where it is.
    GiveUp {
        /// Why, for the user.
        why: String,
    },
}

/// A migration algorithm's decisions.
///
/// A policy of one's own: all pages once, then whatever is pending in the pause, however long that
/// takes.
///
/// ```
/// use ferry_migration::policy::{Decision, Policy, SendOrder, View};
///
/// struct OnePass;
///
/// impl Policy for OnePass {
///     fn name(&self) -> &'static str {
///         "one-pass"
///     }
///
///     fn next(&mut self, view: &View<'_>) -> Decision {
///         if view.round > 0 {
///             let why = format!("{} pages are left after one pass", view.pending_pages);
///             return Decision::Stop { why };
///         }
///         let pages = view.pending.clone();
///         Decision::Send { pages, order: SendOrder::Address }
///     }
/// }
/// ```
pub trait Policy: Send {
    /// Its name, as the command line and the report use it.
    fn name(&self) -> &'static str;
    /// What to do next. Called after each collection of the dirty log while the guest runs; a
    /// `Stop` may be asked for again after the link was drained, with newer numbers.
    fn next(&mut self, view: &View<'_>) -> Decision;
    /// A sentence about a choice that it has made since it was last asked: for the user, at once
    /// and in the report.
    fn choice(&mut self) -> Option<String> {
        None
    }
    /// The user has changed these options of the running migration, and a round may have been cut
    /// short for it; what was not sent is pending. By default that changes nothing.
    fn tune(&mut self, options: &Options) {
        let _ = options;
    }
    /// Whether its live phase ends by moving the guest before its pages, where the two sides can do
    /// that.
    fn hands_over(&self) -> bool {
        false
    }
}
