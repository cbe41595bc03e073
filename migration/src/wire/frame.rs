//! Frames: the 32-byte header and the run table of the page frames.

use super::MAX_BLOCKS;
use super::kind::{Encoding, FrameType};
use crate::page::{Gfn, PAGE_SIZE, Run};
use crate::port::BLOCK_BYTES;

/// Bytes in a header.
pub const HEADER_BYTES: usize = 32;
/// Bytes of one run in a table.
pub const RUN_BYTES: usize = 8;
/// Most runs in one frame: with the header and the table they stay under the 1,024 segments that
/// one vectored write takes (`IOV_MAX`).
pub const MAX_RUNS: u32 = 512;
/// Most pages in one frame: 16 MiB.
pub const MAX_BATCH_PAGES: u64 = 4096;
/// Most pages in a coded frame: 1 MiB, so that both sides' buffers are small.
pub const MAX_CODED_PAGES: u64 = CODED as u64;
/// Most bytes of a coded frame's payload after its table: every page as it is, with its tag.
pub const MAX_CODED_BYTES: usize = 4 + CODED * (2 + PAGE_SIZE);
/// A batch of the sender is never larger.
const CODED: usize = 256;
/// Flag: the header's `payload_crc` guards the whole payload.
pub const FLAG_CRC: u8 = 1;
/// Flag of a page frame that follows the guest: the destination says [`FrameType::Placed`] when it
/// is in place. Only to one that said that it would ([`Running::tells`](super::Running::tells)).
pub const FLAG_TELL: u8 = 2;

/// What a header is checked against.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The frame after the guest's last; 0 before the handshake, when no frame may carry pages.
    pub end: Gfn,
}

/// A frame's header.
///
/// ```text
///  0 type  1 flags  2 encoding  3 zero  4 length  8 gfn  16 count  20 round  24 payload crc  28 header crc
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What follows.
    pub kind: FrameType,
    /// [`FLAG_CRC`], [`FLAG_TELL`].
    pub flags: u8,
    /// How pages are coded: an [`Encoding`]; 0 is raw.
    pub encoding: u8,
    /// Bytes of payload.
    pub length: u32,
    /// The first page, where the frame is about pages.
    pub gfn: Gfn,
    /// Runs in the table, hashes, or pages asked for; of an ABORT its [`AbortCode`](super::AbortCode).
    pub count: u32,
    /// The round that it belongs to.
    pub round: u32,
    /// CRC32C of the payload, where [`FLAG_CRC`] is set.
    pub payload_crc: u32,
}

/// Why a header was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// Damaged in transit.
    #[error("a frame header is damaged (checksum {found:#010x}, computed {computed:#010x})")]
    Checksum {
        /// As sent.
        found: u32,
        /// As it should be.
        computed: u32,
    },
    /// Not known to this version.
    #[error("the peer sent a frame of unknown type {0}")]
    Type(u8),
    /// Not known to this version, or not negotiated.
    #[error("the peer sent a {kind:?} frame with unknown flags {flags:#x} or encoding {encoding}")]
    Flags {
        /// Its type.
        kind: FrameType,
        /// Its flags.
        flags: u8,
        /// Its encoding.
        encoding: u8,
    },
    /// Longer than such a frame can be, or not what its count implies.
    #[error("the peer sent a {kind:?} frame of {length} bytes for {count} entries; that cannot be")]
    Length {
        /// Its type.
        kind: FrameType,
        /// Its length.
        length: u32,
        /// Its count.
        count: u32,
    },
    /// About pages that the guest does not have.
    #[error(
        "the peer sent a {kind:?} frame about page {gfn:#x} (+{count}), outside the guest's memory"
    )]
    Range {
        /// Its type.
        kind: FrameType,
        /// Its first page.
        gfn: Gfn,
        /// How many.
        count: u64,
    },
    /// A page frame whose table and length disagree.
    #[error(
        "the peer sent a page frame whose table lists {listed} pages and whose length holds {held}"
    )]
    Table {
        /// By the table.
        listed: u64,
        /// By the length.
        held: u64,
    },
}

impl Header {
    /// A header without payload.
    #[must_use]
    pub const fn bare(kind: FrameType, round: u32) -> Self {
        Self {
            kind,
            flags: 0,
            encoding: 0,
            length: 0,
            gfn: 0,
            count: 0,
            round,
            payload_crc: 0,
        }
    }

