//! The connections without queues: packets go in and come out.

mod oracle;
mod random;

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::*;
use crate::sync::lock;

const CID: u32 = 7;
/// Programs serve the ports up to this one.
const SERVED: u32 = 1000;
const ROOM_BYTES: usize = ROOM as usize;
/// A program that waits for so long waits for ever.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Programs that were connected to, with the port.
type Accepted = Arc<Mutex<VecDeque<(u32, UnixStream)>>>;

struct Programs {
    listener: UnixListener,
    accepted: Accepted,
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
        if port > SERVED {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        theirs.set_read_timeout(Some(TIMEOUT))?;
        lock(&self.accepted).push_back((port, theirs));
        Ok(ours)
    }
}

/// A host with its programs, and a guest that sends packets one by one.
struct Bench {
    muxer: Muxer,
    accepted: Accepted,
    path: PathBuf,
    _dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let accepted = Accepted::default();
        let programs = Programs {
            listener,
            accepted: Arc::clone(&accepted),
        };
        Self {
            muxer: Muxer::new(CID, Box::new(programs)).unwrap(),
            accepted,
            path,
            _dir: dir,
        }
    }

    fn send(&mut self, op: Op, guest: u32, host: u32) {
        self.muxer.receive(&packet(op, guest, host), &[]);
    }

    fn send_data(&mut self, guest: u32, host: u32, data: &[u8]) {
        let header = Header {
            len: u32::try_from(data.len()).unwrap(),
            ..packet(Op::Data, guest, host)
        };
        self.muxer.receive(&header, data);
    }

    /// The next packet for the guest, after the host has had its turn.
    fn next(&mut self) -> Option<(Header, Vec<u8>)> {
        self.muxer.listen();
        self.muxer.host_ready().unwrap();
        self.muxer.listen();
        let mut room = vec![0; ROOM_BYTES];
        let header = self.muxer.next_packet(&mut room)?;
        room.truncate(header.len as usize);
        assert_eq!(header.dst_cid, u64::from(CID));
        Some((header, room))
    }

    #[track_caller]
    fn expect(&mut self, op: Op) -> Header {
        let (header, _) = self.next().expect("a packet");
        assert_eq!(header.op, op);
        header
    }

    #[track_caller]
    fn silent(&mut self) {
        assert_eq!(self.next(), None);
        assert!(!self.muxer.has_packet());
    }

    /// The guest connects to the host's port 5: the program.
    fn connected(&mut self, guest: u32) -> UnixStream {
        self.send(Op::Request, guest, 5);
        let response = self.expect(Op::Response);
        assert_eq!((response.src_port, response.dst_port), (5, guest));
        assert_eq!(response.buf_alloc, ROOM);
        let (port, program) = lock(&self.accepted).pop_front().unwrap();
        assert_eq!(port, 5);
        program
    }

    /// A program that has connected.
    fn program(&self) -> UnixStream {
        let program = UnixStream::connect(&self.path).unwrap();
        program.set_read_timeout(Some(TIMEOUT)).unwrap();
        program
    }

    /// A program asks for the guest's port; it and its port.
    fn asked(&mut self, guest: u32) -> (UnixStream, u32) {
        let mut program = self.program();
        writeln!(program, "CONNECT {guest}").unwrap();
        // The listener, and then the program's line.
        if let Some(packet) = self.next() {
            assert_eq!(packet.0.op, Op::Request);
            return (program, packet.0.src_port);
        }
        let request = self.expect(Op::Request);
        assert_eq!(request.dst_port, guest);
        (program, request.src_port)
    }
}

fn packet(op: Op, guest: u32, host: u32) -> Header {
    Header {
        src_cid: CID.into(),
        dst_cid: HOST_CID,
        src_port: guest,
        dst_port: host,
        buf_alloc: 1 << 20,
        ..Header::to_guest(0, op, 0, 0)
    }
}

fn read(program: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    program.read_exact(&mut bytes).unwrap();
    bytes
}

fn at_end(program: &mut UnixStream) -> bool {
    match program.read(&mut [0]) {
        Ok(n) => n == 0,
        Err(e) => e.kind() == io::ErrorKind::ConnectionReset,
    }
}

