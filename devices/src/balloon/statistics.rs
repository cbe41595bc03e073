pub use crate::state::Statistics;

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
