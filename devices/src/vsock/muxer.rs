//! All connections of a guest, between its packets and the host's sockets.
//!
//! What a guest or a program of the host can make it keep is bounded: [`MOST_CONNECTIONS`] with
//! [`ROOM`](super::connection::ROOM) bytes each, and [`MOST_RESETS`] besides one for each of them.
//! Where the answers to the guest's packets have no room, no more of its packets are taken.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;

use rustix::event::epoll::EventFlags;

use super::connection::{Connection, Fate, Outward, Ports};
use super::hello::{Hello, Said};
use super::packet::{Header, Op, STREAM};
use super::poll::{Poll, Watched};
use super::{HOST_CID, Host};
pub use crate::state::Reset;
use crate::virtio::Sparse;

/// Connections that there can be at once, those included that are made or still closed.
pub const MOST_CONNECTIONS: usize = 256;
/// Answers that wait for a buffer of the guest's.
pub const MOST_RESETS: usize = 256;
/// The host's ports of connections that the host makes, as Firecracker chooses them: programs
/// seldom listen there.
const FIRST_PORT: u32 = 1 << 30;
const LAST_PORT: u32 = (1 << 31) - 1;
/// Of the listener, where connections have numbers.
const LISTENER: u64 = 0;

impl Reset {
    const fn of(ports: Ports) -> Self {
        Self {
            cid: HOST_CID,
            host_port: ports.host,
            guest_port: ports.guest,
            kind: STREAM,
        }
    }

    const fn answer(header: &Header) -> Self {
        Self {
            cid: header.dst_cid,
            host_port: header.dst_port,
            guest_port: header.src_port,
            kind: header.kind,
        }
    }

    const fn header(&self, cid: u32) -> Header {
        let mut header = Header::to_guest(cid, Op::Reset, self.host_port, self.guest_port);
        header.src_cid = self.cid;
        header.kind = self.kind;
        header
    }
}

enum Entry {
    /// A program of the host that has not said which port it wants.
    Hello(Hello),
    Connection(Connection),
    /// Closed by the guest, with something left for the host.
    Lingering(Watched, Outward),
}

/// All connections of a guest: takes its packets, and has packets for it. What is in the queues is
/// [`Vsock`](super::Vsock)'s.
pub struct Muxer {
    cid: u32,
    host: Box<dyn Host>,
    poll: Poll,
    listening: Option<EventFlags>,
    /// The host could not accept; it tries again when a connection has ended.
    refused: bool,
    entries: BTreeMap<u64, Entry>,
    by_ports: BTreeMap<Ports, u64>,
    next_id: u64,
    next_port: u32,
    /// Connections that have a packet for the guest, in the order of their turns.
    line: VecDeque<u64>,
    resets: VecDeque<Reset>,
    dropped: Sparse,
}

impl std::fmt::Debug for Muxer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Muxer")
            .field("connections", &self.entries.len())
            .finish_non_exhaustive()
    }
}

