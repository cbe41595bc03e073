use serde::{Deserialize, Serialize};

/// What a guest says about its memory (§5.5.6.3); a driver may leave any of it out, and may lie.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statistics {
    /// Bytes swapped in.
    pub swap_in: Option<u64>,
    /// Bytes swapped out.
    pub swap_out: Option<u64>,
    /// Page faults that needed I/O.
    pub major_faults: Option<u64>,
    /// Page faults that did not.
    pub minor_faults: Option<u64>,
    /// Bytes that are not used for anything.
    pub free_memory: Option<u64>,
    /// Bytes there are.
    pub total_memory: Option<u64>,
    /// Bytes that could be had without swapping.
    pub available_memory: Option<u64>,
    /// Bytes of caches that could be dropped.
    pub disk_caches: Option<u64>,
    /// Huge pages that were had.
    pub hugetlb_allocations: Option<u64>,
    /// Huge pages that were not.
    pub hugetlb_failures: Option<u64>,
    /// Processes that were killed for want of memory (Linux 6.12).
    #[serde(default)]
    pub oom_kills: Option<u64>,
    /// Allocations that had to wait for memory (Linux 6.12).
    #[serde(default)]
    pub allocation_stalls: Option<u64>,
}

/// Bytes of an entry: a tag of 16 bits and a value of 64, packed.
pub(super) const ENTRY: usize = 10;
/// Entries that are looked at; Linux has sixteen tags.
pub(super) const MOST: usize = 64;

impl Statistics {
    /// Reads what a driver wrote; unknown tags are left out.
    pub(super) fn parse(bytes: &[u8]) -> Self {
        let mut statistics = Self::default();
        let (entries, _) = bytes.as_chunks::<ENTRY>();
        for [a, b, value @ ..] in entries {
            let value = Some(u64::from_le_bytes(*value));
            match u16::from_le_bytes([*a, *b]) {
                0 => statistics.swap_in = value,
                1 => statistics.swap_out = value,
                2 => statistics.major_faults = value,
                3 => statistics.minor_faults = value,
                4 => statistics.free_memory = value,
                5 => statistics.total_memory = value,
                6 => statistics.available_memory = value,
                7 => statistics.disk_caches = value,
                8 => statistics.hugetlb_allocations = value,
                9 => statistics.hugetlb_failures = value,
                10 => statistics.oom_kills = value,
                11 => statistics.allocation_stalls = value,
                _ => {}
            }
        }
        statistics
    }
}
