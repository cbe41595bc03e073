//! `--disk`, `--net`, `--vsock`, `--console` and `--memory-backing`: what is behind a guest's
//! devices and memory on this host.

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;

use super::serial::Serial;
use ferry_terminal::output::Failure;
use ferry_vmm::machine::{Backends, DiskOptions, MacAddress, NetOptions, VsockError, VsockOptions};
use ferry_vmm::memory::{Backing, MemoryOptions};
use ferry_vmm::sandbox::{Descriptor, DescriptorError, Passed};

/// For `ferry run` and `ferry receive` alike.
#[derive(Debug, clap::Args)]
// Both commands have a group of this name already.
#[group(skip)]
pub struct Args {
    /// A disk: a raw image or a block device, by its path or as the open descriptor N; `,ro` if the
    /// guest may only read it. May be given more than once.
    #[arg(long, value_name = "PATH|fd:N[,ro]", help_heading = "Machine")]
    disk: Vec<Disk>,
    /// A network card: an existing tap device, by its name or as the open descriptor N, and the
    /// card's address if it matters. May be given more than once.
    #[arg(long, value_name = "tap=NAME|fd=N[,mac=MAC]", help_heading = "Machine")]
    net: Vec<Net>,
    /// Sockets between guest and host (vsock): programs connect to the Unix socket that is made at
    /// PATH and write `CONNECT PORT`; the guest reaches what listens at PATH_PORT. CID is the
    /// guest's context if it matters, otherwise 3.
    #[arg(long, value_name = "socket=PATH[,cid=CID]", help_heading = "Machine")]
    vsock: Option<Vsock>,
    /// A fast console (virtio-console, Linux' /dev/hvc0) beside the serial port, and where it goes:
    /// stdio, file:PATH, pty (for `ferry console`) or null. A guest that arrives with one keeps it;
    /// without this option its output is dropped.
    #[arg(
        long,
        value_name = "stdio|file:PATH|pty|null",
        help_heading = "Machine"
    )]
    console: Option<Serial>,
    /// What the guest's memory is made of: 2 MiB pages where the host has them (auto, thp), 4k, or
    /// the host's pool of 2 MiB pages (hugetlb).
    #[arg(
        long,
        value_name = "auto|thp|4k|hugetlb",
        default_value = "auto",
        help_heading = "Machine"
    )]
    memory_backing: Backing,
    /// Take all of the guest's memory from the host before the guest runs.
    #[arg(long, help_heading = "Machine")]
    memory_prealloc: bool,
}

impl Args {
    /// Where the console goes, if there is one.
    pub fn console(&self) -> Option<&Serial> {
        self.console.as_ref()
    }

    /// As the machine wants them. Descriptors are taken, and a socket is made: to be called once.
    pub fn backends(&self) -> Result<Backends, Failure> {
        let memory = MemoryOptions {
            backing: self.memory_backing,
            prealloc: self.memory_prealloc,
        };
        let disks: Result<_, _> = self.disk.iter().map(Disk::options).collect();
        let nets: Result<_, _> = self.net.iter().map(Net::options).collect();
        let vsock = self.vsock.as_ref().map(Vsock::options).transpose();
        Ok(Backends {
            memory,
            disks: disks.map_err(|e| Failure(format!("--disk: {e}")))?,
            nets: nets.map_err(|e| Failure(format!("--net: {e}")))?,
            vsock: vsock.map_err(|e| Failure(format!("--vsock: {e}")))?,
            ..Backends::default()
        })
    }
}

/// A path, or a descriptor's number.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    Path(PathBuf),
    Number(RawFd),
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Disk(Place, bool);

impl Disk {
    fn options(&self) -> Result<DiskOptions, DescriptorError> {
        let read_only = self.1;
        Ok(match &self.0 {
            Place::Path(path) => DiskOptions::new(path, read_only),
            Place::Number(number) => {
                DiskOptions::open(Descriptor::disk(*number, read_only)?, read_only)
            }
        })
    }
}

impl FromStr for Disk {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (path, read_only) = match text.strip_suffix(",ro") {
            Some(path) => (path, true),
            None => (text, false),
        };
        if path.is_empty() {
            return Err("a disk is a path, such as disk.img or disk.img,ro".into());
        }
        let place = match path.starts_with("fd:") {
            true => Place::Number(number(path)?),
            false => Place::Path(path.into()),
        };
        Ok(Self(place, read_only))
    }
}

