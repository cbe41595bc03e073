//! How much of its memory a guest has: its RAM without what its balloon holds.

use super::{BalloonRequest, BalloonStatus, GuestMemory};
use serde::{Deserialize, Serialize};

/// Bytes of a page; sizes are rounded up to whole ones.
const PAGE: u64 = 4096;
/// The least that a guest is left, by its RAM and in any case. Linux keeps a 64th of its RAM for
/// the structures that describe the rest, whatever is in the balloon.
const LEAST_PART: u64 = 16;
const LEAST: u64 = 32 << 20;

/// The answer to `GET` and `PUT /v1/memory`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MemoryStatus {
    /// Bytes that the guest is to have.
    pub size_bytes: u64,
    /// Bytes that it has, as it says: all but what it has given into its balloon.
    pub actual_bytes: u64,
    /// The least that can be asked for.
    pub min_bytes: u64,
    /// The most that it can have: its RAM.
    pub max_bytes: u64,
    /// Whether the guest has a balloon driver: without one nothing changes.
    pub driver: bool,
    /// Whether the size is moved automatically, as `ferry balloon` has it.
    pub auto: bool,
    /// What the guest last said about its memory; `null` when it has said nothing.
    pub guest: Option<GuestMemory>,
}

impl MemoryStatus {
    /// That of a guest with `ram` bytes and this balloon.
    #[must_use]
    pub fn of(ram: u64, balloon: &BalloonStatus) -> Self {
        Self {
            size_bytes: ram.saturating_sub(balloon.target_bytes),
            actual_bytes: ram.saturating_sub(balloon.actual_bytes),
            min_bytes: least(ram),
            max_bytes: ram,
            driver: balloon.driver,
            auto: balloon.auto.is_some(),
            guest: balloon.guest.clone(),
        }
    }

    /// Whether the guest has what it is to have.
    #[must_use]
    pub fn is_reached(&self) -> bool {
        self.driver && self.actual_bytes == self.size_bytes
    }
}

fn least(ram: u64) -> u64 {
    (ram / LEAST_PART)
        .max(LEAST)
        .next_multiple_of(PAGE)
        .min(ram)
}

/// The body of `PUT /v1/memory`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryRequest {
    /// Bytes that the guest is to have.
    pub size_bytes: u64,
}

impl MemoryRequest {
    /// What its balloon is asked for, of a guest with `ram` bytes.
    ///
    /// # Errors
    /// A sentence for the user.
    pub fn balloon(&self, ram: u64) -> Result<BalloonRequest, String> {
        let size = self.size_bytes;
        if size > ram {
            return Err(format!(
                "{size} bytes of memory were asked for, but the guest can have at most {ram}, its RAM from the start; \
                 give less, or start it with --memory SIZE,max=MAX"
            ));
        }
        if size < least(ram) {
            return Err(format!(
                "{size} bytes of memory were asked for, but a guest with {ram} bytes of RAM keeps at least {}; give more",
                least(ram)
            ));
        }
        Ok(BalloonRequest {
            size_bytes: Some((ram - size) / PAGE * PAGE),
            auto: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn asked(size_bytes: u64, ram: u64) -> Result<Option<u64>, String> {
        let balloon = MemoryRequest { size_bytes }.balloon(ram);
        balloon.map(|balloon| balloon.size_bytes)
    }

    #[test]
    fn a_size_is_what_the_balloon_leaves() {
        assert_eq!(asked(512 * MIB, 1024 * MIB), Ok(Some(512 * MIB)));
        assert_eq!(asked(1024 * MIB, 1024 * MIB), Ok(Some(0)));
        // Rounded up: the guest has a page more than it was to have, and not less.
        assert_eq!(asked(64 * MIB + 1, 128 * MIB), Ok(Some(64 * MIB - PAGE)));
        let balloon = BalloonStatus {
            target_bytes: 512 * MIB,
            actual_bytes: 100 * MIB,
            driver: true,
            ..BalloonStatus::default()
        };
        let memory = MemoryStatus::of(1024 * MIB, &balloon);
        let sizes = (memory.size_bytes, memory.actual_bytes, memory.min_bytes);
        assert_eq!(sizes, (512 * MIB, 924 * MIB, 64 * MIB));
        assert!(!memory.is_reached());
    }

    #[test]
    fn what_cannot_be_is_said_in_a_sentence() {
        let text = asked(1025 * MIB, 1024 * MIB).unwrap_err();
        assert!(
            text.contains("at most 1073741824") && text.contains("max=MAX"),
            "{text}"
        );
        let text = asked(MIB, 1024 * MIB).unwrap_err();
        assert!(text.contains("at least 67108864"), "{text}");
        // One that is small as a whole keeps all of it.
        assert_eq!(asked(16 * MIB, 16 * MIB), Ok(Some(0)));
        assert!(asked(15 * MIB, 16 * MIB).is_err());
        assert!(asked(u64::MAX, u64::MAX).is_ok());
    }
}
