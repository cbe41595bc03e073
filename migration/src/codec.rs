//! Codecs: shrinking the pages of a batch on their way.
//!
//! ```text
//!  source       Guest ── copied once ──▶ Encoder ──▶ frames       zero pages   a table (frame ZERO)
//!               Guest ──────────────────────────────▶ raw pages   packed       patches (PAGES, encoding 2)
//!                                                                 compressed   one zstd frame (PAGES, encoding 1)
//!  destination  frame ──▶ Decoder ──▶ PageSink::write             raw          as they are (PAGES, encoding 0)
//! ```
//!
//! An [`Encoder`] belongs to a data channel. It takes the pages of a batch that are not zero,
//! copies each out of guest memory **exactly once** and codes the copy: what is coded is one
//! snapshot, whatever the guest writes meanwhile (it wrote after its dirty bit was cleared, so that
//! the page is sent again). Pages that no coder helps are not part of any frame of its own; they go
//! out straight from guest memory as without it.
//!
//! The payload of a coded page frame, after its run table:
//!
//! ```text
//!  encoding 1   a zstd frame of all pages, one after the other
//!  encoding 2   crc32c u32 | tag u16 for each page | for each page the bytes that its tag counts
//!               tag = kind << 14 | bytes      kind 0  a patch of the page that the destination has
//!                                             kind 1  the words that are not zero
//!                                             kind 2  the page itself
//! ```
//!
//! The checksum is that of the pages which patches of kind 0 yield, so that a base that is not what
//! the source thinks is found out on the spot. Which pages can be a base at all is argued in
//! [`cache`].
//!
//! Coded frames hold still, so the header's checksum covers all of their payload.

pub mod adaptive;
pub mod cache;
mod class;
mod coding;
#[cfg(any(test, feature = "testing"))]
pub mod content;
mod decoder;
mod encoder;
mod frames;
pub mod patch;
pub mod words;

pub use crate::wire::{MAX_CODED_BYTES, MAX_CODED_PAGES};
pub use class::{Class, classify};
pub use coding::Coding;
pub use decoder::{CodecError, Decoder};
pub use encoder::{Batch, Coded, Encoder};

use crate::page::Run;

/// Pages in a zstd frame at most. More than one page finds what pages have in common; with more
/// than this many no more is found, and the caches of a processor are left
/// (`cargo bench -p ferry-migration --bench page_path`).
pub const ZSTD_PAGES: usize = 64;
/// The level of zstd: a migration is held up by time, and each further level costs more of it than
/// it saves on the wire.
pub const ZSTD_LEVEL: i32 = 1;

/// What a tag says about a page's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A patch of what the destination has.
    Delta = 0,
    /// The words that are not zero.
    Sparse = 1,
    /// The page itself.
    Literal = 2,
}

const KIND_SHIFT: u32 = 14;
const LENGTH_MASK: u16 = (1 << KIND_SHIFT) - 1;

impl Kind {
    fn tag(self, bytes: usize) -> u16 {
        // A page has fewer bytes than the mask.
        ((self as u16) << KIND_SHIFT) | (u16::try_from(bytes).unwrap_or(LENGTH_MASK) & LENGTH_MASK)
    }

    const fn of(tag: u16) -> Option<(Self, usize)> {
        let kind = match tag >> KIND_SHIFT {
            0 => Self::Delta,
            1 => Self::Sparse,
            2 => Self::Literal,
            _ => return None,
        };
        Some((kind, (tag & LENGTH_MASK) as usize))
    }
}

/// Appends pages to a list of runs, joining them to the last where they touch; but only within
/// the run of the batch that begins at `from`: runs that touch may lie in two regions.
pub(crate) fn append(list: &mut Vec<Run>, more: Run, from: crate::page::Gfn) {
    match list.last_mut() {
        Some(last) if last.end() == more.first && last.first >= from => last.count += more.count,
        _ if more.count > 0 => list.push(more),
        _ => {}
    }
}

#[cfg(test)]
mod tests;