/// Of `fd:N`.
fn number(text: &str) -> Result<RawFd, String> {
    match text.parse()? {
        Passed::Number(number) => Ok(number),
        _ => Err(format!(
            "'{text}' is no descriptor; write fd:N, such as fd:3"
        )),
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Net(Place, Option<MacAddress>);

impl Net {
    fn options(&self) -> Result<NetOptions, DescriptorError> {
        let mut options = match &self.0 {
            Place::Path(name) => NetOptions::new(name.display().to_string()),
            Place::Number(number) => NetOptions::open(Descriptor::tap(*number)?),
        };
        options.mac = self.1;
        Ok(options)
    }
}

impl FromStr for Net {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let usage = || {
            "a network card is tap=NAME or fd=N, and mac=MAC if it matters, such as tap=tap0"
                .to_owned()
        };
        let (mut tap, mut mac) = (None, None);
        for part in text.split(',') {
            match part.split_once('=') {
                Some(("tap", name)) if tap.is_none() && !name.is_empty() => {
                    tap = Some(Place::Path(name.into()));
                }
                Some(("fd", text)) if tap.is_none() => {
                    tap = Some(Place::Number(number(&format!("fd:{text}"))?));
                }
                Some(("mac", address)) if mac.is_none() => {
                    mac = Some(address.parse().map_err(|e| format!("{e}"))?);
                }
                _ => return Err(usage()),
            }
        }
        let tap = tap.ok_or_else(usage)?;
        Ok(Self(tap, mac))
    }
}

/// The file of a vsock's socket, which is removed when this is dropped: by a thread of the VMM, for
/// others may not.
pub struct VsockFile(Option<VsockOptions>);

impl VsockFile {
    pub fn of(backends: &Backends) -> Self {
        Self(backends.vsock.clone())
    }
}

impl Drop for VsockFile {
    fn drop(&mut self) {
        if let Some(vsock) = &self.0 {
            vsock.remove_file();
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Vsock(PathBuf, Option<u32>);

impl Vsock {
    fn options(&self) -> Result<VsockOptions, VsockError> {
        VsockOptions::bind(&self.0, self.1)
    }
}

impl FromStr for Vsock {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let usage = || {
            "a vsock device is socket=PATH, and cid=CID if it matters, such as socket=/run/web.vsock"
                .to_owned()
        };
        let (mut socket, mut cid) = (None, None);
        for part in text.split(',') {
            match part.split_once('=') {
                Some(("socket", path)) if socket.is_none() && !path.is_empty() => {
                    socket = Some(path.into());
                }
                Some(("cid", number)) if cid.is_none() => {
                    cid = Some(number.parse().map_err(|_| usage())?);
                }
                _ => return Err(usage()),
            }
        }
        let socket = socket.ok_or_else(usage)?;
        Ok(Self(socket, cid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_and_nonsense_is_not() {
        let path = |path: &str| Place::Path(path.into());
        let disk = str::parse::<Disk>;
        assert_eq!(disk("a,b.img"), Ok(Disk(path("a,b.img"), false)));
        assert_eq!(disk("a.img,ro"), Ok(Disk(path("a.img"), true)));
        assert_eq!(disk("./fd:3"), Ok(Disk(path("./fd:3"), false)));
        assert_eq!(disk("fd:3,ro"), Ok(Disk(Place::Number(3), true)));
        for bad in ["", ",ro", "fd:", "fd:x", "fd:-1,ro"] {
            assert!(disk(bad).is_err(), "{bad}");
        }
        let net = str::parse::<Net>;
        let mac = "52:54:00:12:34:56".parse().unwrap();
        assert_eq!(net("tap=t0"), Ok(Net(path("t0"), None)));
        assert_eq!(net("fd=7"), Ok(Net(Place::Number(7), None)));
        assert_eq!(
            net("mac=52:54:00:12:34:56,tap=t0"),
            Ok(Net(path("t0"), Some(mac)))
        );
        for bad in [
            "",
            "t0",
            "tap=",
            "tap=a,tap=b",
            "mac=52:54:00:12:34:56",
            "tap=a,mac=1",
            "tap=a,fd=3",
            "fd=x",
            "tap=a,mtu=9",
        ] {
            assert!(net(bad).is_err(), "{bad}");
        }
        let vsock = str::parse::<Vsock>;
        assert_eq!(vsock("socket=/a=b"), Ok(Vsock("/a=b".into(), None)));
        assert_eq!(
            vsock("cid=7,socket=v.sock"),
            Ok(Vsock("v.sock".into(), Some(7)))
        );
        for bad in [
            "",
            "v.sock",
            "socket=",
            "cid=3",
            "socket=a,cid=-1",
            "socket=a,cid=4294967296",
            "socket=a,socket=b",
            "socket=a,port=9",
        ] {
            assert!(vsock(bad).is_err(), "{bad}");
        }
    }
}
