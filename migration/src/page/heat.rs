//! How often pages are written.

use super::{Gfn, PageSet};

/// How often a page was found dirty: saturating counters, halved now and then so that the past
/// fades. Used to send pages that are dirtied often late in a round
/// (dynamic page transfer reordering, Svärd 2012).
#[derive(Clone, Debug)]
pub struct Heat {
    counts: Vec<u8>,
    collections: u32,
}

impl Heat {
    /// Counters are halved after this many collections.
    const HALF_LIFE: u32 = 32;

    /// Cold pages `0..end`.
    #[must_use]
    pub fn new(end: Gfn) -> Self {
        Self {
            counts: vec![0; usize::try_from(end).unwrap_or(usize::MAX)],
            collections: 0,
        }
    }

    /// Counts one collection of the dirty log.
    pub fn record(&mut self, dirty: &PageSet) {
        self.collections += 1;
        if self.collections.is_multiple_of(Self::HALF_LIFE) {
            for count in &mut self.counts {
                *count /= 2;
            }
        }
        for gfn in dirty.iter() {
            if let Some(count) = usize::try_from(gfn)
                .ok()
                .and_then(|i| self.counts.get_mut(i))
            {
                *count = count.saturating_add(1);
            }
        }
    }

    /// Sets how often the page was found dirty.
    pub(crate) fn set(&mut self, gfn: Gfn, count: u8) {
        if let Some(at) = usize::try_from(gfn)
            .ok()
            .and_then(|i| self.counts.get_mut(i))
        {
            *at = count;
        }
    }

    /// How often the page was found dirty, lately.
    #[must_use]
    pub fn of(&self, gfn: Gfn) -> u8 {
        usize::try_from(gfn)
            .ok()
            .and_then(|i| self.counts.get(i))
            .copied()
            .unwrap_or(0)
    }
}
