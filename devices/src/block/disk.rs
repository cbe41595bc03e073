//! The file behind a disk: opened, locked, read, written.
//!
//! # Caches
//!
//! A host's page cache knows nothing of what another host writes. So a block device is opened with
//! `O_DIRECT`: each read is the device's own bytes, also where this host has read the device before
//! the guest came. Flushing and dropping the cache when the lock is taken was the other way; it
//! does not suffice, for the kernel drops only pages that are unused at that moment, and other
//! programs (udev, LVM) fill the cache again. A regular file is read through the cache: network
//! file systems look at it again when a lock is taken, and local files have one cache.
//!
//! # A flush that failed
//!
//! When fdatasync fails, Linux may have dropped the pages that could not be written, and a second
//! fdatasync succeeds. The disk remembers the failure: every later flush fails, and the disk is not
//! given to another host.

mod aligned;
mod copy;
mod error;
mod lock;

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock};

use nix::libc;
use rustix::fs::{FallocateFlags, OFlags, fallocate, fcntl_getfl, fcntl_setfl, ioctl_blksszget};
use serde::{Deserialize, Serialize};

use super::WrittenBlocks;
pub(super) use aligned::AlignedBuffer;
use aligned::Direct;
pub use error::DiskError;

/// Bytes of a sector, virtio's unit of addresses.
pub const SECTOR: u64 = 512;
const SECTOR_SIZE: u32 = 512;

/// A raw image or a block device.
///
/// It is used under a lock on the open file, so that two guests cannot write to it. During a
/// migration both sides have the file open; the lock is dropped at the source when the guest is
/// handed over, and taken at the destination before the guest runs.
#[derive(Debug)]
pub struct Disk {
    file: File,
    path: PathBuf,
    read_only: bool,
    bytes: u64,
    regular: bool,
    /// Bytes of its logical block.
    block: u32,
    /// For a block device: how it is read past the page cache.
    direct: Option<Direct>,
    locked: Mutex<bool>,
    /// Something was written since the last flush.
    unflushed: AtomicBool,
    /// Why a flush failed: what was written before it may be lost.
    lost: OnceLock<String>,
    written: WrittenBlocks,
}

/// Which file is behind a disk, as of one host's boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileId {
    /// The device that holds the file, or that it is.
    pub device: u64,
    /// The file's inode; `None` for a device, whose node can be made anew.
    pub inode: Option<u64>,
}

