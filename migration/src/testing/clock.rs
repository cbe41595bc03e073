//! Time that passes only when a test says so.

use crate::port::Clock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A clock that sleeping moves, and, where it ticks, each look at it too.
#[derive(Debug, Default)]
pub struct TestClock {
    nanos: AtomicU64,
    tick: u64,
}

/// 584 years are enough for any test.
fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl TestClock {
    /// Stands still but for sleeps.
    #[must_use]
    pub const fn still() -> Self {
        Self {
            nanos: AtomicU64::new(0),
            tick: 0,
        }
    }

    /// Moves by `tick` at each look, so that a wait for a point in time ends.
    #[must_use]
    pub fn ticking(tick: Duration) -> Self {
        Self {
            nanos: AtomicU64::new(0),
            tick: nanos(tick),
        }
    }
}

impl Clock for TestClock {
    fn now(&self) -> Duration {
        Duration::from_nanos(self.nanos.fetch_add(self.tick, Ordering::Relaxed))
    }

    fn sleep(&self, duration: Duration) {
        self.nanos.fetch_add(nanos(duration), Ordering::Relaxed);
    }
}
