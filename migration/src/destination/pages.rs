//! Receiving page frames into guest memory.

use super::error::DestinationError;
use super::hashes::Hashes;
use super::missing_pages::MissingPages;
use crate::codec::Decoder;
use crate::page::{PAGE_BYTES, PAGE_SIZE, RamLayout, Run};
use crate::port::{Link, PageSink};
use crate::wire::{
    Channel, Encoding, FLAG_CRC, FLAG_TELL, FrameType, Header, HeaderError, WireError, check_crc,
    decode_runs,
};
use std::sync::Arc;

/// Reusable buffers of one channel.
#[derive(Debug, Default)]
pub(super) struct PageReceiver {
    table: Vec<u8>,
    runs: Vec<Run>,
    /// What is decoded, or placed as a whole in post-copy.
    body: Vec<u8>,
    decoder: Decoder,
    /// Of which pages it is told that they were written.
    hashes: Option<Arc<Hashes>>,
}

impl PageReceiver {
    /// For what was agreed on.
    pub(super) fn new(decoder: Decoder, hashes: Option<Arc<Hashes>>) -> Self {
        Self {
            decoder,
            hashes,
            ..Self::default()
        }
    }

    /// Receives the rest of a `Pages` or `Zero` frame into memory, checking the table before a
    /// byte is placed.
    pub(super) fn receive<L: Link, S: PageSink<L> + ?Sized>(
        &mut self,
        channel: &mut Channel<L>,
        header: &Header,
        sink: &S,
        layout: &RamLayout,
    ) -> Result<(), DestinationError> {
        let received = self.receive_runs(channel, header, sink, layout);
        // Also where only a part was written.
        if let Some(hashes) = &self.hashes {
            hashes.written(&self.runs);
        }
        received
    }

    fn receive_runs<L: Link, S: PageSink<L> + ?Sized>(
        &mut self,
        channel: &mut Channel<L>,
        header: &Header,
        sink: &S,
        layout: &RamLayout,
    ) -> Result<(), DestinationError> {
        let mut crc = self.table(channel, header, layout)?;
        let whole = is_whole(header);
        if is_coded(header) {
            return self.receive_coded(channel, header, crc, sink);
        }
        self.decoder.arrived_otherwise(&self.runs);
        if header.kind == FrameType::Zero {
            return self
                .runs
                .iter()
                .try_for_each(|run| sink.zero(*run))
                .map_err(DestinationError::Memory);
        }
        sink.receive(channel.link(), &self.runs)
            .map_err(WireError::Io)?;
        if whole {
            let mut page = [0; PAGE_SIZE];
            for gfn in self.runs.iter().flat_map(|run| run.first..run.end()) {
                sink.copy_page(gfn, &mut page)
                    .map_err(DestinationError::Memory)?;
                crc = crc32c::crc32c_append(crc, &page);
            }
            check_crc(header, crc)?;
        }
        Ok(())
    }

    /// Receives the body of a coded frame whose table was read; it is checked before it is decoded.
    fn coded_body<L: Link>(
        &mut self,
        channel: &mut Channel<L>,
        header: &Header,
        table_crc: u32,
    ) -> Result<(), DestinationError> {
        let pages = self.runs.iter().map(|run| run.count).sum();
        self.decoder
            .admit(header.encoding(), pages, header.body_bytes())?;
        channel.recv_part(header.body_bytes(), &mut self.body)?;
        Ok(check_crc(
            header,
            crc32c::crc32c_append(table_crc, &self.body),
        )?)
    }

    /// Receives and decodes the pages of `runs`; nothing is placed that was not checked.
    fn receive_coded<L: Link, S: PageSink<L> + ?Sized>(
        &mut self,
        channel: &mut Channel<L>,
        header: &Header,
        table_crc: u32,
        sink: &S,
    ) -> Result<(), DestinationError> {
        self.coded_body(channel, header, table_crc)?;
        let base = &mut |gfn, page: &mut _| sink.copy_page(gfn, page);
        let mut pages = self
            .decoder
            .decode(header.encoding(), &self.runs, &self.body, base)?;
        for run in &self.runs {
            let bytes = usize::try_from(run.count * PAGE_BYTES).unwrap_or(usize::MAX);
            let (these, rest) = pages.split_at_checked(bytes).unwrap_or((pages, &[]));
            sink.write(*run, these).map_err(DestinationError::Memory)?;
            pages = rest;
        }
        self.decoder.placed(&self.runs);
        Ok(())
    }

    /// As [`receive`](Self::receive), for a guest that runs already: pages are placed as a whole,
    /// and only those that are missing.
    pub(super) fn receive_to<L: Link, S: PageSink<L>>(
        &mut self,
        channel: &mut Channel<L>,
        header: &Header,
        missing_pages: &MissingPages<L, S>,
    ) -> Result<(), DestinationError> {
        let crc = self.table(channel, header, &missing_pages.layout)?;
        if header.kind == FrameType::Zero {
            return missing_pages.place(&self.runs, None);
        }
        if !is_whole(header) {
            // They hold still at the source: there is no reason not to have a checksum.
            return Err(WireError::Unexpected {
                kind: header.kind,
                round: header.round,
                expected: "pages with a checksum",
            }
            .into());
        }
        if is_coded(header) {
            self.coded_body(channel, header, crc)?;
            // Each page comes once: there is nothing here that it could differ from.
            let base = &mut |_, _: &mut _| Err("the guest runs here already".into());
            let pages = self
                .decoder
                .decode(header.encoding(), &self.runs, &self.body, base)?;
            return missing_pages.place(&self.runs, Some(pages));
        }
        missing_pages
            .sink()?
            .fetch(channel.link(), &self.runs, &mut self.body)
            .map_err(WireError::Io)?;
        check_crc(header, crc32c::crc32c_append(crc, &self.body))?;
        missing_pages.place(&self.runs, Some(&self.body))
    }

    /// Receives the run table and checks it; returns its checksum.
    fn table<L: Link>(
        &mut self,
        channel: &mut Channel<L>,
        header: &Header,
        layout: &RamLayout,
    ) -> Result<u32, DestinationError> {
        channel.recv_part(header.table_bytes(), &mut self.table)?;
        let crc = crc32c::crc32c(&self.table);
        if !is_whole(header) {
            // Live pages may change under a checksum; their table does not.
            check_crc(header, crc)?;
        }
        let listed = decode_runs(&self.table, &mut self.runs);
        if let Some(bad) = self.runs.iter().find(|run| !layout.contains(**run)) {
            return Err(DestinationError::NotRam {
                gfn: bad.first,
                count: bad.count,
            });
        }
        let held = header.body_pages();
        if header.kind == FrameType::Pages && !is_coded(header) && listed != held {
            return Err(WireError::from(HeaderError::Table { listed, held }).into());
        }
        Ok(crc)
    }
}

/// Whether the checksum covers the pages as well as their table.
const fn is_whole(header: &Header) -> bool {
    matches!(header.kind, FrameType::Pages) && header.flags & FLAG_CRC != 0
}

/// Whether the pages are coded.
fn is_coded(header: &Header) -> bool {
    header.kind == FrameType::Pages && header.encoding() != Encoding::Raw
}

/// Says that the pages of a frame are in place, if it asks for that.
pub(super) fn tell_placed<L: Link>(
    channel: &mut Channel<L>,
    header: &Header,
) -> Result<(), DestinationError> {
    if header.flags & FLAG_TELL != 0 {
        channel.send(Header::bare(FrameType::Placed, header.round), &[])?;
    }
    Ok(())
}
