//! As much of HTTP/1.1 (RFC 9112) as a control socket needs: requests in with bounds on size and
//! time, replies out.
//!
//! Whatever is not understood is refused and the connection closed, so that two readings of one
//! byte stream cannot differ: a body has a `Content-Length` or none, chunked request bodies are
//! answered 411.

mod reply;
mod request;

pub use reply::{JSON, chunk, reply, stream_head};
pub use request::{Head, MAX_BODY, MAX_HEAD, ReadError, too_large};

use request::{parse_head, refused};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// What is read and thrown away, so that a peer that still sends can read the refusal.
const MAX_DISCARD: usize = 4 << 20;

/// A socket that a client is connected to.
pub trait Stream: Read + Write + AsFd {
    /// As [`UnixStream::set_read_timeout`].
    ///
    /// # Errors
    /// As there.
    fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()>;
    /// As [`UnixStream::set_write_timeout`].
    ///
    /// # Errors
    /// As there.
    fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()>;
    /// As [`UnixStream::shutdown`].
    ///
    /// # Errors
    /// As there.
    fn shutdown(&self, how: Shutdown) -> io::Result<()>;
}

macro_rules! stream {
    ($name:ident) => {
        impl Stream for $name {
            fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
                $name::set_read_timeout(self, timeout)
            }
            fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
                $name::set_write_timeout(self, timeout)
            }
            fn shutdown(&self, how: Shutdown) -> io::Result<()> {
                $name::shutdown(self, how)
            }
        }
    };
}
stream!(UnixStream);
stream!(TcpStream);

/// One connection, and what was read of it and not used yet.
#[derive(Debug)]
pub struct Connection<S = UnixStream> {
    stream: S,
    buffer: Vec<u8>,
}

impl<S: Stream> Connection<S> {
    /// Takes a connected stream over.
    #[must_use]
    pub fn new(stream: S) -> Self {
        Self {
            stream,
            buffer: Vec::new(),
        }
    }

    /// Reads the next request's head. Waits `idle` for its first byte and `timeout` for the rest:
    /// the sum counts, not each byte's wait, so a client that trickles is cut off as well.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn read_head(&mut self, idle: Duration, timeout: Duration) -> Result<Head, ReadError> {
        if self.buffer.is_empty() && self.fill(MAX_HEAD, Instant::now() + idle)? == 0 {
            return Err(ReadError::Ended);
        }
        let deadline = Instant::now() + timeout;
        loop {
            if let Some((head, used)) = parse_head(&self.buffer)? {
                self.buffer.drain(..used);
                return Ok(head);
            }
            let room = MAX_HEAD.saturating_sub(self.buffer.len());
            if room == 0 {
                return Err(refused(
                    431,
                    format!("the request's header is longer than {MAX_HEAD} bytes"),
                ));
            }
            match self.fill(room, deadline) {
                Ok(0) => return Err(refused(400, "the request ends in the middle of its header")),
                Ok(_) => {}
                Err(ReadError::Ended) => {
                    return Err(refused(408, "the request's header took too long to arrive"));
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// Reads a body of `length` bytes, at most [`MAX_BODY`].
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn read_body(&mut self, length: usize, timeout: Duration) -> Result<Vec<u8>, ReadError> {
        if length > MAX_BODY {
            return Err(too_large());
        }
        let deadline = Instant::now() + timeout;
        while self.buffer.len() < length {
            match self.fill(length - self.buffer.len(), deadline) {
                Ok(0) => return Err(refused(400, "the request ends in the middle of its body")),
                Ok(_) => {}
                Err(ReadError::Ended) => {
                    return Err(refused(408, "the request's body took too long to arrive"));
                }
                Err(e) => return Err(e),
            }
        }
        let rest = self.buffer.split_off(length);
        Ok(std::mem::replace(&mut self.buffer, rest))
    }

    /// One read of at most `room` bytes; 0 at the end, [`ReadError::Ended`] when the time is up or
    /// the peer is lost.
    fn fill(&mut self, room: usize, deadline: Instant) -> Result<usize, ReadError> {
        let mut chunk = [0u8; 8192];
        let room = room.min(chunk.len());
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            // A zero timeout would mean "for ever" and is refused by std.
            if left.is_zero() || self.stream.set_read_timeout(Some(left)).is_err() {
                return Err(ReadError::Ended);
            }
            match self.stream.read(&mut chunk[..room]) {
                Ok(n) => {
                    self.buffer.extend_from_slice(&chunk[..n]);
                    return Ok(n);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(ReadError::Ended),
            }
        }
    }

    /// Writes all of it within `timeout`.
    ///
    /// # Errors
    /// The peer is gone or does not read.
    pub fn write(&mut self, mut bytes: &[u8], timeout: Duration) -> io::Result<()> {
        let deadline = Instant::now() + timeout;
        while !bytes.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.stream.set_write_timeout(Some(left))?;
            match self.stream.write(bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => bytes = &bytes[n..],
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Whether the peer has closed its end altogether, or is lost. One that has only said its last
    /// word may still read.
    pub fn is_gone(&self) -> bool {
        let mut fds = [PollFd::new(&self.stream, PollFlags::empty())];
        let gone = PollFlags::HUP | PollFlags::ERR;
        poll(&mut fds, Some(&Timespec::default())).is_ok() && fds[0].revents().intersects(gone)
    }

    /// Ends the connection; for a moment throws away what the peer still sends, because closing at
    /// once would reset it before the peer has read our refusal.
    pub fn close(mut self, linger: Duration) {
        if self.stream.shutdown(Shutdown::Write).is_err() {
            return;
        }
        let deadline = Instant::now() + linger;
        let mut discarded = 0;
        while discarded < MAX_DISCARD {
            self.buffer.clear();
            match self.fill(8192, deadline) {
                Ok(0) | Err(_) => return,
                Ok(n) => discarded += n,
            }
        }
    }
}
