//! A CPU as a file, and what several have in common: `ferry doctor --cpu-json` and `--baseline`.

use serde::{Deserialize, Serialize};

use super::super::features::{FeatureSet, UnknownFeature, find_leaf};
use super::super::fit;
use super::super::requires::quoted;
use super::CpuError;
use crate::kvm::{CpuidEntry, Host};

/// The current value of [`CpuFile::schema`].
const SCHEMA: u32 = 1;
/// What a file of a CPU is believed to have, in bytes: 600 names are 8 KiB.
const MOST_BYTES: u64 = 1 << 20;
/// The feature by which there is IA32_ARCH_CAPABILITIES.
const ARCH_CAPABILITIES: &str = "arch_capabilities";

/// What a guest can be given by one host, or by each of several.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuFile {
    /// Version of this object.
    pub schema: u32,
    /// The maker, as CPUID says it.
    pub vendor: String,
    /// The processors' names, for people.
    pub models: Vec<String>,
    /// The features, by the names of `/proc/cpuinfo`.
    pub features: Vec<String>,
    /// Bits of IA32_ARCH_CAPABILITIES, by name; `null` where there is no such register.
    pub arch_capabilities: Option<Vec<String>>,
    /// Bits of a physical address.
    pub physical_bits: u32,
}

/// A [`CpuFile`] whose names are known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Baseline {
    pub vendor: String,
    pub models: Vec<String>,
    pub features: FeatureSet,
    pub arch_capabilities: Option<u64>,
    pub physical_bits: u32,
}

impl CpuFile {
    /// What a guest of this host is given by default. `model` is the processor's name.
    ///
    /// # Errors
    /// KVM cannot be used or asked.
    pub fn of_host(model: &str) -> Result<Self, CpuError> {
        let host = Host::open()?;
        let list = host.guest_cpuid()?;
        let features = FeatureSet::of(&list);
        let arch = host.arch_capabilities(&list);
        let baseline = Baseline {
            vendor: vendor(&list),
            models: vec![model.to_owned()],
            features,
            arch_capabilities: arch.filter(|_| features.has(ARCH_CAPABILITIES)),
            physical_bits: physical_bits(&list),
        };
        Ok(baseline.into())
    }

    /// Reads a file of a CPU.
    ///
    /// # Errors
    /// [`CpuError`]: it cannot be read, is of a newer ferry, or is damaged.
    pub fn read(path: &std::path::Path) -> Result<Self, CpuError> {
        use std::io::Read;
        let failed = |source| CpuError::Read {
            path: path.to_owned(),
            source,
        };
        let file = std::fs::File::open(path).map_err(failed)?;
        let mut text = Vec::new();
        file.take(MOST_BYTES + 1)
            .read_to_end(&mut text)
            .map_err(failed)?;
        let damaged = |why: String| CpuError::Damaged {
            path: path.to_owned(),
            why,
        };
        if text.len() as u64 > MOST_BYTES {
            return Err(damaged("it is too long".into()));
        }
        let read = Self::parse(&text).and_then(|file| {
            Baseline::try_from(&file)?;
            Ok(file)
        });
        read.map_err(damaged)
    }

    fn parse(text: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Head {
            schema: u32,
        }
        let json = |error: serde_json::Error| quoted(&error.to_string());
        let Head { schema } = serde_json::from_slice(text).map_err(json)?;
        if schema != SCHEMA {
            return Err(format!(
                "it has schema {schema}, and this ferry reads schema {SCHEMA}"
            ));
        }
        serde_json::from_slice(text).map_err(json)
    }

    /// What all of these hosts have: a guest with that can move between any two of them. The order
    /// does not matter.
    ///
    /// # Errors
    /// [`CpuError`]: there are none, or their makers differ.
    pub fn baseline(files: &[Self]) -> Result<Self, CpuError> {
        let parsed = files.iter().map(|file| {
            let parsed = Baseline::try_from(file);
            parsed.map_err(CpuError::Names)
        });
        let mut parsed = parsed.collect::<Result<Vec<_>, _>>()?.into_iter();
        let first = parsed.next().ok_or(CpuError::NoFiles)?;
        let mut common = parsed.try_fold(first, Baseline::common)?;
        common.features = common.features.closed();
        // The register is there by a feature: neither is without the other.
        if !common.features.has(ARCH_CAPABILITIES) {
            common.arch_capabilities = None;
        }
        if common.arch_capabilities.is_none() {
            common.features = common.features.without(only(ARCH_CAPABILITIES));
        }
        common.models.sort();
        common.models.dedup();
        Ok(common.into())
    }
}

