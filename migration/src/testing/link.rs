//! Links in memory.

use super::trouble::Trouble;
use crate::port::Link;
use crate::sync::{lock, wait_while};
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// 1 MiB: a whole batch of pages fits, as into a socket's buffers.
const RING: usize = 1 << 20;

#[derive(Debug)]
struct Ring {
    bytes: Box<[u8]>,
    /// Where the first unread byte lies, and how many there are.
    at: usize,
    held: usize,
    closed: bool,
}

/// One direction.
#[derive(Debug)]
struct Pipe {
    ring: Mutex<Ring>,
    change: Condvar,
}

impl Pipe {
    fn new() -> Arc<Self> {
        let ring = Ring {
            bytes: vec![0; RING].into(),
            at: 0,
            held: 0,
            closed: false,
        };
        Arc::new(Self {
            ring: Mutex::new(ring),
            change: Condvar::new(),
        })
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        lock(&self.ring)
    }

    /// The ring once it is no longer `stuck`, or closed; `TimedOut` if that takes too long.
    fn wait_while(
        &self,
        timeout: Option<Duration>,
        stuck: impl Fn(&Ring) -> bool,
    ) -> io::Result<MutexGuard<'_, Ring>> {
        let stuck = |ring: &mut Ring| stuck(ring) && !ring.closed;
        let (ring, moves) = wait_while(&self.change, self.ring(), timeout, stuck);
        if !moves {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(ring)
    }

    fn write(&self, mut bytes: &[u8], timeout: Option<Duration>) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut ring = self.wait_while(timeout, |ring| ring.held == RING)?;
            if ring.closed {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            let from = (ring.at + ring.held) % RING;
            let length = bytes.len().min(RING - ring.held).min(RING - from);
            let (now, later) = bytes.split_at(length);
            ring.bytes[from..from + length].copy_from_slice(now);
            ring.held += length;
            bytes = later;
            self.change.notify_all();
        }
        Ok(())
    }

    fn read(&self, mut into: &mut [u8], timeout: Option<Duration>) -> io::Result<()> {
        while !into.is_empty() {
            let mut ring = self.wait_while(timeout, |ring| ring.held == 0)?;
            if ring.held == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let length = into.len().min(ring.held).min(RING - ring.at);
            let (now, later) = into.split_at_mut(length);
            now.copy_from_slice(&ring.bytes[ring.at..ring.at + length]);
            into = later;
            ring.at = (ring.at + length) % RING;
            ring.held -= length;
            self.change.notify_all();
        }
        Ok(())
    }

    fn close(&self) {
        self.ring().closed = true;
        self.change.notify_all();
    }
}

/// One end of a connection between two threads: a ring of 1 MiB in each direction. Sending and
/// receiving allocate nothing.
#[derive(Debug)]
pub struct MemoryLink {
    out: Arc<Pipe>,
    into: Arc<Pipe>,
    trouble: Option<Trouble>,
    sent: u64,
    timeout: Option<Duration>,
}

impl MemoryLink {
    /// Both ends.
    #[must_use]
    pub fn pair() -> (Self, Self) {
        let (there, back) = (Pipe::new(), Pipe::new());
        let end = |out: &Arc<Pipe>, into: &Arc<Pipe>| Self {
            out: Arc::clone(out),
            into: Arc::clone(into),
            trouble: None,
            sent: 0,
            timeout: None,
        };
        (end(&there, &back), end(&back, &there))
    }

    /// From now on what is sent here has this trouble.
    #[must_use]
    pub fn suffers(mut self, trouble: Option<Trouble>) -> Self {
        self.trouble = trouble;
        self
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.sent += bytes.len() as u64;
        if let Some(trouble) = &self.trouble
            && trouble.hits(bytes.len(), self.sent)?
        {
            self.close();
        }
        self.out.write(bytes, self.timeout)
    }

    fn close(&self) {
        self.out.close();
        self.into.close();
    }
}

impl Drop for MemoryLink {
    fn drop(&mut self) {
        self.close();
    }
}

impl Link for MemoryLink {
    fn send(&mut self, head: &[u8], body: &[u8]) -> io::Result<()> {
        self.write(head)?;
        self.write(body)
    }

    fn recv(&mut self, buf: &mut [u8]) -> io::Result<()> {
        self.into.read(buf, self.timeout)
    }

    fn wait_readable(&mut self, timeout: Duration) -> io::Result<bool> {
        match self.into.wait_while(Some(timeout), |ring| ring.held == 0) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::TimedOut => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn set_timeout(&mut self, timeout: Option<Duration>) {
        self.timeout = timeout;
    }
}

/// A link within one thread: what is sent comes back. When nothing is left it has hung up.
#[derive(Debug, Default)]
pub struct Loopback(VecDeque<u8>);

impl Loopback {
    /// A link that gives these bytes first.
    #[must_use]
    pub fn with(bytes: impl IntoIterator<Item = u8>) -> Self {
        Self(bytes.into_iter().collect())
    }
}

impl Link for Loopback {
    fn send(&mut self, head: &[u8], body: &[u8]) -> io::Result<()> {
        self.0.extend(head.iter().chain(body));
        Ok(())
    }

    fn recv(&mut self, buf: &mut [u8]) -> io::Result<()> {
        if self.0.len() < buf.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let rest = self.0.split_off(buf.len());
        for (to, from) in buf.iter_mut().zip(std::mem::replace(&mut self.0, rest)) {
            *to = from;
        }
        Ok(())
    }

    fn wait_readable(&mut self, _: Duration) -> io::Result<bool> {
        Ok(!self.0.is_empty())
    }

    fn set_timeout(&mut self, _: Option<Duration>) {}
}
