//! Iterative pre-copy (Clark et al., NSDI 2005): round 1 sends all memory, round *n* what was
//! dirtied during round *n* − 1, until the rest is small enough for the pause.

use super::{Decision, Policy, SendOrder, View};
use crate::options::{OnTimeout, Options};
use std::time::Duration;

/// Iterative pre-copy.
#[derive(Debug)]
pub struct PreCopy {
    downtime: Duration,
    timeout: Duration,
    on_timeout: OnTimeout,
    max_rounds: Option<u32>,
    /// The fewest pages that were ever pending, and in which round that was.
    least: Option<(u64, u32)>,
}

impl PreCopy {
    /// Rounds without a new minimum of pending pages after which nothing more is expected.
    const STALLED_ROUNDS: u32 = 6;
    /// Another round is worth its time while it leaves at most this share of what it sends …
    const WORTHWHILE: f64 = 0.5;
    /// … and sending what is left takes longer than this: the pause has fixed costs of that order.
    const SHORT_ENOUGH: Duration = Duration::from_millis(1);

    /// With the limits of the options.
    #[must_use]
    pub const fn new(options: &Options) -> Self {
        Self {
            downtime: options.downtime,
            timeout: options.timeout,
            on_timeout: options.on_timeout,
            max_rounds: options.max_rounds,
            least: None,
        }
    }

    /// Whether pending pages have stopped shrinking.
    fn stalled(&mut self, view: &View<'_>) -> bool {
        match self.least {
            // A new minimum counts when it is a real one: 5 % below the last.
            Some((least, round)) if view.pending_pages as f64 > least as f64 * 0.95 => {
                view.round >= round + Self::STALLED_ROUNDS
            }
            _ => {
                self.least = Some((view.pending_pages, view.round));
                false
            }
        }
    }

    /// Which limit is reached, in words.
    fn limit(&mut self, view: &View<'_>) -> Option<String> {
        let stalled = self.stalled(view);
        if view.elapsed >= self.timeout {
            return Some(format!("the time limit of {:?} has passed", self.timeout));
        }
        if self.max_rounds.is_some_and(|max| view.round >= max) {
            return Some(format!("the limit of {} rounds is reached", view.round));
        }
        // Only where the user accepts a longer pause does it end the live phase early: with
        // `cancel` the guest may calm down before the time limit, and waiting costs nothing.
        (stalled && self.on_timeout == OnTimeout::Stop).then(|| {
            format!(
                "pending pages have not shrunk for {} rounds",
                Self::STALLED_ROUNDS
            )
        })
    }
}

