//! Gets Debian's kernel package without installing it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::LinuxError;
use super::kernel::{SUMS, sha256, sums_text};

/// The package that always depends on Debian's newest kernel for clouds.
const META: &str = "linux-image-cloud-amd64";

/// Downloads and unpacks into a directory of `cache`, which is complete when it has its name.
pub(super) fn fetch(cache: &Path, tell: &dyn Fn(&str)) -> Result<PathBuf, LinuxError> {
    fs::create_dir_all(cache).map_err(LinuxError::io("made", cache))?;
    let work = tempfile::Builder::new()
        .prefix(".download-")
        .tempdir_in(cache)
        .map_err(LinuxError::io("made", cache))?;
    let mut apt = Apt { private: None };
    let package = match apt.kernel() {
        Some(package) => package,
        None => {
            tell("there is no list of Debian's packages here: getting one (some 10 MB, once)");
            apt = Apt::with_lists_of_its_own(work.path())?;
            apt.kernel()
                .ok_or_else(|| LinuxError::Download(format!("{META} is in no list of packages")))?
        }
    };
    tell(&format!(
        "getting Debian's {} {} (27 MB, once)",
        package.name, package.version
    ));
    let deb = apt.download(&package, work.path())?;
    let tree = work.path().join("tree");
    run(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&tree))?;
    let mut files = Vec::new();
    for part in ["boot", "lib/modules", "usr/lib/modules"] {
        collect(&tree, Path::new(part), &mut files)?;
    }
    let usr = tree.join("usr/lib/modules");
    if usr.is_dir() {
        // Since Debian 13 the modules lie below /usr; here they are always in one place.
        let lib = tree.join("lib");
        fs::create_dir_all(&lib).map_err(LinuxError::io("made", &lib))?;
        fs::rename(&usr, lib.join("modules")).map_err(LinuxError::io("moved", &usr))?;
        for (file, _) in &mut files {
            if let Ok(rest) = file.strip_prefix("usr") {
                *file = rest.to_owned();
            }
        }
    }
    let sums = sums_text(
        files
            .iter()
            .map(|(file, sum)| (file.as_path(), sum.clone())),
    );
    let path = tree.join(SUMS);
    fs::write(&path, sums).map_err(LinuxError::io("written", &path))?;
    let dir = cache.join(format!("{}_{}", package.name, package.version));
    match fs::rename(&tree, &dir) {
        Ok(()) => Ok(dir),
        // Another process was faster, with the same package.
        Err(_) if dir.join(SUMS).is_file() => Ok(dir),
        Err(source) => Err(LinuxError::Io {
            what: "made",
            path: dir,
            source,
        }),
    }
}

/// The files below `part` with their checksums.
fn collect(tree: &Path, part: &Path, files: &mut Vec<(PathBuf, String)>) -> Result<(), LinuxError> {
    let here = tree.join(part);
    if !here.is_dir() {
        return Ok(());
    }
    for entry in fs::read_dir(&here)
        .map_err(LinuxError::io("read", &here))?
        .flatten()
    {
        let (path, file) = (entry.path(), part.join(entry.file_name()));
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => collect(tree, &file, files)?,
            Ok(kind) if kind.is_file() => {
                let bytes = fs::read(&path).map_err(LinuxError::io("read", &path))?;
                files.push((file, sha256(&bytes)));
            }
            _ => {}
        }
    }
    Ok(())
}

struct Package {
    name: String,
    version: String,
    sha256: String,
}

/// apt with the machine's lists of packages, or with its own below a directory: root is needed to
/// renew the former only.
struct Apt {
    private: Option<PathBuf>,
}

impl Apt {
    fn with_lists_of_its_own(work: &Path) -> Result<Self, LinuxError> {
        let private = work.join("apt");
        for dir in ["lists/partial", "cache/archives/partial"] {
            let dir = private.join(dir);
            fs::create_dir_all(&dir).map_err(LinuxError::io("made", &dir))?;
        }
        let apt = Self {
            private: Some(private),
        };
        run(apt.command("apt-get").args(["-q", "update"]))?;
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        if let Some(dir) = &self.private {
            command
                .arg("-o")
                .arg(format!("Dir::State::lists={}", dir.join("lists").display()));
            command
                .arg("-o")
                .arg(format!("Dir::Cache={}", dir.join("cache").display()));
        }
        // As root apt would like to be another user, who cannot write to our directory.
        command.args(["-o", "APT::Sandbox::User=root"]);
        command
    }

    /// The package of the kernel itself, as the newest version of the meta package depends on it.
    fn kernel(&self) -> Option<Package> {
        let meta = self.show(META)?;
        let depends = field(&meta, "Depends")?;
        let name = depends
            .split([',', ' '])
            .find(|n| n.starts_with("linux-image-"))?
            .to_owned();
        let record = self.show(&name)?;
        Some(Package {
            version: field(&record, "Version")?.to_owned(),
            sha256: field(&record, "SHA256")?.to_owned(),
            name,
        })
    }

    /// A package's record, the newest version's.
    fn show(&self, name: &str) -> Option<String> {
        let out = self
            .command("apt-cache")
            .args(["show", "--no-all-versions", name])
            .stdin(Stdio::null())
            .output()
            .ok()?;
        out.status
            .success()
            .then(|| String::from_utf8_lossy(&out.stdout).into_owned())
    }

    fn download(&self, package: &Package, work: &Path) -> Result<PathBuf, LinuxError> {
        let version = format!("{}={}", package.name, package.version);
        run(self
            .command("apt-get")
            .args(["-q", "download", &version])
            .current_dir(work))?;
        let entries = fs::read_dir(work).map_err(LinuxError::io("read", work))?;
        let deb = entries
            .flatten()
            .map(|e| e.path())
            .find(|p| p.extension().is_some_and(|e| e == "deb"));
        let deb = deb.ok_or_else(|| LinuxError::Download("apt-get left no package".to_owned()))?;
        let bytes = fs::read(&deb).map_err(LinuxError::io("read", &deb))?;
        if sha256(&bytes) != package.sha256 {
            return Err(LinuxError::Download(format!(
                "{version} is not what Debian's list of packages says"
            )));
        }
        Ok(deb)
    }
}

fn field<'a>(record: &'a str, name: &str) -> Option<&'a str> {
    record
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
}

fn run(command: &mut Command) -> Result<(), LinuxError> {
    let name = command.get_program().to_string_lossy().into_owned();
    let out = command.stdin(Stdio::null()).output();
    let out = out.map_err(|e| LinuxError::Download(format!("{name} cannot be started ({e})")))?;
    if out.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&out.stderr);
    let last = said
        .lines()
        .rev()
        .find(|l| !l.trim().is_empty())
        .unwrap_or("it did not say why");
    Err(LinuxError::Download(format!(
        "{name} failed ({}): {last}",
        out.status
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let record = "Package: x\nVersion: 6.1.192-2\nDepends: linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)\nSHA256: ab\n";
        assert_eq!(field(record, "Version"), Some("6.1.192-2"));
        assert_eq!(field(record, "SHA256"), Some("ab"));
        assert_eq!(field(record, "SHA"), None);
    }
}
