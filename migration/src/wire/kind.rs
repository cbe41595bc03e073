//! What a frame is, how its pages are coded, and what an ABORT means.

use super::{Header, MAX_RUNS};

/// How the pages of a frame are coded; see [`crate::codec`] for what the coded ones hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[repr(u8)]
pub enum Encoding {
    /// As they are.
    Raw = 0,
    /// Compressed by zstd.
    Zstd = 1,
    /// As patches.
    Patch = 2,
}

impl Encoding {
    pub(super) const fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            0 => Self::Raw,
            1 => Self::Zstd,
            2 => Self::Patch,
            _ => return None,
        })
    }
}

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[repr(u8)]
pub enum FrameType {
    /// Source: what is coming. JSON and the machine's description.
    Hello = 1,
    /// Destination: accepted. JSON.
    HelloAck = 2,
    /// A run table, then the pages.
    Pages = 3,
    /// A run table of pages that are zero.
    Zero = 4,
    /// Source: all pages of round `round` were sent on this channel.
    RoundEnd = 5,
    /// Destination: all pages of round `round` are in place.
    RoundAck = 6,
    /// The machine's state.
    State = 7,
    /// Destination: the machine is built and checked. JSON.
    Ready = 8,
    /// Source: the guest is yours.
    Commit = 9,
    /// Destination: the guest runs. JSON.
    Running = 10,
    /// Either: it is over; the payload says why, `count` what that means ([`AbortCode`]).
    Abort = 11,
    /// Source: hashes of pages `gfn..gfn + count`.
    Verify = 12,
    /// Destination: pages `gfn..gfn + count` are needed now (post-copy).
    PageRequest = 13,
    /// Source: what was asked for has left already (post-copy).
    OnItsWay = 14,
    /// Pages that are missing at the destination: a run table. In both directions.
    MissingRuns = 15,
    /// As `MissingRuns`: a bitmap of `count` words of 64 pages, from `gfn`.
    MissingBits = 16,
    /// Destination: every page is in place, and what the faults were like. JSON.
    Arrived = 17,
    /// Source: nothing is to be sent, and the connection lives. After RUNNING without missing
    /// pages: it was read.
    Alive = 18,
    /// Destination: the pages up to the next frame of this channel that asked for it are in place
    /// (post-copy).
    Placed = 19,
    /// Destination: the files that the guest's devices use are wanted, before the handshake is
    /// answered.
    FilesWanted = 20,
    /// Source: here they are, beside this frame.
    Files = 21,
    /// Source: bytes that mean nothing (role probe).
    Probe = 22,
    /// Source: blocks of a disk.
    Blocks = 32,
    /// Source: blocks of a disk that are zero.
    BlocksZero = 33,
    /// Source: hashes of blocks of a disk.
    BlocksHash = 34,
    /// Source: these were the blocks of round `round`.
    BlocksEnd = 35,
    /// Destination: all blocks up to round `round` are where they outlast a crash.
    BlocksStored = 36,
}

impl FrameType {
    pub(super) const fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Hello,
            2 => Self::HelloAck,
            3 => Self::Pages,
            4 => Self::Zero,
            5 => Self::RoundEnd,
            6 => Self::RoundAck,
            7 => Self::State,
            8 => Self::Ready,
            9 => Self::Commit,
            10 => Self::Running,
            11 => Self::Abort,
            12 => Self::Verify,
            13 => Self::PageRequest,
            14 => Self::OnItsWay,
            15 => Self::MissingRuns,
            16 => Self::MissingBits,
            17 => Self::Arrived,
            18 => Self::Alive,
            19 => Self::Placed,
            20 => Self::FilesWanted,
            21 => Self::Files,
            22 => Self::Probe,
            32 => Self::Blocks,
            33 => Self::BlocksZero,
            34 => Self::BlocksHash,
            35 => Self::BlocksEnd,
            36 => Self::BlocksStored,
            _ => return None,
        })
    }

    /// The most bytes that a payload of this type may have.
    #[must_use]
    pub const fn max_payload(self) -> u32 {
        match self {
            Self::Hello => 1 << 20,
            Self::HelloAck | Self::Ready | Self::Running | Self::Arrived => 64 << 10,
            Self::Pages => MAX_RUNS * 8 + (16 << 20),
            Self::Zero => MAX_RUNS * 8,
            Self::State => 64 << 20,
            Self::Abort => 4 << 10,
            Self::Verify
            | Self::MissingRuns
            | Self::MissingBits
            | Self::Blocks
            | Self::BlocksHash
            | Self::Probe => 1 << 20,
            Self::RoundEnd
            | Self::RoundAck
            | Self::Commit
            | Self::PageRequest
            | Self::OnItsWay
            | Self::Alive
            | Self::Placed
            | Self::FilesWanted
            | Self::Files
            | Self::BlocksZero
            | Self::BlocksEnd
            | Self::BlocksStored => 0,
        }
    }

    /// Whether a payload of this type always carries a checksum. Live pages are an exception: they
    /// may change under it. So are probes, whose bytes mean nothing.
    pub(super) const fn always_checked(self) -> bool {
        !matches!(self, Self::Pages | Self::Probe)
    }
}

/// What an ABORT means, in its header's `count`. A build that does not know the value reads the
/// sentence alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[repr(u32)]
pub enum AbortCode {
    /// The peer gave up.
    GaveUp = 0,
    /// The destination did not start the guest and never will: the guest belongs to the source
    /// again.
    NotStarted = 1,
    /// The peer cannot answer now; the question can be retried.
    Busy = 2,
    /// The peer does not know that migration, which proves nothing about its guest.
    UnknownSession = 3,
}

impl AbortCode {
    /// The code of a header.
    pub(super) const fn of(header: &Header) -> Self {
        match header.count {
            1 => Self::NotStarted,
            2 => Self::Busy,
            3 => Self::UnknownSession,
            _ => Self::GaveUp,
        }
    }
}
