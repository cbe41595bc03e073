//! Receiving the blocks of disks that move with the guest.

use super::error::{BlocksError, DestinationError};
use crate::page::{PageSet, Run};
use crate::port::{BLOCK_BYTES, BlockSink, Link, PortError, blocks_in};
use crate::verify::{all_zero, block_hashes};
use crate::wire::{
    Channel, Encoding, Features, FrameType, Header, MAX_BLOCKS, MAX_DISK_BLOCKS, MAX_DISKS,
};
use std::sync::Arc;
use zstd::bulk::Decompressor;

/// A disk being filled.
struct CopiedDisk {
    sink: Arc<dyn BlockSink>,
    bytes: u64,
    arrived: PageSet,
}

/// Blocks of a frame, found on a disk.
struct Place<'a> {
    disk: usize,
    copy: &'a mut CopiedDisk,
    blocks: Run,
    offset: u64,
    bytes: u64,
}

/// The disks of an arriving guest.
pub(super) struct Disks {
    all: Vec<CopiedDisk>,
    coded: bool,
    zstd: Option<Decompressor<'static>>,
    body: Vec<u8>,
    plain: Vec<u8>,
    unflushed: bool,
    compared: u64,
    different: u64,
    first: Option<(usize, u64)>,
}

impl Disks {
    /// None.
    pub(super) const fn none() -> Self {
        Self {
            all: Vec::new(),
            coded: false,
            zstd: None,
            body: Vec::new(),
            plain: Vec::new(),
            unflushed: false,
            compared: 0,
            different: 0,
            first: None,
        }
    }

    /// Whether disks of these sizes can be; to be asked before anything is made for them.
    pub(super) fn check(bytes: &[u64]) -> Result<(), BlocksError> {
        let blocks = bytes
            .iter()
            .fold(0_u64, |sum, bytes| sum.saturating_add(blocks_in(*bytes)));
        if bytes.is_empty()
            || bytes.len() > MAX_DISKS
            || blocks > MAX_DISK_BLOCKS
            || bytes.contains(&0)
        {
            return Err(BlocksError::Announced {
                disks: bytes.len(),
                blocks,
            });
        }
        Ok(())
    }

    /// Of these sizes, into these sinks.
    pub(super) fn new(
        bytes: &[u64],
        sinks: Vec<Arc<dyn BlockSink>>,
        agreed: Features,
    ) -> Result<Self, BlocksError> {
        if sinks.len() != bytes.len() {
            return Err(BlocksError::Made {
                announced: bytes.len(),
                made: sinks.len(),
            });
        }
        let copy = |(sink, &bytes)| CopiedDisk {
            sink,
            bytes,
            arrived: PageSet::new(blocks_in(bytes)),
        };
        Ok(Self {
            all: sinks.into_iter().zip(bytes).map(copy).collect(),
            coded: agreed.has(Features::ZSTD),
            ..Self::none()
        })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Whether their comparing has begun.
    pub(super) const fn is_compared(&self) -> bool {
        self.compared > 0
    }

    fn place(&mut self, header: &Header) -> Result<Place<'_>, BlocksError> {
        let (disk, blocks) = header.blocks();
        let copy = self
            .all
            .get_mut(disk)
            .filter(|copy| blocks.count > 0 && blocks.end() <= blocks_in(copy.bytes));
        let Some(copy) = copy else {
            return Err(BlocksError::Outside {
                disk,
                first: blocks.first,
                count: blocks.count,
            });
        };
        let offset = blocks.first * BLOCK_BYTES;
        let end = (blocks.end() * BLOCK_BYTES).min(copy.bytes);
        Ok(Place {
            disk,
            copy,
            blocks,
            offset,
            bytes: end - offset,
        })
    }

    /// Handles a frame about blocks but the end of a round.
    pub(super) fn receive<L: Link>(
        &mut self,
        channel: &mut Channel<L>,
        header: &Header,
    ) -> Result<(), DestinationError> {
        // Before the payload is read: it is for something.
        self.place(header)?;
        let mut body = std::mem::take(&mut self.body);
        channel.recv_payload(header, &mut body)?;
        let result = match header.kind {
            FrameType::Blocks => self.write(header, &body),
            FrameType::BlocksZero => self.zero(header),
            _ => self.compare(header, &body),
        };
        self.body = body;
        Ok(result?)
    }

