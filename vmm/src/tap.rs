//! A tap device: the host's end of a guest's network card (`Documentation/networking/tuntap.rst`).
//!
//! Beside `kvm` and `memory` the only module with `unsafe`: the ioctls of /dev/net/tun have no safe wrapper that neither
//! needs more than a C compiler nor does more than this.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use ferry_devices::net::{Backend, HEADER, Offloads};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::ioctl_iow_nr;

ioctl_iow_nr!(TUNSETIFF, TUN, 202, libc::c_int);
ioctl_iow_nr!(TUNSETOFFLOAD, TUN, 208, libc::c_uint);
ioctl_iow_nr!(TUNSETVNETHDRSZ, TUN, 216, libc::c_int);
const TUN: libc::c_uint = 0x54;

/// Where the kernel makes tap devices.
const DEVICE: &str = "/dev/net/tun";

/// Why a tap device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// Not a name of a network interface.
    #[error(
        "`{0}` cannot be the name of a tap device: give 1 to 15 letters, digits, `-`, `_` or `.`"
    )]
    Name(String),
    /// There is none.
    #[error(
        "there is no tap device {name}: make it, as root, with `ip tuntap add dev {name} mode tap user $USER` and `ip link set {name} up`"
    )]
    Missing {
        /// Its name.
        name: String,
    },
    /// Somebody has it.
    #[error(
        "the tap device {name} is in use by another process, perhaps another virtual machine: give each its own"
    )]
    Busy {
        /// Its name.
        name: String,
    },
    /// The kernel refuses.
    #[error("the tap device {name} cannot be used: {what}: {source}; {hint}")]
    Refused {
        /// Its name.
        name: String,
        /// What was tried.
        what: &'static str,
        /// Why.
        source: io::Error,
        /// What to do.
        hint: &'static str,
    },
}

/// A tap device that was made by somebody else. Closing it leaves the device there.
#[derive(Debug)]
pub struct Tap {
    file: File,
}

