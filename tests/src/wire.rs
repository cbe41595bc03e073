//! A network between source and destination that reads frames, and holds still at a chosen one.
//!
//! It carries TCP and Unix connections, open files included. A [`Strike`] names a frame; when it
//! passes, nothing passes any more on any connection, until a test says so. A
//! [`Proxy`](crate::Proxy) knows bytes instead, and so carries what is no frame.

use crate::fd_passing::{pass_on, take_in};
use crate::{TIMEOUT, Way, until};
use ferry_migration::page::Gfn;
use ferry_migration::wire::{FrameType, HEADER_BYTES, Header, Limits, PREAMBLE_BYTES};
use rustix::net::{Shutdown, shutdown};
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// Bytes of a header that pass when the strike is inside of its frame.
const INSIDE: usize = 16;
/// The pause after each byte of a trickle, and how many bytes trickle.
const TRICKLE: (Duration, usize) = (Duration::from_millis(8), 200);

/// Where in a frame the network stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// None of it has passed.
    Before,
    /// A part of it has.
    Inside,
    /// All of it has, and nothing after it.
    After,
}

/// A frame at which the network stops.
#[derive(Clone, Debug)]
pub struct Strike {
    /// Of which kinds.
    pub kinds: &'static [FrameType],
    /// Whose.
    pub way: Way,
    /// The first is 1.
    pub number: u32,
    /// Only frames after the first of this kind count.
    pub after: Option<FrameType>,
    /// Where in it.
    pub moment: Moment,
    /// Where no such frame has come before the state, the state is it.
    pub or_state: bool,
}

#[derive(Debug, Default)]
struct State {
    strike: Option<Strike>,
    matched: u32,
    struck: bool,
    /// Nothing passes.
    held: bool,
    /// Bytes that pass one by one.
    trickle: usize,
    /// New connections are closed at once.
    refuses: bool,
    /// The destination does not listen any more.
    closed: bool,
    streams: Vec<Arc<[OwnedFd; 2]>>,
    /// Frames whose first byte came here, and those that have passed whole.
    seen: Vec<FrameType>,
    passed: Vec<FrameType>,
}

#[derive(Debug, Default)]
struct Shared(Mutex<State>, Condvar);

/// A running network.
#[derive(Debug)]
pub struct Wire {
    shared: Arc<Shared>,
    uri: String,
    _dir: tempfile::TempDir,
}

impl Wire {
    /// In front of a receiver.
    pub fn to(uri: &str, strike: Strike) -> Self {
        let shared = Arc::new(Shared::default());
        shared.lock().strike = Some(strike);
        let dir = tempfile::tempdir().unwrap();
        let worker = Arc::clone(&shared);
        let own = if let Some(path) = uri.strip_prefix("unix:") {
            let (path, own) = (path.to_owned(), dir.path().join("wire"));
            let listener = UnixListener::bind(&own).unwrap();
            std::thread::spawn(move || {
                for from in listener.incoming().flatten() {
                    if worker.lock().closed {
                        return;
                    }
                    worker.connect(from.into(), || Ok(UnixStream::connect(&path)?.into()));
                }
            });
            format!("unix:{}", own.display())
        } else {
            let to = uri.strip_prefix("tcp:").unwrap().to_owned();
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let own = listener.local_addr().unwrap();
            std::thread::spawn(move || {
                for from in listener.incoming().flatten() {
                    if worker.lock().closed {
                        return;
                    }
                    from.set_nodelay(true).unwrap();
                    worker.connect(from.into(), || {
                        let stream = TcpStream::connect(&to)?;
                        stream.set_nodelay(true)?;
                        Ok(stream.into())
                    });
                }
            });
            format!("tcp:{own}")
        };
        Self {
            shared,
            uri: own,
            _dir: dir,
        }
    }

    /// Where it listens.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// Waits until the frame has come, or `over`; whether it has.
    pub fn struck(&self, over: impl Fn() -> bool) -> bool {
        until("the frame passes, or the migration ends", || {
            self.shared.lock().struck || over()
        });
        self.shared.lock().struck
    }

    /// Everything passes again.
    pub fn release(&self) {
        self.change(|state| state.held = false);
    }

    /// As [`release`](Self::release), the first bytes one by one.
    pub fn trickle(&self) {
        self.change(|state| (state.held, state.trickle) = (false, TRICKLE.1));
    }

    /// Every connection breaks; what was held is lost. New ones pass, unless they are refused.
    pub fn cut(&self, refuses: bool) {
        self.change(|state| {
            for stream in state.streams.drain(..) {
                for end in &*stream {
                    // Closed already is as good.
                    let _ = shutdown(end, Shutdown::Both);
                }
            }
            state.held = false;
            state.refuses = refuses;
        });
    }

    /// New connections pass again.
    pub fn heal(&self) {
        self.change(|state| state.refuses = false);
    }

