//! virtio devices behind the MMIO transport (virtio 1.2, <https://docs.oasis-open.org/virtio/virtio/v1.2/>).
//!
//! ```text
//!  vCPU ── registers, config ──▶ Port ─┐                    ┌─▶ file, tap, …
//!                                      ├─ lock ─▶ device ◀──┤
//!  vCPU ── QueueNotify ─▶ ioeventfd ─▶ worker thread        └─▶ guest memory (rings and buffers)
//!                                      │
//!  guest ◀── irqfd ◀── Interrupt ◀─────┘
//! ```
//!
//! A device, its registers and its queues are one thing behind one lock. The worker takes it when an eventfd says that
//! there is something to do, so no exit of a vCPU is on the data path, and whoever holds the lock knows that nothing
//! of the device moves: [pausing](VirtioDevice::pause) is taking it, draining what is under way outside of it (a block
//! device's requests) and leaving word that the worker shall wait.
//!
//! ```text
//!            resume               DRIVER_OK                a broken rule
//!  Paused ◀─────────▶ Running:   Inactive ──────▶ Active ───────────────▶ NeedsReset
//!            pause                   ▲               │ status = 0            │
//!                                    └───────────────┴───────────────────────┘
//! ```
//!
//! Notifications that come while the device is paused stay in their eventfd or are lost with the process: a resume
//! looks at all queues. Interrupts that were on their way are in [`TransportState::interrupt_status`], and a restore
//! raises them again.
//!
//! Everything in guest memory is hostile: a queue whose rules are broken stops, and its device asks for a reset
//! (`DEVICE_NEEDS_RESET`); the VMM's log says what was wrong.
//!
//! # Lock order
//!
//! the port's lock (a vCPU's access) → the device's gate → the device. Nobody who holds one of them waits for a vCPU.

mod chain;
mod device;
mod event;
mod interrupt;
mod mmio;
mod queue;
mod sparse;
mod state;
mod worker;

pub(crate) use chain::check as check_ram;
pub use chain::{Buffer, Chain, Segment, Violation};
pub use device::{Context, Device, DrainError, Kind, Memory};
pub use event::Event;
pub use interrupt::Interrupt;
pub use mmio::{MMIO_LEN, Port, QUEUE_NOTIFY};
pub use queue::VirtQueue;
pub(crate) use sparse::Sparse;
pub use state::{DeviceState, QueueState, RestoreError, TransportState, VirtioState};
pub use worker::{AnyVirtio, PauseError, VirtioDevice};

/// The feature bit that says: not a legacy device (§6).
pub const F_VERSION_1: u64 = 1 << 32;
/// Descriptors may point to tables of descriptors (§2.7.5.3).
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// Notifications and interrupts are asked for by index (§2.7.7.2).
pub const F_EVENT_IDX: u64 = 1 << 29;
/// What every device here offers.
pub const COMMON_FEATURES: u64 = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX;

/// Copies what a configuration of these bytes has at `offset`.
pub(crate) fn copy_config(config: &[u8], offset: usize, data: &mut [u8]) {
    for (to, from) in data.iter_mut().zip(config.iter().skip(offset)) {
        *to = *from;
    }
}
