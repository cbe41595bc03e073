//! A peer that speaks the protocol as well, or as badly, as a test wants.

use crate::TIMEOUT;
use ferry_migration::page::Run;
use ferry_migration::port::Link;
use ferry_migration::wire::{
    Channel, Encoding, FLAG_CRC, Features, FrameType, HEADER_BYTES, Header, Hello, HelloAck,
    Limits, PREAMBLE_BYTES, Preamble, Role, SessionId, encode_runs,
};
use ferry_vmm::machine::STATE_VERSION;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

/// The session of migrations made by hand.
pub const SESSION: SessionId = SessionId(*b"hostile-streams!");

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
    answered(Features::SUPPORTED.without(Features::SHARED_MEMORY)) + 2 * HEADER_BYTES as u64
}

/// The same with `--verify`: the live comparison is acknowledged as well.
pub fn verified_ready_at() -> u64 {
    ready_at() + HEADER_BYTES as u64
}

/// Where "ready" begins in the stream of answers of a migration whose memory is handed over.
pub fn shared_ready_at() -> u64 {
    answered(Features::SUPPORTED)
}

/// What a destination of this build answers.
fn ack(features: Features) -> HelloAck {
    HelloAck {
        features,
        state: Some(STATE_VERSION),
    }
}

/// Where the answer to a handshake ends.
fn answered(features: Features) -> u64 {
    let ack = serde_json::to_vec(&ack(features)).unwrap();
    (PREAMBLE_BYTES + HEADER_BYTES + ack.len()) as u64
}

/// Connects.
pub fn dial(to: SocketAddr) -> RawLink {
    let stream = TcpStream::connect(to).unwrap();
    stream.set_nodelay(true).unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    RawLink(stream)
}

/// Connects and exchanges preambles.
pub fn exchange_preamble(
    to: SocketAddr,
    role: Role,
    index: u16,
    session: SessionId,
) -> Channel<RawLink> {
    handshake_on(dial(to), role, index, session)
}

/// Exchanges preambles.
pub fn handshake_on<L: Link>(link: L, role: Role, index: u16, session: SessionId) -> Channel<L> {
    let mut channel = Channel::new(link);
    channel
        .send_preamble(&Preamble::new(role, index, session))
        .unwrap();
    channel.recv_preamble().unwrap();
    channel
}

