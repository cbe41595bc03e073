//! The system calls that std does not offer, each as a safe function.

use std::ffi::{CStr, CString, c_char, c_int, c_long, c_uint, c_ulong, c_void};
use std::fs::File;
use std::io;
use std::net::UdpSocket;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::options::Network;

/// From the C library, which std links anyway. Declared here because the crate has no dependencies.
mod c {
    use super::{TimeSpec, c_char, c_int, c_long, c_uint, c_ulong, c_void};
    unsafe extern "C" {
        pub fn mount(
            source: *const c_char,
            target: *const c_char,
            kind: *const c_char,
            flags: c_ulong,
            data: *const c_void,
        ) -> c_int;
        pub fn syscall(number: c_long, ...) -> c_long;
        pub fn ioctl(fd: c_int, request: c_ulong, ...) -> c_int;
        pub fn reboot(what: c_int) -> c_int;
        pub fn sync();
        pub fn clock_settime(clock: c_int, time: *const TimeSpec) -> c_int;
        pub fn socket(family: c_int, kind: c_int, protocol: c_int) -> c_int;
        pub fn bind(fd: c_int, address: *const c_void, len: c_uint) -> c_int;
        pub fn connect(fd: c_int, address: *const c_void, len: c_uint) -> c_int;
        pub fn listen(fd: c_int, backlog: c_int) -> c_int;
        pub fn accept(fd: c_int, address: *mut c_void, len: *mut c_uint) -> c_int;
    }
}

/// x86-64's number of finit_module(2).
const SYS_FINIT_MODULE: c_long = 313;
/// `linux/reboot.h`.
const RB_POWER_OFF: c_int = 0x4321_fedc;
const RB_AUTOBOOT: c_int = 0x0123_4567;

fn checked(result: c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Mounts a file system that needs no device.
pub fn mount(kind: &CStr, target: &CStr) -> io::Result<()> {
    // SAFETY: three strings that end in NUL and live through the call; no data.
    checked(unsafe {
        c::mount(
            kind.as_ptr(),
            target.as_ptr(),
            kind.as_ptr(),
            0,
            std::ptr::null(),
        )
    })
}

/// Loads a kernel module. One that is there already is fine.
pub fn load_module(file: &File) -> io::Result<()> {
    let no_parameters = CString::default();
    // SAFETY: finit_module takes a descriptor, which `file` keeps open, a string that ends in NUL,
    // and flags.
    let result = unsafe {
        c::syscall(
            SYS_FINIT_MODULE,
            file.as_raw_fd(),
            no_parameters.as_ptr(),
            0,
        )
    };
    match io::Error::last_os_error() {
        _ if result == 0 => Ok(()),
        e if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        e => Err(e),
    }
}

/// Writes what is cached to the disks and powers the machine off, or resets it.
pub fn end(reset: bool) -> io::Error {
    // SAFETY: neither call touches this process's memory.
    unsafe {
        c::sync();
        c::reboot(if reset { RB_AUTOBOOT } else { RB_POWER_OFF });
    }
    io::Error::last_os_error()
}

/// `struct timespec`.
#[repr(C)]
pub struct TimeSpec {
    seconds: c_long,
    nanoseconds: c_long,
}

/// Sets CLOCK_REALTIME, to a time since 1970.
pub fn set_clock(time: std::time::Duration) -> io::Result<()> {
    const CLOCK_REALTIME: c_int = 0;
    let time = TimeSpec {
        seconds: c_long::try_from(time.as_secs()).map_err(io::Error::other)?,
        nanoseconds: time.subsec_nanos().into(),
    };
    // SAFETY: clock_settime(2) reads a `struct timespec`, which this is.
    checked(unsafe { c::clock_settime(CLOCK_REALTIME, &raw const time) })
}

/// `struct ifreq` of `linux/if.h`: a name and a union of 24 bytes.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    value: [u8; 24],
}

/// `struct rtentry` of `linux/route.h`.
#[repr(C)]
struct Route {
    pad1: c_ulong,
    destination: [u8; 16],
    gateway: [u8; 16],
    mask: [u8; 16],
    flags: u16,
    pad2: u16,
    pad3: c_ulong,
    pad4: *const c_void,
    metric: u16,
    device: *const c_char,
    mtu: c_ulong,
    window: c_ulong,
    rtt: u16,
}