#[test]
fn the_guest_connects_and_either_side_ends_its_direction() {
    let mut bench = Bench::new();
    let mut program = bench.connected(40);
    bench.send_data(40, 5, b"question");
    assert_eq!(read(&mut program, 8), b"question");
    bench.silent();
    program.write_all(b"answer").unwrap();
    let (header, data) = bench.next().unwrap();
    assert_eq!((header.op, data.as_slice()), (Op::Data, &b"answer"[..]));
    assert_eq!(header.fwd_cnt, 8);
    // The host's direction ends, and the guest's goes on.
    program.shutdown(Shutdown::Write).unwrap();
    assert_eq!(bench.expect(Op::Shutdown).flags, NO_SEND);
    bench.send_data(40, 5, b"more");
    assert_eq!(read(&mut program, 4), b"more");
    // The guest's ends, too: nothing is left to do for either.
    let end = Header {
        flags: NO_SEND,
        ..packet(Op::Shutdown, 40, 5)
    };
    bench.muxer.receive(&end, &[]);
    assert!(at_end(&mut program));
    assert_eq!(bench.expect(Op::Shutdown).flags, NO_MORE);
    bench.send(Op::Reset, 40, 5);
    bench.silent();
    assert!(!bench.muxer.has_connections());
}

#[test]
fn a_program_connects() {
    let mut bench = Bench::new();
    let (mut program, port) = bench.asked(52);
    bench.silent();
    bench.send(Op::Response, 52, port);
    let line = format!("OK {port}\n");
    assert_eq!(read(&mut program, line.len()), line.as_bytes());
    // The line is none of the guest's bytes.
    program.write_all(b"x").unwrap();
    let (header, _) = bench.next().unwrap();
    assert_eq!((header.op, header.fwd_cnt), (Op::Data, 0));
    // The next has another port, and is refused.
    let (mut refused, other) = bench.asked(52);
    assert_ne!(other, port);
    bench.send(Op::Reset, 52, other);
    assert!(at_end(&mut refused));
    bench.silent();
    assert!(bench.muxer.has_connections());
}

#[test]
fn programs_that_hang_up_are_forgotten() {
    let mut bench = Bench::new();
    // Before the guest was told.
    let early = bench.program();
    (&early).write_all(b"CONNECT 52\n").unwrap();
    drop(early);
    bench.muxer.listen();
    bench.muxer.host_ready().unwrap();
    bench.muxer.host_ready().unwrap();
    bench.muxer.host_ready().unwrap();
    bench.silent();
    // While it is asked.
    let (program, port) = bench.asked(52);
    drop(program);
    assert_eq!(bench.expect(Op::Reset).src_port, port);
    // What it says is no line.
    let mut program = bench.program();
    program.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    bench.silent();
    bench.silent();
    assert!(at_end(&mut program));
    assert!(!bench.muxer.has_connections());
}

#[test]
fn a_program_that_ends_has_its_last_words_heard() {
    let mut bench = Bench::new();
    let mut program = bench.connected(40);
    program.write_all(b"last").unwrap();
    drop(program);
    // The guest writes to what is gone.
    bench.send_data(40, 5, b"late");
    let mut got = Vec::new();
    let mut flags = 0;
    while let Some((header, data)) = bench.next() {
        got.extend(data);
        flags |= header.flags;
    }
    assert_eq!(got, b"last");
    assert_eq!(flags, NO_MORE);
    // More of it is no reason for a RST: the guest was told.
    bench.send_data(40, 5, b"later");
    bench.silent();
    bench.send(Op::Reset, 40, 5);
    assert!(!bench.muxer.has_connections());
}

