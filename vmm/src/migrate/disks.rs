//! A machine's disks as the engine's disks: those of a guest that leaves, and those made for one
//! that arrives.

use std::sync::Arc;

use ferry_devices::block::{BLOCK, Disk};
use ferry_migration::port::{BLOCK_BYTES, BlockSink, BlockSource, PortError};

use crate::machine::{DeviceError, DiskOptions};

// What the devices mark is what the engine sends.
const _: () = assert!(BLOCK == BLOCK_BYTES);

/// A disk with its path in what goes wrong.
pub(super) struct DiskCopy(pub Arc<Disk>);

impl DiskCopy {
    fn at(&self, what: &str, offset: u64, error: &std::io::Error) -> PortError {
        let path = self.0.path().display();
        format!("the disk {path} cannot be {what} at byte {offset}: {error}").into()
    }
}

impl BlockSource for DiskCopy {
    fn bytes(&self) -> u64 {
        self.0.bytes()
    }

    fn start(&self) -> Result<(), PortError> {
        self.0.written().start(self.0.bytes());
        Ok(())
    }

    fn stop(&self) {
        self.0.written().stop();
    }

    fn take_written(&self) -> Result<Vec<u64>, PortError> {
        let path = self.0.path().display();
        let words = self.0.written().take();
        words.ok_or_else(|| format!("writes to {path} are not tracked").into())
    }

    fn hole(&self, offset: u64, len: u64) -> u64 {
        self.0.hole(offset, len)
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), PortError> {
        let read = self.0.copy_out(offset, into);
        read.map_err(|e| self.at("read", offset, &e))
    }
}

impl BlockSink for DiskCopy {
    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), PortError> {
        let written = self.0.copy_in(offset, bytes);
        written.map_err(|e| self.at("written", offset, &e))
    }

    fn zero(&self, offset: u64, len: u64) -> Result<(), PortError> {
        let cleared = self.0.clear(offset, len);
        cleared.map_err(|e| self.at("cleared", offset, &e))
    }

    fn hole(&self, offset: u64, len: u64) -> u64 {
        self.0.hole(offset, len)
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), PortError> {
        BlockSource::read(self, offset, into)
    }

    fn flush(&self) -> Result<(), PortError> {
        self.0.sync().map_err(|e| self.at("flushed", 0, &e))
    }
}

/// Disks that are copied here.
#[derive(Default)]
pub(super) struct IncomingDisks {
    all: Vec<(Arc<Disk>, bool)>,
}

impl IncomingDisks {
    /// Opens or makes a file for each.
    ///
    /// # Errors
    /// [`DeviceError`]; [`remove`](Self::remove) undoes what was made before it.
    pub(super) fn make(
        &mut self,
        options: &[DiskOptions],
        bytes: &[u64],
    ) -> Result<(), DeviceError> {
        if options.len() != bytes.len() {
            return Err(DeviceError::Disks {
                guest: bytes.len(),
                here: options.len(),
            });
        }
        for (options, bytes) in options.iter().zip(bytes) {
            let made = match &options.open {
                Some(open) => {
                    let file = open.duplicate().map_err(DeviceError::Resources)?;
                    Disk::missing_pages_given(file.into(), options.read_only, *bytes)
                }
                None => Disk::missing_pages(&options.path, options.read_only, *bytes),
            };
            let (disk, made) = made.map_err(DeviceError::Disk)?;
            self.all.push((Arc::new(disk), made));
        }
        Ok(())
    }

    /// For the machine; `None` where the guest's disks are not copied.
    pub(super) fn disks(&self) -> Option<Vec<Arc<Disk>>> {
        let disks = self.all.iter().map(|(disk, _)| Arc::clone(disk));
        (!self.all.is_empty()).then(|| disks.collect())
    }

    /// For the engine.
    pub(super) fn sinks(&self) -> Vec<Arc<dyn BlockSink>> {
        let sink = |(disk, _): &(Arc<Disk>, bool)| Arc::new(DiskCopy(Arc::clone(disk))) as _;
        self.all.iter().map(sink).collect()
    }

    /// The guest is about to use them.
    ///
    /// # Errors
    /// [`DeviceError::Disk`].
    pub(super) fn arrived(&self) -> Result<(), DeviceError> {
        self.all
            .iter()
            .try_for_each(|(disk, _)| disk.arrived())
            .map_err(DeviceError::Disk)
    }

    /// The guest does not come: the files that were made for it go.
    pub(super) fn remove(&mut self) {
        for (disk, made) in self.all.drain(..) {
            if made {
                disk.remove();
            }
        }
    }
}
