//! Connections: a thread for each, at most [`Limits::connections`] of them.

use super::events::{Next, Subscription};
use super::http::{Connection, Head, JSON, ReadError, chunk, reply, stream_head};
use super::prometheus::CONTENT_TYPE;
use super::routes::{Answer, Route, error_body, find, serve};
use super::types::{Notice, What};
use super::{Control, Pieces};
use crate::socket::{BindError, Socket};
use ferry_devices::sync::{lock, wait_timeout};
use ferry_devices::thread;
use ferry_migration::report::Event;
use serde::Serialize;
use std::collections::HashMap;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// How many and how long.
///
/// Built by functional update, `Limits { …, ..Limits::default() }`:
/// a new field has a default and breaks no caller. `#[non_exhaustive]` would forbid just that.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections at a time. A further one takes the place of the one that has been without a
    /// request for the longest; it is answered 503 when all are busy.
    pub connections: usize,
    /// How long a connection may be silent between requests.
    pub idle: Duration,
    /// From a request's first byte to the end of its header, and again to the end of its body.
    pub request: Duration,
    /// For a client to read a reply, or one piece of a stream.
    pub reply: Duration,
    /// How long input is thrown away after a refusal.
    pub linger: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 64,
            idle: Duration::from_secs(60),
            request: Duration::from_secs(10),
            reply: Duration::from_secs(10),
            linger: Duration::from_secs(1),
        }
    }
}

#[derive(Default)]
struct Open {
    next: u64,
    streams: HashMap<u64, Entry>,
    closing: bool,
}

struct Entry {
    /// A second handle, to end the connection's waiting.
    stream: UnixStream,
    stage: Stage,
    since: Instant,
}

/// What a connection is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Between requests.
    Idle,
    /// Receiving one.
    Reading,
    /// Answering one.
    Busy,
}

impl Open {
    /// Ends the connection that has been without a complete request for the longest, if there is
    /// one.
    fn evict(&mut self) -> bool {
        let waiting = self.streams.iter().filter(|(_, e)| e.stage != Stage::Busy);
        let Some(id) = waiting.min_by_key(|(_, e)| e.since).map(|(id, _)| *id) else {
            return false;
        };
        if let Some(entry) = self.streams.remove(&id) {
            let _ = entry.stream.shutdown(Shutdown::Both);
        }
        true
    }
}

struct Shared {
    control: Arc<dyn Control>,
    limits: Limits,
    open: Mutex<Open>,
    left: Condvar,
}

impl Shared {
    fn open(&self) -> MutexGuard<'_, Open> {
        lock(&self.open)
    }
}

/// The control socket's server. Dropping it removes the socket file; see [`Server::shutdown`] for
/// the orderly end.
pub struct Server {
    socket: Socket,
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server")
            .field("path", &self.socket.path())
            .finish_non_exhaustive()
    }
}

impl AsRawFd for Server {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.listener().as_raw_fd()
    }
}

impl Server {
    /// Makes the socket. Nothing is answered before [`Server::accept`] is called.
    ///
    /// # Errors
    /// [`BindError`].
    pub fn bind(path: &Path, control: Arc<dyn Control>, limits: Limits) -> Result<Self, BindError> {
        Ok(Self::on(Socket::bind(path)?, control, limits))
    }

    /// As [`bind`](Self::bind), on a Unix socket that listens already, and is not removed.
    ///
    /// # Errors
    /// It is no Unix socket with a file.
    pub fn given(fd: OwnedFd, control: Arc<dyn Control>, limits: Limits) -> io::Result<Self> {
        Ok(Self::on(Socket::given(fd)?, control, limits))
    }

    fn on(socket: Socket, control: Arc<dyn Control>, limits: Limits) -> Self {
        let open = Mutex::new(Open::default());
        Self {
            socket,
            shared: Arc::new(Shared {
                control,
                limits,
                open,
                left: Condvar::new(),
            }),
        }
    }

