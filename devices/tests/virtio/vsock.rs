//! Sockets between guest and host, through the queues.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use ferry_devices::virtio::{AnyVirtio, DeviceState};
use ferry_devices::vsock::{
    HEADER, HOST_CID, Header, Host, MOST_CONNECTIONS, MOST_RESETS, Op, Reset, Vsock,
};

use crate::driver::{DATA, Driver, eventually, memory};

const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
const CID: u32 = 33;
const TIMEOUT: Duration = Duration::from_secs(30);
/// Where the guest's packets are made, and where buffers for it begin.
const SENT: u64 = DATA;
const BUFFERS: u64 = DATA + 0x2_0000;
const BUFFER: u32 = 4096;

/// `v.sock`, and what `v.sock_PORT` leads to.
struct Folder {
    dir: tempfile::TempDir,
    listener: UnixListener,
}

impl Folder {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("v.sock")).unwrap();
        listener.set_nonblocking(true).unwrap();
        Self { dir, listener }
    }

    fn device(&self) -> Vsock {
        let programs = Programs {
            listener: self.listener.try_clone().unwrap(),
            path: self.dir.path().join("v.sock_"),
        };
        Vsock::new(CID, Box::new(programs)).unwrap()
    }

    /// A program that serves this port of the host's.
    fn serve(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.dir.path().join(format!("v.sock_{port}"))).unwrap()
    }

    /// A program that connects to this port of the guest's.
    fn connect(&self, port: u32) -> UnixStream {
        let mut program = UnixStream::connect(self.dir.path().join("v.sock")).unwrap();
        program.set_read_timeout(Some(TIMEOUT)).unwrap();
        writeln!(program, "CONNECT {port}").unwrap();
        program
    }
}

struct Programs {
    listener: UnixListener,
    path: PathBuf,
}

