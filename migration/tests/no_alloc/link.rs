//! A link in memory: two rings of a fixed size. Sending and receiving allocates nothing.

use ferry_migration::port::Link;
use ferry_migration::{destination, source};
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

const RING: usize = 1 << 20;

#[derive(Debug)]
struct Ring {
    bytes: Box<[u8]>,
    /// Where the first unread byte lies, and how many there are.
    at: usize,
    held: usize,
    closed: bool,
}

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

    /// The ring once it is no longer `stuck`, or closed; an error if that takes too long.
    fn wait_while(
        &self,
        timeout: Option<Duration>,
        stuck: impl Fn(&Ring) -> bool,
    ) -> io::Result<MutexGuard<'_, Ring>> {
        let timeout = timeout.unwrap_or(NEVER);
        let (ring, waited) = self
            .change
            .wait_timeout_while(self.ring.lock().unwrap(), timeout, |ring| {
                stuck(ring) && !ring.closed
            })
            .unwrap();
        if waited.timed_out() {
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
            ring.bytes[from..from + length].copy_from_slice(&bytes[..length]);
            ring.held += length;
            bytes = &bytes[length..];
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
        self.ring.lock().unwrap().closed = true;
        self.change.notify_all();
    }
}

/// How many bytes the links that count for it have carried; others wait for them.
#[derive(Debug, Default)]
pub struct Carried {
    bytes: Mutex<u64>,
    change: Condvar,
}

impl Carried {
    #[allow(dead_code, reason = "not every test that has this file wants trouble")]
    fn add(&self, bytes: usize) {
        *self.bytes.lock().unwrap() += bytes as u64;
        self.change.notify_all();
    }

    /// An error if they do not get there.
    fn wait_for(&self, bytes: u64) -> io::Result<()> {
        let (_held, waited) = self
            .change
            .wait_timeout_while(self.bytes.lock().unwrap(), NEVER, |held| *held < bytes)
            .unwrap();
        if waited.timed_out() {
            return Err(io::Error::other("what was waited for did not come"));
        }
        Ok(())
    }
}

/// Longer than any test takes, on any machine.
pub const NEVER: Duration = Duration::from_secs(120);

/// How long the engines at both ends of such links wait.
pub const SOURCE_TIMEOUTS: source::Timeouts = source::Timeouts {
    handshake: NEVER,
    transfer: NEVER,
    ready: NEVER,
    commit: NEVER,
};
pub const DESTINATION_TIMEOUTS: destination::Timeouts = destination::Timeouts {
    handshake: NEVER,
    transfer: NEVER,
    commit: NEVER,
};

/// What a connection suffers from, on its way out.
#[allow(dead_code, reason = "not every test that has this file wants trouble")]
#[derive(Clone, Debug)]
pub enum Trouble {
    /// It counts for the others, which wait.
    Counts(Arc<Carried>),
    /// It takes no page before those that count have carried so many bytes.
    Waits(Arc<Carried>, u64),
    /// After so many bytes, which count, it is gone.
    Dies(Arc<Carried>, u64),
    /// After so many bytes, which count, the peer takes nothing more: the wait for it times out.
    Stalls(Arc<Carried>, u64),
}

/// One end.
#[derive(Debug)]
pub struct MemoryLink {
    out: Arc<Pipe>,
    into: Arc<Pipe>,
    trouble: Option<Trouble>,
    sent: u64,
    timeout: Option<Duration>,
}

impl MemoryLink {
    /// From now on it has this trouble.
    #[allow(dead_code, reason = "not every test that has this file wants trouble")]
    pub fn suffers(mut self, trouble: Option<Trouble>) -> Self {
        self.trouble = trouble;
        self
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.sent += bytes.len() as u64;
        match &self.trouble {
            None => {}
            Some(Trouble::Counts(carried)) => carried.add(bytes.len()),
            Some(Trouble::Waits(carried, until)) if bytes.len() >= 4096 => {
                carried.wait_for(*until)?;
            }
            Some(Trouble::Waits(..)) => {}
            Some(Trouble::Dies(carried, after)) => {
                carried.add(bytes.len());
                if self.sent > *after {
                    self.out.close();
                    self.into.close();
                }
            }
            Some(Trouble::Stalls(carried, after)) => {
                carried.add(bytes.len());
                if self.sent > *after {
                    return Err(io::ErrorKind::TimedOut.into());
                }
            }
        }
        self.out.write(bytes, self.timeout)
    }
}

/// Two ends.
pub fn pair() -> (MemoryLink, MemoryLink) {
    let (there, back) = (Pipe::new(), Pipe::new());
    let end = |out: &Arc<Pipe>, into: &Arc<Pipe>| MemoryLink {
        out: Arc::clone(out),
        into: Arc::clone(into),
        trouble: None,
        sent: 0,
        timeout: None,
    };
    (end(&there, &back), end(&back, &there))
}

impl Drop for MemoryLink {
    fn drop(&mut self) {
        self.out.close();
        self.into.close();
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
        let empty = |ring: &Ring| ring.held == 0;
        match self.into.wait_while(Some(timeout), empty) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::TimedOut => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn set_timeout(&mut self, timeout: Option<Duration>) {
        self.timeout = timeout;
    }
}
