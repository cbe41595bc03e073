//! What the data channels of a migration share when they code pages.

use super::adaptive::{Chooser, Level};
use super::cache::DeltaCache;
use crate::options::{Compress, Options};
use crate::page::{AtomicPageSet, Gfn};
use crate::sync::lock;
use crate::wire::Features;
use std::sync::{Arc, Mutex, MutexGuard};

/// What the data channels of a migration share.
#[derive(Clone, Debug, Default)]
pub struct Coding {
    pub(super) kind: Compress,
    pub(super) patches: bool,
    pub(super) zstd: bool,
    /// What the destination has, where patches of it may be sent.
    pub(super) cache: Option<Arc<DeltaCache>>,
    /// Pages that were sent before: only those are worth a place in the cache, unless one is free.
    pub(super) seen: Arc<AtomicPageSet>,
    /// The cache has a place for every page.
    pub(super) roomy: bool,
    /// What is decided for all of them: they share link and processors, and one that is seldom used
    /// has no time to learn.
    pub(super) chooser: Option<Arc<Mutex<Chooser>>>,
}

impl Coding {
    /// What the options may use of what was `agreed` on, for a guest of so many pages below `end`.
    #[must_use]
    pub fn new(options: &Options, agreed: Features, guest_pages: u64, end: Gfn) -> Self {
        let kind = options.compress;
        let patches = kind.patches() && agreed.has(Features::PATCH);
        let zstd = kind.zstd() && agreed.has(Features::ZSTD);
        let cache = DeltaCache::new(options.delta_cache, guest_pages);
        let useful = patches && cache.capacity() > 0;
        // Seconds that a byte takes at least, by the user's cap.
        let floor = options.bandwidth.map_or(0.0, |cap| 1.0 / cap as f64);
        let kind = if patches || zstd {
            kind
        } else {
            Compress::None
        };
        let start = match kind {
            Compress::Auto => Some(Level::Raw),
            Compress::Adaptive if zstd => Some(Level::Full),
            Compress::Adaptive => Some(Level::Patch),
            Compress::None | Compress::Zstd | Compress::Delta => None,
        };
        Self {
            kind,
            patches,
            zstd,
            roomy: cache.capacity() >= guest_pages,
            seen: Arc::new(AtomicPageSet::new(if useful { end } else { 0 })),
            cache: useful.then(|| Arc::new(cache)),
            chooser: start.map(|level| Arc::new(Mutex::new(Chooser::new(level, floor)))),
        }
    }

    /// Whether the cache has a free place that none of so many pages to come needs more.
    pub(super) fn has_room(&self, warmer: u64) -> bool {
        let cache = self.cache.as_ref();
        cache.is_some_and(|cache| cache.len().saturating_add(warmer) < cache.capacity())
    }

    pub(super) fn chooser(&self) -> Option<MutexGuard<'_, Chooser>> {
        let chooser = self.chooser.as_ref()?;
        Some(lock(chooser))
    }
}
