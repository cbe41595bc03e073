//! Why a migration ended at the destination other than by completing.

use crate::codec::CodecError;
use crate::options::Options;
use crate::port::PortError;
use crate::wire::{MAX_DISK_BLOCKS, MAX_DISKS, WireError};
use std::io;

/// Why a migration ended here other than by completing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DestinationError {
    /// The connection or the peer.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// This host cannot take the guest.
    #[error("this host cannot take the guest: {0}")]
    Unfit(PortError),
    /// The options need something that this build does not have.
    #[error("the source needs features {missing:#x} that this ferry does not have; upgrade it")]
    Features {
        /// The missing ones.
        missing: u64,
    },
    /// A promise that was not kept.
    #[error(
        "the source hands the guest's memory over instead of sending it, and none came with its handshake: connect the two directly by unix:, or migrate with --handover off"
    )]
    NoMemory,
    /// A page that is not the guest's RAM.
    #[error("the source sent page {gfn:#x} (+{count}), which is not the guest's memory")]
    NotRam {
        /// The first page.
        gfn: u64,
        /// How many.
        count: u64,
    },
    /// A coded frame.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// Blocks of a disk.
    #[error(transparent)]
    Blocks(#[from] BlocksError),
    /// Memory cannot be written or read here.
    #[error("writing guest memory failed: {0}")]
    Memory(PortError),
    /// The hashes differ.
    #[error("guest memory differs from the source's in {pages} pages, the first is {first:#x}")]
    Differs {
        /// How many pages.
        pages: u64,
        /// The first of them.
        first: u64,
    },
    /// The state does not fit the machine.
    #[error("the machine's state cannot be restored: {0}")]
    State(PortError),
    /// Committed, but this host does not want the guest any more. The source was told that it keeps
    /// it.
    #[error("the guest was not started here, and stays with the source: {0}")]
    NotStarted(PortError),
    /// Committed, but the guest cannot run here.
    #[error("the guest was handed over but cannot be started here: {0}")]
    Start(PortError),
    /// A data channel failed.
    #[error("data channel {index} failed: {reason}")]
    DataChannel {
        /// Which.
        index: u16,
        /// Why.
        reason: String,
    },
    /// A page that was not expected: it came before.
    #[error("the source sent page {gfn:#x} although it is in place here; each page crosses once")]
    Duplicate {
        /// Which.
        gfn: u64,
    },
    /// Post-copy without a way to ask for pages.
    #[error("the source announced post-copy and no channel for page faults")]
    NoFaultChannel,
    /// Pages for a running guest where none follow.
    #[error("the source sent pages for a guest that misses none")]
    NotPostCopy,
    /// One channel for page faults too many.
    #[error("fault channel {index} was not announced by its migration, or is connected already")]
    NotAnnounced {
        /// Which.
        index: u16,
    },
    /// More channels than the protocol allows.
    #[error(
        "the source announces {0} channels of one kind; a migration has at most {max} here, ask for fewer",
        max = Options::MAX_CHANNELS
    )]
    Channels(u16),
    /// A fault channel failed.
    #[error("a page fault could not be served: {0}")]
    FaultChannel(String),
    /// The push ended and pages did not come.
    #[error("the source has sent everything, it says, yet {pages} pages did not come")]
    Incomplete {
        /// How many.
        pages: u64,
    },
    /// An operator's word that cannot be followed.
    #[error("the guest cannot run on here without the {0} pages that only the source has")]
    Missing(u64),
    /// A channel that would write into a complete guest.
    #[error(
        "the source was sending pages on a data channel when it sent the machine's state or hashes; the last round ends before them"
    )]
    PagesAfterState,
    /// A data channel never came or stands still.
    #[error("round {round} did not end on {missing} of the data channels in time")]
    DataChannelSilent {
        /// The round.
        round: u32,
        /// How many are missing.
        missing: usize,
    },
}

impl DestinationError {
    /// Whether the source itself has said that it is over.
    pub(super) const fn is_from_peer(&self) -> bool {
        matches!(self, Self::Wire(error) if error.is_from_peer())
    }

    /// Whether the source was only silent: its connection may still bring something.
    pub(super) fn is_silence(&self) -> bool {
        matches!(self, Self::Wire(WireError::Io(e)) if e.kind() == std::io::ErrorKind::TimedOut)
    }

    /// Whether the connection is at fault, and no answer would get through.
    pub(super) const fn is_io(&self) -> bool {
        matches!(self, Self::Wire(WireError::Io(_)))
    }
}

/// Why blocks of a disk were refused, or could not be kept. Disks are counted from 0.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BlocksError {
    /// A handshake that cannot be meant.
    #[error(
        "the source announces {disks} disks of {blocks} blocks of 64 KiB together; 1 to {MAX_DISKS} disks of at most \
         {MAX_DISK_BLOCKS} blocks can move, none of them empty"
    )]
    Announced {
        /// How many disks.
        disks: usize,
        /// Their blocks.
        blocks: u64,
    },
    /// The host made another number of places for them.
    #[error("the source announces {announced} disks, and {made} are here")]
    Made {
        /// Disks announced.
        announced: usize,
        /// Disks here.
        made: usize,
    },
    /// Blocks that no disk has.
    #[error(
        "the source sent block {first} (+{count}) of disk {disk}, which no disk of the guest has"
    )]
    Outside {
        /// Which disk.
        disk: usize,
        /// The first block.
        first: u64,
        /// How many.
        count: u64,
    },
    /// A payload that is not what its blocks come to.
    #[error("the source sent {found} bytes for blocks of disk {disk} that have {wanted}")]
    Length {
        /// Which disk.
        disk: usize,
        /// Bytes that came.
        found: u64,
        /// Bytes of the blocks.
        wanted: u64,
    },
    /// A coding that the handshake did not settle on.
    #[error("the source sent compressed blocks, which was not agreed on in the handshake")]
    NotAgreed,
    /// Not what zstd makes.
    #[error("compressed blocks of disk {disk} cannot be decompressed: {error}")]
    Zstd {
        /// Which disk.
        disk: usize,
        /// zstd's word.
        error: io::Error,
    },
    /// This host's disk.
    #[error("{what} disk {disk} failed: {error}")]
    Disk {
        /// What was done.
        what: &'static str,
        /// Which disk.
        disk: usize,
        /// Why it failed.
        error: PortError,
    },
    /// The guest was to come before its disks.
    #[error("the source hands the guest over, yet {blocks} blocks of disk {disk} never came")]
    Incomplete {
        /// Which disk.
        disk: usize,
        /// How many.
        blocks: u64,
    },
    /// The hashes differ.
    #[error(
        "disk {disk} differs from the source's in {blocks} blocks of 64 KiB, the first is block {first}"
    )]
    Differs {
        /// The disk of the first.
        disk: usize,
        /// How many, on all disks.
        blocks: u64,
        /// The first of them.
        first: u64,
    },
    /// With `--verify`.
    #[error(
        "the source hands the guest over with hashes of {compared} blocks of its disks, which have {total}"
    )]
    NotCompared {
        /// Compared.
        compared: u64,
        /// Blocks of all disks.
        total: u64,
    },
}
