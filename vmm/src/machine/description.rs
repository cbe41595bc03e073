//! What a machine is, as opposed to what state it is in.

use serde::{Deserialize, Serialize};

use super::devices::{self, DeviceDescription, MAX_DEVICES};
use super::features;
use crate::kvm::{CpuidEntry, Host, IoctlError, MAX_CPUID_ENTRIES, MAX_CPUS, OpenError};
use crate::memory::{RamError, RamLayout};

/// Version of [`MachineDescription`].
pub(super) const FORMAT: u32 = 2;
/// The longest name, in bytes.
const MAX_NAME: usize = 255;

/// All that has to be known to build the same machine on another host. It goes ahead of a
/// migration, so that a host that cannot run the guest says so before anything else is sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineDescription {
    /// Version of this description.
    pub format: u32,
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
}

/// Why a description cannot be of a machine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DescriptionError {
    /// Another version.
    #[error(
        "the machine's description has version {found}, but this ferry reads version {FORMAT}: use the same version of ferry on both sides"
    )]
    Format {
        /// The version found.
        found: u32,
    },
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

impl MachineDescription {
    /// Without what is true within one boot of one kernel: for a file that may be read anywhere.
    #[must_use]
    pub fn anywhere(mut self) -> Self {
        for backing in devices::backings(&mut self.devices).flatten() {
            backing.boot = None;
        }
        self
    }

    /// Checks that the description can be of a machine, wherever it comes from.
    ///
    /// # Errors
    /// [`DescriptionError`].
    pub fn validate(&self) -> Result<(), DescriptionError> {
        if self.format != FORMAT {
            return Err(DescriptionError::Format { found: self.format });
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_descriptions_are_refused() {
        let good = MachineDescription {
            format: FORMAT,
            name: "g".into(),
            memory: 1 << 20,
            cpus: 1,
            hugepages: false,
            cpuid: Vec::new(),
            tsc_khz: None,
            arch_capabilities: None,
            devices: Vec::new(),
        };
        good.validate().unwrap();
        let entry = CpuidEntry {
            function: 0,
            index: 0,
            flags: 0,
            eax: 0,
            ebx: 0,
            ecx: 0,
            edx: 0,
        };
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
        ] {
            assert!(bad.validate().is_err(), "{bad:?}");
        }
    }
}
