//! The switches between the engine and its users, in every order of their threads.
//!
//! `owner.rs` decides between a cancel and the commit, `switch.rs` what of a user's changes is
//! made. Both are compiled here with the primitives of loom. It runs a model once for each order in
//! which threads can reach them, and for each value that the memory model lets a thread read.
//!
//! The models can fail: each rule is broken once, and the break must be found.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use ferry_migration::steering::SteeringError;
use loom::sync::Arc;
use loom::thread;
use options::Options;
use owner::{Owner, Ownership};
use std::time::Duration;
use steering::{Change, Steering};

#[path = "../src/source/owner.rs"]
mod owner;

mod options {
    pub use ferry_migration::options::*;
}

#[path = ".."]
mod steering {
    #[path = "src/steering/switch.rs"]
    mod switch;

    pub use ferry_migration::steering::{Change, SteeringError};
    pub use switch::Steering;
}

mod sync {
    pub use loom::sync::{Mutex, MutexGuard, atomic};

    pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
        mutex.lock().unwrap()
    }
}

/// What decides between a cancel and the commit.
trait Switch: Default + Send + Sync + 'static {
    fn cancel(&self) -> bool;
    fn commit(&self) -> bool;
    fn owner(&self) -> Owner;
    fn is_cancelled(&self) -> bool;
}

impl Switch for Ownership {
    fn cancel(&self) -> bool {
        self.cancel()
    }
    fn commit(&self) -> bool {
        self.commit()
    }
    fn owner(&self) -> Owner {
        self.owner()
    }
    fn is_cancelled(&self) -> bool {
        self.is_cancelled()
    }
}

/// A user cancels while the engine commits: exactly one of the two is told that it was in time.
fn one_wins<S: Switch>() {
    loom::model(|| {
        let owner = Arc::new(S::default());
        let users: Vec<_> = (0..2)
            .map(|_| {
                let owner = Arc::clone(&owner);
                thread::spawn(move || owner.cancel())
            })
            .collect();
        let committed = owner.commit();
        for user in users {
            let cancelled = user.join().unwrap();
            assert!(cancelled != committed, "two owners, or none");
        }
        assert_eq!(owner.is_cancelled(), !committed);
        assert_eq!(owner.owner() == Owner::InDoubt, committed);
    });
}

#[test]
fn a_cancel_or_the_commit_wins() {
    one_wins::<Ownership>();
}

mod broken {
    use super::Owner;
    use loom::sync::atomic::{AtomicBool, AtomicU8, Ordering};

    /// Looks and then writes.
    #[derive(Default)]
    pub struct LookThenCommit(AtomicU8);

    impl super::Switch for LookThenCommit {
        fn cancel(&self) -> bool {
            let swapped = self
                .0
                .compare_exchange(0, 1, Ordering::SeqCst, Ordering::SeqCst);
            swapped.is_ok() || self.is_cancelled()
        }
        fn commit(&self) -> bool {
            let free = self.0.load(Ordering::SeqCst) == 0;
            if free {
                self.0.store(2, Ordering::SeqCst);
            }
            free
        }
        fn owner(&self) -> Owner {
            match self.0.load(Ordering::SeqCst) {
                2 => Owner::InDoubt,
                _ => Owner::Source,
            }
        }
        fn is_cancelled(&self) -> bool {
            self.0.load(Ordering::SeqCst) == 1
        }
    }

    /// A flag for each side: each sets its own and looks at the other's.
    #[derive(Default)]
    pub struct TwoFlags {
        cancelled: AtomicBool,
        committed: AtomicBool,
    }

    impl super::Switch for TwoFlags {
        fn cancel(&self) -> bool {
            self.cancelled.store(true, Ordering::Release);
            !self.committed.load(Ordering::Acquire)
        }
        fn commit(&self) -> bool {
            self.committed.store(true, Ordering::Release);
            !self.cancelled.load(Ordering::Acquire)
        }
        fn owner(&self) -> Owner {
            Owner::Source
        }
        fn is_cancelled(&self) -> bool {
            self.cancelled.load(Ordering::Acquire)
        }
    }
}

#[test]
#[should_panic(expected = "two owners, or none")]
fn a_commit_that_looks_before_it_writes_is_found() {
    one_wins::<broken::LookThenCommit>();
}

#[test]
#[should_panic(expected = "two owners, or none")]
fn a_flag_for_each_side_is_found() {
    one_wins::<broken::TwoFlags>();
}

/// An onlooker never sees the guest go back while the destination is asked and answers.
#[test]
fn an_owner_is_seen_to_change_one_way_until_the_destination_has_the_guest() {
    loom::model(|| {
        let owner = Arc::new(Ownership::default());
        let looks = {
            let owner = Arc::clone(&owner);
            thread::spawn(move || [owner.owner(), owner.owner()])
        };
        let user = {
            let owner = Arc::clone(&owner);
            thread::spawn(move || owner.cancel())
        };
        let committed = owner.commit();
        if committed {
            owner.confirm();
        }
        let seen = looks.join().unwrap();
        let order = [Owner::Source, Owner::InDoubt, Owner::Destination];
        let steps = seen.map(|owner| order.iter().position(|o| *o == owner));
        assert!(steps[0] <= steps[1], "{seen:?}");
        assert_eq!(user.join().unwrap(), !committed);
        assert_eq!(owner.owner() == Owner::Destination, committed);
    });
}

