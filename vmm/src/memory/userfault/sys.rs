//! The kernel's interface (`linux/userfaultfd.h`), as far as missing pages of shared memory need
//! it.

use std::fs::File;
use std::io;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::raw::{c_int, c_uint, c_ulong};

use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iowr_nr};

use super::{UserfaultBy, UserfaultError};

const UFFDIO: c_uint = 0xaa;

ioctl_io_nr!(USERFAULTFD_IOC_NEW, UFFDIO, 0x00);
ioctl_iowr_nr!(UFFDIO_API, UFFDIO, 0x3f, uffdio_api);
ioctl_iowr_nr!(UFFDIO_REGISTER, UFFDIO, 0x00, uffdio_register);
// These two carry data into the kernel; their direction is a slip of the first version that stays.
ioctl_ior_nr!(UFFDIO_UNREGISTER, UFFDIO, 0x01, uffdio_range);
ioctl_ior_nr!(UFFDIO_WAKE, UFFDIO, 0x02, uffdio_range);
ioctl_iowr_nr!(UFFDIO_COPY, UFFDIO, 0x03, uffdio_copy);
ioctl_iowr_nr!(UFFDIO_ZEROPAGE, UFFDIO, 0x04, uffdio_zeropage);
ioctl_iowr_nr!(UFFDIO_CONTINUE, UFFDIO, 0x07, uffdio_continue);

/// `_UFFDIO_WAKE`, `_UFFDIO_COPY` and `_UFFDIO_ZEROPAGE`, as bits of `uffdio_register.ioctls`.
const RANGE_IOCTLS: u64 = 1 << 0x02 | 1 << 0x03 | 1 << 0x04;

/// `_UFFDIO_CONTINUE`, for ranges that are registered for minor faults as well.
const MINOR_IOCTL: u64 = 1 << 0x07;

const UFFD_API: u64 = 0xaa;
const UFFD_FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const UFFD_FEATURE_THREAD_ID: u64 = 1 << 8;
/// Since Linux 5.14.
const UFFD_FEATURE_MINOR_SHMEM: u64 = 1 << 10;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1 << 0;
const UFFDIO_REGISTER_MODE_MINOR: u64 = 1 << 2;
const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
const UFFD_PAGEFAULT_FLAG_WRITE: u64 = 1 << 0;

const FEATURES: [(u64, &str); 2] = [
    (UFFD_FEATURE_MISSING_SHMEM, "UFFD_FEATURE_MISSING_SHMEM"),
    (UFFD_FEATURE_THREAD_ID, "UFFD_FEATURE_THREAD_ID"),
];

#[allow(non_camel_case_types)]
#[repr(C)]
#[derive(Debug, Default)]
struct uffdio_api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[allow(non_camel_case_types)]
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct uffdio_range {
    start: u64,
    len: u64,
}

#[allow(non_camel_case_types)]
#[repr(C)]
#[derive(Debug, Default)]
struct uffdio_register {
    range: uffdio_range,
    mode: u64,
    ioctls: u64,
}

#[allow(non_camel_case_types)]
#[repr(C)]
#[derive(Debug, Default)]
struct uffdio_copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

#[allow(non_camel_case_types)]
#[repr(C)]
#[derive(Debug, Default)]
struct uffdio_zeropage {
    range: uffdio_range,
    mode: u64,
    zeropage: i64,
}

#[allow(non_camel_case_types)]
#[repr(C)]
#[derive(Debug, Default)]
struct uffdio_continue {
    range: uffdio_range,
    mode: u64,
    mapped: i64,
}

/// `uffd_msg` as a page fault fills it. The kernel's is packed; here every field is aligned by
/// itself.
#[allow(non_camel_case_types)]
#[repr(C)]
#[derive(Debug, Default)]
struct uffd_msg {
    event: u8,
    reserved1: u8,
    reserved2: u16,
    reserved3: u32,
    flags: u64,
    address: u64,
    ptid: u32,
    rest: u32,
}

const _: () = {
    assert!(size_of::<uffdio_api>() == 24);
    assert!(offset_of!(uffdio_api, features) == 8);
    assert!(offset_of!(uffdio_api, ioctls) == 16);
    assert!(size_of::<uffdio_range>() == 16);
    assert!(offset_of!(uffdio_range, len) == 8);
    assert!(size_of::<uffdio_register>() == 32);
    assert!(offset_of!(uffdio_register, mode) == 16);
    assert!(offset_of!(uffdio_register, ioctls) == 24);
    assert!(size_of::<uffdio_copy>() == 40);
    assert!(offset_of!(uffdio_copy, src) == 8);
    assert!(offset_of!(uffdio_copy, len) == 16);
    assert!(offset_of!(uffdio_copy, mode) == 24);
    assert!(offset_of!(uffdio_copy, copy) == 32);
    assert!(size_of::<uffdio_zeropage>() == 32);
    assert!(offset_of!(uffdio_zeropage, mode) == 16);
    assert!(offset_of!(uffdio_zeropage, zeropage) == 24);
    assert!(size_of::<uffdio_continue>() == 32);
    assert!(offset_of!(uffdio_continue, mode) == 16);
    assert!(offset_of!(uffdio_continue, mapped) == 24);
    assert!(size_of::<uffd_msg>() == 32);
    assert!(offset_of!(uffd_msg, flags) == 8);
    assert!(offset_of!(uffd_msg, address) == 16);
    assert!(offset_of!(uffd_msg, ptid) == 24);
};