    /// The bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = self.kind as u8;
        bytes[1] = self.flags;
        bytes[2] = self.encoding;
        bytes[4..8].copy_from_slice(&self.length.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.gfn.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.count.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.round.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.payload_crc.to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..28]);
        bytes[28..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Sets flags in the bytes of a header.
    pub fn add_flags(bytes: &mut [u8; HEADER_BYTES], flags: u8) {
        bytes[1] |= flags;
        let crc = crc32c::crc32c(&bytes[..28]);
        bytes[28..].copy_from_slice(&crc.to_le_bytes());
    }

    /// Checks and reads a header: after this, `length` is what such a frame can have and may be
    /// used to size a read.
    ///
    /// # Errors
    /// [`HeaderError`].
    pub fn decode(bytes: &[u8; HEADER_BYTES], limits: Limits) -> Result<Self, HeaderError> {
        let word = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let (found, computed) = (word(28), crc32c::crc32c(&bytes[..28]));
        if found != computed {
            return Err(HeaderError::Checksum { found, computed });
        }
        let kind = FrameType::from_byte(bytes[0]).ok_or(HeaderError::Type(bytes[0]))?;
        let mut gfn = [0; 8];
        gfn.copy_from_slice(&bytes[8..16]);
        let header = Self {
            kind,
            flags: bytes[1],
            encoding: bytes[2],
            length: word(4),
            gfn: u64::from_le_bytes(gfn),
            count: word(16),
            round: word(20),
            payload_crc: word(24),
        };
        let checked = header.flags & FLAG_CRC != 0;
        let encoded = match Encoding::from_byte(header.encoding) {
            Some(Encoding::Raw) => true,
            Some(Encoding::Zstd) if kind == FrameType::Blocks => checked,
            // Coded pages hold still: they are always checked.
            Some(_) => kind == FrameType::Pages && checked,
            None => false,
        };
        let known = match kind {
            FrameType::Pages | FrameType::Zero => FLAG_CRC | FLAG_TELL,
            _ => FLAG_CRC,
        };
        if header.flags & !known != 0
            || !encoded
            || (kind.always_checked() && header.length > 0 && !checked)
        {
            return Err(HeaderError::Flags {
                kind,
                flags: header.flags,
                encoding: header.encoding,
            });
        }
        header.check_length()?;
        header.check_range(limits)?;
        Ok(header)
    }

    fn check_length(&self) -> Result<(), HeaderError> {
        let count = u64::from(self.count);
        let length = u64::from(self.length);
        let fits = match self.kind {
            FrameType::Pages if self.encoding != Encoding::Raw as u8 => {
                let body = length.checked_sub(count * RUN_BYTES as u64);
                self.count >= 1
                    && count <= MAX_CODED_PAGES
                    && body.is_some_and(|body| body >= 1 && body <= MAX_CODED_BYTES as u64)
            }
            FrameType::Pages => {
                let data = length.checked_sub(count * RUN_BYTES as u64);
                self.count >= 1
                    && self.count <= MAX_RUNS
                    && data.is_some_and(|data| {
                        data % PAGE_SIZE as u64 == 0
                            && data / PAGE_SIZE as u64 >= count
                            && data / PAGE_SIZE as u64 <= MAX_BATCH_PAGES
                    })
            }
            FrameType::Zero => {
                self.count >= 1 && self.count <= MAX_RUNS && length == count * RUN_BYTES as u64
            }
            FrameType::Verify | FrameType::MissingRuns => self.count >= 1 && length == count * 8,
            FrameType::MissingBits => {
                self.count >= 1 && length == count * 8 && self.gfn.is_multiple_of(64)
            }
            FrameType::PageRequest | FrameType::OnItsWay | FrameType::BlocksZero => self.count >= 1,
            FrameType::Blocks => {
                self.count >= 1
                    && self.count <= MAX_BLOCKS
                    && length >= 1
                    && length <= count * BLOCK_BYTES
            }
            FrameType::BlocksHash => self.count >= 1 && (length == 0 || length == count * 8),
            _ => true,
        };
        if fits && self.length <= self.kind.max_payload() {
            Ok(())
        } else {
            Err(HeaderError::Length {
                kind: self.kind,
                length: self.length,
                count: self.count,
            })
        }
    }

    fn check_range(&self, limits: Limits) -> Result<(), HeaderError> {
        let count = match self.kind {
            FrameType::Pages | FrameType::Zero | FrameType::MissingRuns => 1,
            // The last word may reach beyond the end; its bits there are dropped.
            FrameType::MissingBits => u64::from(self.count - 1) * 64 + 1,
            FrameType::Verify | FrameType::PageRequest | FrameType::OnItsWay => {
                u64::from(self.count)
            }
            _ => return Ok(()),
        };
        match self.gfn.checked_add(count) {
            Some(end) if end <= limits.end => Ok(()),
            _ => Err(HeaderError::Range {
                kind: self.kind,
                gfn: self.gfn,
                count,
            }),
        }
    }

    /// Bytes of the run table of a page frame.
    #[must_use]
    pub const fn table_bytes(&self) -> usize {
        self.count as usize * RUN_BYTES
    }

    /// How its pages are coded.
    #[must_use]
    pub const fn encoding(&self) -> Encoding {
        match Encoding::from_byte(self.encoding) {
            Some(encoding) => encoding,
            None => Encoding::Raw,
        }
    }

    /// Bytes after the run table of a page frame.
    #[must_use]
    pub const fn body_bytes(&self) -> usize {
        (self.length as usize).saturating_sub(self.table_bytes())
    }

    /// Pages in the body of a raw `Pages` frame.
    #[must_use]
    pub const fn body_pages(&self) -> u64 {
        (self.length as u64).saturating_sub(self.table_bytes() as u64) / PAGE_SIZE as u64
    }
}

/// Appends the table for `runs`: the first frame in the upper 48 bits, the count minus one below.
///
/// Runs have 1 to 65,536 pages; the sender splits longer ones.
pub fn encode_runs(runs: &[Run], into: &mut Vec<u8>) {
    for run in runs {
        debug_assert!(run.count >= 1 && run.count <= 1 << 16 && run.first < 1 << 48);
        into.extend_from_slice(&((run.first << 16) | (run.count - 1)).to_le_bytes());
    }
}

/// Reads a run table into `into`; says how many pages it lists. Whether they are RAM is for the
/// caller, who knows the layout.
pub fn decode_runs(table: &[u8], into: &mut Vec<Run>) -> u64 {
    into.clear();
    let mut pages = 0;
    for entry in table.chunks_exact(RUN_BYTES) {
        let mut word = [0; 8];
        word.copy_from_slice(entry);
        let word = u64::from_le_bytes(word);
        let run = Run::new(word >> 16, (word & 0xffff) + 1);
        pages += run.count;
        into.push(run);
    }
    pages
}

#[cfg(test)]
mod tests;
