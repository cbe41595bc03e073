//! What is measured: a guest, a link, and who moves the one over the other.

use ferry_guest_images::{MAX_CPUS, Workload};
use ferry_migration::options::Options;
use ferry_terminal::units::{memory, size};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;

/// A guest, as it is written in a bench file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Guest {
    /// How tables call it.
    pub name: String,
    /// What it does.
    #[serde(with = "work")]
    pub work: Workload,
    /// Its memory in bytes.
    #[serde(deserialize_with = "bytes")]
    pub memory: u64,
    /// Its processors.
    #[serde(default = "one")]
    pub cpus: u32,
}

/// A link between two hosts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    /// How tables call it.
    pub name: String,
    /// What it carries in bytes per second; without one it is this machine's loopback.
    #[serde(default, deserialize_with = "rate")]
    pub rate: Option<u64>,
}

/// Who moves the guest, and how.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// How tables call it.
    pub name: String,
    /// ferry, with these options; what is left out is as `ferry migrate` has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ferry: Option<Options>,
    /// ferry's connections are secured by certificates, which are made for the run.
    #[serde(default, skip_serializing_if = "is_false")]
    pub tls: bool,
    /// QEMU, with these.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qemu: Option<Qemu>,
    /// Cloud Hypervisor, with these.
    #[serde(
        default,
        rename = "cloud-hypervisor",
        skip_serializing_if = "Option::is_none"
    )]
    pub cloud: Option<Cloud>,
}

// serde gives references to it.
#[allow(clippy::trivially_copy_pass_by_ref)]
const fn is_false(value: &bool) -> bool {
    !*value
}

/// What Cloud Hypervisor is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cloud {
    /// Which of its ways.
    pub mode: CloudMode,
    /// Its `downtime_ms`.
    #[serde(default = "downtime")]
    pub downtime_ms: u64,
    /// Its `connections`, for pre-copy.
    #[serde(default = "single")]
    pub connections: u32,
    /// When a migration that does not converge is ended by stopping the guest; it counts in
    /// seconds.
    #[serde(default)]
    pub stop_after_ms: Option<u64>,
}

/// Cloud Hypervisor's ways to move a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CloudMode {
    /// Pre-copy.
    Precopy,
    /// Post-copy from the start.
    Postcopy,
}

impl CloudMode {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Precopy, Self::Postcopy];

    /// As bench files write it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Precopy => "precopy",
            Self::Postcopy => "postcopy",
        }
    }
}

impl Cloud {
    /// The way, and nothing else than the defaults.
    pub const fn new(mode: CloudMode, downtime_ms: u64) -> Self {
        Self {
            mode,
            downtime_ms,
            connections: single(),
            stop_after_ms: None,
        }
    }

    /// The most connections that it takes.
    const MOST: u32 = 128;
}

const fn single() -> u32 {
    1
}

/// What QEMU is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Qemu {
    /// Which of its ways.
    pub mode: QemuMode,
    /// Its `downtime-limit`.
    #[serde(default = "downtime")]
    pub downtime_ms: u64,
    /// Connections of multifd.
    #[serde(default = "four")]
    pub channels: u16,
    /// The cache of xbzrle in bytes.
    #[serde(default = "cache", deserialize_with = "bytes")]
    pub cache: u64,
    /// When a migration that does not converge is ended by stopping the guest, as ferry's
    /// `on_timeout = "stop"` does.
    #[serde(default)]
    pub stop_after_ms: Option<u64>,
}

/// QEMU's ways to move a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum QemuMode {
    /// Pre-copy over one connection.
    Precopy,
    /// Pre-copy over several.
    Multifd,
    /// Post-copy from the start.
    Postcopy,
    /// Pre-copy with deltas of pages that are sent again.
    Xbzrle,
    /// Pre-copy that slows the guest down until it converges.
    AutoConverge,
}

impl QemuMode {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Precopy,
        Self::Multifd,
        Self::Postcopy,
        Self::Xbzrle,
        Self::AutoConverge,
    ];

    /// As bench files write it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Precopy => "precopy",
            Self::Multifd => "multifd",
            Self::Postcopy => "postcopy",
            Self::Xbzrle => "xbzrle",
            Self::AutoConverge => "auto-converge",
        }
    }

    /// The capability of that name that QEMU has for it.
    pub const fn capability(self) -> Option<&'static str> {
        match self {
            Self::Precopy => None,
            Self::Multifd => Some("multifd"),
            Self::Postcopy => Some("postcopy-ram"),
            Self::Xbzrle => Some("xbzrle"),
            Self::AutoConverge => Some("auto-converge"),
        }
    }
}

impl Qemu {
    /// The way, and nothing else than the defaults.
    pub fn new(mode: QemuMode, downtime_ms: u64) -> Self {
        Self {
            mode,
            downtime_ms,
            channels: four(),
            cache: cache(),
            stop_after_ms: None,
        }
    }
}

const fn one() -> u32 {
    1
}

const fn four() -> u16 {
    4
}

/// What `ferry migrate` takes without being told, and QEMU as well.
const fn downtime() -> u64 {
    300
}

/// QEMU's own default.
const fn cache() -> u64 {
    64 << 20
}

mod work {
    use super::{Deserialize, Deserializer, Serializer, Workload};
    use serde::de::Error as _;

