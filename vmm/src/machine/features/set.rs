//! A set of CPU features, by name.

use super::{Reg, WORDS, Word};
use crate::kvm::CpuidEntry;

/// What goes with what: the first is of no use, or a lie, without the second. The pairs that name
/// each other keep what XCR0 can enable (Intel SDM vol. 1 ch. 13) and who uses it together.
const DEPENDS: &[(&str, &str)] = &[
    ("sse2", "sse"),
    ("sse3", "sse2"),
    ("ssse3", "sse3"),
    ("sse4_1", "ssse3"),
    ("sse4_2", "sse4_1"),
    ("sse4a", "sse3"),
    ("aes", "sse2"),
    ("pclmulqdq", "sse2"),
    ("xsaveopt", "xsave"),
    ("xsavec", "xsave"),
    ("xgetbv1", "xsave"),
    ("xsaves", "xsavec"),
    ("xfd", "xsave"),
    ("xstate_x87", "xsave"),
    ("xstate_sse", "xsave"),
    ("xstate_avx", "avx"),
    ("avx", "xstate_avx"),
    ("avx", "xsave"),
    ("avx", "sse4_2"),
    ("avx2", "avx"),
    ("fma", "avx"),
    ("f16c", "avx"),
    ("xop", "avx"),
    ("fma4", "avx"),
    ("vaes", "avx"),
    ("vpclmulqdq", "avx"),
    ("sm3", "avx"),
    ("sm4", "avx2"),
    ("sha512", "avx2"),
    ("avx_vnni", "avx2"),
    ("avx_ifma", "avx2"),
    ("avx_ne_convert", "avx2"),
    ("avx_vnni_int8", "avx2"),
    ("avx_vnni_int16", "avx2"),
    ("avx512f", "avx2"),
    ("avx512f", "xstate_opmask"),
    ("avx512f", "xstate_zmm_hi256"),
    ("avx512f", "xstate_hi16_zmm"),
    ("xstate_opmask", "avx512f"),
    ("xstate_zmm_hi256", "avx512f"),
    ("xstate_hi16_zmm", "avx512f"),
    ("avx512dq", "avx512f"),
    ("avx512ifma", "avx512f"),
    ("avx512pf", "avx512f"),
    ("avx512er", "avx512f"),
    ("avx512cd", "avx512f"),
    ("avx512bw", "avx512f"),
    ("avx512vl", "avx512f"),
    ("avx512vbmi", "avx512f"),
    ("avx512_vbmi2", "avx512f"),
    ("avx512_vnni", "avx512f"),
    ("avx512_bitalg", "avx512f"),
    ("avx512_vpopcntdq", "avx512f"),
    ("avx512_4vnniw", "avx512f"),
    ("avx512_4fmaps", "avx512f"),
    ("avx512_vp2intersect", "avx512f"),
    ("avx512_bf16", "avx512f"),
    ("avx512_fp16", "avx512bw"),
    ("mpx", "xsave"),
    ("mpx", "xstate_bndregs"),
    ("mpx", "xstate_bndcsr"),
    ("xstate_bndregs", "mpx"),
    ("xstate_bndcsr", "mpx"),
    ("pku", "xsave"),
    ("pku", "xstate_pkru"),
    ("xstate_pkru", "pku"),
    ("amx_tile", "xsave"),
    ("amx_tile", "xstate_xtilecfg"),
    ("amx_tile", "xstate_xtiledata"),
    ("xstate_xtilecfg", "amx_tile"),
    ("xstate_xtiledata", "amx_tile"),
    ("amx_bf16", "amx_tile"),
    ("amx_int8", "amx_tile"),
    ("amx_fp16", "amx_tile"),
    ("amx_complex", "amx_tile"),
    ("shstk", "xsaves"),
    ("ibt", "xsaves"),
    ("invpcid", "pcid"),
    ("x2apic", "apic"),
    ("tsc_deadline_timer", "apic"),
];

/// Bits of leaf 0x8000_0001's EDX that repeat those of leaf 1's (AMD APM vol. 3, appendix E).
const REPEATED: u32 = 0x0183_f3ff;

/// A set of the features that have a name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::machine) struct FeatureSet([u32; WORDS.len()]);

/// A name that no feature has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::machine) struct UnknownFeature(pub String);

impl FeatureSet {
    /// The features that a CPU has.
    pub fn of(list: &[CpuidEntry]) -> Self {
        let mut set = Self::default();
        for (bits, word) in set.0.iter_mut().zip(&WORDS) {
            *bits = super::value(list, word) & named(word);
        }
        set
    }

