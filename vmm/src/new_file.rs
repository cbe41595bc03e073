//! Every file that ferry makes for its user: snapshots, recordings, plots, reports.
//!
//! A [`NewFile`] has its name only when it is complete and on the disk. Until then it has no name
//! at all (`O_TMPFILE`), so that a process that is killed leaves nothing. Where the file system has
//! no such files it has a temporary name beside its own, and a lock: the next file of that name
//! removes what a crash has left.
//!
//! Only a regular file is ever replaced: a device, a FIFO, a directory and a symbolic link stay as
//! they are.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{
    AtFlags, CWD, FlockOperation, Mode, OFlags, RenameFlags, flock, linkat, openat, renameat_with,
};
use rustix::io::Errno;

/// The end of a temporary file's name.
const SUFFIX: &[u8] = b".ferry-tmp";
/// Bytes of a file's name in its temporary one: a name has at most 255.
const STEM: usize = 180;

/// How a file is made.
#[derive(Clone, Copy, Debug, Default)]
pub struct Making {
    /// A regular file of that name is replaced.
    pub replace: bool,
    /// This user alone may read it.
    pub private: bool,
}

impl Making {
    /// For all to read that may, in place of a regular file of that name.
    pub const REPLACE: Self = Self {
        replace: true,
        private: false,
    };
}

/// Why there is no file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NewFileError {
    /// There is one.
    #[error("{} exists already; choose another name", .0.display())]
    Exists(PathBuf),
    /// What is there must not be replaced.
    #[error("{} is {what}, which ferry does not replace; give the name of a file", path.display())]
    NotRegular {
        /// The path.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// No name of a file.
    #[error("{} is no name of a file; give one", .0.display())]
    NoName(PathBuf),
    /// The system refuses.
    #[error("{} could not be {what} ({source})", path.display())]
    System {
        /// The path.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// A file in the making. Dropping it leaves no file.
#[derive(Debug)]
pub struct NewFile {
    file: File,
    path: PathBuf,
    making: Making,
    /// Its temporary name, where it has one.
    temporary: Option<PathBuf>,
}

impl NewFile {
    /// Begins a file that will be at `path`. What is there stays until [`publish`](Self::publish).
    ///
    /// # Errors
    /// [`NewFileError`]; nothing was touched.
    pub fn create(path: &Path, making: Making) -> Result<Self, NewFileError> {
        if path.file_name().is_none() {
            return Err(NewFileError::NoName(path.to_owned()));
        }
        check(path, making)?;
        remove_leftovers(path);
        let mode = if making.private { 0o600 } else { 0o666 };
        let system = |source| NewFileError::System {
            path: path.to_owned(),
            what: "made",
            source,
        };
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let unnamed = openat(CWD, directory(path), flags, Mode::from_raw_mode(mode));
        let (file, temporary) = match unnamed {
            Ok(fd) => (File::from(fd), None),
            // The file system has no files without a name, or the kernel does not know them.
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {
                named(path, mode).map_err(system)?
            }
            Err(error) => return Err(system(error.into())),
        };
        // The search for leftovers skips a locked file. Without locks nothing is removed,
        // which is safe.
        let _ = flock(&file, FlockOperation::NonBlockingLockExclusive);
        Ok(Self {
            file,
            path: path.to_owned(),
            making,
            temporary,
        })
    }

    /// The file, for writing.
    #[must_use]
    pub const fn file(&self) -> &File {
        &self.file
    }

    /// Where it will be.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Puts it on the disk, and then under its name.
    ///
    /// # Errors
    /// [`NewFileError`]; there is no new file then, and what was to be replaced is untouched.
    pub fn publish(mut self) -> Result<(), NewFileError> {
        let system = |path: &Path, what| {
            let path = path.to_owned();
            move |source| NewFileError::System { path, what, source }
        };
        let old = check(&self.path, self.making)?;
        if let (Some(old), false) = (&old, self.making.private) {
            // As writing into the old file would have left it.
            let mode = fs::Permissions::from_mode(old.mode() & 0o777);
            let _ = self.file.set_permissions(mode);
        }
        self.file
            .sync_all()
            .map_err(system(&self.path, "put on the disk"))?;
        let named = match (&self.temporary, old) {
            (None, None) => match self.link(&self.path) {
                // It appeared meanwhile.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists && self.making.replace => {
                    check(&self.path, self.making)?;
                    self.link_over()
                }
                done => done,
            },
            (None, Some(_)) => self.link_over(),
            (Some(temporary), None) if !self.making.replace => {
                rename_new(temporary, &self.path).map(|()| self.temporary = None)
            }
            (Some(temporary), _) => {
                fs::rename(temporary, &self.path).map(|()| self.temporary = None)
            }
        };
        match named {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                return Err(NewFileError::Exists(self.path.clone()));
            }
            other => other.map_err(system(&self.path, "given its name"))?,
        }
        // The name, too, shall outlive a crash; the file is there either way.
        if let Err(error) = File::open(directory(&self.path)).and_then(|d| d.sync_all()) {
            tracing::warn!(%error, file = %self.path.display(), "a file's name may be lost if the host fails now");
        }
        Ok(())
    }

    /// Gives a file without a name one that no file has.
    fn link(&self, path: &Path) -> io::Result<()> {
        let own = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        Ok(linkat(CWD, own, CWD, path, AtFlags::SYMLINK_FOLLOW)?)
    }

    /// Gives a file without a name one that a file has: linkat(2) does not replace, rename(2) does.
    fn link_over(&mut self) -> io::Result<()> {
        let temporary = temporary_name(&self.path);
        self.link(&temporary)?;
        // From here on a failure removes the name.
        self.temporary = Some(temporary.clone());
        fs::rename(&temporary, &self.path)?;
        self.temporary = None;
        Ok(())
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary
            && let Err(error) = fs::remove_file(temporary)
        {
            tracing::warn!(%error, file = %temporary.display(), "a temporary file stays behind");
        }
    }
}

