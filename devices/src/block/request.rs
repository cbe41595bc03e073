//! A request of a block driver (§5.2.6): read from its chain, carried out, answered.

use std::io;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::disk::{AlignedBuffer, Disk, SECTOR};
use crate::virtio::{Buffer, Chain, Memory, Violation};

/// Bytes that are copied at once.
const CHUNK: usize = 256 << 10;
/// Bytes of the answer to GET_ID.
pub(super) const ID_LEN: usize = 20;
/// Ranges of a discard or a write of zeros.
pub(super) const MAX_RANGES: u32 = 32;
/// Sectors of a range that may be discarded at once: 1 GiB.
pub(super) const MAX_DISCARD: u32 = 1 << 21;
/// Sectors of a range that may be zeroed at once: 4 MiB, for a file system where it has to be
/// written.
pub(super) const MAX_ZEROES: u32 = 1 << 13;
/// Bytes of one buffer of a request, and of all of them: a pause waits for the requests that have
/// begun.
pub(super) const MAX_SEGMENT: u32 = 256 << 10;
const MAX_DATA: u64 = 64 << 20;
const HEADER: u64 = 16;
const RANGE: u64 = 16;
const UNMAP: u32 = 1;

/// What is asked for.
#[derive(Debug)]
enum What {
    Read(u64),
    Write(u64),
    Flush,
    Id,
    Discard,
    WriteZeroes,
    Unknown,
}

/// A request, ready to be carried out by any thread.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) head: u16,
    what: What,
    /// What comes with it, or what is asked for.
    data: Buffer,
    /// One byte.
    status: Buffer,
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("sector {sector}, {len} bytes: not on the disk")]
    Range { sector: u64, len: u64 },
    #[error("{0} bytes at once, where {MAX_DATA} are possible")]
    TooLong(u64),
    #[error("the disk is read-only")]
    ReadOnly,
    #[error("not supported")]
    Unsupported,
    #[error("{0}")]
    Memory(#[from] Violation),
}

/// How a request ended.
#[derive(Debug)]
pub(super) struct Done {
    pub(super) head: u16,
    /// Bytes written to the guest's memory.
    pub(super) written: u32,
    /// What went wrong, for the log.
    pub(super) failure: Option<String>,
}

impl Request {
    /// Reads what `chain` asks for.
    ///
    /// # Errors
    /// [`Violation`] when it has no room for an answer.
    pub(super) fn parse<M: Memory>(memory: &M, chain: Chain) -> Result<Self, Violation> {
        let (head, mut readable, mut writable) = (chain.head, chain.readable, chain.writable);
        let status = writable.take_back(1);
        let header = readable.take_front(HEADER);
        let shape = |what| Violation::Shape { head, what };
        if status.is_empty() {
            return Err(shape("no room for the request's status"));
        }
        let mut bytes = [0; 16];
        if header.read(memory, &mut bytes)? < bytes.len() {
            return Err(shape("less than a request's header"));
        }
        let [a, b, c, d, _, _, _, _, sector @ ..] = bytes;
        let sector = u64::from_le_bytes(sector);
        let what = match u32::from_le_bytes([a, b, c, d]) {
            VIRTIO_BLK_T_IN => What::Read(sector),
            VIRTIO_BLK_T_OUT => What::Write(sector),
            VIRTIO_BLK_T_FLUSH => What::Flush,
            VIRTIO_BLK_T_GET_ID => What::Id,
            VIRTIO_BLK_T_DISCARD => What::Discard,
            VIRTIO_BLK_T_WRITE_ZEROES => What::WriteZeroes,
            _ => What::Unknown,
        };
        let data = match what {
            What::Read(_) | What::Id => writable,
            _ => readable,
        };
        Ok(Self {
            head,
            what,
            data,
            status,
        })
    }

    /// Carries it out and writes the status.
    pub(super) fn run<M: Memory>(self, memory: &M, disk: &Disk, options: &Options) -> Done {
        let mut work = Work {
            memory,
            disk,
            options,
            written: 0,
        };
        let result = work.run(&self.what, &self.data);
        let status = match &result {
            Ok(()) => VIRTIO_BLK_S_OK,
            Err(Failure::Unsupported) => VIRTIO_BLK_S_UNSUPP,
            Err(_) => VIRTIO_BLK_S_IOERR,
        };
        let answered = self
            .status
            .write(memory, &[u8::try_from(status).unwrap_or(1)]);
        let failure = match (result, answered) {
            (Err(Failure::Unsupported), _) => None,
            (Err(failure), _) => Some(format!("{:?}: {failure}", self.what)),
            (Ok(()), Err(violation)) => Some(violation.to_string()),
            (Ok(()), Ok(_)) => None,
        };
        Done {
            head: self.head,
            // The status is behind the data, so all is counted as written where the request failed
            // half way too.
            written: work.written.saturating_add(1),
            failure,
        }
    }
}

/// What is the same for all requests.
#[derive(Debug, Clone)]
pub(super) struct Options {
    /// The driver does not flush: each write goes to the disk at once.
    pub(super) write_through: bool,
    /// The disk's name for the guest.
    pub(super) id: [u8; ID_LEN],
}

