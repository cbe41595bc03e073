//! A link with frames on it.

use super::preamble::{TLS_ALERT_BYTES, is_tls};
use super::{
    AbortCode, FLAG_CRC, FrameType, HEADER_BYTES, Header, HeaderError, HelloError, Limits,
    PREAMBLE_BYTES, Preamble, PreambleError, Role, SessionId,
};
use crate::page::Gfn;
use crate::port::{Link, NotStarted};
use std::io;

/// What can go wrong on a channel.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// The connection.
    #[error("the connection to the peer failed: {0}")]
    Io(#[from] io::Error),
    /// Its first bytes.
    #[error(transparent)]
    Preamble(#[from] PreambleError),
    /// A header.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// A handshake.
    #[error(transparent)]
    Hello(#[from] HelloError),
    /// JSON after the handshake.
    #[error("the peer's {kind:?} message cannot be understood: {error}")]
    Json {
        /// Which.
        kind: FrameType,
        /// Why.
        error: serde_json::Error,
    },
    /// A payload that does not match its checksum.
    #[error(
        "a {kind:?} frame is damaged (payload checksum {found:#010x}, computed {computed:#010x})"
    )]
    Payload {
        /// Its type.
        kind: FrameType,
        /// As sent.
        found: u32,
        /// As it should be.
        computed: u32,
    },
    /// A frame that has no place at this point.
    #[error("the peer sent a {kind:?} frame (round {round}) while {expected} was expected")]
    Unexpected {
        /// Its type.
        kind: FrameType,
        /// Its round.
        round: u32,
        /// What would have been right.
        expected: &'static str,
    },
    /// A set with pages that the guest does not have.
    #[error("the peer listed page {gfn:#x} (+{count}), which is not the guest's memory")]
    NotRam {
        /// The first of them.
        gfn: Gfn,
        /// How many.
        count: u64,
    },
    /// The peer gave up and said why.
    #[error("the peer gave up: {0}")]
    PeerAborted(String),
    /// The destination has refused the commit, and never runs the guest
    /// ([`AbortCode::NotStarted`]).
    #[error("the destination did not start the guest: {0}")]
    NotStarted(String),
    /// The peer cannot answer now ([`AbortCode::Busy`]).
    #[error("the peer is busy: {0}")]
    Busy(String),
    /// The peer does not know the migration ([`AbortCode::UnknownSession`]).
    #[error("the peer does not know the migration: {0}")]
    UnknownSession(String),
}

impl WireError {
    /// The destination's word that it did not start the guest, if the error is that.
    pub(crate) fn not_started(&self) -> Option<NotStarted> {
        match self {
            Self::NotStarted(why) => Some(NotStarted::new(why.clone())),
            _ => None,
        }
    }

    /// Whether the peer itself has said that it is over: it need not be told.
    #[must_use]
    pub const fn is_from_peer(&self) -> bool {
        matches!(
            self,
            Self::PeerAborted(_) | Self::NotStarted(_) | Self::Busy(_) | Self::UnknownSession(_)
        )
    }
}

/// A link with frames on it, counting its bytes.
#[derive(Debug)]
pub struct Channel<L> {
    link: L,
    limits: Limits,
    sent: u64,
}

impl<L: Link> Channel<L> {
    /// Puts frames on a link.
    pub const fn new(link: L) -> Self {
        Self {
            link,
            limits: Limits { end: 0 },
            sent: 0,
        }
    }

    /// Allows frames about pages below `end`, once the handshake has settled it.
    pub const fn set_end(&mut self, end: Gfn) {
        self.limits = Limits { end };
    }

    /// Bytes written so far.
    pub const fn sent(&self) -> u64 {
        self.sent
    }

    /// The link, for pages; bytes that go through it are counted by [`Channel::count`].
    pub const fn link(&mut self) -> &mut L {
        &mut self.link
    }

    /// The link, for good.
    pub fn into_link(self) -> L {
        self.link
    }

    /// Counts bytes that were written to the link directly.
    pub const fn count(&mut self, bytes: u64) {
        self.sent += bytes;
    }

    /// Sends the preamble.
    ///
    /// # Errors
    /// [`WireError::Io`].
    pub fn send_preamble(&mut self, preamble: &Preamble) -> Result<(), WireError> {
        self.link.send(&preamble.encode(), &[])?;
        self.sent += PREAMBLE_BYTES as u64;
        Ok(())
    }

