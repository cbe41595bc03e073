//! The few elementary functions that `core` lacks, to well below the benchmarks' epsilon.

/// 1/√x of a positive, normal `x`, to a few units in the last place.
///
/// `core` has no square root in stable Rust, and the processor's needs an `unsafe` intrinsic. The
/// classic first guess from the halved exponent is within 3.5 %; each Newton step squares the error
/// (times 3/2), four reach 1e-16. It has no division, which makes it about as fast here as dividing
/// by the processor's root.
#[inline(always)]
pub(crate) fn inverse_sqrt(x: f64) -> f64 {
    let half = 0.5 * x;
    let mut y = f64::from_bits(0x5fe6_eb50_c7b5_37a9u64.wrapping_sub(x.to_bits() >> 1));
    for _ in 0..4 {
        y *= 1.5 - half * y * y;
    }
    y
}

/// √x of a number that is 0 or positive and normal, to a few units in the last place.
pub(crate) fn sqrt(x: f64) -> f64 {
    x * inverse_sqrt(x)
}

const FRACTION_BITS: u32 = 52;
const FRACTION: u64 = (1 << FRACTION_BITS) - 1;
const ONE: u64 = 1023 << FRACTION_BITS;
// The bits of sqrt(1/2): subtracting them before taking the exponent off leaves a mantissa in
// [sqrt(1/2), sqrt(2)).
const HALF_ROOT: u64 = 0x3fe6_a09e_667f_3bcd;

/// Natural logarithm of a positive, finite, normal `x`; the relative error is a few units in the
/// last place.
///
/// x = 2^k·m with m near 1, and ln m = 2·atanh(s) with s = (m−1)/(m+1), |s| ≤ 0.172: the odd series
/// converges by a factor of 34 per term, so ten terms reach double precision.
#[inline(always)]
pub(crate) fn ln(x: f64) -> f64 {
    let shifted = x.to_bits().wrapping_sub(HALF_ROOT);
    // The arithmetic shift keeps the sign of the exponent.
    let k = (shifted.cast_signed() >> FRACTION_BITS) as f64;
    let m = f64::from_bits((shifted & FRACTION) + HALF_ROOT);
    let s = (m - 1.0) / (m + 1.0);
    let z = s * s;
    let w = z * z;
    // Even and odd terms apart: two short chains instead of one long one.
    let even = 1.0 / 3.0 + w * (1.0 / 7.0 + w * (1.0 / 11.0 + w * (1.0 / 15.0 + w * (1.0 / 19.0))));
    let odd = 1.0 / 5.0 + w * (1.0 / 9.0 + w * (1.0 / 13.0 + w * (1.0 / 17.0 + w * (1.0 / 21.0))));
    let tail = s * z * (even + z * odd);
    k * core::f64::consts::LN_2 + 2.0 * (s + tail)
}

/// e^x, clamped to the range of normal numbers.
pub(crate) fn exp(x: f64) -> f64 {
    let k = round(x * core::f64::consts::LOG2_E).clamp(-1022, 1023);
    let r = x - k as f64 * core::f64::consts::LN_2;
    let mut sum = 1.0;
    for i in (1..=14u32).rev() {
        sum = 1.0 + sum * r / f64::from(i);
    }
    sum * f64::from_bits(ONE.wrapping_add_signed(k << FRACTION_BITS))
}

/// x^y for a positive `x`.
pub(crate) fn pow(x: f64, y: f64) -> f64 {
    exp(y * ln(x))
}

/// Cosine and sine of `part` of `whole` parts of a full turn, for up to half a turn and a `whole`
/// that four divides.
pub(crate) fn turn(part: usize, whole: usize) -> (f64, f64) {
    // Mirrored until the angle is an eighth at most, in whole numbers, so that nothing is lost.
    if 4 * part > whole {
        let (cosine, sine) = turn(whole / 2 - part, whole);
        return (-cosine, sine);
    }
    if 8 * part > whole {
        let (cosine, sine) = turn(whole / 4 - part, whole);
        return (sine, cosine);
    }
    let angle = core::f64::consts::TAU * part as f64 / whole as f64;
    let square = angle * angle;
    // The series, from their last terms that count: 0.8^18/18! is below 1e-17.
    let series = |first: u32| {
        (0..8).rev().fold(1.0, |sum, i| {
            let n = f64::from(first + 2 * i);
            1.0 - sum * square / (n * (n + 1.0))
        })
    };
    (series(1), angle * series(2))
}

/// Rounds to the nearest integer, halves away from zero; saturates.
#[expect(
    clippy::cast_possible_truncation,
    reason = "rounding is the purpose; the cast saturates"
)]
pub(crate) fn round(x: f64) -> i64 {
    (if x < 0.0 { x - 0.5 } else { x + 0.5 }) as i64
}

/// An index from a 64-bit count. Addresses have 64 bits wherever this crate runs; elsewhere the
/// value saturates and the bounds check that follows says so.
#[inline(always)]
pub(crate) fn index(x: u64) -> usize {
    usize::try_from(x).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn turn_agrees_with_std() {
        for whole in [4, 8, 64, 512] {
            for part in 0..=whole / 2 {
                let (cosine, sine) = turn(part, whole);
                let angle = core::f64::consts::TAU * part as f64 / whole as f64;
                assert!((cosine - angle.cos()).abs() < 6e-16, "{part} of {whole}");
                assert!((sine - angle.sin()).abs() < 6e-16, "{part} of {whole}");
            }
        }
    }

    proptest! {
        #[test]
        fn ln_and_exp_agree_with_std(x in 1e-300f64..1e300, y in -700.0f64..700.0, z in 1e-12f64..1.0) {
            prop_assert!((ln(x) - x.ln()).abs() <= 4e-16 * x.ln().abs().max(1.0), "{x}");
            prop_assert!((ln(z) - z.ln()).abs() <= 1e-15 * z.ln().abs() + 1e-16, "{z}");
            prop_assert!((exp(y) - y.exp()).abs() <= 1e-12 * y.exp(), "{y}");
        }
        #[test]
        fn sqrt_and_round_agree_with_std(x in 1e-9f64..1e18, y in -1e15f64..1e15) {
            prop_assert!((sqrt(x) - x.sqrt()).abs() <= 1e-15 * x.sqrt(), "{x}");
            prop_assert_eq!(round(y) as f64, y.round());
        }
    }
}
