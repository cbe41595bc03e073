//! virtio devices, driven as a guest's driver would: through registers and rings in memory.
#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation)]

mod balloon;
mod block;
mod console;
mod driver;
mod failures;
mod moves;
mod net;
mod rng;
mod rules;
mod vsock;
