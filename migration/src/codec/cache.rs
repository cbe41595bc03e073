//! What the destination has: the pages that the source may send as differences.
//!
//! **A base is a page of which both sides hold the very same bytes.** A raw page leaves live guest
//! memory while the guest writes to it: what arrives is a mixture that no side has a copy of, so it
//! is never a base. Only pages that were sent from a copy (packed, compressed, patched, or as they
//! are but from the copy) enter this cache, and a page that is sent in any other way leaves it
//! before a byte of it is sent. The destination keeps the same book from its side
//! ([`AtomicPageSet`](crate::page::AtomicPageSet)) and refuses a difference to a page whose last
//! arrival was not such a copy.
//!
//! What is entered has not been sent yet, and the sending may fail. Then the two sides no longer
//! agree, and about which pages is unknown: [`DeltaCache::doubt`] begins a new generation, and
//! entries of older ones are void.
//!
//! Data channels share the cache, since a page goes out on whichever is free. The rounds of a
//! migration are ordered by a barrier on every data channel, and in a round each page is sent once:
//! so a difference arrives after its base.
//!
//! A page is worth its place while it comes again. Entries count their uses; a new page replaces an
//! old one only where one is found that has none left and was not used in this round or the last,
//! so that a walk over more pages than there is room for keeps hitting those that are here, in
//! place of driving out each just before it is needed.

use super::patch::{Page, ZEROS};
use crate::page::{Gfn, PAGE_BYTES, PAGE_SIZE, Run};
use crate::sync::lock;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

/// Locks, so that data channels seldom meet.
const SHARDS: usize = 16;
/// Pages by which a shard's memory grows (256 KiB).
const GROWTH: usize = 64;
/// Uses that count.
const MOST_USES: u8 = 3;
/// The generation of entries that were taken off.
const VOID: u32 = u32::MAX;
/// Entries looked at for one that may go.
const LOOKS: usize = 8;
/// Pages looked up in the cache after which it must have saved something.
const PROOF: u64 = 4096;

/// The cache of a migration's source.
#[derive(Debug)]
pub struct DeltaCache {
    shards: Vec<Mutex<Shard>>,
    capacity: u64,
    generation: AtomicU32,
    /// Entries in all shards: an empty cache need not be searched.
    held: AtomicU64,
}

#[derive(Debug, Default)]
struct Shard {
    places: HashMap<Gfn, usize>,
    entries: Vec<Entry>,
    pages: Vec<Box<[Page]>>,
    most: usize,
    hand: usize,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    gfn: Gfn,
    generation: u32,
    round: u32,
    uses: u8,
}

impl DeltaCache {
    /// A cache of at most `bytes` of pages, and of no more than the guest has.
    #[must_use]
    pub fn new(bytes: u64, guest_pages: u64) -> Self {
        let capacity = (bytes / PAGE_BYTES).min(guest_pages);
        let most = usize::try_from(capacity.div_ceil(SHARDS as u64)).unwrap_or(usize::MAX);
        let shard = |_| {
            Mutex::new(Shard {
                most,
                ..Shard::default()
            })
        };
        Self {
            shards: (0..SHARDS).map(shard).collect(),
            capacity,
            generation: AtomicU32::new(0),
            held: AtomicU64::new(0),
        }
    }