const SIOCADDRT: c_ulong = 0x890b;
const SIOCSIFFLAGS: c_ulong = 0x8914;
const SIOCSIFADDR: c_ulong = 0x8916;
const SIOCSIFNETMASK: c_ulong = 0x891c;
const SIOCBRADDBR: c_ulong = 0x89a0;
const SIOCBRADDIF: c_ulong = 0x89a2;
const IFF_UP_RUNNING: u16 = 0x41;
const RTF_UP_GATEWAY: u16 = 3;

/// A `struct sockaddr_in` without a port.
fn socket_address(ip: [u8; 4]) -> [u8; 16] {
    let mut bytes = [0; 16];
    // AF_INET
    bytes[0] = 2;
    bytes[4..8].copy_from_slice(&ip);
    bytes
}

impl InterfaceRequest {
    fn new(name: &str, value: &[u8]) -> Self {
        let mut ifreq = Self {
            name: [0; 16],
            value: [0; 24],
        };
        // One byte stays zero: the name ends in NUL.
        for (to, from) in ifreq.name[..15].iter_mut().zip(name.bytes()) {
            *to = from;
        }
        for (to, from) in ifreq.value.iter_mut().zip(value) {
            *to = *from;
        }
        ifreq
    }
}

fn set(socket: &UdpSocket, name: &str, request: c_ulong, value: &[u8]) -> io::Result<()> {
    let ifreq = InterfaceRequest::new(name, value);
    // SAFETY: all requests made here take a `struct ifreq`, which this is, and only read it.
    checked(unsafe { c::ioctl(socket.as_raw_fd(), request, &raw const ifreq) })
}

const TUNSETIFF: c_ulong = 0x4004_54ca;
const TUNSETPERSIST: c_ulong = 0x4004_54cb;
/// IFF_TAP, without packet information, with the header that virtio wants.
const TAP_FLAGS: u16 = 0x0002 | 0x1000 | 0x4000;

/// Makes a tap device that stays (Linux `Documentation/networking/tuntap.rst`).
pub fn make_tap(name: &str) -> io::Result<()> {
    let device = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    let mut ifreq = InterfaceRequest::new(name, &TAP_FLAGS.to_le_bytes());
    // SAFETY: TUNSETIFF takes a `struct ifreq`, which this is; the name that it may write back
    // fits.
    checked(unsafe { c::ioctl(device.as_raw_fd(), TUNSETIFF, &raw mut ifreq) })?;
    // SAFETY: TUNSETPERSIST takes a number.
    checked(unsafe { c::ioctl(device.as_raw_fd(), TUNSETPERSIST, c_ulong::from(1u8)) })
}

/// Any socket of the family does for asking about interfaces; this one has no more than a free port
/// of this machine.
fn for_requests() -> io::Result<UdpSocket> {
    UdpSocket::bind("0.0.0.0:0")
}

/// Makes a bridge (Linux `net/bridge/br_ioctl.c`).
pub fn make_bridge(name: &str) -> io::Result<()> {
    let socket = for_requests()?;
    let ifreq = InterfaceRequest::new(name, &[]);
    // SAFETY: SIOCBRADDBR copies a name of 16 bytes, as which an `ifreq` begins, and only reads it.
    checked(unsafe { c::ioctl(socket.as_raw_fd(), SIOCBRADDBR, &raw const ifreq) })
}

/// Brings an interface up, without an address, as a port of a bridge.
pub fn join_bridge(bridge: &str, port: &str, index: u32) -> io::Result<()> {
    let socket = for_requests()?;
    set(&socket, port, SIOCSIFADDR, &socket_address([0; 4]))?;
    set(&socket, port, SIOCSIFFLAGS, &IFF_UP_RUNNING.to_le_bytes())?;
    set(&socket, bridge, SIOCBRADDIF, &index.to_le_bytes())
}

/// Gives an interface an address and brings it up.
pub fn configure(network: &Network) -> io::Result<()> {
    let socket = for_requests()?;
    let mask = u32::MAX
        .checked_shl(32 - network.prefix)
        .unwrap_or(0)
        .to_be_bytes();
    set(
        &socket,
        &network.name,
        SIOCSIFADDR,
        &socket_address(network.address),
    )?;
    set(
        &socket,
        &network.name,
        SIOCSIFNETMASK,
        &socket_address(mask),
    )?;
    set(
        &socket,
        &network.name,
        SIOCSIFFLAGS,
        &IFF_UP_RUNNING.to_le_bytes(),
    )?;
    let Some(gateway) = network.gateway else {
        return Ok(());
    };
    let route = Route {
        pad1: 0,
        destination: socket_address([0; 4]),
        gateway: socket_address(gateway),
        mask: socket_address([0; 4]),
        flags: RTF_UP_GATEWAY,
        pad2: 0,
        pad3: 0,
        pad4: std::ptr::null(),
        metric: 0,
        device: std::ptr::null(),
        mtu: 0,
        window: 0,
        rtt: 0,
    };
    // SAFETY: SIOCADDRT takes a `struct rtentry`, which this is, and only reads it.
    checked(unsafe { c::ioctl(socket.as_raw_fd(), SIOCADDRT, &raw const route) })
}