    /// Receives and checks the peer's preamble.
    ///
    /// # Errors
    /// [`WireError::Io`], [`WireError::Preamble`].
    pub fn recv_preamble(&mut self) -> Result<Preamble, WireError> {
        let mut bytes = [0; PREAMBLE_BYTES];
        // A peer that wants TLS sends an alert and closes the connection.
        let (start, rest) = bytes.split_at_mut(TLS_ALERT_BYTES);
        self.link.recv(start)?;
        if is_tls(start) {
            return Err(PreambleError::Tls.into());
        }
        self.link.recv(rest)?;
        Ok(Preamble::decode(&bytes)?)
    }

    /// Opens a channel from the source's side: the preambles, and that the answer is of this
    /// session.
    ///
    /// # Errors
    /// [`WireError`]; the peer's own reason where it could not read the preamble.
    pub fn open(&mut self, role: Role, index: u16, session: SessionId) -> Result<(), WireError> {
        self.send_preamble(&Preamble::new(role, index, session))?;
        let theirs = self.recv_preamble()?;
        if theirs.session == SessionId::UNREAD {
            let header = self.recv_header()?;
            return Err(self.refuse(&header, "the reason why the handshake could not be read"));
        }
        Ok(theirs.expect_session(session)?)
    }

    /// Sends a frame with a checked payload; length and checksum are filled in.
    ///
    /// # Errors
    /// [`WireError::Io`].
    pub fn send(&mut self, mut header: Header, payload: &[u8]) -> Result<(), WireError> {
        let length = u32::try_from(payload.len())
            .ok()
            .filter(|&n| n <= header.kind.max_payload());
        let Some(length) = length else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "{} bytes do not fit into a {:?} frame",
                    payload.len(),
                    header.kind
                ),
            )
            .into());
        };
        header.length = length;
        if length > 0 {
            header.flags |= FLAG_CRC;
            header.payload_crc = crc32c::crc32c(payload);
        }
        self.link.send(&header.encode(), payload)?;
        self.sent += (HEADER_BYTES + payload.len()) as u64;
        Ok(())
    }

    /// Sends a message as JSON.
    ///
    /// # Errors
    /// [`WireError::Io`].
    pub fn send_json<T: serde::Serialize>(
        &mut self,
        kind: FrameType,
        message: &T,
    ) -> Result<(), WireError> {
        let json = serde_json::to_vec(message).map_err(|error| WireError::Json { kind, error })?;
        self.send(Header::bare(kind, 0), &json)
    }

    /// Tells the peer that it is over, as well as that still works.
    pub fn send_abort(&mut self, reason: &str) {
        self.send_abort_as(AbortCode::GaveUp, reason);
    }

    /// As [`send_abort`](Self::send_abort), and what that means.
    pub fn send_abort_as(&mut self, code: AbortCode, reason: &str) {
        let mut end = reason.len().min(1024);
        while !reason.is_char_boundary(end) {
            end -= 1;
        }
        let header = Header {
            count: code as u32,
            ..Header::bare(FrameType::Abort, 0)
        };
        if let Err(error) = self.send(header, &reason.as_bytes()[..end]) {
            tracing::debug!(%error, "the peer could not be told that the migration ends");
        }
    }

    /// Receives and checks the next header.
    ///
    /// # Errors
    /// [`WireError::Io`], [`WireError::Header`].
    pub fn recv_header(&mut self) -> Result<Header, WireError> {
        let mut bytes = [0; HEADER_BYTES];
        self.link.recv(&mut bytes)?;
        Ok(Header::decode(&bytes, self.limits)?)
    }

    /// Receives and checks a payload (of any frame but `Pages`).
    ///
    /// # Errors
    /// [`WireError::Io`], [`WireError::Payload`].
    pub fn recv_payload(&mut self, header: &Header, into: &mut Vec<u8>) -> Result<(), WireError> {
        self.recv_part(header.length as usize, into)?;
        if header.flags & FLAG_CRC != 0 {
            check_crc(header, crc32c::crc32c(into))?;
        }
        Ok(())
    }

    /// Receives the next `length` bytes of a payload; see [`Link::recv_into`].
    ///
    /// # Errors
    /// [`WireError::Io`].
    pub fn recv_part(&mut self, length: usize, into: &mut Vec<u8>) -> Result<(), WireError> {
        Ok(self.link.recv_into(length, into)?)
    }

    /// Receives a JSON message whose header was read.
    ///
    /// # Errors
    /// [`WireError`].
    pub fn recv_json<T: serde::de::DeserializeOwned>(
        &mut self,
        header: &Header,
    ) -> Result<T, WireError> {
        let mut bytes = Vec::new();
        self.recv_payload(header, &mut bytes)?;
        serde_json::from_slice(&bytes).map_err(|error| WireError::Json {
            kind: header.kind,
            error,
        })
    }

    /// The error for a frame that has no place here: the peer's own reason where it is an ABORT.
    pub fn refuse(&mut self, header: &Header, expected: &'static str) -> WireError {
        if header.kind != FrameType::Abort {
            return WireError::Unexpected {
                kind: header.kind,
                round: header.round,
                expected,
            };
        }
        let mut bytes = Vec::new();
        if let Err(error) = self.recv_payload(header, &mut bytes) {
            return error;
        }
        let reason = printable(&bytes);
        match AbortCode::of(header) {
            AbortCode::GaveUp => WireError::PeerAborted(reason),
            AbortCode::NotStarted => WireError::NotStarted(reason),
            AbortCode::Busy => WireError::Busy(reason),
            AbortCode::UnknownSession => WireError::UnknownSession(reason),
        }
    }
}

