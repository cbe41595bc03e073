//! A stream socket as a [`Link`].
//!
//! One system call blocks for a short slice only. So a wait can be cancelled, and a silent peer is
//! noticed, without a further system call on the fast path.

use super::socket::{Socket, Stream, TcpSocket, UnixSocket};
use crate::port::Link;
use std::fmt;
use std::io::{self, IoSlice};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

#[cfg(feature = "tls")]
mod secured;
#[cfg(feature = "tls")]
pub use secured::Unsecured;

/// How long one system call may block: how late a cancelled wait ends.
const SLICE: Duration = Duration::from_millis(200);
/// How long connecting to one address may take: a lost SYN is sent again after 1, 3 and 7 seconds.
const CONNECT: Duration = Duration::from_secs(10);

type Cancelled = Arc<dyn Fn() -> bool + Send + Sync>;

/// A stream socket that carries one channel of a migration.
pub struct StreamLink<S = Stream> {
    socket: S,
    #[cfg(feature = "tls")]
    tls: Option<secured::Secured>,
    bounds: Bounds,
}

/// How long a link waits.
#[derive(Default)]
struct Bounds {
    timeout: Option<Duration>,
    deadline: Option<Instant>,
    cancelled: Option<Cancelled>,
}

impl Bounds {
    const fn wait(&self, since: Option<Instant>) -> Wait<'_> {
        Wait {
            timeout: self.timeout,
            deadline: self.deadline,
            cancelled: self.cancelled.as_ref(),
            since,
        }
    }
}

impl<S: fmt::Debug> fmt::Debug for StreamLink<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("StreamLink").field(&self.socket).finish()
    }
}

/// Decides whether a wait for the peer goes on: until it is cancelled, takes too long, or is
/// without progress for too long.
pub struct Wait<'a> {
    timeout: Option<Duration>,
    deadline: Option<Instant>,
    cancelled: Option<&'a Cancelled>,
    /// Since when there was no progress.
    since: Option<Instant>,
}

impl Wait<'_> {
    /// Called after progress (`true`), and after a time slice without (`false`).
    ///
    /// # Errors
    /// The wait is cancelled or too long.
    pub fn tick(&mut self, progress: bool) -> io::Result<()> {
        if self.deadline.is_some_and(|until| Instant::now() >= until) {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "the peer has taken longer than this step may take",
            ));
        }
        if progress {
            self.since = None;
            return Ok(());
        }
        if self.cancelled.is_some_and(|cancelled| cancelled()) {
            return Err(io::Error::other("cancelled while waiting for the peer"));
        }
        let now = Instant::now();
        // The slice that has just ended counts.
        let began = || now.checked_sub(SLICE).unwrap_or(now);
        let since = *self.since.get_or_insert_with(began);
        match self.timeout {
            Some(timeout) if now.saturating_duration_since(since) >= timeout => {
                Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("the peer has been silent for {} s", timeout.as_secs()),
                ))
            }
            _ => Ok(()),
        }
    }

    /// Whether to go on after an error of a system call; since when there was no progress.
    fn retry(mut self, error: io::Error) -> io::Result<Option<Instant>> {
        match error.kind() {
            io::ErrorKind::Interrupted => {}
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => self.tick(false)?,
            _ => return Err(error),
        }
        Ok(self.since)
    }
}

impl StreamLink {
    /// Takes a TCP connection.
    ///
    /// # Errors
    /// When its options cannot be set.
    pub fn tcp(stream: TcpStream) -> io::Result<Self> {
        Self::new(Stream::Tcp(TcpSocket::new(stream)?))
    }

    /// Takes a Unix connection.
    ///
    /// # Errors
    /// When its options cannot be set.
    pub fn unix(stream: UnixStream) -> io::Result<Self> {
        Self::new(Stream::Unix(UnixSocket::new(stream)?))
    }

    /// Connects by TCP, such as to `"192.0.2.7:7000"`.
    ///
    /// # Errors
    /// As [`connect`].
    pub fn connect_tcp(address: impl ToSocketAddrs) -> io::Result<Self> {
        Self::tcp(connect(address)?)
    }

    /// Connects to a Unix socket.
    ///
    /// # Errors
    /// When nothing listens at the path.
    pub fn connect_unix(path: impl AsRef<Path>) -> io::Result<Self> {
        Self::unix(UnixStream::connect(path)?)
    }
}

/// Connects to the first address that answers, each within 10 s.
///
/// # Errors
/// The name has no address, or the last address does not answer.
pub fn connect(address: impl ToSocketAddrs) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, CONNECT) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

