//! A tap device: the host's end of a guest's network card (`Documentation/networking/tuntap.rst`).

#![deny(unsafe_code)]

mod ioctl;

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use ferry_devices::net::{Backend, HEADER, Offloads};
use rustix::fs::{FileType, OFlags, fcntl_getfl, fcntl_setfl, fstat, major, minor};
use rustix::net::netdevice::name_to_index;

/// How taps are opened here: with a header before each frame, and nothing else.
const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
/// Where the kernel makes tap devices.
const DEVICE: &str = "/dev/net/tun";

/// Why a tap device cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
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
    /// Another process has it.
    #[error(
        "the tap device {name} is in use by another process, perhaps another virtual machine: give each its own"
    )]
    Busy {
        /// Its name.
        name: String,
    },
    /// Something else came in a tap's place.
    #[error(
        "the source has sent something else than the tap device behind the guest's network card: {0}; give the card another \
         tap here, with --net"
    )]
    Foreign(&'static str),
    /// What came cannot be asked what it is.
    #[error(
        "what the source has sent as the tap device behind the guest's network card cannot be examined: {0}; give the card \
         another tap here, with --net"
    )]
    Examine(#[source] io::Error),
    /// What was passed open is no tap as it is needed.
    #[error(
        "descriptor {number} cannot be behind a network card: {why}; open /dev/net/tun and attach it with IFF_TAP, IFF_NO_PI \
         and IFF_VNET_HDR"
    )]
    Given {
        /// The descriptor.
        number: i32,
        /// What is wrong with it.
        why: String,
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

/// Whether this process's network namespace has an interface of that name. /sys shows that of the
/// process that mounted it.
fn exists(name: &str) -> bool {
    let socket = rustix::net::socket(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::DGRAM,
        None,
    );
    // Where that cannot be asked, the attaching decides.
    socket.map_or(true, |socket| {
        !matches!(name_to_index(&socket, name), Err(rustix::io::Errno::NODEV))
    })
}

/// A tap device that was made by others. Closing it leaves the device there.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
    /// Another process may still use it: what it has set stays until this one does. Then these are
    /// set, if any are wanted.
    lent: Option<Option<Offloads>>,
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
        // With CAP_NET_ADMIN, TUNSETIFF would make one, and its traffic would go nowhere.
        if !exists(name) {
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
        let tap = Self {
            file,
            name: name.to_owned(),
            lent: None,
        };
        match ioctl::attach(&tap.file, name, FLAGS) {
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
        ioctl::set_header_size(&tap.file, HEADER).map_err(refused(
            "setting the size of its headers",
            "the kernel is too old",
        ))?;
        tap.offload(Offloads::default()).map_err(refused(
            "switching its offloads off",
            "the kernel is too old",
        ))?;
        Ok(tap)
    }

    /// Takes a tap device that was opened, and attached to its interface, for this process.
    ///
    /// # Errors
    /// [`TapError::Given`].
    pub fn given(file: OwnedFd, number: i32) -> Result<Self, TapError> {
        let refused = |why: String| TapError::Given { number, why };
        let mut tap = Self {
            file: file.into(),
            name: String::new(),
            lent: None,
        };
        let (name, flags) = ioctl::interface(&tap.file)
            .map_err(|e| refused(format!("it is attached to no interface ({e})")))?;
        if flags & FLAGS != FLAGS || flags & libc::IFF_TUN != 0 {
            return Err(refused(
                "it is a tunnel, or a tap without headers for offloads".into(),
            ));
        }
        tap.name = name;
        let prepared = ioctl::set_header_size(&tap.file, HEADER)
            .and_then(|()| tap.offload(Offloads::default()))
            // A frame that is not there must not stop the card's worker.
            .and_then(|()| {
                Ok(fcntl_setfl(
                    &tap.file,
                    fcntl_getfl(&tap.file)? | OFlags::NONBLOCK,
                )?)
            });
        prepared.map_err(|e| refused(format!("it cannot be set up ({e})")))?;
        Ok(tap)
    }

    /// Takes a tap device that another process has opened as [`open`](Self::open) does, and still
    /// may use: nothing is changed of it before the first frame goes through here. Nothing of it is
    /// believed.
    ///
    /// # Errors
    /// [`TapError::Foreign`], [`TapError::Examine`].
    pub fn adopt(file: OwnedFd) -> Result<Self, TapError> {
        // The device number that the kernel has for /dev/net/tun
        // (Documentation/admin-guide/devices.txt): other drivers may take our questions for
        // something else.
        const TUN_DEVICE: (u32, u32) = (10, 200);
        let examine = |e: rustix::io::Errno| TapError::Examine(e.into());
        let status = fstat(&file).map_err(examine)?;
        let device = (major(status.st_rdev), minor(status.st_rdev));
        if FileType::from_raw_mode(status.st_mode) != FileType::CharacterDevice
            || device != TUN_DEVICE
        {
            return Err(TapError::Foreign("it is no tap device at all"));
        }
        let mut tap = Self {
            file: file.into(),
            name: String::new(),
            lent: Some(None),
        };
        let (name, flags) = ioctl::interface(&tap.file).map_err(TapError::Examine)?;
        if flags & FLAGS != FLAGS || flags & libc::IFF_TUN != 0 {
            return Err(TapError::Foreign(
                "it is a tunnel, or a tap that was opened in another way",
            ));
        }
        if ioctl::header_size(&tap.file).map_err(TapError::Examine)? != HEADER {
            return Err(TapError::Foreign("its headers have another size"));
        }
        // A frame that is not there must not stop the card's worker.
        let flags = fcntl_getfl(&tap.file).map_err(examine)?;
        fcntl_setfl(&tap.file, flags | OFlags::NONBLOCK).map_err(examine)?;
        tap.name = name;
        Ok(tap)
    }

    /// The name of its interface when it was opened.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// From the first frame on the device is this process's.
    fn own(&mut self) {
        if let Some(Some(offloads)) = self.lent.take()
            && let Err(error) = self.offload(offloads)
        {
            tracing::warn!(%error, tap = self.name, "the offloads of a tap could not be set");
        }
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
        ioctl::set_offloads(&self.file, flags)
    }
}

impl Backend for Tap {
    fn read(&mut self, frame: &mut [u8]) -> io::Result<usize> {
        self.own();
        self.file.read(frame)
    }

    fn write(&mut self, frame: &[u8]) -> io::Result<()> {
        self.own();
        // A tap takes a frame whole or not at all.
        self.file.write(frame).map(drop)
    }

    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        if let Some(wanted) = &mut self.lent {
            *wanted = Some(offloads);
            return Ok(());
        }
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
    use std::path::Path;
    use std::process::Command;
    use std::time::{Duration, Instant};

    /// A tap of this test's, while it lives.
    struct Own(String);

    impl Own {
        /// For a test, which says so if it has none.
        fn make(name: &str, test: &str) -> Option<Self> {
            let own = Self::try_make(name);
            if own.is_none() {
                eprintln!("NOT RUN: {test}: no tap can be made here (root and ip are needed)");
            }
            own
        }

        fn try_make(name: &str) -> Option<Self> {
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
        let Some(own) = Own::make(&name, "frames_go_through_a_tap_both_ways") else {
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
        // With an open descriptor the interface comes up, and the host's IPv6 says hello on it;
        // where it is off, ARP does.
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
    fn a_tap_of_another_process_is_used_as_it_is() {
        let name = format!("ferrya{}", std::process::id());
        let Some(own) = Own::make(&name, "a_tap_of_another_process_is_used_as_it_is") else {
            return;
        };
        let mut first = Tap::open(&name).unwrap();
        let mut second = Tap::adopt(first.readable().unwrap()).unwrap();
        assert_eq!(second.name(), name);
        // Not before it is this one's: the first would have to do the checksums of frames that it
        // was promised none of.
        let wanted = Offloads {
            checksum: true,
            ..Offloads::default()
        };
        second.set_offloads(wanted).unwrap();
        assert_eq!(second.lent, Some(Some(wanted)));
        let frame = rarp(MacAddress([2, 0, 0, 0, 0, 1]));
        for tap in [&mut first, &mut second] {
            let before = own.received();
            tap.write(&frame).unwrap();
            until("the host gets the frame", || own.received() > before);
        }
        assert_eq!(second.lent, None);
        // And it stays while one of them does.
        drop(first);
        assert!(matches!(Tap::open(&name), Err(TapError::Busy { .. })));
        drop(second);
        Tap::open(&name).unwrap();
    }

    #[test]
    fn what_is_no_tap_is_not_adopted() {
        let null = File::open("/dev/null").unwrap();
        let file = File::open("/proc/self/exe").unwrap();
        for file in [null, file] {
            let error = Tap::adopt(file.into()).unwrap_err();
            assert!(matches!(error, TapError::Foreign(_)), "{error}");
            assert!(error.to_string().contains("--net"), "{error}");
        }
        let open = |options: &mut OpenOptions| options.read(true).write(true).open(DEVICE);
        let Ok(loose) = open(&mut OpenOptions::new()) else {
            eprintln!(
                "NOT RUN: what_is_no_tap_is_not_adopted: no /dev/net/tun that can be opened here"
            );
            return;
        };
        // Of the right driver, and no tap.
        let error = Tap::adopt(loose.into()).unwrap_err();
        assert!(matches!(error, TapError::Examine(_)), "{error}");
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
