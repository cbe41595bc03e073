//! The control socket's client: what `ferry status` and its siblings speak.

mod reply;

use super::types::{
    BalloonRequest, BalloonStatus, Configuration, ErrorBody, MemoryRequest, MemoryStatus,
    MigrateRequest, MigrationRecord, MigrationStatus, Migrations, Notice, RecordRequest,
    RecoverRequest, SnapshotReport, SnapshotRequest, Status,
};
use crate::socket::dial;
use ferry_migration::report::{Event, Report};
use ferry_migration::steering::Change;
use reply::{Body, Chunked, Lines, lines, read_head};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{self, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The most bytes of a reply's header, of one line of a stream, or of a whole body. A VMM is
/// trusted no more than any other process that may listen on that path.
const MAX_HEAD: usize = 16 << 10;
const MAX_BODY: usize = 8 << 20;

/// How long a VMM may take to answer anything but a migration.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Why a request has no result.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// There is no such file.
    #[error("there is no socket {}; is the guest's VMM running, and was it started with this --api?", .0.display())]
    NoSocket(PathBuf),
    /// There is a file, and no process listens.
    #[error("no ferry answers on {} ({cause}): is the guest's VMM running?", path.display())]
    NoAnswer {
        /// The socket.
        path: PathBuf,
        /// The cause.
        cause: io::Error,
    },
    /// It ended in the middle.
    #[error("the VMM on {} went away before it had answered ({cause}); `ferry status` or its own output says more", path.display())]
    Lost {
        /// The socket.
        path: PathBuf,
        /// The cause.
        cause: io::Error,
    },
    /// It is no ferry.
    #[error("what answers on {} is no ferry ({what}); check the path given to --api", path.display())]
    Foreign {
        /// The socket.
        path: PathBuf,
        /// What is odd about it.
        what: String,
    },
    /// What it sent cannot be kept.
    #[error("what the VMM sent cannot be written ({0})")]
    Output(io::Error),
    /// It said no.
    #[error("{sentence}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// The VMM's sentence.
        sentence: String,
        /// Its name for programs, where it has one.
        code: Option<String>,
    },
}

/// Requests that take no body and give none back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Stop the processors.
    Pause,
    /// Run on.
    Resume,
    /// End guest and VMM.
    Stop,
    /// Give the migration up.
    Cancel,
    /// Press the power button of the guest's machine.
    PowerButton,
}

impl Action {
    const fn path(self) -> &'static str {
        match self {
            Self::Pause => "/v1/pause",
            Self::Resume => "/v1/resume",
            Self::Stop => "/v1/stop",
            Self::Cancel => "/v1/cancel",
            Self::PowerButton => "/v1/power-button",
        }
    }
}

/// Speaks to one VMM; a connection for each request.
#[derive(Clone, Debug)]
pub struct Client {
    path: PathBuf,
    /// For a connection, and for each answer that comes at once.
    timeout: Duration,
}

struct Reply {
    status: u16,
    body: Body,
}

