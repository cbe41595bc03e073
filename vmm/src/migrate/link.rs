//! A TCP or Unix socket as a migration's link: [`net::StreamLink`], and what only this VMM does
//! with the socket: moving pages by splice, and passing files over a Unix socket.

use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use ferry_devices::thread;
use ferry_migration::net::tls::{Admission, ClientTls, Secret, ServerTls};
use ferry_migration::net::{self, Wait};
use ferry_migration::port::Link;
use ferry_migration::wire::Role;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use socket2::SockRef;

use super::fd_passing::FdPassing;
use super::{Handle, Peer, Uri};
use crate::memory::SplicePipe;
use crate::socket::dial_unless;

/// How long connecting to a Unix socket may take.
const CONNECT: Duration = Duration::from_secs(10);
/// How soon a cancel is noticed while connecting over TCP.
const TICK: Duration = Duration::from_millis(50);

#[derive(Debug)]
enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// The socket, and what goes with it.
#[derive(Debug)]
struct Socket {
    stream: Stream,
    pipe: Option<SplicePipe>,
    /// Files on their way beside the bytes; over Unix sockets only.
    fd_passing: Option<FdPassing>,
}

impl Socket {
    fn fd(&self) -> BorrowedFd<'_> {
        match &self.stream {
            Stream::Tcp(s) => s.as_fd(),
            Stream::Unix(s) => s.as_fd(),
        }
    }
}

impl net::Socket for Socket {
    fn set_slice(&mut self, slice: Duration) -> io::Result<()> {
        match &self.stream {
            Stream::Tcp(s) => {
                s.set_nonblocking(false)?;
                s.set_read_timeout(Some(slice))?;
                s.set_write_timeout(Some(slice))
            }
            Stream::Unix(s) => {
                s.set_nonblocking(false)?;
                s.set_read_timeout(Some(slice))?;
                s.set_write_timeout(Some(slice))
            }
        }
    }

    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match (&self.stream, &mut self.fd_passing) {
            (Stream::Tcp(s), _) => (&mut &*s).read(buf),
            (Stream::Unix(s), Some(fd_passing)) if fd_passing.expected() => {
                fd_passing.receive(s, buf)
            }
            (Stream::Unix(s), _) => (&mut &*s).read(buf),
        }
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        match (&self.stream, &mut self.fd_passing) {
            (Stream::Tcp(s), _) => (&mut &*s).write_vectored(parts),
            (Stream::Unix(s), Some(fd_passing)) if fd_passing.leaves() => fd_passing.send(s, parts),
            (Stream::Unix(s), _) => (&mut &*s).write_vectored(parts),
        }
    }

    fn wait_readable(&mut self, timeout: Duration) -> io::Result<bool> {
        // A timeout that the clock cannot tell is none.
        let time = Timespec::try_from(timeout).ok();
        let mut fds = [PollFd::from_borrowed_fd(self.fd(), PollFlags::IN)];
        match poll(&mut fds, time.as_ref()) {
            Ok(ready) => Ok(ready > 0),
            // The engine waits again.
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn tcp(&self) -> Option<BorrowedFd<'_>> {
        match &self.stream {
            Stream::Tcp(s) => Some(s.as_fd()),
            Stream::Unix(_) => None,
        }
    }

    fn bound_queue(&mut self, bytes: u32) {
        let result = match &self.stream {
            // Bytes sent and not acknowledged belong to the congestion window: a bound on them
            // makes long links slow.
            Stream::Tcp(s) => SockRef::from(s).set_tcp_notsent_lowat(bytes),
            Stream::Unix(s) => {
                SockRef::from(s).set_send_buffer_size(usize::try_from(bytes).unwrap_or(usize::MAX))
            }
        };
        if let Err(error) = result {
            tracing::debug!(%error, "page faults may wait longer behind the pages that are pushed");
        }
    }
}

/// A stream socket that carries a migration's channel.
#[derive(Debug)]
pub struct StreamLink {
    inner: net::StreamLink<Socket>,
    /// Where pages lie on their way to or from a link that codes its bytes.
    copy: Vec<u8>,
    /// Where received bytes are counted, beside others' of the same receiver.
    received: Option<Arc<AtomicU64>>,
}

impl StreamLink {
    /// From now on bytes that are received are counted there.
    pub(super) fn count(&mut self, received: Arc<AtomicU64>) {
        self.received = Some(received);
    }

