//! A kernel in the cache.
//!
//! ```text
//! CACHE/linux/NAME_VERSION/        one directory for each version of the package
//!     SHA256SUMS                   of all files below, as sha256sum(1) writes it; written last
//!     boot/vmlinuz-RELEASE
//!     lib/modules/RELEASE/…
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::modules::{depends, name_of, plain};
use super::{LinuxError, fetch};

pub(super) const SUMS: &str = "SHA256SUMS";

/// Where kernels are kept: `$FERRY_CACHE`, or `ferry` in the user's cache directory.
///
/// # Errors
/// [`LinuxError::NoCache`].
pub fn cache_dir() -> Result<PathBuf, LinuxError> {
    let variable = |name| {
        env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    variable("FERRY_CACHE")
        .or_else(|| variable("XDG_CACHE_HOME").map(|d| d.join("ferry")))
        .or_else(|| variable("HOME").map(|d| d.join(".cache/ferry")))
        .ok_or(LinuxError::NoCache)
}

/// Debian's kernel with its modules.
#[derive(Debug, Clone)]
pub struct Kernel {
    dir: PathBuf,
    release: String,
    sums: BTreeMap<PathBuf, String>,
}

/// A module, ready to be loaded.
#[derive(Debug, Clone)]
pub struct Module {
    /// Its name, as `lsmod` shows it.
    pub name: String,
    /// Where it lies below the package's root.
    path: PathBuf,
    /// Its bytes as in the package.
    raw: Vec<u8>,
    /// Its bytes, unpacked.
    pub bytes: Vec<u8>,
}

impl Kernel {
    /// The kernel from the cache; downloaded into it where there is none, in which case `tell` is
    /// called with a sentence for each step. The newest in the cache is used; to get a newer one,
    /// remove the directory.
    ///
    /// # Errors
    /// [`LinuxError`].
    pub fn get(tell: &dyn Fn(&str)) -> Result<Self, LinuxError> {
        let cache = cache_dir()?.join("linux");
        if let Some(kernel) = Self::cached(&cache)? {
            return Ok(kernel);
        }
        let dir = fetch::fetch(&cache, tell)?;
        Self::open(dir)
    }

    /// The newest kernel in the cache, without looking elsewhere.
    ///
    /// # Errors
    /// A cache that cannot be read.
    pub fn cached(cache: &Path) -> Result<Option<Self>, LinuxError> {
        let entries = fs::read_dir(cache).into_iter().flatten().flatten();
        let complete = entries.map(|e| e.path()).filter(|d| d.join(SUMS).is_file());
        let newest =
            complete.max_by_key(|d| fs::metadata(d.join(SUMS)).and_then(|m| m.modified()).ok());
        newest.map(Self::open).transpose()
    }

    fn open(dir: PathBuf) -> Result<Self, LinuxError> {
        let path = dir.join(SUMS);
        let text = fs::read_to_string(&path).map_err(LinuxError::io("read", &path))?;
        let sums: BTreeMap<PathBuf, String> = text
            .lines()
            .filter_map(|line| {
                let (sum, file) = line.split_once("  ")?;
                Some((PathBuf::from(file), sum.to_owned()))
            })
            .collect();
        let release = sums.keys().find_map(|file| {
            let name = file.strip_prefix("boot").ok()?.to_str()?;
            name.strip_prefix("vmlinuz-").map(str::to_owned)
        });
        let release = release.ok_or(LinuxError::Changed(path))?;
        Ok(Self { dir, release, sums })
    }

    /// What `uname -r` says in it.
    #[must_use]
    pub fn release(&self) -> &str {
        &self.release
    }

    /// Where all of its files are.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.dir
    }

    /// The bzImage, checked.
    ///
    /// # Errors
    /// [`LinuxError`].
    pub fn image(&self) -> Result<PathBuf, LinuxError> {
        let file = self.image_file();
        self.checked(&file)?;
        Ok(self.dir.join(file))
    }

    fn image_file(&self) -> PathBuf {
        Path::new("boot").join(format!("vmlinuz-{}", self.release))
    }

    /// These modules and all that they need, in the order in which they can be loaded. Those that
    /// are built into this kernel are left out.
    ///
    /// # Errors
    /// [`LinuxError`].
    pub fn modules(&self, names: &[&str]) -> Result<Vec<Module>, LinuxError> {
        let root = self.dir.join("lib/modules").join(&self.release);
        // The list of checksums has them all: to look through some two hundred directories takes
        // longer than all else here.
        let tree = Path::new("lib/modules").join(&self.release).join("kernel");
        let files = self.sums.keys().filter(|file| file.starts_with(&tree));
        let all: BTreeMap<String, &Path> = files
            .filter_map(|file| Some((name_of(file)?, file.as_path())))
            .collect();
        let builtin = fs::read_to_string(root.join("modules.builtin")).unwrap_or_default();
        let builtin: BTreeSet<String> = builtin
            .lines()
            .filter_map(|line| name_of(Path::new(line)))
            .collect();
        let mut loaded = Vec::new();
        let mut seen = BTreeSet::new();
        for name in names {
            self.add(&plain(name), &all, &builtin, &mut seen, &mut loaded)?;
        }
        Ok(loaded)
    }

    /// Depth first. `seen` also ends circles, which a kernel does not have and a damaged file
    /// might.
    fn add(
        &self,
        name: &str,
        all: &BTreeMap<String, &Path>,
        builtin: &BTreeSet<String>,
        seen: &mut BTreeSet<String>,
        loaded: &mut Vec<Module>,
    ) -> Result<(), LinuxError> {
        if !seen.insert(name.to_owned()) {
            return Ok(());
        }
        let Some(file) = all.get(name) else {
            if builtin.contains(name) {
                return Ok(());
            }
            return Err(LinuxError::NoModule {
                release: self.release.clone(),
                name: name.to_owned(),
            });
        };
        let raw = self.checked(file)?;
        let bytes = unpack(&self.dir.join(file), &raw)?;
        for needed in depends(&bytes) {
            self.add(&needed, all, builtin, seen, loaded)?;
        }
        loaded.push(Module {
            name: name.to_owned(),
            path: file.to_path_buf(),
            raw,
            bytes,
        });
        Ok(())
    }

    /// A file's bytes, which must be those of the package.
    fn checked(&self, file: &Path) -> Result<Vec<u8>, LinuxError> {
        let path = self.dir.join(file);
        let bytes = fs::read(&path).map_err(LinuxError::io("read", &path))?;
        match self.sums.get(file) {
            Some(sum) if *sum == sha256(&bytes) => Ok(bytes),
            _ => Err(LinuxError::Changed(path)),
        }
    }

    /// The files of a smaller cache with the kernel and these modules only: for a nested host,
    /// where ferry then finds it as it does here. Paths are relative to the cache directory.
    ///
    /// # Errors
    /// [`LinuxError`].
    pub fn export(&self, modules: &[Module]) -> Result<Vec<(PathBuf, Vec<u8>)>, LinuxError> {
        let name = self.dir.file_name().unwrap_or_default();
        let root = Path::new("linux").join(name);
        let builtin = Path::new("lib/modules")
            .join(&self.release)
            .join("modules.builtin");
        let mut files = vec![
            (self.image_file(), self.checked(&self.image_file())?),
            (builtin.clone(), self.checked(&builtin)?),
        ];
        files.extend(modules.iter().map(|m| (m.path.clone(), m.raw.clone())));
        let sums = files
            .iter()
            .map(|(file, bytes)| (file.as_path(), sha256(bytes)));
        let sums = sums_text(sums);
        files.push((PathBuf::from(SUMS), sums.into_bytes()));
        Ok(files
            .into_iter()
            .map(|(file, bytes)| (root.join(file), bytes))
            .collect())
    }
}

