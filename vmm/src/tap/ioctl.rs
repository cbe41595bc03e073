//! The ioctls of /dev/net/tun (`include/uapi/linux/if_tun.h`).
//!
//! Beside `kvm` and `memory` the only module with `unsafe`: there is no safe wrapper of them that
//! neither needs more than a C compiler nor does more than this. Every file here is one of the tun
//! driver's.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;

use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr};

ioctl_ior_nr!(TUNGETIFF, TUN, 210, libc::c_uint);
ioctl_ior_nr!(TUNGETVNETHDRSZ, TUN, 215, libc::c_int);
ioctl_iow_nr!(TUNSETIFF, TUN, 202, libc::c_int);
ioctl_iow_nr!(TUNSETOFFLOAD, TUN, 208, libc::c_uint);
ioctl_iow_nr!(TUNSETVNETHDRSZ, TUN, 216, libc::c_int);
const TUN: libc::c_uint = 0x54;

/// Attaches the file to the interface `name`, of less than `IFNAMSIZ` bytes.
pub(super) fn attach(file: &File, name: &str, flags: libc::c_int) -> io::Result<()> {
    let mut request = empty_request();
    // The last byte stays zero, however long the name is.
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name[..room].iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).map_err(io::Error::other)?;
    // SAFETY: TUNSETIFF reads an ifreq, whose name ends in a zero, and writes the name back into
    // it; `request` is one and outlives the call.
    check(unsafe { ioctl_with_mut_ref(file, TUNSETIFF(), &mut request) })
}

/// The interface that the file is attached to: its name and flags.
pub(super) fn interface(file: &File) -> io::Result<(String, libc::c_int)> {
    let mut request = empty_request();
    // SAFETY: TUNGETIFF writes an ifreq, whatever its number says; `request` is one and outlives
    // the call.
    check(unsafe { ioctl_with_mut_ref(file, TUNGETIFF(), &mut request) })?;
    let name = request.ifr_name.iter().map(|c| c.to_ne_bytes()[0]);
    let name: Vec<u8> = name.take_while(|byte| *byte != 0).collect();
    // SAFETY: the kernel has filled in the flags; every bit pattern is a value of them.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok((String::from_utf8_lossy(&name).into_owned(), flags.into()))
}

/// Bytes of the header before each frame.
pub(super) fn header_size(file: &File) -> io::Result<usize> {
    let mut size: libc::c_int = 0;
    // SAFETY: TUNGETVNETHDRSZ writes an int, which outlives the call.
    check(unsafe { ioctl_with_mut_ref(file, TUNGETVNETHDRSZ(), &mut size) })?;
    usize::try_from(size).map_err(io::Error::other)
}

pub(super) fn set_header_size(file: &File, bytes: usize) -> io::Result<()> {
    let size = libc::c_int::try_from(bytes).map_err(io::Error::other)?;
    // SAFETY: TUNSETVNETHDRSZ reads an int, which outlives the call.
    check(unsafe { ioctl_with_ref(file, TUNSETVNETHDRSZ(), &size) })
}

/// Sets what may be left to the other side: `TUN_F_…`.
pub(super) fn set_offloads(file: &File, flags: libc::c_uint) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its flags by value.
    check(unsafe { ioctl_with_val(file, TUNSETOFFLOAD(), flags.into()) })
}

fn empty_request() -> libc::ifreq {
    // SAFETY: an ifreq is plain old data, for which all zeros is a value.
    unsafe { std::mem::zeroed() }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
