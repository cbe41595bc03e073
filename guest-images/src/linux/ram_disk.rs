//! The initial RAM disk.

use std::path::Path;

use super::cpio::Archive;
use super::kernel::Module;
use super::{INIT, LinuxError};

/// An initial RAM disk in the making: `/init`, modules, and whatever else is added.
#[derive(Debug)]
pub struct RamDisk(Archive);

impl RamDisk {
    /// A RAM disk whose init loads these modules, in this order.
    ///
    /// # Errors
    /// [`LinuxError::TooLarge`].
    pub fn new(modules: &[Module]) -> Result<Self, LinuxError> {
        let mut archive = Archive::default();
        for directory in ["dev", "proc", "sys", "tmp", "run", "root"] {
            archive.directory(directory)?;
        }
        archive.file("init", 0o755, INIT)?;
        for (n, module) in modules.iter().enumerate() {
            // init goes by the order of names.
            archive.file(
                &format!("modules/{n:03}-{}.ko", module.name),
                0o644,
                &module.bytes,
            )?;
        }
        Ok(Self(archive))
    }

    /// Adds a file, which may be a program.
    ///
    /// # Errors
    /// [`LinuxError::TooLarge`].
    pub fn add(&mut self, path: &Path, bytes: &[u8]) -> Result<(), LinuxError> {
        let path = path.to_string_lossy();
        self.0.file(path.trim_start_matches('/'), 0o755, bytes)
    }

    /// The finished RAM disk, to be given to a boot loader.
    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        self.0.finish()
    }
}
