//! The levels of the x86-64 psABI (System V ABI, AMD64 supplement, "Micro-Architecture Levels").
//!
//! A level is what programs may use. What a kernel or KVM needs beside it is given where the host
//! has it: every processor of the level does. So are the switches against faults of processors: a
//! guest that does not see them is open to those.

/// A level.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Level {
    pub name: &'static str,
    /// Features that the host must have, beside those of the levels before.
    pub needs: &'static str,
    /// Features that are given where the host has them, beside those of the levels before.
    pub keeps: &'static str,
}

/// In order: each has those before it.
const LEVELS: [Level; 4] = [
    Level {
        name: "x86-64",
        needs: "fpu cx8 cmov mmx fxsr sse sse2 syscall lm",
        keeps: "vme de pse tsc msr pae mce apic sep mtrr pge mca pat pse36 clflush nx x2apic hypervisor \
                tsc_deadline_timer tsc_adjust \
                spec_ctrl stibp ssbd md_clear flush_l1d srbds_ctrl arch_capabilities intel_psfd ipred_ctrl \
                rrsba_ctrl ddpd_u bhi_ctrl mcdt_no amd_ibpb amd_ibrs amd_stibp amd_stibp_always_on amd_ssbd \
                virt_ssbd amd_ssb_no amd_psfd autoibrs lfence_rdtsc null_sel_clr_base \
                kvmclock kvm_nopiodelay kvmclock2 kvm_asyncpf kvm_steal_time kvm_pv_eoi kvm_pv_unhalt \
                kvm_pv_tlb_flush kvm_asyncpf_vmexit kvm_pv_ipi kvm_poll_control kvm_pv_sched_yield \
                kvmclock_stable",
    },
    Level {
        name: "x86-64-v2",
        needs: "cx16 lahf_lm popcnt sse3 ssse3 sse4_1 sse4_2",
        keeps: "rdtscp",
    },
    Level {
        name: "x86-64-v3",
        needs: "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave xstate_x87 xstate_sse xstate_avx",
        // Haswell and Zen have them.
        keeps: "aes pclmulqdq rdrand smep fsgsbase xsaveopt pdpe1gb",
    },
    Level {
        name: "x86-64-v4",
        needs: "avx512f avx512bw avx512cd avx512dq avx512vl xstate_opmask xstate_zmm_hi256 xstate_hi16_zmm",
        // Skylake's server processors and Zen 4 have them.
        keeps: "adx clflushopt clwb erms invpcid pcid pku rdseed smap xgetbv1 xsavec xstate_pkru",
    },
];

impl Level {
    /// The level of this name; the first is not offered: no host is below it.
    pub fn named(name: &str) -> Option<&'static Self> {
        LEVELS[1..].iter().find(|level| level.name == name)
    }

    /// The levels' names.
    pub fn names() -> impl Iterator<Item = &'static str> {
        LEVELS[1..].iter().map(|level| level.name)
    }

    /// This level and those before it.
    fn all(&'static self) -> impl Iterator<Item = &'static Self> {
        let last = LEVELS.iter().position(|level| level == self).unwrap_or(0);
        LEVELS[..=last].iter()
    }

    /// What the host must have.
    pub fn needed(&'static self) -> impl Iterator<Item = &'static str> {
        self.all().flat_map(|level| level.needs.split_whitespace())
    }

    /// What is given where the host has it.
    pub fn kept(&'static self) -> impl Iterator<Item = &'static str> {
        self.all().flat_map(|level| level.keeps.split_whitespace())
    }
}
