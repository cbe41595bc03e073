//! Iterative pre-copy (Clark et al., NSDI 2005): round 1 sends all memory, round *n* what was
//! dirtied during round *n* − 1, until the rest is small enough for the pause.

use super::limits::Limits;
use super::{Decision, Policy, SendOrder, View};
use crate::options::Options;

/// Iterative pre-copy.
#[derive(Debug)]
pub struct PreCopy {
    limits: Limits,
    order: SendOrder,
}

impl PreCopy {
    /// With the limits of the options.
    #[must_use]
    pub const fn new(options: &Options) -> Self {
        Self {
            limits: Limits::new(options, 1),
            order: SendOrder::from_options(options),
        }
    }
}

impl Policy for PreCopy {
    fn name(&self) -> &'static str {
        "precopy"
    }

    fn next(&mut self, view: &View<'_>) -> Decision {
        let stop = if view.round == 0 {
            None
        } else {
            self.limits.check(view)
        };
        stop.unwrap_or_else(|| Decision::Send {
            pages: view.pending.clone(),
            order: self.order,
        })
    }

    fn tune(&mut self, options: &Options) {
        self.limits.tune(options);
    }
}

#[cfg(test)]
mod tests {
    use super::super::limits::Limits;
    use super::*;
    use crate::options::OnTimeout;
    use crate::page::{Heat, PageSet};
    use std::time::Duration;

    #[test]
    fn fixed_costs_do_not_keep_it_going() {
        // Nothing is pending, and the round trips alone exceed the target: no round helps.
        let set = PageSet::new(100);
        let view = View {
            round: 3,
            total_pages: 100,
            pending: &set,
            pending_pages: 0,
            sent: &set,
            heat: &Heat::new(100),
            written: &set,
            dirtied_pages: 0,
            dirtied_over: Duration::from_secs(1),
            cap: None,
            bandwidth: Some(1e9),
            state_bytes: 10_000,
            disk_bytes: 0,
            pause_overhead: Duration::from_millis(200),
            round_trip: Duration::ZERO,
            post_copy: false,
            elapsed: Duration::from_secs(1),
        };
        let Decision::Stop { why } = policy(20, OnTimeout::Cancel).next(&view) else {
            panic!("it goes on for ever")
        };
        assert!(why.contains("over the target"), "{why}");
    }

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
            written: &PageSet::new(100_000),
            dirtied_pages: dirtied,
            dirtied_over: Duration::from_secs(1),
            cap: None,
            bandwidth: (round > 0).then_some(4096.0 * 10_000.0),
            state_bytes: 4096 * 10,
            disk_bytes: 0,
            pause_overhead: Duration::ZERO,
            round_trip: Duration::ZERO,
            post_copy: false,
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
        // Within the target, but a tenth is dirtied meanwhile: one more round makes the pause
        // short.
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
        for round in 1..=Limits::STALLED_ROUNDS {
            assert!(
                matches!(
                    decide(&mut p, round, 9_000, 9_000, 1),
                    Decision::Send { .. }
                ),
                "{round}"
            );
        }
        assert!(matches!(
            decide(&mut p, Limits::STALLED_ROUNDS + 1, 9_000, 9_000, 1),
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
