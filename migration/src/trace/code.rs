//! Page sets as bytes: runs or a bitmap.

use super::Kind;
use crate::page::{PageSet, RamLayout, Run};

/// Appends a number, seven bits a byte, the lowest first.
fn put(mut number: u64, to: &mut Vec<u8>) {
    while number >= 0x80 {
        to.push((number & 0x7f) as u8 | 0x80);
        number >>= 7;
    }
    to.push((number & 0x7f) as u8);
}

/// Takes a number off the front.
fn take(from: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = from.split_first()?;
        *from = rest;
        let bits = u64::from(byte & 0x7f);
        if shift > 0 && bits >= 1 << (64 - shift).min(7) {
            return None;
        }
        number |= bits << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

/// The longest payload that a frame over `layout` can have: its bitmap.
pub(super) fn longest(layout: &RamLayout) -> u64 {
    layout.end().div_ceil(64) * 8
}

/// Writes a set in its shorter form.
pub(super) fn encode(pages: &PageSet, into: &mut Vec<u8>) -> Kind {
    into.clear();
    let bitmap = pages.words().len() * 8;
    let mut end = 0;
    for run in pages.runs() {
        put(run.first - end, into);
        put(run.count - 1, into);
        end = run.end();
        if into.len() >= bitmap {
            into.clear();
            into.extend(pages.words().iter().flat_map(|word| word.to_le_bytes()));
            let length = into
                .iter()
                .rposition(|&byte| byte != 0)
                .map_or(0, |at| at + 1);
            into.truncate(length);
            return Kind::Bitmap;
        }
    }
    Kind::Runs
}

/// Reads a set into `pages`, adding to it; an error is what is wrong.
pub(super) fn decode(
    kind: Kind,
    bytes: &[u8],
    layout: &RamLayout,
    pages: &mut PageSet,
) -> Result<(), &'static str> {
    match kind {
        Kind::End if bytes.is_empty() => Ok(()),
        Kind::End => Err("is an end and has contents"),
        Kind::Bitmap => {
            pages.insert_words(0, &words(bytes));
            Ok(())
        }
        Kind::Runs => each_run(bytes, layout, |run| pages.insert_run(run)),
    }
}

/// How many pages a set has, all of them RAM; an error is what is wrong. Takes time by its bytes,
/// not by the layout: a small file may have many small frames, and claim to be of a large guest.
pub(super) fn check(kind: Kind, bytes: &[u8], layout: &RamLayout) -> Result<u64, &'static str> {
    let (mut pages, mut ram) = (0, 0);
    let mut count = |run: Run| {
        pages += run.count;
        let within = |region: &Run| {
            let end = run.end().min(region.end());
            end.saturating_sub(run.first.max(region.first))
        };
        ram += layout.runs().iter().map(within).sum::<u64>();
    };
    match kind {
        Kind::End => decode(kind, bytes, layout, &mut PageSet::new(0))?,
        Kind::Bitmap => {
            let words = words(bytes);
            let mut set = PageSet::new(64 * words.len() as u64);
            set.insert_words(0, &words);
            set.runs().for_each(count);
        }
        Kind::Runs => each_run(bytes, layout, &mut count)?,
    }
    if ram < pages {
        return Err("has pages that are no RAM");
    }
    Ok(pages)
}

fn words(bytes: &[u8]) -> Vec<u64> {
    let word = |chunk: &[u8]| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        u64::from_le_bytes(word)
    };
    bytes.chunks(8).map(word).collect()
}

/// The runs of a frame of runs, up to the first that cannot be.
fn each_run(
    mut bytes: &[u8],
    layout: &RamLayout,
    mut each: impl FnMut(Run),
) -> Result<(), &'static str> {
    let mut end: u64 = 0;
    while !bytes.is_empty() {
        let number = "has a number that does not end";
        let gap = take(&mut bytes).ok_or(number)?;
        let count = take(&mut bytes).ok_or(number)?.checked_add(1);
        let first = end.checked_add(gap);
        let (Some(first), Some(count)) = (first, count) else {
            return Err("has a run beyond all memory");
        };
        end = first
            .checked_add(count)
            .filter(|&end| end <= layout.end())
            .ok_or("has a run beyond the guest's memory")?;
        each(Run::new(first, count));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn numbers_come_back(number: u64, rest: u8) {
            let mut bytes = Vec::new();
            put(number, &mut bytes);
            bytes.push(rest);
            let mut from = bytes.as_slice();
            prop_assert_eq!(take(&mut from), Some(number));
            prop_assert_eq!(from, &[rest][..]);
        }

        #[test]
        fn any_bytes_are_a_set_within_the_memory_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..64), bitmap: bool) {
            let layout = RamLayout::new(vec![Run::new(0, 100), Run::new(200, 100)]).unwrap();
            let mut pages = PageSet::new(layout.end());
            let kind = if bitmap { Kind::Bitmap } else { Kind::Runs };
            let decoded = decode(kind, &bytes, &layout, &mut pages);
            prop_assert!(pages.iter().all(|gfn| gfn < 300));
            if let Ok(count) = check(kind, &bytes, &layout) {
                prop_assert_eq!(decoded, Ok(()));
                prop_assert_eq!(count, pages.len());
                prop_assert!(pages.runs().all(|run| layout.contains(run)));
            }
        }

        #[test]
        fn sets_come_back_in_at_most_a_bitmap(list in proptest::collection::vec(0..1000_u64, 0..600), runs in proptest::collection::vec((0..1000_u64, 1..200_u64), 0..5)) {
            let layout = RamLayout::new(vec![Run::new(0, 1000)]).unwrap();
            let mut set = PageSet::new(1000);
            list.into_iter().for_each(|gfn| { set.insert(gfn); });
            runs.into_iter().for_each(|(first, count)| set.insert_run(Run::new(first, count)));
            let mut bytes = Vec::new();
            let kind = encode(&set, &mut bytes);
            prop_assert!(bytes.len() as u64 <= longest(&layout));
            let mut back = PageSet::new(1000);
            prop_assert_eq!(decode(kind, &bytes, &layout, &mut back), Ok(()));
            prop_assert_eq!(back, set);
        }
    }

    #[test]
    fn a_number_of_more_than_64_bits_is_refused() {
        assert_eq!(take(&mut [0xff; 10].as_slice()), None);
        assert_eq!(
            take(&mut [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02].as_slice()),
            None
        );
        assert_eq!(take(&mut [0x80; 3].as_slice()), None);
    }
}