/// Writes a whole file, in place of a regular file of that name.
///
/// # Errors
/// [`NewFileError`]; what was there is untouched.
pub fn write(path: &Path, bytes: &[u8]) -> Result<(), NewFileError> {
    let file = NewFile::create(path, Making::REPLACE)?;
    io::Write::write_all(&mut file.file(), bytes).map_err(|source| NewFileError::System {
        path: path.to_owned(),
        what: "written",
        source,
    })?;
    file.publish()
}

/// What is at `path`, if a file may be put there.
fn check(path: &Path, making: Making) -> Result<Option<Metadata>, NewFileError> {
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => {
            return Err(NewFileError::System {
                path: path.to_owned(),
                what: "examined",
                source,
            });
        }
    };
    let kind = metadata.file_type();
    if !making.replace {
        return Err(NewFileError::Exists(path.to_owned()));
    }
    if kind.is_file() {
        return Ok(Some(metadata));
    }
    let what = if kind.is_symlink() {
        "a symbolic link"
    } else if kind.is_dir() {
        "a directory"
    } else if kind.is_fifo() {
        "a FIFO"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "a device"
    };
    Err(NewFileError::NotRegular {
        path: path.to_owned(),
        what,
    })
}

/// The directory that a file is in.
pub(crate) fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(d) if !d.as_os_str().is_empty() => d,
        _ => Path::new("."),
    }
}

/// The beginning of the temporary names of a file.
fn prefix(path: &Path) -> Vec<u8> {
    let name = path.file_name().unwrap_or_default().as_bytes();
    [b".", &name[..name.len().min(STEM)], b"."].concat()
}

fn temporary_name(path: &Path) -> PathBuf {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let unique = format!("{}-{number}", std::process::id());
    let name = [&prefix(path), unique.as_bytes(), SUFFIX].concat();
    directory(path).join(std::ffi::OsString::from_vec(name))
}

/// A file under a temporary name that no file has.
fn named(path: &Path, mode: u32) -> io::Result<(File, Option<PathBuf>)> {
    loop {
        let temporary = temporary_name(path);
        let made = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&temporary);
        match made {
            Ok(file) => return Ok((file, Some(temporary))),
            // Of a process in another namespace of process numbers.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
        }
    }
}

/// Renames, and never replaces.
fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // Not every file system can.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
            fs::hard_link(from, to)?;
            fs::remove_file(from)
        }
        done => Ok(done?),
    }
}

