//! A peer that speaks the protocol as well, or as badly, as a test wants.

use crate::PATIENCE;
use ferry_migration::port::Link;
use ferry_migration::wire::{
    Channel, Features, FrameType, HEADER_BYTES, Header, Hello, HelloAck, Limits, PREAMBLE_BYTES,
    Preamble, Role, SessionId,
};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// A blocking TCP connection.
#[derive(Debug)]
pub struct RawLink(pub TcpStream);

impl Link for RawLink {
    fn send(&mut self, head: &[u8], body: &[u8]) -> io::Result<()> {
        self.0.write_all(head)?;
        self.0.write_all(body)
    }

    fn recv(&mut self, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_exact(buf)
    }

    fn wait_readable(&mut self, timeout: Duration) -> io::Result<bool> {
        self.0
            .set_read_timeout(Some(timeout.max(Duration::from_millis(1))))?;
        Ok(self.0.peek(&mut [0]).is_ok())
    }

    fn set_timeout(&mut self, timeout: Option<Duration>) {
        self.0.set_read_timeout(timeout).unwrap();
    }
}

/// Where "ready" begins in the stream of answers of a migration with two rounds before it.
pub fn ready_at() -> u64 {
    let ack = HelloAck {
        features: Features::SUPPORTED,
    };
    let ack = serde_json::to_vec(&ack).unwrap().len();
    (PREAMBLE_BYTES + HEADER_BYTES + ack + 2 * HEADER_BYTES) as u64
}

/// Connects.
pub fn dial(to: SocketAddr) -> RawLink {
    let stream = TcpStream::connect(to).unwrap();
    stream.set_nodelay(true).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    RawLink(stream)
}

/// Connects and exchanges preambles.
pub fn greet(to: SocketAddr, role: Role, index: u16, session: SessionId) -> Channel<RawLink> {
    let mut channel = Channel::new(dial(to));
    channel
        .send_preamble(&Preamble::new(role, index, session))
        .unwrap();
    channel.recv_preamble().unwrap();
    channel
}

/// What a real source said first, taken from a recording.
#[derive(Clone, Debug)]
pub struct Opening {
    /// Its greeting, with a machine that this host can build.
    pub hello: Hello,
    /// Where its second frame begins.
    pub frames_at: u64,
}

impl Opening {
    /// Reads a recording.
    pub fn of(recording: &[u8]) -> Self {
        let at = PREAMBLE_BYTES;
        let header: [u8; HEADER_BYTES] = recording[at..at + HEADER_BYTES].try_into().unwrap();
        let header = Header::decode(&header, Limits { end: 0 }).unwrap();
        assert_eq!(header.kind, FrameType::Hello);
        let from = at + HEADER_BYTES;
        let to = from + usize::try_from(header.length).unwrap();
        Self {
            hello: Hello::decode(&recording[from..to]).unwrap(),
            frames_at: to as u64,
        }
    }
}

/// Reads until the peer closes; what it sent.
pub fn rest(link: &mut RawLink) -> Vec<u8> {
    let mut bytes = Vec::new();
    // A reset is an end too.
    let _ = link.0.read_to_end(&mut bytes);
    bytes
}

/// Reads the peer's ABORT; the sentence in it. Other frames before it are skipped.
pub fn abort_of(channel: &mut Channel<RawLink>) -> String {
    loop {
        let header = channel.recv_header().unwrap();
        let mut bytes = Vec::new();
        channel.recv_payload(&header, &mut bytes).unwrap();
        if header.kind == FrameType::Abort {
            return String::from_utf8(bytes).unwrap();
        }
    }
}
