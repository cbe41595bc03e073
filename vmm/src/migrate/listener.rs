//! Where migrations come to: a TCP or Unix socket that listens.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::newcomers::Address;
use super::{StreamLink, Uri};

/// Why nothing can be received.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The place cannot be listened on.
    #[error("cannot listen on {uri}: {error}; {hint}")]
    Bind {
        /// The place.
        uri: String,
        /// Why.
        error: io::Error,
        /// What to do.
        hint: &'static str,
    },
    /// A thread cannot be started.
    #[error("cannot start a thread for migrations: {0}")]
    Thread(io::Error),
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

/// Listens for sources; they wait until a [`Receiver`](super::Receiver) takes them.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    uri: Uri,
}

impl Listener {
    /// Listens on `uri`.
    ///
    /// # Errors
    /// [`ReceiveError::Bind`].
    pub fn bind(uri: &Uri) -> Result<Self, ReceiveError> {
        let error = |error: io::Error| ReceiveError::Bind {
            uri: uri.to_string(),
            hint: match error.kind() {
                io::ErrorKind::AddrInUse => {
                    "something listens there already: stop it or choose another place"
                }
                io::ErrorKind::PermissionDenied => "choose a place that this user may use",
                io::ErrorKind::NotFound => "the directory must exist",
                _ => "give an address of this host, such as tcp:0.0.0.0:7000",
            },
            error,
        };
        match uri {
            Uri::Tcp { host, port } => {
                let listener = TcpListener::bind((host.as_str(), *port)).map_err(error)?;
                let port = listener.local_addr().map_err(error)?.port();
                listener.set_nonblocking(true).map_err(error)?;
                let host = host.clone();
                Ok(Self {
                    socket: Socket::Tcp(listener),
                    uri: Uri::Tcp { host, port },
                })
            }
            Uri::Unix(path) => {
                if UnixStream::connect(path)
                    .is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused)
                {
                    // A dead receiver's leftover: nobody listens on it.
                    let _ = std::fs::remove_file(path);
                }
                let listener = UnixListener::bind(path).map_err(error)?;
                listener.set_nonblocking(true).map_err(error)?;
                Ok(Self {
                    socket: Socket::Unix(listener, path.clone()),
                    uri: uri.clone(),
                })
            }
        }
    }

    /// Where it listens, with the port that was chosen.
    #[must_use]
    pub const fn local_uri(&self) -> &Uri {
        &self.uri
    }

    /// Takes connections until it is told to stop.
    pub(super) fn accept_until(&self, stop: &AtomicBool, take: impl Fn(Incoming)) {
        let tick = Timespec {
            tv_sec: 0,
            tv_nsec: 100_000_000,
        };
        while !stop.load(Ordering::SeqCst) {
            let ready = match &self.socket {
                Socket::Tcp(l) => poll(&mut [PollFd::new(l, PollFlags::IN)], Some(&tick)),
                Socket::Unix(l, _) => poll(&mut [PollFd::new(l, PollFlags::IN)], Some(&tick)),
            };
            if !matches!(ready, Ok(n) if n > 0) {
                continue;
            }
            let incoming = match &self.socket {
                Socket::Tcp(l) => l.accept().and_then(|(s, from)| Incoming::tcp(s, from)),
                Socket::Unix(l, _) => l.accept().and_then(|(s, _)| Incoming::unix(s)),
            };
            match incoming {
                Ok(incoming) => take(incoming),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    std::thread::sleep(Duration::from_millis(50));
                }
            }
        }
    }
}

/// A connection that was just accepted.
pub(super) struct Incoming {
    pub link: StreamLink,
    pub address: Address,
    /// A second descriptor of its socket, by which it can be closed.
    pub socket: OwnedFd,
}

impl Incoming {
    fn tcp(stream: TcpStream, from: SocketAddr) -> io::Result<Self> {
        Ok(Self {
            socket: stream.try_clone()?.into(),
            link: StreamLink::tcp(stream)?,
            address: Some(from.ip()),
        })
    }

    fn unix(stream: UnixStream) -> io::Result<Self> {
        Ok(Self {
            socket: stream.try_clone()?.into(),
            link: StreamLink::accepted(stream)?,
            address: None,
        })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Socket::Unix(_, path) = &self.socket {
            let _ = std::fs::remove_file(path);
        }
    }
}