impl<S: Socket> StreamLink<S> {
    /// Takes a connected socket.
    ///
    /// # Errors
    /// When its timeouts cannot be set.
    pub fn new(mut socket: S) -> io::Result<Self> {
        socket.set_slice(SLICE)?;
        Ok(Self {
            socket,
            #[cfg(feature = "tls")]
            tls: None,
            bounds: Bounds::default(),
        })
    }

    /// Waits of this link end, with an error, within 200 ms once `cancelled` says so.
    pub fn cancelled_by(&mut self, cancelled: impl Fn() -> bool + Send + Sync + 'static) {
        self.bounds.cancelled = Some(Arc::new(cancelled));
    }

    /// The socket, for what only it can do.
    pub const fn socket(&self) -> &S {
        &self.socket
    }

    /// The socket, for what only it can do.
    pub const fn socket_mut(&mut self) -> &mut S {
        &mut self.socket
    }

    /// Bounds a wait on the socket itself as this link bounds its own.
    pub const fn wait(&self) -> Wait<'_> {
        self.bounds.wait(None)
    }

    /// Whether the connection has TLS.
    #[must_use]
    pub const fn is_secured(&self) -> bool {
        #[cfg(feature = "tls")]
        return self.tls.is_some();
        #[cfg(not(feature = "tls"))]
        false
    }

    /// Whether bytes are coded before they go to the socket: it must not be read or written by
    /// itself then.
    #[must_use]
    pub const fn is_coded_here(&self) -> bool {
        #[cfg(feature = "tls")]
        return self.has_session();
        #[cfg(not(feature = "tls"))]
        false
    }

    /// Called before so many bytes are written to the socket itself by one call.
    ///
    /// # Errors
    /// A secured connection must not carry more.
    pub fn will_send(&mut self, bytes: u64) -> io::Result<()> {
        #[cfg(feature = "tls")]
        return self.will_send_by_kernel(bytes);
        #[cfg(not(feature = "tls"))]
        {
            let _ = bytes;
            Ok(())
        }
    }

    /// What an error of the socket itself means: a peer may have said why it ends the connection.
    #[must_use]
    pub fn explain(&self, error: io::Error) -> io::Error {
        #[cfg(feature = "tls")]
        return self.explain_by_kernel(error);
        #[cfg(not(feature = "tls"))]
        error
    }

    fn retry(&self, since: Option<Instant>, error: io::Error) -> io::Result<Option<Instant>> {
        let retried = self.bounds.wait(since).retry(error);
        retried.map_err(|error| self.explain(error))
    }
}

fn closed() -> io::Error {
    io::Error::new(
        io::ErrorKind::UnexpectedEof,
        "the peer closed the connection",
    )
}

impl<S: Socket> Link for StreamLink<S> {
    fn send(&mut self, head: &[u8], body: &[u8]) -> io::Result<()> {
        #[cfg(feature = "tls")]
        if self.is_coded_here() {
            return self.send_coded(head, body);
        }
        self.will_send((head.len() + body.len()) as u64)?;
        let mut slices = [IoSlice::new(head), IoSlice::new(body)];
        let mut left = &mut slices[..];
        IoSlice::advance_slices(&mut left, 0);
        let mut since = None;
        while !left.is_empty() {
            match self.socket.write_vectored(left) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    IoSlice::advance_slices(&mut left, n);
                    since = None;
                    if !left.is_empty() {
                        self.bounds.wait(None).tick(true)?;
                    }
                }
                Err(error) => since = self.retry(since, error)?,
            }
        }
        Ok(())
    }

    fn recv(&mut self, buf: &mut [u8]) -> io::Result<()> {
        #[cfg(feature = "tls")]
        if self.is_coded_here() {
            return self.recv_coded(buf);
        }
        let mut since = None;
        let mut done = 0;
        while done < buf.len() {
            match self.socket.read(&mut buf[done..]) {
                Ok(0) => return Err(closed()),
                Ok(n) => {
                    done += n;
                    since = None;
                    if done < buf.len() {
                        self.bounds.wait(None).tick(true)?;
                    }
                }
                Err(error) => since = self.retry(since, error)?,
            }
        }
        Ok(())
    }

    fn wait_readable(&mut self, timeout: Duration) -> io::Result<bool> {
        #[cfg(feature = "tls")]
        if self.is_coded_here() {
            return self.wait_readable_coded(timeout);
        }
        self.socket.wait_readable(timeout)
    }

    fn bound_queue(&mut self, bytes: u32) {
        self.socket.bound_queue(bytes);
    }

    fn set_timeout(&mut self, timeout: Option<Duration>) {
        self.bounds.timeout = timeout;
    }

    fn set_deadline(&mut self, deadline: Option<Duration>) {
        self.bounds.deadline = deadline.and_then(|deadline| Instant::now().checked_add(deadline));
    }
}
