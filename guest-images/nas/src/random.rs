//! The pseudo-random generator of the benchmarks: x' = a·x mod 2^46 (NAS-95-020, section 2.3).
//!
//! The definition splits the factors into halves to stay exact in double precision. Because 2^46
//! divides 2^64, a wrapping 64-bit product masked to 46 bits is the same number, and much faster.

/// The multiplier of all kernels, 5^13.
pub(crate) const A: u64 = 1_220_703_125;

const MASK: u64 = (1 << 46) - 1;

/// 2^-46: from the state to the interval (0, 1).
pub(crate) const R46: f64 = 1.0 / (1u64 << 46) as f64;

/// The generator's state.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Random(u64);

impl Random {
    /// A generator that starts from `seed` (an odd number below 2^46).
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed & MASK)
    }

    /// Steps once and returns the new 46-bit state.
    #[inline(always)]
    pub(crate) fn next_bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(A) & MASK;
        self.0
    }

    /// Steps once and returns the new state as a number in (0, 1).
    #[inline(always)]
    pub(crate) fn next(&mut self) -> f64 {
        self.next_bits() as f64 * R46
    }

    /// Moves on by `steps` at once, as if `next` had been called that often.
    pub(crate) fn skip(&mut self, steps: u64) {
        let mut factor = A;
        let mut left = steps;
        while left > 0 {
            if left & 1 == 1 {
                self.0 = self.0.wrapping_mul(factor) & MASK;
            }
            factor = factor.wrapping_mul(factor) & MASK;
            left >>= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The published algorithm, in double precision with split factors.
    fn published(x: f64) -> f64 {
        let (t23, r23) = (8_388_608.0f64, 1.0 / 8_388_608.0f64);
        let (t46, r46) = (t23 * t23, r23 * r23);
        let a = A as f64;
        let (a1, x1) = ((r23 * a).trunc(), (r23 * x).trunc());
        let (a2, x2) = (a - t23 * a1, x - t23 * x1);
        let t1 = a1 * x2 + a2 * x1;
        let z = t1 - t23 * (r23 * t1).trunc();
        let t3 = t23 * z + a2 * x2;
        t3 - t46 * (r46 * t3).trunc()
    }

    #[test]
    fn integer_form_equals_published_form() {
        let mut random = Random::new(271_828_183);
        let mut x = 271_828_183.0;
        for _ in 0..10_000 {
            x = published(x);
            assert_eq!(random.next_bits() as f64, x);
        }
    }

    proptest! {
        #[test]
        fn skipping_equals_stepping(steps in 0u64..5000) {
            let mut a = Random::new(314_159_265);
            let mut b = a;
            a.skip(steps);
            for _ in 0..steps { b.next_bits(); }
            prop_assert_eq!(a.0, b.0);
        }
    }
}
