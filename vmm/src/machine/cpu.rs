//! Which CPU a new guest is given: the host's, a level of x86-64, or what several hosts have in
//! common.
//!
//! Only a new guest has a choice. It takes its CPU along ([`MachineDescription`]), and a host that
//! lacks any of it refuses the guest: what a running kernel has seen is never taken away.
//!
//! [`MachineDescription`]: super::MachineDescription

mod file;
mod layout;
mod levels;

pub use file::CpuFile;

use std::path::{Path, PathBuf};

use file::Baseline;
pub(super) use file::vendor;
use levels::Level;

use super::features::{FeatureSet, UnknownFeature};
use super::fit;
use super::requires::quoted;
use crate::kvm::{CpuidEntry, IoctlError, OpenError, Vcpu};

/// Why a guest cannot be given a CPU.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CpuError {
    /// Not a level.
    #[error("`{0}` is no level of x86-64 that ferry knows: give {names}, host, or a file of `ferry doctor --baseline`", names = level_names())]
    Level(String),
    /// No such file.
    #[error(
        "the CPU's file {} cannot be read: {source}; give host, {names}, or a file of `ferry doctor --baseline`",
        path.display(), names = level_names()
    )]
    Read {
        /// The file.
        path: PathBuf,
        /// The kernel's reason.
        source: std::io::Error,
    },
    /// Not what `ferry doctor` writes.
    #[error("{} is no file of a CPU that this ferry can read: {why}; make it with `ferry doctor --cpu-json` or `--baseline`", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// A name of a description that did not come from a file.
    #[error("the CPU's description cannot be understood: {0}")]
    Names(String),
    /// Nothing to compare.
    #[error("a baseline is of one host at least: give the files of `ferry doctor --cpu-json`")]
    NoFiles,
    /// Intel and AMD.
    #[error(
        "the hosts' processors are by {one} and by {other}: no guest moves between those; make a baseline for each"
    )]
    Vendors {
        /// Of the first.
        one: String,
        /// Of another.
        other: String,
    },
    /// What follows the name is not understood.
    #[error(
        "`{0}` takes no feature away: after the CPU's name, give names with a minus, such as host,-avx512f"
    )]
    Word(String),
    /// A feature to take away that there is not.
    #[error(
        "`{0}` is no CPU feature that ferry knows; names are those of /proc/cpuinfo, and of `ferry doctor --cpu-json`"
    )]
    Feature(String),
    /// The host has less.
    #[error(
        "the CPU {name} has features that this host does not have: {features}; take them away (--cpu {name},-FEATURE), or choose a lower level or a baseline that this host is in"
    )]
    Lacks {
        /// The CPU asked for.
        name: String,
        /// What is missing.
        features: String,
    },
    /// KVM cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// KVM did not tell.
    #[error("this host's CPU features could not be read: {0}")]
    Cpuid(#[from] IoctlError),
}

fn level_names() -> String {
    Level::names().collect::<Vec<_>>().join(", ")
}

/// The CPU that a new guest is to have.
#[derive(Debug, Clone, Default)]
pub struct CpuModel {
    name: String,
    base: Base,
    removed: FeatureSet,
}

#[derive(Debug, Clone, Default)]
enum Base {
    #[default]
    Host,
    Level(&'static Level),
    File(Box<Baseline>),
}

impl CpuModel {
    /// What `host`, `x86-64-v3` or the path of a [`CpuFile`] name, each with `,-feature` as often
    /// as wanted. A file is read.
    ///
    /// # Errors
    /// [`CpuError`].
    pub fn choose(text: &str) -> Result<Self, CpuError> {
        let mut words = text.split(',');
        let name = words.next().unwrap_or_default();
        let base = match name {
            "host" => Base::Host,
            level if level.starts_with("x86-64") => {
                let found = Level::named(level);
                Base::Level(found.ok_or_else(|| CpuError::Level(quoted(level)))?)
            }
            path => {
                let path = Path::new(path);
                let file = CpuFile::read(path)?;
                let damaged = |why| CpuError::Damaged {
                    path: path.to_owned(),
                    why,
                };
                Base::File(Box::new(Baseline::try_from(&file).map_err(damaged)?))
            }
        };
        let names = words.map(|word| {
            let name = word.strip_prefix('-').filter(|name| !name.is_empty());
            name.ok_or_else(|| CpuError::Word(quoted(word)))
        });
        let names = names.collect::<Result<Vec<_>, _>>()?;
        let removed = FeatureSet::from_names(names)
            .map_err(|UnknownFeature(name)| CpuError::Feature(quoted(&name)))?;
        Ok(Self {
            name: name.to_owned(),
            base,
            removed,
        })
    }

