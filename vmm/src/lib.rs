//! ferry's virtual machine monitor as a library.
//!
//! [`machine::Machine`] is where to start: it is built paused, loaded with a kernel ([`boot`]) or with
//! a state saved elsewhere, and run. Below it lie guest RAM ([`memory`]) and everything that speaks to
//! the kernel's KVM ([`kvm`]).
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic))]

pub mod boot;
pub mod kvm;
pub mod machine;
pub mod memory;
pub mod migrate;
