//! What an agent is told about its host.

use serde::Deserialize;
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// The file of `ferry agent --config`, as TOML. What the command line says counts before it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Where to listen.
    pub listen: SocketAddr,
    /// The folder with `ca-cert.pem`, `server-cert.pem` and `server-key.pem`.
    pub tls: PathBuf,
    /// Names of which a client's certificate must carry one; empty: any of the authority.
    pub tls_authz: Vec<String>,
    /// The folder with guest files.
    pub guests: PathBuf,
    /// Where disks are here: what a path elsewhere begins with, and what it begins with here. The
    /// longest that fits counts.
    pub disks: BTreeMap<PathBuf, PathBuf>,
    /// The hosts to which `ferry evacuate` moves guests where it is not said.
    pub peers: Vec<String>,
    /// Where a page for browsers is served, if it is: a loopback address.
    pub page: Option<SocketAddr>,
    /// What taps are called here: the name elsewhere, and the name here.
    pub taps: BTreeMap<String, String>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([0, 0, 0, 0], super::PORT)),
            tls: "/etc/ferry/pki".into(),
            tls_authz: Vec::new(),
            guests: "/etc/ferry/guests".into(),
            disks: BTreeMap::new(),
            peers: Vec::new(),
            page: None,
            taps: BTreeMap::new(),
        }
    }
}

/// Why a file tells nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SettingsError {
    /// It cannot be read.
    #[error("{path} cannot be read ({cause})")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// It is no TOML, or has something that is not known.
    #[error("{path}: {cause}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Why, with the line.
        cause: Box<toml::de::Error>,
    },
}

impl Settings {
    /// Reads a file.
    ///
    /// # Errors
    /// [`SettingsError`].
    pub fn read(path: &Path) -> Result<Self, SettingsError> {
        let text = std::fs::read_to_string(path).map_err(|cause| SettingsError::Read {
            path: path.to_owned(),
            cause,
        })?;
        toml::from_str(&text).map_err(|cause| SettingsError::Parse {
            path: path.to_owned(),
            cause: Box::new(cause),
        })
    }

    /// Where a disk is here.
    #[must_use]
    pub(crate) fn disk(&self, elsewhere: &Path) -> PathBuf {
        let fits = self.disks.iter().filter_map(|(from, to)| {
            let rest = elsewhere.strip_prefix(from).ok()?;
            let here = match rest.as_os_str().is_empty() {
                true => to.clone(),
                false => to.join(rest),
            };
            Some((from.components().count(), here))
        });
        fits.max_by_key(|(length, _)| *length)
            .map_or_else(|| elsewhere.to_owned(), |(_, here)| here)
    }

    /// What a tap is called here.
    #[must_use]
    pub(crate) fn tap(&self, elsewhere: &str) -> String {
        let here = self.taps.get(elsewhere);
        here.map_or_else(|| elsewhere.to_owned(), Clone::clone)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_beginning_counts() {
        let settings: Settings = toml::from_str(
            r#"
            [disks]
            "/srv" = "/mnt/srv"
            "/srv/fast" = "/nvme"
            "/dev/vg/web" = "/dev/mapper/web"
            [taps]
            tap0 = "tap7"
            "#,
        )
        .unwrap();
        for (elsewhere, here) in [
            ("/srv/a.img", "/mnt/srv/a.img"),
            ("/srv/fast/b.img", "/nvme/b.img"),
            // A name that only begins alike is another.
            ("/srv/faster/c.img", "/mnt/srv/faster/c.img"),
            ("/srvx/d.img", "/srvx/d.img"),
            ("/dev/vg/web", "/dev/mapper/web"),
        ] {
            assert_eq!(settings.disk(Path::new(elsewhere)), Path::new(here));
        }
        assert_eq!(settings.tap("tap0"), "tap7");
        assert_eq!(settings.tap("tap1"), "tap1");
    }

    #[test]
    fn what_is_not_known_is_named_with_its_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.toml");
        std::fs::write(&path, "listen = \"127.0.0.1:1\"\nlisen = 1\n").unwrap();
        let error = Settings::read(&path).unwrap_err().to_string();
        assert!(
            error.contains("line 2") && error.contains("lisen"),
            "{error}"
        );
        let error = Settings::read(&dir.path().join("none"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("cannot be read"), "{error}");
    }
}
