//! Address ranges and the devices behind them, for port I/O and for MMIO alike.
//!
//! A bus is filled while the machine is built and only read afterwards, so that vCPUs look devices
//! up without a lock; each device has a lock of its own. That device lock is a leaf: a device takes
//! no other lock while it is accessed.

use std::sync::{Arc, Mutex};

use crate::sync::lock;

/// A device that can be reached by loads and stores (or `in` and `out`).
pub trait BusDevice: Send {
    /// Fills `data` with what the guest reads at `offset` bytes from the start of the device's
    /// range.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Takes `data`, written by the guest at `offset` bytes from the start of the device's range.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// Why a device could not be put on a bus.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BusError {
    /// The range is empty.
    #[error("the address range at {base:#x} is empty: a device needs at least one address")]
    Empty {
        /// First address asked for.
        base: u64,
    },
    /// The range runs over the end of the address space.
    #[error(
        "the address range at {base:#x} of {len:#x} bytes runs over the end of the bus: move it down"
    )]
    Overflow {
        /// First address asked for.
        base: u64,
        /// Length asked for, in bytes.
        len: u64,
    },
    /// Another device is there already.
    #[error(
        "the address range {base:#x}+{len:#x} overlaps the device at {other_base:#x}+{other_len:#x}: choose another place"
    )]
    Overlap {
        /// First address asked for.
        base: u64,
        /// Length asked for, in bytes.
        len: u64,
        /// First address of the device in the way.
        other_base: u64,
        /// Length of the device in the way, in bytes.
        other_len: u64,
    },
}

struct Slot {
    base: u64,
    len: u64,
    device: Arc<Mutex<dyn BusDevice>>,
}

/// A set of non-overlapping address ranges with a device behind each.
#[derive(Default)]
pub struct Bus {
    /// Sorted by `base`.
    slots: Vec<Slot>,
}

impl Bus {
    /// An empty bus.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `device` at `base..base + len`.
    ///
    /// # Errors
    /// [`BusError`] when the range is empty, overflows or overlaps another device.
    pub fn insert(
        &mut self,
        base: u64,
        len: u64,
        device: Arc<Mutex<dyn BusDevice>>,
    ) -> Result<(), BusError> {
        if len == 0 {
            return Err(BusError::Empty { base });
        }
        let last = base
            .checked_add(len - 1)
            .ok_or(BusError::Overflow { base, len })?;
        if let Some(other) = self
            .slots
            .iter()
            .find(|s| s.base <= last && base <= s.base + (s.len - 1))
        {
            return Err(BusError::Overlap {
                base,
                len,
                other_base: other.base,
                other_len: other.len,
            });
        }
        let at = self.slots.partition_point(|s| s.base < base);
        self.slots.insert(at, Slot { base, len, device });
        Ok(())
    }

    /// Reads from the device at `address`; where no device is, the bus floats: all ones.
    /// Returns whether a device answered.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        // Filled first, so that a device that leaves bytes alone cannot hand out stale ones.
        data.fill(0xff);
        match self.find(address, data.len()) {
            Some((slot, offset)) => {
                lock(&slot.device).read(offset, data);
                true
            }
            None => false,
        }
    }

    /// Writes to the device at `address`; where no device is, the write is lost, as on hardware.
    /// Returns whether a device took it.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some((slot, offset)) => {
                lock(&slot.device).write(offset, data);
                true
            }
            None => false,
        }
    }

    /// The device that covers all of `address..address + len`: an access across the edge of a range
    /// has no device, since none could answer the other half.
    fn find(&self, address: u64, len: usize) -> Option<(&Slot, u64)> {
        let after = self.slots.partition_point(|s| s.base <= address);
        let slot = self.slots.get(after.checked_sub(1)?)?;
        let offset = address - slot.base;
        let end = offset.checked_add(u64::try_from(len).ok()?)?;
        (end <= slot.len).then_some((slot, offset))
    }
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list()
            .entries(self.slots.iter().map(|s| (s.base, s.len)))
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Ram([u8; 16]);

    impl BusDevice for Ram {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            let at = usize::try_from(offset).unwrap();
            data.copy_from_slice(&self.0[at..at + data.len()]);
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            let at = usize::try_from(offset).unwrap();
            self.0[at..at + data.len()].copy_from_slice(data);
        }
    }

    fn ram() -> Arc<Mutex<dyn BusDevice>> {
        Arc::new(Mutex::new(Ram([0; 16])))
    }

    #[test]
    fn overlaps_and_bad_ranges_are_refused() {
        let mut bus = Bus::new();
        bus.insert(0x10, 16, ram()).unwrap();
        bus.insert(0x20, 16, ram()).unwrap();
        for (base, len) in [(0x10, 16), (0, 0x11), (0x1f, 1), (0x2f, 100), (0, u64::MAX)] {
            assert!(
                matches!(bus.insert(base, len, ram()), Err(BusError::Overlap { .. })),
                "{base:#x}+{len:#x}"
            );
        }
        assert_eq!(bus.insert(5, 0, ram()), Err(BusError::Empty { base: 5 }));
        assert_eq!(
            bus.insert(u64::MAX, 2, ram()),
            Err(BusError::Overflow {
                base: u64::MAX,
                len: 2
            })
        );
        bus.insert(u64::MAX, 1, ram()).unwrap();
        bus.insert(0, 0x10, ram()).unwrap();
    }

    #[test]
    fn accesses_reach_their_device_and_only_whole() {
        let mut bus = Bus::new();
        bus.insert(0x100, 16, ram()).unwrap();
        assert!(bus.write(0x102, &[1, 2, 3, 4]));
        let mut data = [0; 2];
        assert!(bus.read(0x103, &mut data));
        assert_eq!(data, [2, 3]);
        let mut word = [0; 4];
        assert!(!bus.read(0x10e, &mut word), "crosses the end");
        assert_eq!(word, [0xff; 4]);
        assert!(!bus.read(0xff, &mut data));
        assert!(!bus.write(0x110, &[0]));
        assert!(!bus.read(u64::MAX, &mut data));
    }
}