/// What a real source said first, taken from a recording.
#[derive(Clone, Debug)]
pub struct Opening {
    /// Its handshake, with a machine that this host can build.
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
pub fn abort_of<L: Link>(channel: &mut Channel<L>) -> String {
    loop {
        let header = channel.recv_header().unwrap();
        let mut bytes = Vec::new();
        channel.recv_payload(&header, &mut bytes).unwrap();
        if header.kind == FrameType::Abort {
            return String::from_utf8(bytes).unwrap();
        }
    }
}

/// A preamble that says these versions.
pub fn preamble_of(version: u16, oldest: u16) -> Vec<u8> {
    let mut bytes = Preamble::new(Role::Control, 0, SESSION).encode().to_vec();
    bytes[8..10].copy_from_slice(&version.to_le_bytes());
    bytes[10..12].copy_from_slice(&oldest.to_le_bytes());
    let crc = crc32c::crc32c(&bytes[..60]);
    bytes[60..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// A receiver made by hand: takes one connection and does what the script says.
pub fn receiver(script: impl FnOnce(RawLink) + Send + 'static) -> String {
    listener(|link, _| script(link))
}

/// As [`receiver`]; the script can take more connections.
pub fn listener(script: impl FnOnce(RawLink, &TcpListener) + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("tcp:{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        script(RawLink(stream), &listener);
    });
    uri
}

/// Answers preamble and handshake as a receiver should.
pub fn accept(link: RawLink, features: Features) -> Channel<RawLink> {
    accept_with(link, &ack(features))
}

/// As [`accept`], with another answer.
pub fn accept_with(link: RawLink, ack: &HelloAck) -> Channel<RawLink> {
    let mut channel = preambled(link);
    let header = channel.recv_header().unwrap();
    let mut bytes = Vec::new();
    channel.recv_payload(&header, &mut bytes).unwrap();
    let hello = Hello::decode(&bytes).unwrap();
    channel.set_end(hello.layout.end());
    channel.send_json(FrameType::HelloAck, ack).unwrap();
    channel
}

/// Answers the preamble as a receiver should.
pub fn preambled(link: RawLink) -> Channel<RawLink> {
    let mut channel = Channel::new(link);
    let theirs = channel.recv_preamble().unwrap();
    channel.send_preamble(&theirs).unwrap();
    channel
}

/// Takes frames and acknowledges rounds until the state has come, which it returns.
pub fn until_state(channel: &mut Channel<RawLink>) -> Vec<u8> {
    loop {
        let header = channel.recv_header().unwrap();
        let mut bytes = Vec::new();
        channel
            .recv_part(usize::try_from(header.length).unwrap(), &mut bytes)
            .unwrap();
        match header.kind {
            FrameType::RoundEnd => channel
                .send(Header::bare(FrameType::RoundAck, header.round), &[])
                .unwrap(),
            FrameType::State => return bytes,
            _ => {}
        }
    }
}

/// Reads until the source hangs up.
pub fn hold(channel: Channel<RawLink>) {
    rest(&mut channel.into_link());
}

/// A control channel whose handshake was accepted.
pub fn open_session(to: SocketAddr, hello: &Hello) -> Channel<RawLink> {
    let mut channel = exchange_preamble(to, Role::Control, 0, SESSION);
    channel
        .send(Header::bare(FrameType::Hello, 0), &hello.encode())
        .unwrap();
    let header = channel.recv_header().unwrap();
    assert_eq!(
        header.kind,
        FrameType::HelloAck,
        "{}",
        abort_text(&mut channel, &header)
    );
    let ack: HelloAck = channel.recv_json(&header).unwrap();
    assert_eq!(ack.state, Some(STATE_VERSION));
    channel.set_end(hello.layout.end());
    channel
}

fn abort_text(channel: &mut Channel<RawLink>, header: &Header) -> String {
    if header.kind != FrameType::Abort {
        return String::new();
    }
    let mut bytes = Vec::new();
    channel.recv_payload(header, &mut bytes).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A header and what follows it.
pub type Frame = (Header, Vec<u8>);

/// A frame with its length and checksum as they should be.
pub fn checked(header: Header, payload: Vec<u8>) -> Frame {
    let header = Header {
        length: u32::try_from(payload.len()).unwrap(),
        flags: FLAG_CRC,
        payload_crc: crc32c::crc32c(&payload),
        ..header
    };
    (header, payload)
}

fn of_runs(kind: FrameType, round: u32, runs: &[Run]) -> (Header, Vec<u8>) {
    let mut table = Vec::new();
    encode_runs(runs, &mut table);
    let header = Header {
        gfn: runs[0].first,
        count: u32::try_from(runs.len()).unwrap(),
        ..Header::bare(kind, round)
    };
    (header, table)
}

/// So many live pages after a table of these runs; the header speaks of page 16, whatever the table
/// says.
pub fn page_frame(runs: &[Run], pages: usize) -> Frame {
    let (header, table) = of_runs(FrameType::Pages, 0, runs);
    let payload = [&table[..], &vec![0xaa; pages * 4096]].concat();
    let header = Header {
        gfn: 16,
        length: u32::try_from(payload.len()).unwrap(),
        payload_crc: crc32c::crc32c(&table),
        ..header
    };
    (header, payload)
}

/// These pages, coded: `body` is what the decoder gets.
pub fn coded_frame(encoding: Encoding, runs: &[Run], body: &[u8]) -> Frame {
    let (header, table) = of_runs(FrameType::Pages, 0, runs);
    let header = Header {
        encoding: encoding as u8,
        ..header
    };
    checked(header, [&table[..], body].concat())
}

/// All pages of these runs, of a guest that stands still: the checksum covers them.
pub fn still_frame(round: u32, runs: &[Run]) -> Frame {
    let (header, mut payload) = of_runs(FrameType::Pages, round, runs);
    let pages: u64 = runs.iter().map(|run| run.count).sum();
    payload.resize(payload.len() + usize::try_from(pages).unwrap() * 4096, 0xaa);
    checked(header, payload)
}

/// These pages are zero; the header speaks of page 16, whatever the table says.
pub fn zero_frame(runs: &[Run]) -> Frame {
    let (header, table) = of_runs(FrameType::Zero, 0, runs);
    checked(Header { gfn: 16, ..header }, table)
}

/// These pages will follow the guest.
pub fn missing_frame(runs: &[Run]) -> Frame {
    let (header, table) = of_runs(FrameType::MissingRuns, 0, runs);
    checked(header, table)
}

/// Sends a frame as it is, right or wrong.
pub fn send(channel: &mut Channel<RawLink>, (header, payload): &Frame) {
    channel.link().send(&header.encode(), payload).unwrap();
}
