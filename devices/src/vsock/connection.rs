//! One connection: what has come from one side and has not gone to the other, and who may send how
//! much.
//!
//! ```text
//!                host's CONNECT                     guest's REQUEST
//!                      │ REQUEST ▶                        │ connect(2)
//!                      ▼                                  ▼
//!                    Asked ──── guest's RESPONSE ───▶   Open (RESPONSE ▶)
//!                      │          "OK PORT\n" ▶           │
//!    RST, or the host  │                                  │  RST of either side;
//!    hangs up          ▼                                  ▼  SHUTDOWN of the guest, both ways
//!                    gone                          gone, or Lingering: what the guest has sent
//!                                                  still goes to the host
//! ```
//!
//! An end of one direction is passed on: the host's `shutdown(SHUT_WR)` as a SHUTDOWN, and the
//! guest's SHUTDOWN as a shutdown(2).

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::net::Shutdown;

use rustix::event::epoll::EventFlags;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::packet::{Header, NO_MORE, NO_RECEIVE, NO_SEND, Op};
use super::poll::{Poll, Watched};

/// Bytes of the guest's that are kept for a host program that does not read. It is what Linux puts
/// into one packet at most (VIRTIO_VSOCK_MAX_PKT_BUF_SIZE).
pub const ROOM: u32 = 64 << 10;

/// Two ports that a connection is known by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ports {
    pub guest: u32,
    pub host: u32,
}

/// What becomes of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It goes on.
    Stays,
    /// The guest broke a rule, or the host cannot go on: the guest is sent a RST.
    Reset,
    /// The host has hung up before the guest was told of it.
    Forgotten,
    /// The guest has shut it down in both directions.
    Closed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Asked,
    Open,
}

/// Packets that are to be sent to the guest.
#[derive(Debug, Default)]
struct Due {
    request: bool,
    response: bool,
    credit: bool,
    /// Flags of a SHUTDOWN.
    shutdown: u32,
}

/// Guest to host.
#[derive(Debug)]
pub struct Outward {
    bytes: VecDeque<u8>,
    /// Of the guest's bytes, modulo 2³²: those that came.
    received: u32,
    /// Those that have left [`ROOM`].
    forwarded: u32,
    /// [`forwarded`](Self::forwarded), as the guest was last told.
    told: u32,
    /// The host reads no more.
    broken: bool,
}

impl Outward {
    const fn new() -> Self {
        Self {
            bytes: VecDeque::new(),
            received: 0,
            forwarded: 0,
            told: 0,
            broken: false,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Whether the guest may send so many bytes.
    fn has_room(&self, len: u32) -> bool {
        let held = self.received.wrapping_sub(self.forwarded);
        len <= ROOM.saturating_sub(held)
    }

    fn add(&mut self, data: &[u8]) {
        let len = u32::try_from(data.len()).unwrap_or(0);
        self.received = self.received.wrapping_add(len);
        if self.broken {
            self.forwarded = self.forwarded.wrapping_add(len);
        } else {
            self.bytes.extend(data);
        }
    }

    /// Sends what the host takes. An error means that it takes no more.
    pub fn flush(&mut self, stream: &Watched) -> io::Result<()> {
        while !self.bytes.is_empty() {
            match send(
                stream.stream(),
                self.bytes.as_slices().0,
                SendFlags::NOSIGNAL,
            ) {
                Ok(n) => {
                    self.bytes.drain(..n);
                    self.forwarded = self.forwarded.wrapping_add(u32::try_from(n).unwrap_or(0));
                }
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock => return Ok(()),
                    ErrorKind::Interrupted => {}
                    _ => {
                        self.give_up();
                        return Err(error.into());
                    }
                },
            }
        }
        Ok(())
    }

    fn give_up(&mut self) {
        self.broken = true;
        self.bytes = VecDeque::new();
        self.forwarded = self.received;
    }
}

/// A connection between a port of the guest's and a program of the host's.
#[derive(Debug)]
pub struct Connection {
    pub ports: Ports,
    stream: Watched,
    phase: Phase,
    due: Due,
    outward: Outward,
    /// Of the host's bytes, modulo 2³²: those that the guest was sent.
    sent: u32,
    /// `buf_alloc` and `fwd_cnt` of the guest's last packet.
    guest_room: u32,
    guest_forwarded: u32,
    /// The guest was asked for credit.
    asked: bool,
    /// The host has sent something that the guest has not been sent.
    readable: bool,
    /// The host sends no more.
    ended: bool,
    /// The host has closed it.
    hung_up: bool,
    /// Flags of the guest's SHUTDOWNs.
    guest_end: u32,
    /// In the line of those that have something for the guest.
    pub queued: bool,
}

impl Connection {
    fn new(ports: Ports, stream: Watched, phase: Phase) -> Self {
        let (request, response) = (phase == Phase::Asked, phase == Phase::Open);
        Self {
            ports,
            stream,
            phase,
            due: Due {
                request,
                response,
                ..Due::default()
            },
            outward: Outward::new(),
            sent: 0,
            guest_room: 0,
            guest_forwarded: 0,
            asked: false,
            readable: false,
            ended: false,
            hung_up: false,
            guest_end: 0,
            queued: false,
        }
    }