impl Disk {
    /// Opens `path`, without taking the lock.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn open(path: &Path, read_only: bool) -> Result<Self, DiskError> {
        let error = |source: io::Error| DiskError::Open {
            path: path.to_owned(),
            hint: match source.kind() {
                io::ErrorKind::NotFound => "check the path, or make the image with `truncate -s`",
                io::ErrorKind::PermissionDenied => {
                    "give this user access, or add `,ro` if reading is enough"
                }
                io::ErrorKind::ReadOnlyFilesystem => "add `,ro` if reading is enough",
                io::ErrorKind::IsADirectory => "give the image file",
                _ => "give a raw image or a block device",
            },
            source,
        };
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(!read_only)
            // A pipe would be waited for; files and block devices do not care.
            .custom_flags(libc::O_NONBLOCK);
        let file = options.open(path).map_err(error)?;
        Self::checked(file, path, (read_only, &options), error)
    }

    /// Takes a file that is open already, without taking the lock. Its path is that of the
    /// descriptor, which tells about it for as long as this is here.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn given(file: File, read_only: bool) -> Result<Self, DiskError> {
        let path = path_of(&file);
        let error = |source| DiskError::Open {
            path: path.clone(),
            hint: "pass a raw image or a block device",
            source,
        };
        let mut options = OpenOptions::new();
        options.read(true).write(!read_only);
        Self::checked(file, &path, (read_only, &options), error)
    }

    fn checked(
        mut file: File,
        path: &Path,
        (read_only, options): (bool, &OpenOptions),
        error: impl Fn(io::Error) -> DiskError,
    ) -> Result<Self, DiskError> {
        let kind = file.metadata().map_err(&error)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::Kind {
                path: path.to_owned(),
            });
        }
        // The end is found alike for files and devices.
        let bytes = file.seek(SeekFrom::End(0)).map_err(&error)?;
        if bytes == 0 || !bytes.is_multiple_of(SECTOR) {
            return Err(DiskError::Size {
                path: path.to_owned(),
                bytes,
            });
        }
        let disk = Self::of(file, path, read_only, bytes);
        Ok(if kind.is_file() {
            disk
        } else {
            disk.into_device(options)
        })
    }

    /// A regular file.
    fn of(file: File, path: &Path, read_only: bool, bytes: u64) -> Self {
        Self {
            file,
            path: path.to_owned(),
            read_only,
            bytes,
            regular: true,
            block: SECTOR_SIZE,
            direct: None,
            locked: Mutex::new(false),
            unflushed: AtomicBool::new(false),
            lost: OnceLock::new(),
            written: WrittenBlocks::default(),
        }
    }

    /// A block device: with its own block size, and past the page cache.
    fn into_device(mut self, options: &OpenOptions) -> Self {
        self.regular = false;
        match ioctl_blksszget(&self.file) {
            // Linux knows blocks of 512 bytes to 64 KiB (include/linux/blkdev.h).
            Ok(block) if block.is_power_of_two() && (SECTOR_SIZE..=1 << 16).contains(&block) => {
                self.block = block;
            }
            other => {
                tracing::warn!(disk = %self.path.display(), ?other, "the block size of a device is not known");
            }
        }
        let mut options = options.clone();
        options.custom_flags(libc::O_NONBLOCK | libc::O_DIRECT);
        match options.open(&self.path) {
            Ok(file) => {
                self.file = file;
                self.direct = Some(Direct::new(self.block.into()));
            }
            // What was passed on open may not be this user's to open.
            Err(_) if set_direct(&self.file).is_ok() => {
                self.direct = Some(Direct::new(self.block.into()));
            }
            Err(error) => {
                tracing::warn!(disk = %self.path.display(), %error, "the device cannot be read past this host's cache: do not share it between hosts");
            }
        }
        self
    }

    /// The guest knows the disk with `bytes`; the file is larger, for it has grown under the guest,
    /// which sees as much as before.
    #[must_use]
    pub fn with_guest_bytes(mut self, bytes: u64) -> Self {
        self.bytes = self.bytes.min(bytes);
        self
    }

    /// Bytes of its logical block: what the guest is told to align to.
    #[must_use]
    pub const fn block_size(&self) -> u32 {
        self.block
    }

    /// Which file it is.
    ///
    /// # Errors
    /// The file system's.
    pub fn file_id(&self) -> io::Result<FileId> {
        let metadata = self.file.metadata()?;
        Ok(if self.regular {
            FileId {
                device: metadata.dev(),
                inode: Some(metadata.ino()),
            }
        } else {
            FileId {
                device: metadata.rdev(),
                inode: None,
            }
        })
    }

    /// Bytes of the file now; more than [`bytes`](Self::bytes) when it has grown under the guest.
    ///
    /// # Errors
    /// The file system's.
    pub fn file_bytes(&self) -> io::Result<u64> {
        (&self.file).seek(SeekFrom::End(0))
    }

    /// Writes to the disk what the kernel holds back of it.
    ///
    /// # Errors
    /// [`DiskError::Io`], now and at every later call.
    pub fn settle(&self) -> Result<(), DiskError> {
        if self.unflushed.load(Ordering::Acquire) || self.lost.get().is_some() {
            self.flush().map_err(|e| self.io("flushed", e))?;
        }
        Ok(())
    }

    fn io(&self, what: &'static str, source: io::Error) -> DiskError {
        DiskError::Io {
            path: self.path.clone(),
            what,
            source,
        }
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it may only be read.
    #[must_use]
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Its size in bytes when it was opened, which is what the guest was told.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Which parts of it were written.
    #[must_use]
    pub fn written(&self) -> &WrittenBlocks {
        &self.written
    }

    /// Where a range of sectors lies in the file, if it is on the disk.
    pub(super) fn range(&self, sector: u64, len: u64) -> Option<u64> {
        let offset = sector.checked_mul(SECTOR)?;
        let end = offset.checked_add(len)?;
        (end <= self.bytes && len.is_multiple_of(SECTOR)).then_some(offset)
    }

    pub(super) fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let read = match &self.direct {
            Some(direct) => direct.read(&self.file, offset, into),
            None => self.file.read_exact_at(into, offset),
        };
        read.map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => shrunk(),
            _ => e,
        })
    }

    pub(super) fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.check_end(offset, from.len())?;
        let result = match &self.direct {
            Some(direct) => direct.write(&self.file, offset, from),
            None => self.file.write_all_at(from, offset),
        };
        // Of a write that failed, a part may have been done.
        self.unflushed.store(true, Ordering::Release);
        self.written
            .mark(offset, u64::try_from(from.len()).unwrap_or(u64::MAX));
        result
    }

    /// A file that was cut must not silently grow again, with a hole where the guest's data was.
    fn check_end(&self, offset: u64, len: usize) -> io::Result<()> {
        if !self.regular {
            return Ok(());
        }
        let end = offset.saturating_add(u64::try_from(len).unwrap_or(u64::MAX));
        if self.file.metadata()?.len() < end {
            return Err(shrunk());
        }
        Ok(())
    }

    /// Always asks the kernel: another flush may be under way, and only one's own return says that
    /// it is done.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.flush_by(|| self.file.sync_data())
    }

    fn flush_by(&self, sync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        // Before the flush, so that what is written meanwhile counts as not flushed.
        self.unflushed.store(false, Ordering::Release);
        if let Err(error) = sync() {
            self.unflushed.store(true, Ordering::Release);
            let why = self.lost.get_or_init(|| error.to_string());
            tracing::error!(disk = %self.path.display(), why, "a flush failed: what the guest has written may be lost");
            return Err(error);
        }
        match self.lost.get() {
            Some(why) => Err(io::Error::other(format!(
                "an earlier flush failed ({why}), and what was written before it may be lost"
            ))),
            None => Ok(()),
        }
    }

    /// Lets the file system have the space back; the bytes read as zero afterwards.
    pub(super) fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.allocate(
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            offset,
            len,
        )
    }

    /// Makes bytes zero and keeps their space.
    pub(super) fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
        let done = self.allocate(
            FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
            offset,
            len,
        );
        // A device zeroes whole blocks only.
        let parts = (self.direct.as_ref()).is_some_and(|direct| !direct.whole(offset, len));
        if !parts && !matches!(&done, Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP)) {
            return done;
        }
        let mut at = 0;
        while at < len {
            let n = usize::try_from(len - at)
                .unwrap_or(usize::MAX)
                .min(ZEROS.len());
            self.write(offset + at, &ZEROS[..n])?;
            at += u64::try_from(n).unwrap_or(u64::MAX);
        }
        Ok(())
    }

    fn allocate(&self, mode: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        self.check_end(offset, usize::try_from(len).unwrap_or(usize::MAX))?;
        let result = fallocate(&self.file, mode, offset, len);
        self.unflushed.store(true, Ordering::Release);
        self.written.mark(offset, len);
        Ok(result?)
    }
}

