//! A disk: virtio-blk (§5.2) over a raw image or a block device.
//!
//! ```text
//!  queue ─ pop ─▶ worker ─▶ waiting ─▶ 4 threads: pread, pwrite, fdatasync, fallocate
//!                   ▲                      │
//!  queue ◀─ used ───┴──── finished ◀───────┘
//! ```
//!
//! Several requests are under way at once and end in any order, as the specification allows. A
//! flush covers all writes that had ended when it was made. Pausing waits for the requests that the
//! threads have begun, and puts the others back: their heads travel in the queue's state, and the
//! host that resumes the guest takes them up from there.
//!
//! What is locked, how caches are kept from being stale and what a failed flush means: see
//! [`Disk`]'s module. The guest is told the block size of the device (`blk_size`); a request for
//! parts of a block is carried out all the same.

mod dirty;
mod disk;
mod pool;
mod request;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

pub use dirty::{BLOCK, WrittenBlocks};
pub use disk::{Disk, DiskError, FileId, SECTOR};

pub use crate::state::BlockState;
use crate::virtio::{
    COMMON_FEATURES, Context, Device, DeviceState, DrainError, Kind, Memory, RestoreError, Sparse,
    Violation,
};
use pool::{Pool, TIMEOUT};
use request::{ID_LEN, MAX_DISCARD, MAX_RANGES, MAX_SEGMENT, MAX_ZEROES, Options, Request};

const QUEUE_SIZE: u16 = 256;
const QUEUE_SIZES: &[u16] = &[QUEUE_SIZE];
/// Bytes of a block of most file systems: what they discard is aligned to it.
const FILE_BLOCK: u32 = 4096;

/// A disk.
pub struct Block<M> {
    disk: Arc<Disk>,
    pool: Pool<M>,
    config: [u8; 60],
    failures: Sparse,
}

impl<M> std::fmt::Debug for Block<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Block").field(&self.disk).finish()
    }
}

impl<M: Memory> Block<M> {
    /// The guest sees `disk` under the name `id`, of which the first 20 bytes count.
    ///
    /// # Errors
    /// When the process is out of descriptors or threads.
    pub fn new(disk: Arc<Disk>, id: &str, memory: Arc<M>) -> io::Result<Self> {
        let mut options = Options {
            write_through: true,
            id: [0; ID_LEN],
        };
        for (to, from) in options.id.iter_mut().zip(id.bytes()) {
            *to = from;
        }
        Ok(Self {
            config: config(&disk),
            pool: Pool::new(Arc::clone(&disk), memory, options)?,
            disk,
            failures: Sparse::default(),
        })
    }

    /// The disk behind it.
    #[must_use]
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    fn complete(&mut self, cx: &mut Context<'_, M>) -> Result<(), Violation> {
        for done in self.pool.collect() {
            if let Some(failure) = done.failure
                && let Some(times) = self.failures.count()
            {
                let path = self.disk.path().display();
                tracing::warn!(disk = %path, times, "a request of the guest's failed: {failure}");
            }
            if let Some(queue) = cx.queues.first_mut() {
                queue.complete(cx.memory, done.head, done.written)?;
            }
        }
        Ok(())
    }
}

/// `struct virtio_blk_config`, as far as it is used (§5.2.4).
fn config(disk: &Disk) -> [u8; 60] {
    let mut config = [0; 60];
    config[..8].copy_from_slice(&(disk.bytes() / SECTOR).to_le_bytes());
    let sectors = |bytes: u32| bytes / 512;
    let words = [
        (8, MAX_SEGMENT),
        // A request has a header and a status beside its data.
        (12, u32::from(QUEUE_SIZE) - 2),
        (20, disk.block_size()),
        (36, MAX_DISCARD),
        (40, MAX_RANGES),
        (44, sectors(disk.block_size().max(FILE_BLOCK))),
        (48, MAX_ZEROES),
        (52, MAX_RANGES),
    ];
    for (at, word) in words {
        config[at..at + 4].copy_from_slice(&word.to_le_bytes());
    }
    // write_zeroes_may_unmap
    config[56] = 1;
    config
}

impl<M: Memory> Device<M> for Block<M> {
    fn kind(&self) -> Kind {
        Kind {
            id: VIRTIO_ID_BLOCK,
            name: "disk",
            queue_sizes: QUEUE_SIZES,
        }
    }

    fn features(&self) -> u64 {
        let mut features = COMMON_FEATURES
            | 1 << VIRTIO_BLK_F_SIZE_MAX
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_FLUSH;
        if self.disk.read_only() {
            features |= 1 << VIRTIO_BLK_F_RO;
        } else {
            features |= 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        }
        features
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        crate::virtio::copy_config(&self.config, offset, data);
    }

    fn activate(&mut self, features: u64) {
        // A driver that cannot flush expects that what is written stays (§5.2.6.2).
        self.pool
            .set_write_through(features & 1 << VIRTIO_BLK_F_FLUSH == 0);
    }

    fn reset(&mut self) {}

    fn queue_ready(&mut self, _index: usize, cx: &mut Context<'_, M>) -> Result<(), Violation> {
        while let Some(chain) = cx.queues[0].pop(cx.memory)? {
            self.pool.submit(Request::parse(cx.memory, chain)?);
        }
        Ok(())
    }

    fn source(&self) -> io::Result<Option<OwnedFd>> {
        self.pool.finished().as_fd().try_clone_to_owned().map(Some)
    }

    fn source_ready(&mut self, cx: &mut Context<'_, M>) -> Result<(), Violation> {
        self.complete(cx)
    }

    fn failure(&self) -> Option<String> {
        self.pool.failure()
    }

    fn drain(&mut self, cx: &mut Context<'_, M>) -> Result<(), DrainError> {
        let waiting = self.pool.drain().map_err(|requests| DrainError {
            requests,
            what: self.disk.path().display().to_string(),
            timeout: TIMEOUT,
        })?;
        for request in waiting.iter().rev() {
            cx.queues[0].put_back(request.head);
        }
        // The rings were checked when the driver set them up, and are RAM still.
        if let Err(violation) = self.complete(cx) {
            tracing::warn!(disk = %self.disk.path().display(), %violation, "a request could not be given back");
        }
        Ok(())
    }

    fn save(&self) -> DeviceState {
        DeviceState::Block(BlockState {
            sectors: self.disk.bytes() / SECTOR,
            read_only: self.disk.read_only(),
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Block(state) = state else {
            return Err(RestoreError::Kind {
                saved: state.name(),
                here: "disk",
            });
        };
        let here = self.disk.bytes() / SECTOR;
        let path = || self.disk.path().display().to_string();
        if state.sectors != here {
            return Err(RestoreError::Capacity {
                saved: state.sectors,
                here,
                path: path(),
            });
        }
        if state.read_only != self.disk.read_only() {
            return Err(RestoreError::ReadOnly {
                saved: state.read_only,
                path: path(),
            });
        }
        Ok(())
    }
}