    /// Whether the guest is given all that the host has.
    #[must_use]
    pub fn is_host(&self) -> bool {
        matches!(self.base, Base::Host) && self.removed.is_empty()
    }

    /// The CPU, of what the host can give.
    pub(super) fn cpuid(&self, host: Vec<CpuidEntry>) -> Result<Vec<CpuidEntry>, CpuError> {
        if self.is_host() {
            return Ok(host);
        }
        let have = FeatureSet::of(&host);
        let known = |names: &mut dyn Iterator<Item = &'static str>| {
            FeatureSet::from_names(names).map_err(|UnknownFeature(name)| CpuError::Names(name))
        };
        let (needs, keeps, physical_bits) = match &self.base {
            Base::Host => (FeatureSet::default(), have, None),
            Base::Level(level) => {
                let needs = known(&mut level.needed())?;
                (needs, known(&mut level.kept())?, None)
            }
            Base::File(file) => {
                self.check_host(file, &host)?;
                (file.features, file.features, Some(file.physical_bits))
            }
        };
        let missing = needs.without(self.removed).without(have);
        if !missing.is_empty() {
            return Err(self.lacks(missing.names().join(", ")));
        }
        let features = needs.or(keeps).and(have).without(self.removed).closed();
        Ok(layout::masked(host, features, physical_bits))
    }

    /// A file's maker and addresses.
    fn check_host(&self, file: &Baseline, host: &[CpuidEntry]) -> Result<(), CpuError> {
        let vendor = file::vendor(host);
        if vendor != file.vendor {
            return Err(CpuError::Vendors {
                one: vendor,
                other: quoted(&file.vendor),
            });
        }
        if file.physical_bits > file::physical_bits(host) {
            return Err(self.lacks(format!("{}-bit physical addresses", file.physical_bits)));
        }
        Ok(())
    }

    /// IA32_ARCH_CAPABILITIES that the guest is to read instead of the host's; `None` for that.
    pub(super) fn arch_capabilities(&self, host: Option<u64>) -> Result<Option<u64>, CpuError> {
        let Base::File(file) = &self.base else {
            return Ok(None);
        };
        let wanted = file.arch_capabilities.filter(|_| {
            let removed = self.removed.has("arch_capabilities");
            file.features.has("arch_capabilities") && !removed
        });
        let missing = wanted.unwrap_or(0) & !host.unwrap_or(0) & !fit::WARNINGS;
        if missing != 0 {
            return Err(self.lacks(fit::capability_names(missing).join(", ")));
        }
        Ok(wanted)
    }

    /// Has the vCPUs read what they are to of IA32_ARCH_CAPABILITIES; returns what they read.
    pub(super) fn tell(&self, vcpus: &[Vcpu], host: Option<u64>) -> Result<Option<u64>, CpuError> {
        let Some(wanted) = self.arch_capabilities(host)? else {
            return Ok(host);
        };
        for vcpu in vcpus {
            if let Err(error) = vcpu.set_arch_capabilities(wanted) {
                tracing::warn!(
                    %error,
                    "the guest reads this host's IA32_ARCH_CAPABILITIES: its KVM takes no other"
                );
                return Ok(host);
            }
        }
        Ok(Some(wanted))
    }

