//! Stand-in for the migration of machines, until the engine is joined to the machine.

use crate::machine::Machine;
use ferry_migration::options::Options;
use ferry_migration::report::{self, Event, Progress, Report};
use std::fmt;
use std::io::{self, Write};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

/// Where to.
#[derive(Clone, Debug)]
pub enum Uri {
    /// tcp:HOST:PORT
    Tcp {
        /// host
        host: String,
        /// port
        port: u16,
    },
    /// unix:PATH
    Unix(PathBuf),
    /// file:PATH
    File(PathBuf),
}

impl FromStr for Uri {
    type Err = io::Error;
    fn from_str(text: &str) -> io::Result<Self> {
        let odd = || {
            io::Error::other(format!(
                "{text} is no URI; write tcp:HOST:PORT, unix:PATH or file:PATH"
            ))
        };
        match text.split_once(':') {
            Some(("tcp", rest)) => {
                let (host, port) = rest.rsplit_once(':').ok_or_else(odd)?;
                Ok(Self::Tcp {
                    host: host.into(),
                    port: port.parse().map_err(|_| odd())?,
                })
            }
            Some(("unix", path)) => Ok(Self::Unix(path.into())),
            Some(("file", path)) => Ok(Self::File(path.into())),
            _ => Err(odd()),
        }
    }
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Self::Unix(p) => write!(f, "unix:{}", p.display()),
            Self::File(p) => write!(f, "file:{}", p.display()),
        }
    }
}

/// Cancel and look on.
#[derive(Clone, Debug, Default)]
pub struct Handle;

impl Handle {
    /// New.
    #[must_use]
    pub fn new() -> Self {
        Self
    }
    /// Cancels.
    pub fn cancel(&self) {}
    /// Progress.
    #[must_use]
    pub fn progress(&self) -> Progress {
        Progress::default()
    }
}

/// Fails.
pub fn migrate(
    _: &Arc<Machine>,
    _: &Uri,
    o: &Options,
    _: &Handle,
    _: &mut dyn FnMut(Event),
) -> Report {
    Report {
        schema: Report::SCHEMA,
        session: String::new(),
        policy: o.policy.name().into(),
        status: report::Status::Failed,
        error: Some("this build does not migrate yet".into()),
        total_ms: 0.0,
        downtime_ms: 0.0,
        downtime: report::Downtime::default(),
        rounds: Vec::new(),
        pages: report::Pages::default(),
        bytes_wire: 0,
        mbps: 0.0,
        faults: report::Faults::default(),
        verified: None,
        why: None,
    }
}

/// Why nothing arrives.
#[derive(Debug, thiserror::Error)]
#[error("this build does not receive yet")]
pub struct ReceiveError;

/// What the receiver shows to others.
#[derive(Debug, Default)]
pub struct ReceiveState;

/// Receives.
#[derive(Debug)]
pub struct Receiver(Uri);

impl Receiver {
    /// Binds.
    ///
    /// # Errors
    /// None.
    pub fn bind(
        uri: &Uri,
        _: impl Fn() -> Result<Box<dyn Write + Send>, io::Error> + Send + Sync + 'static,
    ) -> Result<Self, ReceiveError> {
        Ok(Self(uri.clone()))
    }
    /// Where.
    #[must_use]
    pub fn local_uri(&self) -> Uri {
        self.0.clone()
    }
    /// Fails.
    ///
    /// # Errors
    /// Always.
    pub fn wait(
        &self,
        _: &ReceiveState,
        _: &mut dyn FnMut(&str),
    ) -> Result<Arc<Machine>, ReceiveError> {
        Err(ReceiveError)
    }
}