/// Compares a computed checksum with the header's.
///
/// # Errors
/// [`WireError::Payload`].
pub fn check_crc(header: &Header, computed: u32) -> Result<(), WireError> {
    if computed == header.payload_crc {
        Ok(())
    } else {
        Err(WireError::Payload {
            kind: header.kind,
            found: header.payload_crc,
            computed,
        })
    }
}

/// A peer's text, fit for a terminal and a log: no control characters, bounded.
fn printable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes)
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(1024)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;
    use std::time::Duration;

    /// Everything that is sent comes back.
    #[derive(Default)]
    struct Loop(VecDeque<u8>);

    impl Link for Loop {
        fn send(&mut self, head: &[u8], body: &[u8]) -> io::Result<()> {
            self.0.extend(head.iter().chain(body));
            Ok(())
        }

        fn recv(&mut self, buf: &mut [u8]) -> io::Result<()> {
            for byte in buf {
                *byte = self.0.pop_front().ok_or(io::ErrorKind::UnexpectedEof)?;
            }
            Ok(())
        }

        fn wait_readable(&mut self, _: Duration) -> io::Result<bool> {
            Ok(!self.0.is_empty())
        }

        fn set_timeout(&mut self, _: Option<Duration>) {}
    }

    #[test]
    fn a_peer_that_wants_tls_is_recognised_by_its_alert() {
        let mut channel = Channel::new(Loop::default());
        channel.link().send(&[21, 3, 3, 0, 2, 2, 10], &[]).unwrap();
        let error = channel.recv_preamble().unwrap_err();
        assert!(error.to_string().contains("speaks TLS"), "{error}");
    }

    /// "Busy", "not started" and "unknown" are three answers, and a code of a newer build is the
    /// general one.
    #[test]
    fn an_abort_says_what_it_means() {
        let answer = |count| {
            let mut channel = Channel::new(Loop::default());
            channel.send_abort("why");
            let mut header = channel.recv_header().unwrap();
            header.count = count;
            channel.refuse(&header, "anything")
        };
        assert!(matches!(answer(0), WireError::PeerAborted(why) if why == "why"));
        assert!(matches!(answer(1), WireError::NotStarted(why) if why == "why"));
        assert!(matches!(answer(2), WireError::Busy(why) if why == "why"));
        assert!(matches!(answer(3), WireError::UnknownSession(why) if why == "why"));
        assert!(matches!(answer(77), WireError::PeerAborted(why) if why == "why"));
        let codes = [
            AbortCode::NotStarted,
            AbortCode::Busy,
            AbortCode::UnknownSession,
        ];
        for (n, code) in (1..).zip(codes) {
            let mut channel = Channel::new(Loop::default());
            channel.send_abort_as(code, "why");
            assert_eq!(channel.recv_header().unwrap().count, n);
        }
    }
}
