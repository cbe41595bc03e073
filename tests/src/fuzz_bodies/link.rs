//! A peer that is bytes, and time that is none.

use ferry_migration::port::{Clock, Link};
use ferry_migration::wire::{FLAG_CRC, HEADER_BYTES, PREAMBLE_BYTES};
use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// The largest piece that an engine may ask its link for at once: what it allocates before a byte has arrived.
const PIECE: usize = 1 << 20;

/// Makes the checksums of a channel right, as far as it can be followed; in payloads only where that is asked for.
pub fn mend(stream: &[u8], payloads: bool) -> Vec<u8> {
    let mut bytes = stream.to_vec();
    if let Some((preamble, frames)) = bytes.split_at_mut_checked(PREAMBLE_BYTES) {
        put_crc(preamble, 60);
        mend_frames(frames, payloads);
    }
    bytes
}

/// As [`mend`], of a channel without its preamble.
pub(super) fn mend_frames(mut frames: &mut [u8], payloads: bool) {
    while let Some((head, rest)) = frames.split_first_chunk_mut::<HEADER_BYTES>() {
        let length = u32::from_le_bytes([head[4], head[5], head[6], head[7]]);
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let (payload, after) = rest.split_at_mut(length.min(rest.len()));
        if payloads && length > 0 {
            head[1] |= FLAG_CRC;
            head[24..28].copy_from_slice(&crc32c::crc32c(payload).to_le_bytes());
        }
        put_crc(head, 28);
        frames = after;
    }
}

/// The checksum of what lies before it, where there is room for one.
pub(super) fn put_crc(bytes: &mut [u8], at: usize) {
    if let Some((before, after)) = bytes.split_at_mut_checked(at)
        && let Some(place) = after.first_chunk_mut::<4>()
    {
        *place = crc32c::crc32c(before).to_le_bytes();
    }
}

/// Several channels from one input: each is its length in 16 bits and its bytes, the last is what is left.
pub(super) fn channels(mut bytes: &[u8], payloads: bool) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk::<2>() {
        let length = usize::from(u16::from_le_bytes(*length)).min(rest.len());
        let (frames, after) = rest.split_at(length);
        let mut frames = frames.to_vec();
        mend_frames(&mut frames, payloads);
        all.push(frames);
        bytes = after;
    }
    all
}

/// What [`channels`] reads.
pub(crate) fn joined(channels: &[&[u8]]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for channel in channels {
        bytes.extend(u16::try_from(channel.len()).unwrap().to_le_bytes());
        bytes.extend_from_slice(channel);
    }
    bytes
}

/// All happens at once.
pub(crate) struct NoTime;

impl Clock for NoTime {
    fn now(&self) -> Duration {
        Duration::ZERO
    }

    fn sleep(&self, _: Duration) {}
}

/// Time as it passes.
pub(super) struct RealTime(Instant);

impl RealTime {
    pub(super) fn new() -> Self {
        Self(Instant::now())
    }
}

impl Clock for RealTime {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }

    fn sleep(&self, duration: Duration) {
        std::thread::sleep(duration);
    }
}

/// Looking at the clock takes time, so that whoever waits for a time does not wait for ever.
#[derive(Default)]
pub(super) struct FastTime(AtomicU64);

impl Clock for FastTime {
    fn now(&self) -> Duration {
        Duration::from_millis(self.0.fetch_add(1, Ordering::Relaxed))
    }

    fn sleep(&self, duration: Duration) {
        let ms = u64::try_from(duration.as_millis()).unwrap_or(1000);
        self.0.fetch_add(ms, Ordering::Relaxed);
    }
}

/// When a peer's bytes can be seen to have come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// All at once, and then that it has hung up.
    AtOnce,
    /// All at once; it does not hang up.
    Held,
    /// By whoever waits for them: it answers, and says nothing by itself.
    WhenWaitedFor,
}

/// What a peer waits for before it says more, or hangs up.
#[derive(Debug, Default)]
pub(super) struct Gate {
    open: Mutex<bool>,
    change: Condvar,
}

impl Gate {
    pub(super) fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.change.notify_all();
    }

    fn wait(&self) {
        let open = self.open.lock().unwrap();
        drop(self.change.wait_while(open, |open| !*open).unwrap());
    }
}

/// A link whose peer has said all that it will ever say, whatever it hears.
#[derive(Debug)]
pub(crate) struct MemoryLink {
    input: Vec<u8>,
    at: usize,
    seen: Seen,
    later: VecDeque<(Arc<Gate>, Vec<u8>)>,
}

impl MemoryLink {
    pub(super) fn new(input: Vec<u8>, seen: Seen) -> Self {
        Self {
            input,
            at: 0,
            seen,
            later: VecDeque::new(),
        }
    }

    /// The peer does not hang up before the gate is opened, and says this then.
    pub(super) fn then(mut self, gate: &Arc<Gate>, more: Vec<u8>) -> Self {
        self.later.push_back((Arc::clone(gate), more));
        self
    }
}

impl Link for MemoryLink {
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
            let (gate, more) = self.later.pop_front().ok_or(io::ErrorKind::UnexpectedEof)?;
            gate.wait();
            self.input.extend(more);
        }
        let rest = &self.input[self.at..self.at + buf.len()];
        buf.copy_from_slice(rest);
        self.at += buf.len();
        Ok(())
    }

    fn wait_readable(&mut self, timeout: Duration) -> io::Result<bool> {
        Ok(match self.seen {
            Seen::AtOnce => true,
            Seen::Held => self.at < self.input.len(),
            Seen::WhenWaitedFor => !timeout.is_zero(),
        })
    }

    fn set_timeout(&mut self, _: Option<Duration>) {}
}