    fn write(&mut self, header: &Header, body: &[u8]) -> Result<(), BlocksError> {
        let mut plain = std::mem::take(&mut self.plain);
        let coded = header.encoding() == Encoding::Zstd;
        if coded {
            self.decompress(header, body, &mut plain)?;
        }
        self.unflushed = true;
        let place = self.place(header)?;
        let bytes = if coded { &plain[..] } else { body };
        if bytes.len() as u64 != place.bytes {
            return Err(BlocksError::Length {
                disk: place.disk,
                found: bytes.len() as u64,
                wanted: place.bytes,
            });
        }
        let written = place.copy.sink.write(place.offset, bytes);
        written.map_err(failed("writing to", place.disk))?;
        place.copy.arrived.insert_run(place.blocks);
        self.plain = plain;
        Ok(())
    }

    fn decompress(
        &mut self,
        header: &Header,
        body: &[u8],
        plain: &mut Vec<u8>,
    ) -> Result<(), BlocksError> {
        if !self.coded {
            return Err(BlocksError::NotAgreed);
        }
        let place = self.place(header)?;
        let (disk, bytes) = (place.disk, place.bytes);
        // A header allows no more blocks than this in a frame, so the buffer is small.
        debug_assert!(place.blocks.count <= u64::from(MAX_BLOCKS));
        let error = |error| BlocksError::Zstd { disk, error };
        let zstd = match &mut self.zstd {
            Some(zstd) => zstd,
            none => none.insert(Decompressor::new().map_err(error)?),
        };
        plain.resize(usize::try_from(bytes).unwrap_or(0), 0);
        let found = zstd
            .decompress_to_buffer(body, &mut plain[..])
            .map_err(error)?;
        plain.truncate(found);
        Ok(())
    }

    fn zero(&mut self, header: &Header) -> Result<(), BlocksError> {
        self.unflushed = true;
        let place = self.place(header)?;
        let zeroed = place.copy.sink.zero(place.offset, place.bytes);
        zeroed.map_err(failed("clearing blocks of", place.disk))?;
        place.copy.arrived.insert_run(place.blocks);
        Ok(())
    }

    /// Compares blocks with the source's: their hashes, or that all of them are zero.
    fn compare(&mut self, header: &Header, hashes: &[u8]) -> Result<(), BlocksError> {
        let mut plain = std::mem::take(&mut self.plain);
        let place = self.place(header)?;
        let (disk, end) = (place.disk, place.offset + place.bytes);
        let mut hashes = hashes.chunks_exact(8);
        let zero = hashes.len() == 0;
        let (mut different, mut first) = (0, None);
        let mut at = place.offset;
        while at < end {
            let hole = place.copy.sink.hole(at, end - at);
            if zero && (hole >= BLOCK_BYTES || hole >= end - at) {
                at = if hole >= end - at {
                    end
                } else {
                    at + hole / BLOCK_BYTES * BLOCK_BYTES
                };
                continue;
            }
            plain.resize(usize::try_from(BLOCK_BYTES.min(end - at)).unwrap_or(0), 0);
            let read = place.copy.sink.read(at, &mut plain);
            read.map_err(failed("reading", disk))?;
            let number = at / BLOCK_BYTES;
            let equal = match hashes.next() {
                Some(hash) => block_hashes(disk, number, &plain).eq(hash.iter().copied()),
                None => all_zero(&plain),
            };
            if !equal {
                different += 1;
                first.get_or_insert((disk, number));
            }
            at += BLOCK_BYTES;
        }
        self.compared += place.blocks.count;
        self.different += different;
        self.first = self.first.or(first);
        self.plain = plain;
        Ok(())
    }

    /// Returns when all that came outlasts a crash.
    pub(super) fn flush(&mut self) -> Result<(), BlocksError> {
        if std::mem::take(&mut self.unflushed) {
            for (disk, copy) in self.all.iter().enumerate() {
                copy.sink.flush().map_err(failed("flushing", disk))?;
            }
        }
        Ok(())
    }

    /// Before the guest is complete: that its disks are.
    pub(super) fn complete(&mut self, verify: bool) -> Result<(), BlocksError> {
        let mut total = 0;
        for (disk, copy) in self.all.iter().enumerate() {
            let blocks = copy.arrived.end() - copy.arrived.len();
            if blocks > 0 {
                return Err(BlocksError::Incomplete { disk, blocks });
            }
            total += copy.arrived.end();
        }
        if let Some((disk, first)) = self.first {
            return Err(BlocksError::Differs {
                disk,
                blocks: self.different,
                first,
            });
        }
        if verify && self.compared != total {
            return Err(BlocksError::NotCompared {
                compared: self.compared,
                total,
            });
        }
        self.flush()
    }
}

fn failed(what: &'static str, disk: usize) -> impl FnOnce(PortError) -> BlocksError {
    move |error| BlocksError::Disk { what, disk, error }
}

#[cfg(test)]
mod tests;
