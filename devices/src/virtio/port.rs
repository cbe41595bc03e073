//! A device on the MMIO bus (§4.2.2): what a vCPU's access reaches.

use std::sync::Arc;

use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS,
    VIRTIO_MMIO_MAGIC_VALUE, VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_VENDOR_ID, VIRTIO_MMIO_VERSION,
};

use super::device::Device;
use super::memory::Memory;
use super::shared::Shared;
use crate::bus::BusDevice;

/// Bytes of address space of one device: a page of its own.
pub const MMIO_LEN: u64 = 0x1000;
/// Where the driver notifies a queue: a write of 4 bytes, the queue's index, at this offset.
pub const QUEUE_NOTIFY: u64 = 0x50;
/// Where the device's own configuration starts.
const CONFIG: u64 = 0x100;

/// "virt".
const MAGIC: u32 = 0x7472_6976;
/// "frry".
const VENDOR: u32 = 0x7972_7266;
const VERSION: u32 = 2;

/// The device on the MMIO bus, [`MMIO_LEN`] bytes of it.
pub struct Port<D, M>(Arc<Shared<D, M>>);

impl<D, M> std::fmt::Debug for Port<D, M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Port")
    }
}

impl<D: Device<M>, M: Memory> Port<D, M> {
    pub(super) fn new(shared: Arc<Shared<D, M>>) -> Self {
        Self(shared)
    }

    fn read_register(&self, offset: u64) -> u32 {
        match u32::try_from(offset).unwrap_or(u32::MAX) {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.0.kind.id,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_INTERRUPT_STATUS => self.0.interrupt.status(),
            offset => self.0.lock().read_register(offset),
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        match u32::try_from(offset).unwrap_or(u32::MAX) {
            VIRTIO_MMIO_INTERRUPT_ACK => self.0.interrupt.acknowledge(value),
            // Only where no ioeventfd catches it first.
            VIRTIO_MMIO_QUEUE_NOTIFY => self.0.notify(usize::try_from(value).unwrap_or(usize::MAX)),
            offset => self.0.write_register(offset, value),
        }
    }
}

impl<D: Device<M>, M: Memory> BusDevice for Port<D, M> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // Registers are 32 bits wide and accessed whole (§4.2.2.2); anything else reads as nothing.
        data.fill(0);
        if let Some(at) = offset.checked_sub(CONFIG) {
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            self.0.lock().device().read_config(at, data);
        } else if let (Ok(word), true) = (<&mut [u8; 4]>::try_from(data), offset.is_multiple_of(4))
        {
            *word = self.read_register(offset).to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(at) = offset.checked_sub(CONFIG) {
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            self.0.lock().write_config(at, data);
        } else if let (Ok(word), true) = (<[u8; 4]>::try_from(data), offset.is_multiple_of(4)) {
            self.write_register(offset, u32::from_le_bytes(word));
        }
    }
}
