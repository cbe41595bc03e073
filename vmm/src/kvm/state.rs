//! The state of vCPUs and VM: read from KVM on one host, written to KVM on another.
//!
//! The order of the ioctls is argued where they are made ([`vcpu`], [`vm`]); across the two it is:
//! vCPUs first, then the VM's interrupt controllers, then the clock and by it the vCPUs' time stamp
//! counters ([`tsc`]), then devices. Setting the
//! IOAPIC makes KVM deliver what is pending on its pins into the local APICs, and setting a local
//! APIC afterwards would wipe that out. The clock comes late, since it runs from the moment it is
//! set.

mod error;
mod known;
mod msrs;
mod tsc;
mod v3;
mod vcpu;
mod vm;
mod xsave;

pub use error::RestoreError;
pub(super) use msrs::{IA32_ARCH_CAPABILITIES, MsrList};
pub use msrs::{MAX_MSRS, SkippedMsr};
pub(super) use tsc::offsets_work;
pub(crate) use v3::{VcpuV3, VmV3};
pub(crate) use vcpu::VCPU_FIELDS;
pub use vcpu::VcpuState;
pub use vm::VmState;
pub use xsave::MAX_XSAVE;

/// One of KVM's structures with a byte of another value at every place.
#[cfg(test)]
#[allow(clippy::unwrap_used)]
fn patterned<T: serde::de::DeserializeOwned>(seed: u8) -> T {
    let byte = |at: usize| at.to_le_bytes()[0].wrapping_mul(31).wrapping_add(seed);
    let pattern: Vec<u8> = (0..4096).map(byte).collect();
    postcard::from_bytes(&postcard::to_allocvec(&pattern).unwrap()).unwrap()
}

/// A field as bytes, for comparison.
#[cfg(test)]
#[allow(clippy::unwrap_used)]
fn bytes(field: &impl serde::Serialize) -> Vec<u8> {
    postcard::to_allocvec(field).unwrap()
}
