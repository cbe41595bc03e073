//! Leaves of CPUID that follow from which features there are.

use super::super::features::FeatureSet;
use crate::kvm::CpuidEntry;

/// Leaves that describe a feature: without it they are not there. Those without a name are of
/// features that no guest of a masked CPU is given.
const LEAVES: [(u32, Option<&str>); 9] = [
    (0x12, Some("sgx")),
    (0x14, Some("intel_pt")),
    // Key Locker, LBR, performance monitoring, AVX10, SEV.
    (0x19, None),
    (0x1c, Some("arch_lbr")),
    (0x1d, Some("amx_tile")),
    (0x1e, Some("amx_tile")),
    (0x23, None),
    (0x24, None),
    (0x8000_001f, None),
];

/// Components of IA32_XSS by number, and the features that use them.
const SUPERVISOR: [(u32, &str); 4] = [
    (8, "intel_pt"),
    (11, "shstk"),
    (12, "shstk"),
    (15, "arch_lbr"),
];

/// Bytes of the legacy area and the header of XSAVE, which are always there.
const XSAVE_HEAD: u32 = 576;

/// The CPU with these features only, and at most so many bits of a physical address.
pub(super) fn masked(
    mut list: Vec<CpuidEntry>,
    features: FeatureSet,
    physical_bits: Option<u32>,
) -> Vec<CpuidEntry> {
    features.mask(&mut list);
    list.retain(|entry| {
        let leaf = LEAVES.iter().find(|(leaf, _)| *leaf == entry.function);
        leaf.is_none_or(|(_, feature)| feature.is_some_and(|name| features.has(name)))
    });
    for entry in list.iter_mut().filter(|e| e.function == 0x8000_0008) {
        let bits = (entry.eax & 0xff).min(physical_bits.unwrap_or(u32::MAX));
        entry.eax = entry.eax & !0xff | bits;
    }
    lay_out_xsave(&mut list, features);
    list
}

