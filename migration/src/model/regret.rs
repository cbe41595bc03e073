//! How far `auto` is from the best that could have been chosen: over recorded guests, links and
//! goals, its cost beside that of the best of many fixed option sets, which an oracle picks
//! afterwards.
//!
//! The cost of a migration is J = total + pause + stall; *regret* is J(auto) ÷ J(oracle) − 1. A set
//! is feasible that keeps the goals. Both sides may use post-copy where it is allowed and the round
//! trip is at most 20 ms.

use super::{Outcome, Replay, Setup, migrate};
use crate::options::{OnTimeout, Options, PolicyKind};
use crate::order::PushOrder;
use crate::policy::LONGEST_ROUND_TRIP;
use crate::trace::Trace;
use serde::Serialize;
use std::time::Duration;

/// A link, goals and a part of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Case {
    /// Bytes per second.
    pub bandwidth: f64,
    /// There and back.
    #[serde(rename = "round_trip_ms", serialize_with = "super::millis")]
    pub round_trip: Duration,
    /// The longest acceptable pause.
    #[serde(rename = "downtime_ms", serialize_with = "super::millis")]
    pub downtime: Duration,
    /// The frame of the trace at which the migration begins.
    pub frame: usize,
}

/// Bits per second of the links.
pub const LINKS: [f64; 4] = [100e6, 250e6, 1e9, 10e9];
/// Their round trips.
pub const ROUND_TRIPS: [Duration; 2] = [Duration::from_micros(200), Duration::from_millis(30)];
/// The longest acceptable pauses.
pub const DOWNTIMES: [Duration; 2] = [Duration::from_millis(30), Duration::from_millis(300)];

/// All links and goals, at so many places of a trace.
#[must_use]
pub fn cases(trace: &Trace, offsets: usize) -> Vec<Case> {
    let mut cases = Vec::new();
    for bits in LINKS {
        for round_trip in ROUND_TRIPS {
            for downtime in DOWNTIMES {
                cases.extend((0..offsets).map(|offset| Case {
                    bandwidth: bits / 8.0,
                    round_trip,
                    downtime,
                    frame: trace.frames().len() * offset / offsets,
                }));
            }
        }
    }
    cases
}

/// The fixed option sets that the oracle has, each with a name.
#[must_use]
pub fn option_sets(downtime: Duration) -> Vec<(String, Options)> {
    let base = |policy| Options {
        policy,
        downtime,
        on_timeout: OnTimeout::Stop,
        ..Options::default()
    };
    let mut sets = Vec::new();
    for max_rounds in [None, Some(1), Some(2), Some(3), Some(5), Some(8)] {
        for reorder in [true, false] {
            let options = Options {
                max_rounds,
                reorder: Some(reorder),
                ..base(PolicyKind::Precopy)
            };
            sets.push((
                format!("precopy rounds={max_rounds:?} reorder={reorder}"),
                options,
            ));
        }
    }
    for split in [2, 4, 8] {
        for reorder in [true, false] {
            let options = Options {
                split,
                reorder: Some(reorder),
                ..base(PolicyKind::Stord)
            };
            sets.push((format!("stord split={split} reorder={reorder}"), options));
        }
    }
    for turn_share in [0, 25, 100, 300] {
        for sync in [50, 250] {
            let options = Options {
                turn_share,
                sync: Duration::from_millis(sync),
                ..base(PolicyKind::Mplm)
            };
            sets.push((format!("mplm share={turn_share} sync={sync}ms"), options));
        }
    }
    let orders = [
        (PushOrder::Demand, 1),
        (PushOrder::Flush, 1),
        (PushOrder::Bubble, 1),
        (PushOrder::Bubble, 2),
        (PushOrder::Bubble, 4),
        (PushOrder::Bubble, 8),
    ];
    for policy in [PolicyKind::Postcopy, PolicyKind::Hybrid] {
        for (order, pivots) in orders {
            let options = Options {
                order,
                pivots,
                ..base(policy)
            };
            sets.push((
                format!("{} {} {pivots}", policy.name(), order.name()),
                options,
            ));
        }
    }
    for rounds in [2, 3] {
        let options = Options {
            max_rounds: Some(rounds),
            on_timeout: OnTimeout::Postcopy,
            ..base(PolicyKind::Precopy)
        };
        sets.push((format!("precopy {rounds} rounds, then postcopy"), options));
    }
    sets
}

/// What a migration costs its user, in seconds.
#[must_use]
pub fn cost(outcome: &Outcome) -> f64 {
    (outcome.total + outcome.downtime + outcome.stalled()).as_secs_f64()
}

/// Whether it keeps the goals.
fn feasible(outcome: &Outcome, options: &Options) -> bool {
    outcome.completed && outcome.downtime <= options.downtime && outcome.total <= options.timeout
}

/// `auto` beside the oracle, in one case, with post-copy or without.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Comparison {
    /// The case.
    pub case: Case,
    /// Whether the user allowed post-copy.
    pub post_copy: bool,
    /// What `auto` did, in its own words.
    pub why: String,
    /// What it cost, in seconds.
    pub auto: f64,
    /// Whether it kept the goals.
    pub kept: bool,
    /// The best feasible option set and its cost; `None` where there is none.
    pub oracle: Option<(String, f64)>,
}

impl Comparison {
    /// J(auto) ÷ J(oracle) − 1; `None` where nothing was feasible.
    #[must_use]
    pub fn regret(&self) -> Option<f64> {
        self.oracle.as_ref().map(|(_, best)| self.auto / best - 1.0)
    }
}

/// Runs `auto` and all option sets in one case: with post-copy allowed, and without.
#[must_use]
pub fn compare(trace: &Trace, case: Case) -> Vec<Comparison> {
    let setup = Setup::recorded(trace, case.bandwidth, case.round_trip);
    let run = |options: &Options| {
        let mut guest = Replay::from_frame(trace, 1, case.frame);
        migrate(&setup, options, &mut guest)
    };
    let outcomes: Vec<(String, Options, Outcome)> = option_sets(case.downtime)
        .into_iter()
        .filter(|(_, options)| !options.may_post_copy() || case.round_trip <= LONGEST_ROUND_TRIP)
        .map(|(name, options)| {
            let outcome = run(&options);
            (name, options, outcome)
        })
        .collect();
    [true, false]
        .into_iter()
        .map(|post_copy| {
            let options = Options {
                policy: PolicyKind::Auto,
                downtime: case.downtime,
                no_postcopy: !post_copy,
                ..Options::default()
            };
            let auto = run(&options);
            let oracle = outcomes
                .iter()
                .filter(|(_, options, _)| post_copy || !options.may_post_copy())
                .filter(|(_, options, outcome)| feasible(outcome, options))
                .map(|(name, _, outcome)| (name.clone(), cost(outcome)))
                .min_by(|a, b| a.1.total_cmp(&b.1));
            Comparison {
                case,
                post_copy,
                auto: cost(&auto),
                kept: feasible(&auto, &options),
                why: auto.why,
                oracle,
            }
        })
        .collect()
}
