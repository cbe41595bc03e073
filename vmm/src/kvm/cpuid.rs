//! What CPU a guest sees.
//!
//! Intel SDM vol. 2A and AMD APM vol. 3, "CPUID". One list is made for the whole machine when it is
//! first built; it travels with the machine, and each vCPU's list is a pure function of it and of
//! the vCPU's number. So a guest sees the same CPU on every host it comes to.

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use serde::{Deserialize, Serialize};

/// The most entries a list can have (KVM's own limit).
pub const MAX_CPUID_ENTRIES: usize = KVM_MAX_CPUID_ENTRIES;

/// One answer of the CPUID instruction; `kvm_cpuid_entry2` in a form that travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidEntry {
    /// EAX of the question.
    pub function: u32,
    /// ECX of the question.
    pub index: u32,
    /// KVM_CPUID_FLAG_*: whether `index` matters.
    pub flags: u32,
    /// EAX of the answer.
    pub eax: u32,
    /// EBX of the answer.
    pub ebx: u32,
    /// ECX of the answer.
    pub ecx: u32,
    /// EDX of the answer.
    pub edx: u32,
}

impl From<&kvm_cpuid_entry2> for CpuidEntry {
    fn from(e: &kvm_cpuid_entry2) -> Self {
        Self {
            function: e.function,
            index: e.index,
            flags: e.flags,
            eax: e.eax,
            ebx: e.ebx,
            ecx: e.ecx,
            edx: e.edx,
        }
    }
}

impl From<&CpuidEntry> for kvm_cpuid_entry2 {
    fn from(e: &CpuidEntry) -> Self {
        Self {
            function: e.function,
            index: e.index,
            flags: e.flags,
            eax: e.eax,
            ebx: e.ebx,
            ecx: e.ecx,
            edx: e.edx,
            ..Self::default()
        }
    }
}

const LEAF1_ECX_VMX: u32 = 1 << 5;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_OSXSAVE: u32 = 1 << 27;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const EXT1_ECX_SVM: u32 = 1 << 2;
const EXT1_ECX_PERFCTR_CORE: u32 = 1 << 23;

/// The list for a machine, from what the host supports.
pub(super) fn for_guest(mut supported: Vec<CpuidEntry>, tsc_deadline: bool) -> Vec<CpuidEntry> {
    supported.retain(|e| {
        !matches!(
            e.function,
            // V2 extended topology: without it, guests fall back to 0xB, which is filled in below.
            0x1f
            // SVM features: nested virtualisation is not offered, see below.
            | 0x8000_000a
            // AMD performance monitoring V2: as 0xA.
            | 0x8000_0022
        )
    });
    for e in &mut supported {
        match e.function {
            1 => {
                // A nested hypervisor's state is not migrated, so the guest is not offered one.
                // OSXSAVE mirrors CR4 and KVM keeps it. The deadline timer is never in the
                // supported list, since it needs the in-kernel APIC, which is there.
                e.ecx &= !(LEAF1_ECX_VMX | LEAF1_ECX_OSXSAVE | LEAF1_ECX_TSC_DEADLINE);
                e.ecx |= LEAF1_ECX_HYPERVISOR;
                if tsc_deadline {
                    e.ecx |= LEAF1_ECX_TSC_DEADLINE;
                }
            }
            // Performance counters count the events of one host's CPU: they do not travel.
            0xa => (e.eax, e.ebx, e.ecx, e.edx) = (0, 0, 0, 0),
            0x8000_0001 => e.ecx &= !(EXT1_ECX_SVM | EXT1_ECX_PERFCTR_CORE),
            _ => {}
        }
    }
    supported
}

/// The list of vCPU number `id`: packages of `count` vCPUs each, a core of its own for each vCPU.
/// Where there is more than one package, `count` is a power of two: packages are told apart by the
/// upper bits of the APIC id.
pub(super) fn for_vcpu(list: &[CpuidEntry], id: u32, count: u32) -> Option<CpuId> {
    let mut entries: Vec<CpuidEntry> = list
        .iter()
        // Made anew below.
        .filter(|e| e.function != 0xb)
        .copied()
        .collect();
    let basic_max = list.iter().find(|e| e.function == 0).map_or(0, |e| e.eax);
    let id_bits = u32::BITS - count.saturating_sub(1).leading_zeros();
    for e in &mut entries {
        match e.function {
            1 => {
                let logical = count.next_power_of_two().min(255);
                e.ebx = (e.ebx & 0xffff) | (logical << 16) | (id << 24);
                // HTT: the field above is valid.
                e.edx = if count > 1 {
                    e.edx | 1 << 28
                } else {
                    e.edx & !(1 << 28)
                };
            }
            // Intel's cache leaf: bits 31:26 cores of the package - 1, 25:14 sharers of this cache
            // - 1. All vCPUs share the last level; the others are private.
            4 if e.eax & 0x1f != 0 => {
                let level = e.eax >> 5 & 7;
                let sharers = if level >= 3 { count - 1 } else { 0 };
                e.eax =
                    (e.eax & 0x3fff) | (sharers.min(0xfff) << 14) | ((count - 1).min(0x3f) << 26);
            }
            // AMD: number of cores - 1 and width of the core's number in the APIC id.
            0x8000_0008 => e.ecx = (e.ecx & !0xf0ff) | (count - 1).min(0xff) | (id_bits << 12),
            0x8000_001d if e.eax & 0x1f != 0 => {
                let level = e.eax >> 5 & 7;
                let sharers = if level >= 3 { count - 1 } else { 0 };
                e.eax = (e.eax & 0x3fff) | (sharers.min(0xfff) << 14);
            }
            // AMD: extended APIC id, core id with one thread each, node 0 of one.
            0x8000_001e => (e.eax, e.ebx, e.ecx) = (id, id & 0xff, 0),
            _ => {}
        }
    }
    if basic_max >= 0xb {
        let level = |index, eax, ebx, kind: u32| CpuidEntry {
            function: 0xb,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax,
            ebx,
            ecx: index | kind << 8,
            edx: id,
        };
        // Level types: 1 thread, 2 core, 0 end.
        entries.push(level(0, 0, 1, 1));
        entries.push(level(1, id_bits, count, 2));
        entries.push(level(2, 0, 0, 0));
    }
    let entries: Vec<kvm_cpuid_entry2> = entries.iter().map(kvm_cpuid_entry2::from).collect();
    CpuId::from_entries(&entries).ok()
}

