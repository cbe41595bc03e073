//! Everything that speaks KVM. No other module of ferry issues a KVM ioctl.
//!
//! What a host can do is asked by capability ([`Capabilities`]), never guessed from its name: the
//! same code runs on kvm_intel, kvm_amd and software KVMs that have less.
//!
//! Ownership, which is what keeps the raw addresses given to the kernel valid: a [`Vcpu`] holds its
//! [`Vm`], and a `Vm` holds the [`GuestRam`](crate::memory::GuestRam) behind its memory slots.
//! Guest code runs only inside [`Vcpu::run`], so no guest can run over memory that is unmapped.

mod cpuid;
mod dirty_log;
mod dirty_ring;
mod entry;
mod error;
mod host;
mod irq;
mod kick;
pub mod probe;
mod run_page;
mod state;
mod vcpu;
mod vm;

pub use cpuid::{CpuidEntry, MAX_CPUID_ENTRIES};
pub use dirty_log::{DirtyLog, DirtyLogError, DirtyLogKind};
pub use error::IoctlError;
pub use host::{Capabilities, Host, OpenError};
pub use irq::IrqLine;
pub use kick::Kicker;
pub use state::{MAX_MSRS, MAX_XSAVE, RestoreError, SkippedMsr, VcpuState, VmState};
pub(crate) use state::{VCPU_FIELDS, VcpuV3, VmV3};
pub use vcpu::{Vcpu, VmExit};
pub use vm::{MAX_CPUS, Vm, VmError};
