//! What a kind of virtio device has to be able to do.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use super::interrupt::Interrupt;
use super::memory::Memory;
use super::queue::VirtQueue;
use super::state::RestoreError;
use super::violation::Violation;
use crate::state::DeviceState;
use crate::thread;

/// Which device it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kind {
    /// The device ID (§5).
    pub id: u32,
    /// For people.
    pub name: &'static str,
    /// The largest size of each queue: powers of two, at most 32,768.
    pub queue_sizes: &'static [u16],
}

/// What a device works on while it is called.
#[derive(Debug)]
pub struct Context<'a, M> {
    /// The guest's memory.
    pub memory: &'a M,
    /// The queues, some of which may not be ready.
    pub queues: &'a mut [VirtQueue],
    /// For changes of the configuration; the worker raises those for used buffers itself.
    pub interrupt: &'a Interrupt,
}

/// A device did not come to rest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{requests} requests to {what} have not come back within {timeout:?}")]
pub struct DrainError {
    /// Requests under way.
    pub requests: usize,
    /// What was asked.
    pub what: String,
    /// How long they were waited for.
    pub timeout: Duration,
}

/// A kind of device. Its methods are called with the device's lock held, one at a time.
pub trait Device<M: Memory>: Send + 'static {
    /// Which device it is; always the same.
    fn kind(&self) -> Kind;

    /// What its worker may ask of the kernel in a sandbox; always the same.
    fn thread(&self) -> thread::Kind {
        thread::Kind::Device
    }

    /// The feature bits that it offers, [`COMMON_FEATURES`](super::COMMON_FEATURES) included;
    /// always the same.
    fn features(&self) -> u64;

    /// Fills `data` with the configuration at `offset`, as far as it goes; the rest of `data` is
    /// zero already.
    fn read_config(&self, offset: usize, data: &mut [u8]);

    /// The driver writes to the configuration.
    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    /// The driver is ready; `features` are what it has accepted. Also called when an active device
    /// was restored.
    fn activate(&mut self, features: u64);

    /// The driver is gone, or starts anew: nothing of the guest's memory may be touched from now
    /// on. Called after [`drain`](Self::drain).
    fn reset(&mut self);

    /// The driver says that queue `index` has buffers. Also called when it may have.
    ///
    /// # Errors
    /// [`Violation`] of the guest: the device stops until it is reset.
    fn queue_ready(&mut self, index: usize, cx: &mut Context<'_, M>) -> Result<(), Violation>;

    /// A descriptor to wait for, beside the queues. Asked once.
    ///
    /// # Errors
    /// When it cannot be duplicated.
    fn source(&self) -> io::Result<Option<OwnedFd>> {
        Ok(None)
    }

    /// Whether the source is worth waiting for now.
    fn wants_source(&self) -> bool {
        true
    }

    /// The source is readable.
    ///
    /// # Errors
    /// As [`queue_ready`](Self::queue_ready).
    fn source_ready(&mut self, _cx: &mut Context<'_, M>) -> Result<(), Violation> {
        Ok(())
    }

    /// Why the device cannot go on, if a thread of its own has failed: a sentence. The guest ends.
    /// Asked by the worker after each piece of work.
    fn failure(&self) -> Option<String> {
        None
    }

    /// Comes to rest: what is under way outside of the lock is finished, or put back into its
    /// queue.
    ///
    /// # Errors
    /// [`DrainError`]; the device goes on as before.
    fn drain(&mut self, _cx: &mut Context<'_, M>) -> Result<(), DrainError> {
        Ok(())
    }

    /// What of the device itself has to travel. Called when drained.
    fn save(&self) -> DeviceState;

    /// Takes over a state. Must not touch guest memory, which may not have arrived.
    ///
    /// # Errors
    /// [`RestoreError`].
    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError>;
}