    /// Whether the first byte of such a frame has come.
    pub fn has_seen(&self, kind: FrameType) -> bool {
        self.shared.lock().seen.contains(&kind)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.shared.lock());
        self.shared.1.notify_all();
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.cut(true);
        self.change(|state| state.closed = true);
        // Wakes the thread that accepts.
        if let Some(path) = self.uri.strip_prefix("unix:") {
            let _ = UnixStream::connect(path);
        } else if let Some(address) = self.uri.strip_prefix("tcp:") {
            let _ = TcpStream::connect(address);
        }
    }
}

impl State {
    /// Books a frame; where in it the network stops, if it does.
    fn meet(&mut self, way: Way, kind: FrameType) -> Option<Moment> {
        self.seen.push(kind);
        let strike = self.strike.as_ref()?;
        let late = strike.or_state && kind == FrameType::State;
        let counts = strike.way == way && strike.kinds.contains(&kind);
        let due = strike
            .after
            .is_none_or(|after| self.passed.contains(&after));
        if counts && due {
            self.matched += 1;
        }
        let moment = match late {
            true => Moment::Before,
            false if counts && due && self.matched == strike.number => strike.moment,
            false => return None,
        };
        self.strike = None;
        Some(moment)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// Nothing passes from now on.
    fn hold(&self, struck: bool) {
        let mut state = self.lock();
        state.held = true;
        state.struck |= struck;
        self.1.notify_all();
    }

    fn connect(self: &Arc<Self>, from: OwnedFd, to: impl FnOnce() -> io::Result<OwnedFd>) {
        if self.lock().refuses {
            return;
        }
        // A receiver that is gone refuses it.
        let Ok(to) = to() else { return };
        let ends = Arc::new([from, to]);
        self.lock().streams.push(Arc::clone(&ends));
        for way in [Way::Forth, Way::Back] {
            let (shared, ends) = (Arc::clone(self), Arc::clone(&ends));
            std::thread::spawn(move || {
                let [source, destination] = &*ends;
                let (from, to) = match way {
                    Way::Forth => (source, destination),
                    Way::Back => (destination, source),
                };
                // Broken is as good as ended.
                let _ = shared.pump(way, from, to);
                let _ = shutdown(to, Shutdown::Write);
            });
        }
    }

    fn pump(&self, way: Way, from: &OwnedFd, to: &OwnedFd) -> io::Result<()> {
        let mut buffer = vec![0; 64 << 10];
        self.relay(from, to, &mut buffer[..PREAMBLE_BYTES])?;
        loop {
            let mut head = [0; HEADER_BYTES];
            let files = take(from, &mut head)?;
            let header = Header::decode(&head, Limits { end: Gfn::MAX });
            let Header { kind, length, .. } = header.map_err(io::Error::other)?;
            let moment = self.lock().meet(way, kind);
            match moment {
                None => self.give(to, &head, &files)?,
                Some(Moment::Before) => {
                    self.hold(true);
                    self.give(to, &head, &files)?;
                }
                Some(Moment::Inside) => {
                    self.hold(false);
                    send(to, &head[..INSIDE], &files)?;
                    self.hold(true);
                    self.give(to, &head[INSIDE..], &[])?;
                }
                Some(Moment::After) => {
                    // First: the answer must not pass.
                    self.hold(false);
                    send(to, &head, &files)?;
                }
            }
            let mut left = length as usize;
            while left > 0 {
                let part = left.min(buffer.len());
                if moment == Some(Moment::After) {
                    let files = take(from, &mut buffer[..part])?;
                    send(to, &buffer[..part], &files)?;
                } else {
                    self.relay(from, to, &mut buffer[..part])?;
                }
                left -= part;
            }
            self.lock().passed.push(kind);
            if moment == Some(Moment::After) {
                self.hold(true);
            }
        }
    }

    fn relay(&self, from: &OwnedFd, to: &OwnedFd, bytes: &mut [u8]) -> io::Result<()> {
        let files = take(from, bytes)?;
        self.give(to, bytes, &files)
    }

    /// Passes bytes on, once something may pass.
    fn give(&self, to: &OwnedFd, bytes: &[u8], files: &[OwnedFd]) -> io::Result<()> {
        let state = self.lock();
        let (mut state, waited) = self
            .1
            .wait_timeout_while(state, 2 * TIMEOUT, |state| state.held)
            .unwrap();
        if waited.timed_out() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let slow = state.trickle.min(bytes.len());
        state.trickle -= slow;
        drop(state);
        let mut files = files;
        for byte in &bytes[..slow] {
            send(to, &[*byte], files)?;
            files = &[];
            std::thread::sleep(TRICKLE.0);
        }
        send(to, &bytes[slow..], files)
    }
}

/// Fills `bytes`; the files that came beside them.
fn take(from: &OwnedFd, bytes: &mut [u8]) -> io::Result<Vec<OwnedFd>> {
    let (mut at, mut files) = (0, Vec::new());
    while at < bytes.len() {
        let (count, came) = take_in(from, &mut bytes[at..])?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        at += count;
        files.extend(came);
    }
    Ok(files)
}

fn send(to: &OwnedFd, bytes: &[u8], files: &[OwnedFd]) -> io::Result<()> {
    let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    pass_on(to, bytes, &files)
}
