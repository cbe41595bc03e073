//! The rate of this machine's time-stamp counter, measured.
//!
//! An emulated machine's counter is the real one. Its kernel would measure it against an emulated
//! timer, and where the emulator was interrupted in the middle, as on a busy machine, time would
//! run several times too fast ever after. So nested hosts are told.

use std::time::{Duration, Instant};

/// How long is measured. The error is some microseconds in this.
const SPAN: Duration = Duration::from_millis(100);
/// Readings of which the quickest is taken: it was not interrupted.
const READINGS: usize = 200;

/// The counter's rate in kHz.
#[must_use]
pub fn measure_khz() -> Option<u64> {
    let (at, first) = reading();
    std::thread::sleep(SPAN);
    let (then, second) = reading();
    let nanos = u64::try_from(then.checked_duration_since(at)?.as_nanos()).ok()?;
    let ticks = second.checked_sub(first)?;
    ticks
        .checked_mul(1_000_000)?
        .checked_div(nanos)
        .filter(|khz| *khz > 0)
}

/// A time and the counter's value at that time.
fn reading() -> (Instant, u64) {
    let one = || {
        let before = Instant::now();
        let ticks = crate::sys::tsc();
        (before.elapsed(), before, ticks)
    };
    let (_, at, ticks) =
        (1..READINGS).map(|_| one()).fold(
            one(),
            |best, next| if next.0 < best.0 { next } else { best },
        );
    (at, ticks)
}

#[cfg(test)]
mod tests {
    #[test]
    fn two_measurements_agree() {
        let (Some(a), Some(b)) = (super::measure_khz(), super::measure_khz()) else {
            panic!("no rate");
        };
        assert!(a.abs_diff(b) < a / 100, "{a} and {b} kHz");
    }
}
