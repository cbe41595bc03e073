//! What this host can do, and which kind of KVM it has: `ferry doctor`.
//!
//! Kinds are told by facts, not by names: hardware has the processor's own virtualisation, software
//! is a KVM that works without it, none is no KVM at all. See the guide to hosts for what each
//! means.

#![forbid(unsafe_code)]

mod checks;

use crate::machine::{CpuError, CpuFile};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// What stands behind /dev/kvm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// VT-x or AMD-V, of the machine itself or passed through by an outer hypervisor.
    Hardware,
    /// A KVM without either: applications run natively, kernels are emulated.
    Software,
    /// No KVM.
    None,
}

impl Kind {
    /// What it means, in one sentence without a full stop.
    #[must_use]
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::Hardware => "hardware KVM: any guest runs at full speed",
            Self::Software => {
                "software KVM: bare guests (ferry run --nas) run at full speed, Linux guests are far too slow"
            }
            Self::None => "no KVM: no guest can run here",
        }
    }
}

/// What hangs on a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Need {
    /// Without it no guest runs.
    Required,
    /// Without it something is slower or not available.
    Useful,
    /// Only tests and benchmarks use it.
    Tests,
}

/// One thing looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// A name for scripts.
    pub name: String,
    /// Whether it is as it should be.
    pub ok: bool,
    /// What hangs on it.
    pub need: Need,
    /// What was found and what that means.
    pub found: String,
    /// What to do about it; `null` when nothing is to be done.
    pub advice: Option<String>,
}

/// The whole examination: what `ferry doctor --json` prints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diagnosis {
    /// Version of this object; grows when a field is added.
    pub schema: u32,
    /// ferry's version.
    pub version: String,
    /// The kind of KVM.
    pub kind: Kind,
    /// Whether guests can run here.
    pub ready: bool,
    /// The host's kernel.
    pub kernel: String,
    /// The processor.
    pub cpu: String,
    /// Kernel modules that tell about KVM.
    pub modules: Vec<String>,
    /// Everything looked at.
    pub checks: Vec<Check>,
}

impl Diagnosis {
    /// The current value of [`Diagnosis::schema`].
    pub const SCHEMA: u32 = 1;
}

/// Whether guests execute CPUID on the processor itself, so that no feature of it can be hidden
/// from them: software KVM does without the exits of VT-x and AMD-V.
#[must_use]
pub fn cpuid_is_native() -> bool {
    Files::host().kind() == Kind::Software
}

/// What a guest can be given by this host: `ferry doctor --cpu-json`.
///
/// # Errors
/// KVM cannot be used.
pub fn cpu() -> Result<CpuFile, CpuError> {
    CpuFile::of_host(&Files::host().cpu_name())
}

/// Examines this host; takes milliseconds and changes nothing.
#[must_use]
pub fn examine() -> Diagnosis {
    let files = Files::host();
    let checks = checks::all(&files);
    Diagnosis {
        schema: Diagnosis::SCHEMA,
        version: env!("CARGO_PKG_VERSION").into(),
        kind: files.kind(),
        ready: checks.iter().all(|c| c.ok || c.need != Need::Required),
        kernel: files.read("proc/sys/kernel/osrelease"),
        cpu: files.cpu_name(),
        modules: files.kvm_modules(),
        checks,
    }
}

/// The host's files, under a root of their own for tests.
struct Files {
    root: PathBuf,
}

impl Files {
    fn host() -> Self {
        Self {
            root: PathBuf::from("/"),
        }
    }

    /// A file's text, trimmed; empty where it cannot be read.
    fn read(&self, path: &str) -> String {
        std::fs::read_to_string(self.root.join(path))
            .map(|t| t.trim().to_owned())
            .unwrap_or_default()
    }

