//! `--disk`, `--net` and `--memory-backing`: what is behind a guest's devices and memory on this
//! host.

use std::path::PathBuf;
use std::str::FromStr;

use ferry_vmm::machine::{Backends, DiskOptions, NetOptions};
use ferry_vmm::memory::{Backing, MemoryOptions};

/// For `ferry run` and `ferry receive` alike.
#[derive(Debug, clap::Args)]
// Both commands have a group of this name already.
#[group(skip)]
pub struct Args {
    /// A disk: a raw image or a block device; `,ro` if the guest may only read it. May be given
    /// more than once.
    #[arg(long, value_name = "PATH[,ro]", help_heading = "Machine")]
    disk: Vec<Disk>,
    /// A network card: an existing tap device, and the card's address if it matters. May be given
    /// more than once.
    #[arg(long, value_name = "tap=NAME[,mac=MAC]", help_heading = "Machine")]
    net: Vec<Net>,
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
    /// As the machine wants them.
    pub fn backends(&self) -> Backends {
        let memory = MemoryOptions {
            backing: self.memory_backing,
            prealloc: self.memory_prealloc,
        };
        Backends {
            memory,
            disks: self.disk.iter().map(|disk| disk.0.clone()).collect(),
            nets: self.net.iter().map(|net| net.0.clone()).collect(),
            ..Backends::default()
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Disk(DiskOptions);

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
        Ok(Self(DiskOptions {
            path: PathBuf::from(path),
            read_only,
        }))
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Net(NetOptions);

impl FromStr for Net {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let usage =
            || "a network card is tap=NAME or tap=NAME,mac=MAC, such as tap=tap0".to_owned();
        let (mut tap, mut mac) = (None, None);
        for part in text.split(',') {
            match part.split_once('=') {
                Some(("tap", name)) if tap.is_none() && !name.is_empty() => {
                    tap = Some(name.to_owned());
                }
                Some(("mac", address)) if mac.is_none() => {
                    mac = Some(address.parse().map_err(|e| format!("{e}"))?);
                }
                _ => return Err(usage()),
            }
        }
        let tap = tap.ok_or_else(usage)?;
        Ok(Self(NetOptions { tap, mac }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_and_nonsense_is_not() {
        let disk = |text: &str| text.parse::<Disk>().map(|d| (d.0.path, d.0.read_only));
        assert_eq!(disk("a,b.img"), Ok(("a,b.img".into(), false)));
        assert_eq!(disk("a.img,ro"), Ok(("a.img".into(), true)));
        assert!(disk("").is_err() && disk(",ro").is_err());
        let net = |text: &str| text.parse::<Net>().map(|n| (n.0.tap, n.0.mac));
        let mac = "52:54:00:12:34:56".parse().unwrap();
        assert_eq!(net("tap=t0"), Ok(("t0".into(), None)));
        assert_eq!(
            net("mac=52:54:00:12:34:56,tap=t0"),
            Ok(("t0".into(), Some(mac)))
        );
        for bad in [
            "",
            "t0",
            "tap=",
            "tap=a,tap=b",
            "mac=52:54:00:12:34:56",
            "tap=a,mac=1",
            "tap=a,mtu=9",
        ] {
            assert!(net(bad).is_err(), "{bad}");
        }
    }
}
