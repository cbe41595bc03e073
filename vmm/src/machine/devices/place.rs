use ferry_devices::virtio::MMIO_LEN;

use crate::boot::MmioDevice;
use crate::memory::LOW_RAM_END;

/// Start of the devices' registers: above any RAM below 4 GiB, below the APICs.
const BASE: u32 = 0xd000_0000;
const SIZE: u32 = 0x1000;

const _: () = assert!(BASE as u64 >= LOW_RAM_END && SIZE as u64 == MMIO_LEN);

/// Interrupt lines that no other device has: first those that only an IOAPIC has, then those of ISA
/// that a PC leaves to expansion cards.
const LINES: [u32; 13] = [16, 17, 18, 19, 20, 21, 22, 23, 5, 6, 7, 10, 11];

/// The most virtio devices that a machine can have.
pub const MAX_DEVICES: usize = LINES.len();

/// The place of device number `number`, if there is one.
#[must_use]
pub fn place(number: usize) -> Option<MmioDevice> {
    let gsi = *LINES.get(number)?;
    Some(MmioDevice {
        base: BASE + u32::try_from(number).ok()? * SIZE,
        size: SIZE,
        gsi,
    })
}
