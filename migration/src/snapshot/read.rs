//! Reading a snapshot: nothing in the file is believed.

use super::{
    BLOCK_PAGES, END_BYTES, ENTRY_BYTES, HEAD_END, SnapshotError, Trailer, decode_head, long,
};
use crate::codec::{Decoder, ZSTD_PAGES};
use crate::page::{AtomicPageSet, Gfn, PAGE_SIZE, PageSet, RamLayout, Run};
use crate::wire::{
    Encoding, FLAG_CRC, Features, FrameType, HEADER_BYTES, Header, Hello, Limits, RUN_BYTES,
    SessionId, decode_runs,
};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// Bytes that can be read anywhere, by several threads.
pub trait ReadAt: Send + Sync {
    /// Fills `into` with what is at `offset`.
    ///
    /// # Errors
    /// `UnexpectedEof` beyond the end; the medium's.
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<()>;

    /// How many bytes there are.
    ///
    /// # Errors
    /// The medium's.
    fn length(&self) -> io::Result<u64>;
}

impl ReadAt for File {
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_exact_at(into, offset)
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }
}

impl ReadAt for Vec<u8> {
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        let at = usize::try_from(offset).map_err(io::Error::other)?;
        let end = at.checked_add(into.len());
        let bytes = end.and_then(|end| self.get(at..end));
        into.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }
}

/// Pages of one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    run: Run,
    frame: u64,
}

/// An opened snapshot: what it is of and where its pages are. Its pages are read by
/// [`BlockReader`]s.
#[derive(Debug)]
pub struct Snapshot<F> {
    file: F,
    bytes: u64,
    session: SessionId,
    hello: Hello,
    state: Vec<u8>,
    /// Page frames lie before.
    contents: u64,
    /// Sorted by page, disjoint.
    index: Vec<Entry>,
    /// Positions in `index`, sorted by frame and then by page.
    by_frame: Vec<u32>,
}

impl<F: ReadAt> Snapshot<F> {
    /// Reads and checks all but the pages.
    ///
    /// # Errors
    /// [`SnapshotError`].
    pub fn open(file: F) -> Result<Self, SnapshotError> {
        let bytes = file.length().map_err(|source| SnapshotError::Read {
            offset: 0,
            bytes: 0,
            source,
        })?;
        let truncated = SnapshotError::Truncated { bytes };
        let mut head = [0; END_BYTES];
        if bytes < HEAD_END {
            // Whether it is one at all is worth knowing first.
            let there = usize::try_from(bytes).unwrap_or(0).min(8);
            read(&file, &mut head[..there], 0)?;
            let mut magic = [0; 8];
            magic.copy_from_slice(&head[..8]);
            return Err(if magic == super::HEAD_MAGIC {
                truncated
            } else {
                SnapshotError::Magic(magic)
            });
        }
        read(&file, &mut head, 0)?;
        let session = decode_head(&head)?;
        let end = bytes - HEAD_END;
        if end < HEAD_END {
            return Err(truncated);
        }
        let mut trailer = [0; END_BYTES];
        read(&file, &mut trailer, end)?;
        let trailer = Trailer::decode(&trailer).ok_or(truncated)?;
        let damaged = |what| SnapshotError::Damaged { offset: end, what };
        if trailer.session != session {
            return Err(damaged("its end belongs to another snapshot"));
        }
        let Trailer {
            contents,
            state,
            index,
            entries,
            ..
        } = trailer;
        let index_bytes = entries.checked_mul(ENTRY_BYTES as u64);
        let ends = index_bytes.and_then(|bytes| index.checked_add(bytes));
        if contents < HEAD_END || state <= contents || index <= state || ends != Some(end) {
            return Err(damaged("its parts do not lie where they can"));
        }
        let hello = payload(&file, FrameType::Hello, contents, state)?;
        let hello = Hello::decode(&hello).map_err(|source| SnapshotError::Contents {
            offset: contents,
            source,
        })?;
        if !Features::SUPPORTED.has(hello.required) {
            return Err(SnapshotError::Features(hello.required.0));
        }
        let state = payload(&file, FrameType::State, state, index)?;
        let index = read_index(&file, &trailer, &hello.layout, end)?;
        let mut by_frame: Vec<u32> = (0..).take(index.len()).collect();
        // Stable: by page within a frame.
        by_frame.sort_by_key(|at| index.get(*at as usize).map_or(0, |entry| entry.frame));
        Ok(Self {
            file,
            bytes,
            session,
            hello,
            state,
            contents,
            index,
            by_frame,
        })
    }

    /// Which snapshot it is.
    #[must_use]
    pub const fn session(&self) -> SessionId {
        self.session
    }

    /// Size of the file.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Where the guest has RAM.
    #[must_use]
    pub const fn layout(&self) -> &RamLayout {
        &self.hello.layout
    }

    /// The machine's configuration.
    #[must_use]
    pub fn machine(&self) -> &[u8] {
        &self.hello.machine
    }