impl Muxer {
    /// For a guest of this context, without connections.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn new(cid: u32, host: Box<dyn Host>) -> io::Result<Self> {
        Ok(Self {
            cid,
            host,
            poll: Poll::new()?,
            listening: None,
            refused: false,
            entries: BTreeMap::new(),
            by_ports: BTreeMap::new(),
            next_id: LISTENER + 1,
            next_port: FIRST_PORT,
            line: VecDeque::new(),
            resets: VecDeque::new(),
            dropped: Sparse::default(),
        })
    }

    /// Readable when [`host_ready`](Self::host_ready) has something to do.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn readable(&self) -> io::Result<OwnedFd> {
        self.poll.readable()
    }

    /// The port of the host's for the next connection that a program of the host makes.
    #[must_use]
    pub const fn next_port(&self) -> u32 {
        self.next_port
    }

    /// Where the host's ports go on, so that a guest that was moved does not take a new connection
    /// for one that it had.
    pub fn set_next_port(&mut self, port: u32) {
        let possible = (FIRST_PORT..=LAST_PORT).contains(&port);
        self.next_port = if possible { port } else { FIRST_PORT };
    }

    /// Whether the guest may have connections.
    #[must_use]
    pub fn has_connections(&self) -> bool {
        !self.by_ports.is_empty()
    }

    /// What the guest is owed on another host: it waits for an answer.
    #[must_use]
    pub fn owed(&self) -> Vec<Reset> {
        let unanswered = self.entries.values().filter_map(|entry| match entry {
            Entry::Connection(c) if c.owes_answer() => Some(Reset::of(c.ports)),
            _ => None,
        });
        self.resets.iter().copied().chain(unanswered).collect()
    }

    /// Owes the guest these.
    pub fn set_owed(&mut self, resets: &[Reset]) {
        self.resets = resets.iter().copied().collect();
    }

    /// Closes all connections. Makes no system call but close(2), as a vCPU's thread may not.
    pub fn clear(&mut self) {
        self.entries.clear();
        self.by_ports.clear();
        self.line.clear();
        self.resets.clear();
        self.refused = false;
    }

    /// Whether a packet of the guest's can be answered.
    #[must_use]
    pub fn may_receive(&self) -> bool {
        self.resets.len() < MOST_RESETS
    }

    /// A packet of the guest's, with its data.
    pub fn receive(&mut self, header: &Header, data: &[u8]) {
        if header.src_cid != u64::from(self.cid) {
            self.dropped(&"it comes from another context than the guest's");
            return;
        }
        if header.dst_cid != HOST_CID || header.kind != STREAM {
            if header.op != Op::Reset {
                self.resets.push_back(Reset::answer(header));
            }
            return;
        }
        let ports = Ports {
            guest: header.src_port,
            host: header.dst_port,
        };
        let id = self.by_ports.get(&ports).copied();
        match (header.op, id) {
            (Op::Reset, Some(id)) => drop(self.remove(id)),
            (Op::Reset, None) => {}
            (Op::Request, None) => self.connect(ports, header),
            (_, None) => self.resets.push_back(Reset::of(ports)),
            (_, Some(id)) => {
                if let Some(Entry::Connection(connection)) = self.entries.get_mut(&id) {
                    let fate = connection.receive(header, data);
                    self.settle(id, fate);
                }
            }
        }
    }

    fn dropped(&mut self, why: &dyn std::fmt::Display) {
        if let Some(times) = self.dropped.count() {
            tracing::debug!(
                times,
                "a packet or a connection of vsock was dropped: {why}"
            );
        }
    }

    /// The guest wants a connection.
    fn connect(&mut self, ports: Ports, request: &Header) {
        if !self.make_room() {
            self.dropped(&"there are as many connections as there can be");
            self.resets.push_back(Reset::of(ports));
            return;
        }
        match self.host.connect(ports.host) {
            Ok(stream) => {
                let id = self.number();
                let connection = Connection::open(ports, Watched::new(stream, id), request);
                self.add(id, connection);
            }
            Err(error) => {
                self.dropped(&error);
                self.resets.push_back(Reset::of(ports));
            }
        }
    }

    fn number(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }

    fn add(&mut self, id: u64, connection: Connection) {
        self.by_ports.insert(connection.ports, id);
        self.entries.insert(id, Entry::Connection(connection));
        self.settle(id, Fate::Stays);
    }

    /// Makes room for a connection, if need be at the cost of one that the guest has closed.
    fn make_room(&mut self) -> bool {
        if self.entries.len() < MOST_CONNECTIONS {
            return true;
        }
        let mut entries = self.entries.iter();
        let oldest = entries.find(|(_, entry)| matches!(entry, Entry::Lingering(..)));
        let oldest = oldest.map(|(id, _)| *id);
        oldest.is_some_and(|id| self.remove(id).is_some())
    }

    fn remove(&mut self, id: u64) -> Option<Entry> {
        let entry = self.entries.remove(&id)?;
        if let Entry::Connection(connection) = &entry {
            self.by_ports.remove(&connection.ports);
            if connection.queued {
                self.line.retain(|waiting| *waiting != id);
            }
        }
        self.refused = false;
        Some(entry)
    }

    /// What follows from what was done with a connection.
    fn settle(&mut self, id: u64, fate: Fate) {
        let Some(Entry::Connection(connection)) = self.entries.get_mut(&id) else {
            return;
        };
        let watched = connection.watch(&self.poll);
        if fate == Fate::Stays && watched.is_ok() {
            if !connection.queued && connection.has_packet() {
                connection.queued = true;
                self.line.push_back(id);
            }
            return;
        }
        if fate != Fate::Forgotten {
            self.resets.push_back(Reset::of(connection.ports));
        }
        let removed = self.remove(id);
        if fate == Fate::Closed
            && let Some(Entry::Connection(connection)) = removed
            && let Some((mut stream, rest)) = connection.into_rest()
            && stream.watch(&self.poll, Some(EventFlags::OUT)).is_ok()
        {
            self.entries.insert(id, Entry::Lingering(stream, rest));
        }
    }

    /// Does what there is to do at the host's end.
    ///
    /// # Errors
    /// The sockets cannot be waited for any more.
    pub fn host_ready(&mut self) -> io::Result<()> {
        for (id, flags) in self.poll.happened()? {
            match self.entries.get_mut(&id) {
                _ if id == LISTENER => self.accept(),
                Some(Entry::Hello(_)) => self.hello(id),
                Some(Entry::Connection(connection)) => {
                    let fate = connection.host_ready(flags);
                    self.settle(id, fate);
                }
                Some(Entry::Lingering(stream, rest)) => {
                    let done = rest.flush(stream).is_err() || rest.is_empty();
                    if done {
                        self.remove(id);
                    }
                }
                None => {}
            }
        }
        Ok(())
    }

    /// Takes connections of the host's programs as long as there is room for them.
    pub fn listen(&mut self) {
        let wanted = !self.refused && self.entries.len() < MOST_CONNECTIONS;
        let wanted = wanted.then_some(EventFlags::IN);
        let listener = self.host.listener();
        match self.poll.change(listener, LISTENER, self.listening, wanted) {
            Ok(()) => self.listening = wanted,
            Err(error) => self.refuse(&error),
        }
    }

    /// Takes no more connections of the host's programs until one has ended.
    fn refuse(&mut self, error: &io::Error) {
        tracing::warn!(%error, "programs of the host cannot be connected to the guest's vsock");
        self.refused = true;
    }

    fn accept(&mut self) {
        while self.entries.len() < MOST_CONNECTIONS {
            match self.host.accept() {
                Ok(stream) => {
                    let id = self.number();
                    let mut stream = Watched::new(stream, id);
                    if stream.watch(&self.poll, Some(EventFlags::IN)).is_ok() {
                        self.entries.insert(id, Entry::Hello(Hello::new(stream)));
                    }
                }
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock => return,
                    ErrorKind::Interrupted | ErrorKind::ConnectionAborted => {}
                    _ => return self.refuse(&error),
                },
            }
        }
    }

    /// A program says which port it wants.
    fn hello(&mut self, id: u64) {
        let Some(Entry::Hello(hello)) = self.entries.get_mut(&id) else {
            return;
        };
        match hello.read() {
            Said::More => {}
            Said::Nonsense => drop(self.remove(id)),
            Said::Port(guest) => {
                let host = self.free_port(guest);
                if let Some(Entry::Hello(hello)) = self.remove(id) {
                    let ports = Ports { guest, host };
                    self.add(id, Connection::asked(ports, hello.into_stream()));
                }
            }
        }
    }

    /// A port of the host's that no connection to this port of the guest's has. There are more than
    /// connections.
    fn free_port(&mut self, guest: u32) -> u32 {
        loop {
            let host = self.next_port;
            self.set_next_port(host + 1);
            if !self.by_ports.contains_key(&Ports { guest, host }) {
                return host;
            }
        }
    }

    /// Whether there may be a packet for the guest.
    #[must_use]
    pub fn has_packet(&self) -> bool {
        !self.resets.is_empty() || !self.line.is_empty()
    }

    /// The next packet for the guest, with at most `room.len()` bytes of data, which are put there.
    /// A connection has its next turn after the others.
    pub fn next_packet(&mut self, room: &mut [u8]) -> Option<Header> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(reset.header(self.cid));
        }
        while let Some(id) = self.line.pop_front() {
            let Some(Entry::Connection(connection)) = self.entries.get_mut(&id) else {
                continue;
            };
            connection.queued = false;
            let packet = connection.next_packet(self.cid, room);
            self.settle(id, Fate::Stays);
            if packet.is_some() {
                return packet;
            }
        }
        None
    }
}

#[cfg(test)]
impl Muxer {
    /// Bytes of the guest's that are kept for the program.
    pub(super) fn held(&self, guest: u32, host: u32) -> usize {
        let id = self.by_ports.get(&Ports { guest, host });
        match id.and_then(|id| self.entries.get(id)) {
            Some(Entry::Connection(connection)) => connection.held(),
            _ => 0,
        }
    }
}
