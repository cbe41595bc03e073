//! The MMIO transport's registers (§4.2.2), as the driver sees them.

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_FEATURES, VIRTIO_MMIO_DEVICE_FEATURES_SEL,
    VIRTIO_MMIO_DRIVER_FEATURES, VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_QUEUE_AVAIL_HIGH,
    VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH, VIRTIO_MMIO_QUEUE_DESC_LOW,
    VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY,
    VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_HIGH, VIRTIO_MMIO_QUEUE_USED_LOW,
    VIRTIO_MMIO_SHM_BASE_HIGH, VIRTIO_MMIO_SHM_BASE_LOW, VIRTIO_MMIO_SHM_LEN_HIGH,
    VIRTIO_MMIO_SHM_LEN_LOW, VIRTIO_MMIO_STATUS,
};

use super::features::{F_EVENT_IDX, F_VERSION_1};
use super::queue::{Area, VirtQueue};

const STEPS: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_DRIVER_OK
    | VIRTIO_CONFIG_S_FAILED;

/// What a write to a register asks for beyond the register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect {
    None,
    /// The driver is ready.
    Activate,
    /// The driver starts anew.
    Reset,
}

/// The registers that are not a queue's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Registers {
    pub(super) status: u32,
    pub(super) device_features_sel: u32,
    pub(super) driver_features_sel: u32,
    pub(super) driver_features: u64,
    pub(super) queue_sel: u32,
    pub(super) config_generation: u32,
}

impl Registers {
    pub(super) const fn has(&self, status: u32) -> bool {
        self.status & status == status
    }

    /// Whether driver and device have agreed on features.
    pub(super) const fn agreed(&self) -> bool {
        self.has(VIRTIO_CONFIG_S_FEATURES_OK)
    }

    /// Whether queues are to be worked on.
    pub(super) const fn active(&self) -> bool {
        self.has(VIRTIO_CONFIG_S_DRIVER_OK)
            && self.status & (VIRTIO_CONFIG_S_NEEDS_RESET | VIRTIO_CONFIG_S_FAILED) == 0
    }

    pub(super) fn needs_reset(&mut self) {
        self.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
    }

    /// Whether a device can have this status: DRIVER_OK comes after FEATURES_OK.
    pub(super) const fn possible_status(status: u32) -> bool {
        let ready = status & VIRTIO_CONFIG_S_DRIVER_OK != 0;
        let agreed = status & VIRTIO_CONFIG_S_FEATURES_OK != 0;
        status & !(STEPS | VIRTIO_CONFIG_S_NEEDS_RESET) == 0 && (agreed || !ready)
    }

    pub(super) fn read(&self, offset: u32, features: u64, queues: &[VirtQueue]) -> u32 {
        let queue = queues.get(index(self.queue_sel));
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES => half(features, self.device_features_sel),
            VIRTIO_MMIO_QUEUE_NUM_MAX => queue.map_or(0, |q| q.max_size().into()),
            VIRTIO_MMIO_QUEUE_READY => queue.map_or(0, |q| q.ready().into()),
            VIRTIO_MMIO_STATUS => self.status,
            VIRTIO_MMIO_CONFIG_GENERATION => self.config_generation,
            // No shared memory: all ones (§4.2.2.1).
            VIRTIO_MMIO_SHM_LEN_LOW
            | VIRTIO_MMIO_SHM_LEN_HIGH
            | VIRTIO_MMIO_SHM_BASE_LOW
            | VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            _ => 0,
        }
    }

    /// Registers may only be written at their time: features between DRIVER and FEATURES_OK, queues
    /// between FEATURES_OK and DRIVER_OK. What comes at another time is lost, as the specification
    /// lets a device do.
    pub(super) fn write(
        &mut self,
        offset: u32,
        value: u32,
        features: u64,
        queues: &mut [VirtQueue],
    ) -> Effect {
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES => self.set_features(value),
            VIRTIO_MMIO_QUEUE_SEL => self.queue_sel = value,
            VIRTIO_MMIO_STATUS => return self.set_status(value, features),
            _ => self.write_queue(offset, value, queues),
        }
        Effect::None
    }

    fn set_features(&mut self, value: u32) {
        if !self.has(VIRTIO_CONFIG_S_DRIVER) || self.has(VIRTIO_CONFIG_S_FEATURES_OK) {
            return;
        }
        let value = u64::from(value);
        self.driver_features = match self.driver_features_sel {
            0 => self.driver_features & !0xffff_ffff | value,
            1 => self.driver_features & 0xffff_ffff | value << 32,
            _ => return,
        };
    }

    fn set_status(&mut self, value: u32, features: u64) -> Effect {
        if value == 0 {
            return Effect::Reset;
        }
        // Bits are only ever added (§2.1.1), and NEEDS_RESET is the device's.
        let mut added = value & STEPS & !self.status;
        let acceptable = self.driver_features & !features == 0
            && self.driver_features & F_VERSION_1 != 0
            && (self.status | value) & VIRTIO_CONFIG_S_DRIVER != 0;
        if !acceptable {
            added &= !VIRTIO_CONFIG_S_FEATURES_OK;
        }
        if (self.status | added) & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
            added &= !VIRTIO_CONFIG_S_DRIVER_OK;
        }
        self.status |= added;
        if added & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            Effect::Activate
        } else {
            Effect::None
        }
    }

    fn write_queue(&mut self, offset: u32, value: u32, queues: &mut [VirtQueue]) {
        let in_time = self.has(VIRTIO_CONFIG_S_FEATURES_OK) && !self.has(VIRTIO_CONFIG_S_DRIVER_OK);
        let Some(queue) = queues.get_mut(index(self.queue_sel)).filter(|_| in_time) else {
            return;
        };
        if offset == VIRTIO_MMIO_QUEUE_READY {
            queue.set_ready(value & 1 == 1);
            return;
        }
        if queue.ready() {
            return;
        }
        match offset {
            VIRTIO_MMIO_QUEUE_NUM => queue.set_size(value),
            VIRTIO_MMIO_QUEUE_DESC_LOW => queue.set_address(Area::Descriptors, false, value),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => queue.set_address(Area::Descriptors, true, value),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => queue.set_address(Area::Available, false, value),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => queue.set_address(Area::Available, true, value),
            VIRTIO_MMIO_QUEUE_USED_LOW => queue.set_address(Area::Used, false, value),
            VIRTIO_MMIO_QUEUE_USED_HIGH => queue.set_address(Area::Used, true, value),
            _ => {}
        }
    }

    pub(super) const fn event_idx(&self) -> bool {
        self.driver_features & F_EVENT_IDX != 0
    }
}

fn index(n: u32) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

#[allow(
    clippy::cast_possible_truncation,
    reason = "the halves of 64 bits are what is asked for"
)]
const fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}