impl Tap {
    /// Opens the tap device `name`, without blocking, with headers of 12 bytes before each frame.
    ///
    /// # Errors
    /// [`TapError`].
    pub fn open(name: &str) -> Result<Self, TapError> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
        if name.is_empty() || name.len() >= libc::IFNAMSIZ || !name.bytes().all(allowed) {
            return Err(TapError::Name(name.to_owned()));
        }
        // TUNSETIFF would make one for whoever may, and its traffic would go nowhere.
        if !Path::new("/sys/class/net").join(name).exists() {
            return Err(TapError::Missing {
                name: name.to_owned(),
            });
        }
        let refused = |what, hint| {
            move |source: io::Error| TapError::Refused {
                name: name.to_owned(),
                what,
                source,
                hint,
            }
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(DEVICE)
            .map_err(refused(
                "opening /dev/net/tun",
                "load the module `tun`, or give this user access",
            ))?;
        let tap = Self { file };
        match tap.attach(name) {
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                return Err(TapError::Busy {
                    name: name.to_owned(),
                });
            }
            other => other.map_err(refused(
                "attaching to it",
                "it must be a tap (not a tun or another interface) of this user, with one queue",
            ))?,
        }
        tap.set_header_size().map_err(refused(
            "setting the size of its headers",
            "the kernel is too old",
        ))?;
        tap.offload(Offloads::default()).map_err(refused(
            "switching its offloads off",
            "the kernel is too old",
        ))?;
        Ok(tap)
    }

    fn attach(&self, name: &str) -> io::Result<()> {
        // SAFETY: an ifreq is plain old data, for which all zeros is a value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = libc::c_char::from_ne_bytes([from]);
        }
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).map_err(io::Error::other)?;
        // SAFETY: TUNSETIFF reads an ifreq, whose name ends in zeros since `open` has checked its length, and writes the
        // name back into it; `request` is one and outlives the call.
        check(unsafe { ioctl_with_mut_ref(&self.file, TUNSETIFF(), &mut request) })
    }

    fn set_header_size(&self) -> io::Result<()> {
        let size = libc::c_int::try_from(HEADER).map_err(io::Error::other)?;
        // SAFETY: TUNSETVNETHDRSZ reads an int, which outlives the call.
        check(unsafe { ioctl_with_ref(&self.file, TUNSETVNETHDRSZ(), &size) })
    }

    fn offload(&self, offloads: Offloads) -> io::Result<()> {
        let wanted = [
            (offloads.checksum, libc::TUN_F_CSUM),
            (offloads.checksum && offloads.tso4, libc::TUN_F_TSO4),
            (offloads.checksum && offloads.tso6, libc::TUN_F_TSO6),
        ];
        let flags = wanted
            .iter()
            .filter(|(on, _)| *on)
            .fold(0, |all, (_, f)| all | f);
        // SAFETY: TUNSETOFFLOAD takes its flags by value.
        check(unsafe { ioctl_with_val(&self.file, TUNSETOFFLOAD(), flags.into()) })
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

impl Backend for Tap {
    fn read(&mut self, frame: &mut [u8]) -> io::Result<usize> {
        self.file.read(frame)
    }

    fn write(&mut self, frame: &[u8]) -> io::Result<()> {
        // A tap takes a frame whole or not at all.
        self.file.write(frame).map(drop)
    }

    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        self.offload(offloads)
    }

    fn readable(&self) -> io::Result<OwnedFd> {
        self.file.as_fd().try_clone_to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_devices::net::{MacAddress, rarp};
    use std::process::Command;
    use std::time::{Duration, Instant};

    /// A tap of this test's, while it lives.
    struct Own(String);

    impl Own {
        fn make(name: &str) -> Option<Self> {
            // Fails for who is not root, or has no `ip`.
            let ip = |args: &[&str]| {
                let done = Command::new("ip").args(args).output();
                done.is_ok_and(|out| out.status.success())
            };
            let own = ip(&["tuntap", "add", "dev", name, "mode", "tap"]);
            let own = own.then(|| Self(name.to_owned()))?;
            ip(&["link", "set", name, "up"]).then_some(own)
        }

        fn received(&self) -> u64 {
            let path = format!("/sys/class/net/{}/statistics/rx_packets", self.0);
            std::fs::read_to_string(path)
                .unwrap()
                .trim()
                .parse()
                .unwrap()
        }
    }

    impl Drop for Own {
        fn drop(&mut self) {
            let _ = Command::new("ip").args(["link", "del", &self.0]).status();
        }
    }

    fn until(what: &str, mut condition: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !condition() {
            assert!(Instant::now() < deadline, "{what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn frames_go_through_a_tap_both_ways() {
        let name = format!("ferry{}", std::process::id());
        let Some(own) = Own::make(&name) else {
            eprintln!(
                "NOT RUN: frames_go_through_a_tap_both_ways: no tap can be made here (root and ip are needed)"
            );
            return;
        };
        let mut tap = Tap::open(&name).unwrap();
        let error = Tap::open(&name).unwrap_err();
        assert!(matches!(error, TapError::Busy { .. }), "{error}");
        for offloads in [
            Offloads {
                checksum: true,
                tso4: true,
                tso6: true,
            },
            Offloads::default(),
        ] {
            tap.set_offloads(offloads).unwrap();
        }
        let before = own.received();
        tap.write(&rarp(MacAddress([2, 0, 0, 0, 0, 1]))).unwrap();
        until("the host gets the frame", || own.received() > before);
        // With somebody there the interface comes up, and the host's IPv6 says hello on it; where it is off, ARP does.
        let _ = Command::new("ip")
            .args(["addr", "add", "192.0.2.1/24", "dev", &name])
            .status();
        let _ =
            std::net::UdpSocket::bind("192.0.2.1:0").and_then(|s| s.send_to(b"x", "192.0.2.2:9"));
        let mut frame = [0; 2000];
        let mut got = 0;
        until("a frame of the host's", || {
            got = tap.read(&mut frame).unwrap_or(0);
            got > HEADER + 14
        });
        let end = tap.read(&mut frame);
        assert!(end.is_ok() || end.is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock));
    }

    #[test]
    fn taps_that_are_not_there_are_refused_with_a_sentence() {
        for name in ["", "a/b", "sixteen-letters-", "has space", "tap\n"] {
            assert!(matches!(Tap::open(name), Err(TapError::Name(_))), "{name}");
        }
        let error = Tap::open("no-such-tap").unwrap_err().to_string();
        assert!(error.contains("ip tuntap add dev no-such-tap"), "{error}");
    }

    #[test]
    fn an_interface_that_is_no_tap_is_refused() {
        if !Path::new("/sys/class/net/lo").exists()
            || OpenOptions::new()
                .read(true)
                .write(true)
                .open(DEVICE)
                .is_err()
        {
            eprintln!(
                "NOT RUN: an_interface_that_is_no_tap_is_refused: no /dev/net/tun that can be opened here"
            );
            return;
        }
        assert!(matches!(Tap::open("lo"), Err(TapError::Refused { .. })));
    }
}