/// Removes the temporary files that processes of the past have left of this file.
fn remove_leftovers(path: &Path) {
    let prefix = prefix(path);
    let Ok(entries) = fs::read_dir(directory(path)) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let name = name.as_bytes();
        if !name.starts_with(&prefix) || !name.ends_with(SUFFIX) {
            continue;
        }
        let file = File::options()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(entry.path());
        // A process that lives holds the lock.
        if let Ok(file) = file
            && file.metadata().is_ok_and(|m| m.is_file())
            && flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()
        {
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const REPLACE: Making = Making::REPLACE;
    const NEW: Making = Making {
        replace: false,
        private: true,
    };

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(directory)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn has_its_name_only_when_it_is_complete() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let file = NewFile::create(&path, NEW).unwrap();
        file.file().write_all(b"new").unwrap();
        assert!(!path.exists());
        file.publish().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(names(dir.path()), ["out"]);
        assert!(matches!(
            NewFile::create(&path, NEW),
            Err(NewFileError::Exists(_))
        ));
    }

    #[test]
    fn a_file_that_was_to_be_replaced_stays_until_then() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        fs::write(&path, "old").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let file = NewFile::create(&path, REPLACE).unwrap();
        file.file().write_all(b"half").unwrap();
        drop(file);
        assert_eq!(fs::read(&path).unwrap(), b"old");
        write(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o640);
        assert_eq!(names(dir.path()), ["out"]);
    }

    #[test]
    fn only_regular_files_are_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("target"), "old").unwrap();
        std::os::unix::fs::symlink(at("target"), at("link")).unwrap();
        std::os::unix::fs::symlink(at("nothing"), at("dangling")).unwrap();
        nix::unistd::mkfifo(&at("fifo"), nix::sys::stat::Mode::S_IRUSR).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        fs::create_dir(at("dir")).unwrap();
        for name in ["link", "dangling", "fifo", "socket", "dir"] {
            let before = fs::symlink_metadata(at(name)).unwrap();
            let error = write(&at(name), b"new").unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
            let after = fs::symlink_metadata(at(name)).unwrap();
            assert_eq!(after.ino(), before.ino(), "{name}");
        }
        assert_eq!(fs::read(at("target")).unwrap(), b"old");
        // It takes the place between the beginning and the end.
        let file = NewFile::create(&at("late"), REPLACE).unwrap();
        std::os::unix::fs::symlink(at("target"), at("late")).unwrap();
        assert!(file.publish().is_err());
        assert!(at("late").is_symlink());
        let error = write(Path::new("/dev/null"), b"new").unwrap_err();
        assert!(error.to_string().contains("a device"), "{error}");
    }

    #[test]
    fn a_file_that_appears_meanwhile_is_not_replaced_unasked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let file = NewFile::create(&path, NEW).unwrap();
        fs::write(&path, "other").unwrap();
        assert!(matches!(file.publish(), Err(NewFileError::Exists(_))));
        assert_eq!(fs::read(&path).unwrap(), b"other");
    }

    #[test]
    fn what_a_crash_left_is_removed_and_what_lives_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let (left, living) = (temporary_name(&path), temporary_name(&path));
        for path in [&left, &living] {
            fs::write(path, "half").unwrap();
        }
        let other = dir.path().join(".other.1-1.ferry-tmp");
        fs::write(&other, "half").unwrap();
        let held = File::open(&living).unwrap();
        flock(&held, FlockOperation::LockExclusive).unwrap();
        write(&path, b"new").unwrap();
        assert!(!left.exists() && living.exists() && other.exists());
    }

    #[test]
    fn where_files_need_a_name_all_is_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let begin = |making| {
            let (file, temporary) = named(&path, 0o600).unwrap();
            NewFile {
                file,
                path: path.clone(),
                making,
                temporary,
            }
        };
        let file = begin(NEW);
        assert_eq!(names(dir.path()).len(), 1);
        drop(file);
        assert!(names(dir.path()).is_empty());
        begin(NEW).publish().unwrap();
        assert!(matches!(begin(NEW).publish(), Err(NewFileError::Exists(_))));
        let file = begin(REPLACE);
        file.file().write_all(b"new").unwrap();
        file.publish().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(names(dir.path()), ["out"]);
    }
}
