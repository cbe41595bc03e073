//! Whether a guest's CPU, as it was described at its source, is what a vCPU of this host is.
//!
//! Besides the features that CPUID has bits for: whose CPU it is, since kernels choose by that what
//! they do and which registers they expect; and two things that CPUID does not tell: the frequency
//! of the TSC, which a guest measures once and counts on for good, and IA32_ARCH_CAPABILITIES, by
//! which a guest decides which of the CPU's faults it need not work around.

use super::MachineDescription;
use super::cpu::vendor;

/// How far two frequencies of one kind of CPU may be apart, in millionths: what KVM itself takes
/// for equal (`tsc_tolerance_ppm` of kvm.ko).
const TOLERANCE_PPM: u64 = 250;

/// The CPUID bit by which a guest knows of IA32_ARCH_CAPABILITIES: leaf 7, EDX.
const HAS_ARCH_CAPABILITIES: u32 = 1 << 29;

/// Bits of IA32_ARCH_CAPABILITIES by which a CPU says that it does *not* have a fault (Intel SDM
/// vol. 4, and Linux's msr-index.h), or that it has a way around one. A guest relies on each of
/// them.
const CAPABILITIES: [(u32, &str); 24] = [
    (0, "RDCL_NO"),
    (1, "IBRS_ALL"),
    (2, "RSBA"),
    (3, "SKIP_VMENTRY_L1DFLUSH"),
    (4, "SSB_NO"),
    (5, "MDS_NO"),
    (6, "IF_PSCHANGE_MC_NO"),
    (7, "TSX_CTRL"),
    (8, "TAA_NO"),
    (9, "MCU_CONTROL"),
    (10, "MISC_PACKAGE_CTLS"),
    (11, "ENERGY_FILTERING_CTL"),
    (12, "DOITM"),
    (13, "SBDR_SSDP_NO"),
    (14, "FBSDP_NO"),
    (15, "PSDP_NO"),
    (17, "FB_CLEAR"),
    (18, "FB_CLEAR_CTRL"),
    (19, "RRSBA"),
    (20, "BHI_NO"),
    (21, "XAPIC_DISABLE"),
    (24, "PBRSB_NO"),
    (26, "GDS_NO"),
    (27, "RFDS_NO"),
];

/// Bits that warn of a fault instead: a host without them is the better one.
pub(super) const WARNINGS: u64 = 1 << 2 | 1 << 19;

/// The bit of IA32_ARCH_CAPABILITIES of this name.
pub(super) fn capability(name: &str) -> Option<u64> {
    let found = CAPABILITIES.iter().find(|(_, known)| *known == name);
    found.map(|(bit, _)| 1 << bit)
}

/// The names of bits of IA32_ARCH_CAPABILITIES; those without one are left out.
pub(super) fn capability_names(bits: u64) -> Vec<&'static str> {
    let set = CAPABILITIES.iter().filter(|(bit, _)| bits & 1 << bit != 0);
    set.map(|(_, name)| *name).collect()
}

/// What a vCPU of this host is.
#[derive(Debug, Clone, Default)]
pub(super) struct HostCpu {
    /// As CPUID names it; empty where it does not.
    pub(super) vendor: String,
    pub(super) tsc_khz: Option<u32>,
    /// Whether KVM can give a guest another frequency.
    pub(super) scales: bool,
    pub(super) arch_capabilities: Option<u64>,
}

/// Why a guest must not run on this host's CPU.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Misfit {
    /// Another maker's CPU.
    #[error(
        "the guest was started on a CPU of {guest}, and this host's is of {here}: its kernel works around another CPU's faults \
         and counts on registers that are not here; choose a host of the same vendor, or insist with --force"
    )]
    Vendor {
        /// The guest's.
        guest: String,
        /// This host's.
        here: String,
    },
    /// The TSC runs at another frequency.
    #[error(
        "the guest's time stamp counter runs at {guest} kHz, this host's at {here} kHz, and its KVM cannot scale it \
         (KVM_CAP_TSC_CONTROL): the guest's clocks would run wrong; choose a host of the same frequency or with TSC scaling, \
         or insist with --force"
    )]
    Tsc {
        /// Of the guest, in kHz.
        guest: u32,
        /// Of this host, in kHz.
        here: u32,
    },
    /// The CPU has faults that the guest was told it does not have.
    #[error(
        "the guest was told of IA32_ARCH_CAPABILITIES that this host does not have: {0}; it would leave faults of this CPU \
         open; choose a host with them, or insist with --force"
    )]
    ArchCapabilities(String),
}

