//! ferry-vmm
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic))]

pub mod api;
pub mod doctor;
pub mod kvm;
pub mod vmm;