/// A page fault as the kernel reports it.
pub(super) struct Message {
    /// Start of the page.
    pub(super) address: u64,
    /// The thread that touched it, 0 for none of this PID namespace.
    pub(super) thread: u32,
    pub(super) write: bool,
}

/// The features that are needed, as bits.
fn needed() -> u64 {
    FEATURES.iter().fold(0, |bits, (bit, _)| bits | bit)
}

/// A userfaultfd whose features are agreed on.
pub(super) fn open() -> Result<(OwnedFd, UserfaultBy), UserfaultError> {
    let (fd, by) = new_fd()?;
    match agree(&fd, needed()) {
        Ok(_) => Ok((fd, by)),
        Err(source) if source.raw_os_error() == Some(libc::EINVAL) => {
            // It refuses what it does not have, and does not say which; a fresh one tells what
            // there is.
            let has = new_fd().ok().and_then(|(fd, _)| agree(&fd, 0).ok());
            let missing = FEATURES
                .iter()
                .find(|(bit, _)| has.unwrap_or(0) & bit == 0)
                .map_or("UFFD_API", |(_, name)| *name);
            Err(UserfaultError::Unsupported { missing })
        }
        Err(source) => Err(UserfaultError::Open { source }),
    }
}

/// One that knows minor faults as well, where this kernel has those.
pub(super) fn open_minor() -> Option<OwnedFd> {
    let (fd, _) = new_fd().ok()?;
    agree(&fd, needed() | UFFD_FEATURE_MINOR_SHMEM)
        .is_ok()
        .then_some(fd)
}

fn new_fd() -> Result<(OwnedFd, UserfaultBy), UserfaultError> {
    // Never UFFD_USER_MODE_ONLY: KVM and system calls touch guest memory in kernel mode.
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    if let Ok(device) = File::options()
        .read(true)
        .write(true)
        .open("/dev/userfaultfd")
    {
        let flags = c_ulong::try_from(flags).unwrap_or(0);
        // SAFETY: this ioctl takes flags by value and touches no memory of ours.
        let fd = unsafe { ioctl_with_val(&device, USERFAULTFD_IOC_NEW(), flags) };
        if fd >= 0 {
            // SAFETY: the kernel has just made this descriptor for this call; it has no other
            // owner.
            return Ok((unsafe { OwnedFd::from_raw_fd(fd) }, UserfaultBy::Device));
        }
    }
    // SAFETY: this system call takes flags by value and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::c_long::from(flags)) };
    match c_int::try_from(fd) {
        Ok(fd) if fd >= 0 => {
            // SAFETY: as above.
            Ok((unsafe { OwnedFd::from_raw_fd(fd) }, UserfaultBy::Syscall))
        }
        _ => Err(UserfaultError::open(io::Error::last_os_error())),
    }
}

/// The handshake, possible once; returns the features of this kernel.
fn agree(fd: &OwnedFd, features: u64) -> io::Result<u64> {
    let mut api = uffdio_api {
        api: UFFD_API,
        features,
        ioctls: 0,
    };
    // SAFETY: the ioctl reads and writes one uffdio_api, whose layout is asserted above.
    done(unsafe { ioctl_with_mut_ref(fd, UFFDIO_API(), &mut api) })?;
    Ok(api.features)
}

/// Pages that are reported, and what must be possible with them.
pub(super) struct Which {
    mode: u64,
    ioctls: u64,
}

/// Absent pages: the memory file has none there.
pub(super) const MISSING: Which = Which {
    mode: UFFDIO_REGISTER_MODE_MISSING,
    ioctls: RANGE_IOCTLS,
};

/// Pages as well that the memory file has and that are not mapped.
pub(super) const MISSING_OR_UNMAPPED: Which = Which {
    mode: UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR,
    ioctls: RANGE_IOCTLS | MINOR_IOCTL,
};

/// Has such pages of `len` bytes at `start` reported; whether they can then be filled.
pub(super) fn register(fd: &OwnedFd, start: u64, len: u64, which: Which) -> io::Result<bool> {
    let mut register = uffdio_register {
        range: uffdio_range { start, len },
        mode: which.mode,
        ioctls: 0,
    };
    // SAFETY: the ioctl reads and writes one uffdio_register, whose layout is asserted above. It
    // changes no byte of the range, only who is asked when a page of it is touched.
    done(unsafe { ioctl_with_mut_ref(fd, UFFDIO_REGISTER(), &mut register) })?;
    Ok(register.ioctls & which.ioctls == which.ioctls)
}

