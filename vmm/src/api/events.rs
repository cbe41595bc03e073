//! From a migration, or from the whole VMM, to listeners: a queue for each, and none makes the
//! sender wait.

use ferry_devices::sync::{lock, wait_timeout};
use ferry_migration::report::Event;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Events that a listener may be behind before the oldest are dropped.
pub const BACKLOG: usize = 256;

#[derive(Debug)]
struct Queue<T> {
    events: VecDeque<T>,
    /// Dropped since the listener was last told.
    lost: u64,
    closed: bool,
}

#[derive(Debug)]
struct Shared<T> {
    queue: Mutex<Queue<T>>,
    arrived: Condvar,
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, Queue<T>> {
        lock(&self.queue)
    }

    fn new(events: VecDeque<T>, closed: bool) -> Arc<Self> {
        let queue = Queue {
            events,
            lost: 0,
            closed,
        };
        Arc::new(Self {
            queue: Mutex::new(queue),
            arrived: Condvar::new(),
        })
    }
}

/// The listener's end.
#[derive(Debug)]
pub struct Subscription<T = Event> {
    shared: Arc<Shared<T>>,
}

/// What [`Subscription::next`] found.
#[derive(Clone, Debug, PartialEq)]
pub enum Next<T = Event> {
    /// The next event, in order.
    Event(Box<T>),
    /// The listener was behind: so many events were dropped before the next one.
    Lost(u64),
    /// Nothing within the time.
    Idle,
    /// Nothing will come any more.
    Closed,
}

impl<T> Subscription<T> {
    /// One that holds `last` and ends after it.
    #[must_use]
    pub fn ended(last: Option<T>) -> Self {
        Self {
            shared: Shared::new(last.into_iter().collect(), true),
        }
    }

    /// Waits for the next event, at most `timeout`.
    #[must_use]
    pub fn next(&self, timeout: Duration) -> Next<T> {
        let deadline = Instant::now() + timeout;
        let mut queue = self.shared.lock();
        loop {
            if queue.lost > 0 {
                return Next::Lost(std::mem::take(&mut queue.lost));
            }
            if let Some(event) = queue.events.pop_front() {
                return Next::Event(Box::new(event));
            }
            if queue.closed {
                return Next::Closed;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Next::Idle;
            }
            queue = wait_timeout(&self.shared.arrived, queue, left);
        }
    }
}

/// The sender's end. Dropping it closes every subscription.
#[derive(Debug)]
pub struct Publisher<T = Event> {
    listeners: Vec<Arc<Shared<T>>>,
}

impl<T> Default for Publisher<T> {
    fn default() -> Self {
        Self {
            listeners: Vec::new(),
        }
    }
}

impl<T> Publisher<T> {
    /// One more listener, from the next event on.
    pub fn subscribe(&mut self) -> Subscription<T> {
        self.subscribe_after(None)
    }

    /// One more listener: it gets `first`, then every later event.
    pub fn subscribe_after(&mut self, first: Option<T>) -> Subscription<T> {
        let shared = Shared::new(first.into_iter().collect(), false);
        self.listeners.push(Arc::clone(&shared));
        Subscription { shared }
    }

    /// How many listen.
    pub fn listeners(&mut self) -> usize {
        // Only the publisher holds the queue of a subscription that was dropped.
        self.listeners.retain(|l| Arc::strong_count(l) > 1);
        self.listeners.len()
    }
}

impl<T: Clone> Publisher<T> {
    /// Hands the event to all listeners; returns at once. One that is far behind loses its oldest
    /// events, and is told how many; since a report comes last, it is never among them.
    pub fn publish(&mut self, event: &T) {
        self.listeners();
        for listener in &self.listeners {
            let mut queue = listener.lock();
            if queue.events.len() >= BACKLOG {
                queue.events.pop_front();
                queue.lost += 1;
            }
            queue.events.push_back(event.clone());
            drop(queue);
            listener.arrived.notify_one();
        }
    }
}

impl<T> Drop for Publisher<T> {
    fn drop(&mut self) {
        for listener in &self.listeners {
            listener.lock().closed = true;
            listener.arrived.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_migration::report::{Progress, Round};

    const LONG: Duration = Duration::from_secs(60);

    fn round(n: u32) -> Event {
        Event::Round(Round {
            n,
            ..Round::default()
        })
    }

    #[test]
    fn every_listener_hears_everything_in_order_and_then_the_end() {
        let mut publisher = Publisher::default();
        let (a, b) = (publisher.subscribe(), publisher.subscribe());
        publisher.publish(&round(1));
        publisher.publish(&round(2));
        drop(publisher);
        for s in [a, b] {
            assert_eq!(s.next(LONG), Next::Event(Box::new(round(1))));
            assert_eq!(s.next(LONG), Next::Event(Box::new(round(2))));
            assert_eq!(s.next(LONG), Next::Closed);
        }
    }

    #[test]
    fn a_slow_listener_loses_the_oldest_is_told_so_and_keeps_the_last() {
        let mut publisher = Publisher::default();
        let s = publisher.subscribe();
        for _ in 0..BACKLOG * 3 {
            publisher.publish(&Event::Progress(Progress::default()));
        }
        publisher.publish(&round(9));
        drop(publisher);
        let lost = BACKLOG as u64 * 2 + 1;
        assert_eq!(s.next(LONG), Next::Lost(lost));
        let mut seen = Vec::new();
        while let Next::Event(e) = s.next(LONG) {
            seen.push(*e);
        }
        assert_eq!(seen.len(), BACKLOG);
        assert_eq!(seen.last(), Some(&round(9)));
    }

    #[test]
    fn listeners_that_left_are_forgotten() {
        let mut publisher = Publisher::default();
        drop(publisher.subscribe());
        let kept = publisher.subscribe();
        publisher.publish(&round(1));
        assert_eq!(publisher.listeners(), 1);
        assert_eq!(kept.next(Duration::ZERO), Next::Event(Box::new(round(1))));
        assert_eq!(kept.next(Duration::ZERO), Next::Idle);
    }

    #[test]
    fn a_listener_that_comes_late_hears_what_is_and_one_after_the_end_just_that() {
        let mut publisher = Publisher::default();
        publisher.publish(&round(1));
        let late = publisher.subscribe_after(Some(round(2)));
        publisher.publish(&round(3));
        assert_eq!(late.next(LONG), Next::Event(Box::new(round(2))));
        assert_eq!(late.next(LONG), Next::Event(Box::new(round(3))));
        let after = Subscription::ended(Some(round(4)));
        assert_eq!(after.next(LONG), Next::Event(Box::new(round(4))));
        assert_eq!(after.next(LONG), Next::Closed);
    }
}