#[test]
fn what_is_not_known_is_reset_and_a_reset_never() {
    let mut bench = Bench::new();
    for op in [
        Op::Response,
        Op::Shutdown,
        Op::Data,
        Op::CreditUpdate,
        Op::CreditRequest,
        Op::Unknown(0),
        Op::Unknown(77),
    ] {
        bench.send(op, 40, 5);
        let reset = bench.expect(Op::Reset);
        assert_eq!((reset.src_port, reset.dst_port), (5, 40), "{op:?}");
        bench.silent();
    }
    bench.send(Op::Reset, 40, 5);
    bench.silent();
    // No program serves it.
    bench.send(Op::Request, 40, SERVED + 1);
    assert_eq!(bench.expect(Op::Reset).src_port, SERVED + 1);
    // Another context, and datagrams.
    for (dst_cid, kind) in [(9, STREAM), (HOST_CID, 3)] {
        let odd = Header {
            dst_cid,
            kind,
            ..packet(Op::Request, 40, 5)
        };
        bench.muxer.receive(&odd, &[]);
        let reset = bench.expect(Op::Reset);
        assert_eq!((reset.src_cid, reset.kind), (dst_cid, kind));
        let odd = Header {
            op: Op::Reset,
            ..odd
        };
        bench.muxer.receive(&odd, &[]);
        bench.silent();
    }
    // In the name of another guest.
    let forged = Header {
        src_cid: 8,
        ..packet(Op::Request, 40, 5)
    };
    bench.muxer.receive(&forged, &[]);
    bench.silent();
    assert!(!bench.muxer.has_connections());
}

#[test]
fn packets_that_do_not_fit_end_the_connection() {
    for op in [Op::Request, Op::Response, Op::Unknown(9)] {
        let mut bench = Bench::new();
        let mut program = bench.connected(40);
        bench.send(op, 40, 5);
        bench.expect(Op::Reset);
        bench.silent();
        assert!(at_end(&mut program), "{op:?}");
        assert!(!bench.muxer.has_connections());
    }
    // Data before the answer, and after the end.
    let mut bench = Bench::new();
    let (_program, port) = bench.asked(52);
    bench.send_data(52, port, b"x");
    bench.expect(Op::Reset);
    let _program = bench.connected(40);
    let end = Header {
        flags: NO_SEND,
        ..packet(Op::Shutdown, 40, 5)
    };
    bench.muxer.receive(&end, &[]);
    bench.send_data(40, 5, b"x");
    bench.expect(Op::Reset);
}

#[test]
fn the_guest_is_sent_no_more_than_it_has_room_for() {
    let mut bench = Bench::new();
    let small = |op| Header {
        buf_alloc: 100,
        ..packet(op, 40, 5)
    };
    bench.muxer.receive(&small(Op::Request), &[]);
    bench.expect(Op::Response);
    let (_, mut program) = lock(&bench.accepted).pop_front().unwrap();
    program.write_all(&[1; 250]).unwrap();
    let mut sizes = Vec::new();
    for forwarded in [0, 60, 100, 200] {
        let update = Header {
            fwd_cnt: forwarded,
            ..small(Op::CreditUpdate)
        };
        bench.muxer.receive(&update, &[]);
        while let Some((header, data)) = bench.next() {
            sizes.push((header.op, data.len()));
        }
    }
    let wanted = [
        (Op::Data, 100),
        (Op::CreditRequest, 0),
        (Op::Data, 60),
        (Op::CreditRequest, 0),
        (Op::Data, 40),
        (Op::CreditRequest, 0),
        (Op::Data, 50),
    ];
    assert_eq!(sizes, wanted);
    // A guest that lies has no credit, and that is all.
    let update = Header {
        fwd_cnt: 251,
        ..small(Op::CreditUpdate)
    };
    bench.muxer.receive(&update, &[]);
    program.write_all(b"x").unwrap();
    bench.expect(Op::CreditRequest);
    bench.silent();
}

/// Fills what the kernel keeps for the program, and then what is kept here.
fn fill(bench: &mut Bench) -> usize {
    let mut sent = 0;
    loop {
        bench.send_data(40, 5, &[7; 4096]);
        sent += 4096;
        let held = bench.muxer.held(40, 5);
        if held == ROOM_BYTES {
            return sent;
        }
        assert!(sent < 64 << 20);
        // Updates of the credit.
        while let Some((header, _)) = bench.next() {
            assert_eq!(header.op, Op::CreditUpdate);
        }
    }
}