    pub fn serialize<S: Serializer>(work: &Workload, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(work)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Workload, D::Error> {
        Workload::parse(&String::deserialize(d)?).map_err(D::Error::custom)
    }
}

/// A size: `"512M"`, or bytes as the journal has them.
#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "a text with a unit, such as \"512M\" or \"1Gbit\""
)]
enum Amount {
    Text(String),
    Number(u64),
}

fn bytes<'de, D: Deserializer<'de>>(d: D) -> Result<u64, D::Error> {
    match Amount::deserialize(d)? {
        Amount::Text(text) => size(&text).map_err(D::Error::custom),
        Amount::Number(number) => Ok(number),
    }
}

fn rate<'de, D: Deserializer<'de>>(d: D) -> Result<Option<u64>, D::Error> {
    let rate = match Option::<Amount>::deserialize(d)? {
        None => return Ok(None),
        Some(Amount::Text(text)) => ferry_terminal::units::rate(&text).map_err(D::Error::custom)?,
        Some(Amount::Number(number)) => number,
    };
    if rate < Link::SLOWEST {
        return Err(D::Error::custom(
            "no migration ends on so slow a link; give at least 1Mbit",
        ));
    }
    Ok(Some(rate))
}

impl Link {
    /// The slowest link, in bytes per second.
    const SLOWEST: u64 = 125_000;
}

impl Guest {
    /// What is wrong with it, if anything.
    pub fn check(&self) -> Result<(), String> {
        let cpus = usize::try_from(self.cpus).unwrap_or(usize::MAX);
        if cpus == 0 || cpus > MAX_CPUS {
            return Err(format!(
                "guest `{}` has {} processors; give it 1 to {MAX_CPUS}",
                self.name, self.cpus
            ));
        }
        let needed = self.work.memory_needed(cpus);
        if self.memory < needed {
            return Err(format!(
                "guest `{}`: {} needs {} and is given {}; give it more memory or a smaller class or working set",
                self.name,
                self.work,
                memory(needed),
                memory(self.memory)
            ));
        }
        if !self.memory.is_multiple_of(1 << 20) {
            return Err(format!(
                "guest `{}` has memory of {} bytes; give it whole MiB",
                self.name, self.memory
            ));
        }
        Ok(())
    }

    /// Its memory in MiB.
    pub const fn mib(&self) -> u64 {
        self.memory >> 20
    }
}

impl Policy {
    /// What is wrong with it, if anything.
    pub fn check(&self) -> Result<(), String> {
        match (&self.ferry, &self.qemu, &self.cloud) {
            (Some(options), None, None) => options
                .check()
                .map_err(|e| format!("policy `{}`: {e}", self.name)),
            (None, _, _) if self.tls => Err(format!(
                "policy `{}` is not ferry's; `tls = true` is for policies of ferry",
                self.name
            )),
            (None, Some(qemu), None) if qemu.channels == 0 => Err(format!(
                "policy `{}` has no channels; give at least 1",
                self.name
            )),
            (None, Some(qemu), None) if !qemu.cache.is_power_of_two() => Err(format!(
                "policy `{}` has a cache of {} bytes; QEMU takes a power of two, such as 64M",
                self.name, qemu.cache
            )),
            (None, None, Some(cloud)) if !(1..=Cloud::MOST).contains(&cloud.connections) => {
                Err(format!(
                    "policy `{}` has {} connections; Cloud Hypervisor takes 1 to {}",
                    self.name,
                    cloud.connections,
                    Cloud::MOST
                ))
            }
            (None, Some(_), None) | (None, None, Some(_)) => Ok(()),
            _ => Err(format!(
                "policy `{}` does not say who moves the guest; give it either `ferry = {{ … }}`, `qemu = {{ … }}` or \
                 `cloud-hypervisor = {{ … }}`",
                self.name
            )),
        }
    }

    /// A policy of ferry's.
    pub fn of_ferry(name: &str, options: Options) -> Self {
        Self {
            name: name.to_owned(),
            ferry: Some(options),
            tls: false,
            qemu: None,
            cloud: None,
        }
    }

    /// One of QEMU's.
    pub fn of_qemu(name: &str, qemu: Qemu) -> Self {
        Self {
            name: name.to_owned(),
            ferry: None,
            tls: false,
            qemu: Some(qemu),
            cloud: None,
        }
    }

    /// One of Cloud Hypervisor's.
    pub fn of_cloud(name: &str, cloud: Cloud) -> Self {
        Self {
            name: name.to_owned(),
            ferry: None,
            tls: false,
            qemu: None,
            cloud: Some(cloud),
        }
    }

    /// Whether it is ferry's.
    pub const fn ours(&self) -> bool {
        self.ferry.is_some()
    }
}

/// One field of the matrix.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// What is moved.
    pub guest: Guest,
    /// Over what.
    pub link: Link,
    /// By whom and how.
    pub policy: Policy,
}

impl Cell {
    /// What tells it from every other: all that it says.
    pub fn key(&self) -> String {
        // These types always have a JSON form; the sentence below would do as well.
        serde_json::to_string(self).unwrap_or_else(|_| self.to_string())
    }

    /// Guest and link: what the policies of a group have in common.
    pub fn group(&self) -> (&str, &str) {
        (&self.guest.name, &self.link.name)
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} / {} / {}",
            self.guest.name, self.link.name, self.policy.name
        )
    }
}
