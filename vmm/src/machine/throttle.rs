//! Slowing vCPUs down: each rests a share of its time.
//!
//! ```text
//!  vCPU   ── runs r ──▶ out of KVM_RUN ── rests r · share ÷ (1 − share) ──▶ runs …
//!                           ▲                       │
//!  a thread, each SLICE: signals those that         └ ends at once for a pause, an end, full speed
//!  are to rest
//! ```
//!
//! A vCPU measures itself how long it ran, so that the share is right however late the signal
//! comes: one that is lost makes it run, and then rest, longer. Without a vCPU to slow there is no
//! thread.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use ferry_devices::sync::{lock, wait_timeout, wait_timeout_while};
use ferry_devices::thread;

use crate::kvm::Kicker;

/// How long a vCPU runs between two rests. At a share of 99 % the rest is 0.4 s.
const SLICE: Duration = Duration::from_millis(4);
/// The longest time that is counted as having run: a vCPU that was not slowed before owes nothing.
const LONGEST: Duration = Duration::from_millis(20);
/// The largest share, in thousandths.
const MOST: u32 = 990;

/// The shares of a machine's vCPUs, and the thread that has them rest.
#[derive(Debug)]
pub(super) struct Throttle {
    kickers: Vec<Kicker>,
    /// Thousandths of its time that each rests.
    shares: Vec<AtomicU32>,
    /// Nanoseconds that each has rested.
    rested: Vec<AtomicU64>,
    /// Any share is not 0: what running vCPUs look at.
    on: AtomicBool,
    /// A thread signals them.
    beating: Mutex<bool>,
    /// A rest is to end, or the shares have changed.
    changed: Condvar,
}

impl Throttle {
    pub(super) fn new(kickers: Vec<Kicker>) -> Arc<Self> {
        Arc::new(Self {
            shares: kickers.iter().map(|_| AtomicU32::new(0)).collect(),
            rested: kickers.iter().map(|_| AtomicU64::new(0)).collect(),
            on: AtomicBool::new(false),
            beating: Mutex::new(false),
            changed: Condvar::new(),
            kickers,
        })
    }

    /// From now on each vCPU rests this share of its time; those left out run at full speed.
    pub(super) fn slow(self: &Arc<Self>, shares: &[f64]) -> io::Result<()> {
        let mut beating = lock(&self.beating);
        if !self.set(shares) || *beating {
            return Ok(());
        }
        let throttle = Arc::clone(self);
        let failed = Arc::clone(self);
        let beat = move || {
            throttle.beat();
            Ok(())
        };
        let failure = move |why| {
            tracing::error!("the guest runs at full speed again: {why}");
            failed.release();
            *lock(&failed.beating) = false;
        };
        let started = thread::spawn(thread::Kind::Migration, "ferry-throttle", beat, failure);
        if let Err(error) = started {
            drop(beating);
            self.release();
            return Err(error);
        }
        *beating = true;
        Ok(())
    }

    /// Full speed for all.
    pub(super) fn release(&self) {
        let _beating = lock(&self.beating);
        self.set(&[]);
    }

    /// Stores the shares, and says whether any is not 0. To be called with `beating` locked:
    /// between its last look and its wait no vCPU may miss it.
    fn set(&self, shares: &[f64]) -> bool {
        let mut on = false;
        for (at, share) in self.shares.iter().enumerate() {
            let thousandths = thousandths(shares.get(at).copied().unwrap_or(0.0));
            on |= thousandths > 0;
            share.store(thousandths, Ordering::Relaxed);
        }
        self.on.store(on, Ordering::SeqCst);
        self.changed.notify_all();
        on
    }

    /// Ends the rests that are under way: the vCPUs are wanted for a pause.
    pub(super) fn wake(&self) {
        // Under the lock: between its last look and its wait no vCPU may miss it.
        let _beating = lock(&self.beating);
        self.changed.notify_all();
    }

    /// How long each has rested.
    pub(super) fn rested(&self) -> Vec<Duration> {
        self.rested
            .iter()
            .map(|nanos| Duration::from_nanos(nanos.load(Ordering::Relaxed)))
            .collect()
    }

