//! Writing pages: data channels take blocks of a pass in turn, code them and write each to a place
//! of its own.

use super::{SaveError, WriteAt};
use crate::codec::{Batch, Encoder};
use crate::page::{Gfn, PAGE_SIZE, PageSet, RamLayout, Run};
use crate::port::{Clock, Link, SourceVm};
use crate::report::Codecs;
use crate::sender::{split, table_header};
use crate::snapshot::BLOCK_PAGES;
use crate::snapshot::places::Places;
use crate::sync::lock;
use crate::wire::{FLAG_CRC, FrameType, HEADER_BYTES, Header, Limits, decode_runs, encode_runs};
use std::sync::Mutex;

/// A thread's buffers.
#[derive(Default)]
pub(super) struct DataChannel {
    encoder: Encoder,
    batch: Vec<Run>,
    zero: Vec<Run>,
    data: Vec<Run>,
    out: Vec<u8>,
    table: Vec<Run>,
    scratch: Vec<u64>,
    pub(super) codecs: Codecs,
}

impl DataChannel {
    pub(super) fn new(encoder: Encoder) -> Self {
        Self {
            encoder,
            ..Self::default()
        }
    }
}

/// What the data channels share.
pub(super) struct Shared<'a, G, W> {
    pub(super) guest: &'a G,
    pub(super) file: &'a W,
    pub(super) clock: &'a dyn Clock,
    pub(super) cancelled: &'a (dyn Fn() -> bool + Sync),
    pub(super) layout: RamLayout,
    pub(super) places: Mutex<Places>,
}

/// One pass over a set of pages: what is left of it.
struct Pass<'a> {
    pages: &'a PageSet,
    at: Mutex<Gfn>,
    /// Pages are taken off the dirty log before they are read.
    live: bool,
}

impl Pass<'_> {
    /// The next block; `false` when there is none.
    fn next(&self, layout: &RamLayout, into: &mut Vec<Run>) -> bool {
        into.clear();
        let mut at = lock(&self.at);
        let mut room = BLOCK_PAGES;
        while room > 0 {
            let Some(mut run) = self.pages.next_run(*at, room) else {
                break;
            };
            // A run lies in one region.
            let region = layout.runs().iter().find(|r| run.first < r.end());
            if let Some(region) = region {
                run.count = run.count.min(region.end().saturating_sub(run.first)).max(1);
            }
            *at = run.end();
            room -= run.count;
            into.push(run);
        }
        !into.is_empty()
    }
}

