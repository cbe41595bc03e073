//! Applies what a loader returned.

use std::io::{self, Seek, SeekFrom};
use std::path::PathBuf;

use ferry_devices::sync::lock;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::{Machine, PauseError};
use crate::boot::{self, BootImage, GenerationId, Kernel, LoadError, Platform, WriteData};
use crate::kvm::IoctlError;

/// Why a kernel could not be put into a machine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ApplyError {
    /// The kernel itself.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The machine cannot be paused for it.
    #[error(transparent)]
    Pause(#[from] PauseError),
    /// A write outside of RAM.
    #[error(
        "{len} bytes of the kernel belong at {address:#x}, where the guest has no memory: {source}"
    )]
    Memory {
        /// Where.
        address: u64,
        /// How many.
        len: u64,
        /// Why.
        source: GuestMemoryError,
    },
    /// The file changed since it was looked at.
    #[error("{path} could not be read into the guest's memory: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No generation id.
    #[error("the host's kernel has no random numbers for the guest's generation id: {0}")]
    Random(#[source] io::Error),
    /// KVM refused the entry state.
    #[error("the boot processor could not be set to the kernel's entry: {0}")]
    Entry(#[from] IoctlError),
}

impl Machine {
    /// Loads a kernel into a machine that has not run yet, and leaves it ready to be resumed.
    ///
    /// # Errors
    /// [`ApplyError`].
    pub fn load(&self, kernel: &Kernel) -> Result<(), ApplyError> {
        let platform = Platform {
            cpus: self.description.cpus,
            mmio: self.mmio_devices(),
            generation: GenerationId::random().map_err(ApplyError::Random)?,
            numa: self.description.numa.clone(),
        };
        self.apply(&boot::load(kernel, self.ram().layout(), &platform)?)
    }

    /// Does what `image` says: writes to memory, then sets the boot processor's entry.
    ///
    /// # Errors
    /// [`ApplyError`].
    pub fn apply(&self, image: &BootImage) -> Result<(), ApplyError> {
        let _paused = self.pause()?;
        let memory = self.ram().memory();
        for write in &image.writes {
            let (address, len) = (write.address, write.len());
            let error = |source| ApplyError::Memory {
                address,
                len,
                source,
            };
            match &write.data {
                WriteData::Bytes(bytes) => {
                    memory
                        .write_slice(bytes, GuestAddress(address))
                        .map_err(error)?;
                }
                WriteData::File {
                    file,
                    path,
                    offset,
                    len,
                } => {
                    let io = |source| ApplyError::File {
                        path: path.clone(),
                        source,
                    };
                    let mut file = file.try_clone().map_err(io)?;
                    file.seek(SeekFrom::Start(*offset)).map_err(io)?;
                    let count = usize::try_from(*len).map_err(|e| io(io::Error::other(e)))?;
                    memory
                        .read_exact_volatile_from(GuestAddress(address), &mut file, count)
                        .map_err(|e| match e {
                            GuestMemoryError::IOError(source) => io(source),
                            other => error(other),
                        })?;
                }
            }
        }
        if let Some(boot_processor) = self.vcpus.first() {
            lock(boot_processor).set_entry(&image.entry)?;
        }
        Ok(())
    }
}
