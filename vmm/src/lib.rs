//! ferry's virtual machine monitor as a library.
//!
//! [`machine::Machine`] is where to start: it is built paused, loaded with a kernel ([`boot`]) or
//! with a state saved elsewhere, and run. Below it lie guest RAM ([`memory`]) and everything that
//! speaks to the kernel's KVM ([`kvm`]). Above it, [`vmm::Vmm`] keeps the rules of who may run the
//! guest, and [`api`] lets others ask for it over a socket.
//!
//! ```no_run
//! use ferry_vmm::boot::Kernel;
//! use ferry_vmm::machine::Machine;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let machine = Machine::builder()
//!     .memory(512 << 20) // bytes
//!     .cpus(2)
//!     .serial(Box::new(std::io::stdout()))
//!     .build()?;
//! machine.load(&Kernel {
//!     path: "/boot/vmlinuz".into(),
//!     initrd: Some("/boot/initrd.img".into()),
//!     cmdline: "console=ttyS0".into(),
//! })?;
//! machine.resume()?;
//! println!("{:?}", machine.wait());
//! # Ok(())
//! # }
//! ```
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic))]

pub mod api;
pub mod boot;
pub mod doctor;
pub mod kvm;
pub mod machine;
pub mod memory;
pub mod migrate;
pub mod new_file;
pub mod numa;
pub mod priority;
pub mod record;
pub mod sandbox;
pub mod snapshot;
pub mod socket;
mod tap;
pub mod vmm;

pub use ferry_devices::{sync, thread};
