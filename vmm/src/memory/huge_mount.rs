//! A private tmpfs whose files are made of 2 MiB pages.
//!
//! Most hosts give memfds 4 KiB pages only (`shmem_enabled` is `never`), and that is the
//! administrator's to change. A tmpfs of one's own is not: its `huge=` option decides. It is
//! mounted nowhere (fsmount(2) without move_mount(2)), so that no other process sees it, and it
//! ends with its last file.
//!
//! Mounting needs CAP_SYS_ADMIN over the mount namespace. A process without asks a child in a user
//! namespace of its own, which leaves the mount in the descriptor table that the two share.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Mutex;

use ferry_devices::sync::lock;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{Mode, OFlags, openat};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount,
    fsopen,
};

/// The mount, once it was tried. A refusal stays: in a sandbox a second attempt would be a
/// violation.
static MOUNT: Mutex<Option<Result<OwnedFd, i32>>> = Mutex::new(None);

/// Mounts it, if that was not done yet.
pub(super) fn prepare() -> io::Result<()> {
    file(0).map(drop)
}

/// A new, nameless file of `bytes` bytes in it.
pub(super) fn file(bytes: u64) -> io::Result<File> {
    let mut mount = lock(&MOUNT);
    let tried = mount.get_or_insert_with(|| {
        // What a child could not do has no number of its own.
        new_mount().map_err(|e| e.raw_os_error().unwrap_or(libc::EIO))
    });
    let directory = tried
        .as_ref()
        .map_err(|errno| io::Error::from_raw_os_error(*errno))?;
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = openat(directory.as_fd(), c".", flags, Mode::RUSR | Mode::WUSR)?;
    let file = File::from(file);
    file.set_len(bytes)?;
    Ok(file)
}

/// Its root, where it was mounted.
pub(crate) fn root() -> Option<OwnedFd> {
    let mount = lock(&MOUNT);
    mount.as_ref()?.as_ref().ok()?.try_clone().ok()
}

fn new_mount() -> io::Result<OwnedFd> {
    match mount() {
        Ok(mount) => Ok(mount),
        Err(rustix::io::Errno::PERM) => mount_in_user_namespace(),
        Err(error) => Err(error.into()),
    }
}

/// Options of the tmpfs: 2 MiB pages, no limit of its own (the default is half of the host's
/// memory), closed to other users.
const OPTIONS: [(&CStr, &CStr); 3] = [(c"huge", c"always"), (c"size", c"0"), (c"mode", c"0700")];

/// Allocates nothing: called in a forked child, too.
fn mount() -> rustix::io::Result<OwnedFd> {
    let context = fsopen(c"tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in OPTIONS {
        fsconfig_set_string(context.as_fd(), key, value)?;
    }
    fsconfig_create(context.as_fd())?;
    fsmount(
        context.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC,
    )
}

/// As [`mount`], in a child that is privileged in user and mount namespaces of its own.
fn mount_in_user_namespace() -> io::Result<OwnedFd> {
    // The child puts the mount in this one's place.
    let place = eventfd(0, EventfdFlags::CLOEXEC)?;
    let (user, group) = (rustix::process::geteuid(), rustix::process::getegid());
    let maps = [
        format!("{0} {0} 1", user.as_raw()),
        format!("{0} {0} 1", group.as_raw()),
    ];
    let flags = libc::CLONE_NEWUSER | libc::CLONE_NEWNS | libc::CLONE_FILES | libc::SIGCHLD;
    let (none, flags) = (0 as libc::c_long, libc::c_long::from(flags));
    // SAFETY: without CLONE_VM and with a null stack this is a fork: the child has a copy of this
    // thread's stack and of all memory, and no other thread. It calls only `in_child`, which makes
    // system calls, neither allocates nor takes a lock that another thread may have held, and never
    // returns.
    let child = unsafe { libc::syscall(libc::SYS_clone, flags, none, none, none, none) };
    match child {
        0 => in_child(place.as_raw_fd(), &maps),
        -1 => Err(io::Error::last_os_error()),
        pid => {
            let pid = libc::pid_t::try_from(pid).map_err(io::Error::other)?;
            match wait(pid)? {
                0 => Ok(place),
                code => Err(io::Error::from_raw_os_error(code)),
            }
        }
    }
}

/// The child: its exit status is an errno, or zero.
fn in_child(place: RawFd, maps: &[String; 2]) -> ! {
    let result = write(c"/proc/self/setgroups", b"deny")
        .and_then(|()| write(c"/proc/self/uid_map", maps[0].as_bytes()))
        .and_then(|()| write(c"/proc/self/gid_map", maps[1].as_bytes()))
        .and_then(|()| mount())
        .and_then(|mount| {
            // SAFETY: both are open descriptors of the table that is shared with the parent, which
            // waits; the parent owns `place`, whatever is behind it.
            let moved = unsafe { libc::dup3(mount.as_raw_fd(), place, libc::O_CLOEXEC) };
            match moved {
                -1 => Err(rustix::io::Errno::BADF),
                _ => Ok(()),
            }
        });
    let code = result.map_or_else(rustix::io::Errno::raw_os_error, |()| 0);
    // SAFETY: ends the child at once, without anything of the parent's that a normal exit would
    // flush or free.
    unsafe { libc::_exit(code) }
}

fn write(path: &CStr, bytes: &[u8]) -> rustix::io::Result<()> {
    let file = rustix::fs::open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::io::write(&file, bytes).map(drop)
}

/// The exit status of a child.
fn wait(pid: libc::pid_t) -> io::Result<i32> {
    let mut status = 0;
    loop {
        // SAFETY: the kernel writes one int, which `status` is.
        let n = unsafe { libc::waitpid(pid, &mut status, 0) };
        if n == pid {
            break;
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    match libc::WIFEXITED(status) {
        true => Ok(libc::WEXITSTATUS(status)),
        false => Err(io::Error::other("the child that mounts it was killed")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    /// Both ways give the same: files that can be opened again, and that belong to this user.
    #[test]
    fn files_are_nameless_and_ours() {
        for mount in [mount().map_err(io::Error::from), mount_in_user_namespace()] {
            let mount = match mount {
                Ok(mount) => mount,
                Err(error) => {
                    eprintln!("NOT RUN in part: files_are_nameless_and_ours: {error}");
                    continue;
                }
            };
            let flags = OFlags::TMPFILE | OFlags::RDWR;
            let file = File::from(openat(&mount, c".", flags, Mode::RUSR | Mode::WUSR).unwrap());
            drop(mount);
            file.set_len(4 << 20).unwrap();
            let found = file.metadata().unwrap();
            assert_eq!(found.nlink(), 0);
            assert_eq!(found.uid(), rustix::process::geteuid().as_raw());
            let again = File::options()
                .read(true)
                .write(true)
                .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
                .unwrap();
            assert_eq!(again.metadata().unwrap().len(), 4 << 20);
        }
    }
}