impl Client {
    /// For the VMM on `path`; connects later.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self::with_timeout(path, TIMEOUT)
    }

    /// As [`Client::new`], for a caller that does not wait half a minute for a VMM that is silent.
    #[must_use]
    pub fn with_timeout(path: &Path, timeout: Duration) -> Self {
        Self {
            path: path.to_owned(),
            timeout,
        }
    }

    /// `GET /v1/status`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn status(&self) -> Result<Status, ClientError> {
        self.read_json(self.request("GET", "/v1/status", None, Some(self.timeout))?)
    }

    /// `GET /v1/migration`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn migration(&self) -> Result<MigrationStatus, ClientError> {
        self.read_json(self.request("GET", "/v1/migration", None, Some(TIMEOUT))?)
    }

    /// Pause, resume, stop or cancel.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn act(&self, action: Action) -> Result<(), ClientError> {
        self.request("PUT", action.path(), Some(b"{}".to_vec()), Some(TIMEOUT))
            .map(drop)
    }

    /// `GET /v1/balloon`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn balloon(&self) -> Result<BalloonStatus, ClientError> {
        self.read_json(self.request("GET", "/v1/balloon", None, Some(TIMEOUT))?)
    }

    /// `PUT /v1/balloon`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn set_balloon(&self, request: &BalloonRequest) -> Result<(), ClientError> {
        let body = self.to_json(request)?;
        self.request("PUT", "/v1/balloon", Some(body), Some(TIMEOUT))
            .map(drop)
    }

    /// `GET /v1/memory`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn memory(&self) -> Result<MemoryStatus, ClientError> {
        self.read_json(self.request("GET", "/v1/memory", None, Some(TIMEOUT))?)
    }

    /// `PUT /v1/memory`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn set_memory(&self, request: &MemoryRequest) -> Result<MemoryStatus, ClientError> {
        let body = self.to_json(request)?;
        self.read_json(self.request("PUT", "/v1/memory", Some(body), Some(TIMEOUT))?)
    }

    /// `PATCH /v1/migrate`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn steer(&self, change: &Change) -> Result<(), ClientError> {
        let body = self.to_json(change)?;
        self.request("PATCH", "/v1/migrate", Some(body), Some(TIMEOUT))
            .map(drop)
    }

    /// `PUT /v1/recover`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn recover(&self, request: &RecoverRequest) -> Result<(), ClientError> {
        let body = self.to_json(request)?;
        // No timeout: missing pages are sent before the answer comes.
        self.request("PUT", "/v1/recover", Some(body), None)
            .map(drop)
    }

    /// `PUT /v1/snapshot`: blocks until the file is there.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn snapshot(&self, request: &SnapshotRequest) -> Result<SnapshotReport, ClientError> {
        let body = self.to_json(request)?;
        // No timeout: memory is written before the answer comes.
        self.read_json(self.request("PUT", "/v1/snapshot", Some(body), None)?)
    }

    /// `PUT /v1/migrate`: blocks until the migration has ended, and tells `on_event` what happens
    /// meanwhile. The request's `detach` is not looked at.
    ///
    /// # Errors
    /// [`ClientError`]. A migration that failed is no error here: its report says so.
    pub fn migrate(
        &self,
        request: &MigrateRequest,
        on_event: &mut dyn FnMut(&Event),
    ) -> Result<Report, ClientError> {
        let body = self.to_json(&MigrateRequest {
            detach: false,
            ..request.clone()
        })?;
        // No timeout: nothing need be said while a large memory is hashed, and Ctrl-C works.
        let reply = self.request("PUT", "/v1/migrate", Some(body), None)?;
        let mut lines = lines(reply.body);
        loop {
            match self.next_line::<Event>(&mut lines)? {
                None => return Err(self.lost(io::ErrorKind::UnexpectedEof.into())),
                Some(Event::Report(report)) => {
                    on_event(&Event::Report(report.clone()));
                    return Ok(*report);
                }
                Some(event) => on_event(&event),
            }
        }
    }

    /// `PUT /v1/migrate` with `detach`: begins a migration, and does not wait for it.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn begin_migration(
        &self,
        request: &MigrateRequest,
    ) -> Result<MigrationStatus, ClientError> {
        let body = self.to_json(&MigrateRequest {
            detach: true,
            ..request.clone()
        })?;
        self.read_json(self.request("PUT", "/v1/migrate", Some(body), Some(TIMEOUT))?)
    }

    /// `GET /v1/migrations`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn migrations(&self) -> Result<Migrations, ClientError> {
        self.read_json(self.request("GET", "/v1/migrations", None, Some(TIMEOUT))?)
    }

    /// `GET /v1/migrations/ID`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn migration_record(&self, id: &str) -> Result<MigrationRecord, ClientError> {
        // What no ID has could be another request.
        let own = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
        let plain: String = id.chars().map(own).collect();
        let target = format!("/v1/migrations/{plain}");
        self.read_json(self.request("GET", &target, None, Some(TIMEOUT))?)
    }

    /// `GET /v1/vm`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn configuration(&self) -> Result<Configuration, ClientError> {
        self.read_json(self.request("GET", "/v1/vm", None, Some(TIMEOUT))?)
    }

    /// `GET /v1/events`: blocks until nothing more will happen, and tells `on_notice` what does.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn events(&self, on_notice: &mut dyn FnMut(&Notice)) -> Result<(), ClientError> {
        let reply = self.request("GET", "/v1/events", None, None)?;
        let mut lines = lines(reply.body);
        while let Some(notice) = self.next_line(&mut lines)? {
            on_notice(&notice);
        }
        Ok(())
    }

    /// The next line of a stream; `None` at its end.
    fn next_line<T: DeserializeOwned>(&self, lines: &mut Lines) -> Result<Option<T>, ClientError> {
        let line = match lines.next() {
            Ok(Some(line)) => line,
            Ok(None) => return Ok(None),
            Err(e) if e.kind() == io::ErrorKind::InvalidData => {
                return Err(self.foreign(e.to_string()));
            }
            Err(e) => return Err(self.lost(e)),
        };
        let read = serde_json::from_slice(&line).map(Some);
        read.map_err(|e| self.foreign(format!("an event does not fit: {e}")))
    }

    /// `PUT /v1/record`: blocks until the recording has ended, and writes the trace as it arrives.
    ///
    /// # Errors
    /// [`ClientError`]. What was written until then is a trace that was broken off.
    pub fn record(&self, request: &RecordRequest, to: &mut dyn Write) -> Result<(), ClientError> {
        let body = self.to_json(request)?;
        // Two intervals without a frame and the VMM is not just slow.
        let silence = TIMEOUT + 2 * Duration::from_millis(request.interval_ms);
        let reply = self.request("PUT", "/v1/record", Some(body), Some(silence))?;
        let mut from: Box<dyn Read> = match reply.body {
            Body::Plain(b) => Box::new(b),
            Body::Chunked(b) => Box::new(b),
        };
        let mut buffer = vec![0; 64 << 10];
        loop {
            let n = match from.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(self.lost(e)),
            };
            to.write_all(&buffer[..n]).map_err(ClientError::Output)?;
        }
    }

    /// Any request of any server: its status and its body, whatever they are. Waits for the answer
    /// for `timeout`, or for half a minute.
    ///
    /// # Errors
    /// [`ClientError`], other than [`ClientError::Refused`].
    pub fn call(
        &self,
        method: &str,
        target: &str,
        body: Option<Vec<u8>>,
        timeout: Option<Duration>,
    ) -> Result<(u16, Vec<u8>), ClientError> {
        let reply = self.exchange(method, target, body, Some(timeout.unwrap_or(TIMEOUT)))?;
        Ok((reply.status, self.read_all(reply.body)?))
    }

    fn to_json<T: Serialize>(&self, value: &T) -> Result<Vec<u8>, ClientError> {
        serde_json::to_vec(value)
            .map_err(|e| self.foreign(format!("the request cannot be written: {e}")))
    }

    fn foreign(&self, what: String) -> ClientError {
        ClientError::Foreign {
            path: self.path.clone(),
            what,
        }
    }

    fn lost(&self, cause: io::Error) -> ClientError {
        ClientError::Lost {
            path: self.path.clone(),
            cause,
        }
    }

    fn read_json<T: DeserializeOwned>(&self, reply: Reply) -> Result<T, ClientError> {
        let bytes = self.read_all(reply.body)?;
        serde_json::from_slice(&bytes)
            .map_err(|e| self.foreign(format!("its answer does not fit: {e}")))
    }

    fn read_all(&self, body: Body) -> Result<Vec<u8>, ClientError> {
        let mut bytes = Vec::new();
        let limit = u64::try_from(MAX_BODY).unwrap_or(u64::MAX);
        match body {
            Body::Plain(b) => b.take(limit).read_to_end(&mut bytes),
            Body::Chunked(b) => b.take(limit).read_to_end(&mut bytes),
        }
        .map_err(|e| self.lost(e))?;
        Ok(bytes)
    }

    fn connect(&self) -> Result<UnixStream, ClientError> {
        dial(&self.path, self.timeout).map_err(|cause| match cause.kind() {
            io::ErrorKind::NotFound => ClientError::NoSocket(self.path.clone()),
            _ => ClientError::NoAnswer {
                path: self.path.clone(),
                cause,
            },
        })
    }

    fn request(
        &self,
        method: &str,
        target: &str,
        body: Option<Vec<u8>>,
        timeout: Option<Duration>,
    ) -> Result<Reply, ClientError> {
        let reply = self.exchange(method, target, body, timeout)?;
        if (200..300).contains(&reply.status) {
            return Ok(reply);
        }
        let status = reply.status;
        let text = self.read_all(reply.body)?;
        match serde_json::from_slice::<ErrorBody>(&text) {
            Ok(body) => Err(ClientError::Refused {
                status,
                sentence: one_line(&body.error),
                code: body.code.as_deref().map(one_line),
            }),
            Err(_) => {
                Err(self.foreign(format!("it answers {status} without a ferry's explanation")))
            }
        }
    }

    fn exchange(
        &self,
        method: &str,
        target: &str,
        body: Option<Vec<u8>>,
        timeout: Option<Duration>,
    ) -> Result<Reply, ClientError> {
        let stream = self.connect()?;
        let body = body.unwrap_or_default();
        let mut bytes = format!(
            "{method} {target} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: ferry/{}\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            env!("CARGO_PKG_VERSION"),
            body.len()
        )
        .into_bytes();
        bytes.extend_from_slice(&body);
        let prepare = || {
            stream.set_read_timeout(timeout)?;
            stream.set_write_timeout(Some(self.timeout))
        };
        prepare().map_err(|e| self.lost(e))?;
        // A server that refuses early may not read all; its answer counts, if there is one.
        let sent = (&stream).write_all(&bytes);
        let mut reader = BufReader::new(stream);
        let head = match (read_head(&mut reader), sent) {
            (Ok(head), _) => head,
            (Err(_), Err(e)) => return Err(self.lost(e)),
            (Err(e), Ok(())) if e.kind() == io::ErrorKind::InvalidData => {
                return Err(self.foreign(e.to_string()));
            }
            (Err(e), Ok(())) => return Err(self.lost(e)),
        };
        let limit = head.length.unwrap_or(u64::MAX);
        let body = if head.chunked {
            Body::Chunked(Chunked {
                inner: reader,
                left: 0,
                begun: false,
                ended: false,
            })
        } else {
            Body::Plain(reader.take(limit))
        };
        Ok(Reply {
            status: head.status,
            body,
        })
    }
}

/// What a terminal may be given of another process's words.
fn one_line(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(2000)
        .collect()
}

#[cfg(test)]
mod tests;
