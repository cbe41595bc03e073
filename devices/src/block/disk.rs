//! The file behind a disk: opened, locked, read, written.

mod copy;

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use rustix::fs::{FallocateFlags, fallocate};

use super::WrittenBlocks;

/// Bytes of a sector, virtio's unit of addresses.
pub const SECTOR: u64 = 512;

/// Why a disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// It cannot be opened.
    #[error("the disk {path} cannot be opened: {source}; {hint}")]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
        /// What to do.
        hint: &'static str,
    },
    /// Not something that has blocks.
    #[error("the disk {path} is neither a file nor a block device: give a raw image")]
    Kind {
        /// The file.
        path: PathBuf,
    },
    /// An odd size.
    #[error(
        "the disk {path} has {bytes} bytes, which is no multiple of {SECTOR} (or none at all): is it a raw image? \
         `truncate -s` makes one of any size"
    )]
    Size {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// Somebody else has it.
    #[error(
        "the disk {path} is in use by another process, perhaps another virtual machine: stop that one, or give both \
         the disk read-only"
    )]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// Somebody else has what a copy is to be made into.
    #[error(
        "the disk {path} is in use (by the guest at the source, if it is the same file), and a copy would overwrite it: give \
         another path with --disk, or leave --copy-disk out where both hosts share the disk"
    )]
    Target {
        /// The file.
        path: PathBuf,
    },
    /// What a copy is to be made into is something else.
    #[error(
        "the disk {path} has {here} bytes, and a disk of {wanted} bytes is to be copied into it: remove the file, or give one of \
         exactly that size, which is overwritten"
    )]
    OtherSize {
        /// The file.
        path: PathBuf,
        /// Its size.
        here: u64,
        /// The size of the guest's disk.
        wanted: u64,
    },
    /// It cannot be locked, or given up.
    #[error("the disk {path} could not be {what}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// A raw image or a block device.
///
/// It is used under a lock on the open file (an OFD lock, fcntl(2), as QEMU's: exclusive, or shared when read-only), so
/// that two guests cannot write to it. During a migration both sides have the file open; the lock is given up at the
/// source when the guest is handed over, and taken at the destination before the guest runs.
#[derive(Debug)]
pub struct Disk {
    file: File,
    path: PathBuf,
    read_only: bool,
    bytes: u64,
    regular: bool,
    locked: Mutex<bool>,
    /// Something was written since the last flush.
    unflushed: AtomicBool,
    written: WrittenBlocks,
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
        let mut file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            // A pipe would be waited for; files and block devices do not care.
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(error)?;
        let kind = file.metadata().map_err(error)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::Kind {
                path: path.to_owned(),
            });
        }
        // The end is found alike for files and devices.
        let bytes = file.seek(SeekFrom::End(0)).map_err(error)?;
        if bytes == 0 || !bytes.is_multiple_of(SECTOR) {
            return Err(DiskError::Size {
                path: path.to_owned(),
                bytes,
            });
        }
        Ok(Self {
            file,
            path: path.to_owned(),
            read_only,
            bytes,
            regular: kind.is_file(),
            locked: Mutex::new(false),
            unflushed: AtomicBool::new(false),
            written: WrittenBlocks::default(),
        })
    }

    /// Takes the lock. No effect when it is held.
    ///
    /// # Errors
    /// [`DiskError::Locked`], or the file system's refusal.
    pub fn lock(&self) -> Result<(), DiskError> {
        let mut locked = self.locked.lock().unwrap_or_else(PoisonError::into_inner);
        if *locked {
            return Ok(());
        }
        let kind = if self.read_only {
            libc::F_RDLCK
        } else {
            libc::F_WRLCK
        };
        match self.set_lock(kind) {
            Ok(()) => {
                *locked = true;
                Ok(())
            }
            Err(Errno::EAGAIN | Errno::EACCES) => Err(DiskError::Locked {
                path: self.path.clone(),
            }),
            Err(error) => Err(self.io("locked", error.into())),
        }
    }

    /// Gives the lock up, after all that was written has reached the disk: another host may read it next. No effect when
    /// it is not held.
    ///
    /// # Errors
    /// [`DiskError::Io`]; the lock is still held.
    pub fn unlock(&self) -> Result<(), DiskError> {
        let mut locked = self.locked.lock().unwrap_or_else(PoisonError::into_inner);
        if !*locked {
            return Ok(());
        }
        if self.unflushed.load(Ordering::Acquire) {
            self.flush().map_err(|e| self.io("flushed", e))?;
        }
        self.set_lock(libc::F_UNLCK)
            .map_err(|e| self.io("unlocked", e.into()))?;
        *locked = false;
        Ok(())
    }

    fn set_lock(&self, kind: i32) -> nix::Result<()> {
        let lock = libc::flock {
            l_type: libc::c_short::try_from(kind).unwrap_or(0),
            l_whence: libc::c_short::try_from(libc::SEEK_SET).unwrap_or(0),
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        fcntl(&self.file, FcntlArg::F_OFD_SETLK(&lock)).map(drop)
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
        self.file
            .read_exact_at(into, offset)
            .map_err(|e| match e.kind() {
                io::ErrorKind::UnexpectedEof => shrunk(),
                _ => e,
            })
    }

    pub(super) fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.check_end(offset, from.len())?;
        let result = self.file.write_all_at(from, offset);
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

    /// Always asks the kernel: another flush may be under way, and only one's own return says that it is done.
    pub(super) fn flush(&self) -> io::Result<()> {
        // Before the flush, so that what is written meanwhile counts as not flushed.
        self.unflushed.store(false, Ordering::Release);
        self.file
            .sync_data()
            .inspect_err(|_| self.unflushed.store(true, Ordering::Release))
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
        if !matches!(&done, Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP)) {
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

fn shrunk() -> io::Error {
    io::Error::new(
        io::ErrorKind::UnexpectedEof,
        "the file is shorter than when the guest was given it: somebody has cut it",
    )
}
