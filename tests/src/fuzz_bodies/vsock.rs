//! A guest and programs of its host that do anything at all to its vsock connections.

use ferry_devices::vsock::{
    HEADER, HOST_CID, Header, Host, MOST_CONNECTIONS, MOST_RESETS, Muxer, Op,
};
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

/// The guest's context.
pub const CID: u32 = 3;
/// Programs serve the ports below this one.
const SERVED: u32 = 200;
/// Bytes of a packet at most.
const ROOM: usize = 4096;
/// Programs that are kept at once.
const KEPT: usize = 16;

type Shared = Arc<Mutex<VecDeque<UnixStream>>>;

/// Programs that serve some ports, and that connect when they are told to.
pub struct Programs {
    /// Readable, as a listener with a connection is.
    listener: UnixStream,
    knock: UnixStream,
    /// Our ends of what programs have connected.
    waiting: Shared,
    /// The programs' ends of what the guest has connected.
    served: Shared,
}

impl Default for Programs {
    fn default() -> Self {
        let (listener, knock) = UnixStream::pair().unwrap();
        listener.set_nonblocking(true).unwrap();
        Self {
            listener,
            knock,
            waiting: Shared::default(),
            served: Shared::default(),
        }
    }
}

fn pair() -> io::Result<(UnixStream, UnixStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    theirs.set_nonblocking(true)?;
    Ok((ours, theirs))
}

impl Host for Programs {
    fn listener(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
    fn accept(&mut self) -> io::Result<UnixStream> {
        self.listener.read_exact(&mut [0])?;
        let next = self.waiting.lock().unwrap().pop_front();
        next.ok_or_else(|| io::ErrorKind::ConnectionAborted.into())
    }
    fn connect(&mut self, port: u32) -> io::Result<UnixStream> {
        if port >= SERVED {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (ours, theirs) = pair()?;
        let mut served = self.served.lock().unwrap();
        served.push_back(theirs);
        if served.len() > KEPT {
            served.pop_front();
        }
        Ok(ours)
    }
}

/// Bytes are what guest and programs do, one after the other: packets of the guest's, whole headers
/// or likely ones; buffers that it gives; programs that connect, write, read and hang up.
///
/// Whatever it is, nothing panics or goes on for ever, what is kept stays within its bounds, and a
/// packet for the guest is one of the specification's. Returns what those were that it took.
pub fn vsock(bytes: &[u8]) -> Vec<Op> {
    let mut taken = Vec::new();
    let programs = Programs::default();
    let (waiting, served) = (Arc::clone(&programs.waiting), Arc::clone(&programs.served));
    let mut knock = programs.knock.try_clone().unwrap();
    let mut muxer = Muxer::new(CID, Box::new(programs)).unwrap();
    let mut clients: VecDeque<UnixStream> = VecDeque::new();
    let mut script = bytes.iter().copied();
    let mut buffer = vec![0; ROOM];
    while let Some(step) = script.next() {
        let mut byte = || script.next().unwrap_or(0);
        match step % 16 {
            // Any header.
            0 => {
                let mut raw = [0; HEADER];
                raw.fill_with(&mut byte);
                receive(&mut muxer, Header::from_bytes(&raw));
            }
            // A likely one: few ports, small numbers.
            1..=6 => {
                let ops = [
                    Op::Request,
                    Op::Response,
                    Op::Reset,
                    Op::Shutdown,
                    Op::Data,
                    Op::CreditUpdate,
                    Op::CreditRequest,
                    Op::Data,
                ];
                let op = ops[usize::from(byte() % 8)];
                let port = byte();
                let host_port = match port & 0x80 {
                    0 => u32::from(port),
                    _ => (1 << 30) + u32::from(port & 0x7f),
                };
                let header = Header {
                    src_cid: CID.into(),
                    dst_cid: HOST_CID,
                    len: u32::from(byte()) * 16,
                    flags: u32::from(byte()),
                    buf_alloc: u32::from(byte()) * 64,
                    fwd_cnt: u32::from(byte()) * 16,
                    ..Header::to_guest(0, op, 52 + u32::from(step % 2), host_port)
                };
                receive(&mut muxer, header);
            }
            7..=9 => {
                let room = 1 + usize::from(byte()) * 16;
                for _ in 0..byte() % 16 {
                    taken.extend(take(&mut muxer, &mut buffer[..room]));
                }
            }
            10 => {
                muxer.listen();
                muxer.host_ready().unwrap();
            }
            11 => {
                let (ours, mut program) = pair().unwrap();
                waiting.lock().unwrap().push_back(ours);
                knock.write_all(b"k").unwrap();
                let _ = program.write(b"CONNECT 52\nwords".split_at(usize::from(byte() % 17)).0);
                clients.push_back(program);
                if clients.len() > KEPT {
                    clients.pop_front();
                }
                muxer.listen();
                muxer.host_ready().unwrap();
            }
            other => {
                let at = usize::from(byte());
                let mut served = served.lock().unwrap();
                let programs = if at.is_multiple_of(2) {
                    &mut clients
                } else {
                    &mut *served
                };
                if let Some(program) = programs.get_mut(at / 2 % KEPT) {
                    // A program whose connection is gone is told.
                    let _ = match other {
                        12 => program.write(&vec![9; usize::from(byte()) * 8]),
                        13 => program.read(&mut vec![0; usize::from(byte()) * 64]),
                        _ => program.shutdown(std::net::Shutdown::Write).map(|()| 0),
                    };
                }
                if other == 15 {
                    programs.pop_back();
                }
            }
        }
        let bound = MOST_CONNECTIONS + MOST_RESETS;
        assert!(
            muxer.owed().len() <= bound,
            "{} are owed",
            muxer.owed().len()
        );
    }
    // All that there is for the guest comes to an end.
    for _ in 0..100_000 {
        muxer.host_ready().unwrap();
        match take(&mut muxer, &mut buffer) {
            Some(op) => taken.push(op),
            None => return taken,
        }
    }
    panic!("packets without end");
}

/// The guest sends a packet, if the device takes one.
fn receive(muxer: &mut Muxer, header: Header) {
    if muxer.may_receive() {
        let len = usize::try_from(header.len)
            .unwrap_or(usize::MAX)
            .min(1 << 16);
        let header = Header {
            len: u32::try_from(len).unwrap(),
            ..header
        };
        muxer.receive(&header, &vec![5; len]);
    }
}

/// The guest takes a packet, if there is one.
fn take(muxer: &mut Muxer, room: &mut [u8]) -> Option<Op> {
    let header = muxer.next_packet(room)?;
    assert_eq!(header.dst_cid, u64::from(CID));
    assert!(usize::try_from(header.len).unwrap() <= room.len());
    assert!(header.len == 0 || header.op == Op::Data);
    assert!(!matches!(header.op, Op::Unknown(_)));
    assert_eq!(Header::from_bytes(&header.to_bytes()), header);
    Some(header.op)
}