struct Work<'a, M> {
    memory: &'a M,
    disk: &'a Disk,
    options: &'a Options,
    written: u32,
}

impl<M: Memory> Work<'_, M> {
    fn run(&mut self, what: &What, data: &Buffer) -> Result<(), Failure> {
        match what {
            What::Read(sector) => self.read(*sector, data.clone()),
            What::Write(sector) => self.write(*sector, data.clone()),
            What::Flush => Ok(self.disk.flush()?),
            What::Id => {
                let n = data.write(self.memory, &self.options.id)?;
                self.written = u32::try_from(n).unwrap_or(0);
                Ok(())
            }
            What::Discard => self.ranges(data, MAX_DISCARD, false),
            What::WriteZeroes => self.ranges(data, MAX_ZEROES, true),
            What::Unknown => Err(Failure::Unsupported),
        }
    }

    fn place(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        self.disk
            .range(sector, len)
            .ok_or(Failure::Range { sector, len })
    }

    fn place_data(&self, sector: u64, data: &Buffer) -> Result<u64, Failure> {
        let len = data.len();
        if len > MAX_DATA {
            return Err(Failure::TooLong(len));
        }
        self.place(sector, len)
    }

    /// By way of a buffer: the kernel may not have to wait for memory that is still at the source
    /// of a migration, and a page that arrives late then stops a copy of ours, not a system call
    /// with the file's locks held.
    fn read(&mut self, sector: u64, mut data: Buffer) -> Result<(), Failure> {
        let mut at = self.place_data(sector, &data)?;
        let mut buffer = buffer(data.len());
        while !data.is_empty() {
            let part = data.take_front(u64::try_from(CHUNK).unwrap_or(u64::MAX));
            let bytes = &mut buffer.bytes()[..usize::try_from(part.len()).unwrap_or(0)];
            self.disk.read(at, bytes)?;
            part.write(self.memory, bytes)?;
            at += part.len();
            self.written = self
                .written
                .saturating_add(u32::try_from(part.len()).unwrap_or(0));
        }
        Ok(())
    }

    fn write(&mut self, sector: u64, mut data: Buffer) -> Result<(), Failure> {
        self.check_writable()?;
        let mut at = self.place_data(sector, &data)?;
        let mut buffer = buffer(data.len());
        while !data.is_empty() {
            let part = data.take_front(u64::try_from(CHUNK).unwrap_or(u64::MAX));
            let bytes = &mut buffer.bytes()[..usize::try_from(part.len()).unwrap_or(0)];
            part.read(self.memory, bytes)?;
            self.disk.write(at, bytes)?;
            at += part.len();
        }
        self.settle()
    }

    fn check_writable(&self) -> Result<(), Failure> {
        if self.disk.read_only() {
            Err(Failure::ReadOnly)
        } else {
            Ok(())
        }
    }

    fn settle(&self) -> Result<(), Failure> {
        if self.options.write_through {
            self.disk.flush()?;
        }
        Ok(())
    }

    /// Discards or zeroes ranges. All are checked before the first is touched.
    fn ranges(&self, data: &Buffer, max: u32, zeroes: bool) -> Result<(), Failure> {
        self.check_writable()?;
        let len = data.len();
        if len == 0 || !len.is_multiple_of(RANGE) || len / RANGE > u64::from(MAX_RANGES) {
            return Err(Failure::Unsupported);
        }
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        data.read(self.memory, &mut bytes)?;
        let mut ranges = Vec::new();
        let (chunks, _) = bytes.as_chunks::<16>();
        for [a, b, c, d, e, f, g, h, i, j, k, l, flags @ ..] in chunks {
            let sector = u64::from_le_bytes([*a, *b, *c, *d, *e, *f, *g, *h]);
            let count = u32::from_le_bytes([*i, *j, *k, *l]);
            let flags = u32::from_le_bytes(*flags);
            // Unknown flags, and unmap in a discard, are to be refused (§5.2.6.2).
            if flags & !UNMAP != 0 || (flags != 0 && !zeroes) {
                return Err(Failure::Unsupported);
            }
            let len = u64::from(count) * SECTOR;
            let offset = self.place(sector, len)?;
            if count > max {
                return Err(Failure::Range { sector, len });
            }
            ranges.push((offset, len, flags & UNMAP != 0));
        }
        for (offset, len, unmap) in ranges.into_iter().filter(|(_, len, _)| *len > 0) {
            let done = match (zeroes, unmap) {
                (true, false) => self.disk.write_zeroes(offset, len),
                (true, true) => self
                    .disk
                    .discard(offset, len)
                    .or_else(|_| self.disk.write_zeroes(offset, len)),
                (false, _) => self.disk.discard(offset, len),
            };
            match done {
                Err(e) if e.raw_os_error() == Some(nix::libc::EOPNOTSUPP) => {
                    return Err(Failure::Unsupported);
                }
                other => other?,
            }
        }
        self.settle()
    }
}

fn buffer(len: u64) -> AlignedBuffer {
    AlignedBuffer::new(usize::try_from(len).unwrap_or(CHUNK).min(CHUNK))
}
