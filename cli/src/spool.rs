//! A bounded queue before a slow or failing sink: its writer never waits.
//!
//! ```text
//!  vCPU ── write ──▶ queue (1 MiB) ── thread ──▶ file, pipe, terminal
//!           │ full: refused, the serial port or the console counts it as lost
//! ```
//!
//! A sink that fails (no space, a pipe without a reader) is tried again until it works; the queue
//! keeps the oldest output meanwhile. A sink that is gone for good ends the queue.

use ferry_terminal::output::{Failure, say};
use ferry_vmm::{sync, thread};
use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Bytes that wait for a slow sink: half a minute of a guest that prints at 38,400 bytes/s.
const MAX_SPOOL: usize = 1 << 20;
/// Bytes of one write: no more than a pipe takes at once.
const PIECE: usize = 64 << 10;
/// How long to wait before a sink that failed is tried again.
const RETRY: Duration = Duration::from_millis(200);
/// At the end: a sink that takes nothing for so long is not waited for any longer.
const STALL: Duration = Duration::from_millis(500);

#[derive(Default)]
struct Queue {
    bytes: VecDeque<u8>,
    /// Bytes that the sink has taken since the start.
    written: u64,
    /// The sink is gone; further output is refused.
    broken: bool,
    closed: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        sync::lock(&self.queue)
    }

    fn wait<'a>(&self, queue: MutexGuard<'a, Queue>, time: Duration) -> MutexGuard<'a, Queue> {
        sync::wait_timeout(&self.changed, queue, time)
    }
}

impl Shared {
    /// The sink takes nothing more.
    fn end(&self, output: &str, why: &str) {
        let mut queue = self.lock();
        queue.broken = true;
        queue.bytes.clear();
        drop(queue);
        self.changed.notify_all();
        say(&format!(
            "the guest's {output} is lost from here on ({why}); the guest runs on"
        ));
    }
}

/// A bounded queue before a sink, emptied by a thread of its own. Clones write to the same queue.
#[derive(Clone)]
pub struct Spool {
    shared: Arc<Shared>,
}

impl Spool {
    /// `output` is what it carries, for sentences.
    pub fn new(sink: Box<dyn Write + Send>, output: &'static str) -> Result<Self, Failure> {
        let shared = Arc::new(Shared::default());
        let (mine, failed) = (Arc::clone(&shared), Arc::clone(&shared));
        let work = move || {
            empty(&mine, sink, output);
            Ok(())
        };
        let failure = move |why: String| failed.end(output, &why);
        thread::spawn(thread::Kind::Vmm, "ferry-serial", work, failure)
            .map_err(|e| Failure(format!("cannot start a thread for the {output} ({e})")))?;
        Ok(Self { shared })
    }

    /// Waits until the sink has taken all that was written: at most `timeout`, and not for a sink
    /// that stalls.
    pub fn drain(&self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        let mut queue = self.shared.lock();
        let (mut written, mut progress) = (queue.written, Instant::now());
        while !queue.bytes.is_empty() && !queue.broken {
            if queue.written != written {
                (written, progress) = (queue.written, Instant::now());
            }
            let until = deadline.min(progress + STALL);
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            queue = self.shared.wait(queue, left);
        }
    }

    /// Ends the thread once the queue is empty.
    pub fn close(&self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
    }
}