    /// One that a host program wants, and the guest is asked for.
    pub fn asked(ports: Ports, stream: Watched) -> Self {
        Self::new(ports, stream, Phase::Asked)
    }

    /// One that the guest has asked for by `request`, and gets.
    pub fn open(ports: Ports, stream: Watched, request: &Header) -> Self {
        let mut connection = Self::new(ports, stream, Phase::Open);
        connection.note_credit(request);
        connection
    }

    /// Whether the guest waits for an answer that it has not been sent.
    pub const fn owes_answer(&self) -> bool {
        self.due.response
    }

    /// What the guest has sent and the host has not taken, if there is any: it still goes there.
    pub fn into_rest(self) -> Option<(Watched, Outward)> {
        (!self.outward.is_empty()).then_some((self.stream, self.outward))
    }

    /// A packet of the guest's for it, other than a RST.
    pub fn receive(&mut self, header: &Header, data: &[u8]) -> Fate {
        self.note_credit(header);
        match (header.op, self.phase) {
            (Op::Response, Phase::Asked) => return self.answered(),
            (Op::Data, Phase::Open) => {
                if !self.outward.has_room(header.len) || self.guest_end & NO_SEND != 0 {
                    return Fate::Reset;
                }
                self.outward.add(data);
                self.flush();
            }
            (Op::Shutdown, Phase::Open) => {
                self.guest_end |= header.flags & NO_MORE;
                if self.guest_end == NO_MORE {
                    self.flush();
                    return Fate::Closed;
                }
                if self.guest_end & NO_RECEIVE != 0 {
                    let _ = self.stream.stream().shutdown(Shutdown::Read);
                    self.readable = false;
                }
                self.end_outward();
            }
            (Op::CreditRequest, _) => self.due.credit = true,
            (Op::CreditUpdate, _) => {}
            _ => return Fate::Reset,
        }
        Fate::Stays
    }

    fn answered(&mut self) -> Fate {
        self.phase = Phase::Open;
        let line = format!("OK {}\n", self.ports.host);
        // Nothing was written before, so there is room for it, or nothing takes it.
        match send(self.stream.stream(), line.as_bytes(), SendFlags::NOSIGNAL) {
            Ok(n) if n == line.len() => Fate::Stays,
            _ => Fate::Reset,
        }
    }

    fn note_credit(&mut self, header: &Header) {
        self.guest_room = header.buf_alloc;
        self.guest_forwarded = header.fwd_cnt;
        if self.credit() > 0 {
            self.asked = false;
        }
    }

    /// Bytes that the guest has room for.
    const fn credit(&self) -> u32 {
        let under_way = self.sent.wrapping_sub(self.guest_forwarded);
        self.guest_room.saturating_sub(under_way)
    }

    fn flush(&mut self) {
        if self.outward.flush(&self.stream).is_err() {
            // What the host wrote before it went is still read.
            self.due.shutdown |= NO_RECEIVE;
        }
        let unsaid = self.outward.forwarded.wrapping_sub(self.outward.told);
        if unsaid >= ROOM / 2 {
            self.due.credit = true;
        }
        self.end_outward();
    }

    /// Passes on that the guest sends no more, once all of it has gone.
    fn end_outward(&self) {
        if self.guest_end & NO_SEND != 0 && self.outward.is_empty() {
            let _ = self.stream.stream().shutdown(Shutdown::Write);
        }
    }

