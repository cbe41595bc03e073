//! What an operator does after a fault, until one side has the guest.

use super::Outcome;
use crate::{Host, State, TIMEOUT, until};
use std::time::{Duration, Instant};

/// How long a guest may be in doubt before the case fails: every timeout of both sides together.
const RESOLVED: Duration = TIMEOUT.saturating_mul(2);
/// How long a state must last to be taken for the last.
const LASTING: Duration = Duration::from_millis(150);

/// The two sides, and what may be believed of the one that was killed.
pub(super) struct Sides<'a> {
    pub source: &'a mut Host,
    pub destination: &'a mut Host,
    /// Why the guest may be gone with a killed process.
    pub may_be_lost: Option<&'static str>,
    pub did: Vec<&'static str>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    /// `None`: the process has ended.
    state: Option<State>,
    incomplete: bool,
    lost: bool,
}

fn look(host: &mut Host) -> Seen {
    let gone = Seen {
        state: None,
        incomplete: false,
        lost: false,
    };
    if host.has_ended() {
        return gone;
    }
    match host.client().status() {
        Ok(status) => Seen {
            state: Some(status.state),
            incomplete: status.missing.is_some(),
            lost: status.missing.is_some_and(|missing| missing.lost.is_some()),
        },
        // A process that is ending.
        Err(error) => {
            until(&format!("it answers or ends: {error}"), || host.has_ended());
            gone
        }
    }
}

impl Sides<'_> {
    /// Acts until the guest has one place.
    pub fn resolve(&mut self) -> Outcome {
        let deadline = Instant::now() + RESOLVED;
        loop {
            let seen = self.seen();
            if let Some(outcome) = self.next(seen) {
                return outcome;
            }
            assert!(
                Instant::now() < deadline,
                "no side has the guest, or says so: {seen:?} after {:?}; source {:#?} destination {:#?}",
                self.did,
                self.source.said(),
                self.destination.said()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Both states, once they are the same twice.
    fn seen(&mut self) -> [Seen; 2] {
        let mut before = [look(self.source), look(self.destination)];
        loop {
            std::thread::sleep(LASTING);
            let now = [look(self.source), look(self.destination)];
            if now == before {
                return now;
            }
            before = now;
        }
    }

    fn next(&mut self, [source, destination]: [Seen; 2]) -> Option<Outcome> {
        use State::{InDoubt, Interrupted, Moved, Receiving, Running};
        match (source.state, destination.state) {
            (Some(Running), Some(Running)) => panic!("the guest runs on both sides"),
            // The destination learns by itself that the source keeps the guest.
            (Some(Running), Some(Receiving) | None) => Some(Outcome::AtSource),
            (Some(Moved) | None, Some(Running)) if !destination.incomplete => {
                Some(Outcome::AtDestination)
            }
            (None, Some(Running)) if destination.lost => self.lost(),
            (Some(InDoubt), Some(InDoubt | Running)) | (Some(Interrupted), Some(Running)) => {
                self.note("recover at the source");
                // The VMM asks by itself too: refused then, or answered already.
                let _ = self.source.recover(false);
                None
            }
            (Some(InDoubt), Some(Receiving)) => {
                self.note("recover at the source");
                // Only a destination that says so has nothing of the guest.
                let unknown = |why: String| why.contains("does not know that migration");
                if self.source.recover(false).is_err_and(unknown) {
                    self.note("take over at the source");
                    self.source.recover(true).unwrap();
                }
                None
            }
            (Some(InDoubt), None) => {
                self.note("take over at the source");
                match self.source.recover(true) {
                    Err(_) => self.lost(),
                    Ok(()) => None,
                }
            }
            (Some(Interrupted | Moved) | None, None) => self.lost(),
            (None, Some(InDoubt)) => {
                self.note("take over at the destination");
                match self.destination.recover(true) {
                    Err(_) => self.lost(),
                    Ok(()) => None,
                }
            }
            (None, Some(Receiving)) => self.lost(),
            _ => None,
        }
    }

    /// The guest is lost if it may be; else something may still come of it.
    fn lost(&self) -> Option<Outcome> {
        self.may_be_lost.map(Outcome::Lost)
    }

    fn note(&mut self, what: &'static str) {
        if !self.did.contains(&what) {
            self.did.push(what);
        }
    }
}
