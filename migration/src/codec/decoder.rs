//! Decoding at the destination: nothing that arrives is believed.

use super::patch::{Page, PatchError, apply};
use super::{Kind, MAX_CODED_BYTES, MAX_CODED_PAGES, words};
use crate::page::{AtomicPageSet, Gfn, PAGE_SIZE, Run};
use crate::port::PortError;
use crate::wire::{Encoding, Features};
use std::io;
use std::sync::Arc;
use zstd::bulk::Decompressor;

/// Why a coded frame was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CodecError {
    /// The handshake did not settle on it.
    #[error(
        "the source sent pages with encoding {encoding:?}, which was not agreed on in the handshake"
    )]
    NotAgreed {
        /// Which.
        encoding: Encoding,
    },
    /// More pages than a coded frame may have.
    #[error(
        "the source sent a coded frame of {pages} pages in {bytes} bytes; at most {MAX_CODED_PAGES} pages can be"
    )]
    Size {
        /// By its table.
        pages: u64,
        /// By its length.
        bytes: usize,
    },
    /// Not what zstd makes, or of more bytes than the table says.
    #[error("a compressed frame of {pages} pages cannot be decompressed: {error}")]
    Zstd {
        /// By its table.
        pages: u64,
        /// zstd's word.
        error: io::Error,
    },
    /// Fewer bytes than the table says.
    #[error("a compressed frame holds {found} bytes for {pages} pages")]
    Short {
        /// By its table.
        pages: u64,
        /// What came out.
        found: usize,
    },
    /// A frame of patches whose tags do not fit its length.
    #[error("a frame of patches for {pages} pages is damaged: its lengths do not fit")]
    Lengths {
        /// By its table.
        pages: u64,
    },
    /// A patch that is none.
    #[error("the patch of page {gfn:#x} is damaged: {error}")]
    Patch {
        /// The page.
        gfn: Gfn,
        /// What is wrong with it.
        error: PatchError,
    },
    /// A map that does not fit its words.
    #[error("the words of page {gfn:#x}, packed without its zeros, do not fit their map")]
    Words {
        /// The page.
        gfn: Gfn,
    },
    /// A difference to something that is not here.
    #[error("the source sent page {gfn:#x} as a difference to contents that it never sent here")]
    NoBase {
        /// The page.
        gfn: Gfn,
    },
    /// The base here is not the source's.
    #[error(
        "patched pages from {gfn:#x} on differ from the source's (checksum {found:#010x}, computed {computed:#010x})"
    )]
    Differs {
        /// The frame's first page.
        gfn: Gfn,
        /// As sent.
        found: u32,
        /// As computed.
        computed: u32,
    },
    /// The base cannot be read.
    #[error("reading page {gfn:#x} of guest memory failed: {error}")]
    Memory {
        /// The page.
        gfn: Gfn,
        /// Why.
        error: PortError,
    },
    /// zstd has no memory.
    #[error("zstd cannot be set up here: {0}")]
    SetUp(io::Error),
}

/// The decoder of one channel. Its buffers never exceed a frame of [`MAX_CODED_PAGES`].
#[derive(Default)]
pub struct Decoder {
    agreed: Features,
    /// Pages whose last arrival was a copy: the only ones that can be a base.
    copies: Arc<AtomicPageSet>,
    pages: Vec<u8>,
    zstd: Option<Decompressor<'static>>,
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder")
            .field("agreed", &self.agreed)
            .finish_non_exhaustive()
    }
}

impl Decoder {
    /// A decoder of what was agreed on. `copies` is shared by the channels of a migration.
    #[must_use]
    pub fn new(agreed: Features, copies: Arc<AtomicPageSet>) -> Self {
        Self {
            agreed,
            copies,
            ..Self::default()
        }
    }

    /// Pages have arrived in a way of which the source has no copy.
    pub fn arrived_otherwise(&self, runs: &[Run]) {
        runs.iter().for_each(|run| self.copies.remove_run(*run));
    }

    /// Pages were placed as they were decoded.
    pub fn placed(&self, runs: &[Run]) {
        runs.iter().for_each(|run| self.copies.insert_run(*run));
    }

