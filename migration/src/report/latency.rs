//! Latencies in bounded memory: a histogram whose buckets grow with the value.

use super::Faults;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Buckets of an octave; a percentile is at most 1/32 too high.
const PER_OCTAVE: u64 = 32;
/// Octaves above the first: to 2⁴² ns, over an hour.
const OCTAVES: usize = 38;

/// All buckets.
const BUCKETS: usize = (OCTAVES + 1) << PER_OCTAVE.ilog2();

/// Counts of durations, in nanoseconds.
#[derive(Clone, Debug)]
pub struct Latencies {
    counts: Vec<u64>,
    count: u64,
    total: Duration,
    max: Duration,
}

impl Default for Latencies {
    fn default() -> Self {
        Self {
            counts: vec![0; BUCKETS],
            count: 0,
            total: Duration::ZERO,
            max: Duration::ZERO,
        }
    }
}

/// A bucket of a histogram.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Bucket {
    /// Its upper bound in microseconds.
    pub upto_us: f64,
    /// How many fell into it.
    pub count: u64,
}

/// Values below `PER_OCTAVE` have a bucket each; above, each octave has as many.
fn bucket(nanos: u64) -> usize {
    let octave = u64::from(
        (nanos / PER_OCTAVE)
            .checked_ilog2()
            .map_or(0, |log| log + 1),
    );
    let within = if octave == 0 {
        nanos
    } else {
        (nanos >> (octave - 1)) - PER_OCTAVE
    };
    usize::try_from(octave * PER_OCTAVE + within).unwrap_or(usize::MAX)
}

/// The first value beyond the bucket.
fn end_of(bucket: usize) -> u64 {
    let (octave, within) = (bucket as u64 / PER_OCTAVE, bucket as u64 % PER_OCTAVE);
    if octave == 0 {
        within + 1
    } else {
        (PER_OCTAVE + within + 1) << (octave - 1)
    }
}

impl Latencies {
    /// Counts one.
    pub fn record(&mut self, latency: Duration) {
        let nanos = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        let last = self.counts.len() - 1;
        self.counts[bucket(nanos).min(last)] += 1;
        self.count += 1;
        self.total += latency;
        self.max = self.max.max(latency);
    }

    /// The duration that this share of all did not exceed; zero when there are none.
    #[must_use]
    pub fn percentile(&self, share: f64) -> Duration {
        let rank = crate::numbers::pages_in((self.count as f64 * share).ceil()).max(1);
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank && index + 1 < self.counts.len() {
                return Duration::from_nanos(end_of(index)).min(self.max);
            }
        }
        self.max
    }

    /// As the report has it.
    #[must_use]
    pub fn faults(&self) -> Faults {
        let us = |d: Duration| d.as_secs_f64() * 1e6;
        let filled = self
            .counts
            .iter()
            .enumerate()
            .filter(|(_, count)| **count > 0);
        Faults {
            count: self.count,
            p50_us: us(self.percentile(0.5)),
            p99_us: us(self.percentile(0.99)),
            max_us: us(self.max),
            stalled_ms: self.total.as_secs_f64() * 1e3,
            histogram: filled
                .map(|(index, count)| Bucket {
                    upto_us: end_of(index) as f64 / 1e3,
                    count: *count,
                })
                .collect(),
            ..Faults::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn buckets_are_contiguous_and_narrow() {
        let mut last = 0;
        for nanos in (0..100_000).chain((17..40).map(|n| 1 << n)) {
            let at = bucket(nanos);
            assert!(nanos < end_of(at), "{nanos}");
            assert!(at == 0 || nanos >= end_of(at - 1), "{nanos}");
            if nanos < 100_000 {
                assert!(at == last || at == last + 1);
                last = at;
            }
        }
    }

    #[test]
    fn nothing_recorded_is_zero_and_a_year_is_kept() {
        let mut latencies = Latencies::default();
        assert_eq!(latencies.faults(), Faults::default());
        latencies.record(Duration::from_secs(365 * 24 * 3600));
        assert_eq!(
            latencies.percentile(0.5),
            Duration::from_secs(365 * 24 * 3600)
        );
    }

    proptest! {
        #[test]
        fn percentiles_match_a_sorted_list(mut list in proptest::collection::vec(0u64..10_000_000, 1..300), share in 0.01f64..1.0) {
            let mut latencies = Latencies::default();
            for &nanos in &list {
                latencies.record(Duration::from_nanos(nanos));
            }
            list.sort_unstable();
            let rank = ((list.len() as f64 * share).ceil() as usize).max(1);
            let exact = list[rank - 1] as f64;
            let found = latencies.percentile(share).as_nanos() as f64;
            prop_assert!(found >= exact && found <= exact * (1.0 + 1.0 / 32.0) + 1.0, "{found} for {exact}");
            prop_assert_eq!(latencies.faults().count, list.len() as u64);
        }
    }
}
