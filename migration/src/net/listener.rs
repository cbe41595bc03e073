//! A TCP or Unix socket that listens.

use super::StreamLink;
use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, Instant};

/// How often a waiting listener looks: the standard library has no accept with a timeout.
const LOOK: Duration = Duration::from_millis(2);

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// Listens for the channels of migrations.
#[derive(Debug)]
pub struct Listener(Socket);

impl Listener {
    /// Listens for TCP connections; port 0 chooses a free one.
    ///
    /// # Errors
    /// When the address cannot be bound.
    pub fn tcp(address: impl ToSocketAddrs) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        Ok(Self(Socket::Tcp(listener)))
    }

    /// Listens on a Unix socket, which must not exist yet and stays when the listener is dropped.
    ///
    /// # Errors
    /// When the path cannot be bound.
    pub fn unix(path: impl AsRef<Path>) -> io::Result<Self> {
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        Ok(Self(Socket::Unix(listener)))
    }

    /// The address that TCP connections come to; `None` for a Unix socket.
    #[must_use]
    pub fn address(&self) -> Option<SocketAddr> {
        match &self.0 {
            Socket::Tcp(listener) => listener.local_addr().ok(),
            Socket::Unix(_) => None,
        }
    }

    /// The next connection; `None` when there was none for so long.
    ///
    /// # Errors
    /// When a connection cannot be accepted.
    pub fn accept(&self, timeout: Duration) -> io::Result<Option<StreamLink>> {
        let until = Instant::now().checked_add(timeout);
        loop {
            let accepted = match &self.0 {
                Socket::Tcp(listener) => listener
                    .accept()
                    .and_then(|(stream, _)| StreamLink::tcp(stream)),
                Socket::Unix(listener) => listener
                    .accept()
                    .and_then(|(stream, _)| StreamLink::unix(stream)),
            };
            match accepted {
                Ok(link) => return Ok(Some(link)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            if until.is_some_and(|until| Instant::now() >= until) {
                return Ok(None);
            }
            std::thread::sleep(LOOK);
        }
    }
}
