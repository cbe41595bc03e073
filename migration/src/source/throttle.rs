//! A guest that is being slowed, so that its rounds get smaller.
//!
//! The policy says how many pages per second the guest may dirty. After each round the share of its
//! time that a vCPU runs is multiplied by allowed ÷ measured, in steps: that also ends where it
//! should for a writer whose working set fits into one round, whose measured rate falls late. Where
//! the host counts the vCPUs' pages apart, only those are slowed that dirty more than their part.

use super::engine::Source;
use super::error::SourceError;
use super::record::ms;
use crate::port::{Link, SourceVm, Throttle};
use crate::report::{Event, Slowed, SlowedVcpu};
use std::time::Duration;

/// A round makes a vCPU slower by half at most …
const SLOWER: f64 = 0.5;
/// … and faster by a quarter.
const FASTER: f64 = 1.25;

/// The processors that are being slowed. Dropping it lets them run at full speed.
pub(super) struct Throttled<'g> {
    guest: &'g dyn Throttle,
    /// The share of its time that each runs, and the least that was.
    runs: Vec<f64>,
    least: Vec<f64>,
    /// When it began, and what each had rested then.
    since: Duration,
    rested: Vec<Duration>,
    /// What each had dirtied at the last look.
    dirtied: Option<(Vec<u64>, Duration)>,
}

impl Drop for Throttled<'_> {
    fn drop(&mut self) {
        // Full speed is always possible.
        let _ = self.guest.slow(&[]);
    }
}

impl<'g> Throttled<'g> {
    fn new(guest: &'g dyn Throttle, now: Duration) -> Self {
        let count = guest.vcpus();
        Self {
            guest,
            runs: vec![1.0; count],
            least: vec![1.0; count],
            since: now,
            rested: guest.rested(),
            dirtied: guest.dirtied().map(|dirtied| (dirtied, now)),
        }
    }

    /// What each vCPU dirties, in pages per second; by their counts where there are any, else the
    /// whole rate in equal parts.
    fn rates(&mut self, rate: f64, now: Duration) -> Vec<f64> {
        let news = self.guest.dirtied();
        let parts = match (&self.dirtied, &news) {
            (Some((before, at)), Some(counts)) if now > *at && before.len() == counts.len() => {
                let over = now.saturating_sub(*at).as_secs_f64();
                let each = counts.iter().zip(before);
                each.map(|(now, before)| now.saturating_sub(*before) as f64 / over)
                    .collect()
            }
            _ => vec![rate / self.runs.len().max(1) as f64; self.runs.len()],
        };
        self.dirtied = news.map(|counts| (counts, now));
        parts
    }

    /// Slows them so that they dirty at most `allowed` of `rate` pages per second. No vCPU rests
    /// more than `most` of its time.
    fn adapt(
        &mut self,
        (rate, allowed): (f64, f64),
        most: f64,
        now: Duration,
    ) -> Result<(), SourceError> {
        let rates = self.rates(rate, now);
        self.runs = next(&self.runs, &rates, allowed, most);
        for (least, runs) in self.least.iter_mut().zip(&self.runs) {
            *least = least.min(*runs);
        }
        let shares: Vec<f64> = self.runs.iter().map(|runs| 1.0 - runs).collect();
        self.guest
            .slow(&shares)
            .map_err(|e| SourceError::guest("slowing the guest", e))
    }

    /// For the report.
    fn report(&self, began: Duration, now: Duration) -> Slowed {
        let rested = self.guest.rested();
        let vcpus = self.least.iter().enumerate().map(|(at, least)| {
            let before = self.rested.get(at).copied().unwrap_or_default();
            let rested = rested.get(at).copied().unwrap_or_default();
            SlowedVcpu {
                most_percent: (1.0 - least) * 100.0,
                rested_ms: ms(rested.saturating_sub(before)),
            }
        });
        Slowed {
            from_ms: ms(self.since.saturating_sub(began)),
            ms: ms(now.saturating_sub(self.since)),
            vcpus: vcpus.collect(),
        }
    }
}

/// The share of its time that each vCPU is to run, of those that ran `runs` and dirtied `rates`.
fn next(runs: &[f64], rates: &[f64], allowed: f64, most: f64) -> Vec<f64> {
    let total: f64 = rates.iter().sum();
    let level = level(rates, allowed);
    let factor = |rate: f64| {
        if total <= allowed {
            // The guest may have calmed down.
            (allowed / total.max(1e-9)).min(FASTER)
        } else if rate > level {
            (level / rate).max(SLOWER)
        } else {
            1.0
        }
    };
    runs.iter()
        .zip(rates)
        .map(|(runs, rate)| (runs * factor(*rate)).clamp(1.0 - most.clamp(0.0, 0.99), 1.0))
        .collect()
}

/// The rate to which those above it are to be brought, so that all together come to `allowed`.
fn level(rates: &[f64], allowed: f64) -> f64 {
    let mut sorted = rates.to_vec();
    sorted.sort_by(f64::total_cmp);
    let mut left = allowed;
    for (at, rate) in sorted.iter().enumerate() {
        let part = left / (sorted.len() - at) as f64;
        if *rate > part {
            return part;
        }
        left -= rate;
    }
    f64::INFINITY
}

