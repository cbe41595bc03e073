//! Which files a confined process may still open (`Documentation/userspace-api/landlock.rst`).
//!
//! Rules are for files and for folders with all that is in them. A rule for a file is for the file
//! that has the path now: one that takes its place later is not opened. What has no file yet, a
//! disk that is to be copied here, is a rule for its folder.
//!
//! The rules are set before the process has a second thread, and threads inherit them. Descriptors
//! that are open already keep their use.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use landlock::{
    ABI, Access as _, AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetError, Scope,
};

use crate::memory::private_mount;
use crate::new_file::directory;

/// What the rules know: devices' ioctls are the newest that they restrict.
const KNOWN: ABI = ABI::V5;
/// Sockets without a file, and signals.
const SCOPES: ABI = ABI::V6;

/// Read by libraries, for instance to look up a host's name as /etc/nsswitch.conf says, and by what
/// asks for the host's memory and processors.
const READ: [&str; 19] = [
    "/etc",
    "/usr",
    "/lib",
    "/lib64",
    "/gnu/store",
    "/nix/store",
    "/run/NetworkManager",
    "/run/resolvconf",
    "/run/systemd/resolve",
    "/var/lib/sss",
    "/proc/self",
    "/proc/sys",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/stat",
    "/sys/devices/system",
    "/sys/fs/cgroup",
    "/sys/kernel/mm",
    "/dev/urandom",
];
/// What a machine is made of.
const DEVICES: [&str; 3] = ["/dev/kvm", "/dev/userfaultfd", "/dev/null"];
const TAPS: &str = "/dev/net/tun";

/// What may be done with a file, or with those of a folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Grant {
    Read,
    Write,
    /// Files may be made, written and removed.
    Make,
    /// Sockets may be made, and files removed.
    Sockets,
}

impl Grant {
    fn access(self) -> BitFlags<AccessFs> {
        let read = AccessFs::ReadFile | AccessFs::ReadDir;
        match self {
            Self::Read => read,
            Self::Write => read | AccessFs::WriteFile | AccessFs::Truncate | AccessFs::IoctlDev,
            Self::Make => {
                read | AccessFs::WriteFile
                    | AccessFs::Truncate
                    | AccessFs::MakeReg
                    | AccessFs::RemoveFile
            }
            Self::Sockets => AccessFs::ReadDir | AccessFs::MakeSock | AccessFs::RemoveFile,
        }
    }
}

/// The files that a process may still open in the sandbox.
#[derive(Debug, Default)]
pub struct Files {
    grants: Vec<(PathBuf, Grant)>,
    nameable: Vec<PathBuf>,
}

impl Files {
    /// What every VMM needs: KVM, and what the C library and this one read of the system.
    #[must_use]
    pub fn of_a_vmm() -> Self {
        let mut files = Self::default();
        for path in READ {
            files.read(path);
        }
        for path in DEVICES {
            files.grant(path, Grant::Write);
        }
        // Where the file really is that tells the name servers.
        if let Ok(file) = fs::canonicalize("/etc/resolv.conf") {
            files.read(directory(&file));
        }
        // Names of functions in a panic's backtrace.
        if let Ok(program) = std::env::current_exe() {
            files.read(program);
        }
        files
    }

    fn grant(&mut self, path: impl AsRef<Path>, grant: Grant) {
        self.grants.push((path.as_ref().to_owned(), grant));
    }

    /// A file, or what is in a folder, may be read.
    pub fn read(&mut self, path: impl AsRef<Path>) -> &mut Self {
        self.grant(path, Grant::Read);
        self
    }

    /// The guest's disk. Where there is no file yet, one may be made in its folder, which gives
    /// away the folder.
    pub fn disk(&mut self, path: &Path, read_only: bool) -> &mut Self {
        match path.exists() {
            true if read_only => self.grant(path, Grant::Read),
            true => self.grant(path, Grant::Write),
            false => self.grant(directory(path), Grant::Make),
        }
        self
    }

    /// A file may be made there, in its folder.
    pub fn new_file(&mut self, path: &Path) -> &mut Self {
        self.grant(directory(path), Grant::Make);
        self
    }

    /// Tap devices may be opened.
    pub fn taps(&mut self) -> &mut Self {
        self.grant(TAPS, Grant::Write);
        self
    }

    /// A socket may be made there, and removed.
    pub fn socket(&mut self, path: &Path) -> &mut Self {
        self.grant(directory(path), Grant::Sockets);
        self
    }

    /// A folder in which requests on the control socket may name files: to write, and to read.
    /// Without one, they may name none.
    pub fn nameable(&mut self, folder: &Path) -> &mut Self {
        self.grant(folder, Grant::Make);
        self.nameable
            .push(real(folder).unwrap_or_else(|| folder.to_owned()));
        self
    }

    /// Has the kernel keep to it, for this thread and those that it starts.
    ///
    /// # Errors
    /// The kernel's; a sentence.
    pub(super) fn apply(&self) -> Result<(), String> {
        self.restrict()
            .map_err(|e| format!("the files that this process may open cannot be restricted ({e})"))
    }

