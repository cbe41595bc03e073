//! Where the pages of a snapshot in the making are in its file.

use super::{BLOCK_PAGES, HEAD_END};
use crate::page::{Gfn, RamLayout, Run};
use crate::wire::encode_runs;

/// Where each page's last contents are.
pub(super) struct Places {
    /// By frame: where it begins.
    pub(super) frames: Vec<u64>,
    /// By page: one more than its frame's number; 0 is zero.
    of_page: Vec<u32>,
    /// Where the next frame goes.
    pub(super) end: u64,
    /// Pages that were written, superseded ones included.
    pub(super) written: u64,
}

impl Places {
    /// All pages are zero, and the first frame goes behind the head.
    pub(super) fn new(layout: &RamLayout) -> Self {
        Self {
            frames: Vec::new(),
            of_page: vec![0; usize::try_from(layout.end()).unwrap_or(usize::MAX)],
            end: HEAD_END,
            written: 0,
        }
    }

    pub(super) fn set(&mut self, run: Run, place: u32) {
        let at = |gfn: Gfn| usize::try_from(gfn).unwrap_or(usize::MAX);
        if let Some(pages) = self.of_page.get_mut(at(run.first)..at(run.end())) {
            pages.fill(place);
        }
    }

    /// The index: runs of pages in one frame, within a region, of at most a block.
    pub(super) fn entries(&self, layout: &RamLayout) -> (Vec<u8>, u64) {
        let mut bytes = Vec::new();
        let mut pages = 0;
        let place = |gfn: Gfn| {
            usize::try_from(gfn)
                .ok()
                .and_then(|at| self.of_page.get(at))
        };
        for region in layout.runs() {
            let mut gfn = region.first;
            while gfn < region.end() {
                let here = place(gfn).copied().unwrap_or(0);
                let first = gfn;
                while gfn < region.end() && gfn - first < BLOCK_PAGES && place(gfn) == Some(&here) {
                    gfn += 1;
                }
                let frame = (here as usize).checked_sub(1);
                if let Some(offset) = frame.and_then(|at| self.frames.get(at)) {
                    let count = gfn - first;
                    pages += count;
                    encode_runs(&[Run::new(first, count)], &mut bytes);
                    bytes.extend_from_slice(&offset.to_le_bytes());
                }
            }
        }
        (bytes, pages)
    }
}
