//! A model of migrations: page by page, but without bytes, sockets or a hypervisor.
//!
//! It drives the real [`Policy`] objects over a guest's memory in virtual time, fast enough for
//! dozens of configurations of a guest of gigabytes in seconds. [`crate::testing`], in contrast,
//! runs the real *engines*, message by message, to find their mistakes; a test holds the two
//! together.
//!
//! What is modelled as the engine does it ([`crate::source`]): a page's dirty bit is cleared right
//! before it is sent, so that a page written after that is dirty again and one written before is
//! sent once, with its newest contents; one round is prepared while another is on its way; before
//! the pause the link is drained and the policy asked once more. What is left out: headers
//! and the work of both hosts. The link carries a steady rate.
//!
//! ```
//! use ferry_migration::model::{Pattern, Setup, Writer, migrate};
//! use ferry_migration::options::Options;
//! use ferry_migration::page::{RamLayout, Run};
//! let layout = RamLayout::new(vec![Run::new(0, 1 << 18)])?;
//! let setup = Setup::new(layout, 125e6);
//! let mut guest = Writer::new(&setup.layout, Pattern::Uniform, 1 << 14, 5_000.0, 1);
//! let outcome = migrate(&setup, &Options::default(), &mut guest);
//! assert!(outcome.completed && outcome.downtime.as_millis() < 300);
//! # Ok::<(), ferry_migration::page::LayoutError>(())
//! ```

mod activity;
pub mod advise;
mod auto;
mod even_in_set;
mod post_copy;
pub mod regret;
mod replay;
mod round;
pub mod stord;

pub use activity::{Activity, EvenShare, Pattern, Touch, Writer};
pub use auto::Auto;
pub use even_in_set::EvenInSet;
pub use post_copy::Faults;
pub use replay::Replay;

use crate::numbers::seconds;
use crate::options::{Options, PolicyKind};
use crate::order::{PUSH_PAGES, PushOrder};
use crate::page::{PAGE_BYTES, PageSet, RamLayout, Run};
use crate::policy::{Decision, Hybrid, Mplm, Policy, PostCopy, PreCopy, STOP_AND_START, Stord};
use crate::trace::Trace;
pub(crate) use round::Start;
use round::{Begin, Rounds};
use serde::Serialize;
use std::time::Duration;

/// When a page's dirty bit is cleared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Clearing {
    /// Right before the page is sent: a page that is written in the round before its turn is sent
    /// once. What ferry does.
    #[default]
    BeforeEachPage,
    /// All at the beginning of the round: such a page is sent, and is dirty again. What the papers
    /// assume.
    AtRoundStart,
}

/// The guest's size and the link.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The guest's RAM.
    pub layout: RamLayout,
    /// What the link carries, in bytes per second.
    pub bandwidth: f64,
    /// There and back.
    pub round_trip: Duration,
    /// What a page costs on the wire, in bytes: less than its size where pages are compressed.
    pub page_bytes: f64,
    /// CPU and device state, which the pause sends.
    pub state_bytes: u64,
    /// What the pause costs beside sending.
    pub pause_overhead: Duration,
    /// Pages that are zero and that the guest does not write meanwhile: they cost next to nothing
    /// on the wire.
    pub empty: PageSet,
    /// When dirty bits are cleared.
    pub clearing: Clearing,
    /// Post-copy: pages that are pushed at once, which a fault may have to wait for.
    pub push_pages: u64,
    /// Pages of the guest that a modelled page stands for, each of which faults for itself; 1 but
    /// for a sample.
    pub stands_for: f64,
}

impl Setup {
    /// Of a guest on a link of `bandwidth` bytes per second; the rest as on a local network: a
    /// round trip of 0.2 ms, 14 KiB of state (one vCPU's), pages uncompressed.
    #[must_use]
    pub fn new(layout: RamLayout, bandwidth: f64) -> Self {
        Self::with_round_trip(layout, bandwidth, Duration::from_micros(200))
    }

    /// As [`new`](Self::new), with another round trip.
    #[must_use]
    pub fn with_round_trip(layout: RamLayout, bandwidth: f64, round_trip: Duration) -> Self {
        Self {
            empty: PageSet::new(layout.end()),
            layout,
            bandwidth,
            round_trip,
            page_bytes: PAGE_BYTES as f64,
            state_bytes: 14 << 10,
            pause_overhead: 2 * round_trip + STOP_AND_START,
            clearing: Clearing::default(),
            push_pages: PUSH_PAGES,
            stands_for: 1.0,
        }
    }

    /// Of the guest that a trace is of.
    #[must_use]
    pub fn recorded(trace: &Trace, bandwidth: f64, round_trip: Duration) -> Self {
        Self {
            empty: trace.empty_pages(),
            ..Self::with_round_trip(trace.header().layout.clone(), bandwidth, round_trip)
        }
    }

    /// Bytes that a run takes on the wire.
    pub(crate) fn bytes(&self, run: Run) -> f64 {
        (run.count - self.empty.count_in(run)) as f64 * self.page_bytes
    }

    /// Pages per second that the link carries.
    #[must_use]
    pub fn pages_per_second(&self) -> f64 {
        self.bandwidth.max(1.0) / self.page_bytes.max(1.0)
    }
}

