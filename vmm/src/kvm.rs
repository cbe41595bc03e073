//! Everything that speaks KVM.
pub mod probe;