impl Baseline {
    fn common(self, other: Self) -> Result<Self, CpuError> {
        if self.vendor != other.vendor {
            return Err(CpuError::Vendors {
                one: quoted(&self.vendor),
                other: quoted(&other.vendor),
            });
        }
        let arch_capabilities = match (self.arch_capabilities, other.arch_capabilities) {
            (Some(a), Some(b)) => Some(a & b | (a | b) & fit::WARNINGS),
            _ => None,
        };
        Ok(Self {
            vendor: self.vendor,
            models: [self.models, other.models].concat(),
            features: self.features.and(other.features),
            arch_capabilities,
            physical_bits: self.physical_bits.min(other.physical_bits),
        })
    }
}

fn only(name: &str) -> FeatureSet {
    FeatureSet::from_names([name]).unwrap_or_default()
}

impl TryFrom<&CpuFile> for Baseline {
    type Error = String;

    fn try_from(file: &CpuFile) -> Result<Self, String> {
        let features = FeatureSet::from_names(file.features.iter().map(String::as_str));
        let features = features.map_err(|UnknownFeature(name)| {
            format!(
                "it has a feature `{}` that this ferry does not know",
                quoted(&name)
            )
        })?;
        let bits = |names: &Vec<String>| {
            names.iter().try_fold(0, |all, name| {
                let bit = fit::capability(name).ok_or_else(|| {
                    format!(
                        "it has a bit `{}` of IA32_ARCH_CAPABILITIES that this ferry does not know",
                        quoted(name)
                    )
                })?;
                Ok::<u64, String>(all | bit)
            })
        };
        // Linux needs 36 bits; no x86-64 has more than 52.
        if !(32..=52).contains(&file.physical_bits) {
            return Err(format!(
                "physical addresses of {} bits cannot be",
                file.physical_bits
            ));
        }
        Ok(Self {
            vendor: file.vendor.clone(),
            models: file.models.clone(),
            features,
            arch_capabilities: file.arch_capabilities.as_ref().map(bits).transpose()?,
            physical_bits: file.physical_bits,
        })
    }
}

impl From<Baseline> for CpuFile {
    fn from(baseline: Baseline) -> Self {
        let names = |names: Vec<&str>| names.into_iter().map(str::to_owned).collect();
        Self {
            schema: SCHEMA,
            vendor: baseline.vendor,
            models: baseline.models,
            features: names(baseline.features.names()),
            arch_capabilities: baseline
                .arch_capabilities
                .map(|bits| names(fit::capability_names(bits))),
            physical_bits: baseline.physical_bits,
        }
    }
}

/// The maker: 12 letters of leaf 0; nothing where there is no such leaf.
pub(in crate::machine) fn vendor(list: &[CpuidEntry]) -> String {
    let Some(leaf) = find_leaf(list, 0, 0) else {
        return String::new();
    };
    let letters = [leaf.ebx, leaf.edx, leaf.ecx];
    let bytes: Vec<u8> = letters.iter().flat_map(|word| word.to_le_bytes()).collect();
    quoted(&String::from_utf8_lossy(&bytes))
}

