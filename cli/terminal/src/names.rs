//! Guests by name: what a name may be, and the folder with the control sockets of named guests.
//!
//! | user | folder |
//! |---|---|
//! | a systemd unit with `RuntimeDirectory=` | the first of `$RUNTIME_DIRECTORY` |
//! | root | `/run/ferry` |
//! | any other | `$XDG_RUNTIME_DIR/ferry` |
//!
//! The socket of the guest `web` is `web.sock` in that folder. The folder has mode 0700. It belongs
//! to its user, and no other user may write into it: a socket in it was made by that user or by
//! root.

use rustix::process::geteuid;
use std::env::var_os;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// The end of a control socket's file name.
const SUFFIX: &str = ".sock";

/// A guest's name, checked.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct GuestName(String);

impl GuestName {
    /// The longest, in bytes: with it the path of a socket in the folder is short enough for a Unix
    /// socket address (107 bytes).
    pub const MAX: usize = 64;

    /// As text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for GuestName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = |c: u8| c.is_ascii_alphanumeric() || b"._-".contains(&c);
        let begins = text
            .bytes()
            .next()
            .is_some_and(|c| c.is_ascii_alphanumeric());
        if begins && text.len() <= Self::MAX && text.bytes().all(known) {
            return Ok(Self(text.to_owned()));
        }
        Err(format!(
            "a guest's name has 1 to {} letters, digits, `.`, `_` and `-`, and begins with a letter or a digit",
            Self::MAX
        ))
    }
}

