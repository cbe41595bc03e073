//! What a machine is, as opposed to what state it is in.

use serde::{Deserialize, Serialize};

use super::devices::{self, DeviceDescription, MAX_DEVICES};
use super::features;
use super::requires::{quoted, unknown};
use crate::kvm::{CpuidEntry, Host, IoctlError, MAX_CPUID_ENTRIES, MAX_CPUS, OpenError};
use crate::memory::{RamError, RamLayout};
use crate::numa::{Topology, TopologyError};

/// Newest format of [`MachineDescription`] that is read: since 3 a description may require things.
pub(super) const FORMAT: u32 = 3;
/// Oldest format that is read, and the one that is written as long as it says all there is: the
/// description goes first, before it is known what the other side reads.
pub(super) const OLDEST_FORMAT: u32 = FORMAT - 1;
/// The fields that a description may require to be understood.
const FIELDS: [&str; 9] = [
    "name",
    "memory",
    "cpus",
    "hugepages",
    "cpuid",
    "tsc_khz",
    "arch_capabilities",
    "devices",
    NUMA,
];
/// A ferry that does not know it would lose the guest's nodes for good.
const NUMA: &str = "numa";
/// The longest name, in bytes.
const MAX_NAME: usize = 255;

/// All that has to be known to build the same machine on another host. It goes ahead of a
/// migration, so that a host that cannot run the guest says so before anything else is sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct MachineDescription {
    /// The oldest format whose readers understand this description. Fields are only ever added: a
    /// reader skips what it does not know and is not in `requires`.
    pub format: u32,
    /// Names of fields without which another machine would be built.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub requires: Vec<String>,
    /// The machine's name.
    pub name: String,
    /// RAM in bytes.
    pub memory: u64,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Whether the RAM comes from the huge page pool.
    pub hugepages: bool,
    /// The CPU that the guest sees, before what differs between vCPUs.
    pub cpuid: Vec<CpuidEntry>,
    /// Frequency of the guest's TSC in kHz, where the host told.
    pub tsc_khz: Option<u32>,
    /// IA32_ARCH_CAPABILITIES as the guest reads it, where there is such a register.
    #[serde(default)]
    pub arch_capabilities: Option<u64>,
    /// The virtio devices, in the order of their places.
    pub devices: Vec<DeviceDescription>,
    /// The guest's NUMA nodes, if it has some. They are required.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub numa: Option<Topology>,
}

