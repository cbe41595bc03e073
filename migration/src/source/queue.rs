//! Keeping the push stream out of the way of answers to page faults.

use crate::port::Link;
use std::time::Duration;

/// How much of a push stream may wait in its socket. An answer to a fault leaves on another, but both queue for the
/// same link: so as much as the link carries in a moment, by what it was seen to carry.
pub(super) struct Queue {
    since: Duration,
    bytes: u64,
    bound: u32,
}

impl Queue {
    /// What may wait, as time on the link.
    const MOMENT: Duration = Duration::from_micros(250);
    /// How often the rate is looked at.
    const EVERY: Duration = Duration::from_millis(20);
    /// Less starves the link, more gains nothing.
    const LEAST: u32 = 32 << 10;
    const MOST: u32 = 256 << 10;

    pub(super) fn new<L: Link>(now: Duration, link: &mut L) -> Self {
        let bound = Self::LEAST * 2;
        link.bound_queue(bound);
        Self {
            since: now,
            bytes: 0,
            bound,
        }
    }

    pub(super) fn pushed<L: Link>(&mut self, bytes: u64, now: Duration, link: &mut L) {
        self.bytes += bytes;
        let took = now.saturating_sub(self.since);
        if took < Self::EVERY {
            return;
        }
        let rate = self.bytes as f64 / took.as_secs_f64();
        let wanted = crate::policy::pages_in(rate * Self::MOMENT.as_secs_f64());
        let wanted = u32::try_from(wanted)
            .unwrap_or(Self::MOST)
            .clamp(Self::LEAST, Self::MOST);
        // A quarter more or less is noise.
        if wanted.abs_diff(self.bound) > self.bound / 4 {
            link.bound_queue(wanted);
            self.bound = wanted;
        }
        (self.since, self.bytes) = (now, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    /// Remembers what was asked of it.
    #[derive(Default)]
    struct Asked(Vec<u32>);

    impl Link for Asked {
        fn send(&mut self, _: &[u8], _: &[u8]) -> io::Result<()> {
            Ok(())
        }
        fn recv(&mut self, _: &mut [u8]) -> io::Result<()> {
            Ok(())
        }
        fn wait_readable(&mut self, _: Duration) -> io::Result<bool> {
            Ok(false)
        }
        fn set_timeout(&mut self, _: Option<Duration>) {}
        fn bound_queue(&mut self, bytes: u32) {
            self.0.push(bytes);
        }
    }

    #[test]
    fn the_queue_follows_the_links_rate() {
        let mut link = Asked::default();
        let mut queue = Queue::new(Duration::ZERO, &mut link);
        let mut now = Duration::ZERO;
        // Bytes per millisecond: 1 Gbit/s, then far more, then next to nothing.
        for rate in [125_000, 4_000_000, 100] {
            for _ in 0..60 {
                now += Duration::from_millis(1);
                queue.pushed(rate, now, &mut link);
            }
        }
        assert_eq!(link.0, [64 << 10, 32 << 10, 256 << 10, 32 << 10]);
    }
}
