//! Between a source and a destination that are joined by a Unix socket: bytes and open files pass,
//! until a test says not.

use crate::fd_passing::{pass_on, take_in};
use crate::{TIMEOUT, until};
use ferry_migration::port::Link;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// A source made by hand: sends files beside the next bytes.
#[derive(Debug)]
pub struct UnixLink {
    stream: UnixStream,
    /// They leave beside the next bytes.
    pub files: Vec<OwnedFd>,
}

impl UnixLink {
    /// Connects to `unix:PATH`.
    pub fn connect(uri: &str) -> Self {
        let stream = UnixStream::connect(uri.strip_prefix("unix:").unwrap()).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        Self {
            stream,
            files: Vec::new(),
        }
    }
}

impl Link for UnixLink {
    fn send(&mut self, head: &[u8], body: &[u8]) -> io::Result<()> {
        let files: Vec<_> = self.files.iter().map(AsFd::as_fd).collect();
        pass_on(&self.stream, &[head, body].concat(), &files)?;
        self.files.clear();
        Ok(())
    }

    fn recv(&mut self, buf: &mut [u8]) -> io::Result<()> {
        self.stream.read_exact(buf)
    }

    fn wait_readable(&mut self, _: Duration) -> io::Result<bool> {
        // A test waits by receiving.
        Err(io::ErrorKind::Unsupported.into())
    }

    fn set_timeout(&mut self, timeout: Option<Duration>) {
        self.stream.set_read_timeout(timeout).unwrap();
    }
}

#[derive(Debug, Default)]
struct State {
    /// What the source said on the first connection.
    said: Vec<u8>,
    answered: u64,
    /// From this byte of the first connection's answers on, nothing of the source's passes; and
    /// nothing of the destination's.
    hold_forth_at: Option<u64>,
    hold_back_at: Option<u64>,
    /// Only bytes pass.
    without_files: bool,
    /// Something of the destination's is held back.
    holds_back: bool,
    /// Further connections are closed.
    alone: bool,
    streams: Vec<[UnixStream; 2]>,
}

/// A socket in front of a receiver's.
#[derive(Debug)]
pub struct Relay {
    shared: Arc<(Mutex<State>, Condvar)>,
    dir: tempfile::TempDir,
}

impl Relay {
    /// In front of `unix:PATH`.
    pub fn to(uri: &str) -> Self {
        let target = uri.strip_prefix("unix:").unwrap().to_owned();
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("relay")).unwrap();
        let relay = Self {
            shared: Arc::default(),
            dir,
        };
        let shared = Arc::clone(&relay.shared);
        std::thread::spawn(move || {
            for (number, from) in listener.incoming().flatten().enumerate() {
                if number > 0 && shared.0.lock().unwrap().alone {
                    continue;
                }
                let Ok(to) = UnixStream::connect(&target) else {
                    continue;
                };
                let pair = || [from.try_clone().unwrap(), to.try_clone().unwrap()];
                shared.0.lock().unwrap().streams.push(pair());
                for back in [false, true] {
                    let (shared, [from, to]) = (Arc::clone(&shared), pair());
                    std::thread::spawn(move || {
                        let (from, to) = if back { (to, from) } else { (from, to) };
                        let _ = pump(&shared, &from, &to, back, number == 0);
                        let _ = to.shutdown(Shutdown::Write);
                    });
                }
            }
        });
        relay
    }

    /// Where it listens.
    pub fn uri(&self) -> String {
        format!("unix:{}", self.dir.path().join("relay").display())
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.shared.0.lock().unwrap());
        self.shared.1.notify_all();
    }

    /// The source's words are held back once so many bytes have been answered, and those after them
    /// pass still.
    pub fn hold_forth_at(&self, at: u64) {
        self.change(|state| state.hold_forth_at = Some(at));
    }

    /// The destination's answers are held back from this byte on.
    pub fn hold_back_at(&self, at: u64) {
        self.change(|state| state.hold_back_at = Some(at));
    }

    /// What was held back passes.
    pub fn release(&self) {
        self.change(|state| (state.hold_forth_at, state.hold_back_at) = (None, None));
    }

    /// What the source said passes; the destination's answers are still held back.
    pub fn release_forth(&self) {
        self.change(|state| state.hold_forth_at = None);
    }

    /// Waits until the destination has said what is held back.
    pub fn holds_back(&self) {
        until("an answer is held back", || {
            self.shared.0.lock().unwrap().holds_back
        });
    }

    /// Files do not pass.
    pub fn without_files(&self) {
        self.change(|state| state.without_files = true);
    }

    /// The first connection is the last.
    pub fn alone(&self) {
        self.change(|state| state.alone = true);
    }

    /// Further connections pass again.
    pub fn together(&self) {
        self.change(|state| state.alone = false);
    }

    /// Every connection breaks; what was held back is lost.
    pub fn cut(&self) {
        self.change(|state| {
            for stream in state.streams.iter().flatten() {
                let _ = stream.shutdown(Shutdown::Both);
            }
        });
        self.release();
    }

    /// Waits until so many bytes have been answered.
    pub fn answered(&self, bytes: u64) {
        until("the destination has answered", || {
            self.shared.0.lock().unwrap().answered >= bytes
        });
    }

    /// What the source said so far on the first connection.
    pub fn said(&self) -> Vec<u8> {
        self.shared.0.lock().unwrap().said.clone()
    }
}

fn pump(
    shared: &(Mutex<State>, Condvar),
    from: &UnixStream,
    to: &UnixStream,
    back: bool,
    first: bool,
) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let (count, files) = take_in(from, &mut buffer)?;
        if count == 0 {
            return Ok(());
        }
        let mut bytes = &buffer[..count];
        let mut state = shared.0.lock().unwrap();
        let keep = !state.without_files;
        if first && back {
            // Up to where the answers are held back.
            if let Some(at) = state.hold_back_at {
                let now = usize::try_from(at.saturating_sub(state.answered)).unwrap();
                let now = now.min(count);
                (&mut &*to).write_all(&bytes[..now])?;
                bytes = &bytes[now..];
                state.answered += now as u64;
                state.holds_back = !bytes.is_empty();
                let held = |state: &mut State| state.hold_back_at.is_some() && !bytes.is_empty();
                state = shared.1.wait_while(state, held).unwrap();
            }
            state.answered += bytes.len() as u64;
        } else if first {
            state = shared
                .1
                .wait_while(state, |s| {
                    s.hold_forth_at.is_some_and(|at| s.answered >= at)
                })
                .unwrap();
            state.said.extend_from_slice(bytes);
        }
        drop(state);
        let files: Vec<_> = files.iter().map(AsFd::as_fd).filter(|_| keep).collect();
        if !bytes.is_empty() {
            pass_on(to, bytes, &files)?;
        }
    }
}
