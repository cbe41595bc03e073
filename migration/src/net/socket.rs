//! What a [`StreamLink`](super::StreamLink) needs from a socket, for those of the standard library.

use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// A stream socket whose system calls block for a bounded time.
///
/// Implement it to carry a migration over a stream of your own, such as one with TLS.
pub trait Socket: Send {
    /// Makes every later [`read`](Self::read) and [`write_vectored`](Self::write_vectored) block at
    /// most so long.
    ///
    /// # Errors
    /// When the operating system refuses.
    fn set_slice(&mut self, slice: Duration) -> io::Result<()>;

    /// Reads what is there; 0 is the end of the stream.
    ///
    /// # Errors
    /// `WouldBlock` or `TimedOut` after the slice; anything else ends the connection.
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize>;

    /// Writes as much as the socket takes.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize>;

    /// Waits until a read would not block; `false` after `timeout`, and where a signal interrupted
    /// the wait.
    ///
    /// # Errors
    /// When the connection is gone.
    fn wait_readable(&mut self, timeout: Duration) -> io::Result<bool>;

    /// The TCP connection, where the kernel may code the records of its TLS (kTLS): all reads and
    /// writes then go to it unchanged. `None`: what is read and written is coded before.
    fn tcp(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// As [`Link::bound_queue`](crate::port::Link::bound_queue).
    fn bound_queue(&mut self, bytes: u32) {
        let _ = bytes;
    }
}

/// Whether an error says no more than that the time is up or that a signal came.
fn nothing_yet(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
    )
}

/// Runs `look`, which blocks for at most `timeout`, and restores the slice afterwards.
fn look<S>(
    socket: &S,
    timeout: Duration,
    set_nonblocking: impl Fn(&S, bool) -> io::Result<()>,
    set_read_timeout: impl Fn(&S, Option<Duration>) -> io::Result<()>,
    slice: Duration,
    look: impl FnOnce() -> io::Result<bool>,
) -> io::Result<bool> {
    let found = if timeout.is_zero() {
        // A socket takes a timeout of zero for no timeout at all.
        set_nonblocking(socket, true)?;
        let found = look();
        set_nonblocking(socket, false)?;
        found
    } else {
        set_read_timeout(socket, Some(timeout))?;
        let found = look();
        set_read_timeout(socket, Some(slice))?;
        found
    };
    found.or_else(|error| {
        if nothing_yet(&error) {
            Ok(false)
        } else {
            Err(error)
        }
    })
}

/// A TCP connection.
#[derive(Debug)]
pub struct TcpSocket {
    stream: TcpStream,
    slice: Duration,
}

impl TcpSocket {
    pub(super) fn new(stream: TcpStream) -> io::Result<Self> {
        // A commit must not wait for Nagle's algorithm.
        stream.set_nodelay(true)?;
        stream.set_nonblocking(false)?;
        let slice = Duration::ZERO;
        Ok(Self { stream, slice })
    }
}

impl Socket for TcpSocket {
    fn set_slice(&mut self, slice: Duration) -> io::Result<()> {
        self.slice = slice;
        self.stream.set_read_timeout(Some(slice))?;
        self.stream.set_write_timeout(Some(slice))
    }

    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.stream.read(buf)
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        self.stream.write_vectored(parts)
    }

    fn wait_readable(&mut self, timeout: Duration) -> io::Result<bool> {
        look(
            &self.stream,
            timeout,
            TcpStream::set_nonblocking,
            TcpStream::set_read_timeout,
            self.slice,
            || self.stream.peek(&mut [0]).map(|_| true),
        )
    }

    fn tcp(&self) -> Option<BorrowedFd<'_>> {
        Some(self.stream.as_fd())
    }
}

/// A Unix stream socket.
///
/// The standard library cannot peek into one: [`wait_readable`](Socket::wait_readable) reads a byte
/// ahead.
#[derive(Debug)]
pub struct UnixSocket {
    stream: UnixStream,
    slice: Duration,
    ahead: Option<u8>,
}

impl UnixSocket {
    pub(super) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        Ok(Self {
            stream,
            slice: Duration::ZERO,
            ahead: None,
        })
    }
}

impl Socket for UnixSocket {
    fn set_slice(&mut self, slice: Duration) -> io::Result<()> {
        self.slice = slice;
        self.stream.set_read_timeout(Some(slice))?;
        self.stream.set_write_timeout(Some(slice))
    }

    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match buf.first_mut() {
            Some(first) if self.ahead.is_some() => {
                *first = self.ahead.take().unwrap_or_default();
                Ok(1)
            }
            _ => self.stream.read(buf),
        }
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        self.stream.write_vectored(parts)
    }

    fn wait_readable(&mut self, timeout: Duration) -> io::Result<bool> {
        if self.ahead.is_some() {
            return Ok(true);
        }
        let (mut stream, ahead) = (&self.stream, &mut self.ahead);
        look(
            &self.stream,
            timeout,
            UnixStream::set_nonblocking,
            UnixStream::set_read_timeout,
            self.slice,
            || {
                let mut byte = [0];
                // The end of the stream is readable too.
                *ahead = (stream.read(&mut byte)? == 1).then_some(byte[0]);
                Ok(true)
            },
        )
    }
}

/// A TCP or Unix connection.
#[derive(Debug)]
#[non_exhaustive]
pub enum Stream {
    /// TCP, to another host.
    Tcp(TcpSocket),
    /// Unix, within a host.
    Unix(UnixSocket),
}

impl Stream {
    fn socket(&mut self) -> &mut dyn Socket {
        match self {
            Self::Tcp(socket) => socket,
            Self::Unix(socket) => socket,
        }
    }
}

impl Socket for Stream {
    fn set_slice(&mut self, slice: Duration) -> io::Result<()> {
        self.socket().set_slice(slice)
    }

    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.socket().read(buf)
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        self.socket().write_vectored(parts)
    }

    fn wait_readable(&mut self, timeout: Duration) -> io::Result<bool> {
        self.socket().wait_readable(timeout)
    }

    fn tcp(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Tcp(socket) => socket.tcp(),
            Self::Unix(_) => None,
        }
    }
}
