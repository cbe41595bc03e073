//! Downtime as a client sees it: when bytes arrive from the guest's serial port, on either side.
//!
//! The guest has no network card. It sends a byte every [`BEAT_MS`]; the benchmark reads its serial
//! port at the source and then at the destination. The measure is independent of the guest's clock
//! and of the VMM's report, and its resolution is the beat.

use ferry_guest_images::Manner;
use ferry_terminal::output::{Failure, say};
use ferry_vmm::sync::lock;
use ferry_vmm::thread;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Milliseconds between two bytes of a guest.
pub const BEAT_MS: u64 = 2;
/// The most arrivals that are kept: hours of them.
const MAX_ARRIVALS: usize = 1 << 23;
/// How long after the guest's first byte at the destination a silence still belongs to the move;
/// the guest's own gap is looked for as long.
const AFTER: Duration = Duration::from_millis(100);

/// Records when a guest sends bytes, and writes its text into a file.
pub struct Listener {
    arrivals: Arc<Mutex<Vec<Instant>>>,
    thread: Option<JoinHandle<()>>,
}

impl Listener {
    /// Starts the thread that reads.
    pub fn listen(mut from: impl Read + Send + 'static, path: &Path) -> Result<Self, Failure> {
        let mut file = File::create(path)?;
        let arrivals = Arc::new(Mutex::new(Vec::new()));
        let mine = Arc::clone(&arrivals);
        let listen = move || {
            let mut buffer = [0; 4096];
            loop {
                let count = match from.read(&mut buffer) {
                    Ok(0) => return Ok(()),
                    Ok(count) => count,
                    Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                    Err(_) => return Ok(()),
                };
                let now = Instant::now();
                {
                    let mut arrivals = lock(&mine);
                    if arrivals.len() < MAX_ARRIVALS {
                        arrivals.push(now);
                    }
                }
                let text = text(&buffer[..count]);
                if !text.is_empty() && file.write_all(&text).is_err() {
                    // Without the guest's text the run fails, and names what it waited for.
                    return Ok(());
                }
            }
        };
        // What was recorded until then counts.
        let failed = |why: String| say(&why);
        let thread = thread::spawn(thread::Kind::Vmm, "ferry-listener", listen, failed)?;
        Ok(Self {
            arrivals,
            thread: Some(thread),
        })
    }

    /// Waits until everything is read that the process wrote before it ended.
    pub fn end(&mut self) {
        if let Some(thread) = self.thread.take() {
            // A panic was told.
            let _ = thread.join();
        }
    }

    /// When bytes arrived, so far.
    pub fn arrivals(&self) -> Vec<Instant> {
        lock(&self.arrivals).clone()
    }
}

/// A guest's lines without its beats.
fn text(bytes: &[u8]) -> Vec<u8> {
    bytes
        .iter()
        .copied()
        .filter(|byte| *byte != Manner::BEAT)
        .collect()
}

/// The longest silence at the move, in milliseconds. It ends after the source's last byte, and
/// begins less than [`AFTER`] after the destination's first. `None` if one side sent nothing.
pub fn silence_ms(source: &[Instant], destination: &[Instant]) -> Option<f64> {
    let (last, first) = (*source.last()?, *destination.first()?);
    let mut all: Vec<Instant> = source.iter().chain(destination).copied().collect();
    all.sort();
    let until = first.max(last) + AFTER;
    let near = all
        .windows(2)
        .filter(|pair| pair[1] > last.min(first) && pair[0] < until);
    near.map(|pair| (pair[1] - pair[0]).as_secs_f64() * 1e3)
        .reduce(f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silence_is_that_of_the_move() {
        let zero = Instant::now();
        let at = |ms: &[u64]| -> Vec<Instant> {
            ms.iter()
                .map(|ms| zero + Duration::from_millis(*ms))
                .collect()
        };
        let source = at(&[0, 80, 82, 84, 86]);
        assert_eq!(silence_ms(&source, &at(&[97, 99, 101])), Some(11.0));
        // Post-copy: it speaks, and then waits for a page.
        assert_eq!(silence_ms(&source, &at(&[97, 137, 139])), Some(40.0));
        // Long after the move it is no longer the move's.
        assert_eq!(silence_ms(&source, &at(&[88, 150, 189, 400])), Some(62.0));
        assert_eq!(
            silence_ms(&source, &at(&[88, 100, 150, 187, 189, 400])),
            Some(50.0)
        );
        assert_eq!(silence_ms(&source, &[]), None);
        assert_eq!(silence_ms(&[], &source), None);
    }

    #[test]
    fn beats_are_recorded_and_not_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut listener = Listener::listen(&b"a\0b\0\n"[..], &path).unwrap();
        listener.end();
        assert_eq!(std::fs::read(&path).unwrap(), b"ab\n");
        assert_eq!(listener.arrivals().len(), 1);
    }
}
