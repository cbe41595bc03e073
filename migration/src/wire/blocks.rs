//! Blocks of a guest's disks (its disks) on the wire, where HELLO announced some.
//!
//! ```text
//!    │ BLOCKS… BLOCKS-ZERO… BLOCKS-END n ─────▶ │  written, flushed
//!    │ ◀────────────────────── BLOCKS-STORED n  │
//! ```
//!
//! They travel on the control channel, before and between the rounds of pages, and what is left in
//! the pause. In a header of theirs the field `gfn` names the disk in its upper 16 bits and the
//! first block in the others; `count` says how many blocks it is about. BLOCKS-HASH has a hash for
//! each block, or no payload where all of them are zero.

use super::{FrameType, Header};
use crate::page::Run;

/// Blocks in a BLOCKS frame at most: 1 MiB.
pub const MAX_BLOCKS: u32 = 16;
/// Disks of a guest at most.
pub const MAX_DISKS: usize = 64;
/// Blocks of all of a guest's disks together at most: 128 TiB.
pub const MAX_DISK_BLOCKS: u64 = 1 << 31;

const DISK_SHIFT: u32 = 48;

impl Header {
    /// A header about blocks of a disk.
    #[must_use]
    pub fn of_blocks(kind: FrameType, disk: usize, blocks: Run) -> Self {
        Self {
            gfn: (disk as u64) << DISK_SHIFT | blocks.first,
            count: u32::try_from(blocks.count).unwrap_or(u32::MAX),
            ..Self::bare(kind, 0)
        }
    }

    /// The disk and the blocks that it is about; whether there are such is for the receiver to
    /// check.
    #[must_use]
    pub fn blocks(&self) -> (usize, Run) {
        let disk = usize::try_from(self.gfn >> DISK_SHIFT).unwrap_or(usize::MAX);
        let first = self.gfn & ((1 << DISK_SHIFT) - 1);
        (disk, Run::new(first, u64::from(self.count)))
    }
}
