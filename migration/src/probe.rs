//! Measuring the way to a receiver, before anything is moved.
//!
//! ```text
//!  source                                        destination
//!    │ preamble (role probe) ─────────────────────▶ │  waits for a guest, or says that it is busy
//!    │ ◀────────────────────────────────── preamble │
//!    │ ROUND-END 1 ───────────────────────────────▶ │
//!    │ ◀──────────────────────────────── ROUND-ACK 1│  a round trip; a few of them
//!    │ PROBE… ROUND-END n ────────────────────────▶ │  read and thrown away
//!    │ ◀──────────────────────────────── ROUND-ACK n│  a burst; the next has twice as much
//! ```
//!
//! Bursts grow until one takes 0.4 s: the first ones warm the connection's window up, and
//! the last one is what counts.

use crate::port::{Clock, Link};
use crate::wire::{Channel, FrameType, Header, Role, SessionId, WireError};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Bytes in a frame.
const FRAME: usize = 256 << 10;
/// Round trips that are measured; the shortest counts.
const TRIPS: u32 = 5;
/// A burst of so long is the last.
const LONG_ENOUGH: Duration = Duration::from_millis(400);
/// The most frames in a burst (1 GiB), so that no link makes it endless.
const MOST_FRAMES: u32 = 4096;
/// How long a receiver may say nothing.
const SILENCE: Duration = Duration::from_secs(20);
/// How long a receiver serves one probe.
const SERVED: Duration = Duration::from_secs(60);
/// Zeros would be a gift to whatever compresses on the way.
const FILLER: u64 = 0x9e37_79b9_7f4a_7c15;

/// The way to a receiver.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Path {
    /// Bytes per second that it carries.
    pub bandwidth: f64,
    /// There and back.
    #[serde(rename = "round_trip_ms", serialize_with = "crate::model::millis")]
    pub round_trip: Duration,
}

/// Measures the way to the receiver at the other end of `link`, a new connection.
///
/// # Errors
/// [`WireError`]: the connection failed, or the receiver is busy or knows no probes.
pub fn measure<L: Link>(
    mut link: L,
    clock: &dyn Clock,
    session: SessionId,
) -> Result<Path, WireError> {
    link.set_timeout(Some(SILENCE));
    link.set_deadline(Some(SERVED));
    let mut channel = Channel::new(link);
    channel.open(Role::Probe, 0, session)?;
    let mut round = 0;
    let mut round_trip = Duration::MAX;
    for _ in 0..TRIPS {
        round_trip = round_trip.min(burst(&mut channel, clock, &mut round, &[], 0)?);
    }
    let mut filler = vec![0; FRAME];
    for (n, word) in (1..).zip(filler.chunks_exact_mut(8)) {
        word.copy_from_slice(&FILLER.wrapping_mul(n).to_le_bytes());
    }
    let mut frames = 1;
    loop {
        let took = burst(&mut channel, clock, &mut round, &filler, frames)?;
        if took >= LONG_ENOUGH || frames >= MOST_FRAMES {
            let bytes = f64::from(frames) * FRAME as f64;
            // The last byte's acknowledgement travels, too.
            let sending = took.saturating_sub(round_trip).as_secs_f64();
            return Ok(Path {
                bandwidth: bytes / sending.max(1e-9),
                round_trip,
            });
        }
        frames *= 2;
    }
}

/// Sends so many frames and waits until all have been read; how long that took.
fn burst<L: Link>(
    channel: &mut Channel<L>,
    clock: &dyn Clock,
    round: &mut u32,
    filler: &[u8],
    frames: u32,
) -> Result<Duration, WireError> {
    *round += 1;
    let began = clock.now();
    let header = Header {
        length: u32::try_from(filler.len()).unwrap_or(0),
        ..Header::bare(FrameType::Probe, *round)
    };
    let head = header.encode();
    let mut sent = Ok(());
    for _ in 0..frames {
        sent = sent.and_then(|()| channel.link().send(&head, filler));
    }
    let end = Header::bare(FrameType::RoundEnd, *round);
    let sent = sent
        .map_err(WireError::from)
        .and_then(|()| channel.send(end, &[]));
    // A receiver that takes nothing has said why before it hung up.
    let answer = match channel.recv_header() {
        Ok(answer) => answer,
        Err(error) => return Err(sent.err().unwrap_or(error)),
    };
    if answer.kind != FrameType::RoundAck || answer.round != *round {
        return Err(channel.refuse(&answer, "the acknowledgement of a probe"));
    }
    Ok(clock.now().saturating_sub(began))
}

/// Lets one probe in at a time.
#[derive(Debug, Default)]
pub struct Turn(AtomicBool);

/// A probe's turn. Dropping it lets the next one in.
#[derive(Debug)]
pub struct Taken<'t>(&'t Turn);

