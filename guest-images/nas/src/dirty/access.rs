//! In what order a rank writes the pages of its slice.

use super::Pattern;
use super::content::mix;
use crate::math::{exp, index, ln, pow, round};

/// A sequence of page numbers below a length.
pub(super) struct Access {
    order: Order,
    len: usize,
    state: u64,
}

enum Order {
    Sequential { next: usize },
    Uniform,
    Zipf { zipf: Zipf, stride: u64 },
}

impl Access {
    pub(super) fn new(pattern: Pattern, len: usize, seed: u64) -> Self {
        let order = match pattern {
            Pattern::Sequential => Order::Sequential { next: 0 },
            Pattern::Uniform => Order::Uniform,
            Pattern::Zipf { exponent } => Order::Zipf {
                zipf: Zipf::new(len.max(1) as u64, exponent),
                stride: coprime(len.max(1) as u64),
            },
        };
        Self {
            order,
            len,
            state: mix(seed),
        }
    }

    fn random(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.state)
    }

    /// The next page; below `len` unless that is 0.
    pub(super) fn next(&mut self) -> usize {
        let len = self.len.max(1) as u64;
        let random = self.random();
        match &mut self.order {
            Order::Sequential { next } => {
                let at = *next;
                *next = if at + 1 < self.len { at + 1 } else { 0 };
                at
            }
            Order::Uniform => index(scale(random, len)),
            Order::Zipf { zipf, stride } => {
                let mut random = random;
                let rank = loop {
                    if let Some(rank) = zipf.accept(fraction(random)) {
                        break rank;
                    }
                    random = mix(random);
                };
                // Popular pages must not be neighbours: a step that shares no factor with the
                // length permutes them.
                index(scale_product(rank - 1, *stride, len))
            }
        }
    }
}

/// `x`·`len` / 2^64: a number below `len`, without a division.
fn scale(x: u64, len: u64) -> u64 {
    u64::try_from((u128::from(x) * u128::from(len)) >> 64).unwrap_or(0)
}

fn scale_product(a: u64, b: u64, modulus: u64) -> u64 {
    // Both factors are below 2^28 pages in practice; the wide product makes it true for any.
    u64::try_from(u128::from(a) * u128::from(b) % u128::from(modulus)).unwrap_or(0)
}

fn fraction(x: u64) -> f64 {
    ((x >> 11) as f64 + 0.5) / (1u64 << 53) as f64
}

/// A number near 0.618·`n` that has no factor in common with `n`.
fn coprime(n: u64) -> u64 {
    let gcd = |mut a: u64, mut b: u64| {
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    let start = scale(0x9e37_79b9_7f4a_7c15, n).max(1);
    (start..start + n)
        .find(|&step| gcd(step, n) == 1)
        .unwrap_or(1)
}

/// Zipf-distributed ranks by rejection-inversion (W. Hörmann, G. Derflinger, "Rejection-inversion
/// to generate variates from monotone discrete distributions", 1996): no table, so it costs no
/// memory of the guest.
struct Zipf {
    n: f64,
    exponent: f64,
    low: f64,
    high: f64,
    sure: f64,
}

impl Zipf {
    fn new(n: u64, exponent: f64) -> Self {
        let n = n as f64;
        let mut zipf = Self {
            n,
            exponent,
            low: 0.0,
            high: 0.0,
            sure: 0.0,
        };
        zipf.low = zipf.integral(1.5) - 1.0;
        zipf.high = zipf.integral(n + 0.5);
        zipf.sure = 2.0 - zipf.inverse(zipf.integral(2.5) - pow(2.0, -exponent));
        zipf
    }

    /// The integral of x^-exponent, up to a constant.
    fn integral(&self, x: f64) -> f64 {
        let e = 1.0 - self.exponent;
        if e * e < 1e-12 {
            ln(x)
        } else {
            (pow(x, e) - 1.0) / e
        }
    }

    fn inverse(&self, y: f64) -> f64 {
        let e = 1.0 - self.exponent;
        if e * e < 1e-12 {
            exp(y)
        } else {
            pow((1.0 + y * e).max(f64::MIN_POSITIVE), 1.0 / e)
        }
    }

    /// The rank (from 1) that a uniform number leads to, unless it is rejected.
    fn accept(&self, uniform: f64) -> Option<u64> {
        let u = self.high + uniform * (self.low - self.high);
        let x = self.inverse(u);
        let k = (round(x) as f64).clamp(1.0, self.n);
        let accepted = k - x <= self.sure || u >= self.integral(k + 0.5) - pow(k, -self.exponent);
        accepted.then(|| round(k).unsigned_abs().max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_page_is_in_range(len in 1usize..5000, seed in any::<u64>(), exponent in 0.01f64..10.0) {
            for pattern in [Pattern::Sequential, Pattern::Uniform, Pattern::Zipf { exponent }] {
                let mut access = Access::new(pattern, len, seed);
                for _ in 0..200 {
                    prop_assert!(access.next() < len);
                }
            }
        }
    }

    #[test]
    fn sequential_visits_all_in_turn() {
        let mut access = Access::new(Pattern::Sequential, 5, 1);
        let seen: Vec<_> = (0..12).map(|_| access.next()).collect();
        assert_eq!(seen, [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]);
    }

    #[test]
    fn zipf_follows_its_law() {
        let (n, draws) = (100u64, 200_000u32);
        for exponent in [0.5, 0.99, 1.0, 2.0] {
            let mut access = Access::new(Pattern::Zipf { exponent }, 100, 7);
            let stride = coprime(n);
            let mut counts = [0u32; 100];
            (0..draws).for_each(|_| counts[access.next()] += 1);
            let total: f64 = (1..=n).map(|k| (k as f64).powf(-exponent)).sum();
            for k in [1u64, 2, 3, 10, 50] {
                let expected = f64::from(draws) * (k as f64).powf(-exponent) / total;
                let seen = f64::from(counts[index(scale_product(k - 1, stride, n))]);
                assert!(
                    (seen - expected).abs() < 5.0 * expected.sqrt() + 1.0,
                    "{exponent} {k} {seen} {expected}"
                );
            }
        }
    }
}
