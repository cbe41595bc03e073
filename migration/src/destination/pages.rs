//! Receiving page frames into guest memory.

use super::DestinationError;
use crate::codec::Decoder;
use crate::page::{PAGE_BYTES, PAGE_SIZE, RamLayout, Run};
use crate::port::{Link, PageSink};
use crate::wire::{
    Channel, Encoding, FLAG_CRC, FrameType, Header, HeaderError, WireError, check_crc, decode_runs,
};

/// Reusable buffers of one channel.
#[derive(Debug, Default)]
pub(super) struct PageReceiver {
    table: Vec<u8>,
    runs: Vec<Run>,
    body: Vec<u8>,
    decoder: Decoder,
}

impl PageReceiver {
    /// For what was agreed on.
    pub(super) fn new(decoder: Decoder) -> Self {
        Self {
            decoder,
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
        self.table.clear();
        channel.recv_part(header.table_bytes(), &mut self.table)?;
        let mut crc = crc32c::crc32c(&self.table);
        let whole = header.kind == FrameType::Pages && header.flags & FLAG_CRC != 0;
        if !whole {
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
        if header.kind == FrameType::Pages && header.encoding() != Encoding::Raw {
            return self.receive_coded(channel, header, crc, listed, sink);
        }
        self.decoder.arrived_otherwise(&self.runs);
        if header.kind == FrameType::Zero {
            return self
                .runs
                .iter()
                .try_for_each(|run| sink.zero(*run))
                .map_err(DestinationError::Memory);
        }
        let held = header.body_pages();
        if listed != held {
            return Err(WireError::from(HeaderError::Table { listed, held }).into());
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

    /// Receives and decodes the pages of `runs`; nothing is placed that was not checked.
    fn receive_coded<L: Link, S: PageSink<L> + ?Sized>(
        &mut self,
        channel: &mut Channel<L>,
        header: &Header,
        table_crc: u32,
        listed: u64,
        sink: &S,
    ) -> Result<(), DestinationError> {
        let encoding = header.encoding();
        self.decoder.admit(encoding, listed, header.body_bytes())?;
        self.body.clear();
        channel.recv_part(header.body_bytes(), &mut self.body)?;
        check_crc(header, crc32c::crc32c_append(table_crc, &self.body))?;
        let base = &mut |gfn, page: &mut _| sink.copy_page(gfn, page);
        let mut pages = self
            .decoder
            .decode(encoding, &self.runs, &self.body, base)?;
        for run in &self.runs {
            let bytes = usize::try_from(run.count * PAGE_BYTES).unwrap_or(usize::MAX);
            let (these, rest) = pages.split_at_checked(bytes).unwrap_or((pages, &[]));
            sink.write(*run, these).map_err(DestinationError::Memory)?;
            pages = rest;
        }
        self.decoder.placed(&self.runs);
        Ok(())
    }
}
