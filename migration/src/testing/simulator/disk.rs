//! The simulated guest's disk: a version for each block, written while it is copied.
//!
//! A write is done first and counted as written a moment later, as a device does it; so a copy may
//! read it before it counts, or half. At the destination a block that is no version of anything is
//! [`TORN`]: it must be gone when the guest starts.

use super::fault::PortFault;
use super::lock;
use super::world::World;
use crate::page::PAGE_SIZE;
use crate::port::{BLOCK_BYTES, BlockSink, BlockSource, PortError, blocks_in};
use std::sync::{Arc, Mutex};

/// A block of two halves that do not belong together.
const TORN: u64 = u64::MAX;
const BLOCK: usize = 64 << 10;
const _: () = assert!(BLOCK as u64 == BLOCK_BYTES);

/// Both sides' disks.
#[derive(Debug, Default)]
pub(super) struct Disks {
    /// The last block is short.
    pub bytes: u64,
    pub source: Vec<u64>,
    /// As it was in the last pause.
    paused: Vec<u64>,
    destination: Vec<u64>,
    /// Blocks that count as written, while that is watched.
    written: Option<Vec<u64>>,
    /// A block whose write is done and does not count yet.
    uncounted: Option<usize>,
    next_version: u64,
    forgetful: bool,
    /// Blocks that were written since the last flush.
    unflushed: u32,
}

impl Disks {
    pub fn new(blocks: u64, forgetful: bool) -> Self {
        let blocks = usize::try_from(blocks).unwrap_or(0);
        Self {
            bytes: (blocks as u64 * BLOCK_BYTES).saturating_sub(3 * 512),
            // Every third block is empty.
            source: (0..blocks as u64)
                .map(|n| if n % 3 == 1 { 0 } else { n + 1 })
                .collect(),
            forgetful,
            next_version: blocks as u64 + 1,
            ..Self::default()
        }
    }

    /// A write of the guest's.
    pub fn write(&mut self, block: usize, clear: bool) {
        self.settle();
        self.next_version += 1;
        self.source[block] = if clear { 0 } else { self.next_version };
        self.unflushed =
            (self.unflushed + 1).min(u32::try_from(self.source.len()).unwrap_or(u32::MAX));
        self.uncounted = Some(block);
    }

    /// Writes that are done count.
    pub fn settle(&mut self) {
        if let (Some(block), Some(written)) = (self.uncounted.take(), &mut self.written)
            && !self.forgetful
        {
            written[block / 64] |= 1 << (block % 64);
        }
    }

    /// All writes outlast a crash; how many did not before.
    pub fn flush(&mut self) -> u32 {
        std::mem::take(&mut self.unflushed)
    }

    pub const fn is_unflushed(&self) -> bool {
        self.unflushed > 0
    }

    pub fn pause(&mut self) {
        self.settle();
        self.paused.clone_from(&self.source);
    }

    /// What the destination's guest would find wrong.
    pub fn wrong(&self) -> Vec<String> {
        let blocks = self.paused.iter().zip(&self.destination).enumerate();
        blocks
            .filter(|(_, (sent, here))| sent != here)
            .map(|(n, (sent, here))| format!("lost write: block {n} is {here}, should be {sent}"))
            .chain((self.paused.len() != self.destination.len()).then(|| "there is no disk".into()))
            .collect()
    }

    pub fn discard(&mut self) {
        self.destination = Vec::new();
    }
}

/// The words of a block of this version, from byte `at` on, a multiple of 8: the version at the
/// beginning of each page, a hash of it elsewhere.
fn words(version: u64, at: usize) -> impl Iterator<Item = [u8; 8]> {
    let hash = version.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (at / 8..).map(move |n| {
        if n % (PAGE_SIZE / 8) == 0 {
            version
        } else {
            hash
        }
        .to_le_bytes()
    })
}

