//! A disk that is copied to another host, or arrives as a copy.
//!
//! The source reads it past the device while the guest uses it: every write is marked in
//! [`WrittenBlocks`] when it is done and before the guest sees its completion. So what was read too
//! early, or half, is found marked later and read again; a pause waits for the requests that have
//! begun, and with them for their marks.
//!
//! The destination's file is made where there is none. One that is there must have exactly the
//! disk's size and is overwritten; its lock is held from the first moment, so that the source's own
//! file, which the source has locked, is never taken for a place to copy to.

use super::{Disk, DiskError, path_of};
use crate::sync::lock;
use nix::libc;
use rustix::fs::SeekFrom as Seek;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

impl Disk {
    /// Opens, or makes, the file that a disk of `bytes` is copied into, and locks it. `read_only`
    /// is for the guest. Says whether the file was made.
    ///
    /// # Errors
    /// [`DiskError`]; a file that was made is removed again.
    pub fn missing_pages(
        path: &Path,
        read_only: bool,
        bytes: u64,
    ) -> Result<(Self, bool), DiskError> {
        let error = |source: io::Error| DiskError::Open {
            path: path.to_owned(),
            hint: match source.kind() {
                io::ErrorKind::NotFound => "the directory must exist",
                io::ErrorKind::PermissionDenied => "give this user a place where it may write",
                _ => "give a path where a file can be made",
            },
            source,
        };
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK);
        let (file, made) = match options.clone().create_new(true).mode(0o600).open(path) {
            Ok(file) => (file, true),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                (options.open(path).map_err(error)?, false)
            }
            Err(e) => return Err(error(e)),
        };
        Self::made((file, made), path, (read_only, &options), bytes)
    }

    /// As [`missing_pages`](Self::missing_pages), with a file that is open already.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn missing_pages_given(
        file: File,
        read_only: bool,
        bytes: u64,
    ) -> Result<(Self, bool), DiskError> {
        let path = path_of(&file);
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        Self::made((file, false), &path, (read_only, &options), bytes)
    }

    fn made(
        (file, made): (File, bool),
        path: &Path,
        (read_only, options): (bool, &OpenOptions),
        bytes: u64,
    ) -> Result<(Self, bool), DiskError> {
        let disk = Self::of(file, path, read_only, bytes);
        // Before the lock, which is that of the open file: a device is opened anew.
        let device = disk
            .file
            .metadata()
            .is_ok_and(|m| m.file_type().is_block_device());
        let disk = if device {
            disk.into_device(options)
        } else {
            disk
        };
        match disk.prepare(made) {
            Ok(()) => Ok((disk, made)),
            Err(e) => {
                if made {
                    disk.remove();
                }
                Err(e)
            }
        }
    }

    /// Checks, sizes and locks the file.
    fn prepare(&self, made: bool) -> Result<(), DiskError> {
        let kind = self
            .file
            .metadata()
            .map_err(|e| self.io("examined", e))?
            .file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::Kind {
                path: self.path.clone(),
            });
        }
        match self.set_lock(libc::F_WRLCK) {
            Ok(()) => *lock(&self.locked) = true,
            Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES) => {
                return Err(DiskError::Target {
                    path: self.path.clone(),
                });
            }
            Err(e) => return Err(self.io("locked", e.into())),
        }
        if made {
            self.file
                .set_len(self.bytes)
                .map_err(|e| self.io("given its size", e))?;
            // Its name must outlast a crash as its contents do.
            if let Some(directory) = self.path.parent() {
                let directory = if directory.as_os_str().is_empty() {
                    Path::new(".")
                } else {
                    directory
                };
                File::open(directory)
                    .and_then(|d| d.sync_all())
                    .map_err(|e| self.io("written to its directory", e))?;
            }
        }
        let here = rustix::fs::seek(&self.file, Seek::End(0))
            .map_err(|e| self.io("measured", e.into()))?;
        if here != self.bytes {
            return Err(DiskError::OtherSize {
                path: self.path.clone(),
                here,
                wanted: self.bytes,
            });
        }
        Ok(())
    }

    /// All that arrives is here, and the guest will use it: the lock becomes that of a disk in use.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub fn arrived(&self) -> Result<(), DiskError> {
        if self.read_only {
            self.set_lock(libc::F_RDLCK)
                .map_err(|e| self.io("locked", e.into()))?;
        }
        Ok(())
    }

    /// Removes the file, if its path still leads to it.
    pub fn remove(&self) {
        let same = || -> io::Result<bool> {
            let (own, there) = (self.file.metadata()?, fs::symlink_metadata(&self.path)?);
            Ok((own.dev(), own.ino()) == (there.dev(), there.ino()))
        };
        if same().unwrap_or(false)
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(disk = %self.path.display(), %error, "a copy that did not become complete could not be removed");
        }
    }

    /// Copies bytes out, past the device.
    ///
    /// # Errors
    /// The file system's; a file that has become shorter.
    pub fn copy_out(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.read(offset, into)
    }

    /// Copies bytes in, past the device: for a disk that no guest uses yet.
    ///
    /// # Errors
    /// The file system's.
    pub fn copy_in(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.write(offset, from)
    }

    /// Makes bytes zero, as a hole where the file system has holes: for a disk that no guest uses
    /// yet.
    ///
    /// # Errors
    /// The file system's.
    pub fn clear(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.regular {
            match self.discard(offset, len) {
                Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
                done => return done,
            }
        }
        self.write_zeroes(offset, len)
    }

    /// How many bytes from `offset` on, at most `len`, are a hole: they read as zero, and need not
    /// be read. 0 where the file system does not tell.
    #[must_use]
    pub fn hole(&self, offset: u64, len: u64) -> u64 {
        match rustix::fs::seek(&self.file, Seek::Data(offset)) {
            Ok(data) => data.saturating_sub(offset).min(len),
            // No data up to the end. A file that was cut is noticed where it is read.
            Err(rustix::io::Errno::NXIO) if self.is_whole() => len,
            Err(_) => 0,
        }
    }

    fn is_whole(&self) -> bool {
        self.file
            .metadata()
            .is_ok_and(|m| self.regular && m.len() >= self.bytes)
    }

    /// Has all that was copied in written to the disk.
    ///
    /// # Errors
    /// The file system's.
    pub fn sync(&self) -> io::Result<()> {
        self.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 20;

    #[test]
    fn a_copy_is_made_locked_filled_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("copy.img");
        let (disk, made) = Disk::missing_pages(&path, false, SIZE).unwrap();
        assert!(made);
        assert_eq!(disk.hole(0, SIZE), SIZE);
        assert!(Disk::open(&path, false).unwrap().lock().is_err());
        disk.copy_in(70_000, &[7; 9000]).unwrap();
        assert!(disk.hole(0, SIZE) <= 70_000);
        assert_eq!(disk.hole(70_000, SIZE), 0);
        disk.clear(70_000, 4096).unwrap();
        disk.sync().unwrap();
        let mut bytes = vec![1; 9000];
        disk.copy_out(70_000, &mut bytes).unwrap();
        assert!(bytes[..4096].iter().all(|b| *b == 0) && bytes[4096..].iter().all(|b| *b == 7));
        drop(disk);
        // The next copy goes over it.
        let (disk, made) = Disk::missing_pages(&path, false, SIZE).unwrap();
        assert!(!made);
        disk.remove();
        assert!(!path.exists());
    }

    #[test]
    fn what_must_not_be_overwritten_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("other.img");
        let refused = |bytes| {
            Disk::missing_pages(&path, false, bytes)
                .unwrap_err()
                .to_string()
        };
        fs::write(&path, [5; 512]).unwrap();
        let text = refused(SIZE);
        assert!(
            text.contains("512 bytes") && text.contains("1048576"),
            "{text}"
        );
        // The source's own disk, whichever way it is used there.
        for read_only in [false, true] {
            let source = Disk::open(&path, read_only).unwrap();
            source.lock().unwrap();
            let text = refused(512);
            assert!(text.contains("--copy-disk"), "{text}");
        }
        assert_eq!(fs::read(&path).unwrap(), [5; 512]);
        let text = Disk::missing_pages(dir.path(), false, SIZE)
            .unwrap_err()
            .to_string();
        assert!(text.contains(&dir.path().display().to_string()), "{text}");
        let text = Disk::missing_pages(&dir.path().join("no/such"), false, 512)
            .unwrap_err()
            .to_string();
        assert!(text.contains("directory"), "{text}");
        // Larger than any file can be: nothing is left behind.
        let huge = dir.path().join("huge");
        assert!(Disk::missing_pages(&huge, false, u64::MAX).is_err() && !huge.exists());
    }

    #[test]
    fn a_read_only_copy_is_shared_once_it_has_arrived() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("copy.img");
        let (disk, _) = Disk::missing_pages(&path, true, SIZE).unwrap();
        disk.copy_in(0, &[1]).unwrap();
        let other = Disk::open(&path, true).unwrap();
        assert!(other.lock().is_err());
        disk.arrived().unwrap();
        disk.lock().unwrap();
        other.lock().unwrap();
    }
}