/// A guest that was not started is the source's again: a cancel is in time before the commit and
/// after that word, and not between.
#[test]
fn a_guest_that_was_not_started_can_be_cancelled_and_is_never_the_destinations() {
    loom::model(|| {
        let owner = Arc::new(Ownership::default());
        let user = {
            let owner = Arc::clone(&owner);
            thread::spawn(move || {
                let told = owner.cancel();
                // Nothing takes an accepted cancel back.
                assert!(!told || owner.is_cancelled());
                told
            })
        };
        let committed = owner.commit();
        if committed {
            owner.take_back();
        }
        assert_eq!(owner.owner(), Owner::Source);
        let told = user.join().unwrap();
        assert!(told || committed);
        assert_eq!(owner.is_cancelled(), told);
        assert_eq!(owner.owner(), Owner::Source);
    });
}

/// A recovery asks what became of a commit: no cancel gets between its question and the answer.
#[test]
fn a_guest_in_doubt_cannot_be_cancelled() {
    loom::model(|| {
        let owner = Arc::new(Ownership::in_doubt());
        let users = [0; 2].map(|_| {
            let owner = Arc::clone(&owner);
            thread::spawn(move || owner.cancel())
        });
        assert!(!owner.commit(), "committed twice");
        owner.confirm();
        for user in users {
            assert!(!user.join().unwrap(), "two owners, or none");
        }
        assert_eq!(owner.owner(), Owner::Destination);
    });
}

fn downtime(ms: u64) -> Change {
    Change {
        downtime: Some(Duration::from_millis(ms)),
        ..Change::default()
    }
}

/// How an engine leaves its live phase.
trait Leave: 'static {
    /// Takes changes until no more are accepted; those that it has taken.
    fn leave(steering: &Steering) -> Vec<Change>;
}

/// As the engine does.
struct ByClose;

impl Leave for ByClose {
    fn leave(steering: &Steering) -> Vec<Change> {
        let mut taken = steering.take();
        // Each turn takes at least one of two changes.
        for _ in 0..3 {
            if steering.close() {
                return taken;
            }
            assert!(steering.has_news(), "an accepted change is never taken");
            taken.extend(steering.take());
        }
        panic!("what was accepted is not taken");
    }
}

/// Takes what there is and ends, without a look at what was accepted meanwhile.
struct ByEnd;

impl Leave for ByEnd {
    fn leave(steering: &Steering) -> Vec<Change> {
        let taken = steering.take();
        steering.end();
        taken
    }
}

/// Two users change, one cancels, and the engine leaves its live phase and commits.
fn promises_are_kept<L: Leave>() {
    let mut model = loom::model::Builder::new();
    // Three threads: every order with at most so many threads stopped where they could go on.
    model.preemption_bound = Some(3);
    model.check(|| {
        let steering = Arc::new(Steering::default());
        steering.open(&Options::default(), false, false);
        steering.memory();
        let owner = Arc::new(Ownership::default());
        let changes = [downtime(1), Change::switchover()];
        let users = changes.map(|change| {
            let (steering, owner) = (Arc::clone(&steering), Arc::clone(&owner));
            thread::spawn(move || {
                let left = owner.owner() != Owner::Source;
                let told = steering.change(&change);
                assert!(!left || told.is_err(), "a guest that has left was steered");
                told
            })
        });
        let taken = L::leave(&steering);
        assert!(owner.commit());
        for (change, user) in changes.into_iter().zip(users) {
            match user.join().unwrap() {
                Ok(()) => assert!(taken.contains(&change), "a promise was broken"),
                Err(error) => {
                    assert_eq!(error, SteeringError::TooLate);
                    assert!(!taken.contains(&change), "a refused change was made");
                }
            }
        }
    });
}

#[test]
fn a_change_is_made_or_refused() {
    promises_are_kept::<ByClose>();
}

#[test]
#[should_panic(expected = "a promise was broken")]
fn an_engine_that_leaves_without_a_look_is_found() {
    promises_are_kept::<ByEnd>();
}

/// A cancel that is accepted after the live phase still keeps the guest here.
#[test]
fn a_user_who_changes_and_cancels_is_told_the_truth() {
    loom::model(|| {
        let steering = Arc::new(Steering::default());
        steering.open(&Options::default(), false, false);
        steering.memory();
        let owner = Arc::new(Ownership::default());
        let user = {
            let (steering, owner) = (Arc::clone(&steering), Arc::clone(&owner));
            thread::spawn(move || (steering.change(&downtime(1)), owner.cancel()))
        };
        let taken = ByClose::leave(&steering);
        let committed = owner.commit();
        let (changed, cancelled) = user.join().unwrap();
        assert_eq!(changed.is_ok(), taken == [downtime(1)]);
        assert_eq!(cancelled, !committed);
    });
}
