//! Sockets between guest and host: virtio-vsock (§5.10), with Unix sockets at the host's end, as
//! Firecracker and Cloud Hypervisor have them.
//!
//! ```text
//!  guest                                        host
//!  listens on port 52 ◀── REQUEST ── Muxer ◀── a program connects to v.sock, writes "CONNECT 52\n",
//!                                      │       and reads "OK PORT\n"
//!  connects to CID 2, port 52 ───────▶ └─────▶ a program listens on v.sock_52
//!
//!  queue rx ◀── resets, then connections by turns        Connection ◀──▶ Unix socket
//!  queue tx ──▶ answered at once, or not taken            64 KiB outwards; inwards as much
//!  queue event ◀── TRANSPORT_RESET                         as the guest has room for
//! ```
//!
//! # A move
//!
//! Connections stay with the host: their other ends are its programs. The state says whether the
//! guest had any. If so the guest is sent `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (§5.10.6.7) where it
//! goes on, as soon as its event queue has a buffer, and its sockets have the error ECONNRESET;
//! those that listen are left alone. A guest that waits for an answer gets a RST. One that goes on
//! where it was, after a snapshot or a migration that failed, keeps its connections.

mod connection;
mod hello;
mod muxer;
mod packet;
mod poll;

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

pub use connection::ROOM;
pub use muxer::{MOST_CONNECTIONS, MOST_RESETS, Muxer, Reset};
pub use packet::{HEADER, Header, NO_MORE, NO_RECEIVE, NO_SEND, Op, STREAM};

pub use crate::state::VsockState;
use crate::thread;
use crate::virtio::{
    COMMON_FEATURES, Chain, Context, Device, DeviceState, Kind, Memory, RestoreError, Violation,
    copy_config,
};

/// The context of the host (VMADDR_CID_HOST, vsock(7)).
pub const HOST_CID: u64 = 2;
/// Contexts that a guest can have: those below are reserved, and so is VMADDR_CID_ANY.
pub const CIDS: std::ops::RangeInclusive<u32> = 3..=u32::MAX - 1;

const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
const QUEUE_SIZES: &[u16] = &[256, 256, 16];
const NAME: &str = "vsock";
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET, as `struct virtio_vsock_event`.
const TRANSPORT_RESET: [u8; 4] = [0; 4];

/// The programs of the host.
pub trait Host: Send + 'static {
    /// Readable when a program has connected.
    fn listener(&self) -> BorrowedFd<'_>;

    /// Takes the connection of a program: a stream that does not block.
    ///
    /// # Errors
    /// `WouldBlock` when there is none; otherwise the system's.
    fn accept(&mut self) -> io::Result<UnixStream>;

    /// Connects to the program that serves this port, without waiting: a stream that does not
    /// block.
    ///
    /// # Errors
    /// The system's: there is no such program, or it has too many connections to accept.
    fn connect(&mut self, port: u32) -> io::Result<UnixStream>;
}

/// A vsock device.
pub struct Vsock {
    cid: u32,
    muxer: Muxer,
    /// The event is to be sent.
    reset: bool,
    /// Of a packet to the guest.
    inward: Vec<u8>,
    /// Of a packet of the guest's.
    outward: Vec<u8>,
    failure: Option<String>,
}

impl std::fmt::Debug for Vsock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vsock")
            .field("cid", &self.cid)
            .finish_non_exhaustive()
    }
}

impl Vsock {
    /// A device for a guest of this context, one of [`CIDS`].
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn new(cid: u32, host: Box<dyn Host>) -> io::Result<Self> {
        let room = usize::try_from(ROOM).unwrap_or(usize::MAX);
        Ok(Self {
            cid,
            muxer: Muxer::new(cid, host)?,
            reset: false,
            inward: vec![0; room],
            outward: vec![0; room],
            failure: None,
        })
    }

    /// The guest's context.
    #[must_use]
    pub const fn cid(&self) -> u32 {
        self.cid
    }

    /// Closes all connections: the guest goes on elsewhere. If it comes back, it is told.
    pub fn leave(&mut self) {
        let owed = self.muxer.owed();
        self.reset |= self.muxer.has_connections();
        self.muxer.clear();
        self.muxer.set_owed(&owed);
    }

    /// Does what there is to do in all queues.
    fn work<M: Memory>(&mut self, cx: &mut Context<'_, M>) -> Result<(), Violation> {
        self.tell_reset(cx)?;
        self.send(cx)?;
        while self.muxer.may_receive() {
            let Some(chain) = cx.queues[TX].pop(cx.memory)? else {
                break;
            };
            self.take(cx, &chain)?;
            cx.queues[TX].complete(cx.memory, chain.head, 0)?;
            if !self.muxer.may_receive() {
                self.send(cx)?;
            }
        }
        self.send(cx)?;
        self.muxer.listen();
        Ok(())
    }