impl fmt::Display for GuestName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why there is no guest of a name.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NameError {
    /// The environment names no folder.
    #[error(
        "there is no folder for named guests, as XDG_RUNTIME_DIR is not set; set it, or give --api SOCKET in place of a name"
    )]
    NoFolder,
    /// The folder cannot be made or read.
    #[error("the folder of named guests, {}, cannot be {what} ({source}); give --api SOCKET in place of a name", path.display())]
    System {
        /// The folder.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// Others could put sockets there.
    #[error("the folder of named guests, {}, {what}; mend that, or give --api SOCKET in place of a name", path.display())]
    Unsafe {
        /// The folder.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// No guest has that name.
    #[error("no guest is named {name} in {}; `ferry ps` lists those that are there", folder.display())]
    Unknown {
        /// The name.
        name: GuestName,
        /// The folder.
        folder: PathBuf,
    },
}

/// The folder with the sockets of named guests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuntimeFolder(PathBuf);

impl RuntimeFolder {
    /// That of this process's user; it may not exist yet.
    ///
    /// # Errors
    /// [`NameError::NoFolder`].
    pub fn find() -> Result<Self, NameError> {
        Self::of(
            var_os("RUNTIME_DIRECTORY"),
            geteuid().is_root(),
            var_os("XDG_RUNTIME_DIR"),
        )
    }

    fn of(unit: Option<OsString>, root: bool, user: Option<OsString>) -> Result<Self, NameError> {
        // A relative path would mean another folder in each working directory.
        let absolute = |path: &OsStr| Path::new(path).is_absolute().then(|| PathBuf::from(path));
        let unit = unit.and_then(|all| {
            // systemd.exec(5): several are separated by colons.
            let first = all.as_bytes().split(|c| *c == b':').next()?;
            absolute(OsStr::from_bytes(first))
        });
        unit.or_else(|| root.then(|| "/run/ferry".into()))
            .or_else(|| Some(absolute(&user?)?.join("ferry")))
            .map(Self)
            .ok_or(NameError::NoFolder)
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The control socket of a guest, whether there is one or not.
    #[must_use]
    pub fn socket(&self, name: &GuestName) -> PathBuf {
        self.0.join(format!("{name}{SUFFIX}"))
    }

    /// The control socket of a guest that is there, or was until its VMM was killed.
    ///
    /// # Errors
    /// [`NameError::Unknown`].
    pub fn existing(&self, name: &GuestName) -> Result<PathBuf, NameError> {
        let path = self.socket(name);
        match path.symlink_metadata() {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err(NameError::Unknown {
                name: name.clone(),
                folder: self.0.clone(),
            }),
            _ => Ok(path),
        }
    }

    /// Makes the folder if it is missing, and checks that only its user can write into it.
    ///
    /// # Errors
    /// [`NameError`].
    pub fn make(&self) -> Result<(), NameError> {
        let system = |what| {
            move |source| NameError::System {
                path: self.0.clone(),
                what,
                source,
            }
        };
        match DirBuilder::new().mode(0o700).create(&self.0) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(system("made")(e)),
            _ => {}
        }
        let found = fs::symlink_metadata(&self.0).map_err(system("read"))?;
        let wrong = if !found.is_dir() {
            "is no folder"
        } else if ![0, geteuid().as_raw()].contains(&found.uid()) {
            "belongs to another user"
        } else if found.mode() & 0o022 != 0 {
            "can be written by other users"
        } else {
            return Ok(());
        };
        Err(NameError::Unsafe {
            path: self.0.clone(),
            what: wrong,
        })
    }

    /// The guests whose sockets are there, by their names.
    ///
    /// # Errors
    /// The folder cannot be read; one that is missing is empty.
    pub fn guests(&self) -> Result<Vec<(GuestName, PathBuf)>, NameError> {
        let system = |source| NameError::System {
            path: self.0.clone(),
            what: "read",
            source,
        };
        let entries = match fs::read_dir(&self.0) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(system)?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.map_err(system)?;
            let file = entry.file_name();
            let name = file.to_str().and_then(|f| f.strip_suffix(SUFFIX));
            let is_socket = entry.file_type().is_ok_and(|kind| kind.is_socket());
            if let (Some(Ok(name)), true) = (name.map(str::parse), is_socket) {
                found.push((name, entry.path()));
            }
        }
        found.sort();
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    fn name(text: &str) -> GuestName {
        text.parse().unwrap()
    }

    #[test]
    fn names_are_file_names_that_no_shell_and_no_option_parser_trips_over() {
        for good in ["web", "7", "a.b_c-D", &"x".repeat(64)] {
            assert_eq!(name(good).as_str(), good);
        }
        let long = "x".repeat(65);
        for bad in [
            "", ".", "..", ".a", "-a", "_a", "a/b", "a b", "ä", "a\n", &long,
        ] {
            let why = bad.parse::<GuestName>().unwrap_err();
            assert!(why.contains("1 to 64 letters"), "{bad:?}: {why}");
        }
    }

    #[test]
    fn each_user_has_a_folder_and_a_unit_has_its_own() {
        let of = |unit: Option<&str>, root, user: Option<&str>| {
            let found = RuntimeFolder::of(unit.map(Into::into), root, user.map(Into::into));
            found.ok().map(|f| f.0.to_str().unwrap().to_owned())
        };
        let user = Some("/run/user/7");
        assert_eq!(of(None, true, user).unwrap(), "/run/ferry");
        assert_eq!(of(None, false, user).unwrap(), "/run/user/7/ferry");
        assert_eq!(of(Some("/run/a:/run/b"), true, user).unwrap(), "/run/a");
        assert_eq!(of(Some("/run/a"), false, None).unwrap(), "/run/a");
        assert_eq!(
            of(Some(""), false, user).unwrap(),
            of(None, false, user).unwrap()
        );
        for nothing in [None, Some(""), Some("run")] {
            assert_eq!(of(None, false, nothing), None);
        }
    }

    #[test]
    fn the_folder_is_private_and_one_that_is_not_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let folder = RuntimeFolder(dir.path().join("ferry"));
        assert_eq!(folder.guests().unwrap(), []);
        folder.make().unwrap();
        folder.make().unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(folder.path()), 0o700);
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o770)).unwrap();
        let why = folder.make().unwrap_err().to_string();
        assert!(why.contains("can be written by other users"), "{why}");

        let link = RuntimeFolder(dir.path().join("link"));
        std::os::unix::fs::symlink(dir.path(), link.path()).unwrap();
        let why = link.make().unwrap_err().to_string();
        assert!(why.contains("is no folder"), "{why}");
        let deep = RuntimeFolder(dir.path().join("no/such"));
        let why = deep.make().unwrap_err().to_string();
        assert!(why.contains("cannot be made"), "{why}");
    }

    #[test]
    fn only_sockets_of_guests_are_listed_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let folder = RuntimeFolder(dir.path().into());
        let _held: Vec<_> = ["b", "a", ".c"]
            .map(|stem| UnixListener::bind(dir.path().join(format!("{stem}.sock"))).unwrap())
            .into();
        fs::write(dir.path().join("d.sock"), "").unwrap();
        fs::write(dir.path().join("notes"), "").unwrap();
        let found = folder.guests().unwrap();
        let names: Vec<_> = found.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["a", "b"]);
        assert_eq!(folder.existing(&name("a")).unwrap(), found[0].1);
        let why = folder.existing(&name("e")).unwrap_err().to_string();
        assert!(why.contains("no guest is named e in"), "{why}");
        assert!(why.contains("`ferry ps`"), "{why}");
    }
}
