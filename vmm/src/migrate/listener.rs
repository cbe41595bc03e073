//! Where migrations come to: a TCP or Unix socket that listens.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::gate::Gate;
use super::newcomers::Address;
use super::{StreamLink, Uri};
use crate::socket::{self, BindError};

/// A receiver that has its guest stops listening once its source knows that; the next receiver may
/// be started before.
const SETTLING: Duration = Duration::from_secs(2);

/// Why nothing can be received.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
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
    /// A socket that was passed on cannot be used.
    #[error("cannot listen on the socket that was passed to this process: {0}")]
    Given(io::Error),
    /// The socket's file cannot be made.
    #[error("cannot listen on {uri}: {error}")]
    Socket {
        /// The place.
        uri: String,
        /// Why, and what to do.
        error: BindError,
    },
    /// A thread cannot be started, or there is no descriptor for it.
    #[error("cannot start a thread for migrations: {0}")]
    Thread(io::Error),
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(socket::Socket),
}

/// Listens for sources; they wait until a [`Receiver`](super::Receiver) takes them.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    uri: Uri,
    gate: Gate,
}

impl Listener {
    /// Listens on `uri`. A place that is in use is tried again for two seconds.
    ///
    /// # Errors
    /// [`ReceiveError::Bind`], [`ReceiveError::Socket`].
    pub fn bind(uri: &Uri) -> Result<Self, ReceiveError> {
        let deadline = Instant::now() + SETTLING;
        loop {
            match Self::try_bind(uri) {
                Err(error) if error.is_in_use() && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(50));
                }
                done => return done,
            }
        }
    }

    fn try_bind(uri: &Uri) -> Result<Self, ReceiveError> {
        let error = |error: io::Error| ReceiveError::Bind {
            uri: uri.to_string(),
            hint: match error.kind() {
                io::ErrorKind::AddrInUse => {
                    "something listens there already: stop it or choose another place"
                }
                io::ErrorKind::PermissionDenied => "choose a place that this user may use",
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
                    gate: Gate::default(),
                })
            }
            Uri::Unix(path) => {
                let socket = socket::Socket::bind(path).map_err(|error| ReceiveError::Socket {
                    uri: uri.to_string(),
                    error,
                })?;
                Ok(Self {
                    uri: Uri::Unix(socket.path().to_owned()),
                    socket: Socket::Unix(socket),
                    gate: Gate::default(),
                })
            }
        }
    }

    /// A stream socket that listens already: of a Unix socket the file is not removed.
    ///
    /// # Errors
    /// [`ReceiveError::Given`].
    pub fn given(fd: OwnedFd) -> Result<Self, ReceiveError> {
        let address = socket2::SockRef::from(&fd).local_addr();
        let address = address.map_err(ReceiveError::Given)?;
        let (socket, uri) = match address.as_socket() {
            Some(address) => {
                let listener = TcpListener::from(fd);
                listener
                    .set_nonblocking(true)
                    .map_err(ReceiveError::Given)?;
                let (host, port) = (address.ip().to_string(), address.port());
                (Socket::Tcp(listener), Uri::Tcp { host, port })
            }
            None => {
                let socket = socket::Socket::given(fd).map_err(ReceiveError::Given)?;
                let uri = Uri::Unix(socket.path().to_owned());
                (Socket::Unix(socket), uri)
            }
        };
        Ok(Self {
            socket,
            uri,
            gate: Gate::default(),
        })
    }

    /// Lets in only what this gate does.
    #[must_use]
    pub fn behind(mut self, gate: Gate) -> Self {
        self.gate = gate;
        self
    }

    pub(super) const fn gate(&self) -> &Gate {
        &self.gate
    }

    /// Where it listens, with the port that was chosen.
    #[must_use]
    pub const fn local_uri(&self) -> &Uri {
        &self.uri
    }

    /// Takes connections until it is told to stop.
    ///
    /// # Errors
    /// They cannot be waited for.
    pub(super) fn accept_until(
        &self,
        stop: &Stop,
        take: impl Fn(Incoming),
    ) -> Result<(), event_manager::Error> {
        let mut manager = EventManager::new()?;
        let id = manager.add_subscriber(Accepting {
            listener: self,
            take,
        });
        let mut ops = manager.event_ops(id)?;
        for (fd, data) in [(self.as_raw_fd(), LISTENER), (stop.event.as_raw_fd(), STOP)] {
            ops.add(Events::with_data_raw(fd, data, EventSet::IN))?;
        }
        while !stop.is_set() {
            manager.run()?;
        }
        Ok(())
    }

    fn accept(&self) -> io::Result<Incoming> {
        match &self.socket {
            Socket::Tcp(l) => l.accept().and_then(|(s, from)| Incoming::tcp(s, from)),
            Socket::Unix(s) => s.listener().accept().and_then(|(s, _)| Incoming::unix(s)),
        }
    }

    fn as_raw_fd(&self) -> RawFd {
        match &self.socket {
            Socket::Tcp(listener) => listener.as_raw_fd(),
            Socket::Unix(socket) => socket.listener().as_raw_fd(),
        }
    }
}

/// What an event's data says.
const LISTENER: u32 = 0;
const STOP: u32 = 1;

struct Accepting<'a, F> {
    listener: &'a Listener,
    take: F,
}

impl<F: Fn(Incoming)> MutEventSubscriber for Accepting<'_, F> {
    fn process(&mut self, events: Events, _: &mut EventOps) {
        // A stop is seen by the loop.
        if events.data() != LISTENER {
            return;
        }
        match self.listener.accept() {
            Ok(incoming) => (self.take)(incoming),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                // It is still there: without descriptors this would go round and round.
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }

    /// Adds what the loop waits for; returns why that fails.
    fn init(&mut self, _: &mut EventOps) {}
}

/// Ends [`Listener::accept_until`].
#[derive(Debug)]
pub(super) struct Stop {
    set: AtomicBool,
    event: EventFd,
}

impl Stop {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            set: AtomicBool::new(false),
            event: EventFd::new(EFD_NONBLOCK)?,
        })
    }

    pub(super) fn is_set(&self) -> bool {
        self.set.load(Ordering::SeqCst)
    }

    pub(super) fn set(&self) {
        self.set.store(true, Ordering::SeqCst);
        if let Err(error) = self.event.write(1) {
            tracing::error!(%error, "the receiver is not told to stop");
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

impl ReceiveError {
    fn is_in_use(&self) -> bool {
        match self {
            Self::Bind { error, .. } => error.kind() == io::ErrorKind::AddrInUse,
            Self::Socket { error, .. } => matches!(error, BindError::InUse { .. }),
            Self::Given(_) | Self::Thread(_) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_file_in_the_way_stays_and_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        fs::write(&path, "precious").unwrap();
        let uri = Uri::Unix(path.clone());
        let error = Listener::bind(&uri).unwrap_err().to_string();
        assert!(error.contains(&uri.to_string()), "{error}");
        assert!(error.contains("is no socket"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_dead_receiver_s_socket_is_replaced_by_a_private_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("link");
        crate::socket::tests::leave(&path);
        let listener = Listener::bind(&Uri::Unix(path.clone())).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn a_place_that_is_being_left_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let uri = Uri::Unix(dir.path().join("link"));
        let old = Listener::bind(&uri).unwrap();
        std::thread::scope(|s| {
            let new = s.spawn(|| Listener::bind(&uri));
            std::thread::sleep(Duration::from_millis(200));
            drop(old);
            new.join().unwrap().unwrap();
        });
    }
}