impl<G, W: WriteAt> Shared<'_, G, W> {
    /// Writes the pages of a set as they are now.
    pub(super) fn pass<L: Link>(
        &self,
        data_channels: &mut [DataChannel],
        pages: &PageSet,
        live: bool,
    ) -> Result<(), SaveError>
    where
        G: SourceVm<L>,
    {
        let pass = Pass {
            pages,
            at: Mutex::new(0),
            live,
        };
        let work = |data_channel: &mut DataChannel| -> Result<(), SaveError> {
            while pass.next(&self.layout, &mut data_channel.batch) {
                if (self.cancelled)() {
                    return Err(SaveError::Cancelled);
                }
                self.block::<L>(data_channel, pass.live)?;
            }
            Ok(())
        };
        let Some((first, others)) = data_channels.split_first_mut() else {
            return Ok(());
        };
        std::thread::scope(|scope| {
            let work = &work;
            let threads: Vec<_> = others
                .iter_mut()
                // Fewer threads than there might be: the others do their part.
                .map_while(|data_channel| {
                    let thread = std::thread::Builder::new();
                    thread.spawn_scoped(scope, move || work(data_channel)).ok()
                })
                .collect();
            let mut result = work(first);
            for thread in threads {
                let other = thread.join().unwrap_or(Err(SaveError::Broken));
                result = result.and(other);
            }
            result
        })
    }

    /// Codes and writes a data channel's block.
    fn block<L: Link>(&self, data_channel: &mut DataChannel, live: bool) -> Result<(), SaveError>
    where
        G: SourceVm<L>,
    {
        if live {
            // Taken off first, read after: what is written from here on is dirty again.
            self.guest
                .clear_dirty(&data_channel.batch, &mut data_channel.scratch)
                .map_err(SaveError::Guest)?;
        }
        split(
            self.guest,
            &data_channel.batch,
            &mut data_channel.zero,
            &mut data_channel.data,
        );
        data_channel.out.clear();
        let coded = data_channel.encoder.encode(
            &mut Batch {
                data: &mut data_channel.data,
                round: 0,
                warmer: 0,
                data_channels: 1,
                copy: &mut |gfn, into| self.guest.copy_page(gfn, into),
                out: &mut data_channel.out,
            },
            self.clock,
        );
        let coded = coded.map_err(SaveError::Guest)?;
        data_channel.codecs.join(&coded.codecs);
        self.put_raw::<L>(data_channel, coded.raw)?;
        let offset = {
            let mut places = lock(&self.places);
            let offset = places.end;
            places.end += data_channel.out.len() as u64;
            offset
        };
        let began = self.clock.now();
        write(self.file, &data_channel.out, offset)?;
        let link = self.clock.now().saturating_sub(began);
        data_channel
            .encoder
            .sent(&coded, data_channel.out.len() as u64, link);
        self.note(data_channel, offset);
        Ok(())
    }

    /// Appends a frame of what no coder took. From a copy: the checksum is of what is written,
    /// whatever the guest does.
    fn put_raw<L: Link>(&self, data_channel: &mut DataChannel, pages: u64) -> Result<(), SaveError>
    where
        G: SourceVm<L>,
    {
        let Some(first) = data_channel.data.first() else {
            return Ok(());
        };
        let at = data_channel.out.len();
        data_channel.out.resize(at + HEADER_BYTES, 0);
        encode_runs(&data_channel.data, &mut data_channel.out);
        let mut page = [0; PAGE_SIZE];
        for gfn in data_channel
            .data
            .iter()
            .flat_map(|run| run.first..run.end())
        {
            self.guest
                .copy_page(gfn, &mut page)
                .map_err(SaveError::Guest)?;
            data_channel.out.extend_from_slice(&page);
        }
        let header = Header {
            flags: FLAG_CRC,
            payload_crc: crc32c::crc32c(&data_channel.out[at + HEADER_BYTES..]),
            ..table_header(
                FrameType::Pages,
                first.first,
                data_channel.data.len(),
                pages,
                0,
            )
        };
        data_channel.out[at..at + HEADER_BYTES].copy_from_slice(&header.encode());
        Ok(())
    }

    /// Enters the frames of a block that was written at `offset`.
    fn note(&self, data_channel: &mut DataChannel, offset: u64) {
        let limits = Limits {
            end: self.layout.end(),
        };
        let mut places = lock(&self.places);
        data_channel.zero.iter().for_each(|run| places.set(*run, 0));
        let mut at = 0;
        while let Some(head) = data_channel
            .out
            .get(at..)
            .and_then(|rest| rest.first_chunk())
        {
            // Our own frames, a moment ago.
            let Ok(header) = Header::decode(head, limits) else {
                debug_assert!(false, "a frame of our own cannot be read");
                return;
            };
            let table = at + HEADER_BYTES;
            let entries = &data_channel.out[table..table + header.table_bytes()];
            places.written += decode_runs(entries, &mut data_channel.table);
            places.frames.push(offset + at as u64);
            let place = u32::try_from(places.frames.len()).unwrap_or(u32::MAX);
            data_channel
                .table
                .iter()
                .for_each(|run| places.set(*run, place));
            at = table + header.length as usize;
        }
    }
}

pub(super) fn write<W: WriteAt>(file: &W, bytes: &[u8], offset: u64) -> Result<(), SaveError> {
    file.write_at(bytes, offset)
        .map_err(|source| SaveError::Write { offset, source })
}