    /// The socket's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.socket.path()
    }

    /// Accepts the connections that wait; call it when the listener (this server's descriptor) is
    /// readable. Does not block.
    pub fn accept(&self) {
        loop {
            match self.socket.listener().accept() {
                Ok((stream, _)) => self.begin(stream),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) => {
                    // Out of descriptors, most likely. A pause, or the event loop would spin on the
                    // same connection.
                    tracing::warn!("cannot accept a connection on the control socket: {e}");
                    std::thread::sleep(Duration::from_millis(50));
                    return;
                }
            }
        }
    }

    fn begin(&self, stream: UnixStream) {
        let mut open = self.shared.open();
        let full = open.streams.len() >= self.shared.limits.connections && !open.evict();
        if open.closing || full {
            drop(open);
            return decline(
                &stream,
                "too many connections to this VMM; try again when others are done",
            );
        }
        let (Ok(second), Ok(mine)) = (stream.try_clone(), stream.try_clone()) else {
            drop(open);
            return decline(
                &stream,
                "the VMM has no file descriptor left; raise its limit (ulimit -n) or try again",
            );
        };
        let id = open.next;
        open.next += 1;
        let entry = Entry {
            stream: second,
            stage: Stage::Idle,
            since: Instant::now(),
        };
        open.streams.insert(id, entry);
        drop(open);
        let shared = Arc::clone(&self.shared);
        let work = move || {
            // Also on a panic, or a slot would be lost for ever.
            let _slot = Slot {
                shared: &shared,
                id,
            };
            converse(&shared, id, Connection::new(mine));
            Ok(())
        };
        let failure = |why| tracing::error!("a request on the control socket has no answer: {why}");
        if let Err(e) = thread::spawn(thread::Kind::Api, "ferry-api", work, failure) {
            tracing::warn!("cannot start a thread for a connection on the control socket: {e}");
            self.shared.open().streams.remove(&id);
            let sentence = format!(
                "the VMM cannot start a thread to answer ({e}); raise its limit (ulimit -u, TasksMax=)"
            );
            decline(&stream, &sentence);
        }
    }

    /// Ends: idle connections are closed, busy ones get `timeout` to finish (a migration's stream
    /// to deliver its report); the socket file is removed.
    pub fn shutdown(self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        let mut open = self.shared.open();
        open.closing = true;
        for entry in open.streams.values().filter(|e| e.stage == Stage::Idle) {
            let _ = entry.stream.shutdown(Shutdown::Read);
        }
        while !open.streams.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            open = wait_timeout(&self.shared.left, open, left);
        }
    }
}

/// Answers 503 and closes. One attempt: a fresh socket's buffer holds this, and the event loop must
/// not wait.
fn decline(stream: &UnixStream, sentence: &str) {
    let body = error_body(sentence, None);
    let _ = stream.set_nonblocking(true);
    let _ = io::Write::write(
        &mut &*stream,
        &reply(503, None, Some((JSON, &body)), false, false),
    );
}

struct Slot<'a> {
    shared: &'a Shared,
    id: u64,
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        self.shared.open().streams.remove(&self.id);
        self.shared.left.notify_all();
    }
}

impl Shared {
    /// Says what a connection is at. False when its place was given to another, and when it is idle
    /// and the server is closing: then nothing further is to be read.
    fn mark(&self, id: u64, stage: Stage) -> bool {
        let mut open = self.open();
        let closing = open.closing;
        let Some(entry) = open.streams.get_mut(&id) else {
            return false;
        };
        (entry.stage, entry.since) = (stage, Instant::now());
        !(closing && stage == Stage::Idle)
    }
}

fn converse(shared: &Shared, id: u64, mut connection: Connection) {
    let limits = &shared.limits;
    loop {
        if !shared.mark(id, Stage::Idle) {
            return connection.close(Duration::ZERO);
        }
        let head = match connection.read_head(limits.idle, limits.request) {
            Ok(head) => head,
            Err(e) => return refuse(connection, e, limits),
        };
        if !shared.mark(id, Stage::Reading) {
            return;
        }
        let route = match find(&head) {
            Ok(route) => route,
            Err(answer) => {
                // The body was not read; the next request cannot be told from it.
                let keep = head.keep_alive && head.length.unwrap_or(0) == 0;
                if !send(&mut connection, &head, answer, keep, limits) || !keep {
                    return connection.close(limits.linger);
                }
                continue;
            }
        };
        let length = head.length.unwrap_or(0);
        if head.expects_continue
            && length > 0
            && connection
                .write(b"HTTP/1.1 100 Continue\r\n\r\n", limits.reply)
                .is_err()
        {
            return;
        }
        let body = match connection.read_body(length, limits.request) {
            Ok(body) => body,
            Err(e) => return refuse(connection, e, limits),
        };
        if !shared.mark(id, Stage::Busy) {
            return;
        }
        let answer = answer(shared, (route, &head.path), &body);
        let keep = head.keep_alive && !answer.is_stream();
        if !send(&mut connection, &head, answer, keep, limits) || !keep {
            return connection.close(Duration::ZERO);
        }
    }
}

/// A defect in the VMM's own answer costs this request, not the guest.
fn answer(shared: &Shared, (route, path): (Route, &str), body: &[u8]) -> Answer {
    let attempt = std::panic::AssertUnwindSafe(|| serve(&*shared.control, route, path, body));
    std::panic::catch_unwind(attempt).unwrap_or_else(|_| {
        Answer::Error(
            500,
            None,
            "the VMM failed to answer this request; its log on stderr says why".into(),
        )
    })
}

fn refuse(mut connection: Connection, error: ReadError, limits: &Limits) {
    let ReadError::Refused { status, sentence } = error else {
        return;
    };
    let body = error_body(&sentence, None);
    if connection
        .write(
            &reply(status, None, Some((JSON, &body)), false, false),
            limits.reply,
        )
        .is_ok()
    {
        connection.close(limits.linger);
    }
}

