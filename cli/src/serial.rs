//! Where the guest's serial port goes: `--serial stdio|file:PATH|null`.
//!
//! Output passes through a [`Spool`]: the guest's processor waits for no terminal, and neither does
//! the pause of a migration, unless a megabyte has piled up.

use ferry_terminal::output::{Failure, say};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Bytes that may wait for a slow terminal before the guest waits too.
const MAX_SPOOL: usize = 1 << 20;

/// `--serial`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Serial {
    /// This process's stdin and stdout.
    Stdio,
    /// Output to a file, no input.
    File(PathBuf),
    /// Neither.
    Null,
}

impl FromStr for Serial {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            None if text == "stdio" => Ok(Self::Stdio),
            None if text == "null" => Ok(Self::Null),
            _ => Err("a serial port goes to stdio, file:PATH or null".into()),
        }
    }
}

impl Serial {
    /// Opens it, so that errors come before the guest does.
    pub fn open(&self) -> Result<Spool, Failure> {
        let sink: Box<dyn Write + Send> = match self {
            // A descriptor of our own: std's buffer would keep prompts back.
            Self::Stdio => Box::new(File::from(io::stdout().as_fd().try_clone_to_owned()?)),
            Self::File(path) => Box::new(File::create(path).map_err(|e| {
                Failure(format!(
                    "cannot write the serial output to {} ({e}); choose another file",
                    path.display()
                ))
            })?),
            Self::Null => Box::new(io::sink()),
        };
        Spool::new(sink)
    }
}

#[derive(Default)]
struct Queue {
    bytes: VecDeque<u8>,
    /// The thread has taken bytes that are not written yet.
    writing: bool,
    /// The sink failed; what comes is dropped.
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
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, queue: MutexGuard<'a, Queue>) -> MutexGuard<'a, Queue> {
        self.changed
            .wait(queue)
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// A bounded queue before a sink, emptied by a thread of its own. Clones write to the same queue.
#[derive(Clone)]
pub struct Spool {
    shared: Arc<Shared>,
}

impl Spool {
    fn new(sink: Box<dyn Write + Send>) -> Result<Self, Failure> {
        let shared = Arc::new(Shared::default());
        let mine = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("ferry-serial".into())
            .spawn(move || empty(&mine, sink))
            .map_err(|e| Failure(format!("cannot start a thread for the serial output ({e})")))?;
        Ok(Self { shared })
    }

    /// Waits until all that was written has left, at most `timeout`.
    pub fn drain(&self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        let mut queue = self.shared.lock();
        while (!queue.bytes.is_empty() || queue.writing) && !queue.broken {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            queue = self
                .shared
                .changed
                .wait_timeout(queue, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Ends the thread once the queue is empty.
    pub fn close(&self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
    }
}

impl Write for Spool {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut queue = self.shared.lock();
        while queue.bytes.len() >= MAX_SPOOL && !queue.broken && !queue.closed {
            queue = self.shared.wait(queue);
        }
        if queue.broken || queue.closed {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let n = bytes.len().min(MAX_SPOOL - queue.bytes.len());
        queue.bytes.extend(&bytes[..n]);
        drop(queue);
        self.shared.changed.notify_all();
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn empty(shared: &Shared, mut sink: Box<dyn Write + Send>) {
    let mut queue = shared.lock();
    loop {
        while queue.bytes.is_empty() && !queue.closed {
            queue = shared.wait(queue);
        }
        if queue.bytes.is_empty() {
            return;
        }
        let bytes: Vec<u8> = queue.bytes.drain(..).collect();
        queue.writing = true;
        drop(queue);
        shared.changed.notify_all();
        let result = sink.write_all(&bytes).and_then(|()| sink.flush());
        queue = shared.lock();
        queue.writing = false;
        if let Err(e) = result {
            queue.broken = true;
            queue.bytes.clear();
            drop(queue);
            shared.changed.notify_all();
            say(&format!(
                "the guest's serial output is lost from here on ({e}); the guest runs on"
            ));
            return;
        }
        shared.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn reads_its_forms() {
        assert_eq!("stdio".parse(), Ok(Serial::Stdio));
        assert_eq!("null".parse(), Ok(Serial::Null));
        assert_eq!("file:/tmp/a:b".parse(), Ok(Serial::File("/tmp/a:b".into())));
        for odd in ["", "file:", "file", "stdio:x", "/tmp/x"] {
            assert!(
                odd.parse::<Serial>().unwrap_err().contains("file:PATH"),
                "{odd:?}"
            );
        }
    }

    /// Passes on what it gets, when the test allows.
    struct Slow(mpsc::Sender<Vec<u8>>, mpsc::Receiver<()>);

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.1
                .recv()
                .map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
            self.0
                .send(bytes.to_vec())
                .map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_slow_sink_blocks_no_writer_and_loses_nothing() {
        let ((out, seen), (go, gate)) = (mpsc::channel(), mpsc::channel());
        let mut spool = Spool::new(Box::new(Slow(out, gate))).unwrap();
        for i in 0..200u8 {
            spool.write_all(&[i]).unwrap();
        }
        for _ in 0..200 {
            let _ = go.send(());
        }
        spool.drain(Duration::from_secs(60));
        spool.close();
        let all: Vec<u8> = seen.try_iter().flatten().collect();
        assert_eq!(all, (0..200).collect::<Vec<u8>>());
    }

    #[test]
    fn a_broken_sink_blocks_no_writer() {
        let ((out, seen), (go, gate)) = (mpsc::channel(), mpsc::channel::<()>());
        let mut spool = Spool::new(Box::new(Slow(out, gate))).unwrap();
        drop((go, seen));
        // More than the spool holds: without a limit it would block for ever.
        let chunk = vec![0; 64 << 10];
        for _ in 0..64 {
            let _ = spool.write_all(&chunk);
        }
        spool.drain(Duration::from_secs(60));
        assert!(spool.write(b"x").is_err());
    }
}
