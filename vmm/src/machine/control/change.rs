//! What is done to a guest only while its state is not read, and its destination not asked.

use ferry_devices::sync::Allowance;

use super::{Control, Mode, TIMEOUT};
use crate::machine::run_state::ChangeError;

/// Has the guard while the guest is changed.
struct Changing<'a>(&'a Control);

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        // Without running the vCPUs it does not fail.
        let _ = self.0.release(false);
    }
}

impl Control {
    /// Changes something of the guest, while it is this machine's and no guard's holder reads its
    /// state: a change after that would be lost where the state goes.
    pub(in crate::machine) fn change<T>(
        &self,
        change: impl FnOnce() -> T,
    ) -> Result<T, ChangeError> {
        let mut allowance = Allowance::new(TIMEOUT);
        let mut inner = self.lock();
        while inner.guarded {
            if allowance.is_spent() {
                return Err(ChangeError::Busy);
            }
            inner = allowance.wait(&self.changed, inner);
        }
        if let Some(exit) = &inner.exit {
            return Err(ChangeError::Ended(exit.clone()));
        }
        if matches!(inner.mode, Mode::Committed { .. }) {
            return Err(ChangeError::Committed);
        }
        inner.guarded = true;
        drop(inner);
        let _changing = Changing(self);
        Ok(change())
    }

    /// Books a question to the destination: nothing but its answer counts while it is under way.
    pub(in crate::machine) fn begin_asking(&self) -> bool {
        match &mut self.lock().mode {
            Mode::Committed { asked, .. } => !std::mem::replace(asked, true),
            _ => false,
        }
    }

    pub(in crate::machine) fn end_asking(&self) {
        if let Mode::Committed { asked, .. } = &mut self.lock().mode {
            *asked = false;
        }
    }
}
