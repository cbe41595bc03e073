//! Telling the network where a guest is that was put here: when it runs here for the first time,
//! however it came.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use ferry_devices::thread;

use super::VirtioSet;

/// Before each announcement: more than one, for the first frame may be lost while a bridge still
/// learns.
const PAUSES: [Duration; 4] = [
    Duration::ZERO,
    Duration::from_millis(50),
    Duration::from_millis(150),
    Duration::from_millis(250),
];

/// Whether the network is to be told.
#[derive(Debug, Default)]
pub(super) struct Announcing {
    due: AtomicBool,
    /// The guest stands still, perhaps because it goes elsewhere.
    resting: AtomicBool,
}

impl Announcing {
    pub(super) fn ask(&self) {
        self.due.store(true, Ordering::SeqCst);
    }

    pub(super) fn rest(&self) {
        self.resting.store(true, Ordering::SeqCst);
    }
}

/// The guest runs: announces it, if that is due.
pub(super) fn begin(set: &Arc<VirtioSet>) {
    set.announcing.resting.store(false, Ordering::SeqCst);
    if !set.announcing.due.swap(false, Ordering::SeqCst) || set.nets.is_empty() {
        return;
    }
    let weak = Arc::downgrade(set);
    let work = move || {
        announce(&weak);
        Ok(())
    };
    let failed = |why| tracing::error!("{why}");
    if let Err(error) = thread::spawn(thread::Kind::Device, "ferry-announce", work, failed) {
        tracing::warn!(%error, "the network is told only once where the guest is");
        set.announce();
    }
}

fn announce(set: &Weak<VirtioSet>) {
    for pause in PAUSES {
        std::thread::sleep(pause);
        let Some(set) = set.upgrade() else {
            return;
        };
        if set.announcing.resting.load(Ordering::SeqCst) {
            // It may be elsewhere by now; if it comes back to run here, the network is told then.
            set.announcing.ask();
            return;
        }
        set.announce();
    }
}