#[test]
fn the_guest_may_send_no_more_than_there_is_room_for() {
    let mut bench = Bench::new();
    let mut program = bench.connected(40);
    let sent = fill(&mut bench);
    bench.silent();
    // The program reads: the guest is told without having asked.
    let (mut got, mut told) = (0, 0);
    while got < sent {
        let bytes = read(&mut program, 4096);
        assert_eq!(bytes, [7; 4096]);
        got += bytes.len();
        if let Some((header, _)) = bench.next() {
            assert_eq!(header.op, Op::CreditUpdate);
            told = header.fwd_cnt as usize;
        }
    }
    assert!(sent - told <= ROOM_BYTES / 2);
    bench.send(Op::CreditRequest, 40, 5);
    assert_eq!(bench.expect(Op::CreditUpdate).fwd_cnt as usize, sent);
    // One byte too many.
    fill(&mut bench);
    bench.send_data(40, 5, b"x");
    bench.expect(Op::Reset);
    assert!(!bench.muxer.has_connections());
}

#[test]
fn what_the_guest_sent_before_it_closed_arrives() {
    let mut bench = Bench::new();
    let mut program = bench.connected(40);
    let sent = fill(&mut bench);
    let end = Header {
        flags: NO_MORE,
        ..packet(Op::Shutdown, 40, 5)
    };
    bench.muxer.receive(&end, &[]);
    bench.expect(Op::Reset);
    assert!(!bench.muxer.has_connections());
    // The guest may have the same ports again.
    let _second = bench.connected(40);
    program.set_nonblocking(true).unwrap();
    let mut got = 0;
    loop {
        match program.read(&mut [0; 4096]) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(e) => assert_eq!(e.kind(), io::ErrorKind::WouldBlock),
        }
        bench.silent();
    }
    assert_eq!(got, sent);
}

#[test]
fn floods_stay_within_bounds() {
    let mut bench = Bench::new();
    let most = u32::try_from(MOST_CONNECTIONS).unwrap();
    let mut taken = 0;
    while bench.muxer.may_receive() {
        bench.send(Op::Request, taken, 5);
        taken += 1;
        assert!(taken < 10_000);
    }
    // So many connections, and so many that were refused.
    let resets = u32::try_from(MOST_RESETS).unwrap();
    assert_eq!(taken, most + resets);
    assert_eq!(lock(&bench.accepted).len(), MOST_CONNECTIONS);
    // Programs wait, and are not lost.
    let mut waiting = bench.program();
    waiting.write_all(b"CONNECT 52\n").unwrap();
    let (mut answers, mut refusals) = (0, 0);
    while let Some((header, _)) = bench.next() {
        match header.op {
            Op::Response => answers += 1,
            Op::Reset => refusals += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((answers, refusals), (most, resets));
    bench.send(Op::Reset, 0, 5);
    bench.silent_but_for_a_request();

    // Programs that come and go while the guest takes nothing leave nothing.
    let mut bench = Bench::new();
    for _ in 0..2000 {
        let mut program = bench.program();
        program.write_all(b"CONNECT 52\n").unwrap();
        bench.muxer.listen();
        bench.muxer.host_ready().unwrap();
        bench.muxer.host_ready().unwrap();
        assert!(bench.muxer.has_packet());
        drop(program);
        bench.muxer.host_ready().unwrap();
        assert!(!bench.muxer.has_packet());
    }
}

impl Bench {
    fn silent_but_for_a_request(&mut self) {
        let mut ops = Vec::new();
        for _ in 0..3 {
            ops.extend(self.next().map(|(header, _)| header.op));
        }
        assert_eq!(ops, [Op::Request]);
    }
}

#[test]
fn what_a_guest_waits_for_is_owed_where_it_goes() {
    let mut bench = Bench::new();
    // Answered, but not told; refused, but not told; connected.
    let _program = bench.connected(39);
    bench.send(Op::Request, 40, 5);
    bench.send(Op::Request, 41, SERVED + 1);
    let owed = bench.muxer.owed();
    let ports = |reset: &Reset| (reset.guest_port, reset.host_port);
    let mut all: Vec<_> = owed.iter().map(ports).collect();
    all.sort_unstable();
    assert_eq!(all, [(40, 5), (41, SERVED + 1)]);
    let mut there = Bench::new();
    there.muxer.set_owed(&owed);
    there.expect(Op::Reset);
    there.expect(Op::Reset);
    there.silent();
}
