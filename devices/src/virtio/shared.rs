//! The device behind its lock: what the vCPUs, the worker and the machine do with it.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, TryLockError, TryLockResult};
use std::time::{Duration, Instant};

use super::device::{Context, Device, DrainError, Kind};
use super::event::Event;
use super::interrupt::Interrupt;
use super::memory::Memory;
use super::mmio::{Effect, Registers};
use super::queue::VirtQueue;
use super::sparse::Sparse;
use super::state::{RestoreError, TransportState, VirtioState};
use super::violation::Violation;
use crate::sync::{Allowance, lock};
use crate::trigger::Trigger;

/// How long a pause waits for a device that is at work.
const TIMEOUT: Duration = Duration::from_secs(5);

struct Inner<D> {
    device: D,
    registers: Registers,
    queues: Vec<VirtQueue>,
    /// The machine runs.
    running: bool,
    /// All queues are to be looked at.
    kicked: bool,
    /// The worker is to end.
    stop: bool,
    violations: Sparse,
}

/// What the vCPUs, the worker and the machine share.
pub(super) struct Shared<D, M> {
    /// Taken before `inner`, for a moment: a thread that waits for the worker gets the lock when
    /// the worker drops it, and not when the worker has nothing left to do.
    gate: Mutex<()>,
    inner: Mutex<Inner<D>>,
    memory: Arc<M>,
    pub(super) interrupt: Interrupt,
    pub(super) kind: Kind,
    features: u64,
    /// For each queue: the driver has notified it.
    pub(super) events: Vec<Event>,
    /// Makes the worker look up.
    pub(super) control: Event,
}

/// The device's lock.
pub(super) struct Locked<'a, D, M> {
    inner: MutexGuard<'a, Inner<D>>,
    shared: &'a Shared<D, M>,
}

impl<D: Device<M>, M: Memory> Shared<D, M> {
    /// The device, paused, with its driver gone.
    pub(super) fn new(device: D, memory: Arc<M>, line: Box<dyn Trigger>) -> io::Result<Self> {
        let kind = device.kind();
        let queues = kind.queue_sizes.iter().map(|n| VirtQueue::new(*n));
        let queues = queues
            .collect::<Result<Vec<_>, _>>()
            .map_err(io::Error::other)?;
        let events = queues.iter().map(|_| Event::new());
        Ok(Self {
            gate: Mutex::new(()),
            memory,
            interrupt: Interrupt::new(line),
            kind,
            features: device.features(),
            events: events.collect::<io::Result<_>>()?,
            control: Event::new()?,
            inner: Mutex::new(Inner {
                device,
                registers: Registers::default(),
                queues,
                running: false,
                kicked: false,
                stop: false,
                violations: Sparse::default(),
            }),
        })
    }

    pub(super) fn lock(&self) -> Locked<'_, D, M> {
        let _gate = lock(&self.gate);
        Locked {
            inner: lock(&self.inner),
            shared: self,
        }
    }

    /// The lock, if it is free.
    pub(super) fn try_lock(&self) -> Option<Locked<'_, D, M>> {
        let _gate = free(self.gate.try_lock())?;
        Some(Locked {
            inner: free(self.inner.try_lock())?,
            shared: self,
        })
    }

    /// The lock, if it can be had in time: a worker may be waiting for a page of the guest's that
    /// has not arrived.
    pub(super) fn lock_in_time(&self) -> Result<Locked<'_, D, M>, DrainError> {
        let mut allowance = Allowance::new(TIMEOUT);
        let mut gate = None;
        loop {
            // Held once it is had, so that the worker does not take the device again before us.
            gate = gate.or_else(|| free(self.gate.try_lock()));
            if gate.is_some()
                && let Some(inner) = free(self.inner.try_lock())
            {
                return Ok(Locked {
                    inner,
                    shared: self,
                });
            }
            if allowance.is_spent() {
                return Err(DrainError {
                    requests: 1,
                    what: "guest memory, which may not have arrived,".to_owned(),
                    timeout: TIMEOUT,
                });
            }
            let began = Instant::now();
            std::thread::sleep(Duration::from_micros(50));
            allowance.spend(began.elapsed());
        }
    }

    /// A notification that reached the bus.
    pub(super) fn notify(&self, queue: usize) {
        if let Some(event) = self.events.get(queue) {
            event.signal();
        }
    }

    pub(super) fn wake(&self) {
        self.control.signal();
    }

    pub(super) fn write_register(&self, offset: u32, value: u32) {
        let mut locked = self.lock();
        let inner = &mut *locked.inner;
        let effect = inner
            .registers
            .write(offset, value, self.features, &mut inner.queues);
        match effect {
            Effect::None => {}
            Effect::Activate => locked.activate(),
            Effect::Reset => locked.reset_by_driver(),
        }
    }
}

