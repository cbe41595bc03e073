//! A TCP or Unix stream socket as a [`Link`].
//!
//! Sockets block for short time slices only (`SO_RCVTIMEO`, `SO_SNDTIMEO`), so that a wait can be
//! cancelled and a peer that stands still is noticed, without a system call more on the fast path.

use std::io::{self, IoSlice, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use ferry_migration::port::Link;
use ferry_migration::wire::Role;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use socket2::SockRef;

use super::beside::Beside;
use super::{Handle, Uri};
use crate::memory::SplicePipe;

/// How long one system call may block.
const SLICE: Duration = Duration::from_millis(200);
/// How long connecting may take.
const CONNECT: Duration = Duration::from_secs(10);

#[derive(Debug)]
enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// A stream socket that carries a migration's channel.
#[derive(Debug)]
pub struct StreamLink {
    stream: Stream,
    timeout: Option<Duration>,
    deadline: Option<Instant>,
    cancel: Option<Handle>,
    pipe: Option<SplicePipe>,
    /// Files on their way beside the bytes; over Unix sockets only.
    beside: Option<Beside>,
}

/// Decides whether a wait goes on.
pub(super) struct Timeout<'a> {
    timeout: Option<Duration>,
    deadline: Option<Instant>,
    cancel: Option<&'a Handle>,
    since: Option<Instant>,
}

impl Timeout<'_> {
    /// Called after progress (`true`) and after a time slice without (`false`).
    pub(super) fn tick(&mut self, progress: bool) -> io::Result<()> {
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
        if self.cancel.is_some_and(Handle::is_cancelled) {
            return Err(io::Error::other("cancelled while waiting for the peer"));
        }
        let since = *self.since.get_or_insert_with(|| Instant::now() - SLICE);
        match self.timeout {
            Some(timeout) if since.elapsed() >= timeout => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("the peer has been silent for {} s", timeout.as_secs()),
            )),
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
        // Small messages (a commit) must not wait for Nagle's algorithm.
        stream.set_nodelay(true)?;
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(SLICE))?;
        stream.set_write_timeout(Some(SLICE))?;
        Ok(Self {
            stream: Stream::Tcp(stream),
            timeout: None,
            deadline: None,
            cancel: None,
            pipe: None,
            beside: None,
        })
    }

    /// Takes a Unix connection.
    ///
    /// # Errors
    /// When its options cannot be set.
    pub fn unix(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(SLICE))?;
        stream.set_write_timeout(Some(SLICE))?;
        Ok(Self {
            stream: Stream::Unix(stream),
            timeout: None,
            deadline: None,
            cancel: None,
            pipe: None,
            beside: Some(Beside::default()),
        })
    }

    /// Takes a Unix connection of a source, which may bring the guest's memory.
    ///
    /// # Errors
    /// When its options cannot be set.
    pub(super) fn accepted(stream: UnixStream) -> io::Result<Self> {
        let mut link = Self::unix(stream)?;
        if let Some(beside) = link.beside() {
            beside.expect();
        }
        Ok(link)
    }

    /// Connects to a receiver.
    ///
    /// # Errors
    /// Nobody there, or not in time.
    pub fn connect(uri: &Uri) -> io::Result<Self> {
        match uri {
            Uri::Unix(path) => Self::unix(UnixStream::connect(path)?),
            Uri::Tcp { host, port } => {
                let mut last =
                    io::Error::new(io::ErrorKind::NotFound, format!("'{host}' has no address"));
                for address in (host.as_str(), *port).to_socket_addrs()? {
                    match TcpStream::connect_timeout(&address, CONNECT) {
                        Ok(stream) => return Self::tcp(stream),
                        Err(error) => last = error,
                    }
                }
                Err(last)
            }
        }
    }

    /// Lets a handle end this link's waits.
    pub(super) fn cancelled_by(&mut self, handle: Handle) {
        self.cancel = Some(handle);
    }

    /// The socket and how long to wait on it.
    pub(super) fn parts(&self) -> (BorrowedFd<'_>, Timeout<'_>) {
        let fd = match &self.stream {
            Stream::Tcp(s) => s.as_fd(),
            Stream::Unix(s) => s.as_fd(),
        };
        (fd, self.timeout(None))
    }

    const fn timeout(&self, since: Option<Instant>) -> Timeout<'_> {
        Timeout {
            timeout: self.timeout,
            deadline: self.deadline,
            cancel: self.cancel.as_ref(),
            since,
        }
    }

    /// A pipe for moving pages off this socket, made when first needed; `None` where that fails.
    pub(super) fn splice_pipe(&mut self) -> Option<(BorrowedFd<'_>, Timeout<'_>, &SplicePipe)> {
        if self.pipe.is_none() {
            self.pipe = SplicePipe::new().ok();
        }
        let (fd, timeout) = self.parts();
        self.pipe.as_ref().map(|pipe| (fd, timeout, pipe))
    }

    /// What goes, and came, beside the bytes; `None` where the connection carries nothing but bytes.
    pub(super) const fn beside(&mut self) -> Option<&mut Beside> {
        self.beside.as_mut()
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        match (&self.stream, &mut self.beside) {
            (Stream::Tcp(s), _) => (&mut &*s).write_vectored(parts),
            (Stream::Unix(s), Some(beside)) if beside.leaves() => beside.send(s, parts),
            (Stream::Unix(s), _) => (&mut &*s).write_vectored(parts),
        }
    }

    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match (&self.stream, &mut self.beside) {
            (Stream::Tcp(s), _) => (&mut &*s).read(buf),
            (Stream::Unix(s), Some(beside)) if beside.expected() => beside.receive(s, buf),
            (Stream::Unix(s), _) => (&mut &*s).read(buf),
        }
    }
}