    /// Something has happened at the host's end.
    pub fn host_ready(&mut self, flags: EventFlags) -> Fate {
        let hung_up = flags.intersects(EventFlags::HUP | EventFlags::ERR);
        if self.phase == Phase::Asked {
            // The program does not wait for the answer.
            return match (hung_up, self.due.request) {
                (false, _) => Fate::Stays,
                (true, true) => Fate::Forgotten,
                (true, false) => Fate::Reset,
            };
        }
        if flags.contains(EventFlags::OUT) {
            self.flush();
        }
        if hung_up && (self.ended || self.guest_end & NO_RECEIVE != 0) {
            self.hang_up();
        } else if hung_up || flags.contains(EventFlags::IN) {
            self.readable = true;
        }
        Fate::Stays
    }

    fn hang_up(&mut self) {
        self.hung_up = true;
        self.outward.give_up();
        self.due.shutdown |= NO_MORE;
    }

    /// Waits for what can be done something about: the host's data are left where they are until
    /// the guest takes them, and an end is not told again and again.
    pub fn watch(&mut self, poll: &Poll) -> io::Result<()> {
        let reads = self.phase == Phase::Open && self.guest_end & NO_RECEIVE == 0 && !self.ended;
        let mut wanted = EventFlags::empty();
        wanted.set(EventFlags::IN, reads && !self.readable);
        wanted.set(EventFlags::OUT, !self.outward.is_empty());
        let waits = !wanted.is_empty() || !self.readable && !self.hung_up;
        self.stream.watch(poll, waits.then_some(wanted))
    }

    fn may_read(&self) -> bool {
        self.readable && !self.ended && self.guest_end & NO_RECEIVE == 0
    }

    /// Whether there is a packet for the guest.
    pub fn has_packet(&self) -> bool {
        let due = &self.due;
        let wants_data = self.may_read() && (self.credit() > 0 || !self.asked);
        due.request || due.response || due.credit || due.shutdown != 0 || wants_data
    }

    /// The next packet for the guest, with at most `room.len()` bytes of data, which are put there.
    pub fn next_packet(&mut self, cid: u32, room: &mut [u8]) -> Option<Header> {
        let mut header = Header::to_guest(cid, Op::CreditUpdate, self.ports.host, self.ports.guest);
        if std::mem::take(&mut self.due.request) {
            header.op = Op::Request;
        } else if std::mem::take(&mut self.due.response) {
            header.op = Op::Response;
        } else if let Some((op, len)) = self.read(room) {
            (header.op, header.len) = (op, len);
        } else if self.due.shutdown != 0 {
            header.op = Op::Shutdown;
            header.flags = std::mem::take(&mut self.due.shutdown);
        } else if !self.due.credit {
            return None;
        }
        self.due.credit = false;
        self.outward.told = self.outward.forwarded;
        header.buf_alloc = ROOM;
        header.fwd_cnt = self.outward.forwarded;
        Some(header)
    }

    /// Data of the host's, or the question how much the guest has room for.
    fn read(&mut self, room: &mut [u8]) -> Option<(Op, u32)> {
        if !self.may_read() {
            return None;
        }
        let credit = usize::try_from(self.credit()).unwrap_or(usize::MAX);
        if credit == 0 {
            let news = !std::mem::replace(&mut self.asked, true);
            return news.then_some((Op::CreditRequest, 0));
        }
        let most = room.len().min(credit);
        let read = loop {
            match recv(self.stream.stream(), &mut room[..most], RecvFlags::empty()) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                other => break other.map(|(n, _)| n),
            }
        };
        match read {
            Ok(n) if n > 0 => {
                let n = u32::try_from(n).unwrap_or(0);
                self.sent = self.sent.wrapping_add(n);
                return Some((Op::Data, n));
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => self.readable = false,
            // Its end. Whether the host reads on is told by a hang-up.
            Ok(_) => {
                (self.ended, self.readable) = (true, false);
                self.due.shutdown |= NO_SEND;
            }
            Err(_) => {
                (self.ended, self.readable) = (true, false);
                self.hang_up();
            }
        }
        None
    }
}

#[cfg(test)]
impl Connection {
    pub fn held(&self) -> usize {
        self.outward.bytes.len()
    }
}
