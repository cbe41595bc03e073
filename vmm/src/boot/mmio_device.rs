/// Where a virtio-mmio device is, as the guest is to be told (in the DSDT, as `LNRO0005`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MmioDevice {
    /// Guest-physical address of its registers, below 4 GiB.
    pub base: u32,
    /// Length of its range in bytes.
    pub size: u32,
    /// Its interrupt line at the IOAPIC: an edge, active high, for each interrupt.
    pub gsi: u32,
}
