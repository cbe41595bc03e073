//! SplitMix64: small, seedable, the same everywhere.

/// A random number generator whose whole state is its seed.
#[derive(Clone, Debug)]
pub struct Rng(u64);

/// 2⁶⁴ divided by the golden ratio, odd: of the paper.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

impl Rng {
    /// From a seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Any number.
    pub const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(STEP);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Passes over so many numbers.
    pub const fn skip(&mut self, count: u64) {
        self.0 = self.0.wrapping_add(STEP.wrapping_mul(count));
    }

    /// A number below `n`; 0 for `n` = 0.
    pub const fn below(&mut self, n: u64) -> u64 {
        if n == 0 { 0 } else { self.next() % n }
    }

    /// A number in `0.0..1.0`.
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// True with probability `p`.
    pub fn chance(&mut self, p: f64) -> bool {
        self.unit() < p
    }

    /// As [`chance`](Self::chance), for a probability that is asked for often.
    pub const fn hits(&mut self, odds: Odds) -> bool {
        self.next() >> 11 < odds.0
    }
}

/// A probability in 2⁻⁵³, the steps of [`Rng::unit`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Odds(u64);

impl Odds {
    const ALL: f64 = (1_u64 << 53) as f64;

    /// Of a probability; what is not in `0.0..=1.0` becomes the nearer end.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "at most 2^53")]
    pub const fn new(p: f64) -> Self {
        let steps = p.clamp(0.0, 1.0) * Self::ALL;
        let whole = steps as u64;
        Self(whole + (steps > whole as f64) as u64)
    }

    /// Whether it never happens.
    #[must_use]
    pub const fn is_none(self) -> bool {
        self.0 == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odds_hit_exactly_when_their_probability_does() {
        for p in [0.0, f64::MIN_POSITIVE, 0.05, 0.1, 1.0 / 3.0, 0.999_999, 1.0] {
            let (mut a, mut b) = (Rng::new(7), Rng::new(7));
            for _ in 0..1000 {
                assert_eq!(a.chance(p), b.hits(Odds::new(p)), "{p}");
            }
            // At the edge: the largest number below, and the smallest that is not.
            let steps = p * Odds::ALL;
            let edge = Odds::new(p).0;
            assert!(edge as f64 >= steps && (edge == 0 || ((edge - 1) as f64) < steps));
        }
        assert!(Odds::new(0.0).is_none() && !Odds::new(f64::MIN_POSITIVE).is_none());
    }

    #[test]
    fn passing_over_numbers_is_as_taking_them() {
        let (mut a, mut b) = (Rng::new(3), Rng::new(3));
        for count in [0, 1, 2, 1000] {
            (0..count).for_each(|_| {
                a.next();
            });
            b.skip(count);
            assert_eq!(a.next(), b.next());
        }
    }
}