fn unpack(path: &Path, raw: &[u8]) -> Result<Vec<u8>, LinuxError> {
    if path.extension().is_none_or(|e| e != "xz") {
        return Ok(raw.to_vec());
    }
    let mut bytes = Vec::new();
    let mut rest = raw;
    lzma_rs::xz_decompress(&mut rest, &mut bytes)
        .map_err(|_| LinuxError::Module(path.to_owned()))?;
    Ok(bytes)
}

/// SHA-256 in hexadecimal digits.
pub(super) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect()
}

/// The text of a checksum file.
pub(super) fn sums_text<'a>(sums: impl Iterator<Item = (&'a Path, String)>) -> String {
    sums.map(|(file, sum)| format!("{sum}  {}\n", file.display()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A package with two modules, one of which needs the other and something built in.
    fn package(cache: &Path) -> PathBuf {
        let dir = cache.join("linux-image-9.9-test_1");
        let root = Path::new("lib/modules/9.9-test");
        let files: [(PathBuf, &[u8]); 4] = [
            ("boot/vmlinuz-9.9-test".into(), b"kernel"),
            (root.join("modules.builtin"), b"kernel/a/inside.ko\n"),
            (root.join("kernel/x/low-one.ko"), b"\0depends=\0"),
            (root.join("kernel/y/high.ko"), b"\0depends=low_one,inside\0"),
        ];
        for (file, bytes) in &files {
            let path = dir.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        let sums = sums_text(files.iter().map(|(f, b)| (f.as_path(), sha256(b))));
        fs::write(dir.join(SUMS), sums).unwrap();
        dir
    }

    #[test]
    fn what_a_module_needs_is_loaded_before_it() {
        let cache = tempfile::tempdir().unwrap();
        package(cache.path());
        let kernel = Kernel::cached(cache.path()).unwrap().unwrap();
        assert_eq!(kernel.release(), "9.9-test");
        let names = |wanted: &[&str]| -> Vec<String> {
            kernel
                .modules(wanted)
                .unwrap()
                .into_iter()
                .map(|m| m.name)
                .collect()
        };
        assert_eq!(names(&["high", "low-one", "inside"]), ["low_one", "high"]);
        assert!(
            kernel
                .modules(&["missing"])
                .unwrap_err()
                .to_string()
                .contains("no module missing")
        );
    }

    #[test]
    fn changed_files_are_not_used() {
        let cache = tempfile::tempdir().unwrap();
        let dir = package(cache.path());
        let kernel = Kernel::cached(cache.path()).unwrap().unwrap();
        kernel.image().unwrap();
        fs::write(dir.join("boot/vmlinuz-9.9-test"), b"other").unwrap();
        assert!(matches!(kernel.image(), Err(LinuxError::Changed(_))));
        // A download that was broken off has no list of checksums.
        fs::remove_file(dir.join(SUMS)).unwrap();
        assert!(Kernel::cached(cache.path()).unwrap().is_none());
    }

    #[test]
    fn an_export_is_a_cache_again() {
        let cache = tempfile::tempdir().unwrap();
        package(cache.path());
        let kernel = Kernel::cached(cache.path()).unwrap().unwrap();
        let modules = kernel.modules(&["low_one"]).unwrap();
        let other = tempfile::tempdir().unwrap();
        for (file, bytes) in kernel.export(&modules).unwrap() {
            let path = other.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        let copy = Kernel::cached(&other.path().join("linux"))
            .unwrap()
            .unwrap();
        copy.image().unwrap();
        assert_eq!(copy.modules(&["low_one", "inside"]).unwrap().len(), 1);
        assert!(copy.modules(&["high"]).is_err());
    }
}