    /// The most pages that it holds (rounded up to a multiple of its shards).
    #[must_use]
    pub const fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Pages that it holds.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    /// Whether it holds none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn shard(&self, gfn: Gfn) -> MutexGuard<'_, Shard> {
        // Neighbours are often sent by one data channel: they share a lock in groups.
        let shard = usize::try_from(gfn / 16).unwrap_or(0) % SHARDS;
        lock(&self.shards[shard])
    }

    /// Calls `with` with the base of a page, where there is one, and with the place where its new
    /// contents go; so that the base is looked at and replaced under one lock, without being copied
    /// out.
    ///
    /// The new contents count as what the destination has as soon as `with` says so by returning
    /// `true`.
    pub fn exchange(
        &self,
        gfn: Gfn,
        round: u32,
        new: &Page,
        with: impl FnOnce(Option<&Page>) -> bool,
    ) {
        let generation = self.generation.load(Ordering::Acquire);
        let mut shard = self.shard(gfn);
        let place = shard.find(gfn, generation);
        let base = place.map(|place| shard.page(place));
        if !with(base) {
            if let Some(place) = place {
                self.took(shard.void(place));
            }
            return;
        }
        let entry = Entry {
            gfn,
            generation,
            round,
            uses: 0,
        };
        let place = match place {
            Some(place) => {
                let uses = shard.entries[place].uses;
                shard.entries[place] = Entry {
                    uses: (uses + 1).min(MOST_USES),
                    ..entry
                };
                place
            }
            None => {
                let Some((place, replaced)) = shard.place_for(entry) else {
                    return;
                };
                if !replaced {
                    self.held.fetch_add(1, Ordering::Relaxed);
                }
                place
            }
        };
        *shard.page_mut(place) = *new;
    }

    /// Enters a page that goes out as `new`, from a copy.
    pub fn insert(&self, gfn: Gfn, round: u32, new: &Page) {
        self.exchange(gfn, round, new, |_| true);
    }

    /// These pages go out in a way that leaves no copy: they are no bases any more.
    pub fn forget(&self, run: Run) {
        if self.is_empty() {
            return;
        }
        for gfn in run.first..run.end() {
            let mut shard = self.shard(gfn);
            if let Some(place) = shard.places.get(&gfn).copied() {
                self.took(shard.void(place));
            }
        }
    }

    /// A sending failed: whatever was entered may not be what the destination has.
    pub fn doubt(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
    }

    fn took(&self, one: bool) {
        if one {
            self.held.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Shard {
    /// The place of a page of this generation.
    fn find(&self, gfn: Gfn, generation: u32) -> Option<usize> {
        let place = *self.places.get(&gfn)?;
        (self.entries.get(place)?.generation == generation).then_some(place)
    }

    fn page(&self, place: usize) -> &Page {
        self.pages
            .get(place / GROWTH)
            .map_or(&ZEROS, |pages| &pages[place % GROWTH])
    }

    fn page_mut(&mut self, place: usize) -> &mut Page {
        &mut self.pages[place / GROWTH][place % GROWTH]
    }

    /// Takes a page off; its place is the first to be used again. `false` when it was off already.
    fn void(&mut self, place: usize) -> bool {
        let gfn = self.entries[place].gfn;
        self.entries[place].generation = VOID;
        self.hand = place;
        self.places.remove(&gfn).is_some()
    }

    /// A place for a new page, and whether another page lost it; `None` when all that were looked
    /// at are worth more.
    fn place_for(&mut self, entry: Entry) -> Option<(usize, bool)> {
        // One of an older generation is replaced where it lies.
        if let Some(place) = self.places.get(&entry.gfn).copied() {
            self.entries[place] = entry;
            return Some((place, true));
        }
        if self.entries.len() < self.most {
            let place = self.entries.len();
            if place.is_multiple_of(GROWTH) {
                // All at once, so that its memory grows by steps and not page by page.
                let more = GROWTH.min(self.most - place);
                self.pages
                    .push(vec![[0; PAGE_SIZE]; more].into_boxed_slice());
                self.entries.reserve(more);
                self.places.reserve(more);
            }
            self.entries.push(entry);
            self.places.insert(entry.gfn, place);
            return Some((place, false));
        }
        for _ in 0..LOOKS.min(self.entries.len()) {
            let place = self.hand % self.entries.len();
            self.hand = place + 1;
            let old = &mut self.entries[place];
            let idle = old.round.saturating_add(1) < entry.round;
            if old.generation != entry.generation || (old.uses == 0 && idle) {
                let lost = old.gfn;
                *old = entry;
                // A void entry's page may have another place by now.
                let replaced = self.places.get(&lost) == Some(&place);
                if replaced {
                    self.places.remove(&lost);
                }
                self.places.insert(entry.gfn, place);
                return Some((place, replaced));
            }
            if idle {
                old.uses -= 1;
            }
        }
        None
    }
}

/// Whether looking pages up in the cache is worth it, by what that has saved lately.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Proof {
    pages: u64,
    saved: u64,
    /// Pages that are sent without it before it is tried again, and how many the next time.
    rest: u64,
    pause: u64,
}

impl Proof {
    /// So many pages were looked up, which saved so many bytes.
    pub(super) fn record(&mut self, pages: u64, saved: u64) {
        self.pages += pages;
        self.saved += saved;
        if self.pages >= PROOF {
            // A thirtieth of what was looked up.
            if 30 * self.saved < self.pages * PAGE_BYTES {
                self.pause = (2 * self.pause).max(4 * PROOF);
                self.rest = self.pause;
            } else {
                self.pause = 0;
            }
            (self.pages, self.saved) = (0, 0);
        }
    }

    /// Whether so many pages are to be looked up.
    pub(super) fn wants(&mut self, pages: u64) -> bool {
        let wants = self.rest == 0;
        self.rest = self.rest.saturating_sub(pages);
        wants
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn page(value: u64) -> Page {
        let mut page = [0; PAGE_SIZE];
        page[..8].copy_from_slice(&value.to_le_bytes());
        page[PAGE_SIZE - 8..].copy_from_slice(&value.to_le_bytes());
        page
    }

    fn base_of(cache: &DeltaCache, gfn: Gfn, round: u32, new: u64) -> Option<Page> {
        let mut found = None;
        cache.exchange(gfn, round, &page(new), |base| {
            found = base.copied();
            true
        });
        found
    }

    proptest! {
        /// Whatever happens: a base is always what was sent last, and from a copy.
        #[test]
        fn a_base_is_what_was_sent_last(
            steps in proptest::collection::vec((0..40_u64, 0..20_u8), 1..400),
            capacity in 0..40_u64,
        ) {
            let cache = DeltaCache::new(capacity * PAGE_BYTES, 1000);
            let mut sent: BTreeMap<Gfn, u64> = BTreeMap::new();
            for (at, (gfn, what)) in (1_u64..).zip(steps) {
                let round = (at / 10) as u32;
                match what {
                    0 => {
                        cache.doubt();
                        sent.clear();
                    }
                    1 | 2 => {
                        let run = Run::new(gfn, u64::from(what) * 3);
                        cache.forget(run);
                        sent.retain(|gfn, _| !(run.first..run.end()).contains(gfn));
                    }
                    3 => {
                        cache.exchange(gfn, round, &page(at), |_| false);
                        sent.remove(&gfn);
                    }
                    _ => {
                        if let Some(base) = base_of(&cache, gfn, round, at) {
                            prop_assert_eq!(Some(base), sent.get(&gfn).copied().map(page));
                        }
                        sent.insert(gfn, at);
                    }
                }
                prop_assert!(cache.len() <= cache.capacity().next_multiple_of(SHARDS as u64));
                let counted: usize = cache.shards.iter().map(|s| s.lock().unwrap().places.len()).sum();
                prop_assert_eq!(counted as u64, cache.len());
            }
        }
    }

    #[test]
    fn it_is_never_larger_than_the_guest() {
        assert_eq!(DeltaCache::new(u64::MAX, 100).capacity(), 100);
        let none = DeltaCache::new(PAGE_BYTES - 1, 100);
        assert_eq!(none.capacity(), 0);
        none.insert(5, 1, &page(1));
        assert!(none.is_empty());
    }

    /// A walk over twice as many pages as there is room for, again and again: half of them hit,
    /// where the plain least-recently-used rule would hit none.
    #[test]
    fn a_long_walk_does_not_drive_everything_out() {
        let (room, walk) = (512, 1024);
        let cache = DeltaCache::new(room * PAGE_BYTES, walk);
        let mut hits = 0;
        for round in 1..=10 {
            hits += (0..walk)
                .filter(|gfn| base_of(&cache, *gfn, round, 1).is_some())
                .count();
        }
        assert!(hits >= 4000, "{hits} of 9216");
    }

    /// What is no longer written makes room for what is.
    #[test]
    fn the_cold_make_room() {
        let cache = DeltaCache::new(512 * PAGE_BYTES, 4096);
        for round in 1..=6 {
            (0..512).for_each(|gfn| cache.insert(gfn, round, &page(gfn)));
        }
        let mut last = 0;
        for round in 7..=40 {
            last = (1024..1400)
                .filter(|gfn| base_of(&cache, *gfn, round, 1).is_some())
                .count();
        }
        assert!(last >= 350, "{last} of 376");
    }
}