impl Turn {
    /// Takes the turn, unless another probe has it.
    #[must_use]
    pub fn take(&self) -> Option<Taken<'_>> {
        (!self.0.swap(true, Ordering::SeqCst)).then_some(Taken(self))
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.0.0.store(false, Ordering::SeqCst);
    }
}

/// Answers a connection of role probe whose preambles have been exchanged, until it is closed; not
/// longer than a minute.
///
/// # Errors
/// [`WireError`]: the connection failed, or carries something else.
pub fn answer<L: Link>(mut channel: Channel<L>) -> Result<(), WireError> {
    channel.link().set_timeout(Some(SILENCE));
    channel.link().set_deadline(Some(SERVED));
    let mut bytes = Vec::new();
    loop {
        let header = match channel.recv_header() {
            Err(WireError::Io(error)) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                return Ok(());
            }
            other => other?,
        };
        match header.kind {
            FrameType::Probe => {
                channel.recv_part(header.length as usize, &mut bytes)?;
            }
            FrameType::RoundEnd => {
                channel.send(Header::bare(FrameType::RoundAck, header.round), &[])?;
            }
            _ => return Err(channel.refuse(&header, "a probe")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::destination::exchange_preamble;
    use crate::net::{MonotonicClock, session_id};
    use crate::testing::MemoryLink;
    use std::io;

    const TIMEOUT: Duration = Duration::from_secs(10);

    /// A link that carries so many bytes per second, by a clock that only it moves.
    struct Shaped {
        inner: MemoryLink,
        clock: std::sync::Arc<crate::testing::TestClock>,
        rate: f64,
        trip: Duration,
    }

    impl Link for Shaped {
        fn send(&mut self, head: &[u8], body: &[u8]) -> io::Result<()> {
            let bytes = (head.len() + body.len()) as f64;
            self.clock.sleep(Duration::from_secs_f64(bytes / self.rate));
            self.inner.send(head, body)
        }
        fn recv(&mut self, buf: &mut [u8]) -> io::Result<()> {
            self.clock.sleep(self.trip);
            self.inner.recv(buf)
        }
        fn wait_readable(&mut self, timeout: Duration) -> io::Result<bool> {
            self.inner.wait_readable(timeout)
        }
        fn set_timeout(&mut self, timeout: Option<Duration>) {
            self.inner.set_timeout(timeout);
        }
    }

    #[test]
    fn what_a_link_carries_is_measured() {
        for (rate, trip) in [(1e6, 30), (125e6, 1), (1.25e9, 0)] {
            let (near, far) = MemoryLink::pair();
            let path = std::thread::scope(|s| {
                s.spawn(move || {
                    let (channel, preamble) = exchange_preamble(far, TIMEOUT).unwrap();
                    assert_eq!(preamble.role, Role::Probe);
                    answer(channel).unwrap();
                });
                let clock = std::sync::Arc::new(crate::testing::TestClock::default());
                let trip = Duration::from_millis(trip);
                let link = Shaped {
                    inner: near,
                    clock: clock.clone(),
                    rate,
                    trip,
                };
                let path = measure(link, &*clock, session_id()).unwrap();
                // An empty burst has a header to send.
                assert!(path.round_trip >= trip && path.round_trip < trip + TIMEOUT / 10_000 * 100);
                path
            });
            let off = path.bandwidth / rate - 1.0;
            assert!(off.abs() < 0.02, "{path:?} instead of {rate}");
        }
    }

    #[test]
    fn anything_but_a_probe_is_refused() {
        let (near, far) = MemoryLink::pair();
        std::thread::scope(|s| {
            s.spawn(move || {
                let mut channel = Channel::new(near);
                channel.open(Role::Probe, 0, session_id()).unwrap();
                channel
                    .send(Header::bare(FrameType::Commit, 0), &[])
                    .unwrap();
            });
            let (channel, _) = exchange_preamble(far, TIMEOUT).unwrap();
            let error = answer(channel).unwrap_err();
            assert!(matches!(error, WireError::Unexpected { .. }), "{error}");
        });
    }

    #[test]
    fn one_at_a_time() {
        let turn = Turn::default();
        let taken = turn.take().unwrap();
        assert!(turn.take().is_none());
        drop(taken);
        assert!(turn.take().is_some());
    }

    #[test]
    fn a_busy_receiver_is_named() {
        let (near, far) = MemoryLink::pair();
        std::thread::scope(|s| {
            s.spawn(move || {
                let (mut channel, _) = exchange_preamble(far, TIMEOUT).unwrap();
                channel.send_abort_as(crate::wire::AbortCode::Busy, "a guest arrives");
            });
            let error = measure(near, &MonotonicClock::new(), session_id()).unwrap_err();
            assert!(error.to_string().contains("a guest arrives"), "{error}");
        });
    }
}
