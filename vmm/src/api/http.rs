//! As much of HTTP/1.1 (RFC 9112) as a control socket needs: requests in with bounds on size and
//! time, replies out.
//!
//! Whatever is not understood is refused and the connection closed, so that two readings of one
//! byte stream cannot differ: a body has a `Content-Length` or none, chunked request bodies are
//! answered 411.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// The most bytes of a request's line and header fields.
pub const MAX_HEAD: usize = 16 << 10;
/// The most bytes of a request's body.
pub const MAX_BODY: usize = 1 << 20;
/// The most header fields.
const MAX_FIELDS: usize = 64;
/// What is read and thrown away, so that a peer that still sends can read the refusal.
const MAX_DISCARD: usize = 4 << 20;

/// A request without its body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// As sent; case matters.
    pub method: String,
    /// The path, without a query.
    pub path: String,
    /// HTTP/1.1, not 1.0: chunked replies are understood.
    pub chunked_ok: bool,
    /// Whether the connection is meant for further requests.
    pub keep_alive: bool,
    /// The body's length, where one was announced.
    pub length: Option<usize>,
    /// The client waits for "100 Continue" before it sends the body.
    pub expects_continue: bool,
    /// The client asks for `text/event-stream`.
    pub event_stream: bool,
}

/// Why there is no request.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The peer is gone, or had nothing to say for too long: nothing is owed.
    #[error("the connection ended")]
    Ended,
    /// What came is no request that we serve: say so and close.
    #[error("{sentence}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// One sentence.
        sentence: String,
    },
}

fn refused(status: u16, sentence: impl Into<String>) -> ReadError {
    ReadError::Refused {
        status,
        sentence: sentence.into(),
    }
}

/// A socket that a client is connected to.
pub trait Stream: Read + Write + AsFd {
    /// As [`UnixStream::set_read_timeout`].
    ///
    /// # Errors
    /// As there.
    fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()>;
    /// As [`UnixStream::set_write_timeout`].
    ///
    /// # Errors
    /// As there.
    fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()>;
    /// As [`UnixStream::shutdown`].
    ///
    /// # Errors
    /// As there.
    fn shutdown(&self, how: Shutdown) -> io::Result<()>;
}

macro_rules! stream {
    ($name:ident) => {
        impl Stream for $name {
            fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
                $name::set_read_timeout(self, timeout)
            }
            fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
                $name::set_write_timeout(self, timeout)
            }
            fn shutdown(&self, how: Shutdown) -> io::Result<()> {
                $name::shutdown(self, how)
            }
        }
    };
}
stream!(UnixStream);
stream!(TcpStream);

/// One connection, and what was read of it and not used yet.
#[derive(Debug)]
pub struct Connection<S = UnixStream> {
    stream: S,
    buffer: Vec<u8>,
}

impl<S: Stream> Connection<S> {
    /// Takes a connected stream over.
    #[must_use]
    pub fn new(stream: S) -> Self {
        Self {
            stream,
            buffer: Vec::new(),
        }
    }