impl<D: Device<M>, M: Memory> Locked<'_, D, M> {
    pub(super) fn device(&self) -> &D {
        &self.inner.device
    }

    pub(super) fn device_mut(&mut self) -> &mut D {
        &mut self.inner.device
    }

    /// Whether the worker is to end.
    pub(super) fn stopped(&self) -> bool {
        self.inner.stop
    }

    pub(super) fn stop(&mut self) {
        self.inner.stop = true;
        self.shared.wake();
    }

    /// Lets the device work, beginning with all that is in its queues.
    pub(super) fn resume(&mut self) {
        self.inner.running = true;
        self.inner.kicked = true;
        self.shared.wake();
    }

    /// The configuration has changed: tells the driver, if there is one.
    pub(super) fn reconfigured(&mut self) {
        let registers = &mut self.inner.registers;
        registers.config_generation = registers.config_generation.wrapping_add(1);
        if registers.active() {
            self.shared.interrupt.config();
        }
    }

    /// As [`VirtioDevice::with_queues`](super::VirtioDevice::with_queues).
    pub(super) fn with_queues<R>(
        &mut self,
        f: impl FnOnce(&mut D, &mut Context<'_, M>) -> Result<R, Violation>,
    ) -> Option<R> {
        if !self.live() {
            return None;
        }
        let result = self.with(|device, cx| {
            for queue in &mut *cx.queues {
                queue.refill();
            }
            f(device, cx)
        });
        match result.and_then(|r| self.tell_driver().map(|()| r)) {
            Ok(r) => Some(r),
            Err(violation) => {
                self.violated(&violation);
                None
            }
        }
    }

    pub(super) fn read_register(&self, offset: u32) -> u32 {
        let inner = &*self.inner;
        inner
            .registers
            .read(offset, self.shared.features, &inner.queues)
    }

    pub(super) fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.inner.device.write_config(offset, data);
    }

    /// Whether the machine runs.
    pub(super) fn running(&self) -> bool {
        self.inner.running
    }

    pub(super) fn live(&self) -> bool {
        self.inner.running && self.inner.registers.active()
    }

    /// Calls the device with what it works on.
    fn with<R>(&mut self, f: impl FnOnce(&mut D, &mut Context<'_, M>) -> R) -> R {
        let inner = &mut *self.inner;
        let mut cx = Context {
            memory: &*self.shared.memory,
            queues: &mut inner.queues,
            interrupt: &self.shared.interrupt,
        };
        f(&mut inner.device, &mut cx)
    }

    /// The driver has set everything up.
    fn activate(&mut self) {
        let inner = &mut *self.inner;
        let event_idx = inner.registers.event_idx();
        let mut result = Ok(());
        for (index, queue) in inner.queues.iter_mut().enumerate() {
            queue.set_event_idx(event_idx);
            if queue.ready() && result.is_ok() {
                result = queue.check(index, &*self.shared.memory);
            }
        }
        if let Err(violation) = result {
            self.violated(&violation);
            return;
        }
        inner.device.activate(inner.registers.driver_features);
        inner.kicked = true;
        self.shared.wake();
    }

    /// The driver wrote 0 to `Status`.
    fn reset_by_driver(&mut self) {
        if let Err(error) = self.with(D::drain) {
            // The driver reads a status that is not 0, and may try again. Memory that may still be
            // written to must not count as given back.
            tracing::warn!(device = self.shared.kind.name, %error, "a device could not be reset");
            self.inner.registers.needs_reset();
            return;
        }
        self.reset();
    }

    pub(super) fn reset(&mut self) {
        let inner = &mut *self.inner;
        inner.device.reset();
        inner.registers = Registers {
            // The only one that survives: a driver that reads the configuration across a reset must
            // notice.
            config_generation: inner.registers.config_generation,
            ..Registers::default()
        };
        for queue in &mut inner.queues {
            queue.reset();
        }
        self.shared.interrupt.acknowledge(u32::MAX);
    }

    fn violated(&mut self, violation: &Violation) {
        self.inner.registers.needs_reset();
        self.shared.interrupt.config();
        if let Some(times) = self.inner.violations.count() {
            let device = self.shared.kind.name;
            tracing::warn!(
                device,
                times,
                "the guest's driver broke the rules of virtio, and the device stopped until its driver resets it: {violation}"
            );
        }
    }

    /// Does what there is to do in the queues of which `ready` is true.
    pub(super) fn work(&mut self, ready: &mut [bool], source: bool) {
        if std::mem::take(&mut self.inner.kicked) {
            ready.fill(true);
        }
        let result = self.with(|device, cx| {
            for (index, ready) in ready.iter_mut().enumerate() {
                if std::mem::take(ready) {
                    cx.queues[index].refill();
                    device.queue_ready(index, cx)?;
                }
            }
            if source {
                for queue in &mut *cx.queues {
                    queue.refill();
                }
                device.source_ready(cx)?;
            }
            for (ready, queue) in ready.iter_mut().zip(&*cx.queues) {
                *ready = queue.more();
            }
            Ok(())
        });
        if let Err(violation) = result.and(self.tell_driver()) {
            self.violated(&violation);
        }
    }

    /// Interrupts for used buffers, where the driver wants one.
    fn tell_driver(&mut self) -> Result<(), Violation> {
        self.with(|_, cx| {
            let mut told = false;
            for queue in &mut *cx.queues {
                told |= queue.notify(cx.memory)?;
            }
            if told {
                cx.interrupt.used();
            }
            Ok(())
        })
    }

    pub(super) fn pause(&mut self) -> Result<(), DrainError> {
        if !self.inner.running {
            return Ok(());
        }
        self.with(D::drain)?;
        if let Err(violation) = self.tell_driver() {
            self.violated(&violation);
        }
        self.inner.running = false;
        Ok(())
    }

    pub(super) fn save(&self) -> VirtioState {
        let r = &self.inner.registers;
        VirtioState {
            transport: TransportState {
                status: r.status,
                device_features_sel: r.device_features_sel,
                driver_features_sel: r.driver_features_sel,
                driver_features: r.driver_features,
                queue_sel: r.queue_sel,
                interrupt_status: self.shared.interrupt.status(),
                config_generation: r.config_generation,
                queues: self.inner.queues.iter().map(VirtQueue::save).collect(),
            },
            device: self.inner.device.save(),
        }
    }

    pub(super) fn restore(&mut self, state: &VirtioState) -> Result<(), RestoreError> {
        let here = self.shared.kind.name;
        let t = &state.transport;
        let inner = &mut *self.inner;
        if t.queues.len() != inner.queues.len() {
            return Err(RestoreError::Queues {
                here,
                saved: t.queues.len(),
                have: inner.queues.len(),
            });
        }
        let absurd = |what| Err(RestoreError::Registers { here, what });
        if !Registers::possible_status(t.status) {
            return absurd("an impossible status");
        }
        let features = t.driver_features & !self.shared.features;
        let registers = Registers {
            status: t.status,
            device_features_sel: t.device_features_sel,
            driver_features_sel: t.driver_features_sel,
            driver_features: t.driver_features,
            queue_sel: t.queue_sel,
            config_generation: t.config_generation,
        };
        // Before FEATURES_OK a driver may have written anything; afterwards they are not looked at
        // again.
        if features != 0 && registers.agreed() {
            return Err(RestoreError::Features { here, features });
        }
        inner.device.restore(&state.device)?;
        let event_idx = registers.event_idx();
        for (index, (queue, saved)) in inner.queues.iter_mut().zip(&t.queues).enumerate() {
            queue.restore(index, saved, event_idx)?;
            let sound = queue.check(index, &*self.shared.memory).is_ok();
            if registers.active() && queue.ready() && !sound {
                return absurd("a queue outside of RAM");
            }
        }
        if registers.active() {
            inner.device.activate(registers.driver_features);
        }
        inner.registers = registers;
        self.shared.interrupt.restore(t.interrupt_status);
        Ok(())
    }
}

fn free<T>(lock: TryLockResult<T>) -> Option<T> {
    match lock {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(error)) => Some(error.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}
