//! Which file is behind a disk, so that another of the same size is not taken for it.
//!
//! Between two hosts nothing tells two files apart: paths differ, and so do inodes of copies that
//! are meant to be the same disk. On one host (the same boot of one kernel) a file is known by its
//! device and inode, whatever its path.

use std::sync::Arc;

use ferry_devices::block::{Disk, FileId};
use serde::{Deserialize, Serialize};

use super::{Backends, DeviceDescription, DeviceError, DiskOptions};

/// The file behind a disk at the source of a migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskBacking {
    /// The kernel's boot, within which `file` means something.
    pub boot: Option<String>,
    /// The file.
    pub file: Option<FileId>,
    /// Its size now, in bytes; larger than the guest's disk when it was grown under the guest.
    pub bytes: u64,
    /// Its path, for people.
    pub path: String,
}

impl DiskBacking {
    fn of(disk: &Disk) -> Option<Self> {
        Some(Self {
            boot: boot(),
            file: disk.file_id().ok(),
            bytes: disk.file_bytes().ok()?,
            path: disk.path().display().to_string(),
        })
    }
}

/// What tells one boot of a kernel from all others.
fn boot() -> Option<String> {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(id.trim().to_owned())
}

/// What is behind each disk of these devices, in order.
pub(in crate::machine) fn backings(
    devices: &mut [DeviceDescription],
) -> impl Iterator<Item = &mut Option<DiskBacking>> {
    devices.iter_mut().filter_map(|device| match device {
        DeviceDescription::Disk { backing, .. } => Some(backing),
        _ => None,
    })
}

/// The devices, without what is behind the disks.
pub(super) fn without(devices: &[DeviceDescription]) -> Vec<DeviceDescription> {
    let mut bare = devices.to_vec();
    backings(&mut bare).for_each(|backing| *backing = None);
    bare
}

/// The devices, with what is behind the disks now.
pub(in crate::machine) fn with(
    devices: &[DeviceDescription],
    disks: &[Arc<Disk>],
) -> Vec<DeviceDescription> {
    let mut told = devices.to_vec();
    let mut disks = disks.iter();
    for backing in backings(&mut told) {
        *backing = disks.next().and_then(|disk| DiskBacking::of(disk));
    }
    told
}

/// Opens the disks that are given here; those of a guest that exists already must be its own.
pub(super) fn open_disks(
    backends: &Backends,
    described: Option<&[DeviceDescription]>,
) -> Result<Vec<Arc<Disk>>, DeviceError> {
    let described = described.unwrap_or_default().iter();
    let mut theirs = described.filter(|d| matches!(d, DeviceDescription::Disk { .. }));
    let open = |options: &DiskOptions| {
        let disk = match &options.open {
            Some(open) => {
                let file = open.duplicate().map_err(DeviceError::Resources)?;
                Disk::given(file.into(), options.read_only)
            }
            None => Disk::open(&options.path, options.read_only),
        };
        let disk = disk.map_err(DeviceError::Disk)?;
        let Some(DeviceDescription::Disk {
            bytes,
            backing: Some(backing),
            ..
        }) = theirs.next()
        else {
            return Ok(Arc::new(disk));
        };
        if !backends.insist {
            check_file(&disk, backing)?;
        }
        // Another size than the source's file has now is another file; it is refused with its size.
        let grown = disk.bytes() == backing.bytes && disk.bytes() > *bytes;
        Ok(Arc::new(if grown {
            disk.with_guest_bytes(*bytes)
        } else {
            disk
        }))
    };
    backends.disks.iter().map(open).collect()
}

fn check_file(disk: &Disk, backing: &DiskBacking) -> Result<(), DeviceError> {
    let (Some(theirs), true) = (
        backing.file,
        backing.boot.is_some() && backing.boot == boot(),
    ) else {
        return Ok(());
    };
    match disk.file_id() {
        Ok(ours) if ours != theirs => Err(DeviceError::OtherFile {
            path: disk.path().display().to_string(),
            guest: backing.path.clone(),
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn image(path: &Path, bytes: u64) -> DiskOptions {
        std::fs::File::create(path).unwrap().set_len(bytes).unwrap();
        DiskOptions {
            path: path.to_owned(),
            read_only: false,
            open: None,
        }
    }

    fn guest(disks: &[DiskOptions]) -> Vec<DeviceDescription> {
        let opened: Vec<_> = disks
            .iter()
            .map(|d| Arc::new(Disk::open(&d.path, false).unwrap()))
            .collect();
        let bare: Vec<_> = opened
            .iter()
            .map(|d| DeviceDescription::Disk {
                bytes: d.bytes(),
                read_only: false,
                backing: None,
            })
            .collect();
        with(&bare, &opened)
    }

    fn backends(disks: Vec<DiskOptions>) -> Backends {
        Backends {
            disks,
            ..Backends::default()
        }
    }

    #[test]
    fn swapped_and_other_files_are_refused_on_one_host() {
        let dir = tempfile::tempdir().unwrap();
        let disks: Vec<_> = ["a", "b", "c"]
            .iter()
            .map(|name| image(&dir.path().join(name), 4096))
            .collect();
        let guest = guest(&disks[..2]);
        let open = |disks: &[DiskOptions]| open_disks(&backends(disks.to_vec()), Some(&guest));
        open(&disks[..2]).unwrap();
        let swapped = [disks[1].clone(), disks[0].clone()];
        let error = open(&swapped).unwrap_err().to_string();
        assert!(error.contains("not the file"), "{error}");
        assert!(open(&disks[1..]).is_err());
        let insisting = Backends {
            insist: true,
            ..backends(swapped.to_vec())
        };
        open_disks(&insisting, Some(&guest)).unwrap();
        // Another path to the same file.
        let link = dir.path().join("link");
        std::fs::hard_link(&disks[0].path, &link).unwrap();
        let linked = DiskOptions {
            path: link,
            read_only: false,
            open: None,
        };
        open(&[linked, disks[1].clone()]).unwrap();
    }

    #[test]
    fn a_file_of_another_boot_is_not_compared() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (
            image(&dir.path().join("a"), 4096),
            image(&dir.path().join("b"), 4096),
        );
        let mut guest = guest(&[a]);
        if let DeviceDescription::Disk {
            backing: Some(backing),
            ..
        } = &mut guest[0]
        {
            backing.boot = Some("another".into());
        }
        open_disks(&backends(vec![b]), Some(&guest)).unwrap();
    }

    #[test]
    fn a_disk_that_has_grown_keeps_the_guest_s_size() {
        let dir = tempfile::tempdir().unwrap();
        let disk = image(&dir.path().join("a"), 4096);
        let opened = vec![Arc::new(Disk::open(&disk.path, false).unwrap())];
        let bare = guest(std::slice::from_ref(&disk));
        image(&disk.path, 8192);
        let guest = with(&bare, &opened);
        let here = open_disks(&backends(vec![disk]), Some(&guest)).unwrap();
        assert_eq!(here[0].bytes(), 4096);
        // A larger file than the source has is another.
        let other = image(&dir.path().join("b"), 16384);
        let insisting = Backends {
            insist: true,
            ..backends(vec![other])
        };
        assert_eq!(
            open_disks(&insisting, Some(&guest)).unwrap()[0].bytes(),
            16384
        );
    }
}
