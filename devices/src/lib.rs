//! Emulated devices of ferry, each with a serialisable `State`, and the bus they sit on.
//!
//! Nothing here speaks KVM: a device is driven by [`bus::BusDevice`] accesses and speaks back
//! through [`Trigger`]; a [virtio] device besides works on guest memory, which it is given as
//! `vm-memory` has it, so that what it writes is tracked there. What a trigger does (an irqfd, a
//! flag, a counter in a test) is the machine's affair.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic))]

pub mod acpi_pm;
pub mod balloon;
pub mod block;
pub mod bus;
pub mod console;
pub mod i8042;
pub mod net;
pub mod rng;
pub mod serial;
pub mod sync;
pub mod thread;
mod trigger;
pub mod virtio;
pub mod vsock;

pub use trigger::Trigger;
