//! From one migration to its listeners: a queue for each, and none makes the migration wait.

use ferry_devices::sync::{lock, wait_timeout};
use ferry_migration::report::Event;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Events that a listener may be behind before the oldest are dropped.
const BACKLOG: usize = 256;

#[derive(Debug, Default)]
struct Queue {
    events: VecDeque<Event>,
    closed: bool,
}

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    arrived: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        lock(&self.queue)
    }
}

/// The listener's end.
#[derive(Debug)]
pub struct Subscription {
    shared: Arc<Shared>,
}

/// What [`Subscription::next`] found.
#[derive(Clone, Debug, PartialEq)]
pub enum Next {
    /// The next event, in order.
    Event(Box<Event>),
    /// Nothing within the time.
    Idle,
    /// Nothing will come any more.
    Closed,
}

impl Subscription {
    /// Waits for the next event, at most `timeout`.
    #[must_use]
    pub fn next(&self, timeout: Duration) -> Next {
        let deadline = Instant::now() + timeout;
        let mut queue = self.shared.lock();
        loop {
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

/// The migration's end. Dropping it closes every subscription.
#[derive(Debug, Default)]
pub struct Publisher {
    listeners: Vec<Arc<Shared>>,
}

impl Publisher {
    /// One more listener, from the next event on.
    pub fn subscribe(&mut self) -> Subscription {
        let shared = Arc::new(Shared::default());
        self.listeners.push(Arc::clone(&shared));
        Subscription { shared }
    }

    /// Hands the event to all listeners; returns at once. One that is far behind loses its oldest
    /// events; since the report comes last, it is never among them.
    pub fn publish(&mut self, event: &Event) {
        // Only the publisher holds the queue of a subscription that was dropped.
        self.listeners.retain(|l| Arc::strong_count(l) > 1);
        for listener in &self.listeners {
            let mut queue = listener.lock();
            if queue.events.len() >= BACKLOG {
                queue.events.pop_front();
            }
            queue.events.push_back(event.clone());
            drop(queue);
            listener.arrived.notify_one();
        }
    }
}

impl Drop for Publisher {
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
    fn a_slow_listener_loses_the_oldest_and_keeps_the_last() {
        let mut publisher = Publisher::default();
        let s = publisher.subscribe();
        for _ in 0..BACKLOG * 3 {
            publisher.publish(&Event::Progress(Progress::default()));
        }
        publisher.publish(&round(9));
        drop(publisher);
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
        assert_eq!(publisher.listeners.len(), 1);
        assert_eq!(kept.next(Duration::ZERO), Next::Event(Box::new(round(1))));
        assert_eq!(kept.next(Duration::ZERO), Next::Idle);
    }
}
