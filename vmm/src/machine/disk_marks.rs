//! Whether the guest's disks were written since its state was saved.
//!
//! Memory of that state over newer disks destroys their file systems. The disks may be shared with
//! another host, where no lock tells, so each is known again by its file's size and times. Of a
//! block device these tell nothing.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use ferry_devices::block::Disk;
use ferry_devices::sync::lock;

/// By what a file is known again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileMark {
    bytes: u64,
    /// Seconds and nanoseconds. A write changes both times; the second cannot be set back.
    modified: (i64, i64),
    changed: (i64, i64),
}

impl FileMark {
    /// `None` for a block device.
    fn of(path: &Path) -> io::Result<Option<Self>> {
        // Opened, and not only looked at: NFS asks its server then. What was passed on open may not
        // be this user's to open.
        let opened = File::open(path).and_then(|file| file.metadata());
        let metadata = opened.or_else(|_| std::fs::metadata(path))?;
        Ok(metadata.is_file().then(|| Self {
            bytes: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }))
    }
}

/// The disks that the guest writes to, as they were when its state was saved.
#[derive(Debug, Default)]
pub(super) struct DiskMarks(Mutex<Vec<(PathBuf, Option<FileMark>)>>);

impl DiskMarks {
    /// Notes the disks as they are now. The guest is paused, and all that it wrote was handed to
    /// the file.
    pub(super) fn note(&self, disks: &[Arc<Disk>]) {
        let mark = |disk: &Arc<Disk>| {
            let path = disk.path().to_owned();
            let mark = FileMark::of(&path).unwrap_or_else(|error| {
                tracing::warn!(path = %path.display(), %error, "a later take-over cannot tell whether this disk was written");
                None
            });
            (path, mark)
        };
        let marks = disks.iter().filter(|disk| !disk.read_only()).map(mark);
        *lock(&self.0) = marks.collect();
    }

    /// Compares them with what they are now.
    ///
    /// # Errors
    /// A disk was written, or nothing tells; a sentence.
    pub(super) fn check(&self) -> Result<(), String> {
        let marks = lock(&self.0);
        for (path, then) in marks.iter() {
            let now = FileMark::of(path)
                .map_err(|e| format!("the guest's disk {} cannot be read: {e}", path.display()))?;
            match (then, now) {
                (Some(then), Some(now)) if *then == now => {}
                (Some(_), Some(_)) => {
                    return Err(format!(
                        "the disk {} was written after the guest's state was saved: the guest has run on the other side, and \
                         its old memory would destroy the disk; --force insists",
                        path.display()
                    ));
                }
                _ => {
                    return Err(format!(
                        "nothing tells whether the block device {} was written after the guest's state was saved; make \
                         sure that the guest never ran on the other side, and say --force",
                        path.display()
                    ));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_was_written_is_known() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, [0; 4096]).unwrap();
        let disk = Arc::new(Disk::open(&path, false).unwrap());
        let marks = DiskMarks::default();
        marks.note(&[Arc::clone(&disk)]);
        assert_eq!(marks.check(), Ok(()));
        // The coarsest clock of a file system of Linux ticks every 10 ms.
        std::thread::sleep(std::time::Duration::from_millis(30));
        disk.copy_in(512, &[7; 512]).unwrap();
        let error = marks.check().unwrap_err();
        assert!(error.contains("was written"), "{error}");
        assert!(error.contains("--force"), "{error}");
        marks.note(&[disk]);
        assert_eq!(marks.check(), Ok(()));
    }

    #[test]
    fn a_disk_that_only_reads_is_not_looked_at() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, [0; 4096]).unwrap();
        let marks = DiskMarks::default();
        marks.note(&[Arc::new(Disk::open(&path, true).unwrap())]);
        std::fs::write(&path, [1; 8192]).unwrap();
        assert_eq!(marks.check(), Ok(()));
    }
}