impl Write for Spool {
    /// Takes what there is room for; refuses, and never waits, when there is none.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut queue = self.shared.lock();
        if queue.broken || queue.closed {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let n = bytes.len().min(MAX_SPOOL - queue.bytes.len());
        if n == 0 && !bytes.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        queue.bytes.extend(&bytes[..n]);
        drop(queue);
        self.shared.changed.notify_all();
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The thread: moves the queue to the sink.
fn empty(shared: &Shared, mut sink: Box<dyn Write + Send>, output: &str) {
    let mut told = false;
    let mut queue = shared.lock();
    loop {
        if queue.bytes.is_empty() {
            if queue.closed {
                return;
            }
            queue = shared.wait(queue, Duration::from_secs(3600));
            continue;
        }
        // A copy stays queued until the sink has it, so that a failed write loses nothing.
        let piece: Vec<u8> = queue.bytes.iter().take(PIECE).copied().collect();
        drop(queue);
        let result = sink.write(&piece);
        queue = shared.lock();
        match result {
            Ok(n) if n > 0 => {
                let n = n.min(piece.len());
                queue.bytes.drain(..n);
                queue.written += n as u64;
                shared.changed.notify_all();
                told = false;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if is_final(&e) => {
                drop(queue);
                return shared.end(output, &e.to_string());
            }
            other => {
                if queue.closed {
                    return;
                }
                if !std::mem::replace(&mut told, true) {
                    let why = other.map_or_else(|e| e.to_string(), |_| "it takes nothing".into());
                    // Without the lock: stderr may block, and a vCPU must not.
                    drop(queue);
                    say(&format!(
                        "the guest's {output} cannot be written now ({why}); the last {} KiB are kept and tried \
                         again, further output is dropped; the guest runs on",
                        MAX_SPOOL >> 10
                    ));
                    queue = shared.lock();
                }
                queue = shared.wait(queue, RETRY);
            }
        }
    }
}

/// Whether a sink never works again after this error.
fn is_final(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::BrokenPipe || error.raw_os_error() == Some(libc::EBADF)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    const LONG: Duration = Duration::from_secs(60);

    /// Passes on what it gets, when the test allows.
    struct Slow(mpsc::Sender<Vec<u8>>, mpsc::Receiver<io::Result<()>>);

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let gone = || io::Error::from(io::ErrorKind::BrokenPipe);
            self.1.recv().map_err(|_| gone())??;
            self.0.send(bytes.to_vec()).map_err(|_| gone())?;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    type Ends = (Spool, mpsc::Receiver<Vec<u8>>, mpsc::Sender<io::Result<()>>);

    fn slow() -> Ends {
        let ((out, seen), (go, gate)) = (mpsc::channel(), mpsc::channel());
        let spool = Spool::new(Box::new(Slow(out, gate)), "serial output").unwrap();
        (spool, seen, go)
    }

    #[test]
    fn a_slow_sink_blocks_no_writer_and_loses_nothing() {
        let (mut spool, seen, go) = slow();
        for i in 0..200u8 {
            spool.write_all(&[i]).unwrap();
        }
        for _ in 0..200 {
            let _ = go.send(Ok(()));
        }
        spool.drain(LONG);
        spool.close();
        let all: Vec<u8> = seen.try_iter().flatten().collect();
        assert_eq!(all, (0..200).collect::<Vec<u8>>());
    }

    #[test]
    fn a_broken_sink_blocks_no_writer() {
        let (mut spool, seen, go) = slow();
        drop((go, seen));
        let chunk = vec![0; 64 << 10];
        for _ in 0..64 {
            let _ = spool.write_all(&chunk);
        }
        spool.drain(LONG);
        assert!(spool.write(b"x").is_err());
    }

    #[test]
    fn unread_output_is_refused_and_its_writer_never_waits() {
        let (mut spool, _seen, _go) = slow();
        let mut refused = 0;
        for _ in 0..MAX_SPOOL + 10 {
            if spool.write(b"x").is_err() {
                refused += 1;
            }
        }
        assert_eq!(refused, 10);
        // A sink that takes nothing does not keep the VMM from its end either.
        spool.drain(LONG);
    }

    #[test]
    fn output_goes_on_when_there_is_space_again_and_nothing_that_was_taken_is_lost() {
        let (mut spool, seen, go) = slow();
        let full = || io::Error::from_raw_os_error(libc::ENOSPC);
        spool.write_all(b"before").unwrap();
        go.send(Ok(())).unwrap();
        spool.drain(LONG);
        spool.write_all(b"while full").unwrap();
        for error in [full(), io::Error::from_raw_os_error(libc::EFBIG), full()] {
            go.send(Err(error)).unwrap();
        }
        for _ in 0..20 {
            let _ = go.send(Ok(()));
        }
        let mut all = seen.recv().unwrap();
        all.extend(seen.recv().unwrap());
        spool.write_all(b"after").unwrap();
        all.extend(seen.recv().unwrap());
        assert_eq!(all, b"beforewhile fullafter");
    }
}
