//! Snapshots: a guest in a file, with the frames and codecs of the wire.
//!
//! ```text
//!  0            HEAD      "FERRYSNP"  version u16  oldest u16  architecture u8  page shift u8  0 u16
//!                         session [16]  0…  crc32c u32                                        64 bytes
//!  64           PAGES …   frames as on the wire, each with the checksum of its payload; in any order
//!  contents     HELLO     a frame: the RAM's layout, the codecs that occur, the machine's configuration
//!  state        STATE     a frame: the machine's state
//!  index        entry …   run u64 (first frame << 16 | pages − 1)  where its frame begins u64, sorted by page
//!  end − 64     TRAILER   "FERRYEND"  contents u64  state u64  index u64  entries u64  index crc32c u32
//!                         session [16]  crc32c u32                                            64 bytes
//! ```
//!
//! Little-endian. A page that is in no entry holds zeros: zero pages and memory that was never
//! touched cost nothing. The index finds any page by bisection, so that a guest can run before its
//! memory is read ([`Filling`]). Frames have at most [`BLOCK_PAGES`] pages: that much is read for a
//! page fault, and its neighbours come with it.
//!
//! No patch in a snapshot refers to another page. A live snapshot ([`SaveOptions::live`]) writes a
//! page again that was dirtied since; the index has the last place, and what lies in a frame of an
//! earlier place is never used.
//!
//! Every byte that is used is under a checksum: head, index, trailer, configuration and state are
//! checked when a snapshot is [opened](Snapshot::open), each page frame when it is read. A file
//! that was not finished has no trailer.
//!
//! ```text
//!  save      Guest ─ pause ─▶ pages ─▶ Encoder ─▶ frames ─▶ file ─▶ HELLO, STATE, index, trailer
//!  restore   head, trailer, HELLO, STATE, index ─▶ machine built ─▶ [all frames ─▶ memory] ─▶ it runs
//!                                                    on demand: ◀── fault ── frame ─▶ memory, and a push beside it
//! ```
//!
//! A guest is written to a file, here one in memory, and read back into another machine:
//!
//! ```
//! use ferry_migration::net::{MonotonicClock, session_id};
//! use ferry_migration::options::Compress;
//! use ferry_migration::snapshot::{SaveOptions, SaveSetup, Snapshot, fill_all, save};
//! use ferry_migration::testing::{MemoryLink, TestDestination, TestSource};
//! use std::{sync::Mutex, time::Duration};
//!
//! let guest = TestSource::new(64);
//! let file = Mutex::new(Vec::new());
//! let setup = SaveSetup {
//!     session: session_id(),
//!     options: SaveOptions {
//!         compress: Compress::Zstd,
//!         threads: 2,
//!         live: true,
//!         downtime: Duration::from_millis(100),
//!     },
//!     clock: &MonotonicClock::new(),
//!     cancelled: &|| false,
//!     describe: &mut || Ok(b"64 pages".to_vec()),
//!     resume: false,
//!     released: &mut |_| {},
//! };
//! let (saved, paused) = save::<MemoryLink, _, _>(&guest, &file, setup)?;
//! assert!(saved.data_pages < saved.pages && paused.is_some() && !guest.runs());
//!
//! let snapshot = Snapshot::open(file.into_inner()?)?;
//! assert_eq!(snapshot.machine(), b"64 pages");
//! let vm = TestDestination::new(64);
//! fill_all::<MemoryLink, _, _>(&snapshot, vm.memory(), 2, &|| false)?;
//! assert!(vm.memory() == guest.memory());
//! drop(paused);
//! assert!(guest.runs());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod fill;
mod places;
mod read;
mod save;

pub use fill::{Filled, Filling, fill_all};
pub use read::{Block, BlockReader, ReadAt, Snapshot};
pub use save::{SaveError, SaveOptions, SaveSetup, Saved, WriteAt, save};

use crate::codec::{CodecError, ZSTD_PAGES};
use crate::page::{Gfn, PAGE_SHIFT};
use crate::wire::{HelloError, SessionId};
use std::io;

/// The format that this build writes and reads.
pub const VERSION: u16 = 1;
/// Pages of a frame at most: as many as zstd takes at once.
pub const BLOCK_PAGES: u64 = ZSTD_PAGES as u64;

const HEAD_MAGIC: [u8; 8] = *b"FERRYSNP";
const TRAILER_MAGIC: [u8; 8] = *b"FERRYEND";
const ARCH_X86_64: u8 = 1;
/// Bytes of the head and of the trailer.
const END_BYTES: usize = 64;
/// Bytes of the head, as an offset.
const HEAD_END: u64 = END_BYTES as u64;
/// Bytes of an entry of the index.
const ENTRY_BYTES: usize = 16;