    fn exists(&self, path: &str) -> bool {
        self.root.join(path).exists()
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// A field of the first processor in /proc/cpuinfo.
    fn cpuinfo(&self, field: &str) -> String {
        let text = self.read("proc/cpuinfo");
        let found = text.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            (name.trim() == field).then(|| value.trim().to_owned())
        });
        found.unwrap_or_default()
    }

    fn cpu_name(&self) -> String {
        self.cpuinfo("model name")
    }

    /// "vmx" or "svm" where the processor has one.
    fn virtualisation(&self) -> Option<&'static str> {
        let flags = self.cpuinfo("flags");
        ["vmx", "svm"]
            .into_iter()
            .find(|flag| flags.split_whitespace().any(|f| f == *flag))
    }

    fn kvm_modules(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.path("sys/module")) else {
            return Vec::new();
        };
        let names = entries.filter_map(|e| e.ok()?.file_name().into_string().ok());
        let mut found: Vec<String> = names
            .filter(|n| n == "kvm" || n.starts_with("kvm_"))
            .collect();
        found.sort();
        found
    }

    fn kind(&self) -> Kind {
        if !self.exists("dev/kvm") {
            Kind::None
        } else if self.virtualisation().is_some() && !self.exists("sys/module/kvm_pvm") {
            Kind::Hardware
        } else {
            Kind::Software
        }
    }

    /// A number from /proc/meminfo, in its own unit (KiB, or pages of the huge pool).
    fn meminfo(&self, field: &str) -> u64 {
        let text = self.read("proc/meminfo");
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        value
            .and_then(|v| v.split_whitespace().next()?.parse().ok())
            .unwrap_or(0)
    }
}

/// Whether a program is on the search path.
fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Administrators' tools are often not on users' paths.
    std::env::split_paths(&path)
        .chain([PathBuf::from("/usr/sbin"), PathBuf::from("/sbin")])
        .any(|dir: PathBuf| Path::new(&dir).join(program).is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(files: &[(&str, &str)]) -> (Files, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        (
            Files {
                root: dir.path().to_owned(),
            },
            dir,
        )
    }

    const INTEL: &str =
        "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu vmx sse\n\nprocessor : 1\n";
    const PLAIN: &str = "processor\t: 0\nflags\t\t: fpu sse vmxx\n";

    #[test]
    fn kinds_are_told_by_facts() {
        let kind = |files: &[(&str, &str)]| host(files).0.kind();
        assert_eq!(kind(&[]), Kind::None);
        assert_eq!(kind(&[("proc/cpuinfo", INTEL)]), Kind::None);
        assert_eq!(
            kind(&[("proc/cpuinfo", INTEL), ("dev/kvm", "")]),
            Kind::Hardware
        );
        assert_eq!(
            kind(&[("proc/cpuinfo", PLAIN), ("dev/kvm", "")]),
            Kind::Software
        );
        let pvm = [
            ("proc/cpuinfo", INTEL),
            ("dev/kvm", ""),
            ("sys/module/kvm_pvm/x", ""),
        ];
        assert_eq!(kind(&pvm), Kind::Software);
    }

    #[test]
    fn reads_what_the_kernel_writes() {
        let (files, _dir) = host(&[
            ("proc/cpuinfo", INTEL),
            (
                "proc/meminfo",
                "MemTotal:  100 kB\nMemAvailable:   77 kB\nHugePages_Free:    3\n",
            ),
            ("sys/module/kvm/x", ""),
            ("sys/module/kvm_intel/x", ""),
            ("sys/module/tsc/x", ""),
        ]);
        assert_eq!(files.cpu_name(), "Some CPU @ 2 GHz");
        assert_eq!(files.meminfo("MemAvailable"), 77);
        assert_eq!(files.meminfo("HugePages_Free"), 3);
        assert_eq!(files.meminfo("Nonsense"), 0);
        assert_eq!(files.kvm_modules(), ["kvm", "kvm_intel"]);
        assert_eq!(files.virtualisation(), Some("vmx"));
    }

    #[test]
    fn every_failed_check_says_what_to_do() {
        // An empty host: the files are missing, the system calls are this machine's.
        let (files, _dir) = host(&[]);
        for list in [checks::all(&files), examine().checks] {
            for check in list {
                assert!(!check.found.is_empty(), "{check:?}");
                assert!(check.ok || check.advice.is_some(), "{check:?}");
            }
        }
    }
}
