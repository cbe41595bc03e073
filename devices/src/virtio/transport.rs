//! A device with its transport and its worker, as a machine runs, pauses, saves and restores it.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use super::device::{Context, Device, DrainError, Kind};
use super::event::Event;
use super::memory::Memory;
use super::port::Port;
use super::shared::Shared;
use super::state::{RestoreError, VirtioState};
use super::violation::Violation;
use super::worker;
use crate::thread;
use crate::trigger::Trigger;

/// Why a device could not be paused. It works on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the guest's {device} did not come to rest: {source}")]
pub struct PauseError {
    /// Which device.
    pub device: &'static str,
    /// What it waits for.
    pub source: DrainError,
}

/// A device of kind `D` with its transport and its worker. Made paused.
pub struct VirtioDevice<D: Device<M>, M: Memory> {
    shared: Arc<Shared<D, M>>,
    worker: Option<JoinHandle<()>>,
}

impl<D: Device<M>, M: Memory> std::fmt::Debug for VirtioDevice<D, M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("VirtioDevice")
            .field(&self.shared.kind)
            .finish()
    }
}

impl<D: Device<M>, M: Memory> VirtioDevice<D, M> {
    /// Puts `device` behind a transport; `line` is its interrupt, an edge for each trigger.
    ///
    ///
    /// `on_failure` gets a sentence when the worker, or another thread of the device, has failed:
    /// the guest cannot go on.
    ///
    /// # Errors
    /// When the process is out of descriptors or threads.
    pub fn new(
        device: D,
        memory: Arc<M>,
        line: Box<dyn Trigger>,
        on_failure: impl FnOnce(String) + Send + 'static,
    ) -> io::Result<Self> {
        let source = device.source()?;
        let kind = device.thread();
        let shared = Arc::new(Shared::new(device, memory, line)?);
        let theirs = Arc::clone(&shared);
        let worker = thread::spawn(
            kind,
            &format!("virtio-{}", shared.kind.id),
            move || worker::run(&theirs, source.as_ref()),
            on_failure,
        )?;
        Ok(Self {
            shared,
            worker: Some(worker),
        })
    }

    /// What goes on the MMIO bus.
    #[must_use]
    pub fn port(&self) -> Port<D, M> {
        Port::new(Arc::clone(&self.shared))
    }

    /// Calls `f` with the device itself, when nothing else works on it.
    pub fn with<R>(&self, f: impl FnOnce(&mut D) -> R) -> R {
        f(self.shared.lock().device_mut())
    }

    /// Calls `f` with the device itself; `None`, and at once, while something else works on it.
    pub fn try_with<R>(&self, f: impl FnOnce(&mut D) -> R) -> Option<R> {
        Some(f(self.shared.try_lock()?.device_mut()))
    }

    /// Calls `f` with the device and its queues, when nothing else works on them, and then tells
    /// the driver of buffers that were used. `None` while the device is paused or has no driver,
    /// and after a [`Violation`] of the guest, which has stopped the device until it is reset.
    pub fn with_queues<R>(
        &self,
        f: impl FnOnce(&mut D, &mut Context<'_, M>) -> Result<R, Violation>,
    ) -> Option<R> {
        self.shared.lock().with_queues(f)
    }

    /// As [`with_queues`](Self::with_queues), and `None` at once while something else works on the
    /// device.
    pub fn try_with_queues<R>(
        &self,
        f: impl FnOnce(&mut D, &mut Context<'_, M>) -> Result<R, Violation>,
    ) -> Option<R> {
        self.shared.try_lock()?.with_queues(f)
    }

    /// Calls `f` with the device itself; `None`, and at once, while it is paused or something else
    /// works on it. What `f` changes is in the state that the next pause lets be saved.
    pub fn try_while_running<R>(&self, f: impl FnOnce(&mut D) -> R) -> Option<R> {
        let mut locked = self.shared.try_lock()?;
        locked.running().then(|| f(locked.device_mut()))
    }

    /// As [`try_while_running`](Self::try_while_running), and tells the driver, if there is one,
    /// that the configuration has changed where `f` says so. Whether `f` was called.
    pub fn try_reconfigure(&self, f: impl FnOnce(&mut D) -> bool) -> bool {
        let Some(mut locked) = self.shared.try_lock() else {
            return false;
        };
        let running = locked.running();
        if running && f(locked.device_mut()) {
            locked.reconfigured();
        }
        running
    }

    /// Changes the device's configuration and tells the driver, if there is one.
    pub fn reconfigure(&self, f: impl FnOnce(&mut D)) {
        let mut locked = self.shared.lock();
        f(locked.device_mut());
        locked.reconfigured();
    }
}

impl<D: Device<M>, M: Memory> Drop for VirtioDevice<D, M> {
    fn drop(&mut self) {
        self.shared.lock().stop();
        if let Some(worker) = self.worker.take() {
            // One that failed has said so.
            let _ = worker.join();
        }
    }
}

/// Any kind of device, as a machine runs, pauses, saves and restores it.
pub trait AnyVirtio: Send + Sync + std::fmt::Debug {
    /// Which device it is.
    fn kind(&self) -> Kind;

    /// For each queue what its notifications are to be written to: an ioeventfd.
    fn queue_events(&self) -> &[Event];

    /// Brings the device to rest: after this it touches no guest memory, raises no interrupt, and
    /// its backend has no request of it. No effect when it is paused.
    ///
    /// # Errors
    /// [`PauseError`]; the device works on.
    fn pause(&self) -> Result<(), PauseError>;

    /// Lets it work, beginning with all that the driver has left in the queues.
    fn resume(&self);

    /// Its state; it must be paused.
    fn save(&self) -> VirtioState;

    /// Takes over a state, in place of its own; it must be paused. Guest memory is not touched.
    ///
    /// # Errors
    /// [`RestoreError`]; the device is reset then.
    fn restore(&self, state: &VirtioState) -> Result<(), RestoreError>;
}

impl<D: Device<M>, M: Memory> AnyVirtio for VirtioDevice<D, M> {
    fn kind(&self) -> Kind {
        self.shared.kind
    }

    fn queue_events(&self) -> &[Event] {
        &self.shared.events
    }

    fn pause(&self) -> Result<(), PauseError> {
        let locked = self.shared.lock_in_time();
        let rest = locked.and_then(|mut locked| locked.pause());
        rest.map_err(|source| PauseError {
            device: self.shared.kind.name,
            source,
        })
    }

    fn resume(&self) {
        self.shared.lock().resume();
    }

    fn save(&self) -> VirtioState {
        self.shared.lock().save()
    }

    fn restore(&self, state: &VirtioState) -> Result<(), RestoreError> {
        let mut locked = self.shared.lock();
        let result = locked.restore(state);
        if result.is_err() {
            locked.reset();
        }
        result
    }
}