/// Why a file cannot be used as a snapshot. The texts speak of "it": the caller prepends the
/// path.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// Something else.
    #[error("it is not a ferry snapshot (its first bytes are {0:02x?})")]
    Magic([u8; 8]),
    /// Another format.
    #[error(
        "it has snapshot format {found}, this ferry reads format {VERSION}; restore it with a ferry that knows format {found}"
    )]
    Version {
        /// The file's.
        found: u16,
    },
    /// Another architecture.
    #[error("its guest is of architecture {0}, this host runs x86_64 ({ARCH_X86_64})")]
    Architecture(u8),
    /// Another page size.
    #[error("it has pages of 2^{0} bytes, this host 2^{PAGE_SHIFT}")]
    PageSize(u8),
    /// No trailer.
    #[error(
        "it is cut short: it has {bytes} bytes and ends without the mark that a complete snapshot ends with"
    )]
    Truncated {
        /// Bytes that there are.
        bytes: u64,
    },
    /// Bits have changed, or were never right.
    #[error("it is damaged at byte {offset}: {what}")]
    Damaged {
        /// Where.
        offset: u64,
        /// What is wrong there.
        what: &'static str,
    },
    /// The handshake cannot be understood.
    #[error("its description at byte {offset} cannot be read: {source}")]
    Contents {
        /// Where.
        offset: u64,
        /// Why.
        source: HelloError,
    },
    /// A coder that this build does not have.
    #[error(
        "it needs features ({0:#x}) that this ferry does not have; restore it with the ferry that wrote it"
    )]
    Features(u64),
    /// A frame whose pages cannot be decoded.
    #[error("the pages at byte {offset} cannot be decoded: {source}")]
    Codec {
        /// Where the frame begins.
        offset: u64,
        /// Why.
        source: CodecError,
    },
    /// The file cannot be read.
    #[error("reading {bytes} bytes at byte {offset} failed: {source}")]
    Read {
        /// Where.
        offset: u64,
        /// How many.
        bytes: usize,
        /// Why.
        source: io::Error,
    },
    /// A page that is not to be had.
    #[error("page {gfn:#x} of the guest cannot be restored: {source}")]
    Page {
        /// The first page of the frame.
        gfn: Gfn,
        /// Why.
        source: Box<SnapshotError>,
    },
    /// Memory did not take a page.
    #[error("page {gfn:#x} of the guest cannot be put in place: {source}")]
    Place {
        /// The page.
        gfn: Gfn,
        /// Why.
        source: crate::port::PortError,
    },
    /// The pages are not waited for any more.
    #[error("reading was cancelled")]
    Cancelled,
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk())
        .map_or(0, |word| u32::from_le_bytes(*word))
}

fn long(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk())
        .map_or(0, |long| u64::from_le_bytes(*long))
}

/// Puts the checksum of all before it into the last four bytes.
fn seal(bytes: &mut [u8; END_BYTES]) {
    let crc = crc32c::crc32c(&bytes[..END_BYTES - 4]);
    bytes[END_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
}

fn is_sealed(bytes: &[u8; END_BYTES]) -> bool {
    crc32c::crc32c(&bytes[..END_BYTES - 4]) == word(bytes, END_BYTES - 4)
}

fn session_at(bytes: &[u8; END_BYTES], at: usize) -> SessionId {
    let mut session = SessionId([0; 16]);
    session.0.copy_from_slice(&bytes[at..at + 16]);
    session
}

/// The first bytes of a file.
fn encode_head(session: SessionId) -> [u8; END_BYTES] {
    let mut bytes = [0; END_BYTES];
    bytes[..8].copy_from_slice(&HEAD_MAGIC);
    bytes[8..10].copy_from_slice(&VERSION.to_le_bytes());
    bytes[10..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[12] = ARCH_X86_64;
    // PAGE_SHIFT is 12.
    bytes[13] = PAGE_SHIFT.to_le_bytes()[0];
    bytes[16..32].copy_from_slice(&session.0);
    seal(&mut bytes);
    bytes
}

/// Magic and version come first: a later version may lay out the rest differently, and is to be
/// told as such.
fn decode_head(bytes: &[u8; END_BYTES]) -> Result<SessionId, SnapshotError> {
    let mut magic = [0; 8];
    magic.copy_from_slice(&bytes[..8]);
    if magic != HEAD_MAGIC {
        return Err(SnapshotError::Magic(magic));
    }
    let found = u16::from_le_bytes([bytes[8], bytes[9]]);
    let oldest = u16::from_le_bytes([bytes[10], bytes[11]]);
    if found == 0 || oldest > VERSION || oldest > found || found < VERSION {
        return Err(SnapshotError::Version { found });
    }
    if !is_sealed(bytes) {
        return Err(SnapshotError::Damaged {
            offset: 0,
            what: "the checksum of its head is wrong",
        });
    }
    if bytes[12] != ARCH_X86_64 {
        return Err(SnapshotError::Architecture(bytes[12]));
    }
    if u32::from(bytes[13]) != PAGE_SHIFT {
        return Err(SnapshotError::PageSize(bytes[13]));
    }
    Ok(session_at(bytes, 16))
}

/// Where the parts of a file are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Trailer {
    contents: u64,
    state: u64,
    index: u64,
    entries: u64,
    index_crc: u32,
    session: SessionId,
}

impl Trailer {
    fn encode(&self) -> [u8; END_BYTES] {
        let mut bytes = [0; END_BYTES];
        bytes[..8].copy_from_slice(&TRAILER_MAGIC);
        for (at, value) in [self.contents, self.state, self.index, self.entries]
            .into_iter()
            .enumerate()
        {
            bytes[8 + 8 * at..16 + 8 * at].copy_from_slice(&value.to_le_bytes());
        }
        bytes[40..44].copy_from_slice(&self.index_crc.to_le_bytes());
        bytes[44..60].copy_from_slice(&self.session.0);
        seal(&mut bytes);
        bytes
    }

    /// `None` when these bytes are no trailer.
    fn decode(bytes: &[u8; END_BYTES]) -> Option<Self> {
        (bytes[..8] == TRAILER_MAGIC && is_sealed(bytes)).then(|| Self {
            contents: long(bytes, 8),
            state: long(bytes, 16),
            index: long(bytes, 24),
            entries: long(bytes, 32),
            index_crc: word(bytes, 40),
            session: session_at(bytes, 44),
        })
    }
}

#[cfg(test)]
mod tests;