impl<'g, L: Link, G: SourceVm<L>> Source<'_, 'g, L, G> {
    /// Has the guest dirty at most so many pages per second.
    pub(super) fn slow(
        &mut self,
        slowed: &mut Option<Throttled<'g>>,
        allowed: f64,
        why: String,
    ) -> Result<(), SourceError> {
        let guest: &'g G = self.guest;
        let Some(throttle) = guest.throttle() else {
            return Err(SourceError::NoThrottle);
        };
        let now = self.now();
        if slowed.is_none() {
            (self.session.setup.events)(Event::Choice { why });
        }
        let slowed = slowed.get_or_insert_with(|| Throttled::new(throttle, now));
        let (pages, over) = self.memory.dirtied;
        let rate = pages as f64 / over.as_secs_f64().max(1e-6);
        let most = f64::from(self.helm.options.throttle) / 100.0;
        slowed.adapt((rate, allowed), most, now)
    }

    /// Lets the guest run at full speed, and notes how much it was slowed.
    pub(super) fn full_speed(&mut self, slowed: Option<Throttled<'g>>) {
        if let Some(slowed) = slowed {
            self.record.slowed = Some(slowed.report(self.record.began, self.now()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::port::PortError;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::Mutex;

    fn near(found: &[f64], expected: &[f64]) {
        let close = found
            .iter()
            .zip(expected)
            .all(|(f, e)| (f - e).abs() < 1e-9);
        assert!(
            close && found.len() == expected.len(),
            "{found:?} {expected:?}"
        );
    }

    /// Two processors, of which the host tells apart what they dirty.
    #[derive(Default)]
    struct Cpus {
        shares: Mutex<Vec<f64>>,
        dirtied: Mutex<Vec<u64>>,
    }

    impl Throttle for Cpus {
        fn vcpus(&self) -> usize {
            2
        }

        fn dirtied(&self) -> Option<Vec<u64>> {
            Some(self.dirtied.lock().unwrap().clone())
        }

        fn slow(&self, shares: &[f64]) -> Result<(), PortError> {
            *self.shares.lock().unwrap() = shares.to_vec();
            Ok(())
        }

        fn rested(&self) -> Vec<Duration> {
            vec![Duration::from_millis(3); 2]
        }
    }

    #[test]
    fn the_writer_is_slowed_and_runs_at_full_speed_after_a_panic() {
        let cpus = Cpus::default();
        *cpus.dirtied.lock().unwrap() = vec![5, 70];
        let work = AssertUnwindSafe(|| {
            let second = Duration::from_secs(1);
            let mut slowed = Throttled::new(&cpus, second);
            *cpus.dirtied.lock().unwrap() = vec![15, 1070];
            // What all dirtied together matters only where they are not told apart.
            slowed.adapt((9e9, 100.0), 0.99, 2 * second).unwrap();
            near(&cpus.shares.lock().unwrap(), &[0.0, 0.5]);
            let report = slowed.report(Duration::ZERO, 3 * second);
            assert_eq!((report.from_ms, report.ms), (1000.0, 2000.0));
            near(
                &[report.vcpus[0].most_percent, report.vcpus[1].most_percent],
                &[0.0, 50.0],
            );
            panic!("the test's own");
        });
        assert!(catch_unwind(work).is_err());
        assert!(cpus.shares.lock().unwrap().is_empty());
    }

    #[test]
    fn only_those_above_their_part_are_slowed() {
        // 100 may be dirtied: the one with 10 keeps its speed, the others share 90.
        near(&[level(&[10.0, 60.0, 200.0], 100.0)], &[45.0]);
        let runs = next(&[1.0; 3], &[10.0, 60.0, 200.0], 100.0, 0.99);
        near(&runs, &[1.0, 0.75, 0.5]);
    }

    #[test]
    fn it_goes_in_steps_down_and_up_and_not_beyond_the_limit() {
        near(&next(&[1.0], &[1000.0], 100.0, 0.99), &[0.5]);
        near(&next(&[0.5], &[500.0], 100.0, 0.99), &[0.25]);
        near(&next(&[0.25], &[1000.0], 100.0, 0.8), &[0.2]);
        near(&next(&[0.02], &[1000.0], 100.0, 1.0), &[0.01]);
        // Calmed down: back in steps, and never above full speed.
        near(&next(&[0.4], &[10.0], 100.0, 0.99), &[0.5]);
        near(&next(&[0.9], &[0.0], 100.0, 0.99), &[1.0]);
    }

    #[test]
    fn a_writer_that_fills_its_working_set_is_slowed_until_it_no_longer_does() {
        // 1000 pages in a round of a second, whatever it does down to a twentieth of its speed.
        let mut runs = vec![1.0];
        for _ in 0..20 {
            let rate = (runs[0] * 20_000.0_f64).min(1000.0);
            runs = next(&runs, &[rate], 500.0, 0.99);
        }
        assert!((runs[0] * 20_000.0 - 500.0).abs() < 1.0, "{runs:?}");
    }
}
