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
    // SAFETY: the kernel has just given us this descriptor, and nobody else owns it.
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

/// A core dump of the VMM is about the VMM: without this it would hold the guest's whole memory, and
/// its secrets. Advice only, so a refusal is no error.
pub(super) fn exclude_from_core_dumps(base: NonNull<u8>, size: usize) {
    // SAFETY: the caller has just mapped `size` bytes at `base`; the advice changes no byte of them.
    unsafe { libc::madvise(base.as_ptr().cast(), size, libc::MADV_DONTDUMP) };
}

/// Keeps the kernel from filling more than one page at a time. Advice only, so a refusal is no error.
pub(super) fn forbid_transparent_hugepages(base: NonNull<u8>, bytes: u64) {
    let size = usize::try_from(bytes).unwrap_or(0);
    // SAFETY: the caller has mapped `bytes` bytes at `base`; the advice changes no byte of them.
    unsafe { libc::madvise(base.as_ptr().cast(), size, libc::MADV_NOHUGEPAGE) };
}

/// Whether the host has `bytes` of memory to give. A host that does not tell is believed to.
pub(crate) fn check_available(bytes: u64) -> Result<(), RamError> {
    match available_memory() {
        Some(available) if bytes > available => Err(RamError::NotAvailable { bytes, available }),
        _ => Ok(()),
    }
}

/// Bytes that the host can give without swapping, where it tells.
pub(crate) fn available_memory() -> Option<u64> {
    available(&std::fs::read_to_string("/proc/meminfo").ok()?)
}

/// `MemAvailable` in bytes; the file has it in KiB.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read_and_nonsense_is_not() {
        assert_eq!(
            available("MemTotal: 9 kB\nMemAvailable:    3 kB\n"),
            Some(3072)
        );
        assert_eq!(available("MemAvailable: lots"), None);
        assert_eq!(available(""), None);
    }
}