/// What stands for the path of a file that was given open, for as long as it is.
fn path_of(file: &File) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

fn set_direct(file: &File) -> io::Result<()> {
    let flags = fcntl_getfl(file)?;
    Ok(fcntl_setfl(file, flags | OFlags::DIRECT)?)
}

fn shrunk() -> io::Error {
    io::Error::new(
        io::ErrorKind::UnexpectedEof,
        "the file is shorter than when the guest was given it: it was truncated",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(bytes: u64) -> (tempfile::TempDir, Disk) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        File::create(&path).unwrap().set_len(bytes).unwrap();
        let disk = Disk::open(&path, false).unwrap();
        (dir, disk)
    }

    #[test]
    fn a_failed_flush_is_never_forgotten() {
        let (_dir, disk) = disk(4096);
        disk.lock().unwrap();
        disk.write(0, &[1; 512]).unwrap();
        let failed = disk.flush_by(|| Err(io::Error::from_raw_os_error(libc::EIO)));
        assert!(failed.is_err());
        // The kernel says that all is well now, and it is not.
        let error = disk.flush().unwrap_err().to_string();
        assert!(error.contains("may be lost"), "{error}");
        assert!(disk.settle().is_err());
        let error = disk.unlock().unwrap_err().to_string();
        assert!(error.contains("disk.img"), "{error}");
        assert!(*disk.locked.lock().unwrap(), "no other host gets it");
    }

    #[test]
    fn the_guest_keeps_its_size_on_a_file_that_has_grown() {
        let (_dir, disk) = disk(8192);
        assert_eq!(disk.file_bytes().unwrap(), 8192);
        let disk = disk.with_guest_bytes(4096);
        assert_eq!(disk.bytes(), 4096);
        assert_eq!(disk.file_bytes().unwrap(), 8192);
        assert_eq!(disk.range(8, 512), None);
    }

    #[test]
    fn a_file_is_known_by_its_inode() {
        let (dir, disk) = disk(4096);
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(disk.path(), &link).unwrap();
        let same = Disk::open(&link, true).unwrap();
        assert_eq!(disk.file_id().unwrap(), same.file_id().unwrap());
        let other = dir.path().join("other");
        std::fs::copy(disk.path(), &other).unwrap();
        let other = Disk::open(&other, true).unwrap();
        assert_ne!(disk.file_id().unwrap(), other.file_id().unwrap());
    }
}
