//! The VM generation id: 16 bytes by which a guest sees that it was copied (Microsoft, "Virtual
//! Machine Generation ID", 2018; Linux `drivers/virt/vmgenid.c`).
//!
//! ```text
//! 0xef000  "FERRY GENERATION"   the device is in this guest's ACPI tables
//! 0xef010  the id               where the tables say that it is
//! ```
//!
//! The page is memory of the guest that its memory map reserves. So it goes wherever the guest
//! goes: by a ferry that does not know of it, and in any version of the state. A guest that was
//! started without has no mark there, and stays without.

use std::fmt;

/// The page: below 1 MiB, behind the ACPI tables, where no kernel has RAM.
pub(crate) const GENERATION_PAGE: u64 = 0xe_f000;
/// How the page begins.
pub(crate) const GENERATION_MARK: [u8; 16] = *b"FERRY GENERATION";
/// Where the id is. The specification wants a multiple of 8.
pub(crate) const GENERATION_ID: u64 = GENERATION_PAGE + GENERATION_MARK.len() as u64;
/// The interrupt line by which the guest is told of a new id: ISA's that a PC leaves to a second
/// disk controller, an edge.
pub(crate) const GENERATION_GSI: u32 = 15;

/// A VM generation id. The guest reads the bytes in this order.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct GenerationId([u8; 16]);

impl GenerationId {
    /// One that no other guest has had, of the kernel's random numbers.
    ///
    /// # Errors
    /// The kernel has none.
    pub fn random() -> std::io::Result<Self> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).map_err(std::io::Error::other)?;
        Ok(Self(bytes))
    }

    /// The bytes, as they are in the guest's memory.
    #[must_use]
    pub const fn bytes(&self) -> [u8; 16] {
        self.0
    }

    /// The beginning of the page in the guest's memory.
    pub(super) fn page(&self) -> Vec<u8> {
        [GENERATION_MARK, self.0].concat()
    }
}

impl From<[u8; 16]> for GenerationId {
    fn from(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }
}

/// 32 hexadecimal digits.
impl fmt::Display for GenerationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for GenerationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GenerationId({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_differ_and_are_told_in_digits() {
        let (one, two) = (
            GenerationId::random().unwrap(),
            GenerationId::random().unwrap(),
        );
        assert_ne!(one, two);
        let mut bytes = [0; 16];
        (bytes[0], bytes[15]) = (0x0f, 0xa0);
        let text = GenerationId::from(bytes).to_string();
        assert_eq!(text, format!("0f{}a0", "00".repeat(14)));
    }
}