/// Compares them.
pub(super) fn check(guest: &MachineDescription, here: &HostCpu) -> Result<(), Misfit> {
    let vendor = vendor(&guest.cpuid);
    if !vendor.is_empty() && !here.vendor.is_empty() && vendor != here.vendor {
        return Err(Misfit::Vendor {
            guest: vendor,
            here: here.vendor.clone(),
        });
    }
    if let (Some(theirs), Some(ours), false) = (guest.tsc_khz, here.tsc_khz, here.scales) {
        let apart = u64::from(theirs.abs_diff(ours)) * 1_000_000;
        if apart > u64::from(theirs) * TOLERANCE_PPM {
            return Err(Misfit::Tsc {
                guest: theirs,
                here: ours,
            });
        }
    }
    let sees = guest
        .cpuid
        .iter()
        .any(|e| e.function == 7 && e.index == 0 && e.edx & HAS_ARCH_CAPABILITIES != 0);
    let theirs = guest.arch_capabilities.filter(|_| sees).unwrap_or(0);
    let lacking = theirs & !here.arch_capabilities.unwrap_or(0) & !WARNINGS;
    if lacking == 0 {
        return Ok(());
    }
    let name = |bit: u32| {
        let known = CAPABILITIES.iter().find(|(b, _)| *b == bit);
        known.map_or_else(|| format!("bit {bit}"), |(_, name)| (*name).to_owned())
    };
    let names: Vec<String> = (0..64)
        .filter(|bit| lacking & 1 << bit != 0)
        .map(name)
        .collect();
    Err(Misfit::ArchCapabilities(names.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::CpuidEntry;

    fn guest(tsc_khz: Option<u32>, arch_capabilities: Option<u64>) -> MachineDescription {
        MachineDescription {
            format: super::super::description::FORMAT,
            requires: Vec::new(),
            name: "g".into(),
            memory: 1 << 20,
            cpus: 1,
            hugepages: false,
            cpuid: vec![CpuidEntry {
                edx: HAS_ARCH_CAPABILITIES,
                ..CpuidEntry::uniform(7, 0, 0)
            }],
            tsc_khz,
            arch_capabilities,
            devices: Vec::new(),
            numa: None,
        }
    }

    #[test]
    fn another_frequency_needs_scaling() {
        let host = HostCpu {
            tsc_khz: Some(2_100_000),
            ..HostCpu::default()
        };
        check(&guest(Some(2_100_000), None), &host).unwrap();
        // Calibrations of one CPU differ by a few kHz.
        check(&guest(Some(2_100_400), None), &host).unwrap();
        check(&guest(None, None), &host).unwrap();
        let error = check(&guest(Some(2_600_000), None), &host).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("2600000 kHz") && text.contains("--force"),
            "{text}"
        );
        let scaling = HostCpu {
            scales: true,
            ..host
        };
        check(&guest(Some(2_600_000), None), &scaling).unwrap();
    }

    #[test]
    fn another_vendor_is_named() {
        // CPUID leaf 0: EBX, EDX, ECX.
        let leaf = |text: &str| {
            let word = |at: usize| {
                let bytes = text.as_bytes()[at..at + 4].try_into().unwrap();
                u32::from_le_bytes(bytes)
            };
            CpuidEntry {
                ebx: word(0),
                edx: word(4),
                ecx: word(8),
                ..CpuidEntry::uniform(0, 0, 0)
            }
        };
        let mut amd = guest(None, None);
        amd.cpuid.push(leaf("AuthenticAMD"));
        let host = |vendor: &str| HostCpu {
            vendor: vendor.into(),
            ..HostCpu::default()
        };
        check(&amd, &host("AuthenticAMD")).unwrap();
        check(&amd, &host("")).unwrap();
        check(&guest(None, None), &host("GenuineIntel")).unwrap();
        let text = check(&amd, &host("GenuineIntel")).unwrap_err().to_string();
        assert!(
            text.contains("of AuthenticAMD") && text.contains("of GenuineIntel"),
            "{text}"
        );
    }

    #[test]
    fn lacking_capabilities_are_named() {
        let host = |bits| HostCpu {
            arch_capabilities: Some(bits),
            ..HostCpu::default()
        };
        check(&guest(None, Some(0b10_0001)), &host(0b11_0001)).unwrap();
        let error = check(&guest(None, Some(1 | 1 << 5 | 1 << 40)), &host(1)).unwrap_err();
        assert_eq!(error, Misfit::ArchCapabilities("MDS_NO, bit 40".into()));
        assert!(check(&guest(None, Some(1)), &HostCpu::default()).is_err());
        // A warning that is missing here is no loss.
        check(&guest(None, Some(1 << 19)), &host(0)).unwrap();
        // A guest that was never told of the register has not relied on it.
        let mut blind = guest(None, Some(1));
        blind.cpuid.clear();
        check(&blind, &host(0)).unwrap();
    }
}
