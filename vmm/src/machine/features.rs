//! CPU features by name, and which of a guest's a host lacks.
//!
//! Intel SDM vol. 2A and AMD APM vol. 3, "CPUID"; names as in Linux's `/proc/cpuinfo`.

mod set;

pub(super) use set::{FeatureSet, UnknownFeature};

use crate::kvm::CpuidEntry;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Reg {
    Eax,
    Ebx,
    Ecx,
    Edx,
}
use Reg::{Eax, Ebx, Ecx, Edx};

/// A register whose bits are features, the bits that are not, and the names of the others from bit
/// 0 on (`_` where a bit has none here).
struct Word {
    function: u32,
    index: u32,
    reg: Reg,
    ignore: u32,
    names: &'static str,
}

const fn word(function: u32, index: u32, reg: Reg, ignore: u32, names: &'static str) -> Word {
    Word {
        function,
        index,
        reg,
        ignore,
        names,
    }
}

const WORDS: [Word; 16] = [
    word(
        1,
        0,
        Edx,
        1 << 28,
        "fpu vme de pse tsc msr pae mce cx8 apic _ sep mtrr pge mca cmov pat pse36 pn clflush _ dts acpi mmx fxsr sse sse2 ss _ tm ia64 pbe",
    ),
    // OSXSAVE mirrors a control register.
    word(
        1,
        0,
        Ecx,
        1 << 27,
        "sse3 pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm _ pcid dca sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave _ avx f16c rdrand hypervisor",
    ),
    word(
        7,
        0,
        Ebx,
        0,
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds mpx rdt_a avx512f avx512dq rdseed adx smap avx512ifma _ clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl",
    ),
    // OSPKE mirrors a control register.
    word(
        7,
        0,
        Ecx,
        1 << 4,
        "prefetchwt1 avx512vbmi umip pku _ waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni avx512_bitalg tme avx512_vpopcntdq _ la57 _ _ _ _ _ rdpid _ bus_lock_detect cldemote _ movdiri movdir64b enqcmd sgx_lc pks",
    ),
    word(
        7,
        0,
        Edx,
        0,
        "_ sgx_keys avx512_4vnniw avx512_4fmaps fsrm uintr _ _ avx512_vp2intersect srbds_ctrl md_clear rtm_always_abort _ tsx_force_abort serialize hybrid_cpu tsxldtrk _ pconfig arch_lbr ibt _ amx_bf16 avx512_fp16 amx_tile amx_int8 spec_ctrl stibp flush_l1d arch_capabilities core_capabilities ssbd",
    ),
    word(
        7,
        1,
        Eax,
        0,
        "sha512 sm3 sm4 rao_int avx_vnni avx512_bf16 lass cmpccxadd _ _ fzrm fsrs fsrc _ _ _ _ fred lkgs wrmsrns _ amx_fp16 hreset avx_ifma _ _ lam",
    ),
    word(
        7,
        1,
        Edx,
        0,
        "_ _ _ _ avx_vnni_int8 avx_ne_convert _ _ amx_complex _ avx_vnni_int16 _ _ _ prefetchi",
    ),
    word(
        7,
        2,
        Edx,
        0,
        "intel_psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no",
    ),
    // What XCR0 can enable: the guest's own state depends on it.
    word(
        0xd,
        0,
        Eax,
        0,
        "xstate_x87 xstate_sse xstate_avx xstate_bndregs xstate_bndcsr xstate_opmask xstate_zmm_hi256 xstate_hi16_zmm _ xstate_pkru _ _ _ _ _ _ _ xstate_xtilecfg xstate_xtiledata",
    ),
    word(0xd, 1, Eax, 0, "xsaveopt xsavec xgetbv1 xsaves xfd"),
    word(
        0x4000_0001,
        0,
        Eax,
        0,
        "kvmclock kvm_nopiodelay kvm_mmu_op kvmclock2 kvm_asyncpf kvm_steal_time kvm_pv_eoi kvm_pv_unhalt _ kvm_pv_tlb_flush kvm_asyncpf_vmexit kvm_pv_ipi kvm_poll_control kvm_pv_sched_yield kvm_asyncpf_int kvm_msi_ext_dest_id kvm_hc_map_gpa_range kvm_migration_control _ _ _ _ _ _ kvmclock_stable",
    ),
    word(
        0x8000_0001,
        0,
        Edx,
        0,
        "_ _ _ _ _ _ _ _ _ _ _ syscall _ _ _ _ _ _ _ mp nx _ mmxext _ _ fxsr_opt pdpe1gb rdtscp _ lm 3dnowext 3dnow",
    ),
    word(
        0x8000_0001,
        0,
        Ecx,
        0,
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt _ lwp fma4 tce _ nodeid_msr _ tbm topoext perfctr_core perfctr_nb _ bpext ptsc perfctr_llc mwaitx",
    ),
    word(0x8000_0007, 0, Edx, 0, "_ _ _ _ _ _ _ _ invtsc"),
    word(
        0x8000_0008,
        0,
        Ebx,
        0,
        "clzero irperf xsaveerptr _ rdpru _ _ _ _ wbnoinvd _ _ amd_ibpb _ amd_ibrs amd_stibp _ amd_stibp_always_on _ _ _ _ _ _ amd_ssbd virt_ssbd amd_ssb_no cppc amd_psfd",
    ),
    word(
        0x8000_0021,
        0,
        Eax,
        0,
        "no_nested_data_bp _ lfence_rdtsc _ _ _ null_sel_clr_base _ autoibrs no_smm_ctl_msr fsrs_amd fsrc_amd",
    ),
];

