//! A forecast before a move: every policy over a recorded guest, and which of them to take.
//!
//! Each policy runs from several places of the recording, since a guest is not the same at every
//! moment. Of their outcomes the middle counts for what a migration costs, and the worst for what a
//! goal forbids. The choice is made by the rule of `--policy auto`.

use super::auto::{Goal, Kind, Prediction, choose, sentence};
use super::{Outcome, Replay, Setup, migrate, millis};
use crate::options::{OnTimeout, Options, PolicyKind};
use crate::policy::LONGEST_ROUND_TRIP;
use crate::trace::Trace;
use serde::Serialize;
use std::time::Duration;

/// Places of a recording from which each policy runs.
pub const STARTS: usize = 5;

/// What one policy comes to.
#[derive(Clone, Debug, Serialize)]
pub struct Forecast {
    /// The policy.
    pub policy: PolicyKind,
    /// From the beginning to the guest's start at the destination, or, where pages follow, to the
    /// last of them: in the middle.
    #[serde(rename = "total_ms", serialize_with = "millis")]
    pub total: Duration,
    /// The longest pause.
    #[serde(rename = "downtime_ms", serialize_with = "millis")]
    pub downtime: Duration,
    /// How long the guest waits for pages, in the middle. Only those that it writes are known.
    #[serde(rename = "stalled_ms", serialize_with = "millis")]
    pub stalled: Duration,
    /// Bytes on the wire, in the middle.
    pub bytes: u64,
    /// Whether the guest moves, keeps the goals and uses nothing that was forbidden, wherever it
    /// begins.
    pub fits: bool,
    /// Why it does not, where that is not a matter of the pause or the time.
    pub reason: Option<&'static str>,
}

/// Forecasts of all policies.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Advice {
    /// One for each policy, `auto` last.
    pub forecasts: Vec<Forecast>,
    /// The fixed policy to take; `None` where none moves the guest.
    pub policy: Option<PolicyKind>,
    /// Whether it keeps the goals.
    pub fits: bool,
    /// Why that, in a sentence with both numbers.
    pub why: String,
}

/// Runs every policy over the trace. `wanted` has the goals (downtime, timeout, post-copy or not)
/// and what all policies share. Where a policy does not reach the goals it stops the guest in the
/// end (`--on-timeout stop`), so that what it would cost is seen.
#[must_use]
pub fn advise(trace: &Trace, setup: &Setup, wanted: &Options) -> Advice {
    let goal = Goal {
        downtime: wanted.downtime,
        timeout: wanted.timeout,
        post_copy: !wanted.no_postcopy && setup.round_trip <= LONGEST_ROUND_TRIP,
    };
    let mut forecasts = Vec::new();
    let mut predictions = Vec::new();
    for &policy in PolicyKind::ALL {
        let options = Options {
            policy,
            on_timeout: OnTimeout::Stop,
            ..wanted.clone()
        };
        let outcomes: Vec<Outcome> = (0..STARTS)
            .map(|n| {
                let frame = trace.frames().len() * n / STARTS;
                migrate(setup, &options, &mut Replay::from_frame(trace, 1, frame))
            })
            .collect();
        let forecast = Forecast::new(policy, &outcomes, &goal);
        if let Some(kind) = kind(policy) {
            predictions.push(Prediction {
                kind,
                options,
                total: forecast.total.as_secs_f64(),
                pause: forecast.downtime.as_secs_f64(),
                stall: forecast.stalled.as_secs_f64(),
                completes: outcomes.iter().all(|outcome| outcome.completed),
            });
        }
        forecasts.push(forecast);
    }
    let chosen = choose(&predictions, &goal);
    Advice {
        policy: chosen.map(|chosen| chosen.options.policy),
        fits: chosen.is_some_and(|chosen| goal.feasible(chosen)),
        why: chosen.map_or_else(
            || "no policy moves this guest over this link in time".to_owned(),
            |chosen| sentence(chosen, &predictions, &goal),
        ),
        forecasts,
    }
}

const fn kind(policy: PolicyKind) -> Option<Kind> {
    Some(match policy {
        PolicyKind::Precopy => Kind::PreCopy,
        PolicyKind::Stord => Kind::Stord,
        PolicyKind::Mplm => Kind::Mplm,
        PolicyKind::Postcopy => Kind::PostCopy,
        PolicyKind::Hybrid => Kind::Hybrid,
        PolicyKind::Auto => return None,
    })
}