    fn lacks(&self, features: String) -> CpuError {
        CpuError::Lacks {
            name: quoted(&self.name),
            features,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every feature that has a name.
    pub(super) fn all_features() -> FeatureSet {
        FeatureSet::of(&everything())
    }

    /// A processor that has everything.
    fn everything() -> Vec<CpuidEntry> {
        let entry = |function, index| CpuidEntry::uniform(function, index, u32::MAX);
        let mut list: Vec<CpuidEntry> = super::super::features::leaves()
            .map(|(function, index)| entry(function, index))
            .collect();
        list.dedup();
        let letters = |text: &[u8; 4]| u32::from_le_bytes(*text);
        let (ebx, edx, ecx) = (letters(b"Genu"), letters(b"ineI"), letters(b"ntel"));
        list.push(CpuidEntry {
            ebx,
            ecx,
            edx,
            ..entry(0, 0)
        });
        let width = list.iter_mut().find(|e| e.function == 0x8000_0008).unwrap();
        width.eax = 0x3934;
        list
    }

    fn given(text: &str) -> FeatureSet {
        let model = CpuModel::choose(text).unwrap();
        FeatureSet::of(&model.cpuid(everything()).unwrap())
    }

    #[test]
    fn levels_contain_those_below_them() {
        let levels: Vec<FeatureSet> = Level::names().map(given).collect();
        assert_eq!(levels.len(), 3);
        for pair in levels.windows(2) {
            assert!(pair[0].without(pair[1]).is_empty());
            assert!(!pair[1].without(pair[0]).is_empty());
        }
        for (level, has) in [(0, "sse4_2"), (1, "avx2"), (2, "avx512vl")] {
            assert!(levels[level].has(has), "{has}");
            assert!(level == 0 || !levels[level - 1].has(has), "{has}");
        }
        for level in &levels {
            assert!(!level.has("amx_tile") && !level.has("sgx") && level.has("spec_ctrl"));
            assert_eq!(level.closed(), *level);
        }
        // All of their names are names.
        let v4 = Level::named("x86-64-v4").unwrap();
        FeatureSet::from_names(v4.needed().chain(v4.kept())).unwrap();
    }

    #[test]
    fn a_level_that_the_host_lacks_is_refused_by_name() {
        let v2 = CpuModel::choose("x86-64-v2").unwrap();
        let small = v2.cpuid(everything()).unwrap();
        let v3 = CpuModel::choose("x86-64-v3").unwrap();
        let text = v3.cpuid(small.clone()).unwrap_err().to_string();
        for name in ["avx2", "bmi1", "abm", "movbe", "fma", "xstate_avx"] {
            assert!(text.contains(name), "{text}");
        }
        assert!(!text.contains("sse4_2") && !text.contains("aes,"), "{text}");
        // The host's own CPU is never refused, and masking again changes nothing.
        assert_eq!(
            CpuModel::choose("host")
                .unwrap()
                .cpuid(small.clone())
                .unwrap(),
            small
        );
        assert_eq!(v2.cpuid(small.clone()).unwrap(), small);
    }

    #[test]
    fn features_can_be_taken_away_from_each() {
        let all = all_features();
        let less = given("host,-avx512f,-rtm");
        assert!(!less.has("avx512f") && !less.has("avx512vl") && !less.has("rtm"));
        assert!(less.has("avx2") && less.without(all).is_empty());
        assert!(!given("x86-64-v3,-avx2").has("avx2"));
        // What is taken away need not be there.
        let v2 = CpuModel::choose("x86-64-v2").unwrap();
        let small = v2.cpuid(everything()).unwrap();
        CpuModel::choose("x86-64-v2,-avx512f")
            .unwrap()
            .cpuid(small)
            .unwrap();
        for (bad, says) in [
            ("host,avx", "`avx` takes no feature away"),
            ("host,-", "`-` takes"),
            ("host,", "`` takes"),
            ("host,-avx1024", "`avx1024` is no CPU feature"),
            ("x86-64-v9", "`x86-64-v9` is no level"),
            ("x86-64", "no level"),
            ("/nonexistent/cpu.json", "cannot be read"),
            ("", "cannot be read"),
        ] {
            let text = CpuModel::choose(bad).unwrap_err().to_string();
            assert!(text.contains(says), "{text}");
        }
    }

    #[test]
    fn a_baseline_is_given_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cpu.json");
        let file = CpuFile {
            schema: 1,
            vendor: "GenuineIntel".into(),
            models: vec!["old".into(), "new".into()],
            features: ["fpu", "sse", "sse2", "arch_capabilities"]
                .map(str::to_owned)
                .to_vec(),
            arch_capabilities: Some(vec!["MDS_NO".into(), "RRSBA".into()]),
            physical_bits: 40,
        };
        let written = |file: &CpuFile| {
            std::fs::write(&path, serde_json::to_vec(file).unwrap()).unwrap();
            CpuModel::choose(path.to_str().unwrap()).unwrap()
        };
        let model = written(&file);
        let list = model.cpuid(everything()).unwrap();
        assert_eq!(FeatureSet::of(&list).names(), file.features);
        assert_eq!(file::physical_bits(&list), 40);
        // What warns of a fault need not be so here; what says that there is none must.
        assert_eq!(
            model.arch_capabilities(Some(1 << 5)).unwrap(),
            Some(1 << 5 | 1 << 19)
        );
        let text = model.arch_capabilities(Some(1)).unwrap_err().to_string();
        assert!(text.contains("MDS_NO") && !text.contains("RRSBA"), "{text}");

        let lacking = |file: &CpuFile, host: Vec<CpuidEntry>| {
            written(file).cpuid(host).unwrap_err().to_string()
        };
        let mut host = everything();
        host.retain(|entry| entry.function != 7);
        let text = lacking(&file, host);
        assert!(text.contains("does not have: arch_capabilities;"), "{text}");
        let wide = CpuFile {
            physical_bits: 52,
            ..file.clone()
        };
        let mut host = everything();
        host.iter_mut().for_each(|e| e.eax = 0x3027);
        assert!(lacking(&wide, host).contains("52-bit physical"));
        let amd = CpuFile {
            vendor: "AuthenticAMD".into(),
            ..file
        };
        assert!(lacking(&amd, everything()).contains("AuthenticAMD"));
    }
}
