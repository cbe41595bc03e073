//! [`SourceVm::pause`] for a VMM that stops and resumes its guest by a call each: the guards, and
//! who owns the guest after which, are written once.
//!
//! ```text
//! Pausable::stop → Standing ─ dropped ──→ Pausable::resume
//!                     ├ keep ───────────→ it stands
//!                     └ commit ─→ Given ─ dropped ──→ it stands
//!                                   ├ release ──────→ Pausable::release
//!                                   └ take_back ────→ Pausable::take_back
//! ```

#[cfg(doc)]
use super::SourceVm;
use super::{
    Committed, CommittedVm, NotStarted, Paused, PausedVm, PortError, SessionId, TakeBackError,
};

/// A guest that is stopped and resumed by a call each.
pub trait Pausable: Sync {
    /// Stops all vCPUs and devices.
    ///
    /// # Errors
    /// When they cannot be stopped; they then run on.
    fn stop(&self) -> Result<(), PortError>;
    /// Lets the guest go on.
    ///
    /// # Errors
    /// Why it cannot: the guest stands still.
    fn resume(&self) -> Result<(), PortError>;
    /// See [`PausedVm::save`].
    ///
    /// # Errors
    /// When the state cannot be read.
    fn save(&self, newest: Option<u32>) -> Result<Vec<u8>, PortError>;
    /// Writes down that the guest belongs to the destination. See [`PausedVm::commit`].
    ///
    /// # Errors
    /// When it cannot be written down; the guest then resumes here.
    fn give_away(&self, session: SessionId) -> Result<(), PortError>;
    /// The destination runs the guest: what is left here may be discarded.
    fn release(&self);
    /// The destination never started the guest: undoes [`give_away`](Self::give_away), and resumes.
    ///
    /// # Errors
    /// As [`resume`](Self::resume).
    fn take_back(&self, word: NotStarted) -> Result<(), PortError> {
        let _ = word;
        self.resume()
    }
}

/// What [`SourceVm::pause`] returns: the guest is stopped, and resumes when this is dropped.
///
/// # Errors
/// When it cannot be stopped.
pub fn pause<V: Pausable>(vm: &V) -> Result<Paused<'_>, PortError> {
    vm.stop()?;
    Ok(Box::new(Standing(Some(vm))))
}

/// What is left of a guest that [was given away](Pausable::give_away).
pub fn given_away<V: Pausable>(vm: &V) -> Committed<'_> {
    Box::new(Given(vm))
}

/// The guest stands still, and is this side's; `None` when it is not to resume.
struct Standing<'g, V: Pausable>(Option<&'g V>);

impl<V: Pausable> Drop for Standing<'_, V> {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.0.map(Pausable::resume) {
            tracing::error!(%error, "the guest stands still: it could not be resumed");
        }
    }
}

impl<'g, V: Pausable> PausedVm<'g> for Standing<'g, V> {
    fn save(&self, newest: Option<u32>) -> Result<Vec<u8>, PortError> {
        self.0.ok_or(GIVEN_AWAY)?.save(newest)
    }

    fn commit(mut self: Box<Self>, session: SessionId) -> Result<Committed<'g>, PortError> {
        let vm = self.0.ok_or(GIVEN_AWAY)?;
        vm.give_away(session)?;
        self.0 = None;
        Ok(given_away(vm))
    }

    fn keep(mut self: Box<Self>) {
        self.0 = None;
    }
}

const GIVEN_AWAY: &str = "the guest was given away";

/// The guest stands still, and is the destination's.
struct Given<'g, V: Pausable>(&'g V);

impl<V: Pausable> CommittedVm for Given<'_, V> {
    fn release(self: Box<Self>) {
        self.0.release();
    }

    fn take_back(self: Box<Self>, word: NotStarted) -> Result<(), TakeBackError> {
        self.0.take_back(word).map_err(TakeBackError::StandsStill)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    /// What was asked of the guest, in order; `give_away` fails when told so.
    #[derive(Default)]
    struct Asked {
        calls: Mutex<Vec<&'static str>>,
        refuses: bool,
    }

    impl Asked {
        fn note(&self, call: &'static str) {
            self.calls.lock().unwrap().push(call);
        }

        fn calls(&self) -> Vec<&'static str> {
            std::mem::take(&mut *self.calls.lock().unwrap())
        }
    }

    impl Pausable for Asked {
        fn stop(&self) -> Result<(), PortError> {
            self.note("stop");
            Ok(())
        }
        fn resume(&self) -> Result<(), PortError> {
            self.note("resume");
            Ok(())
        }
        fn save(&self, _: Option<u32>) -> Result<Vec<u8>, PortError> {
            Ok(b"state".to_vec())
        }
        fn give_away(&self, _: SessionId) -> Result<(), PortError> {
            self.note("give away");
            if self.refuses {
                return Err("the disk is full".into());
            }
            Ok(())
        }
        fn release(&self) {
            self.note("release");
        }
    }

    const SESSION: SessionId = SessionId([7; 16]);

    fn not_started() -> NotStarted {
        NotStarted::new("no memory".into())
    }

    #[test]
    fn a_guest_resumes_exactly_when_it_is_this_sides() {
        let vm = Asked::default();
        drop(pause(&vm).unwrap());
        assert_eq!(vm.calls(), ["stop", "resume"]);
        pause(&vm).unwrap().keep();
        assert_eq!(vm.calls(), ["stop"]);
        let committed = pause(&vm).unwrap().commit(SESSION).unwrap();
        drop(committed);
        assert_eq!(vm.calls(), ["stop", "give away"]);
        given_away(&vm).release();
        assert_eq!(vm.calls(), ["release"]);
        given_away(&vm).take_back(not_started()).unwrap();
        assert_eq!(vm.calls(), ["resume"]);
    }

    #[test]
    fn a_guest_that_cannot_be_given_away_resumes() {
        let vm = Asked {
            refuses: true,
            ..Asked::default()
        };
        let refused = pause(&vm).unwrap().commit(SESSION).err().unwrap();
        assert_eq!(refused.to_string(), "the disk is full");
        assert_eq!(vm.calls(), ["stop", "give away", "resume"]);
    }

    #[test]
    fn a_panic_resumes_it() {
        let vm = Asked::default();
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _paused = pause(&vm).unwrap();
            unreachable!("a defect");
        }));
        assert!(panicked.is_err());
        assert_eq!(vm.calls(), ["stop", "resume"]);
    }
}
