//! Where a migration goes: `tcp:HOST:PORT` or `unix:PATH`.

use std::fmt;
use std::io;
use std::net::ToSocketAddrs;
use std::path::{Path, PathBuf, absolute};
use std::str::FromStr;

use crate::socket::is_addressable;

/// Where a migration goes to or comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Uri {
    /// `tcp:HOST:PORT`; an IPv6 address stands in brackets.
    Tcp {
        /// Name or address.
        host: String,
        /// Port; 0 lets a receiver choose a free one.
        port: u16,
    },
    /// `unix:PATH`: a socket on this host.
    Unix(PathBuf),
}

/// Why a text is no such place.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UriError {
    /// Not one of the forms.
    #[error("'{0}' is no place to migrate to; write tcp:HOST:PORT or unix:PATH")]
    Form(String),
    /// The port is no number.
    #[error(
        "'{0}' has no port between 0 and 65535; write tcp:HOST:PORT, for instance tcp:10.0.0.2:7000"
    )]
    Port(String),
    /// A file takes a snapshot.
    #[error(
        "'file:{0}' is a file: `ferry snapshot --api SOCKET {0} --then stop` puts the guest there, and `ferry restore {0}` \
         takes it from there; a migration goes to tcp:HOST:PORT or unix:PATH"
    )]
    File(String),
    /// Longer than a socket's address can be.
    #[error("the socket path '{0}' is longer than 107 bytes; choose a shorter one")]
    Long(String),
}

impl Uri {
    /// The same place for a process with another working directory.
    ///
    /// # Errors
    /// When the working directory cannot be told.
    pub fn absolute(self) -> io::Result<Self> {
        match self {
            Self::Unix(path) => Ok(Self::Unix(absolute(path)?)),
            tcp @ Self::Tcp { .. } => Ok(tcp),
        }
    }

    /// Whether only this host can reach it. A name that cannot be looked up is no such place.
    #[must_use]
    pub fn is_on_this_host(&self) -> bool {
        match self {
            Self::Unix(_) => true,
            Self::Tcp { host, port } => (host.as_str(), *port)
                .to_socket_addrs()
                .is_ok_and(|mut all| all.all(|address| address.ip().to_canonical().is_loopback())),
        }
    }
}

/// A place as a client is to send it to a VMM, which has another working directory: a relative
/// `unix:` path becomes absolute. Other text stays as it is, for the VMM to judge.
#[must_use]
pub fn absolute_uri(text: &str) -> String {
    let uri = text.parse::<Uri>().ok().and_then(|uri| uri.absolute().ok());
    uri.map_or_else(|| text.to_owned(), |uri| uri.to_string())
}

impl FromStr for Uri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        if let Some(rest) = text.strip_prefix("tcp:") {
            let (host, port) = rest
                .rsplit_once(':')
                .ok_or_else(|| UriError::Port(text.into()))?;
            let host = host
                .strip_prefix('[')
                .and_then(|h| h.strip_suffix(']'))
                .unwrap_or(host);
            if host.is_empty() {
                return Err(UriError::Form(text.into()));
            }
            let port = port.parse().map_err(|_| UriError::Port(text.into()))?;
            return Ok(Self::Tcp {
                host: host.into(),
                port,
            });
        }
        if let Some(path) = text.strip_prefix("file:") {
            return Err(UriError::File(path.into()));
        }
        match text.strip_prefix("unix:") {
            Some(path) if !is_addressable(Path::new(path)) => Err(UriError::Long(path.into())),
            Some(path) if !path.is_empty() => Ok(Self::Unix(path.into())),
            _ => Err(UriError::Form(text.into())),
        }
    }
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_and_unix_are_this_host() {
        let here = |text: &str| text.parse::<Uri>().unwrap().is_on_this_host();
        for text in [
            "tcp:127.0.0.1:0",
            "tcp:127.9.9.9:1",
            "tcp:[::1]:0",
            "tcp:[::ffff:127.0.0.1]:1",
            "unix:x",
        ] {
            assert!(here(text), "{text}");
        }
        for text in [
            "tcp:0.0.0.0:0",
            "tcp:[::]:0",
            "tcp:192.0.2.1:7000",
            "tcp:no such name:1",
        ] {
            assert!(!here(text), "{text}");
        }
    }

    #[test]
    fn forms() {
        for good in [
            "tcp:127.0.0.1:7000",
            "tcp:[::1]:0",
            "tcp:host.example:65535",
            "unix:/run/x.sock",
        ] {
            assert_eq!(good.parse::<Uri>().unwrap().to_string(), good);
        }
        for bad in [
            "",
            "tcp:",
            "tcp:host",
            "tcp::80",
            "tcp:host:99999",
            "tcp:host:x",
            "unix:",
            "file:/tmp/x",
            "http://x",
            "/run/x",
        ] {
            let message = bad.parse::<Uri>().unwrap_err().to_string();
            assert!(message.contains("tcp:HOST:PORT"), "{message}");
        }
        assert!(format!("unix:/{}", "x".repeat(107)).parse::<Uri>().is_err());
    }

    #[test]
    fn a_relative_path_means_the_caller_s_file() {
        let here = std::env::current_dir().unwrap();
        let uri: Uri = "unix:link".parse().unwrap();
        assert_eq!(uri.absolute().unwrap(), Uri::Unix(here.join("link")));
        let tcp: Uri = "tcp:host:1".parse().unwrap();
        assert_eq!(tcp.clone().absolute().unwrap(), tcp);
        let text = format!("unix:{}", here.join("a/link").display());
        assert_eq!(absolute_uri("unix:a/link"), text);
        assert_eq!(absolute_uri("nonsense"), "nonsense");
        // Short where it was written, and long from the root.
        let deep = format!("unix:/{}/link", "d".repeat(150));
        assert_eq!(deep.parse::<Uri>().unwrap().to_string(), deep);
    }
}