impl Forecast {
    fn new(policy: PolicyKind, outcomes: &[Outcome], goal: &Goal) -> Self {
        let follows = kind(policy).is_some_and(Kind::follows);
        let reason = if follows && !goal.post_copy {
            Some("post-copy is not allowed, or the round trip is too long for it")
        } else if outcomes.iter().any(|outcome| !outcome.completed) {
            Some("the guest would stay")
        } else {
            None
        };
        let keeps = |o: &Outcome| o.downtime <= goal.downtime && o.total <= goal.timeout;
        Self {
            policy,
            total: middle(outcomes.iter().map(|o| o.total)),
            downtime: outcomes
                .iter()
                .map(|o| o.downtime)
                .max()
                .unwrap_or_default(),
            stalled: middle(outcomes.iter().map(Outcome::stalled)),
            bytes: middle(outcomes.iter().map(|o| o.bytes)),
            fits: reason.is_none() && outcomes.iter().all(keeps),
            reason,
        }
    }
}

/// The median; of an even number of values the lower one.
fn middle<T: Ord + Copy + Default>(values: impl Iterator<Item = T>) -> T {
    let mut values: Vec<T> = values.collect();
    values.sort_unstable();
    let at = values.len().saturating_sub(1) / 2;
    values.get(at).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::{PageSet, RamLayout, Run};
    use crate::trace::{Header, Writer};

    const PAGES: u64 = 16 << 10;

    /// A guest that writes `rate` different pages in every tenth of a second, round and round in
    /// the first `set` pages.
    fn trace(rate: u64, set: u64, empty: u64) -> Trace {
        let layout = RamLayout::new(vec![Run::new(0, PAGES)]).unwrap();
        let header = Header {
            layout: layout.clone(),
            memory_bytes: PAGES << 12,
            cpus: 1,
            name: None,
            workload: None,
            empty_pages: Some(empty),
            interval_us: 100_000,
        };
        let mut writer = Writer::new(Vec::new(), &header).unwrap();
        for n in 1..=30 {
            let mut pages = PageSet::new(layout.end());
            for page in 0..rate {
                pages.insert((n * rate + page) % set);
            }
            let at = Duration::from_millis(100 * n);
            writer.frame(at, &pages).unwrap();
        }
        let bytes = writer.finish(Duration::from_secs(3)).unwrap();
        Trace::read(&bytes[..]).unwrap()
    }

    fn of(trace: &Trace, bandwidth: f64, wanted: &Options) -> Advice {
        let setup = Setup::recorded(trace, bandwidth, Duration::from_micros(200));
        advise(trace, &setup, wanted)
    }

    #[test]
    fn a_quiet_guest_needs_no_post_copy_and_a_busy_one_does() {
        let wanted = Options::default();
        let quiet = of(&trace(10, 100, 0), 125e6, &wanted);
        assert_eq!(quiet.policy, Some(PolicyKind::Precopy));
        assert!(quiet.fits && quiet.forecasts.iter().all(|f| f.total > Duration::ZERO));
        // All of memory three times as fast as the link carries it.
        let busy = trace(9_000, PAGES, 0);
        let heavy = of(&busy, 125e6, &wanted);
        assert!(
            matches!(
                heavy.policy,
                Some(PolicyKind::Postcopy | PolicyKind::Hybrid)
            ),
            "{heavy:#?}"
        );
        assert!(
            heavy.fits && heavy.why.contains("pre-copy would need"),
            "{}",
            heavy.why
        );
        let alone = Options {
            no_postcopy: true,
            ..wanted
        };
        let advice = of(&busy, 125e6, &alone);
        assert!(
            !matches!(
                advice.policy,
                Some(PolicyKind::Postcopy | PolicyKind::Hybrid)
            ),
            "{advice:#?}"
        );
        assert!(!advice.fits, "{advice:#?}");
        let refused = advice.forecasts.iter().filter(|f| f.reason.is_some());
        assert_eq!(refused.count(), 2);
    }

    #[test]
    fn empty_pages_cost_nothing_and_written_ones_are_none() {
        let full = trace(10, 100, 0);
        let hollow = trace(10, 100, PAGES);
        assert_eq!(full.empty_pages().len(), 0);
        // More are said to be empty than were not written.
        let empty = hollow.empty_pages();
        assert_eq!(empty.len(), PAGES - 100);
        assert!(!empty.contains(50) && empty.contains(PAGES - 1));
        assert_eq!(trace(10, 100, 1000).empty_pages().len(), 1000);
        let wanted = Options::default();
        let (full, hollow) = (of(&full, 125e6, &wanted), of(&hollow, 125e6, &wanted));
        for (a, b) in full.forecasts.iter().zip(&hollow.forecasts) {
            assert!(b.bytes * 10 < a.bytes, "{a:?} {b:?}");
            assert!(b.total * 5 < a.total, "{a:?} {b:?}");
        }
    }

    #[test]
    fn a_slow_link_keeps_the_guest_and_says_so() {
        let wanted = Options {
            timeout: Duration::from_secs(1),
            no_postcopy: true,
            ..Options::default()
        };
        let advice = of(&trace(9_000, PAGES, 0), 1e6, &wanted);
        assert!(!advice.fits);
        assert!(advice.forecasts.iter().all(|f| !f.fits), "{advice:#?}");
    }
}
