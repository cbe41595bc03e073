//! The way of a device's thread to end the machine that it is in.

use std::sync::{Arc, Mutex, Weak};

use ferry_devices::sync::lock;

use super::control::Control;
use super::run_state::Exit;

/// Ends a machine with a sentence. Made before the machine is: devices need it, and the machine
/// needs its devices.
#[derive(Debug, Clone, Default)]
pub(super) struct Alarm(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    machine: Weak<Control>,
    /// Raised before there was a machine.
    early: Option<String>,
}

impl Alarm {
    /// From here on the alarm ends `machine`; at once if it was raised before.
    pub(super) fn connect(&self, machine: &Arc<Control>) {
        let mut state = lock(&self.0);
        state.machine = Arc::downgrade(machine);
        if let Some(why) = state.early.take() {
            machine.end(Exit::Failure(why));
        }
    }

    pub(super) fn raise(&self, why: String) {
        let mut state = lock(&self.0);
        match state.machine.upgrade() {
            Some(machine) => machine.end(Exit::Failure(why)),
            None => state.early = Some(why),
        }
    }
}