/// AF_VSOCK, and SOCK_STREAM with SOCK_CLOEXEC.
const AF_VSOCK: u16 = 40;
const STREAM: c_int = 0x8_0001;
/// VMADDR_CID_ANY: whichever context this machine has.
const ANY_CID: u32 = u32::MAX;
/// Bytes of a [`VsockAddress`].
const VSOCK_ADDRESS: c_uint = 16;

/// `struct sockaddr_vm` of `linux/vm_sockets.h`.
#[repr(C)]
struct VsockAddress {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    flags: u32,
}

impl VsockAddress {
    const fn new(cid: u32, port: u32) -> Self {
        Self {
            family: AF_VSOCK,
            reserved: 0,
            port,
            cid,
            flags: 0,
        }
    }
}

/// What a call that makes a descriptor has made.
fn owned(fd: c_int) -> io::Result<OwnedFd> {
    checked(fd)?;
    // SAFETY: the call that the callers have just made gave this descriptor to them alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn vsock() -> io::Result<OwnedFd> {
    // SAFETY: socket(2) takes numbers.
    owned(unsafe { c::socket(AF_VSOCK.into(), STREAM, 0) })
}

/// Connects to a port of another context; what can be read and written.
pub fn vsock_connect(cid: u32, port: u32) -> io::Result<File> {
    let socket = vsock()?;
    let address = VsockAddress::new(cid, port);
    let at = (&raw const address).cast();
    // SAFETY: the address is a whole one of its family, and is only read.
    checked(unsafe { c::connect(socket.as_raw_fd(), at, VSOCK_ADDRESS) })?;
    Ok(socket.into())
}

/// A port of this machine's that others connect to.
pub struct VsockListener(OwnedFd);

impl VsockListener {
    pub fn bind(port: u32) -> io::Result<Self> {
        let socket = vsock()?;
        let address = VsockAddress::new(ANY_CID, port);
        let at = (&raw const address).cast();
        // SAFETY: the address is a whole one of its family, and is only read.
        checked(unsafe { c::bind(socket.as_raw_fd(), at, VSOCK_ADDRESS) })?;
        // SAFETY: listen(2) takes numbers.
        checked(unsafe { c::listen(socket.as_raw_fd(), 16) })?;
        Ok(Self(socket))
    }

    /// The next connection; what can be read and written.
    pub fn accept(&self) -> io::Result<File> {
        let (address, len) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: without an address to be filled accept(2) takes a number.
        Ok(owned(unsafe { c::accept(self.0.as_raw_fd(), address, len) })?.into())
    }
}

const TIOCGWINSZ: c_ulong = 0x5413;
const TIOCSWINSZ: c_ulong = 0x5414;

/// `struct winsize`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TerminalSize {
    /// Lines.
    pub rows: u16,
    /// Characters of a line.
    pub columns: u16,
    pixels: [u16; 2],
}

/// How large the terminal is.
pub fn terminal_size(terminal: &File) -> io::Result<TerminalSize> {
    let mut size = TerminalSize::default();
    // SAFETY: TIOCGWINSZ fills a `struct winsize`, which this is.
    checked(unsafe { c::ioctl(terminal.as_raw_fd(), TIOCGWINSZ, &raw mut size) })?;
    Ok(size)
}

/// Says how large the terminal is.
pub fn set_terminal_size(terminal: &File, columns: u16, rows: u16) -> io::Result<()> {
    let size = TerminalSize {
        rows,
        columns,
        ..TerminalSize::default()
    };
    // SAFETY: TIOCSWINSZ takes a `struct winsize`, which this is, and only reads it.
    checked(unsafe { c::ioctl(terminal.as_raw_fd(), TIOCSWINSZ, &raw const size) })
}

/// The time-stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: RDTSC is in every x86-64 processor, and Linux allows it to processes.
    unsafe { core::arch::x86_64::_rdtsc() }
}