    /// Reads the next request's head. Waits `idle` for its first byte and `timeout` for the rest:
    /// the sum counts, not each byte's wait, so a client that trickles is cut off as well.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn read_head(&mut self, idle: Duration, timeout: Duration) -> Result<Head, ReadError> {
        if self.buffer.is_empty() && self.fill(MAX_HEAD, Instant::now() + idle)? == 0 {
            return Err(ReadError::Ended);
        }
        let deadline = Instant::now() + timeout;
        loop {
            if let Some((head, used)) = parse_head(&self.buffer)? {
                self.buffer.drain(..used);
                return Ok(head);
            }
            let room = MAX_HEAD.saturating_sub(self.buffer.len());
            if room == 0 {
                return Err(refused(
                    431,
                    format!("the request's header is longer than {MAX_HEAD} bytes"),
                ));
            }
            match self.fill(room, deadline) {
                Ok(0) => return Err(refused(400, "the request ends in the middle of its header")),
                Ok(_) => {}
                Err(ReadError::Ended) => {
                    return Err(refused(408, "the request's header took too long to arrive"));
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// Reads a body of `length` bytes, at most [`MAX_BODY`].
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn read_body(&mut self, length: usize, timeout: Duration) -> Result<Vec<u8>, ReadError> {
        if length > MAX_BODY {
            return Err(too_large());
        }
        let deadline = Instant::now() + timeout;
        while self.buffer.len() < length {
            match self.fill(length - self.buffer.len(), deadline) {
                Ok(0) => return Err(refused(400, "the request ends in the middle of its body")),
                Ok(_) => {}
                Err(ReadError::Ended) => {
                    return Err(refused(408, "the request's body took too long to arrive"));
                }
                Err(e) => return Err(e),
            }
        }
        let rest = self.buffer.split_off(length);
        Ok(std::mem::replace(&mut self.buffer, rest))
    }

    /// One read of at most `room` bytes; 0 at the end, [`ReadError::Ended`] when the time is up or
    /// the peer is lost.
    fn fill(&mut self, room: usize, deadline: Instant) -> Result<usize, ReadError> {
        let mut chunk = [0u8; 8192];
        let room = room.min(chunk.len());
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            // A zero timeout would mean "for ever" and is refused by std.
            if left.is_zero() || self.stream.set_read_timeout(Some(left)).is_err() {
                return Err(ReadError::Ended);
            }
            match self.stream.read(&mut chunk[..room]) {
                Ok(n) => {
                    self.buffer.extend_from_slice(&chunk[..n]);
                    return Ok(n);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(ReadError::Ended),
            }
        }
    }

    /// Writes all of it within `timeout`.
    ///
    /// # Errors
    /// The peer is gone or does not read.
    pub fn write(&mut self, mut bytes: &[u8], timeout: Duration) -> io::Result<()> {
        let deadline = Instant::now() + timeout;
        while !bytes.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.stream.set_write_timeout(Some(left))?;
            match self.stream.write(bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => bytes = &bytes[n..],
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Whether the peer has closed its end altogether, or is lost. One that has only said its last
    /// word may still read.
    pub fn is_gone(&self) -> bool {
        let mut fds = [PollFd::new(&self.stream, PollFlags::empty())];
        let gone = PollFlags::HUP | PollFlags::ERR;
        poll(&mut fds, Some(&Timespec::default())).is_ok() && fds[0].revents().intersects(gone)
    }

    /// Ends the connection; for a moment throws away what the peer still sends, because closing at
    /// once would reset it before the peer has read our refusal.
    pub fn close(mut self, linger: Duration) {
        if self.stream.shutdown(Shutdown::Write).is_err() {
            return;
        }
        let deadline = Instant::now() + linger;
        let mut discarded = 0;
        while discarded < MAX_DISCARD {
            self.buffer.clear();
            match self.fill(8192, deadline) {
                Ok(0) | Err(_) => return,
                Ok(n) => discarded += n,
            }
        }
    }
}

/// The answer to a body that is too long.
#[must_use]
pub fn too_large() -> ReadError {
    refused(
        413,
        format!("the request's body is longer than {MAX_BODY} bytes"),
    )
}

/// Parses a head; `None` while it is incomplete.
fn parse_head(bytes: &[u8]) -> Result<Option<(Head, usize)>, ReadError> {
    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let mut request = httparse::Request::new(&mut fields);
    let used = match request.parse(bytes) {
        Ok(httparse::Status::Complete(used)) => used,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => {
            return Err(refused(
                431,
                format!("the request has more than {MAX_FIELDS} header fields"),
            ));
        }
        Err(httparse::Error::Version) => {
            return Err(refused(
                505,
                "this socket speaks HTTP/1.1 and HTTP/1.0 only",
            ));
        }
        Err(e) => {
            return Err(refused(
                400,
                format!("this is no HTTP request ({e}); try GET /v1/status"),
            ));
        }
    };
    if used > MAX_HEAD {
        return Err(refused(
            431,
            format!("the request's header is longer than {MAX_HEAD} bytes"),
        ));
    }
    let modern = request.version == Some(1);
    let mut head = Head {
        method: request.method.unwrap_or_default().to_owned(),
        path: path_of(request.path.unwrap_or_default()),
        chunked_ok: modern,
        keep_alive: modern,
        length: None,
        expects_continue: false,
        event_stream: false,
    };
    let (mut hosts, mut chunked) = (0, false);
    for field in request.headers.iter() {
        let name = field.name;
        if name.eq_ignore_ascii_case("content-length") {
            if head.length.is_some() {
                return Err(refused(400, "the request has more than one Content-Length"));
            }
            head.length = Some(parse_length(field.value)?);
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            chunked = true;
        } else if name.eq_ignore_ascii_case("host") {
            hosts += 1;
        } else if name.eq_ignore_ascii_case("connection") {
            for token in field.value.split(|b| *b == b',').map(<[u8]>::trim_ascii) {
                if token.eq_ignore_ascii_case(b"close") {
                    head.keep_alive = false;
                } else if token.eq_ignore_ascii_case(b"keep-alive") && !modern {
                    head.keep_alive = true;
                }
            }
        } else if name.eq_ignore_ascii_case("accept") {
            let types = field.value.split(|b| *b == b',' || *b == b';');
            head.event_stream |= types
                .map(<[u8]>::trim_ascii)
                .any(|t| t.eq_ignore_ascii_case(b"text/event-stream"));
        } else if name.eq_ignore_ascii_case("expect") {
            if !field.value.eq_ignore_ascii_case(b"100-continue") {
                return Err(refused(
                    417,
                    "this socket meets no expectation but 100-continue",
                ));
            }
            head.expects_continue = modern;
        }
    }
    if modern && hosts != 1 {
        return Err(refused(
            400,
            "an HTTP/1.1 request needs one Host header; any value will do",
        ));
    }
    if chunked {
        return Err(if head.length.is_some() {
            refused(
                400,
                "the request has both a Content-Length and a Transfer-Encoding",
            )
        } else {
            refused(
                411,
                "chunked requests are not served; send a Content-Length",
            )
        });
    }
    if head.length.is_some_and(|l| l > MAX_BODY) {
        return Err(too_large());
    }
    Ok(Some((head, used)))
}

fn parse_length(value: &[u8]) -> Result<usize, ReadError> {
    if value.is_empty() || !value.iter().all(u8::is_ascii_digit) {
        return Err(refused(400, "the request's Content-Length is no number"));
    }
    // All digits: what does not fit is a number, and too large a one.
    let number = std::str::from_utf8(value).ok().and_then(|v| v.parse().ok());
    number.ok_or_else(too_large)
}

/// The path of a request target: without a query, and without scheme and authority in absolute
/// form.
fn path_of(target: &str) -> String {
    let mut path = target;
    if let Some((scheme, rest)) = target.split_once("://")
        && scheme.bytes().all(|b| b.is_ascii_alphanumeric())
    {
        path = rest.find('/').map_or("/", |at| &rest[at..]);
    }
    path.split(['?', '#']).next().unwrap_or_default().to_owned()
}

/// The reason phrase of a status that we send.
const fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        202 => "Accepted",
        204 => "No Content",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        409 => "Conflict",
        411 => "Length Required",
        413 => "Content Too Large",
        417 => "Expectation Failed",
        431 => "Request Header Fields Too Large",
        503 => "Service Unavailable",
        505 => "HTTP Version Not Supported",
        _ => "Internal Server Error",
    }
}

/// The media type of almost all that is answered.
pub const JSON: &str = "application/json";

/// A complete reply, ready to write. `body` is its media type and its bytes, and `None` for 204.
#[must_use]
pub fn reply(
    status: u16,
    allow: Option<&str>,
    body: Option<(&str, &[u8])>,
    head_only: bool,
    keep_alive: bool,
) -> Vec<u8> {
    let mut text = format!("HTTP/1.1 {status} {}\r\nServer: ferry\r\n", reason(status));
    if let Some(methods) = allow {
        text.push_str(&format!("Allow: {methods}\r\n"));
    }
    if let Some((content, body)) = body {
        text.push_str(&format!(
            "Content-Type: {content}\r\nContent-Length: {}\r\n",
            body.len()
        ));
    }
    text.push_str(if keep_alive {
        "Connection: keep-alive\r\n\r\n"
    } else {
        "Connection: close\r\n\r\n"
    });
    let mut bytes = text.into_bytes();
    if let (Some((_, body)), false) = (body, head_only) {
        bytes.extend_from_slice(body);
    }
    bytes
}

/// The head of a stream of JSON lines: chunked, or until the connection closes for HTTP/1.0.
#[must_use]
pub fn stream_head(content: &str, chunked: bool) -> Vec<u8> {
    let framing = if chunked {
        "Transfer-Encoding: chunked\r\n"
    } else {
        ""
    };
    format!(
        "HTTP/1.1 200 OK\r\nServer: ferry\r\nContent-Type: {content}\r\nCache-Control: no-store\r\n\
         {framing}Connection: close\r\n\r\n"
    )
    .into_bytes()
}

/// One piece of a stream.
#[must_use]
pub fn chunk(bytes: &[u8], chunked: bool) -> Vec<u8> {
    if !chunked {
        return bytes.to_vec();
    }
    let mut framed = format!("{:x}\r\n", bytes.len()).into_bytes();
    framed.extend_from_slice(bytes);
    framed.extend_from_slice(b"\r\n");
    framed
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> Result<Option<(Head, usize)>, (u16, String)> {
        parse_head(text.as_bytes()).map_err(|e| match e {
            ReadError::Refused { status, sentence } => (status, sentence),
            ReadError::Ended => panic!("parsing does not end connections"),
        })
    }

    fn status_of(text: &str) -> u16 {
        parse(text).unwrap_err().0
    }

    #[test]
    fn reads_what_curl_sends() {
        let text = "PUT /v1/migrate?x=1 HTTP/1.1\r\nHost: localhost\r\nUser-Agent: curl/8\r\nAccept: */*\r\n\
                    Content-Length: 17\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n\r\n{";
        let (head, used) = parse(text).unwrap().unwrap();
        assert_eq!(used, text.len() - 1);
        assert_eq!(
            (head.method.as_str(), head.path.as_str()),
            ("PUT", "/v1/migrate")
        );
        assert_eq!(head.length, Some(17));
        assert!(head.expects_continue && head.keep_alive && head.chunked_ok);
    }

    #[test]
    fn refuses_what_can_be_read_in_two_ways() {
        let with = |fields: &str| {
            status_of(&format!(
                "PUT /v1/pause HTTP/1.1\r\nHost: x\r\n{fields}\r\n"
            ))
        };
        assert_eq!(with("Content-Length: 1\r\nContent-Length: 1\r\n"), 400);
        assert_eq!(
            with("Content-Length: 1\r\nTransfer-Encoding: chunked\r\n"),
            400
        );
        assert_eq!(with("Transfer-Encoding: chunked\r\n"), 411);
        for odd in ["+1", "-1", "0x10", "1 1", ""] {
            assert_eq!(with(&format!("Content-Length: {odd}\r\n")), 400, "{odd:?}");
        }
        assert_eq!(with("Content-Length: 1048577\r\n"), 413);
        assert_eq!(with("Content-Length: 99999999999999999999999999\r\n"), 413);
        assert_eq!(with("Expect: the impossible\r\n"), 417);
        assert_eq!(with("Host: y\r\n"), 400);
        assert_eq!(with(&"A: b\r\n".repeat(65)), 431);
        assert_eq!(status_of("GET / HTTP/1.1\r\n\r\n"), 400);
        assert_eq!(status_of("GET / HTTP/2.0\r\n\r\n"), 505);
        assert_eq!(status_of("\x16\x03\x01 hello\r\n\r\n"), 400);
    }

    #[test]
    fn http_1_0_closes_and_gets_no_chunks() {
        let (head, _) = parse("GET /v1/status HTTP/1.0\r\n\r\n").unwrap().unwrap();
        assert!(!head.keep_alive && !head.chunked_ok);
        let (head, _) = parse("GET / HTTP/1.1\r\nHost: x\r\nConnection: foo, Close\r\n\r\n")
            .unwrap()
            .unwrap();
        assert!(!head.keep_alive);
    }

    #[test]
    fn hears_who_wants_an_event_stream() {
        let wants = |accept| {
            let text = format!("GET /v1/events HTTP/1.1\r\nHost: x\r\n{accept}\r\n");
            parse(&text).unwrap().unwrap().0.event_stream
        };
        assert!(wants("Accept: text/event-stream\r\n"));
        assert!(wants("accept: */*;q=0.1, Text/Event-Stream;q=0.5\r\n"));
        assert!(!wants("Accept: */*\r\n") && !wants(""));
    }

    #[test]
    fn finds_the_path() {
        for (target, path) in [
            ("/v1/status", "/v1/status"),
            ("/v1/status?pretty", "/v1/status"),
            ("http://localhost/v1/status", "/v1/status"),
            ("http://localhost", "/"),
            ("*", "*"),
        ] {
            assert_eq!(path_of(target), path);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_refused_or_incomplete(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(Some((_, used))) = parse_head(&bytes) {
                prop_assert!(used <= bytes.len());
            }
        }

        #[test]
        fn a_prefix_of_a_request_is_incomplete(cut in 0usize..57) {
            let text = "PUT /v1/pause HTTP/1.1\r\nHost: x\r\nContent-Length: 12\r\n\r\n";
            prop_assume!(cut < text.len());
            prop_assert_eq!(parse(&text[..cut]), Ok(None));
        }
    }
}
