//! Keeping two VMMs apart.
//!
//! The lock is an OFD lock of the whole file (fcntl(2), as QEMU's): exclusive, or shared when the
//! disk is read-only. It keeps two VMMs apart that see the same lock manager: processes of one
//! host, and hosts that share a file by NFS or a cluster file system with POSIX locks. **It is
//! local to a host for a block device** (iSCSI, Fibre Channel, DRBD, a shared LVM volume): there a
//! cluster manager, or SCSI reservations, must see to it that one host uses the device. A program
//! that does not take the lock (`dd`, `mount`) is not kept out.

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use super::{Disk, DiskError};
use crate::sync::lock;

impl Disk {
    /// Takes the lock, and says whether it was not held before.
    ///
    /// # Errors
    /// [`DiskError::Locked`], or the file system's refusal.
    pub fn lock(&self) -> Result<bool, DiskError> {
        let mut locked = lock(&self.locked);
        if *locked {
            return Ok(false);
        }
        let kind = if self.read_only {
            libc::F_RDLCK
        } else {
            libc::F_WRLCK
        };
        match self.set_lock(kind) {
            Ok(()) => {
                *locked = true;
                Ok(true)
            }
            Err(Errno::EAGAIN | Errno::EACCES) => Err(DiskError::Locked {
                path: self.path.clone(),
            }),
            Err(error) => Err(self.io("locked", error.into())),
        }
    }

    /// Drops the lock, after all that was written has reached the disk: another host may read it
    /// next. No effect when it is not held.
    ///
    /// # Errors
    /// [`DiskError::Io`]; the lock is still held.
    pub fn unlock(&self) -> Result<(), DiskError> {
        let mut locked = lock(&self.locked);
        if !*locked {
            return Ok(());
        }
        self.settle()?;
        self.set_lock(libc::F_UNLCK)
            .map_err(|e| self.io("unlocked", e.into()))?;
        *locked = false;
        Ok(())
    }

    pub(super) fn set_lock(&self, kind: i32) -> nix::Result<()> {
        let lock = libc::flock {
            l_type: libc::c_short::try_from(kind).unwrap_or(0),
            l_whence: libc::c_short::try_from(libc::SEEK_SET).unwrap_or(0),
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        fcntl(&self.file, FcntlArg::F_OFD_SETLK(&lock)).map(drop)
    }
}