    /// Whether a frame of so many pages and bytes can be; to be asked before its bytes are
    /// received.
    ///
    /// # Errors
    /// [`CodecError::NotAgreed`], [`CodecError::Size`].
    pub const fn admit(
        &self,
        encoding: Encoding,
        pages: u64,
        bytes: usize,
    ) -> Result<(), CodecError> {
        let needed = match encoding {
            Encoding::Raw => Features(0),
            Encoding::Zstd => Features::ZSTD,
            Encoding::Patch => Features::PATCH,
        };
        if !self.agreed.has(needed) {
            return Err(CodecError::NotAgreed { encoding });
        }
        if pages > MAX_CODED_PAGES || bytes > MAX_CODED_BYTES {
            return Err(CodecError::Size { pages, bytes });
        }
        Ok(())
    }

    /// The pages of a coded frame, one after the other in the order of `runs`; `base` copies out
    /// what a page holds here.
    ///
    /// # Errors
    /// [`CodecError`]; nothing was changed then.
    pub fn decode(
        &mut self,
        encoding: Encoding,
        runs: &[Run],
        body: &[u8],
        base: &mut dyn FnMut(Gfn, &mut Page) -> Result<(), PortError>,
    ) -> Result<&[u8], CodecError> {
        let count: u64 = runs.iter().map(|run| run.count).sum();
        self.admit(encoding, count, body.len())?;
        let bytes = usize::try_from(count).unwrap_or(0) * PAGE_SIZE;
        self.pages.clear();
        self.pages.resize(bytes, 0);
        match encoding {
            Encoding::Raw => return Err(CodecError::NotAgreed { encoding }),
            Encoding::Zstd => self.decompress(count, body)?,
            Encoding::Patch => self.patch(runs, count, body, base)?,
        }
        Ok(&self.pages)
    }

    fn decompress(&mut self, pages: u64, body: &[u8]) -> Result<(), CodecError> {
        let zstd = match &mut self.zstd {
            Some(zstd) => zstd,
            none => none.insert(Decompressor::new().map_err(CodecError::SetUp)?),
        };
        // In one pass into a buffer of the size that the table says: zstd allocates no window,
        // whatever it reads.
        let found = zstd
            .decompress_to_buffer(body, &mut self.pages[..])
            .map_err(|error| CodecError::Zstd { pages, error })?;
        if found != self.pages.len() {
            return Err(CodecError::Short { pages, found });
        }
        Ok(())
    }

    fn patch(
        &mut self,
        runs: &[Run],
        count: u64,
        body: &[u8],
        base: &mut dyn FnMut(Gfn, &mut Page) -> Result<(), PortError>,
    ) -> Result<(), CodecError> {
        let lengths = CodecError::Lengths { pages: count };
        let tags = 2 * usize::try_from(count).unwrap_or(0);
        let Some((crc, rest)) = body.split_first_chunk::<4>() else {
            return Err(lengths);
        };
        let Some((tags, mut bytes)) = rest.split_at_checked(tags) else {
            return Err(lengths);
        };
        let gfns = runs.iter().flat_map(|run| run.first..run.end());
        let mut computed = 0;
        let mut patched = false;
        let (tags, _) = tags.as_chunks::<2>();
        let (pages, _) = self.pages.as_chunks_mut::<PAGE_SIZE>();
        for ((gfn, tag), page) in gfns.zip(tags).zip(pages) {
            let Some((kind, length)) = Kind::of(u16::from_le_bytes(*tag)) else {
                return Err(lengths);
            };
            let Some((patch, rest)) = bytes.split_at_checked(length) else {
                return Err(lengths);
            };
            bytes = rest;
            match kind {
                Kind::Literal if length == PAGE_SIZE => page.copy_from_slice(patch),
                Kind::Literal => return Err(lengths),
                Kind::Sparse if words::unpack(patch, page) => {}
                Kind::Sparse => return Err(CodecError::Words { gfn }),
                Kind::Delta => {
                    if !self.copies.contains(gfn) {
                        return Err(CodecError::NoBase { gfn });
                    }
                    base(gfn, page).map_err(|error| CodecError::Memory { gfn, error })?;
                    apply(patch, page).map_err(|error| CodecError::Patch { gfn, error })?;
                    computed = crc32c::crc32c_append(computed, page);
                    patched = true;
                }
            }
        }
        if !bytes.is_empty() {
            return Err(lengths);
        }
        let found = u32::from_le_bytes(*crc);
        if patched && found != computed {
            let gfn = runs.first().map_or(0, |run| run.first);
            return Err(CodecError::Differs {
                gfn,
                found,
                computed,
            });
        }
        Ok(())
    }
}
