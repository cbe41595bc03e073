//! How often pages are written, from the intervals in which they were: a mixture of a few rates,
//! fitted by expectation maximisation. Bookkeeping by page would take each page for what it
//! happened to do.

use super::observe::INTERVALS;
use crate::rng::Rng;

/// Rates of the mixture, beside 0.
const RATES: usize = 14;
const STEPS: usize = 60;
/// The fastest rate has a page written in the shortest interval with probability 1 − e⁻³ = 95 %,
/// the slowest in all intervals together with 5 %.
const FASTEST: f64 = 3.0;
const SLOWEST: f64 = 0.05;

/// A mixture of write rates.
#[derive(Debug)]
pub(super) struct Rates {
    /// Writes per second; the first is 0.
    rates: Vec<f64>,
    weights: Vec<f64>,
    lengths: Vec<f64>,
}

impl Rates {
    /// Fits to `counts[mask]` pages that were written in just the intervals of the mask.
    pub(super) fn fit(counts: &[f64; 1 << INTERVALS], lengths: &[f64]) -> Self {
        let shortest = lengths.iter().copied().fold(f64::INFINITY, f64::min);
        let all: f64 = lengths.iter().sum();
        let (slow, fast) = (SLOWEST / all.max(1e-6), FASTEST / shortest.max(1e-6));
        let step = (fast / slow).powf(1.0 / (RATES - 1) as f64);
        let mut rates = vec![0.0];
        rates.extend((0..RATES).map(|at| slow * step.powf(at as f64)));
        let mut fitted = Self {
            weights: vec![1.0 / rates.len() as f64; rates.len()],
            rates,
            lengths: lengths.to_vec(),
        };
        let seen: Vec<(f64, Vec<f64>)> = (0_u8..=u8::MAX)
            .zip(counts)
            .filter(|(_, count)| **count > 0.0)
            .map(|(mask, count)| (*count, fitted.likelihoods(mask)))
            .collect();
        let pages: f64 = seen.iter().map(|(count, _)| count).sum();
        if pages <= 0.0 {
            return fitted;
        }
        for _ in 0..STEPS {
            let mut next = vec![0.0; fitted.weights.len()];
            for (count, likelihoods) in &seen {
                let joint: Vec<f64> = likelihoods
                    .iter()
                    .zip(&fitted.weights)
                    .map(|(l, w)| l * w)
                    .collect();
                let sum: f64 = joint.iter().sum::<f64>().max(f64::MIN_POSITIVE);
                for (next, joint) in next.iter_mut().zip(joint) {
                    *next += count * joint / sum / pages;
                }
            }
            fitted.weights = next;
        }
        fitted
    }

    /// The probability of a mask at each rate.
    fn likelihoods(&self, mask: u8) -> Vec<f64> {
        let at = |rate: f64| {
            self.lengths.iter().enumerate().map(move |(at, length)| {
                let quiet = (-rate * length).exp();
                if mask & 1 << at == 0 {
                    quiet
                } else {
                    1.0 - quiet
                }
            })
        };
        self.rates.iter().map(|rate| at(*rate).product()).collect()
    }

    /// How likely each rate is for a page of this mask.
    fn posterior(&self, mask: u8) -> Vec<f64> {
        let joint = self.likelihoods(mask);
        let joint: Vec<f64> = joint
            .iter()
            .zip(&self.weights)
            .map(|(l, w)| l * w)
            .collect();
        let sum: f64 = joint.iter().sum::<f64>().max(f64::MIN_POSITIVE);
        joint.iter().map(|joint| joint / sum).collect()
    }

    /// A draw of rates for pages by their masks, as places in [`into_speeds`](Self::into_speeds).
    pub(super) fn draw(&self) -> impl Fn(u8, &mut Rng) -> u8 + use<> {
        let table: Vec<Vec<f64>> = (0..=u8::MAX).map(|mask| self.posterior(mask)).collect();
        move |mask, rng| {
            let mut left = rng.unit();
            for (class, share) in (0..).zip(&table[usize::from(mask)]) {
                left -= share;
                if left < 0.0 {
                    return class;
                }
            }
            0
        }
    }

    /// Writes per second; the first is none.
    pub(super) fn into_speeds(self) -> Vec<f64> {
        self.rates
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a guest of two kinds of pages shows, and what is then predicted for a longer interval.
    #[test]
    fn a_mixture_predicts_longer_intervals() {
        let lengths = [0.05, 0.1, 0.2, 0.4];
        let (hot, cold) = ((2_000.0, 8.0), (30_000.0, 0.3));
        let mut counts = [0.0; 1 << INTERVALS];
        for (pages, rate) in [hot, cold] {
            for (mask, count) in counts.iter_mut().enumerate().take(1 << lengths.len()) {
                let p: f64 = lengths
                    .iter()
                    .enumerate()
                    .map(|(at, length)| {
                        let quiet = f64::exp(-rate * length);
                        if mask & 1 << at == 0 {
                            quiet
                        } else {
                            1.0 - quiet
                        }
                    })
                    .product();
                *count += pages * p;
            }
        }
        let rates = Rates::fit(&counts, &lengths);
        let draw = rates.draw();
        let mut rng = Rng::new(1);
        for time in [0.02, 0.1, 1.0, 3.0] {
            let truth: f64 = [hot, cold]
                .iter()
                .map(|(pages, rate)| pages * (1.0 - f64::exp(-rate * time)))
                .sum();
            let mut predicted = 0.0;
            for (mask, count) in (0..=u8::MAX).zip(&counts) {
                // Ten draws for each kind of page.
                let mean: f64 = (0..200)
                    .map(|_| rates.rates[usize::from(draw(mask, &mut rng))])
                    .map(|rate| 1.0 - f64::exp(-rate * time))
                    .sum::<f64>()
                    / 200.0;
                predicted += count * mean;
            }
            let ratio = predicted / truth;
            assert!((ratio - 1.0).abs() < 0.15, "{time} s: {ratio}");
        }
    }

    #[test]
    fn an_idle_guest_has_no_rate() {
        let mut counts = [0.0; 1 << INTERVALS];
        counts[0] = 1e6;
        let rates = Rates::fit(&counts, &[0.1, 0.2]);
        let draw = rates.draw();
        let mut rng = Rng::new(1);
        let sum: f64 = (0..1000)
            .map(|_| rates.rates[usize::from(draw(0, &mut rng))])
            .sum();
        assert!(sum / 1000.0 < 0.05, "{sum}");
    }
}
