//! What comes out of divisions: durations and counts of pages.

use std::time::Duration;

/// A duration from seconds that came out of a division: huge and odd values become a year.
pub(crate) fn seconds(s: f64) -> Duration {
    const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);
    Duration::try_from_secs_f64(s).map_or(YEAR, |d| d.min(YEAR))
}

/// A number of pages from a division: negative and odd values are none.
pub(crate) fn pages_in(pages: f64) -> u64 {
    // Saturates; NaN is 0. No guest has 2⁵³ pages.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let pages = pages as u64;
    pages
}