/// Whether all of it was sent.
fn send(
    connection: &mut Connection,
    head: &Head,
    answer: Answer,
    keep: bool,
    limits: &Limits,
) -> bool {
    let head_only = head.method == "HEAD";
    let content = answer_type(&answer, head);
    if head_only && answer.is_stream() {
        let bytes = stream_head(content, head.chunked_ok);
        return connection.write(&bytes, limits.reply).is_ok();
    }
    let (status, allow, body) = match answer {
        Answer::Json(status, body) => (status, None, Some(body)),
        Answer::Metrics(text) => (200, None, Some(text.into_bytes())),
        Answer::Done => (204, None, None),
        Answer::Error(status, allow, sentence) => {
            (status, allow, Some(error_body(&sentence, None)))
        }
        Answer::Coded(status, code, sentence) => {
            (status, None, Some(error_body(&sentence, Some(code))))
        }
        Answer::Stream(events) => return stream(connection, (head, content), &events, limits),
        Answer::Events(events) => return stream(connection, (head, content), &events, limits),
        Answer::Bytes(pieces) => return bytes(connection, head.chunked_ok, pieces, limits),
    };
    let body = body.as_deref().map(|body| (content, body));
    // Every reply of a test is what `openapi.yaml` says.
    #[cfg(test)]
    super::tests::openapi::note(&head.method, &head.path, status, body);
    let bytes = reply(status, allow.as_deref(), body, head_only, keep);
    connection.write(&bytes, limits.reply).is_ok()
}

const LINES: &str = "application/x-ndjson";
const EVENT_STREAM: &str = "text/event-stream";
const BYTES: &str = "application/octet-stream";

fn answer_type(answer: &Answer, head: &Head) -> &'static str {
    match answer {
        Answer::Metrics(_) => CONTENT_TYPE,
        Answer::Stream(_) => LINES,
        Answer::Events(_) if head.event_stream => EVENT_STREAM,
        Answer::Events(_) => LINES,
        Answer::Bytes(_) => BYTES,
        Answer::Json(..) | Answer::Done | Answer::Error(..) | Answer::Coded(..) => JSON,
    }
}

/// What a stream is made of.
trait Line: Serialize + Sized {
    /// The line that says that so many are missing here, if that is said.
    fn lost(count: u64) -> Option<Self>;
}

impl Line for Event {
    /// The report is never among them.
    fn lost(_: u64) -> Option<Self> {
        None
    }
}

impl Line for Notice {
    fn lost(lost: u64) -> Option<Self> {
        Some(Self::now(What::Lost { lost }))
    }
}

/// How often a stream on which nothing happens looks whether its client is still there.
const LOOK: Duration = Duration::from_secs(2);

/// A client that hangs up or stops reading loses the stream; what it is about goes on.
fn stream<T: Line>(
    connection: &mut Connection,
    (head, content): (&Head, &'static str),
    events: &Subscription<T>,
    limits: &Limits,
) -> bool {
    let chunked = head.chunked_ok;
    let write = |connection: &mut Connection, bytes: &[u8]| {
        let written = connection.write(bytes, limits.reply);
        written.is_ok()
    };
    if !write(connection, &stream_head(content, chunked)) {
        return false;
    }
    loop {
        let line = match events.next(LOOK) {
            Next::Idle if connection.is_gone() => return false,
            Next::Idle => None,
            Next::Closed => return !chunked || write(connection, b"0\r\n\r\n"),
            Next::Lost(count) => T::lost(count),
            Next::Event(event) => Some(*event),
        };
        let Some(line) = line else {
            continue;
        };
        let Ok(mut text) = serde_json::to_vec(&line) else {
            return false;
        };
        #[cfg(test)]
        super::tests::openapi::note(&head.method, &head.path, 200, Some((LINES, &text)));
        if content == EVENT_STREAM {
            // JSON has no line breaks.
            text.splice(0..0, *b"data: ");
            text.push(b'\n');
        }
        text.push(b'\n');
        if !write(connection, &chunk(&text, chunked)) {
            return false;
        }
    }
}

/// As [`stream`]; a client that is too slow is one that has hung up.
fn bytes(connection: &mut Connection, chunked: bool, pieces: Pieces, limits: &Limits) -> bool {
    let head = stream_head(BYTES, chunked);
    let mut write = |bytes: &[u8]| connection.write(bytes, limits.reply).is_ok();
    if !write(&head) {
        return false;
    }
    for piece in pieces {
        // An empty chunk would be the end.
        if !piece.is_empty() && !write(&chunk(&piece, chunked)) {
            return false;
        }
    }
    !chunked || write(b"0\r\n\r\n")
}

#[cfg(test)]
mod tests;
