//! `GET /v1/vm`: what the guest's machine is made of.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The answer to `GET /v1/vm`. It has no secret: neither keys nor pairing lines.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Configuration {
    /// Version of this object; grows when a field is added.
    pub schema: u32,
    /// The name that the guest was started with, if any.
    pub name: Option<String>,
    /// Virtual processors.
    pub cpus: u32,
    /// What they look like to the guest.
    pub cpu: Cpu,
    /// Its RAM.
    pub memory: MemoryConfiguration,
    /// What was booted; `null` for a guest that arrived here.
    pub boot: Option<Boot>,
    /// Its disks, in order.
    pub disks: Vec<DiskConfiguration>,
    /// Its network cards, in order.
    pub networks: Vec<NetworkConfiguration>,
    /// Whether it has a balloon.
    pub balloon: bool,
    /// Whether it has a source of random numbers.
    pub rng: bool,
    /// Its vsock device; `null` when it has none.
    pub vsock: Option<VsockConfiguration>,
    /// Where its console goes, as `--console` takes it; `null` when it has none.
    pub console: Option<String>,
    /// How the pages that it dirties are found: `log` or `ring`.
    pub dirty: String,
    /// Where its serial port goes, as `--serial` takes it; `null` when nothing says.
    pub serial: Option<String>,
    /// Whether its VMM is confined: `on`, `require` or `off`; `null` when nothing says.
    pub sandbox: Option<String>,
    /// Where `/metrics` is served over TCP; `null` where it is not.
    pub metrics: Option<String>,
}

impl Configuration {
    /// The current value of [`Configuration::schema`].
    pub const SCHEMA: u32 = 4;
}

/// A guest's processors.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Cpu {
    /// As CPUID leaf 0 says.
    pub vendor: String,
    /// As CPUID leaves 0x80000002 to 0x80000004 say; `null` where they say nothing.
    pub brand: Option<String>,
    /// Frequency of the time stamp counter; `null` where the host did not tell.
    pub tsc_khz: Option<u32>,
}

/// A guest's RAM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct MemoryConfiguration {
    /// Its size.
    pub bytes: u64,
    /// `thp`, `4k` or `hugetlb`.
    pub backing: String,
    /// All of it was taken from the host before the guest ran.
    pub preallocated: bool,
    /// The guest's NUMA nodes; empty when it has none.
    pub nodes: Vec<NodeConfiguration>,
}

/// A guest's NUMA node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeConfiguration {
    /// Its virtual processors.
    pub cpus: Vec<u32>,
    /// Its part of the RAM, in bytes.
    pub bytes: u64,
    /// Its distance to each node, as the guest is told.
    pub distances: Vec<u8>,
    /// The host's node that it is on; `null` where that is not known.
    pub host: Option<u32>,
}

/// What a guest was booted from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Boot {
    /// `kernel`, `linux`, `nas` or `snapshot`: the option, or the command.
    pub from: String,
    /// The kernel or the snapshot; `null` for a built-in one.
    pub path: Option<PathBuf>,
    /// The initial RAM disk; `null` where none was given.
    pub initrd: Option<PathBuf>,
    /// What was given for its command line, or its work; `null` where nothing was.
    pub cmdline: Option<String>,
}

/// A disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DiskConfiguration {
    /// The file behind it here; `null` when it is not known by a path.
    pub path: Option<String>,
    /// Its size.
    pub bytes: u64,
    /// Whether the guest may only read it.
    pub read_only: bool,
}

/// A network card.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NetworkConfiguration {
    /// The tap device behind it here; `null` when it is not known by a name.
    pub tap: Option<String>,
    /// Its address.
    pub mac: String,
}

/// A vsock device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VsockConfiguration {
    /// The guest's context.
    pub cid: u32,
    /// The socket behind it here.
    pub socket: Option<String>,
}

/// What the program that embeds the VMM knows of it and the VMM does not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Setup {
    /// See [`Configuration::boot`].
    pub boot: Option<Boot>,
    /// The names of the tap devices behind the network cards, in order, as far as they are known.
    pub taps: Vec<Option<String>>,
    /// See [`Configuration::sandbox`].
    pub sandbox: Option<String>,
    /// See [`Configuration::metrics`].
    pub metrics: Option<String>,
}
