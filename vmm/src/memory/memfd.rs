//! The memory file and its system calls.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::NonNull;

use super::RamError;

/// A sealed memfd of `bytes` bytes.
pub(super) fn create(bytes: u64, hugepages: bool) -> Result<File, RamError> {
    let error = |source| RamError::Memfd { bytes, source };
    let huge = if hugepages {
        libc::MFD_HUGETLB | libc::MFD_HUGE_2MB
    } else {
        0
    };
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | huge;
    // SAFETY: the name is a NUL-terminated string and the call touches no other memory of ours.
    let fd = unsafe { libc::memfd_create(c"ferry-guest-ram".as_ptr(), flags) };
    if fd < 0 {
        return Err(error(io::Error::last_os_error()));
    }
    // SAFETY: the kernel has just made this descriptor for this call; it has no other owner.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(bytes).map_err(error)?;
    // The file may be handed to other processes: none of them may shrink it, since touching a page
    // past its end would kill this process with SIGBUS.
    // SAFETY: F_ADD_SEALS takes an int by value.
    let sealed = unsafe {
        libc::fcntl(
            fd,
            libc::F_ADD_SEALS,
            libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL,
        )
    };
    if sealed < 0 {
        return Err(error(io::Error::last_os_error()));
    }
    Ok(file)
}

/// Gives the file's bytes `offset..offset + len` back to the host; they read as zero afterwards.
pub(super) fn punch(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let invalid = |_| io::Error::from_raw_os_error(libc::EINVAL);
    let offset = libc::off_t::try_from(offset).map_err(invalid)?;
    let len = libc::off_t::try_from(len).map_err(invalid)?;
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: fallocate takes integers only. The bytes it drops are guest memory, which Rust never
    // holds references to.
    if unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A core dump of the VMM is about the VMM: without this it would hold the guest's whole memory,
/// and its secrets. Advice only, so a refusal is no error.
pub(super) fn exclude_from_core_dumps(base: NonNull<u8>, size: usize) {
    // SAFETY: the caller has just mapped `size` bytes at `base`; the advice changes no byte of
    // them.
    unsafe { libc::madvise(base.as_ptr().cast(), size, libc::MADV_DONTDUMP) };
}

/// Keeps the kernel from filling more than one page at a time. Advice only, so a refusal is no
/// error.
pub(super) fn forbid_transparent_hugepages(base: NonNull<u8>, bytes: u64) {
    advise(base, bytes, libc::MADV_NOHUGEPAGE);
}

/// Lets the kernel fill 2 MiB at a time, and look for such a page. Advice only, so a refusal is no
/// error.
pub(super) fn allow_transparent_hugepages(base: NonNull<u8>, bytes: u64) {
    advise(base, bytes, libc::MADV_HUGEPAGE);
}

fn advise(base: NonNull<u8>, bytes: u64, advice: libc::c_int) {
    let size = usize::try_from(bytes).unwrap_or(0);
    // SAFETY: the caller has mapped `bytes` bytes at `base`; neither advice that is given here
    // changes a byte of them.
    unsafe { libc::madvise(base.as_ptr().cast(), size, advice) };
}

/// Takes memory for all pages of a mapping from the host, in pieces that a signal can come between.
pub(super) fn populate(base: NonNull<u8>, bytes: u64) -> io::Result<()> {
    const PIECE: usize = 64 << 20;
    let size = usize::try_from(bytes).map_err(io::Error::other)?;
    let mut done = 0;
    while done < size {
        let piece = PIECE.min(size - done);
        // SAFETY: the caller has mapped `bytes` bytes at `base`, and `done + piece` is within;
        // populating changes no contents.
        let result = unsafe {
            libc::madvise(
                base.add(done).as_ptr().cast(),
                piece,
                libc::MADV_POPULATE_WRITE,
            )
        };
        match result {
            0 => done += piece,
            _ => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
    Ok(())
}