    fn tell_reset<M: Memory>(&mut self, cx: &mut Context<'_, M>) -> Result<(), Violation> {
        if !self.reset {
            return Ok(());
        }
        let Some(chain) = cx.queues[EVENT].pop(cx.memory)? else {
            return Ok(());
        };
        let written = chain.writable.write(cx.memory, &TRANSPORT_RESET)?;
        if written < TRANSPORT_RESET.len() {
            let (head, what) = (chain.head, "no room for an event");
            return Err(Violation::Shape { head, what });
        }
        self.reset = false;
        cx.queues[EVENT].complete(cx.memory, chain.head, 4)
    }

    /// A packet of the guest's.
    fn take<M: Memory>(&mut self, cx: &Context<'_, M>, chain: &Chain) -> Result<(), Violation> {
        let shape = |what| {
            let head = chain.head;
            Err(Violation::Shape { head, what })
        };
        let mut packet = chain.readable.clone();
        let mut header = [0; HEADER];
        if packet.take_front(44).read(cx.memory, &mut header)? < HEADER {
            return shape("a packet that is shorter than its header");
        }
        let header = Header::from_bytes(&header);
        if u64::from(header.len) > packet.len() {
            return shape("less data than its header says");
        }
        let len = usize::try_from(header.len).unwrap_or(usize::MAX);
        let Some(data) = self.outward.get_mut(..len) else {
            return shape("more data than a packet may have");
        };
        packet.read(cx.memory, data)?;
        self.muxer.receive(&header, data);
        Ok(())
    }

    /// Sends the guest what there is for it, as far as it has buffers.
    fn send<M: Memory>(&mut self, cx: &mut Context<'_, M>) -> Result<(), Violation> {
        while self.muxer.has_packet() {
            let Some(chain) = cx.queues[RX].pop(cx.memory)? else {
                return Ok(());
            };
            let size = usize::try_from(chain.writable.len()).unwrap_or(usize::MAX);
            let room = size.saturating_sub(HEADER).min(self.inward.len());
            if room == 0 {
                let (head, what) = (chain.head, "no room for a packet");
                return Err(Violation::Shape { head, what });
            }
            let Some(header) = self.muxer.next_packet(&mut self.inward[..room]) else {
                cx.queues[RX].put_back(chain.head);
                return Ok(());
            };
            let mut buffer = chain.writable;
            let front = buffer.take_front(44);
            front.write(cx.memory, &header.to_bytes())?;
            let len = usize::try_from(header.len).unwrap_or(0);
            buffer.write(cx.memory, &self.inward[..len])?;
            let written = header.len.saturating_add(44);
            cx.queues[RX].complete(cx.memory, chain.head, written)?;
        }
        Ok(())
    }
}

impl<M: Memory> Device<M> for Vsock {
    fn kind(&self) -> Kind {
        Kind {
            id: VIRTIO_ID_VSOCK,
            name: NAME,
            queue_sizes: QUEUE_SIZES,
        }
    }

    fn thread(&self) -> thread::Kind {
        thread::Kind::Sockets
    }

    fn features(&self) -> u64 {
        COMMON_FEATURES
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        copy_config(&u64::from(self.cid).to_le_bytes(), offset, data);
    }

    fn activate(&mut self, _features: u64) {}

    fn reset(&mut self) {
        self.muxer.clear();
        self.reset = false;
    }

    fn queue_ready(&mut self, _index: usize, cx: &mut Context<'_, M>) -> Result<(), Violation> {
        self.work(cx)
    }

    fn source(&self) -> io::Result<Option<OwnedFd>> {
        self.muxer.readable().map(Some)
    }

    fn source_ready(&mut self, cx: &mut Context<'_, M>) -> Result<(), Violation> {
        if let Err(error) = self.muxer.host_ready() {
            // Its connections would stand still for good.
            let sentence = format!("the guest's vsock cannot wait for its connections ({error})");
            self.failure.get_or_insert(sentence);
        }
        self.work(cx)
    }

    fn failure(&self) -> Option<String> {
        self.failure.clone()
    }

    fn save(&self) -> DeviceState {
        DeviceState::Vsock(VsockState {
            cid: self.cid,
            reset: self.reset || self.muxer.has_connections(),
            owed: self.muxer.owed(),
            next_port: self.muxer.next_port(),
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Vsock(state) = state else {
            return Err(RestoreError::Kind {
                saved: state.name(),
                here: NAME,
            });
        };
        let damaged = |what| Err(RestoreError::Registers { here: NAME, what });
        if state.cid != self.cid {
            return damaged("another context than its machine's");
        }
        if state.owed.len() > MOST_CONNECTIONS + MOST_RESETS {
            return damaged("more answers than there can be");
        }
        self.muxer.clear();
        self.muxer.set_owed(&state.owed);
        self.muxer.set_next_port(state.next_port);
        self.reset = state.reset;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
