//! The feature bits that every device here has in common (virtio 1.2, §6).

/// The feature bit that says: not a legacy device (§6).
pub const F_VERSION_1: u64 = 1 << 32;
/// Descriptors may point to tables of descriptors (§2.7.5.3).
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// Notifications and interrupts are asked for by index (§2.7.7.2).
pub const F_EVENT_IDX: u64 = 1 << 29;
/// What every device here offers.
pub const COMMON_FEATURES: u64 = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX;
