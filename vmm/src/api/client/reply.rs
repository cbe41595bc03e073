//! What a VMM answers, read with bounds: it is trusted no more than any other process that may
//! listen on that path.

use super::{MAX_BODY, MAX_HEAD};
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::net::UnixStream;

pub(super) enum Body {
    Plain(io::Take<BufReader<UnixStream>>),
    Chunked(Chunked),
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct ReplyHead {
    pub(super) status: u16,
    pub(super) length: Option<u64>,
    pub(super) chunked: bool,
}

pub(super) fn odd(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

/// Reads a reply's head, skipping "100 Continue".
pub(super) fn read_head(reader: &mut impl BufRead) -> io::Result<ReplyHead> {
    loop {
        let mut bytes = Vec::new();
        while !bytes.ends_with(b"\r\n\r\n") {
            let before = bytes.len();
            let room = u64::try_from(MAX_HEAD.saturating_sub(before)).unwrap_or(0);
            reader.by_ref().take(room).read_until(b'\n', &mut bytes)?;
            if bytes.len() == before {
                return Err(match before {
                    0 => io::ErrorKind::UnexpectedEof.into(),
                    _ => odd("its answer is no HTTP reply"),
                });
            }
        }
        let mut fields = [httparse::EMPTY_HEADER; 64];
        let mut reply = httparse::Response::new(&mut fields);
        match reply.parse(&bytes) {
            Ok(httparse::Status::Complete(_)) => {}
            _ => return Err(odd("its answer is no HTTP reply")),
        }
        let status = reply.code.unwrap_or(0);
        if status == 100 {
            continue;
        }
        let mut head = ReplyHead {
            status,
            length: None,
            chunked: false,
        };
        for field in reply.headers.iter() {
            let value = std::str::from_utf8(field.value).unwrap_or_default().trim();
            if field.name.eq_ignore_ascii_case("content-length") {
                head.length = Some(
                    value
                        .parse()
                        .map_err(|_| odd("its Content-Length is no number"))?,
                );
            } else if field.name.eq_ignore_ascii_case("transfer-encoding") {
                head.chunked = value.eq_ignore_ascii_case("chunked");
            }
        }
        if status == 204 {
            head.length = Some(0);
        }
        return Ok(head);
    }
}

/// The body inside a chunked transfer.
pub(super) struct Chunked {
    pub(super) inner: BufReader<UnixStream>,
    /// Of the current chunk.
    pub(super) left: u64,
    pub(super) begun: bool,
    pub(super) ended: bool,
}

impl Chunked {
    fn line(&mut self) -> io::Result<String> {
        let mut line = Vec::new();
        self.inner.by_ref().take(128).read_until(b'\n', &mut line)?;
        if !line.ends_with(b"\n") {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(String::from_utf8_lossy(&line).trim().to_owned())
    }
}

impl Read for Chunked {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.ended || buffer.is_empty() {
            return Ok(0);
        }
        if self.left == 0 {
            if self.begun && !self.line()?.is_empty() {
                return Err(odd("a chunk is longer than it said"));
            }
            self.begun = true;
            let line = self.line()?;
            let size = line.split(';').next().unwrap_or_default().trim();
            self.left = u64::from_str_radix(size, 16).map_err(|_| odd("a chunk has no length"))?;
            if self.left == 0 {
                self.ended = true;
                return Ok(0);
            }
        }
        let room = usize::try_from(self.left)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let n = self.inner.read(&mut buffer[..room])?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left = self
            .left
            .saturating_sub(u64::try_from(n).unwrap_or(u64::MAX));
        Ok(n)
    }
}

pub(super) fn lines(body: Body) -> Lines {
    match body {
        Body::Plain(b) => Lines::new(Box::new(b.into_inner())),
        Body::Chunked(b) => Lines::new(Box::new(b)),
    }
}

/// Lines of bounded length.
pub(super) struct Lines {
    inner: BufReader<Box<dyn Read>>,
}

impl Lines {
    fn new(inner: Box<dyn Read>) -> Self {
        Self {
            inner: BufReader::new(inner),
        }
    }

    pub(super) fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut line = Vec::new();
        let limit = u64::try_from(MAX_BODY).unwrap_or(u64::MAX);
        self.inner
            .by_ref()
            .take(limit)
            .read_until(b'\n', &mut line)?;
        match line.last() {
            None => Ok(None),
            Some(b'\n') => Ok(Some(line)),
            Some(_) if line.len() >= MAX_BODY => Err(odd("a line of its stream has no end")),
            Some(_) => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}