impl Link for StreamLink {
    fn send(&mut self, head: &[u8], body: &[u8]) -> io::Result<()> {
        let mut slices = [IoSlice::new(head), IoSlice::new(body)];
        let mut left = &mut slices[..];
        IoSlice::advance_slices(&mut left, 0);
        let mut since = None;
        while !left.is_empty() {
            match self.write_vectored(left) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    IoSlice::advance_slices(&mut left, n);
                    since = None;
                    if !left.is_empty() {
                        self.timeout(None).tick(true)?;
                    }
                }
                Err(error) => since = self.timeout(since).retry(error)?,
            }
        }
        Ok(())
    }

    fn recv(&mut self, buf: &mut [u8]) -> io::Result<()> {
        let mut since = None;
        let mut done = 0;
        while done < buf.len() {
            match self.read(&mut buf[done..]) {
                Ok(0) => {
                    return Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "the peer closed the connection",
                    ));
                }
                Ok(n) => {
                    done += n;
                    since = None;
                    if done < buf.len() {
                        self.timeout(None).tick(true)?;
                    }
                }
                Err(error) => since = self.timeout(since).retry(error)?,
            }
        }
        Ok(())
    }

    fn wait_readable(&mut self, timeout: Duration) -> io::Result<bool> {
        let (fd, _) = self.parts();
        // More than the clock can tell is for ever.
        let time = Timespec::try_from(timeout).ok();
        let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
        match poll(&mut fds, time.as_ref()) {
            Ok(ready) => Ok(ready > 0),
            // Whoever waits looks again anyway.
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn bound_queue(&mut self, bytes: u32) {
        let result = match &self.stream {
            // What was sent and not acknowledged is the congestion window's affair: bounding it too would make long
            // links slow, and wait for delayed acknowledgements on short ones.
            Stream::Tcp(s) => SockRef::from(s).set_tcp_notsent_lowat(bytes),
            Stream::Unix(s) => {
                SockRef::from(s).set_send_buffer_size(usize::try_from(bytes).unwrap_or(usize::MAX))
            }
        };
        if let Err(error) = result {
            tracing::debug!(%error, "page faults may wait longer behind the pages that are pushed");
        }
    }

    fn set_timeout(&mut self, timeout: Option<Duration>) {
        self.timeout = timeout;
    }

    fn set_deadline(&mut self, deadline: Option<Duration>) {
        self.deadline = deadline.map(|deadline| Instant::now() + deadline);
    }
}

/// Opens the channels of one migration.
pub(super) struct Dial {
    uri: Uri,
    cancel: Option<Handle>,
}

impl Dial {
    pub(super) const fn new(uri: Uri, cancel: Option<Handle>) -> Self {
        Self { uri, cancel }
    }

    pub(super) fn connect(&mut self, role: Role, _: u16) -> io::Result<StreamLink> {
        let error = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", self.uri));
        let mut link = StreamLink::connect(&self.uri).map_err(error)?;
        // A word about a migration that has ended is not to be cut off by its cancelling.
        if let (Some(handle), false) = (&self.cancel, role == Role::Recover) {
            link.cancelled_by(handle.clone());
        }
        Ok(link)
    }
}
