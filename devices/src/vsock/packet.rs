//! Packets of virtio-vsock (§5.10.6): a header of 44 bytes, and data behind it.
//!
//! `virtio-vsock` of rust-vmm reads packets of at most two descriptors; Linux since 6.17 sends its
//! data in more. Tests hold this reader against that crate's.

use super::HOST_CID;

/// Bytes of `struct virtio_vsock_hdr`.
pub const HEADER: usize = 44;
/// `type` of a stream.
pub const STREAM: u16 = 1;

/// A SHUTDOWN's flag: its sender receives no more.
pub const NO_RECEIVE: u32 = 1;
/// A SHUTDOWN's flag: its sender sends no more.
pub const NO_SEND: u32 = 2;
/// Both.
pub const NO_MORE: u32 = NO_RECEIVE | NO_SEND;

/// What a packet is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Asks for a connection.
    Request,
    /// There is a connection.
    Response,
    /// There is no connection, or none any more.
    Reset,
    /// The sender sends no more, or receives no more.
    Shutdown,
    /// Data.
    Data,
    /// Tells how much room the sender has.
    CreditUpdate,
    /// Asks for that.
    CreditRequest,
    /// Nothing that the specification knows.
    Unknown(u16),
}

impl Op {
    const fn number(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::Data => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
            Self::Unknown(number) => number,
        }
    }

    const fn of(number: u16) -> Self {
        match number {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            number => Self::Unknown(number),
        }
    }
}

/// `struct virtio_vsock_hdr`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Context of the sender.
    pub src_cid: u64,
    /// Context of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Bytes of data behind the header.
    pub len: u32,
    /// `type`: [`STREAM`], or what is not supported.
    pub kind: u16,
    /// What it is for.
    pub op: Op,
    /// Of a SHUTDOWN.
    pub flags: u32,
    /// Bytes that the sender has room for in all.
    pub buf_alloc: u32,
    /// Bytes that have left that room, modulo 2³².
    pub fwd_cnt: u32,
}

impl Header {
    /// A packet of a stream from the host to the guest, without data.
    #[must_use]
    pub const fn to_guest(cid: u32, op: Op, host_port: u32, guest_port: u32) -> Self {
        Self {
            src_cid: HOST_CID,
            dst_cid: cid as u64,
            src_port: host_port,
            dst_port: guest_port,
            len: 0,
            kind: STREAM,
            op,
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }

    /// As it lies in memory.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.number().to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// From memory.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; HEADER]) -> Self {
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let word = |at: usize| u32::from(half(at)) | u32::from(half(at + 2)) << 16;
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        Self {
            src_cid: long(0),
            dst_cid: long(8),
            src_port: word(16),
            dst_port: word(20),
            len: word(24),
            kind: half(28),
            op: Op::of(half(30)),
            flags: word(32),
            buf_alloc: word(36),
            fwd_cnt: word(40),
        }
    }
}