    fn restrict(&self) -> Result<(), RulesetError> {
        let ruleset = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(KNOWN))?
            .scope(Scope::from_all(SCOPES))?;
        let mut rules = ruleset.create()?;
        // A folder in /proc is known by its entry, which is only kept while it is open.
        let mut kept = Vec::new();
        for (path, grant) in &self.grants {
            // What is not there, or not for this user, is not opened later either.
            let Ok(open) = PathFd::new(path) else {
                continue;
            };
            let folder = path.is_dir();
            let access = match folder {
                true => grant.access(),
                false => grant.access() & AccessFs::from_file(KNOWN),
            };
            rules = rules.add_rule(PathBeneath::new(&open, access))?;
            if path.starts_with("/proc") {
                kept.push(open);
            }
        }
        // The guest's memory may lie in files of it, which another process is given anew.
        if let Some(mount) = private_mount() {
            rules = rules.add_rule(PathBeneath::new(mount, Grant::Make.access()))?;
        }
        rules.restrict_self()?;
        std::mem::forget(kept);
        Ok(())
    }

    /// From now on requests may name files of these folders alone, whether the kernel keeps to it
    /// or not: an operator finds the same on every host.
    pub(super) fn restrict_names(self) {
        // The sandbox is entered once.
        let _ = NAMEABLE.set(self.nameable);
    }
}

static NAMEABLE: OnceLock<Vec<PathBuf>> = OnceLock::new();

/// A request on the control socket names a file that the sandbox does not let through.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the sandbox of this VMM lets requests name files {}, and {} is not there: name one there, or start the VMM with \
     --allow and the folder", Folders(.folders), .path.display()
)]
pub struct Outside {
    path: PathBuf,
    folders: Vec<PathBuf>,
}

struct Folders<'a>(&'a [PathBuf]);

impl std::fmt::Display for Folders<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (n, folder) in self.0.iter().enumerate() {
            let before = if n == 0 { "in " } else { " or " };
            write!(f, "{before}{}", folder.display())?;
        }
        if self.0.is_empty() {
            f.write_str("nowhere")?;
        }
        Ok(())
    }
}

/// Whether a request may have a file made at `path`.
///
/// # Errors
/// [`Outside`].
pub fn may_make(path: &Path) -> Result<(), Outside> {
    NAMEABLE
        .get()
        .map_or(Ok(()), |folders| check(path, directory(path), folders, &[]))
}

/// Whether a request may have the file or folder at `path` read.
///
/// # Errors
/// [`Outside`].
pub fn may_read(path: &Path) -> Result<(), Outside> {
    let always = [PathBuf::from("/etc")];
    NAMEABLE
        .get()
        .map_or(Ok(()), |folders| check(path, path, folders, &always))
}

/// What is not there passes: the one who opens it says so.
fn check(path: &Path, place: &Path, folders: &[PathBuf], more: &[PathBuf]) -> Result<(), Outside> {
    let Some(place) = real(place) else {
        return Ok(());
    };
    match folders
        .iter()
        .chain(more)
        .any(|folder| place.starts_with(folder))
    {
        true => Ok(()),
        false => Err(Outside {
            path: path.to_owned(),
            folders: folders.to_vec(),
        }),
    }
}

fn real(path: &Path) -> Option<PathBuf> {
    fs::canonicalize(path).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_name_files_in_their_folders_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (inside, outside) = (dir.path().join("in"), dir.path().join("out"));
        for folder in [&inside, &outside] {
            fs::create_dir(folder).unwrap();
        }
        std::os::unix::fs::symlink(&outside, inside.join("link")).unwrap();
        let folders = [real(&inside).unwrap()];
        let making = |path: PathBuf| check(&path, directory(&path), &folders, &[]);
        assert_eq!(making(inside.join("a")), Ok(()));
        for path in [
            outside.join("a"),
            inside.join("../out/a"),
            inside.join("link/a"),
            PathBuf::from("/a"),
        ] {
            let error = making(path.clone()).unwrap_err().to_string();
            assert!(error.contains("--allow"), "{error}");
            assert!(error.contains(&inside.display().to_string()), "{error}");
            assert!(error.contains(&path.display().to_string()), "{error}");
        }
        // It says itself that it is not there.
        assert_eq!(making(outside.join("no/such")), Ok(()));
        let error = check(&outside, &outside, &[], &[]).unwrap_err();
        assert!(error.to_string().contains("files nowhere"), "{error}");
    }

    #[test]
    fn a_disk_is_one_file_and_a_disk_to_come_is_its_folder() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        let granted = |read_only| {
            let mut files = Files::default();
            files.disk(&disk, read_only);
            files.grants
        };
        assert_eq!(granted(false), [(dir.path().to_owned(), Grant::Make)]);
        fs::write(&disk, "").unwrap();
        assert_eq!(granted(false), [(disk.clone(), Grant::Write)]);
        assert_eq!(granted(true), [(disk.clone(), Grant::Read)]);
    }
}
