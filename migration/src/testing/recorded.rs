//! A peer that is a sequence of bytes, for fuzzing and for replaying what a real peer once sent.

use crate::port::Link;
use crate::sync::{lock, wait_while};
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// 1 MiB: the most that an engine may allocate before a byte of it has arrived.
const PIECE: usize = 1 << 20;

/// When [`Link::wait_readable`] sees a peer's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// All at once, and then that the peer has hung up.
    AtOnce,
    /// All at once; the peer does not hang up.
    Held,
    /// Only by a wait: the peer answers, and sends nothing by itself.
    WhenWaitedFor,
}

/// What a [`RecordedPeer`] waits for before it sends more, or hangs up.
#[derive(Debug, Default)]
pub struct Gate {
    open: Mutex<bool>,
    change: Condvar,
}

impl Gate {
    /// Lets those who wait go on.
    pub fn open(&self) {
        *lock(&self.open) = true;
        self.change.notify_all();
    }

    /// Whether the gate is open, after at most `timeout`; without one, it is.
    fn wait(&self, timeout: Option<Duration>) -> bool {
        let open = lock(&self.open);
        *wait_while(&self.change, open, timeout, |open| !*open).0
    }
}

/// A link whose peer sends what was recorded, whatever it receives. A peer that stands before a
/// closed [`Gate`] is silent: the link's timeout and deadline end a wait for it, as they end one
/// for a socket.
///
/// # Panics
/// Receiving panics when an engine asks for more than 1 MiB at once: it has allocated that on a
/// peer's word.
#[derive(Debug)]
pub struct RecordedPeer {
    input: Vec<u8>,
    at: usize,
    seen: Seen,
    later: VecDeque<(Arc<Gate>, Vec<u8>)>,
    timeout: Option<Duration>,
    deadline: Option<Instant>,
}

impl RecordedPeer {
    /// A peer that sends `input` and hangs up.
    #[must_use]
    pub const fn new(input: Vec<u8>, seen: Seen) -> Self {
        Self {
            input,
            at: 0,
            seen,
            later: VecDeque::new(),
            timeout: None,
            deadline: None,
        }
    }

    /// The peer does not hang up before the gate is opened, and sends `more` then.
    #[must_use]
    pub fn then(mut self, gate: &Arc<Gate>, more: Vec<u8>) -> Self {
        self.later.push_back((Arc::clone(gate), more));
        self
    }

    /// How long a read may take.
    fn read_timeout(&self) -> Option<Duration> {
        let left = |deadline: Instant| deadline.saturating_duration_since(Instant::now());
        let left = self.deadline.map(left);
        [self.timeout, left].into_iter().flatten().min()
    }
}

impl Link for RecordedPeer {
    fn send(&mut self, _: &[u8], _: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn recv(&mut self, buf: &mut [u8]) -> io::Result<()> {
        assert!(
            buf.len() <= PIECE,
            "{} bytes were allocated on a peer's word",
            buf.len()
        );
        while self.input.len() - self.at < buf.len() {
            let (gate, _) = self.later.front().ok_or(io::ErrorKind::UnexpectedEof)?;
            if !gate.wait(self.read_timeout()) {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let more = self.later.pop_front();
            self.input
                .extend(more.into_iter().flat_map(|(_, more)| more));
        }
        let rest = &self.input[self.at..self.at + buf.len()];
        buf.copy_from_slice(rest);
        self.at += buf.len();
        Ok(())
    }

    fn wait_readable(&mut self, timeout: Duration) -> io::Result<bool> {
        Ok(match self.seen {
            Seen::AtOnce => {
                let closed = self.later.front().filter(|_| self.at == self.input.len());
                closed.is_none_or(|(gate, _)| gate.wait(Some(timeout)))
            }
            Seen::Held => self.at < self.input.len(),
            Seen::WhenWaitedFor => !timeout.is_zero(),
        })
    }

    fn set_timeout(&mut self, timeout: Option<Duration>) {
        self.timeout = timeout;
    }

    fn set_deadline(&mut self, timeout: Option<Duration>) {
        self.deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    }
}