impl Policy for PreCopy {
    fn name(&self) -> &'static str {
        "precopy"
    }

    fn next(&mut self, view: &View<'_>) -> Decision {
        let send = || Decision::Send {
            pages: view.pending.clone(),
            order: SendOrder::Address,
        };
        if view.round == 0 {
            return send();
        }
        let predicted = view.predicted_downtime();
        if let Some(predicted) = predicted
            && predicted <= self.downtime
        {
            // Within the target. While a round still halves what is left, it is cheaper than
            // the pause that it saves: all such rounds together take less than twice the first.
            let rate = view.bandwidth.unwrap_or(f64::INFINITY);
            let left = view.dirty_rate() * crate::page::PAGE_BYTES as f64 / rate;
            let short = view
                .predicted_last_pages()
                .is_none_or(|time| time <= Self::SHORT_ENOUGH);
            if short || left > Self::WORTHWHILE || self.limit(view).is_some() {
                return Decision::Stop {
                    why: format!(
                        "the predicted pause of {:.1} ms is within the target of {:.0} ms",
                        predicted.as_secs_f64() * 1e3,
                        self.downtime.as_secs_f64() * 1e3
                    ),
                };
            }
            return send();
        }
        let Some(limit) = self.limit(view) else {
            return send();
        };
        let state = predicted.map_or_else(
            || "and no bandwidth could be measured".to_owned(),
            |predicted| {
                format!(
                    "and stopping would pause the guest for about {:.0} ms, over the target of {:.0} ms: it \
                     dirties {:.1} MB/s, the link carries {:.1} MB/s",
                    predicted.as_secs_f64() * 1e3,
                    self.downtime.as_secs_f64() * 1e3,
                    view.dirty_rate() * crate::page::PAGE_BYTES as f64 / 1e6,
                    view.bandwidth.unwrap_or(0.0) / 1e6
                )
            },
        );
        match self.on_timeout {
            OnTimeout::Stop => Decision::Stop {
                why: format!("{limit}, {state}"),
            },
            OnTimeout::Cancel => Decision::GiveUp {
                why: format!(
                    "{limit}, {state}; raise --downtime or --timeout, or use --on-timeout stop"
                ),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::{Heat, PageSet};

    fn decide(
        policy: &mut PreCopy,
        round: u32,
        pending: u64,
        dirtied: u64,
        elapsed: u64,
    ) -> Decision {
        let mut set = PageSet::new(100_000);
        set.insert_run(crate::page::Run::new(0, pending));
        policy.next(&View {
            round,
            total_pages: 100_000,
            pending: &set,
            pending_pages: pending,
            sent: &PageSet::new(100_000),
            heat: &Heat::new(100_000),
            dirtied_pages: dirtied,
            dirtied_over: Duration::from_secs(1),
            bandwidth: (round > 0).then_some(4096.0 * 10_000.0),
            state_bytes: 4096 * 10,
            pause_overhead: Duration::ZERO,
            elapsed: Duration::from_secs(elapsed),
        })
    }

    fn policy(downtime: u64, on_timeout: OnTimeout) -> PreCopy {
        PreCopy::new(&Options {
            downtime: Duration::from_millis(downtime),
            timeout: Duration::from_secs(60),
            on_timeout,
            ..Options::default()
        })
    }

    #[test]
    fn the_first_round_is_everything() {
        assert!(
            matches!(decide(&mut policy(1000, OnTimeout::Stop), 0, 100_000, 0, 0),
            Decision::Send { pages, .. } if pages.len() == 100_000)
        );
    }

    #[test]
    fn stops_within_the_target_counting_state() {
        // 10,000 pages/s: 190 pages and 10 of state are 20 ms.
        let mut p = policy(20, OnTimeout::Cancel);
        assert!(matches!(
            decide(&mut p, 1, 190, 8_000, 1),
            Decision::Stop { .. }
        ));
        assert!(matches!(
            decide(&mut p, 1, 191, 8_000, 1),
            Decision::Send { .. }
        ));
    }

    #[test]
    fn goes_on_while_a_round_pays() {
        // Within the target, but a tenth is dirtied meanwhile: one more round makes the pause short.
        let mut p = policy(100, OnTimeout::Cancel);
        assert!(matches!(
            decide(&mut p, 1, 900, 1_000, 1),
            Decision::Send { .. }
        ));
        assert!(matches!(
            decide(&mut p, 2, 9, 100, 1),
            Decision::Stop { .. }
        ));
    }

    #[test]
    fn limits_cancel_or_stop() {
        assert!(matches!(
            decide(&mut policy(1, OnTimeout::Cancel), 5, 9_000, 9_000, 61),
            Decision::GiveUp { .. }
        ));
        assert!(matches!(
            decide(&mut policy(1, OnTimeout::Stop), 5, 9_000, 9_000, 61),
            Decision::Stop { .. }
        ));
    }

    #[test]
    fn no_progress_is_noticed() {
        let mut p = policy(1, OnTimeout::Stop);
        for round in 1..=PreCopy::STALLED_ROUNDS {
            assert!(
                matches!(
                    decide(&mut p, round, 9_000, 9_000, 1),
                    Decision::Send { .. }
                ),
                "{round}"
            );
        }
        assert!(matches!(
            decide(&mut p, PreCopy::STALLED_ROUNDS + 1, 9_000, 9_000, 1),
            Decision::Stop { .. }
        ));
        // With `cancel` the guest has until the time limit.
        let mut p = policy(1, OnTimeout::Cancel);
        for round in 1..50 {
            assert!(matches!(
                decide(&mut p, round, 9_000, 9_000, 1),
                Decision::Send { .. }
            ));
        }
    }
}
