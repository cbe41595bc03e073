//! Emulated devices of ferry, each with a serialisable `State`, and the bus they sit on.
//!
//! Nothing here speaks KVM: a device is driven by [`bus::BusDevice`] accesses and speaks back
//! through [`Trigger`]; a [virtio] device besides works on guest memory, which it is given as
//! `vm-memory` has it, so that what it writes is tracked there. What a trigger does (an irqfd, a
//! flag, a counter in a test) is the machine's affair.
//!
//! ```
//! use ferry_devices::Trigger;
//! use ferry_devices::bus::Bus;
//! use ferry_devices::serial::Serial;
//! use std::sync::{Arc, Mutex};
//!
//! struct Line; // the interrupt: an irqfd in a VMM
//! impl Trigger for Line {
//!     fn trigger(&self) -> std::io::Result<()> {
//!         Ok(())
//!     }
//! }
//!
//! let serial = Serial::new(Box::new(Line), Box::new(std::io::stdout()));
//! let mut ports = Bus::new();
//! ports.insert(0x3f8, 8, Arc::new(Mutex::new(serial)))?;
//! // A vCPU has exited at `out 0x3f8, al`:
//! assert!(ports.write(0x3f8, b"!"));
//! // The line status register says that the transmitter is ready.
//! let mut status = [0];
//! assert!(ports.read(0x3fd, &mut status));
//! assert_eq!(status[0] & 0x20, 0x20);
//! # Ok::<(), ferry_devices::bus::BusError>(())
//! ```
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
mod state;
pub mod sync;
pub mod thread;
mod trigger;
pub mod virtio;
pub mod vsock;

pub use trigger::Trigger;