    /// The machine's state.
    #[must_use]
    pub fn state(&self) -> &[u8] {
        &self.state
    }

    /// Pages that are not zero.
    #[must_use]
    pub fn data_pages(&self) -> u64 {
        self.index.iter().map(|entry| entry.run.count).sum()
    }

    /// The pages that are not zero. Takes memory by the layout, which is to be believed before.
    #[must_use]
    pub fn data(&self) -> PageSet {
        let mut set = PageSet::new(self.layout().end());
        self.index
            .iter()
            .for_each(|entry| set.insert_run(entry.run));
        set
    }

    /// Where the frame of a page begins; `None` for a zero page.
    #[must_use]
    pub fn frame_of(&self, gfn: Gfn) -> Option<u64> {
        let after = self.index.partition_point(|entry| entry.run.first <= gfn);
        let entry = self.index.get(after.checked_sub(1)?)?;
        (gfn < entry.run.end()).then_some(entry.frame)
    }

    /// Where all frames begin, in the file's order.
    pub fn frames(&self) -> impl Iterator<Item = u64> + '_ {
        let mut last = None;
        self.by_frame.iter().filter_map(move |at| {
            let frame = self.index.get(*at as usize)?.frame;
            (last.replace(frame) != Some(frame)).then_some(frame)
        })
    }

    /// The pages that are to be taken from a frame, in order.
    pub fn pages_of(&self, frame: u64) -> impl Iterator<Item = Run> + '_ {
        let entry = |at: &u32| self.index.get(*at as usize);
        let from = self
            .by_frame
            .partition_point(|at| entry(at).is_some_and(|entry| entry.frame < frame));
        self.by_frame
            .get(from..)
            .unwrap_or_default()
            .iter()
            .filter_map(entry)
            .take_while(move |entry| entry.frame == frame)
            .map(|entry| entry.run)
    }
}

fn read<F: ReadAt>(file: &F, into: &mut [u8], offset: u64) -> Result<(), SnapshotError> {
    let bytes = into.len();
    file.read_at(into, offset)
        .map_err(|source| SnapshotError::Read {
            offset,
            bytes,
            source,
        })
}

fn header<F: ReadAt>(file: &F, offset: u64, limits: Limits) -> Result<Header, SnapshotError> {
    let mut bytes = [0; HEADER_BYTES];
    read(file, &mut bytes, offset)?;
    Header::decode(&bytes, limits).map_err(|_| SnapshotError::Damaged {
        offset,
        what: "there is no sound frame",
    })
}

/// The checked payload of a frame that fills the file from `from` to `to`.
fn payload<F: ReadAt>(
    file: &F,
    kind: FrameType,
    from: u64,
    to: u64,
) -> Result<Vec<u8>, SnapshotError> {
    let header = header(file, from, Limits { end: 0 })?;
    let body = from + HEADER_BYTES as u64;
    if header.kind != kind || body + u64::from(header.length) != to {
        return Err(SnapshotError::Damaged {
            offset: from,
            what: "another frame is there than should be",
        });
    }
    let mut payload = Vec::new();
    checked(file, &header, body, &mut payload)?;
    Ok(payload)
}

/// Reads a payload whose length was found possible, and checks it.
fn checked<F: ReadAt>(
    file: &F,
    header: &Header,
    at: u64,
    into: &mut Vec<u8>,
) -> Result<(), SnapshotError> {
    into.clear();
    into.resize(header.length as usize, 0);
    read(file, into, at)?;
    if header.flags & FLAG_CRC == 0 || crc32c::crc32c(into) != header.payload_crc {
        return Err(SnapshotError::Damaged {
            offset: at,
            what: "the checksum of a frame's contents is wrong",
        });
    }
    Ok(())
}

fn read_index<F: ReadAt>(
    file: &F,
    trailer: &Trailer,
    layout: &RamLayout,
    end: u64,
) -> Result<Vec<Entry>, SnapshotError> {
    let offset = trailer.index;
    let damaged = |what| SnapshotError::Damaged { offset, what };
    let odd = damaged("its index lists what cannot be");
    // As long as a part of the file that is there.
    let Ok(length) = usize::try_from(end - offset) else {
        return Err(odd);
    };
    let mut bytes = vec![0; length];
    read(file, &mut bytes, offset)?;
    if crc32c::crc32c(&bytes) != trailer.index_crc {
        return Err(damaged("the checksum of its index is wrong"));
    }
    let mut index = Vec::with_capacity(length / ENTRY_BYTES);
    let mut free = 0;
    for entry in bytes.chunks_exact(ENTRY_BYTES) {
        let run = long(entry, 0);
        let run = Run::new(run >> 16, (run & 0xffff) + 1);
        let frame = long(entry, 8);
        let sound = run.first >= free
            && run.count <= BLOCK_PAGES
            && layout.contains(run)
            && (HEAD_END..trailer.contents).contains(&frame);
        if !sound {
            return Err(odd);
        }
        free = run.end();
        index.push(Entry { run, frame });
    }
    Ok(index)
}