/// Leaf 0xD: no component, and no byte of room, for what is not there.
fn lay_out_xsave(list: &mut Vec<CpuidEntry>, features: FeatureSet) {
    if !features.has("xsave") {
        list.retain(|entry| entry.function != 0xd);
        return;
    }
    let leaf = |list: &[CpuidEntry], index| {
        let entry = list.iter().find(|e| (e.function, e.index) == (0xd, index));
        entry.copied()
    };
    // The mask has left of EAX what it may; components above 31 do not exist.
    let user = leaf(list, 0).map_or(0, |entry| entry.eax);
    let supervisor = SUPERVISOR.iter();
    let supervisor = supervisor.filter(|(_, feature)| {
        features.has("xsaves")
            && (features.has(feature) || *feature == "shstk" && features.has("ibt"))
    });
    let supervisor = supervisor.fold(0, |all, (bit, _)| all | 1 << bit);
    let kept = |index: u32| index < 2 || index < 32 && (user | supervisor) & 1 << index != 0;
    list.retain(|entry| entry.function != 0xd || kept(entry.index));
    // In the standard format each component has a fixed place.
    let ends = (2..32).filter(|bit| user & 1 << bit != 0);
    let ends = ends.filter_map(|bit| leaf(list, bit).map(|e| e.eax.saturating_add(e.ebx)));
    let size = ends.fold(XSAVE_HEAD, u32::max);
    for entry in list.iter_mut().filter(|entry| entry.function == 0xd) {
        match entry.index {
            // EBX is what XCR0 enables now: KVM keeps it.
            0 => (entry.ebx, entry.ecx, entry.edx) = (entry.ebx.min(size), size, 0),
            1 => (entry.ecx, entry.edx) = (entry.ecx & supervisor, 0),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> CpuidEntry {
        CpuidEntry {
            function,
            index,
            flags: 1,
            eax,
            ebx,
            ecx,
            edx,
        }
    }

    /// Leaf 0xD of a processor with AVX-512, protection keys, CET and AMX.
    fn host() -> Vec<CpuidEntry> {
        vec![
            entry(1, 0, [0, 0, u32::MAX, u32::MAX]),
            entry(7, 0, [2, u32::MAX, u32::MAX, u32::MAX]),
            entry(0xd, 0, [0x602e7, 11008, 11008, 7]),
            entry(0xd, 1, [0x1f, 11008, 0x1900, 3]),
            entry(0xd, 2, [256, 576, 0, 0]),
            entry(0xd, 5, [64, 1088, 0, 0]),
            entry(0xd, 6, [512, 1152, 0, 0]),
            entry(0xd, 7, [1024, 1664, 0, 0]),
            entry(0xd, 9, [8, 2688, 0, 0]),
            entry(0xd, 11, [16, 0, 1, 0]),
            entry(0xd, 12, [24, 0, 1, 0]),
            entry(0xd, 17, [64, 2752, 2, 0]),
            entry(0xd, 18, [8192, 2816, 6, 0]),
            entry(0x14, 0, [1, 1, 1, 1]),
            entry(0x1d, 0, [1, 0, 0, 0]),
            entry(0x8000_0008, 0, [0x3034, 0, 0, 0]),
        ]
    }

    fn without(names: &[&str]) -> Vec<CpuidEntry> {
        let removed = FeatureSet::from_names(names.iter().copied()).unwrap();
        let features = FeatureSet::of(&host()).without(removed).closed();
        masked(host(), features, Some(46))
    }

    fn xsave(list: &[CpuidEntry]) -> Vec<u32> {
        let entries = list.iter().filter(|e| e.function == 0xd);
        entries.map(|e| e.index).collect()
    }

    #[test]
    fn the_save_area_shrinks_with_what_is_masked() {
        let whole = without(&[]);
        assert_eq!(xsave(&whole), [0, 1, 2, 5, 6, 7, 9, 11, 12, 17, 18]);
        let size = |list: &[CpuidEntry]| {
            let leaf = list.iter().find(|e| (e.function, e.index) == (0xd, 0));
            leaf.map(|e| (e.eax, e.ecx, e.edx)).unwrap()
        };
        assert_eq!(size(&whole), (0x602e7, 11008, 0));
        let no_amx = without(&["amx_tile"]);
        assert_eq!(size(&no_amx), (0x2e7, 2696, 0));
        assert!(!no_amx.iter().any(|e| e.function == 0x1d));
        // The place of protection keys stays where the processor has it.
        let avx2 = without(&["amx_tile", "avx512f"]);
        assert_eq!(size(&avx2), (0x207, 2696, 0));
        assert_eq!(xsave(&avx2), [0, 1, 2, 9, 11, 12]);
        let avx = without(&["amx_tile", "avx512f", "pku", "shstk", "ibt"]);
        assert_eq!(size(&avx), (7, 832, 0));
        assert_eq!(xsave(&avx), [0, 1, 2]);
        let supervisor = |list: &[CpuidEntry]| {
            let leaf = list.iter().find(|e| (e.function, e.index) == (0xd, 1));
            leaf.unwrap().ecx
        };
        assert_eq!((supervisor(&whole), supervisor(&avx)), (0x1900, 0x100));
        let sse = without(&["avx", "amx_tile", "pku", "shstk", "ibt"]);
        assert_eq!(size(&sse), (3, 576, 0));
        assert_eq!(xsave(&without(&["xsave"])), [0; 0]);
    }

    #[test]
    fn leaves_go_with_their_feature_and_addresses_get_shorter() {
        let list = without(&["intel_pt"]);
        assert!(!list.iter().any(|e| e.function == 0x14));
        let width = list.iter().find(|e| e.function == 0x8000_0008).unwrap();
        assert_eq!(width.eax, 0x302e);
        let wider = masked(host(), FeatureSet::of(&host()), Some(57));
        assert_eq!(wider.last().unwrap().eax, 0x3034);
    }
}
