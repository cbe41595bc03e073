//! Guests to boot.
#![forbid(unsafe_code)]
/// The bare guest: a PVH ELF image.
pub const BARE: &[u8] = include_bytes!(env!("FERRY_BARE_IMAGE"));
