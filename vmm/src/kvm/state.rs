//! The state of vCPUs and VM: read from KVM on one host, written to KVM on another.
//!
//! The order of the ioctls is argued where they are made ([`vcpu`], [`vm`]); across the two it is:
//! vCPUs first, then the VM's interrupt controllers, then the clock, then devices. Setting the
//! IOAPIC makes KVM deliver what is pending on its pins into the local APICs, and setting a local
//! APIC afterwards would wipe that out. The clock comes late, since it runs from the moment it is
//! set.

mod error;
mod known;
mod msrs;
mod vcpu;
mod vm;
mod xsave;

pub use error::RestoreError;
pub(super) use msrs::MsrList;
pub use msrs::{MAX_MSRS, SkippedMsr};
pub use vcpu::VcpuState;
pub use vm::VmState;
pub use xsave::MAX_XSAVE;
