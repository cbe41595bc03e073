//! The machine on a real KVM, with guests of a few dozen bytes.
//!
//! The guests enter long mode's ring 0, drop to ring 3 by IRETQ and live there, with IOPL 3: a
//! software KVM runs that natively, and a hardware KVM does not care.
#![allow(clippy::unwrap_used, clippy::panic)]

mod absent;
mod arrival;
mod balloon;
mod cards;
mod console;
mod copy_disk;
mod dirty;
mod identity;
mod life;
mod not_started;
mod serial;
mod shared;
mod smp;
mod state;
mod support;
mod virtio;
