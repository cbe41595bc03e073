//! The MSRs that ferry carries, by name.
//!
//! KVM's own list (KVM_GET_MSR_INDEX_LIST) is the host's and grows with its kernel: what is in it
//! today without a meaning here is not read, and a saved state that has it is refused by name. The
//! numbers are those of the Intel SDM vol. 4, the AMD APM vol. 2 appendix A, and
//! `arch/x86/include/asm/msr-index.h`, `kvm_para.h` and `hyperv-tlfs.h` of Linux.

/// What is done with an MSR of a saved state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// The guest's state: written.
    State,
    /// Describes the CPU: written where KVM lets it be, so that the guest sees what it saw.
    Description,
    /// Of a part of the CPU that no guest is given (performance counters, tracing): not written.
    Unused,
    /// A request that was carried out when the guest made it: not written.
    Request,
}

use Kind::{Description, Request, State, Unused};

/// First and last index, what they are, and their name.
const KNOWN: [(u32, u32, Kind, &str); 58] = [
    (0x10, 0x10, State, "IA32_TIME_STAMP_COUNTER"),
    // KVM writes the time into guest memory at once, which may still belong to the guest at its
    // source.
    (0x11, 0x11, Request, "MSR_KVM_WALL_CLOCK"),
    (0x12, 0x12, State, "MSR_KVM_SYSTEM_TIME"),
    (0x1b, 0x1b, State, "IA32_APIC_BASE"),
    (0x34, 0x34, State, "MSR_SMI_COUNT"),
    (0x3a, 0x3b, State, "IA32_FEATURE_CONTROL, IA32_TSC_ADJUST"),
    (0x48, 0x49, State, "IA32_SPEC_CTRL, IA32_PRED_CMD"),
    (0x8b, 0x8b, Description, "IA32_BIOS_SIGN_ID"),
    (0x8c, 0x8f, Unused, "IA32_SGXLEPUBKEYHASH"),
    (0x9b, 0x9e, Unused, "IA32_SMM_MONITOR_CTL, IA32_SMBASE"),
    (0xc1, 0xc8, Unused, "IA32_PMC"),
    (
        0xce,
        0xcf,
        Description,
        "MSR_PLATFORM_INFO, IA32_CORE_CAPABILITIES",
    ),
    (0xe1, 0xe1, State, "IA32_UMWAIT_CONTROL"),
    (0xfe, 0xfe, Description, "IA32_MTRRCAP"),
    (0x10a, 0x10a, Description, "IA32_ARCH_CAPABILITIES"),
    (0x10b, 0x10b, Request, "IA32_FLUSH_CMD"),
    (0x122, 0x122, State, "IA32_TSX_CTRL"),
    (0x140, 0x140, State, "MSR_MISC_FEATURES_ENABLES"),
    (0x174, 0x176, State, "IA32_SYSENTER"),
    (0x179, 0x179, Description, "IA32_MCG_CAP"),
    (0x17a, 0x17b, State, "IA32_MCG_STATUS, IA32_MCG_CTL"),
    (0x186, 0x18d, Unused, "IA32_PERFEVTSEL"),
    (0x1a0, 0x1a0, State, "IA32_MISC_ENABLE"),
    (0x1c4, 0x1c5, State, "IA32_XFD, IA32_XFD_ERR"),
    (0x1d9, 0x1d9, State, "IA32_DEBUGCTL"),
    (0x1fc, 0x1fc, State, "MSR_POWER_CTL"),
    (0x200, 0x20f, State, "IA32_MTRR_PHYS"),
    (0x250, 0x250, State, "IA32_MTRR_FIX64K"),
    (0x258, 0x259, State, "IA32_MTRR_FIX16K"),
    (0x268, 0x26f, State, "IA32_MTRR_FIX4K"),
    (0x277, 0x277, State, "IA32_PAT"),
    (0x280, 0x29f, State, "IA32_MC_CTL2"),
    (0x2ff, 0x2ff, State, "IA32_MTRR_DEF_TYPE"),
    (0x309, 0x30c, Unused, "IA32_FIXED_CTR"),
    (0x345, 0x345, Description, "IA32_PERF_CAPABILITIES"),
    (0x38d, 0x391, Unused, "IA32_PERF_GLOBAL"),
    (0x3f1, 0x3f2, Unused, "IA32_PEBS_ENABLE, MSR_PEBS_DATA_CFG"),
    (0x400, 0x47f, State, "IA32_MC"),
    (0x480, 0x493, Description, "IA32_VMX"),
    (0x4c1, 0x4c8, Unused, "IA32_A_PMC"),
    (0x570, 0x587, Unused, "IA32_RTIT"),
    (0x600, 0x600, Unused, "IA32_DS_AREA"),
    (0x6a0, 0x6a8, State, "IA32_U_CET, IA32_S_CET, IA32_PL_SSP"),
    (0x6e0, 0x6e0, State, "IA32_TSC_DEADLINE"),
    (0x800, 0x83f, State, "the x2APIC's registers"),
    (0xd90, 0xd90, State, "IA32_BNDCFGS"),
    (0xda0, 0xda0, State, "IA32_XSS"),
    (0x14ce, 0x14cf, Unused, "IA32_LBR_CTL, IA32_LBR_DEPTH"),
    (0x4000_0000, 0x4000_01ff, State, "HV_X64_MSR"),
    (0x4b56_4d00, 0x4b56_4d00, Request, "MSR_KVM_WALL_CLOCK_NEW"),
    (0x4b56_4d01, 0x4b56_4d0f, State, "MSR_KVM"),
    (
        0xc000_0080,
        0xc000_0084,
        State,
        "EFER, STAR, LSTAR, CSTAR, SFMASK",
    ),
    (
        0xc000_0100,
        0xc000_0104,
        State,
        "FS_BASE, GS_BASE, KERNEL_GS_BASE, TSC_AUX, TSC_RATIO",
    ),
    (0xc000_0300, 0xc000_0303, Unused, "AMD64_PERF_CNTR_GLOBAL"),
    (0xc001_0000, 0xc001_0007, Unused, "K7_EVNTSEL, K7_PERFCTR"),
    (0xc001_0015, 0xc001_0141, State, "AMD's HWCR to OSVW_STATUS"),
    (0xc001_0200, 0xc001_020b, Unused, "F15H_PERF"),
    (0xc001_1020, 0xc001_102b, State, "AMD's LS_CFG to DE_CFG"),
];

/// The range that the MSR is of.
fn range(index: u32) -> Option<&'static (u32, u32, Kind, &'static str)> {
    KNOWN
        .iter()
        .find(|(first, last, ..)| (*first..=*last).contains(&index))
}

/// What is done with the MSR, if ferry knows it.
pub(super) fn kind(index: u32) -> Option<Kind> {
    range(index).map(|range| range.2)
}

/// The name of the MSR's range.
pub(super) fn name(index: u32) -> Option<&'static str> {
    range(index).map(|range| range.3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ranges_are_in_order_and_disjoint() {
        for pair in KNOWN.windows(2) {
            assert!(pair[0].0 <= pair[0].1, "{:?}", pair[0]);
            assert!(pair[0].1 < pair[1].0, "{:?}", pair[1]);
        }
        assert_eq!(kind(0x6e0), Some(State));
        assert_eq!(kind(0x10a), Some(Description));
        assert_eq!(name(0x10a), Some("IA32_ARCH_CAPABILITIES"));
        // IA32_MONITOR_FILTER_SIZE is no state of a guest's.
        assert_eq!(kind(6), None);
    }
}
