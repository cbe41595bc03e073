//! Sets of pages on the wire: as a run table or as a bitmap, whichever is shorter.

use super::{Channel, FrameType, Header, RUN_BYTES, WireError, decode_runs, encode_runs};
use crate::page::{Gfn, PageSet, RamLayout, Run};
use crate::port::Link;

/// Entries of 8 bytes in one frame: 1 MiB.
const ENTRIES: usize = 128 << 10;
/// Pages in one entry of a run table.
const RUN_PAGES: u64 = 1 << 16;

/// Sends a set as frames of type `MissingRuns` or `MissingBits`; none for the empty set.
///
/// # Errors
/// [`WireError::Io`].
pub fn send_set<L: Link>(channel: &mut Channel<L>, set: &PageSet) -> Result<(), WireError> {
    let Some(first) = set.next(0) else {
        return Ok(());
    };
    let words = set.words();
    let start = usize::try_from(first / 64).unwrap_or(0);
    let used = words.len() - words.iter().rev().take_while(|word| **word == 0).count();
    let bits = &words[start..used];
    let entries = set
        .runs()
        .map(|run| run.count.div_ceil(RUN_PAGES))
        .sum::<u64>();
    if entries < bits.len() as u64 {
        let mut runs = set.runs().flat_map(split).peekable();
        while let Some(next) = runs.peek() {
            let first = next.first;
            let part: Vec<Run> = runs.by_ref().take(ENTRIES).collect();
            let mut table = Vec::with_capacity(part.len() * RUN_BYTES);
            encode_runs(&part, &mut table);
            send_part(channel, FrameType::MissingRuns, first, &table)?;
        }
    } else {
        let mut gfn = start as u64 * 64;
        for part in bits.chunks(ENTRIES) {
            let bytes: Vec<u8> = part.iter().flat_map(|word| word.to_le_bytes()).collect();
            send_part(channel, FrameType::MissingBits, gfn, &bytes)?;
            gfn += part.len() as u64 * 64;
        }
    }
    Ok(())
}

/// Runs that an entry of a table can hold.
fn split(run: Run) -> impl Iterator<Item = Run> {
    (run.first..run.end())
        .step_by(1 << 16)
        .map(move |first| Run::new(first, (run.end() - first).min(RUN_PAGES)))
}

fn send_part<L: Link>(
    channel: &mut Channel<L>,
    kind: FrameType,
    gfn: Gfn,
    bytes: &[u8],
) -> Result<(), WireError> {
    let header = Header {
        gfn,
        count: u32::try_from(bytes.len() / 8).unwrap_or(u32::MAX),
        ..Header::bare(kind, 0)
    };
    channel.send(header, bytes)
}

/// Receives the rest of a `MissingRuns` or `MissingBits` frame into the set.
///
/// # Errors
/// [`WireError`]; [`WireError::NotRam`] when a page is not the guest's.
pub fn recv_set<L: Link>(
    channel: &mut Channel<L>,
    header: &Header,
    layout: &RamLayout,
    into: &mut PageSet,
) -> Result<(), WireError> {
    let mut bytes = Vec::new();
    channel.recv_payload(header, &mut bytes)?;
    let mut part = PageSet::new(layout.end());
    if header.kind == FrameType::MissingRuns {
        let mut runs = Vec::new();
        decode_runs(&bytes, &mut runs);
        if let Some(bad) = runs.iter().find(|run| run.end() > layout.end()) {
            return Err(WireError::NotRam {
                gfn: bad.first,
                count: bad.count,
            });
        }
        for run in runs {
            part.insert_run(run);
        }
    } else {
        let words: Vec<u64> = bytes
            .as_chunks::<8>()
            .0
            .iter()
            .map(|word| u64::from_le_bytes(*word))
            .collect();
        part.insert_words(header.gfn, &words);
    }
    if let Some(run) = layout.first_outside(&part) {
        return Err(WireError::NotRam {
            gfn: run.first,
            count: run.count,
        });
    }
    into.union_with(&part);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Loopback;
    use proptest::prelude::*;

    fn there_and_back(set: &PageSet, layout: &RamLayout) -> (PageSet, u64) {
        let mut channel = Channel::new(Loopback::default());
        channel.set_end(layout.end());
        send_set(&mut channel, set).unwrap();
        let bytes = channel.sent();
        let mut back = PageSet::new(layout.end());
        while channel.link().readable().unwrap() {
            let header = channel.recv_header().unwrap();
            recv_set(&mut channel, &header, layout, &mut back).unwrap();
        }
        (back, bytes)
    }

    #[test]
    fn everything_is_a_few_bytes_and_noise_is_a_bitmap() {
        let layout = RamLayout::new(vec![Run::new(0, 300_000), Run::new(1 << 20, 77)]).unwrap();
        let (back, bytes) = there_and_back(&layout.all(), &layout);
        assert!(back == layout.all() && bytes < 100, "{bytes}");
        let layout = RamLayout::new(vec![Run::new(0, 300_000)]).unwrap();
        let mut noise = PageSet::new(layout.end());
        for gfn in (0..layout.end()).step_by(2) {
            noise.insert(gfn);
        }
        let (back, bytes) = there_and_back(&noise, &layout);
        assert!(back == noise && bytes < 300_000 / 8 + 200, "{bytes}");
    }

    #[test]
    fn pages_outside_the_layout_are_refused() {
        let layout = RamLayout::new(vec![Run::new(0, 100), Run::new(200, 100)]).unwrap();
        for run in [Run::new(90, 20), Run::new(150, 1), Run::new(299, 1000)] {
            let mut table = Vec::new();
            encode_runs(&[run], &mut table);
            let mut channel = Channel::new(Loopback::default());
            channel.set_end(layout.end());
            send_part(&mut channel, FrameType::MissingRuns, run.first, &table).unwrap();
            let header = channel.recv_header().unwrap();
            let mut set = PageSet::new(layout.end());
            let error = recv_set(&mut channel, &header, &layout, &mut set).unwrap_err();
            assert!(
                error.to_string().contains("not the guest's memory"),
                "{error}"
            );
            assert!(set.is_empty());
        }
    }

    proptest! {
        #[test]
        fn any_set_arrives_as_it_was(runs in proptest::collection::vec((0u64..5000, 1u64..300), 0..60)) {
            let layout = RamLayout::new(vec![Run::new(0, 5000)]).unwrap();
            let mut set = PageSet::new(5000);
            for (first, count) in runs {
                set.insert_run(Run::new(first, count));
            }
            prop_assert!(there_and_back(&set, &layout).0 == set);
        }
    }
}