impl Host for Programs {
    fn listener(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
    fn accept(&mut self) -> io::Result<UnixStream> {
        let (stream, _) = self.listener.accept()?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    }
    fn connect(&mut self, port: u32) -> io::Result<UnixStream> {
        let stream = UnixStream::connect(format!("{}{port}", self.path.display()))?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    }
}

type Guest = Driver<Vsock>;

fn start(folder: &Folder) -> Guest {
    let mut guest = Driver::start(folder.device(), memory(), u64::MAX, 16);
    for n in 0..8 {
        give(&mut guest, n);
    }
    guest.kick(RX);
    guest
}

fn at(n: u64) -> u64 {
    BUFFERS + n * u64::from(BUFFER)
}

/// Gives the device the buffer `n`, in two pieces.
fn give(guest: &mut Guest, n: u64) {
    guest.add(RX, &[], &[(at(n), 50), (at(n) + 50, BUFFER - 50)]);
}

fn send(guest: &mut Guest, op: Op, flags: u32, (guest_port, host_port): (u32, u32), data: &[u8]) {
    let header = Header {
        src_cid: CID.into(),
        dst_cid: HOST_CID,
        src_port: guest_port,
        dst_port: host_port,
        len: data.len() as u32,
        buf_alloc: 1 << 16,
        flags,
        ..Header::to_guest(0, op, 0, 0)
    };
    guest.put(SENT, &[&header.to_bytes()[..], data].concat());
    // Header and data in as many pieces as they like.
    let len = (HEADER + data.len()) as u32;
    let pieces = [(SENT, 20), (SENT + 20, len - 20)];
    guest.add(TX, &pieces, &[]);
    guest.kick(TX);
    guest.wait(TX);
}

/// The next packet; its buffer is given back.
fn recv(guest: &mut Guest) -> (Header, Vec<u8>) {
    let (mut got, mut head) = (None, 0);
    eventually("a packet comes", || {
        let chain = guest.rings[RX].chains.clone();
        got = guest.take(RX).map(|(h, len)| (chain[&h].clone(), len));
        got.is_some()
    });
    let (chain, len) = got.unwrap();
    head += chain[0];
    let table = guest.rings[RX].descriptors() + u64::from(head) * 16;
    let address = u64::from_le_bytes(guest.get(table, 8).try_into().unwrap());
    let bytes = guest.get(address, len as usize);
    let header = Header::from_bytes(bytes[..HEADER].try_into().unwrap());
    assert_eq!(header.len as usize, bytes.len() - HEADER);
    give(guest, (address - BUFFERS) / u64::from(BUFFER));
    guest.kick(RX);
    (header, bytes[HEADER..].to_vec())
}

#[track_caller]
fn expect(guest: &mut Guest, op: Op) -> Header {
    let (header, _) = recv(guest);
    assert_eq!(header.op, op);
    header
}

fn read(program: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    program.read_exact(&mut bytes).unwrap();
    bytes
}

/// The guest connects to the program that serves port 5.
fn connected(guest: &mut Guest, serving: &UnixListener, port: u32) -> UnixStream {
    send(guest, Op::Request, 0, (port, 5), &[]);
    let (program, _) = serving.accept().unwrap();
    program.set_read_timeout(Some(TIMEOUT)).unwrap();
    expect(guest, Op::Response);
    program
}

#[test]
fn both_sides_connect_and_talk() {
    let folder = Folder::new();
    let mut guest = start(&folder);
    assert_eq!(u64::from_le_bytes(guest.config(0)), u64::from(CID));
    let serving = folder.serve(5);
    let mut program = connected(&mut guest, &serving, 1000);
    let data: Vec<u8> = (0..20_000u32).map(|n| (n * 7 % 251) as u8).collect();
    send(&mut guest, Op::Data, 0, (1000, 5), &data);
    assert_eq!(read(&mut program, data.len()), data);
    program.write_all(&data).unwrap();
    let mut got = Vec::new();
    while got.len() < data.len() {
        let (header, bytes) = recv(&mut guest);
        assert_eq!(header.op, Op::Data);
        got.extend(bytes);
    }
    assert_eq!(got, data);

    let mut program = folder.connect(52);
    let request = expect(&mut guest, Op::Request);
    assert_eq!(request.dst_port, 52);
    send(&mut guest, Op::Response, 0, (52, request.src_port), &[]);
    let line = format!("OK {}\n", request.src_port);
    assert_eq!(read(&mut program, line.len()), line.as_bytes());
    drop(program);
    assert_eq!(expect(&mut guest, Op::Shutdown).flags, 2);
}

#[test]
fn answers_wait_for_buffers_and_packets_for_answers() {
    let folder = Folder::new();
    let mut guest = Driver::start(folder.device(), memory(), u64::MAX, 16);
    // No buffer, and more packets than answers are kept for.
    let most = MOST_RESETS as u32;
    for port in 0..most {
        send(&mut guest, Op::Data, 0, (port, 5), &[]);
    }
    let header = Header {
        src_cid: CID.into(),
        dst_cid: HOST_CID,
        src_port: most,
        dst_port: 5,
        ..Header::to_guest(0, Op::Data, 0, 0)
    };
    guest.put(SENT, &header.to_bytes());
    guest.add(TX, &[(SENT, HEADER as u32)], &[]);
    guest.kick(TX);
    // It is not taken: a pause finds the device at rest.
    guest.device.pause().unwrap();
    guest.device.resume();
    guest.device.pause().unwrap();
    assert_eq!(guest.take(TX), None);
    guest.device.resume();
    for n in 0..8 {
        give(&mut guest, n);
    }
    guest.kick(RX);
    for port in 0..=most {
        assert_eq!(expect(&mut guest, Op::Reset).dst_port, port);
    }
    guest.wait(TX);
}

#[test]
fn a_move_ends_connections_and_tells_the_guest() {
    let folder = Folder::new();
    let mut guest = start(&folder);
    let serving = folder.serve(5);
    let mut program = connected(&mut guest, &serving, 1000);
    let _asking = folder.connect(52);
    let port = expect(&mut guest, Op::Request).src_port;
    // The event queue has no buffer, here or there.
    let there = Folder::new();
    let guest = guest.migrate(|_| there.device());
    assert_eq!(program.read(&mut [0]).unwrap(), 0, "the source's end");
    // Nor where it goes next: the event is still due.
    let last = Folder::new();
    let mut guest = guest.migrate(|_| last.device());
    guest.add(EVENT, &[], &[(DATA, 8)]);
    guest.put(DATA, &[0xff; 8]);
    guest.kick(EVENT);
    assert_eq!(guest.wait(EVENT).1, 4);
    assert_eq!(
        guest.get(DATA, 4),
        [0; 4],
        "VIRTIO_VSOCK_EVENT_TRANSPORT_RESET"
    );
    // What the guest still sends on the old one is reset; new ones work, and the host's have other
    // ports.
    send(&mut guest, Op::Data, 0, (1000, 5), b"old");
    expect(&mut guest, Op::Reset);
    let serving = last.serve(5);
    let mut program = connected(&mut guest, &serving, 1001);
    send(&mut guest, Op::Data, 0, (1001, 5), b"new");
    assert_eq!(read(&mut program, 3), b"new");
    let _asking = last.connect(52);
    assert_ne!(expect(&mut guest, Op::Request).src_port, port);
    // The event comes once.
    guest.add(EVENT, &[], &[(DATA, 8)]);
    guest.kick(EVENT);
    send(&mut guest, Op::CreditRequest, 0, (1001, 5), b"");
    expect(&mut guest, Op::CreditUpdate);
    assert_eq!(guest.take(EVENT), None);
}

#[test]
fn a_guest_that_had_no_connection_is_told_nothing() {
    let folder = Folder::new();
    let guest = start(&folder);
    let there = Folder::new();
    let mut guest = guest.migrate(|_| there.device());
    guest.add(EVENT, &[], &[(DATA, 8)]);
    guest.kick(EVENT);
    send(&mut guest, Op::Data, 0, (1, 5), b"");
    expect(&mut guest, Op::Reset);
    assert_eq!(guest.take(EVENT), None);
}

#[test]
fn a_guest_that_stays_keeps_its_connections() {
    let folder = Folder::new();
    let mut guest = start(&folder);
    guest.add(EVENT, &[], &[(DATA, 8)]);
    let serving = folder.serve(5);
    let mut program = connected(&mut guest, &serving, 1000);
    guest.device.pause().unwrap();
    program.write_all(b"while paused").unwrap();
    let DeviceState::Vsock(state) = guest.device.save().device else {
        panic!("another device");
    };
    assert!(state.reset, "elsewhere they would be gone");
    guest.device.resume();
    assert_eq!(recv(&mut guest).1, b"while paused");
    // It was given away, and comes back all the same.
    guest.device.pause().unwrap();
    guest.device.with(Vsock::leave);
    assert_eq!(program.read(&mut [0]).unwrap(), 0);
    guest.device.resume();
    assert_eq!(guest.wait(EVENT).1, 4);
}

#[test]
fn a_connection_that_was_not_answered_is_reset_elsewhere() {
    let folder = Folder::new();
    let mut guest = Driver::start(folder.device(), memory(), u64::MAX, 16);
    let _serving = folder.serve(5);
    send(&mut guest, Op::Request, 0, (1000, 5), &[]);
    let there = Folder::new();
    let mut guest = guest.migrate(|_| there.device());
    give(&mut guest, 0);
    guest.kick(RX);
    let reset = expect(&mut guest, Op::Reset);
    assert_eq!((reset.src_port, reset.dst_port), (5, 1000));
}

#[test]
fn a_driver_that_starts_anew_has_no_connections() {
    let folder = Folder::new();
    let mut guest = start(&folder);
    let serving = folder.serve(5);
    let mut program = connected(&mut guest, &serving, 1000);
    guest.init(u64::MAX, 16);
    assert_eq!(program.read(&mut [0]).unwrap(), 0);
    give(&mut guest, 0);
    guest.kick(RX);
    connected(&mut guest, &serving, 1000);
}

#[test]
fn packets_that_cannot_be_stop_the_device() {
    let len = |len| Header {
        len,
        ..Header::to_guest(0, Op::Data, 0, 0)
    };
    for (queue, header, readable, writable) in [
        (TX, len(0), 43, 0),
        (TX, len(1), 44, 0),
        (TX, len(65_537), 44 + 65_537, 0),
        (TX, len(u32::MAX), 100, 0),
        (EVENT, len(0), 0, 3),
        (RX, len(0), 0, 44),
    ] {
        let folder = Folder::new();
        let mut guest = Driver::start(folder.device(), memory(), u64::MAX, 16);
        if queue == EVENT {
            let mut state = guest.device.save();
            guest.device.pause().unwrap();
            if let DeviceState::Vsock(vsock) = &mut state.device {
                vsock.reset = true;
            }
            guest.device.restore(&state).unwrap();
            guest.device.resume();
        }
        if queue == RX {
            send(&mut guest, Op::Data, 0, (1, 5), &[]);
        }
        guest.put(SENT, &header.to_bytes());
        let parts = |len| [(SENT, len)];
        let (readable, writable) = (parts(readable), parts(writable));
        let some = |parts: &[(u64, u32); 1]| parts[0].1 > 0;
        let readable = &readable[..usize::from(some(&readable))];
        let writable = &writable[..usize::from(some(&writable))];
        guest.add(queue, readable, writable);
        guest.kick(queue);
        guest.broken();
    }
}

#[test]
fn states_that_cannot_be_are_refused() {
    let folder = Folder::new();
    let guest = Driver::plug(folder.device(), memory());
    guest.device.pause().unwrap();
    let good = guest.device.save();
    let refused = |change: &dyn Fn(&mut ferry_devices::vsock::VsockState)| {
        let mut state = good.clone();
        if let DeviceState::Vsock(vsock) = &mut state.device {
            change(vsock);
        }
        guest.device.restore(&state).unwrap_err().to_string()
    };
    assert!(refused(&|s| s.cid = 34).contains("context"));
    let reset = Reset {
        cid: HOST_CID,
        host_port: 1,
        guest_port: 2,
        kind: 1,
    };
    let many = MOST_CONNECTIONS + MOST_RESETS + 1;
    assert!(refused(&|s| s.owed = vec![reset; many]).contains("answers"));
    guest.device.restore(&good).unwrap();
}
