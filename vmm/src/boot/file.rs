//! A kernel or initrd file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::error::LoadError;
use super::{MemoryWrite, WriteData};

/// An open regular file with its size at that moment.
pub(super) struct Source {
    pub(super) what: &'static str,
    pub(super) path: PathBuf,
    pub(super) len: u64,
    file: Arc<File>,
}

impl Source {
    pub(super) fn open(what: &'static str, path: &Path) -> Result<Self, LoadError> {
        let error = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => LoadError::Missing {
                what,
                path: path.to_owned(),
            },
            _ => LoadError::Unreadable {
                what,
                path: path.to_owned(),
                source,
            },
        };
        // Before opening: opening a FIFO would wait for a writer.
        if !std::fs::metadata(path).map_err(error)?.is_file() {
            return Err(LoadError::NotAFile {
                what,
                path: path.to_owned(),
            });
        }
        let file = File::open(path).map_err(error)?;
        let len = file.metadata().map_err(error)?.len();
        Ok(Self {
            what,
            path: path.to_owned(),
            len,
            file: Arc::new(file),
        })
    }

    /// Reads exactly `buffer` from `offset`; a file that is too short for it is no kernel.
    pub(super) fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), LoadError> {
        self.file
            .read_exact_at(buffer, offset)
            .map_err(|source| match source.kind() {
                io::ErrorKind::UnexpectedEof => self.not_a_kernel("the file is too short"),
                // An offset past i64::MAX.
                io::ErrorKind::InvalidInput => self.not_a_kernel("an offset in it is absurd"),
                _ => LoadError::Unreadable {
                    what: self.what,
                    path: self.path.clone(),
                    source,
                },
            })
    }

    /// A write of `len` bytes from `offset`, which must be in the file.
    pub(super) fn write(
        &self,
        address: u64,
        offset: u64,
        len: u64,
    ) -> Result<MemoryWrite, LoadError> {
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(self.not_a_kernel("it is shorter than its headers say"));
        }
        let data = WriteData::File {
            file: self.file.clone(),
            path: self.path.clone(),
            offset,
            len,
        };
        Ok(MemoryWrite { address, data })
    }

    pub(super) fn not_a_kernel(&self, why: &'static str) -> LoadError {
        LoadError::NotAKernel {
            path: self.path.clone(),
            why,
        }
    }
}