/// Reads frames of pages: the buffers of one thread.
#[derive(Debug)]
pub struct BlockReader {
    payload: Vec<u8>,
    runs: Vec<Run>,
    decoder: Decoder,
}

impl Default for BlockReader {
    fn default() -> Self {
        Self {
            payload: Vec::new(),
            runs: Vec::new(),
            // No page has arrived in a way that makes it a base of a difference.
            decoder: Decoder::new(Features::SUPPORTED, Arc::new(AtomicPageSet::new(0))),
        }
    }
}

/// The pages of a frame that are to be taken from it.
#[derive(Debug)]
pub struct Block<'a> {
    runs: &'a [Run],
    bytes: &'a [u8],
    wanted: Vec<Run>,
    /// What was read of the file for it.
    pub read: u64,
}

impl Block<'_> {
    /// Its pages in order, in pieces that lie together here and in memory.
    pub fn pieces(&self) -> impl Iterator<Item = (Run, &[u8])> + '_ {
        let mut at = 0;
        let tables = self.runs.iter().map(move |run| {
            let from = at;
            at += run.count;
            (*run, from)
        });
        tables.flat_map(move |(run, from)| {
            self.wanted.iter().filter_map(move |wanted| {
                let first = wanted.first.max(run.first);
                let end = wanted.end().min(run.end());
                let count = end.checked_sub(first).filter(|count| *count > 0)?;
                let at = usize::try_from(from + first - run.first).ok()? * PAGE_SIZE;
                let length = usize::try_from(count).ok()? * PAGE_SIZE;
                Some((Run::new(first, count), self.bytes.get(at..at + length)?))
            })
        })
    }
}

impl BlockReader {
    /// Reads, checks and decodes a frame.
    ///
    /// # Errors
    /// [`SnapshotError::Page`], and why.
    pub fn read<'a, F: ReadAt>(
        &'a mut self,
        snapshot: &Snapshot<F>,
        frame: u64,
    ) -> Result<Block<'a>, SnapshotError> {
        let wanted: Vec<Run> = snapshot.pages_of(frame).collect();
        let gfn = wanted.first().map_or(0, |run| run.first);
        self.read_wanted(snapshot, frame, wanted)
            .map_err(|source| SnapshotError::Page {
                gfn,
                source: Box::new(source),
            })
    }

    fn read_wanted<'a, F: ReadAt>(
        &'a mut self,
        snapshot: &Snapshot<F>,
        frame: u64,
        wanted: Vec<Run>,
    ) -> Result<Block<'a>, SnapshotError> {
        let damaged = |what| SnapshotError::Damaged {
            offset: frame,
            what,
        };
        let end = snapshot.layout().end();
        let header = header(&snapshot.file, frame, Limits { end })?;
        let body = frame + HEADER_BYTES as u64;
        let most = ZSTD_PAGES * (PAGE_SIZE + RUN_BYTES + 8);
        if header.kind != FrameType::Pages
            || u64::from(header.count) > BLOCK_PAGES
            || header.length as usize > most
            || body + u64::from(header.length) > snapshot.contents
        {
            return Err(damaged("there is no frame of pages"));
        }
        checked(&snapshot.file, &header, body, &mut self.payload)?;
        let (table, coded) = self
            .payload
            .split_at_checked(header.table_bytes())
            .ok_or_else(|| damaged("a frame is shorter than its table"))?;
        let pages = decode_runs(table, &mut self.runs);
        let ascending = self.runs.is_sorted_by(|a, b| a.end() <= b.first);
        // Ascending, so that none is there twice; then as many as are wanted are those that are
        // wanted.
        let found: u64 = self
            .runs
            .iter()
            .flat_map(|run| wanted.iter().map(move |wanted| overlap(*run, *wanted)))
            .sum();
        let expected: u64 = wanted.iter().map(|run| run.count).sum();
        if !ascending || pages > BLOCK_PAGES || found != expected || expected == 0 {
            return Err(damaged("a frame has other pages than the index says"));
        }
        let read = HEADER_BYTES as u64 + u64::from(header.length);
        let bytes = match header.encoding() {
            Encoding::Raw if coded.len() as u64 == pages * PAGE_SIZE as u64 => coded,
            Encoding::Raw => return Err(damaged("a frame's table does not fit its length")),
            encoding => {
                let no_base = &mut |_: Gfn, _: &mut _| Err("a snapshot has no bases".into());
                self.decoder
                    .decode(encoding, &self.runs, coded, no_base)
                    .map_err(|source| SnapshotError::Codec {
                        offset: frame,
                        source,
                    })?
            }
        };
        Ok(Block {
            runs: &self.runs,
            bytes,
            wanted,
            read,
        })
    }
}

fn overlap(a: Run, b: Run) -> u64 {
    a.end().min(b.end()).saturating_sub(a.first.max(b.first))
}