/// Ends the reports of a range; who waits for a page of it goes on.
pub(super) fn unregister(fd: &OwnedFd, start: u64, len: u64) -> io::Result<()> {
    let range = uffdio_range { start, len };
    // SAFETY: the ioctl reads one uffdio_range, whose layout is asserted above, and changes no byte
    // there.
    done(unsafe { ioctl_with_ref(fd, UFFDIO_UNREGISTER(), &range) })
}

/// Wakes threads that wait for a page of a range, so that they look again.
pub(super) fn wake(fd: &OwnedFd, start: u64, len: u64) -> io::Result<()> {
    let range = uffdio_range { start, len };
    // SAFETY: the ioctl reads one uffdio_range, whose layout is asserted above, and changes no byte
    // there.
    done(unsafe { ioctl_with_ref(fd, UFFDIO_WAKE(), &range) })
}

/// Places `bytes`, whole pages, from `dst` on; returns how many bytes until something was in the
/// way.
pub(super) fn copy(fd: &OwnedFd, dst: u64, bytes: &[u8]) -> io::Result<u64> {
    let mut copy = uffdio_copy {
        dst,
        src: bytes.as_ptr() as u64,
        len: bytes.len() as u64,
        mode: 0,
        copy: 0,
    };
    // SAFETY: the ioctl reads and writes one uffdio_copy, whose layout is asserted above, and reads
    // `bytes`, which is borrowed for as long. It only writes to absent pages of ranges that are
    // registered with this descriptor: guest memory, to which Rust holds no references.
    let status = unsafe { ioctl_with_mut_ref(fd, UFFDIO_COPY(), &mut copy) };
    filled(status, copy.copy, copy.len)
}

/// Places zeros, as [`copy`] does bytes.
pub(super) fn zeropage(fd: &OwnedFd, start: u64, len: u64) -> io::Result<u64> {
    let mut zero = uffdio_zeropage {
        range: uffdio_range { start, len },
        mode: 0,
        zeropage: 0,
    };
    // SAFETY: the ioctl reads and writes one uffdio_zeropage, whose layout is asserted above; for
    // what it fills see `copy`.
    let status = unsafe { ioctl_with_mut_ref(fd, UFFDIO_ZEROPAGE(), &mut zero) };
    filled(status, zero.zeropage, len)
}

/// Maps pages that the memory file has, and wakes who waits for them; returns how many bytes until
/// something was in the way: EEXIST where a page is mapped, EFAULT where the file has none.
pub(super) fn map_filled(fd: &OwnedFd, start: u64, len: u64) -> io::Result<u64> {
    let mut filled_range = uffdio_continue {
        range: uffdio_range { start, len },
        mode: 0,
        mapped: 0,
    };
    // SAFETY: the ioctl reads and writes one uffdio_continue, whose layout is asserted above, and
    // changes no contents.
    let status = unsafe { ioctl_with_mut_ref(fd, UFFDIO_CONTINUE(), &mut filled_range) };
    filled(status, filled_range.mapped, len)
}

/// The next report; `None` when there is none now.
pub(super) fn read(fd: &OwnedFd) -> io::Result<Option<Message>> {
    let mut message = uffd_msg::default();
    let size = size_of::<uffd_msg>();
    // SAFETY: the buffer is a uffd_msg of `size` bytes that is valid for every bit pattern.
    let n = unsafe { libc::read(fd.as_raw_fd(), (&raw mut message).cast(), size) };
    if n < 0 {
        let error = io::Error::last_os_error();
        return match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
            _ => Err(error),
        };
    }
    if usize::try_from(n) != Ok(size) || message.event != UFFD_EVENT_PAGEFAULT {
        // No other event was asked for, and a read gives whole messages.
        return Err(io::Error::other(format!(
            "a userfaultfd reported event {:#x} in {n} bytes instead of a page fault: this kernel does not keep to its interface",
            message.event
        )));
    }
    Ok(Some(Message {
        address: message.address,
        thread: message.ptid,
        write: message.flags & UFFD_PAGEFAULT_FLAG_WRITE != 0,
    }))
}

fn done(status: c_int) -> io::Result<()> {
    if status < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// What an ioctl that fills pages did: `reported` is the number of bytes it filled, or what kept it
/// from the first page, or untouched when it never began.
fn filled(status: c_int, reported: i64, len: u64) -> io::Result<u64> {
    if status >= 0 {
        return Ok(len);
    }
    let error = io::Error::last_os_error();
    match u64::try_from(reported) {
        Ok(0) => Err(error),
        Ok(bytes) => Ok(bytes.min(len)),
        Err(_) => Err(i32::try_from(-reported).map_or(error, io::Error::from_raw_os_error)),
    }
}
