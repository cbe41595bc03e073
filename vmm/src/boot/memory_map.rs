//! What the guest is told about its memory. E820 and PVH number the kinds alike.

use crate::memory::RamLayout;

pub(super) const RAM: u32 = 1;
pub(super) const RESERVED: u32 = 2;

/// End of usable memory below 640 KiB: where a BIOS would have its EBDA.
pub(super) const LOW_END: u64 = 0x9_fc00;
/// Start of usable memory above the BIOS area.
pub(super) const HIGH_START: u64 = 0x10_0000;

pub(super) struct Range {
    pub(super) address: u64,
    pub(super) size: u64,
    pub(super) kind: u32,
}

/// The map for this RAM, which must reach past 1 MiB.
pub(super) fn memory_map(ram: &RamLayout) -> Vec<Range> {
    let range = |address, end: u64, kind| Range {
        address,
        size: end - address,
        kind,
    };
    let mut map = vec![
        range(0, LOW_END, RAM),
        // EBDA, video memory, BIOS: ACPI's tables lie from 0xe0000 on.
        range(LOW_END, HIGH_START, RESERVED),
        range(HIGH_START, ram.low_end().max(HIGH_START), RAM),
    ];
    map.extend(
        ram.regions()
            .iter()
            .skip(1)
            .map(|r| range(r.address(), r.address() + r.bytes(), RAM)),
    );
    map
}