/// What bytes `at..` of a block of this version hold. Disks are of whole sectors, so of whole
/// words.
fn fill(version: u64, at: usize, into: &mut [u8]) {
    let (into, rest) = into.as_chunks_mut();
    debug_assert!(at.is_multiple_of(8) && rest.is_empty(), "half a word");
    for (to, word) in into.iter_mut().zip(words(version, at)) {
        *to = word;
    }
}

fn version_of(bytes: &[u8]) -> u64 {
    let (bytes, rest) = bytes.as_chunks();
    let version = u64::from_le_bytes(bytes.first().copied().unwrap_or_default());
    let whole = bytes.iter().zip(words(version, 0)).all(|(a, b)| *a == b);
    if whole && rest.is_empty() {
        version
    } else {
        TORN
    }
}

fn number(offset: u64) -> usize {
    usize::try_from(offset / BLOCK_BYTES).unwrap_or(usize::MAX)
}

/// The guest's disk at the source.
pub(super) struct SimDisk(pub Arc<Mutex<World>>);

impl BlockSource for SimDisk {
    fn bytes(&self) -> u64 {
        lock(&self.0).disks.bytes
    }

    fn start(&self) -> Result<(), PortError> {
        let disks = &mut lock(&self.0).disks;
        disks.written = Some(vec![0; disks.source.len().div_ceil(64)]);
        Ok(())
    }

    fn stop(&self) {
        lock(&self.0).disks.written = None;
    }

    fn take_written(&self) -> Result<Vec<u64>, PortError> {
        let written = &mut lock(&self.0).disks.written;
        let words = written.as_mut().ok_or("it was not started")?;
        let empty = vec![0; words.len()];
        Ok(std::mem::replace(words, empty))
    }

    fn hole(&self, offset: u64, len: u64) -> u64 {
        // Every other block that is empty is known to be.
        let world = lock(&self.0);
        let first = number(offset);
        let blocks = usize::try_from(blocks_in(len)).unwrap_or(0);
        let holes = (first..first + blocks)
            .take_while(|n| world.disks.source[*n] == 0 && n % 2 == 0)
            .count();
        (holes as u64 * BLOCK_BYTES).min(len)
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), PortError> {
        lock(&self.0).port_fails(PortFault::DiskRead(0))?;
        for (n, block) in (number(offset)..).zip(into.chunks_mut(BLOCK)) {
            // The guest runs on while a block is read.
            let half = block.len() / 2;
            let (front, back) = block.split_at_mut(half);
            for (at, part) in [(0, front), (half, back)] {
                let mut world = lock(&self.0);
                fill(world.disks.source[n], at, part);
                world.sneak_a_write();
            }
        }
        Ok(())
    }
}

/// The guest's disk at the destination.
pub(super) struct SimCopy(pub Arc<Mutex<World>>);

impl SimCopy {
    /// With whatever it holds.
    pub fn make(world: &Arc<Mutex<World>>, bytes: u64) -> Arc<dyn BlockSink> {
        let blocks = usize::try_from(blocks_in(bytes)).unwrap_or(0);
        lock(world).disks.destination = vec![TORN - 1; blocks];
        Arc::new(Self(Arc::clone(world)))
    }

    fn put(&self, offset: u64, versions: impl Iterator<Item = u64>) -> Result<(), PortError> {
        let mut world = lock(&self.0);
        world.port_fails(PortFault::DiskWrite(0))?;
        for (block, version) in (number(offset)..).zip(versions) {
            world.disks.destination[block] = version;
        }
        Ok(())
    }
}

impl BlockSink for SimCopy {
    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), PortError> {
        self.put(offset, bytes.chunks(BLOCK).map(version_of))
    }

    fn zero(&self, offset: u64, len: u64) -> Result<(), PortError> {
        self.put(offset, (0..blocks_in(len)).map(|_| 0))
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), PortError> {
        let world = lock(&self.0);
        for (n, block) in (number(offset)..).zip(into.chunks_mut(BLOCK)) {
            fill(world.disks.destination[n], 0, block);
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), PortError> {
        lock(&self.0).port_fails(PortFault::DiskFlush)
    }
}
