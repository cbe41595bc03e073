//! Pages through a link that codes its bytes: they cannot go from the socket to guest memory by
//! themselves.

use std::io;

use ferry_migration::page::{PAGE_SIZE, Run};
use ferry_migration::port::Link;

use super::StreamLink;
use crate::memory::GuestRam;

/// Pages that are copied at once: 16 records of TLS (256 KiB), which stay in a processor's
/// second-level cache.
const PAGES: usize = 64;

/// Sends `head` and then the pages of `runs`.
pub(super) fn send(
    ram: &GuestRam,
    link: &mut StreamLink,
    mut head: &[u8],
    runs: &[Run],
) -> io::Result<()> {
    let mut copy = link.take_copy(PAGES * PAGE_SIZE);
    let mut full = 0;
    let pages = runs.iter().flat_map(|run| run.first..run.end());
    for gfn in pages {
        let (pages, _) = copy.as_chunks_mut::<PAGE_SIZE>();
        let into = pages.get_mut(full).ok_or(io::ErrorKind::InvalidInput)?;
        ram.copy_page(gfn, into)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        full += 1;
        if full == PAGES {
            link.send(head, &copy)?;
            (head, full) = (&[], 0);
        }
    }
    if full > 0 || !head.is_empty() {
        link.send(head, &copy[..full * PAGE_SIZE])?;
    }
    link.keep_copy(copy);
    Ok(())
}

/// Receives a run of pages; `fresh` ones hold nothing yet.
pub(super) fn receive(
    ram: &GuestRam,
    link: &mut StreamLink,
    run: Run,
    fresh: bool,
) -> io::Result<()> {
    let mut copy = link.take_copy(PAGES * PAGE_SIZE);
    let (mut at, end) = (run.first, run.end());
    while at < end {
        let pages = (end - at).min(PAGES as u64);
        let bytes = usize::try_from(pages).map_err(io::Error::other)? * PAGE_SIZE;
        link.recv(&mut copy[..bytes])?;
        ram.write_decoded(at, &copy[..bytes], fresh)?;
        at += pages;
    }
    link.keep_copy(copy);
    Ok(())
}
