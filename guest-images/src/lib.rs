//! Guests to boot, and how to talk to them.
//!
//! [`BARE`] is a complete guest in one ELF file: it boots by the PVH entry on any KVM, drops to
//! ring 3 at once and runs a [`Workload`] there: a NAS-style kernel, the self-checking writer, or
//! nothing but watching the clock. It is told what to do on its command line
//! ([`Workload::command_line`]) and reports on COM1, one [`Line`] per event.
//!
//! ```
//! use ferry_guest_images::{Line, Workload};
//!
//! let workload = Workload::parse("dirty:wss=16M,rate=5000")?;
//! assert!(workload.memory_needed(1) < 32 << 20);
//! assert!(workload.command_line(1, Some(2_600_000)).contains("ferry.tsc_khz=2600000"));
//!
//! let Some(Line::Ready { t_ms }) = Line::parse("ferry-guest: ready t_ms=768") else { unreachable!() };
//! assert_eq!(t_ms, 768);
//! # Ok::<(), ferry_guest_images::Error>(())
//! ```
//!
//! [`linux`] makes a bootable Linux of Debian's kernel and a static `/init`; [`nested`] starts the
//! same Linux under QEMU as a host with hardware KVM, where this machine has none.
//!
//! [`run_on_threads`] runs the same kernels on the host itself, for comparison.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic))]

pub mod linux;
pub mod nested;
mod workload;

pub use ferry_linux_init::START as LINUX_INIT_START;
pub use ferry_linux_init::client::Lap;
pub use ferry_nas::dirty::{Corruption, Dirty, Fill, Pattern, Verdict};
pub use ferry_nas::host::run_on_threads;
pub use ferry_nas::line::{Gaps, KernelResult, Line, PREFIX, Work};
pub use ferry_nas::{Class, Facts, Kernel, Outcome, Problem, RunError};
pub use workload::{Error, MAX_CPUS, Manner, Workload};

/// The bare guest: an x86-64 ELF image with a PVH entry, to be loaded as a kernel.
pub const BARE: &[u8] = include_bytes!(env!("FERRY_BARE_IMAGE"));

/// The byte that, sent to COM1, tells the guest to finish: the writer verifies everything and gives
/// its verdict, a kernel ends after the run in hand.
pub const STOP: u8 = b'q';