    /// The features of these names.
    pub fn from_names<'a>(
        names: impl IntoIterator<Item = &'a str>,
    ) -> Result<Self, UnknownFeature> {
        let mut set = Self::default();
        for name in names {
            let (at, bit) = find(name).ok_or_else(|| UnknownFeature(name.to_owned()))?;
            set.0[at] |= bit;
        }
        Ok(set)
    }

    /// Their names, in the order of CPUID.
    pub fn names(self) -> Vec<&'static str> {
        let words = self.0.iter().zip(&WORDS);
        let names = words.flat_map(|(bits, word)| {
            let all = (0u32..).zip(word.names.split(' '));
            all.filter(move |(bit, _)| bits & (1 << bit) != 0)
        });
        names.map(|(_, name)| name).collect()
    }

    pub fn is_empty(self) -> bool {
        self.0.iter().all(|bits| *bits == 0)
    }

    /// Whether the feature of this name is in it.
    pub fn has(self, name: &str) -> bool {
        find(name).is_some_and(|(at, bit)| self.0[at] & bit != 0)
    }

    /// Those of both.
    pub fn and(self, other: Self) -> Self {
        self.combine(other, |a, b| a & b)
    }

    /// Those of either.
    pub fn or(self, other: Self) -> Self {
        self.combine(other, |a, b| a | b)
    }

    /// These without `other`.
    pub fn without(self, other: Self) -> Self {
        self.combine(other, |a, b| a & !b)
    }

    fn combine(mut self, other: Self, how: impl Fn(u32, u32) -> u32) -> Self {
        for (bits, other) in self.0.iter_mut().zip(other.0) {
            *bits = how(*bits, other);
        }
        self
    }

    /// Without those that are of no use without another that is not there.
    pub fn closed(mut self) -> Self {
        loop {
            let lost = DEPENDS.iter();
            let lost = lost.filter(|(feature, needs)| self.has(feature) && !self.has(needs));
            let lost = lost.filter_map(|(feature, _)| find(feature));
            let before = self;
            for (at, bit) in lost.collect::<Vec<_>>() {
                self.0[at] &= !bit;
            }
            if self == before {
                return self;
            }
        }
    }

    /// Takes every feature that is not in the set from a CPU, those without a name too.
    pub fn mask(self, list: &mut [CpuidEntry]) {
        let leaf1 = self.bits(1, Reg::Edx);
        for entry in list {
            for (bits, word) in self.0.iter().zip(&WORDS) {
                if (entry.function, entry.index) != (word.function, word.index) {
                    continue;
                }
                let mut kept = bits | word.ignore;
                if (word.function, word.reg) == (0x8000_0001, Reg::Edx) {
                    kept |= leaf1 & REPEATED;
                }
                *super::register(entry, word.reg) &= kept;
            }
        }
    }

    /// The features of one register of a leaf without sub-leaves.
    fn bits(self, function: u32, reg: Reg) -> u32 {
        let mut words = self.0.iter().zip(&WORDS);
        let found = words.find(|(_, word)| (word.function, word.reg) == (function, reg));
        found.map_or(0, |(bits, _)| *bits)
    }
}

/// The bits that have a name and are features.
fn named(word: &Word) -> u32 {
    let names = (0u32..).zip(word.names.split(' '));
    let bits = names.filter(|(_, name)| *name != "_");
    bits.fold(0, |all, (bit, _)| all | 1 << bit) & !word.ignore
}

/// Where a feature is: which word, and its bit.
fn find(name: &str) -> Option<(usize, u32)> {
    WORDS.iter().enumerate().find_map(|(at, word)| {
        let mut names = (0u32..).zip(word.names.split(' '));
        let (bit, _) = names.find(|(_, known)| *known != "_" && *known == name)?;
        let bit = 1 << bit & named(word);
        (bit != 0).then_some((at, bit))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32) -> CpuidEntry {
        CpuidEntry::uniform(function, index, u32::MAX)
    }

    fn set(names: &[&str]) -> FeatureSet {
        FeatureSet::from_names(names.iter().copied()).unwrap()
    }

    #[test]
    fn every_name_is_of_one_feature() {
        let all = FeatureSet(WORDS.each_ref().map(named));
        let mut names = all.names();
        assert_eq!(set(&names), all);
        names.sort_unstable();
        let before = names.len();
        names.dedup();
        assert_eq!(names.len(), before);
        for (feature, needs) in DEPENDS {
            assert!(all.has(feature) && all.has(needs), "{feature} {needs}");
        }
        assert_eq!(all.closed(), all);
        // A mirror of a control register, a gap, and nothing.
        for name in ["osxsave", "_", "", "avx1024"] {
            let error = UnknownFeature(name.to_owned());
            assert_eq!(FeatureSet::from_names([name]), Err(error));
        }
    }

    #[test]
    fn what_depends_goes_too() {
        let all = FeatureSet(WORDS.each_ref().map(named));
        let without = all.without(set(&["avx"])).closed();
        for gone in [
            "avx2",
            "fma",
            "avx512f",
            "avx512_fp16",
            "xstate_avx",
            "xstate_hi16_zmm",
        ] {
            assert!(!without.has(gone), "{gone}");
        }
        for kept in [
            "xsave",
            "xstate_sse",
            "pku",
            "xstate_pkru",
            "sse4_2",
            "amx_tile",
        ] {
            assert!(without.has(kept), "{kept}");
        }
        let without = all.without(set(&["xsave"])).closed();
        let left = without.names();
        assert!(
            !left.iter().any(|name| name.starts_with("xstate")),
            "{left:?}"
        );
        assert!(!without.has("pku") && !without.has("shstk"), "{left:?}");
    }

    #[test]
    fn a_mask_takes_all_but_the_set() {
        let mut list = [entry(1, 0), entry(7, 0), entry(7, 1), entry(0x8000_0001, 0)];
        set(&["sse2", "fpu", "avx2", "lm"]).mask(&mut list);
        // HTT and OSXSAVE are no features: topology and CR4 decide about them.
        assert_eq!(list[0].edx, 1 << 26 | 1 | 1 << 28);
        assert_eq!(list[0].ecx, 1 << 27);
        // Family and model stay.
        assert_eq!((list[0].eax, list[0].ebx), (u32::MAX, u32::MAX));
        assert_eq!((list[1].ebx, list[1].ecx), (1 << 5, 1 << 4));
        assert_eq!(list[1].eax, u32::MAX);
        assert_eq!(list[2].eax, 0);
        // AMD's leaf repeats what leaf 1 says.
        assert_eq!(list[3].edx, 1 << 29 | 1);
        assert_eq!(FeatureSet::of(&list), set(&["sse2", "fpu", "avx2", "lm"]));
    }
}