/// Bits of a physical address.
pub(super) fn physical_bits(list: &[CpuidEntry]) -> u32 {
    find_leaf(list, 0x8000_0008, 0).map_or(36, |e| e.eax & 0xff)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn file(features: &[&str], arch: Option<&[&str]>) -> CpuFile {
        let owned = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
        CpuFile {
            schema: SCHEMA,
            vendor: "GenuineIntel".into(),
            models: vec!["a".into()],
            features: owned(features),
            arch_capabilities: arch.map(owned),
            physical_bits: 46,
        }
    }

    /// CPUs as there might be: any features at all.
    fn any_file() -> impl Strategy<Value = CpuFile> {
        let all = super::super::tests::all_features().names();
        let some = move |seed: u64| {
            let mut x = seed | 1;
            let mut next = move || {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                x
            };
            let kept = all.iter().filter(|_| next() % 8 != 0);
            kept.map(|name| (*name).to_owned()).collect::<Vec<_>>()
        };
        (any::<u64>(), any::<Option<u64>>(), 36u32..=52, "[a-c]").prop_map(
            move |(seed, arch, physical_bits, model)| CpuFile {
                schema: SCHEMA,
                vendor: "GenuineIntel".into(),
                models: vec![model],
                features: some(seed),
                arch_capabilities: arch.map(|bits| {
                    let names = fit::capability_names(bits);
                    names.into_iter().map(str::to_owned).collect()
                }),
                physical_bits,
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn a_baseline_is_in_each_host(files in prop::collection::vec(any_file(), 1..5)) {
            let common = CpuFile::baseline(&files).unwrap();
            let parsed = Baseline::try_from(&common).unwrap();
            for host in &files {
                let host = Baseline::try_from(host).unwrap();
                prop_assert!(parsed.features.without(host.features).is_empty());
                prop_assert!(parsed.physical_bits <= host.physical_bits);
                let promised = parsed.arch_capabilities.unwrap_or(0) & !fit::WARNINGS;
                prop_assert_eq!(promised & !host.arch_capabilities.unwrap_or(0), 0);
                // A fault that one host warns of is warned of.
                if let Some(bits) = parsed.arch_capabilities {
                    let warned = host.arch_capabilities.unwrap_or(0) & fit::WARNINGS;
                    prop_assert_eq!(warned & !bits, 0);
                }
            }
            prop_assert_eq!(parsed.features.closed(), parsed.features);
            // Idempotent, alone and with those that it is of.
            prop_assert_eq!(&CpuFile::baseline(std::slice::from_ref(&common)).unwrap(), &common);
            let mut again = files.clone();
            again.push(common.clone());
            prop_assert_eq!(&CpuFile::baseline(&again).unwrap(), &common);
            let backwards: Vec<_> = files.iter().rev().cloned().collect();
            prop_assert_eq!(&CpuFile::baseline(&backwards).unwrap(), &common);
            // By way of a file.
            let text = serde_json::to_vec(&common).unwrap();
            prop_assert_eq!(CpuFile::parse(&text).unwrap(), common);
        }
    }

    #[test]
    fn faults_of_either_host_are_told() {
        let caps = ["arch_capabilities"];
        let a = file(&caps, Some(&["RDCL_NO", "MDS_NO", "RSBA"]));
        let b = file(&caps, Some(&["RDCL_NO", "RRSBA"]));
        let common = CpuFile::baseline(&[a.clone(), b]).unwrap();
        let names = common.arch_capabilities.unwrap();
        assert_eq!(names, ["RDCL_NO", "RSBA", "RRSBA"]);
        // A host without the register: no guest asks for it.
        let common = CpuFile::baseline(&[a, file(&["fpu"], None)]).unwrap();
        assert_eq!(common.arch_capabilities, None);
        assert!(common.features.is_empty());
    }

    #[test]
    fn what_has_no_baseline_is_refused() {
        let other = CpuFile {
            vendor: "Authentic\nAMD".into(),
            ..file(&["fpu"], None)
        };
        let error = CpuFile::baseline(&[file(&["fpu"], None), other]).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("GenuineIntel") && text.contains("Authentic?AMD"),
            "{text}"
        );
        assert!(matches!(CpuFile::baseline(&[]), Err(CpuError::NoFiles)));
    }

    #[test]
    fn damaged_files_say_what_is_wrong() {
        let good = serde_json::to_value(file(&["fpu"], Some(&["MDS_NO"]))).unwrap();
        for (place, value, expected) in [
            ("/schema", json!(2), "schema 2"),
            ("/features/0", json!("avx1024"), "`avx1024`"),
            ("/arch_capabilities/0", json!("X\u{7}"), "`X?`"),
            ("/physical_bits", json!(64), "64 bits"),
            ("/vendor", json!(null), "null"),
            ("", json!([1]), "invalid length"),
            ("", json!({"schema": 1}), "vendor"),
            ("", json!({"schema": 1, "colour": 2}), "colour"),
        ] {
            let mut bad = good.clone();
            *bad.pointer_mut(place).unwrap() = value;
            let text = serde_json::to_vec(&bad).unwrap();
            let parsed = CpuFile::parse(&text).and_then(|f| Baseline::try_from(&f).map(drop));
            let text = parsed.unwrap_err();
            assert!(text.contains(expected), "{place}: {text}");
        }
        assert!(CpuFile::parse(b"{\"schema\":1,\"vendor\":\"Ge").is_err());
        assert!(CpuFile::parse(&[b'['; 100_000]).is_err());
    }
}