/// A round of a modelled migration.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Round {
    /// Counts from 1; the stop-and-copy is the last.
    pub n: u32,
    /// Pages sent in it.
    pub pages: u64,
    /// When it ended, in seconds since the migration began.
    pub end: f64,
    /// Pages that were pending when it had ended: what stopping here would have had to copy.
    pub pending: u64,
}

/// What a modelled migration came to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Outcome {
    /// The policy's name.
    pub policy: String,
    /// Whether the guest moved; otherwise the policy left it where it was.
    pub completed: bool,
    /// The policy's sentence about the end.
    pub why: String,
    /// From the beginning to the guest's start at the destination, or to the policy's end.
    #[serde(rename = "total_ms", serialize_with = "millis")]
    pub total: Duration,
    /// The pause; zero where the guest stayed.
    #[serde(rename = "downtime_ms", serialize_with = "millis")]
    pub downtime: Duration,
    /// Pages sent, again and again included.
    pub pages_sent: u64,
    /// Of those, how many had been sent before.
    pub pages_resent: u64,
    /// Bytes on the wire.
    pub bytes: u64,
    /// The rounds, the stop-and-copy last.
    pub rounds: Vec<Round>,
    /// Post-copy's page faults; `None` for the pre-copy family.
    pub faults: Option<Faults>,
}

impl Outcome {
    /// How long the guest has waited for pages; zero for the pre-copy family.
    #[must_use]
    pub fn stalled(&self) -> Duration {
        let faults = self.faults.as_ref();
        faults.map_or(Duration::ZERO, |faults| faults.stalled)
    }
}

pub(crate) fn millis<S: serde::Serializer>(time: &Duration, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_f64(time.as_secs_f64() * 1e3)
}

/// The policy that the options name: a paper's, or [`Auto`], which asks this model.
#[must_use]
pub fn policy_of(options: &Options) -> Box<dyn Policy> {
    match options.policy {
        PolicyKind::Precopy => Box::new(PreCopy::new(options)),
        PolicyKind::Stord => Box::new(Stord::new(options)),
        PolicyKind::Mplm => Box::new(Mplm::new(options)),
        PolicyKind::Postcopy => Box::new(PostCopy::new(options)),
        PolicyKind::Hybrid => Box::new(Hybrid::new(options)),
        PolicyKind::Auto => Box::new(Auto::new(options)),
    }
}

/// The most rounds of a modelled migration: a policy that goes on for longer never ends.
pub const MAX_ROUNDS: u32 = 100_000;

/// Models a migration with the policy that the options name.
pub fn migrate(setup: &Setup, options: &Options, guest: &mut dyn Activity) -> Outcome {
    run(setup, options, policy_of(options).as_mut(), guest)
}

/// How the live phase ended.
enum End {
    Stop(String),
    HandOver(PushOrder, String),
    GiveUp(String),
}

/// Models a migration with any policy. Of the options the bandwidth cap is looked at here, and what
/// concerns the pages that follow a guest; the rest is the policy's.
pub fn run(
    setup: &Setup,
    options: &Options,
    policy: &mut dyn Policy,
    guest: &mut dyn Activity,
) -> Outcome {
    run_from(setup, options, policy, guest, None)
}

/// As [`run`], from where a migration stands.
pub(crate) fn run_from(
    setup: &Setup,
    options: &Options,
    policy: &mut dyn Policy,
    guest: &mut dyn Activity,
    from: Option<Start>,
) -> Outcome {
    let begin = Begin {
        cap: options.bandwidth.map(|cap| cap as f64),
        post_copy: options.may_post_copy(),
        from,
    };
    let mut rounds = Rounds::new(setup, begin, guest);
    let mut watches = 0;
    let end = loop {
        rounds.collect();
        match policy.next(&rounds.view()) {
            Decision::Send { pages, order } => rounds.send(pages, order),
            // The model's guest cannot be slowed.
            Decision::Throttle { .. } => watches += 1,
            Decision::Watch => {
                watches += 1;
                rounds.watch();
            }
            Decision::GiveUp { why } => break End::GiveUp(why),
            // What the drained link shows may change the policy's mind.
            Decision::Stop { .. } | Decision::HandOver { .. } if rounds.drain() => {}
            Decision::Stop { why } => break End::Stop(why),
            Decision::HandOver { order, why } => break End::HandOver(order, why),
        }
        if rounds.count().max(watches) >= MAX_ROUNDS {
            break End::GiveUp(format!("no end after {MAX_ROUNDS} rounds"));
        }
    };
    let name = policy.name();
    match end {
        End::GiveUp(why) => rounds.outcome(name, false, why, Duration::ZERO),
        End::Stop(why) => {
            let downtime = rounds.stop();
            rounds.outcome(name, true, why, seconds(downtime))
        }
        End::HandOver(order, why) => {
            let (downtime, faults) = post_copy::follow(&mut rounds, options, order);
            let outcome = rounds.outcome(name, true, why, seconds(downtime));
            Outcome {
                faults: Some(faults),
                ..outcome
            }
        }
    }
}

#[cfg(test)]
mod tests;
