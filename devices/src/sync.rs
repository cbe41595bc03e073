//! Locks that outlive a panic of their holder: the one way to take a lock in ferry.
//!
//! A panic ends the guest or the migration with a sentence
//! ([`thread::spawn`](crate::thread::spawn)); what is left must still be able to pause, save and
//! end. So what a lock guards is valid between any two statements, and poison says nothing more.

use std::sync::{
    Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
};
use std::time::{Duration, Instant};

/// Takes the lock.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes the lock for reading.
pub fn read<T: ?Sized>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

/// Takes the lock for writing.
pub fn write<T: ?Sized>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for a change.
pub fn wait<'a, T>(changed: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    changed.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

/// Waits for a change, at most `time`.
pub fn wait_timeout<'a, T>(
    changed: &Condvar,
    guard: MutexGuard<'a, T>,
    time: Duration,
) -> MutexGuard<'a, T> {
    changed
        .wait_timeout(guard, time)
        .unwrap_or_else(PoisonError::into_inner)
        .0
}

/// Waits while `condition` holds.
pub fn wait_while<'a, T>(
    changed: &Condvar,
    guard: MutexGuard<'a, T>,
    condition: impl FnMut(&mut T) -> bool,
) -> MutexGuard<'a, T> {
    changed
        .wait_while(guard, condition)
        .unwrap_or_else(PoisonError::into_inner)
}

/// Waits while `condition` holds, at most `time`.
pub fn wait_timeout_while<'a, T>(
    changed: &Condvar,
    guard: MutexGuard<'a, T>,
    time: Duration,
    condition: impl FnMut(&mut T) -> bool,
) -> MutexGuard<'a, T> {
    changed
        .wait_timeout_while(guard, time, condition)
        .unwrap_or_else(PoisonError::into_inner)
        .0
}

/// How long a wait may last, counted in this process's own time: while it is stopped (SIGSTOP, a
/// suspended host), the threads that it waits for are stopped too.
#[derive(Debug)]
pub struct Allowance {
    left: Duration,
}

impl Allowance {
    /// The longest single wait. One that takes more than twice as long was stopped.
    const SLICE: Duration = Duration::from_millis(100);

    /// For waits that together last at most `time`.
    #[must_use]
    pub const fn new(time: Duration) -> Self {
        Self { left: time }
    }

    /// Whether it is used up.
    #[must_use]
    pub const fn is_spent(&self) -> bool {
        self.left.is_zero()
    }

    /// Waits for a change, for a slice of the time.
    pub fn wait<'a, T>(
        &mut self,
        changed: &Condvar,
        guard: MutexGuard<'a, T>,
    ) -> MutexGuard<'a, T> {
        let began = Instant::now();
        let guard = wait_timeout(changed, guard, self.left.min(Self::SLICE));
        self.spend(began.elapsed());
        guard
    }

    /// A wait has taken so long.
    pub fn spend(&mut self, passed: Duration) {
        self.left = self.left.saturating_sub(passed.min(Self::SLICE * 2));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_of_the_process_uses_up_no_allowance() {
        let mut allowance = Allowance::new(Duration::from_secs(5));
        allowance.spend(Duration::from_secs(60));
        assert!(!allowance.is_spent());
        for _ in 0..50 {
            allowance.spend(Duration::from_millis(100));
        }
        assert!(allowance.is_spent());
    }

    #[test]
    fn a_lock_outlives_a_panic_of_its_holder() {
        let value = Mutex::new(1);
        std::thread::scope(|scope| {
            let holder = scope.spawn(|| {
                let _held = lock(&value);
                panic!("a defect");
            });
            assert!(holder.join().is_err());
        });
        assert_eq!(*lock(&value), 1);
    }
}
