//! The bandwidth that a migration measures: bytes that the destination has *placed* over the
//! time that took, not bytes that fitted into a socket buffer.

use std::collections::VecDeque;
use std::time::Duration;

/// A sliding window of acknowledged rounds.
#[derive(Debug, Default)]
pub(crate) struct Bandwidth {
    window: VecDeque<(u64, Duration)>,
}

impl Bandwidth {
    /// The window keeps at least this many bytes: small rounds measure latency, not bandwidth.
    const WINDOW_BYTES: u64 = 8 << 20;

    /// Records `bytes` that took `time`.
    pub(crate) fn record(&mut self, bytes: u64, time: Duration) {
        self.window.push_back((bytes, time));
        let mut sum: u64 = self.window.iter().map(|(bytes, _)| bytes).sum();
        while let Some(&(oldest, _)) = self.window.front()
            && sum - oldest >= Self::WINDOW_BYTES
        {
            sum -= oldest;
            self.window.pop_front();
        }
    }

    /// Bytes per second; `None` before anything was measured.
    pub(crate) fn estimate(&self) -> Option<f64> {
        let bytes: u64 = self.window.iter().map(|(bytes, _)| bytes).sum();
        let time: Duration = self.window.iter().map(|(_, time)| *time).sum();
        (bytes > 0).then(|| bytes as f64 / time.as_secs_f64().max(1e-6))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_rounds_do_not_hide_the_bandwidth() {
        let mut b = Bandwidth::default();
        assert_eq!(b.estimate(), None);
        b.record(100 << 20, Duration::from_secs(1));
        b.record(4096, Duration::from_millis(1));
        let rate = b.estimate().unwrap();
        assert!((rate - 104e6).abs() < 2e6, "{rate}");
        // Enough newer bytes replace the old ones.
        b.record(10 << 20, Duration::from_secs(1));
        let rate = b.estimate().unwrap();
        assert!((rate - 10.5e6).abs() < 1e6, "{rate}");
    }
}