#[cfg(test)]
impl CpuidEntry {
    /// A leaf whose registers are all alike.
    pub(crate) const fn uniform(function: u32, index: u32, register: u32) -> Self {
        Self {
            function,
            index,
            flags: 0,
            eax: register,
            ebx: register,
            ecx: register,
            edx: register,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32) -> CpuidEntry {
        CpuidEntry::uniform(function, index, 0)
    }

    #[test]
    fn guests_see_no_nested_virtualisation_and_no_counters() {
        let mut one = entry(1, 0);
        one.ecx = LEAF1_ECX_VMX | LEAF1_ECX_OSXSAVE;
        let mut pmu = entry(0xa, 0);
        pmu.eax = 5;
        let list = for_guest(vec![one, pmu, entry(0x1f, 0), entry(0x8000_000a, 0)], true);
        assert_eq!(list.len(), 2);
        assert_eq!(list[0].ecx, LEAF1_ECX_HYPERVISOR | LEAF1_ECX_TSC_DEADLINE);
        assert_eq!(list[1].eax, 0);
    }

    #[test]
    fn every_vcpu_has_its_own_apic_id() {
        let mut zero = entry(0, 0);
        zero.eax = 0x10;
        let list = [zero, entry(1, 0), entry(0xb, 0), entry(0x8000_001e, 0)];
        let cpuid = for_vcpu(&list, 5, 6).unwrap();
        let find = |f, i| {
            *cpuid
                .as_slice()
                .iter()
                .find(|e| e.function == f && e.index == i)
                .unwrap()
        };
        assert_eq!(find(1, 0).ebx >> 24, 5);
        assert_eq!(find(1, 0).ebx >> 16 & 0xff, 8);
        assert_eq!(find(0xb, 0).edx, 5);
        assert_eq!(
            (find(0xb, 1).eax, find(0xb, 1).ebx, find(0xb, 1).ecx),
            (3, 6, 0x201)
        );
        assert_eq!(find(0x8000_001e, 0).eax, 5);
    }

    /// As a kernel tells them (SDM vol. 3A, 9.9): the APIC id without the package's own bits.
    #[test]
    fn packages_are_told_apart() {
        let mut zero = entry(0, 0);
        zero.eax = 0x10;
        let mut cache = entry(4, 3);
        cache.eax = 3 << 5 | 1;
        let list = [
            zero,
            entry(1, 0),
            cache,
            entry(0xb, 0),
            entry(0x8000_0008, 0),
        ];
        let package = |id, count| {
            let cpuid = for_vcpu(&list, id, count).unwrap();
            let find = |f, i| {
                let entries = cpuid.as_slice().iter();
                *entries
                    .clone()
                    .find(|e| e.function == f && e.index == i)
                    .unwrap()
            };
            let (core, amd) = (find(0xb, 1), find(0x8000_0008, 0));
            assert_eq!(core.eax, amd.ecx >> 12 & 0xf);
            assert_eq!(
                (core.edx, core.ebx, (amd.ecx & 0xff) + 1),
                (id, count, count)
            );
            let sharers = (find(4, 3).eax >> 14 & 0xfff) + 1;
            (id >> core.eax, id / sharers.next_power_of_two())
        };
        for (count, wanted) in [
            (1, [0, 1, 2, 3, 4, 5]),
            (2, [0, 0, 1, 1, 2, 2]),
            (6, [0; 6]),
        ] {
            for (id, wanted) in (0..).zip(wanted) {
                assert_eq!(package(id, count), (wanted, wanted), "{id} of {count}");
            }
        }
    }

    #[test]
    fn too_many_entries_are_refused() {
        let list = vec![entry(2, 0); MAX_CPUID_ENTRIES + 1];
        assert!(for_vcpu(&list, 0, 1).is_none());
    }
}
