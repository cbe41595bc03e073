//! virtio devices behind the MMIO transport (virtio 1.2,
//! <https://docs.oasis-open.org/virtio/virtio/v1.2/>).
//!
//! ```text
//!  vCPU ── registers, config ──▶ Port ─┐                    ┌─▶ file, tap, …
//!                                      ├─ lock ─▶ device ◀──┤
//!  vCPU ── QueueNotify ─▶ ioeventfd ─▶ worker thread        └─▶ guest memory (rings and buffers)
//!                                      │
//!  guest ◀── irqfd ◀── Interrupt ◀─────┘
//! ```
//!
//! A device, its registers and its queues are one thing behind one lock. The worker takes it when
//! an eventfd says that there is something to do, so no exit of a vCPU is on the data path, and
//! the lock's holder knows that nothing of the device moves: [pausing](VirtioDevice::pause) is
//! taking it, draining what is under way outside of it (a block device's requests) and leaving word
//! that the worker shall wait.
//!
//! ```text
//!            resume               DRIVER_OK                a broken rule
//!  Paused ◀─────────▶ Running:   Inactive ──────▶ Active ───────────────▶ NeedsReset
//!            pause                   ▲               │ status = 0            │
//!                                    └───────────────┴───────────────────────┘
//! ```
//!
//! Notifications that come while the device is paused stay in their eventfd or are lost with the
//! process: a resume looks at all queues. Interrupts that were on their way are in
//! [`TransportState::interrupt_status`], and a restore raises them again.
//!
//! Everything in guest memory is hostile: a queue whose rules are broken stops, and its device asks
//! for a reset (`DEVICE_NEEDS_RESET`); the VMM's log says what was wrong.
//!
//! # Lock order
//!
//! the port's lock (a vCPU's access) → the device's gate → the device. A holder of one of them
//! never waits for a vCPU.

mod chain;
mod device;
mod event;
mod features;
mod interrupt;
mod memory;
mod mmio;
mod port;
mod queue;
mod shared;
mod sparse;
mod state;
mod transport;
mod violation;
mod worker;

pub use crate::state::DeviceState;
pub use chain::{Buffer, Chain, Segment};
pub use device::{Context, Device, DrainError, Kind};
pub use event::Event;
pub use features::{COMMON_FEATURES, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1};
pub use interrupt::Interrupt;
pub use memory::Memory;
pub(crate) use memory::check as check_ram;
pub use port::{MMIO_LEN, Port, QUEUE_NOTIFY};
pub use queue::VirtQueue;
pub(crate) use sparse::Sparse;
pub use state::{QueueState, RestoreError, TransportState, VirtioState};
pub use transport::{AnyVirtio, PauseError, VirtioDevice};
pub use violation::Violation;

/// Copies what a configuration of these bytes has at `offset`.
pub(crate) fn copy_config(config: &[u8], offset: usize, data: &mut [u8]) {
    for (to, from) in data.iter_mut().zip(config.iter().skip(offset)) {
        *to = *from;
    }
}