    /// So many bytes were taken off the socket.
    pub(super) fn received(&self, bytes: u64) {
        if let Some(received) = &self.received {
            received.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    /// Takes a TCP connection.
    ///
    /// # Errors
    /// When its options cannot be set.
    pub fn tcp(stream: TcpStream) -> io::Result<Self> {
        // A commit must not wait for Nagle's algorithm.
        stream.set_nodelay(true)?;
        Self::over(Stream::Tcp(stream), None)
    }

    /// Takes a Unix connection.
    ///
    /// # Errors
    /// When its options cannot be set.
    pub fn unix(stream: UnixStream) -> io::Result<Self> {
        Self::over(Stream::Unix(stream), Some(FdPassing::default()))
    }

    fn over(stream: Stream, fd_passing: Option<FdPassing>) -> io::Result<Self> {
        let pipe = None;
        let socket = Socket {
            stream,
            pipe,
            fd_passing,
        };
        Ok(Self {
            inner: net::StreamLink::new(socket)?,
            copy: Vec::new(),
            received: None,
        })
    }

    /// Takes a Unix connection of a source, which may bring the guest's memory.
    ///
    /// # Errors
    /// When its options cannot be set.
    pub(super) fn accepted(stream: UnixStream) -> io::Result<Self> {
        let mut link = Self::unix(stream)?;
        if let Some(fd_passing) = link.fd_passing() {
            fd_passing.expect();
        }
        Ok(link)
    }

    /// Connects to a receiver.
    ///
    /// # Errors
    /// Nothing listens there, or it does not answer in time.
    pub fn connect(uri: &Uri) -> io::Result<Self> {
        Self::connect_unless(uri, &|| false)
    }

    /// As [`connect`](Self::connect), and `Interrupted` as soon as `cancelled` says so.
    fn connect_unless(uri: &Uri, cancelled: &dyn Fn() -> bool) -> io::Result<Self> {
        match uri {
            Uri::Unix(path) => Self::unix(dial_unless(path, CONNECT, cancelled)?),
            Uri::Tcp { host, port } => Self::tcp(connect_tcp(host, *port, cancelled)?),
        }
    }

    /// Lets a handle end this link's waits.
    pub(super) fn cancelled_by(&mut self, handle: Handle) {
        self.inner.cancelled_by(move || handle.is_cancelled());
    }

    /// Secures the connection from the source's side; see [`net::StreamLink::secure_as_source`].
    ///
    /// # Errors
    /// As there.
    pub fn secure_as_source(&mut self, tls: &ClientTls, session: Option<Secret>) -> io::Result<()> {
        self.bytes_alone();
        self.inner.secure_as_source(tls, session)
    }

    /// Secures the connection from the receiver's side; see
    /// [`net::StreamLink::secure_as_receiver`].
    ///
    /// # Errors
    /// As there.
    pub fn secure_as_receiver(&mut self, tls: &ServerTls) -> Result<Admission, net::Unsecured> {
        self.bytes_alone();
        self.inner.secure_as_receiver(tls)
    }

    /// Files cannot go beside coded bytes.
    fn bytes_alone(&mut self) {
        self.inner.socket_mut().fd_passing = None;
    }

    /// What only the two ends of a secured connection know.
    #[must_use]
    pub fn secret(&self) -> Option<Secret> {
        self.inner.secret()
    }

    /// Whether pages must be copied to be coded.
    pub(super) const fn is_coded_here(&self) -> bool {
        self.inner.is_coded_here()
    }

    /// Sends to the socket itself, which is not [coded here](Self::is_coded_here), by `send`: so
    /// many bytes.
    pub(super) fn send_directly(
        &mut self,
        bytes: u64,
        send: impl FnOnce(BorrowedFd<'_>, Wait<'_>) -> io::Result<()>,
    ) -> io::Result<()> {
        self.inner.will_send(bytes)?;
        let (fd, wait) = self.parts();
        send(fd, wait).map_err(|error| self.inner.explain(error))
    }

    /// What an error of the socket itself means.
    pub(super) fn explain(&self, error: io::Error) -> io::Error {
        self.inner.explain(error)
    }

    /// A buffer of so many bytes, to be [kept](Self::keep_copy) for the next time.
    pub(super) fn take_copy(&mut self, bytes: usize) -> Vec<u8> {
        let mut copy = std::mem::take(&mut self.copy);
        copy.resize(bytes, 0);
        copy
    }

    pub(super) fn keep_copy(&mut self, copy: Vec<u8>) {
        self.copy = copy;
    }

    /// The socket of a link that is not [coded here](Self::is_coded_here), and how long to wait on
    /// it.
    pub(super) fn parts(&self) -> (BorrowedFd<'_>, Wait<'_>) {
        (self.inner.socket().fd(), self.inner.wait())
    }

    /// A pipe for moving pages off this socket, made when first needed; `None` where that fails.
    pub(super) fn splice_pipe(&mut self) -> Option<(BorrowedFd<'_>, Wait<'_>, &SplicePipe)> {
        let socket = self.inner.socket_mut();
        if socket.pipe.is_none() {
            socket.pipe = SplicePipe::new().ok();
        }
        let (fd, wait) = self.parts();
        self.inner
            .socket()
            .pipe
            .as_ref()
            .map(|pipe| (fd, wait, pipe))
    }

    /// What goes, and came, beside the bytes; `None` where the connection carries nothing but
    /// bytes.
    pub(super) const fn fd_passing(&mut self) -> Option<&mut FdPassing> {
        self.inner.socket_mut().fd_passing.as_mut()
    }
}

impl Link for StreamLink {
    fn send(&mut self, head: &[u8], body: &[u8]) -> io::Result<()> {
        self.inner.send(head, body)
    }

    fn recv(&mut self, buf: &mut [u8]) -> io::Result<()> {
        self.inner.recv(buf)?;
        self.received(buf.len() as u64);
        Ok(())
    }

    fn wait_readable(&mut self, timeout: Duration) -> io::Result<bool> {
        self.inner.wait_readable(timeout)
    }

    fn bound_queue(&mut self, bytes: u32) {
        self.inner.bound_queue(bytes);
    }

    fn set_timeout(&mut self, timeout: Option<Duration>) {
        self.inner.set_timeout(timeout);
    }

    fn set_deadline(&mut self, deadline: Option<Duration>) {
        self.inner.set_deadline(deadline);
    }
}

/// Connects on a thread of its own: neither the name's resolver nor a host that says nothing can be
/// interrupted. Where it is cancelled the thread ends by itself, some seconds later.
fn connect_tcp(host: &str, port: u16, cancelled: &dyn Fn() -> bool) -> io::Result<TcpStream> {
    let to = host.to_owned();
    let (done, connected) = mpsc::channel();
    let work = move || {
        // Where it was cancelled no thread waits for it.
        let _ = done.send(net::connect((to.as_str(), port)));
        Ok(())
    };
    let failed = |why| tracing::error!("{why}");
    if thread::spawn(thread::Kind::Migration, "ferry-connect", work, failed).is_err() {
        // Under a limit of threads a cancel waits instead.
        return net::connect((host, port));
    }
    loop {
        match connected.recv_timeout(TICK) {
            Ok(result) => return result,
            Err(RecvTimeoutError::Timeout) if cancelled() => {
                return Err(io::Error::new(
                    io::ErrorKind::Interrupted,
                    "cancelled while connecting",
                ));
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                return Err(io::Error::other("the thread that connects has failed"));
            }
        }
    }
}

/// Opens the channels of one migration.
pub(super) struct Dial {
    peer: Peer,
    cancel: Option<Handle>,
}

impl Dial {
    pub(super) const fn new(peer: Peer, cancel: Option<Handle>) -> Self {
        Self { peer, cancel }
    }

    pub(super) fn connect(&mut self, role: Role, _: u16) -> io::Result<StreamLink> {
        let uri = self.peer.uri();
        let error = |e: io::Error| io::Error::new(e.kind(), format!("{uri}: {e}"));
        // A word about a migration that has ended is not to be cut off by its cancelling.
        let handle = self.cancel.as_ref().filter(|_| role != Role::Recover);
        let cancelled = || handle.is_some_and(Handle::is_cancelled);
        let mut link = StreamLink::connect_unless(uri, &cancelled).map_err(error)?;
        if let Some(handle) = handle {
            link.cancelled_by(handle.clone());
        }
        if let Some((tls, session)) = self.peer.tls() {
            let first = matches!(role, Role::Control | Role::Probe);
            link.secure_as_source(tls, session.filter(|_| !first))
                .map_err(error)?;
            if first {
                self.peer.began(link.secret());
            }
        }
        Ok(link)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use socket2::{Domain, SockAddr, Type};

    #[test]
    fn connecting_to_a_host_that_says_nothing_can_be_cancelled() {
        let socket = socket2::Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        let any = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
        socket.bind(&any.into()).unwrap();
        socket.listen(0).unwrap();
        let address = socket.local_addr().unwrap();
        // Linux drops what asks for a connection while the queue is full.
        let queued: Vec<_> = (0..4)
            .map(|_| {
                let one = socket2::Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
                one.set_nonblocking(true).unwrap();
                let _ = one.connect(&address);
                one
            })
            .collect();
        let handle = Handle::new();
        handle.cancel();
        let uri = Uri::Tcp {
            host: "127.0.0.1".into(),
            port: address.as_socket().unwrap().port(),
        };
        let refused = Dial::new(uri.into(), Some(handle))
            .connect(Role::Control, 0)
            .unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::Interrupted, "{refused}");
        drop(queued);
    }

    #[test]
    fn connecting_to_a_receiver_whose_queue_is_full_can_be_cancelled() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("link");
        let socket = socket2::Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        socket.bind(&SockAddr::unix(&path).unwrap()).unwrap();
        socket.listen(0).unwrap();
        let _queued = UnixStream::connect(&path).unwrap();
        let handle = Handle::new();
        handle.cancel();
        let mut dial = Dial::new(Uri::Unix(path).into(), Some(handle));
        let refused = dial.connect(Role::Control, 0).unwrap_err().to_string();
        assert!(refused.contains("cancelled while connecting"), "{refused}");
    }
}
