//! Receiving page frames into guest memory.

use super::DestinationError;
use super::arriving::Arriving;
use crate::page::{PAGE_SIZE, RamLayout, Run};
use crate::port::{Link, PageSink};
use crate::wire::{
    Channel, FLAG_CRC, FrameType, Header, HeaderError, WireError, check_crc, decode_runs,
};

/// Reusable buffers of one channel.
#[derive(Debug, Default)]
pub(super) struct PageReceiver {
    table: Vec<u8>,
    runs: Vec<Run>,
    /// Pages that are placed as a whole, in post-copy.
    body: Vec<u8>,
}

impl PageReceiver {
    /// Receives the rest of a `Pages` or `Zero` frame into memory, checking the table before a
    /// byte is placed.
    pub(super) fn receive<L: Link, S: PageSink<L> + ?Sized>(
        &mut self,
        channel: &mut Channel<L>,
        header: &Header,
        sink: &S,
        layout: &RamLayout,
    ) -> Result<(), DestinationError> {
        let mut crc = self.table(channel, header, layout)?;
        let whole = is_whole(header);
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

    /// As [`receive`](Self::receive), for a guest that runs already: pages are placed as a whole, and
    /// only those that are missing.
    pub(super) fn receive_to<L: Link, S: PageSink<L>>(
        &mut self,
        channel: &mut Channel<L>,
        header: &Header,
        arriving: &Arriving<L, S>,
    ) -> Result<(), DestinationError> {
        let crc = self.table(channel, header, &arriving.layout)?;
        if header.kind == FrameType::Zero {
            return arriving.place(&self.runs, None);
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
        arriving
            .sink()?
            .fetch(channel.link(), &self.runs, &mut self.body)
            .map_err(WireError::Io)?;
        check_crc(header, crc32c::crc32c_append(crc, &self.body))?;
        arriving.place(&self.runs, Some(&self.body))
    }

    /// Receives the run table and checks it; returns its checksum.
    fn table<L: Link>(
        &mut self,
        channel: &mut Channel<L>,
        header: &Header,
        layout: &RamLayout,
    ) -> Result<u32, DestinationError> {
        self.table.clear();
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
        if header.kind == FrameType::Pages && listed != held {
            return Err(WireError::from(HeaderError::Table { listed, held }).into());
        }
        Ok(crc)
    }
}

/// Whether the checksum covers the pages as well as their table.
const fn is_whole(header: &Header) -> bool {
    matches!(header.kind, FrameType::Pages) && header.flags & FLAG_CRC != 0
}