    /// The thread: signals those that are to rest, until none is.
    fn beat(&self) {
        let mut beating = lock(&self.beating);
        while self.on.load(Ordering::SeqCst) {
            for (share, kicker) in self.shares.iter().zip(&self.kickers) {
                if share.load(Ordering::Relaxed) > 0 {
                    kicker.nudge();
                }
            }
            beating = wait_timeout(&self.changed, beating, SLICE);
        }
        *beating = false;
    }

    /// A vCPU that is out of KVM_RUN, and ran since `ran`, rests as long as it has to, unless it is
    /// to `leave`.
    pub(super) fn rest(&self, index: usize, ran: &mut Instant, leave: &AtomicBool) {
        if !self.on.load(Ordering::Relaxed) {
            return;
        }
        let Some(share) = self.shares.get(index) else {
            return;
        };
        let owed = rest_after(ran.elapsed(), share.load(Ordering::Relaxed));
        if owed.is_zero() {
            return;
        }
        let began = Instant::now();
        let rests =
            |_: &mut bool| !leave.load(Ordering::SeqCst) && share.load(Ordering::Relaxed) > 0;
        drop(wait_timeout_while(
            &self.changed,
            lock(&self.beating),
            owed,
            rests,
        ));
        let now = Instant::now();
        let nanos = u64::try_from((now - began).as_nanos()).unwrap_or(u64::MAX);
        if let Some(rested) = self.rested.get(index) {
            rested.fetch_add(nanos, Ordering::Relaxed);
        }
        *ran = now;
    }
}

/// A share in thousandths.
fn thousandths(share: f64) -> u32 {
    // Saturates; NaN is 0.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let thousandths = (share * 1000.0).round() as u32;
    thousandths.min(MOST)
}

/// How long to rest after having run for `ran`; not at all after less than a slice, for most exits
/// are no signal.
fn rest_after(ran: Duration, share: u32) -> Duration {
    if share == 0 || ran < SLICE / 2 {
        return Duration::ZERO;
    }
    ran.min(LONGEST) * share / (1000 - share.min(MOST))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rest_is_in_proportion_to_what_ran() {
        let ms = Duration::from_millis;
        assert_eq!(rest_after(ms(4), 500), ms(4));
        assert_eq!(rest_after(ms(8), 750), ms(24));
        assert_eq!(rest_after(ms(4), 990), ms(396));
        assert_eq!(rest_after(ms(4), 0), ms(0));
        // A few exits after a rest, and an hour before the first.
        assert_eq!(rest_after(ms(1), 990), ms(0));
        assert_eq!(rest_after(ms(3_600_000), 500), LONGEST);
    }

    #[test]
    fn shares_are_bounded() {
        for (share, expected) in [
            (0.0, 0),
            (0.25, 250),
            (1.0, MOST),
            (7.0, MOST),
            (-1.0, 0),
            (f64::NAN, 0),
        ] {
            assert_eq!(thousandths(share), expected, "{share}");
        }
    }

    /// A vCPU at rest for most of a second is there at once when it is to leave, or at full speed.
    #[test]
    fn a_rest_ends_for_a_pause_and_for_full_speed() {
        let throttle = Throttle::new(Vec::new());
        let throttle = Arc::new(Throttle {
            shares: vec![AtomicU32::new(MOST)],
            rested: vec![AtomicU64::new(0)],
            on: AtomicBool::new(true),
            ..Arc::try_unwrap(throttle).unwrap()
        });
        for leaves in [true, false] {
            throttle.shares[0].store(MOST, Ordering::Relaxed);
            throttle.on.store(true, Ordering::SeqCst);
            let leave = AtomicBool::new(false);
            std::thread::scope(|scope| {
                let resting = scope.spawn(|| {
                    // Again and again, so that it is surely at rest when it is woken.
                    while throttle.on.load(Ordering::SeqCst) && !leave.load(Ordering::SeqCst) {
                        let mut ran = Instant::now() - LONGEST;
                        throttle.rest(0, &mut ran, &leave);
                    }
                });
                if leaves {
                    leave.store(true, Ordering::SeqCst);
                    throttle.wake();
                } else {
                    throttle.release();
                }
                resting.join().unwrap();
            });
        }
    }
}