/// Why a description cannot be of a machine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DescriptionError {
    /// Another version.
    #[error(
        "the machine's description has format {found}, but this ferry reads formats {OLDEST_FORMAT} to {FORMAT}: \
         go by way of a ferry that reads both"
    )]
    Format {
        /// The format found.
        found: u32,
    },
    /// A newer writer says that it must be understood.
    #[error(
        "the machine cannot be built without {0} of its description, which this ferry (description format {FORMAT}) does not \
         know: use a newer ferry here"
    )]
    Requires(String),
    /// Not the JSON that it should be.
    #[error("the machine's description cannot be understood: {0}")]
    Json(String),
    /// A number of vCPUs that cannot be.
    #[error("the machine's description has {0} vCPUs, but 1 to {MAX_CPUS} are possible")]
    Cpus(u32),
    /// More CPUID entries than KVM takes.
    #[error(
        "the machine's description has {0} CPUID entries, but at most {MAX_CPUID_ENTRIES} are possible: it is damaged"
    )]
    Cpuid(usize),
    /// The name is too long.
    #[error(
        "the machine's name has {0} bytes, but at most {MAX_NAME} are possible: choose a shorter one"
    )]
    Name(usize),
    /// More devices than places for them.
    #[error(
        "the machine's description has {0} virtio devices, but at most {MAX_DEVICES} are possible: give it fewer"
    )]
    Devices(usize),
    /// A memory size that cannot be.
    #[error(transparent)]
    Memory(#[from] RamError),
    /// NUMA nodes that cannot be.
    #[error(transparent)]
    Numa(#[from] TopologyError),
}

/// Why this host cannot run a machine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnfitHost {
    /// Its KVM cannot be used at all.
    #[error(transparent)]
    Kvm(#[from] OpenError),
    /// It did not tell its CPU's features.
    #[error("this host's CPU features could not be read: {0}")]
    Cpuid(#[from] IoctlError),
    /// The description itself.
    #[error(transparent)]
    Description(#[from] DescriptionError),
    /// The guest was given CPU features that this host lacks.
    #[error("the guest was given CPU features that this host does not have: {}; choose a host with them, or start the guest without", .0.join(", "))]
    Features(Vec<String>),
    /// Too few vCPUs.
    #[error("the guest has {guest} vCPUs, but this host's KVM can run {host}")]
    Cpus {
        /// vCPUs of the guest.
        guest: u32,
        /// The most there can be here.
        host: u32,
    },
}

/// What is looked at first.
#[derive(Deserialize)]
struct Head {
    format: u32,
    #[serde(default)]
    requires: Vec<String>,
}

impl MachineDescription {
    /// Reads a description of this format or the one before.
    ///
    /// # Errors
    /// [`DescriptionError`]. What is in it is checked by [`validate`](Self::validate).
    pub fn from_json(bytes: &[u8]) -> Result<Self, DescriptionError> {
        let json = |error: serde_json::Error| DescriptionError::Json(quoted(&error.to_string()));
        let head: Head = serde_json::from_slice(bytes).map_err(json)?;
        check_format(head.format)?;
        if let Some(names) = unknown(&head.requires, &FIELDS) {
            return Err(DescriptionError::Requires(names));
        }
        serde_json::from_slice(bytes).map_err(json)
    }

    /// With these NUMA nodes, which its readers must know.
    pub(super) fn with_numa(mut self, numa: Option<Topology>) -> Self {
        if numa.is_some() {
            self.format = FORMAT;
            self.requires.push(NUMA.into());
        }
        self.numa = numa;
        self
    }

    /// Without what is true within one boot of one kernel: for a file that may be read anywhere.
    #[must_use]
    pub fn anywhere(mut self) -> Self {
        for backing in devices::backings(&mut self.devices).flatten() {
            backing.boot = None;
        }
        for node in self.numa.iter_mut().flat_map(|numa| &mut numa.nodes) {
            node.host = None;
        }
        self
    }

    /// Checks that the description can be of a machine, wherever it comes from.
    ///
    /// # Errors
    /// [`DescriptionError`].
    pub fn validate(&self) -> Result<(), DescriptionError> {
        check_format(self.format)?;
        if self.cpus == 0 || self.cpus > MAX_CPUS {
            return Err(DescriptionError::Cpus(self.cpus));
        }
        if self.cpuid.len() > MAX_CPUID_ENTRIES {
            return Err(DescriptionError::Cpuid(self.cpuid.len()));
        }
        if self.name.len() > MAX_NAME {
            return Err(DescriptionError::Name(self.name.len()));
        }
        if self.devices.len() > MAX_DEVICES {
            return Err(DescriptionError::Devices(self.devices.len()));
        }
        RamLayout::new(self.memory, self.hugepages)?;
        if let Some(numa) = &self.numa {
            numa.check(self.memory, self.cpus)?;
        }
        Ok(())
    }

    /// Checks that this host can run the machine. Whether it has the memory is found when that is
    /// made.
    ///
    /// # Errors
    /// [`UnfitHost`], with the names of missing CPU features.
    pub fn check_host(&self) -> Result<(), UnfitHost> {
        self.validate()?;
        let host = Host::open()?;
        let max = host.capabilities().max_vcpus.min(MAX_CPUS);
        if self.cpus > max {
            return Err(UnfitHost::Cpus {
                guest: self.cpus,
                host: max,
            });
        }
        let missing = features::missing(&self.cpuid, &host.guest_cpuid()?);
        if !missing.is_empty() {
            return Err(UnfitHost::Features(missing));
        }
        Ok(())
    }
}

fn check_format(found: u32) -> Result<(), DescriptionError> {
    if (OLDEST_FORMAT..=FORMAT).contains(&found) {
        return Ok(());
    }
    Err(DescriptionError::Format { found })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As ferry wrote it when format 2 was all there was.
    const RECORDED: &str = include_str!("../../../tests/data/description-v2.json");

    #[test]
    fn a_recorded_description_is_read_field_by_field() {
        let read = MachineDescription::from_json(RECORDED.as_bytes()).unwrap();
        read.validate().unwrap();
        let backing = super::super::devices::DiskBacking {
            boot: Some("5b0d4e8c-0000-4000-8000-000000000000".into()),
            file: Some(ferry_devices::block::FileId {
                device: 64769,
                inode: Some(131),
            }),
            bytes: 8192,
            path: "/srv/web.img".into(),
        };
        let entry = CpuidEntry {
            function: 7,
            index: 0,
            flags: 1,
            eax: 2,
            ebx: 0x219c_07ab,
            ecx: 0,
            edx: 0xbc00_0000,
        };
        let wanted = MachineDescription {
            format: 2,
            requires: Vec::new(),
            name: "web".into(),
            memory: 64 << 20,
            cpus: 1,
            hugepages: false,
            cpuid: vec![entry],
            tsc_khz: Some(2_100_000),
            arch_capabilities: Some(43),
            devices: vec![
                DeviceDescription::Disk {
                    bytes: 8192,
                    read_only: true,
                    backing: Some(backing),
                },
                DeviceDescription::Net {
                    mac: "52:54:00:01:02:03".parse().unwrap(),
                },
                DeviceDescription::Balloon,
                DeviceDescription::Rng,
            ],
            numa: None,
        };
        assert_eq!(read, wanted);
        // What an older ferry is sent is what it would have written itself.
        let written = serde_json::to_string(&wanted).unwrap();
        assert_eq!(written, RECORDED.trim_end());
    }

    #[test]
    fn unknown_fields_are_skipped_unless_they_are_required() {
        let mut json: serde_json::Value = serde_json::from_str(RECORDED).unwrap();
        let read =
            |json: &serde_json::Value| MachineDescription::from_json(json.to_string().as_bytes());
        json["colour"] = serde_json::json!({"deep": [1, 2]});
        read(&json).unwrap();
        json["format"] = 3.into();
        json["requires"] = serde_json::json!(["cpuid"]);
        read(&json).unwrap();
        json["requires"] = serde_json::json!(["cpuid", "colour", "\u{1b}[2J"]);
        let text = read(&json).unwrap_err().to_string();
        assert!(text.contains("without colour, ?[2J of"), "{text}");
        for found in [0, 1, 4] {
            json["format"] = found.into();
            let text = read(&json).unwrap_err().to_string();
            assert!(text.contains(&format!("format {found},")), "{text}");
            assert!(text.contains("formats 2 to 3"), "{text}");
        }
        let mut sound: serde_json::Value = serde_json::from_str(RECORDED).unwrap();
        sound["devices"][3] = "sound\n".into();
        let text = read(&sound).unwrap_err().to_string();
        assert!(text.contains("`sound?`"), "{text}");
    }

    /// Today's reader without the nodes stands for an older one: it refuses them by name.
    #[test]
    fn nodes_are_required_and_their_place_is_not_written_to_files() {
        let node = |cpu, host| crate::numa::Node {
            cpus: vec![cpu],
            memory: 32 << 20,
            host: Some(host),
        };
        let mut read = MachineDescription::from_json(RECORDED.as_bytes()).unwrap();
        read.cpus = 2;
        let numa = Topology::even(vec![node(0, 1), node(1, 0)]);
        let with = read.clone().with_numa(Some(numa));
        let json = serde_json::to_string(&with).unwrap();
        assert!(
            json.starts_with(r#"{"format":3,"requires":["numa"],"#),
            "{json}"
        );
        let end = r#""numa":{"nodes":[{"cpus":[0],"memory":33554432,"host":1},{"cpus":[1],"memory":33554432,"host":0}],"distances":[[10,20],[20,10]]}}"#;
        assert!(json.ends_with(end), "{json}");
        assert_eq!(
            MachineDescription::from_json(json.as_bytes()).unwrap(),
            with
        );
        with.validate().unwrap();
        let older = unknown(&with.requires, &FIELDS[..FIELDS.len() - 1]);
        assert_eq!(older.as_deref(), Some("numa"));
        let file = with.anywhere().numa.unwrap();
        assert!(file.nodes.iter().all(|node| node.host.is_none()));
        // A guest without them is described as ever.
        assert_eq!(read.clone().with_numa(None), read);
        let mut odd = read.with_numa(Some(Topology::even(vec![node(0, 0)])));
        assert!(matches!(odd.validate(), Err(DescriptionError::Numa(_))));
        odd.numa = None;
        odd.validate().unwrap();
    }

    #[test]
    fn impossible_descriptions_are_refused() {
        let good = MachineDescription {
            format: FORMAT,
            requires: Vec::new(),
            name: "g".into(),
            memory: 1 << 20,
            cpus: 1,
            hugepages: false,
            cpuid: Vec::new(),
            tsc_khz: None,
            arch_capabilities: None,
            devices: Vec::new(),
            numa: None,
        };
        good.validate().unwrap();
        let entry = CpuidEntry::uniform(0, 0, 0);
        for bad in [
            MachineDescription {
                format: FORMAT + 1,
                ..good.clone()
            },
            MachineDescription {
                cpus: 0,
                ..good.clone()
            },
            MachineDescription {
                cpus: 255,
                ..good.clone()
            },
            MachineDescription {
                memory: 0,
                ..good.clone()
            },
            MachineDescription {
                memory: u64::MAX,
                ..good.clone()
            },
            MachineDescription {
                hugepages: true,
                ..good.clone()
            },
            MachineDescription {
                name: "x".repeat(256),
                ..good.clone()
            },
            MachineDescription {
                cpuid: vec![entry; 257],
                ..good.clone()
            },
            MachineDescription {
                devices: vec![DeviceDescription::Balloon; MAX_DEVICES + 1],
                ..good.clone()
            },
            MachineDescription {
                numa: Some(Topology::even(Vec::new())),
                ..good.clone()
            },
        ] {
            assert!(bad.validate().is_err(), "{bad:?}");
        }
    }
}
