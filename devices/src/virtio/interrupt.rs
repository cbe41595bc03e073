//! A device's interrupt line with the register that says why.

use std::sync::atomic::{AtomicU32, Ordering};

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};

use crate::trigger::Trigger;

/// `InterruptStatus` and the line (§4.2.2). Apart from the device's lock: an interrupt handler
/// acknowledges without waiting for the worker.
pub struct Interrupt {
    status: AtomicU32,
    line: Box<dyn Trigger>,
}

impl std::fmt::Debug for Interrupt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Interrupt").field(&self.status()).finish()
    }
}

impl Interrupt {
    pub(super) fn new(line: Box<dyn Trigger>) -> Self {
        Self {
            status: AtomicU32::new(0),
            line,
        }
    }

    /// Says that buffers were used.
    pub fn used(&self) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    /// Says that the configuration, or the device's status, has changed.
    pub fn config(&self) {
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    fn raise(&self, why: u32) {
        self.status.fetch_or(why, Ordering::SeqCst);
        self.poke();
    }

    fn poke(&self) {
        if let Err(error) = self.line.trigger() {
            // The driver's own timeouts are all that is left.
            tracing::warn!(%error, "a virtio device's interrupt could not be raised");
        }
    }

    pub(super) fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    pub(super) fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// Takes over a status; what is pending is raised once more, since the edge may have been on
    /// its way to the interrupt controller when the status was read. Drivers take a spurious
    /// interrupt for another device's.
    pub(super) fn restore(&self, status: u32) {
        let status = status & (VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG);
        self.status.store(status, Ordering::SeqCst);
        if status != 0 {
            self.poke();
        }
    }
}
