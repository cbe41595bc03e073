//! Dirty traces: which pages a guest dirtied when, as `ferry record` writes them and
//! [`crate::model`] replays them.
//!
//! ```text
//! "ferry-dt"  u16 version  u32 length  header (JSON)                    u32 CRC32C of all before
//! frame:  u8 kind  u8[3] zero  u64 time (µs)  u32 length  u32 CRC32C of the payload  u32 CRC32C of the 20 bytes before
//!         payload
//! ```
//!
//! Numbers are little-endian. A frame holds the pages that were dirtied between the frame before
//! (or the recording's begin) and its time, in the smaller of two forms: *runs* (kind 1), where
//! each run is the gap since the end of the one before and its length less one, as LEB128 numbers;
//! or a *bitmap* (kind 2) from frame number 0, without its trailing zero bytes. An *end* (kind 3)
//! without payload closes a whole recording; one without it was broken off, and what is there can
//! be used.
//!
//! A reader believes nothing: lengths are bounded by what the header's layout allows before
//! anything is allocated, and every byte is under a checksum. A [`Trace`] keeps its frames as they
//! were in the file, so that a small file cannot fill the memory.

mod code;
mod read;
mod write;

pub use read::{Frame, Trace};
pub use write::Writer;

use crate::page::{LayoutError, RamLayout};
use serde::{Deserialize, Serialize};
use std::io;

/// The first bytes of a trace.
pub const MAGIC: &[u8; 8] = b"ferry-dt";
/// The version that this code writes, and the only one it reads.
pub const VERSION: u16 = 1;
/// The longest header.
const MAX_HEADER: u32 = 64 << 10;
/// Guests beyond this are refused (1 TiB): a bitmap over the layout is allocated from the file's
/// claim.
const MAX_GFN: u64 = 1 << 28;
/// Bytes of a frame's head.
const HEAD: usize = 24;

/// What was recorded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// Which frame numbers are RAM.
    pub layout: RamLayout,
    /// Bytes of RAM.
    pub memory_bytes: u64,
    /// Virtual processors.
    pub cpus: u32,
    /// The guest's name, if it has one.
    #[serde(default)]
    pub name: Option<String>,
    /// What the guest ran (its command line), where the VMM knows.
    #[serde(default)]
    pub workload: Option<String>,
    /// About how many pages held nothing but zeros when the recording began, where that was looked
    /// at: they cross as a word about each run of them.
    #[serde(default)]
    pub empty_pages: Option<u64>,
    /// How often the dirty log was looked at, in microseconds: what was asked for. The frames say
    /// what was.
    pub interval_us: u64,
}

/// Why a trace cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TraceError {
    /// The file.
    #[error("the trace cannot be read ({0})")]
    Io(#[from] io::Error),
    /// Some other file.
    #[error(
        "this is no dirty trace: it does not begin with `ferry-dt`; make one with `ferry record`"
    )]
    Foreign,
    /// A version that this code does not know.
    #[error("the trace has version {found}, this ferry reads version {VERSION}: record it again")]
    Version {
        /// The file's.
        found: u16,
    },
    /// Its header ends early, is too long or damaged.
    #[error("the header of the trace {0}; record it again")]
    Header(String),
    /// The header's layout cannot be.
    #[error("the RAM layout in the trace's header cannot be ({0}); record it again")]
    Layout(#[from] LayoutError),
    /// A frame is damaged.
    #[error("frame {frame} of the trace, at byte {offset}, {what}; record it again")]
    Frame {
        /// Which, from 0.
        frame: usize,
        /// Where in the file.
        offset: u64,
        /// What is wrong with it.
        what: &'static str,
    },
}

impl TraceError {
    fn header(what: impl Into<String>) -> Self {
        Self::Header(what.into())
    }
}

/// A frame's kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Runs = 1,
    Bitmap = 2,
    End = 3,
}

#[cfg(test)]
mod tests;
