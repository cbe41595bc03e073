//! With `--verify`: hashes of the source's pages, which the destination compares with its own.

use super::engine::Source;
use super::error::SourceError;
use super::freeing::freed;
use crate::page::{PAGE_SIZE, PageSet, Run};
use crate::port::{Link, SourceVm};
use crate::verify::page_hash;
use crate::wire::{FrameType, Header};

/// Hashes in one VERIFY frame, of 16 MiB of memory: the destination compares them while the source
/// hashes the next.
const VERIFY_PAGES: u64 = 4 << 10;

impl<L: Link, G: SourceVm<L>> Source<'_, '_, L, G> {
    /// With `--verify`, in the pause: hashes of all disks, and of these pages but for those whose
    /// hashes still hold.
    pub(super) fn send_all_hashes(&mut self, mut pages: PageSet) -> Result<(), SourceError> {
        if !self.session.setup.options.verify {
            return Ok(());
        }
        let began = self.now();
        self.send_block_hashes()?;
        if let Some(hashed) = &self.memory.hashed {
            pages.subtract(hashed);
        }
        self.send_hashes(&pages)?;
        self.record.hashing = self.now().saturating_sub(began);
        Ok(())
    }

    /// With `--verify`, once, while the guest runs: hashes of all pages that the destination has,
    /// so that in the pause only what is written from now on is hashed. A page that is written
    /// while it is hashed is in the dirty log, and is hashed again with the others. Says whether it
    /// did that.
    pub(super) fn hash_live(&mut self) -> Result<bool, SourceError> {
        let wanted = self.session.setup.options.verify && self.session.live_hashes;
        if !wanted || self.memory.hashed.is_some() {
            return Ok(false);
        }
        let mut pages = self.memory.sent_once.clone();
        pages.subtract(&self.memory.pending);
        self.memory.hashed = Some(pages.clone());
        self.send_hashes(&pages)?;
        // No page of a later round may come on a data channel before these are compared.
        self.settle()?;
        Ok(true)
    }

    /// Sends a hash of every page of the set, so that the destination can compare.
    pub(super) fn send_hashes(&mut self, pages: &PageSet) -> Result<(), SourceError> {
        let mut page = [0; PAGE_SIZE];
        let mut hashes: Vec<u8> = Vec::new();
        let mut at = 0;
        while let Some(run) = pages.next_run(at, VERIFY_PAGES) {
            at = run.end();
            self.session.check()?;
            self.keep_alive()?;
            hashes.clear();
            // The guest stands still: what holds nothing stays so, and reading it would make the
            // host populate it.
            let mut hole = self.guest.unpopulated(run);
            let freed = freed(self.guest.freeing());
            let freed = freed.filter(|freed| !freed.is_empty());
            for gfn in run.first..run.end() {
                if let Some(freed) = freed.as_ref().filter(|freed| freed.contains(gfn)) {
                    let hash = freed.hash(gfn).ok_or(SourceError::GivenBack { gfn })?;
                    hashes.extend_from_slice(&hash.to_le_bytes());
                    continue;
                }
                if hole.is_some_and(|hole| gfn >= hole.end()) {
                    hole = self.guest.unpopulated(Run::new(gfn, run.end() - gfn));
                }
                if hole.is_some_and(|hole| gfn >= hole.first) {
                    page.fill(0);
                } else {
                    self.guest
                        .copy_page(gfn, &mut page)
                        .map_err(|e| SourceError::guest("hashing guest memory", e))?;
                }
                hashes.extend_from_slice(&page_hash(gfn, &page).to_le_bytes());
            }
            let header = Header {
                gfn: run.first,
                count: u32::try_from(run.count).unwrap_or(u32::MAX),
                ..Header::bare(FrameType::Verify, self.flight.round)
            };
            self.session.control.send(header, &hashes)?;
        }
        Ok(())
    }
}