/// The features that `guest` was given and `host` does not have, by name.
pub(super) fn missing(guest: &[CpuidEntry], host: &[CpuidEntry]) -> Vec<String> {
    let mut missing = Vec::new();
    for word in &WORDS {
        let bits = value(guest, word) & !value(host, word) & !word.ignore;
        for bit in (0..32).filter(|bit| bits & (1 << bit) != 0) {
            let name = word
                .names
                .split(' ')
                .nth(bit)
                .filter(|n| !n.is_empty() && *n != "_");
            missing.push(name.map_or_else(
                || {
                    let reg = format!("{:?}", word.reg).to_lowercase();
                    format!("cpuid {:#x}.{} {reg} bit {bit}", word.function, word.index)
                },
                str::to_owned,
            ));
        }
    }
    // A guest that was told of more address bits may use them in page tables, where fewer fault.
    let width = |list: &[CpuidEntry]| find_leaf(list, 0x8000_0008, 0).map_or(0, |e| e.eax & 0xff);
    if width(guest) > width(host) {
        missing.push(format!("{}-bit physical addresses", width(guest)));
    }
    missing
}

/// The leaves that have features, each once.
#[cfg(test)]
pub(super) fn leaves() -> impl Iterator<Item = (u32, u32)> {
    let leaves: std::collections::BTreeSet<_> =
        WORDS.iter().map(|w| (w.function, w.index)).collect();
    leaves.into_iter()
}

/// A leaf of CPUID.
pub(super) fn find_leaf(list: &[CpuidEntry], function: u32, index: u32) -> Option<&CpuidEntry> {
    list.iter()
        .find(|e| e.function == function && e.index == index)
}

fn value(list: &[CpuidEntry], word: &Word) -> u32 {
    find_leaf(list, word.function, word.index).map_or(0, |e| match word.reg {
        Eax => e.eax,
        Ebx => e.ebx,
        Ecx => e.ecx,
        Edx => e.edx,
    })
}

/// A register of a leaf.
fn register(entry: &mut CpuidEntry, reg: Reg) -> &mut u32 {
    match reg {
        Eax => &mut entry.eax,
        Ebx => &mut entry.ebx,
        Ecx => &mut entry.ecx,
        Edx => &mut entry.edx,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, eax: u32, ebx: u32, ecx: u32) -> CpuidEntry {
        CpuidEntry {
            function,
            index,
            flags: 0,
            eax,
            ebx,
            ecx,
            edx: 0,
        }
    }

    #[test]
    fn missing_features_are_named() {
        let guest = [
            entry(1, 0, 0, 0, 1 << 28 | 1 << 27 | 1),
            entry(7, 0, 0, 1 << 5 | 1 << 22, 0),
            entry(0x8000_0008, 0, 46, 0, 0),
        ];
        let host = [entry(1, 0, 0, 0, 1), entry(0x8000_0008, 0, 40, 0, 0)];
        assert_eq!(
            missing(&guest, &host),
            [
                "avx",
                "avx2",
                "cpuid 0x7.0 ebx bit 22",
                "46-bit physical addresses"
            ]
        );
        assert!(missing(&host, &guest).is_empty());
        assert!(missing(&guest, &guest).is_empty());
    }

    #[test]
    fn no_word_has_more_names_than_bits() {
        for word in &WORDS {
            assert!(word.names.split(' ').count() <= 32, "{:#x}", word.function);
        }
        let sse42 = &WORDS[1].names.split(' ').nth(20).unwrap();
        assert_eq!(*sse42, "sse4_2");
        assert_eq!(WORDS[2].names.split(' ').nth(31).unwrap(), "avx512vl");
        assert_eq!(WORDS[4].names.split(' ').nth(31).unwrap(), "ssbd");
        assert_eq!(WORDS[0].names.split(' ').nth(26).unwrap(), "sse2");
    }
}
