//! What the guest writes to: the dirty log, watched over a few intervals.

use crate::page::{Gfn, PageSet};
use crate::policy::View;
use std::time::Duration;

/// Intervals that are remembered: one bit each in a page's mask.
pub(super) const INTERVALS: usize = 8;
/// Pages of a region: 2 MiB.
pub(super) const REGION: u64 = 512;
const REGION_PAGES: usize = 512;

/// In which of the last intervals each page was written.
#[derive(Debug, Default)]
pub(super) struct Observed {
    /// How long the intervals were, in seconds; the newest last.
    pub(super) lengths: Vec<f64>,
    /// Bit *i* of a page's mask: it was written in interval *i*.
    masks: Vec<u8>,
    /// Pages that were written in any interval.
    ever: Option<PageSet>,
    since: Option<Duration>,
}

impl Observed {
    /// The log was cleared: an interval begins.
    pub(super) const fn begin(&mut self, view: &View<'_>) {
        self.since = Some(view.elapsed);
    }

    /// How long the current interval has lasted, in seconds.
    pub(super) fn lasted(&self, view: &View<'_>) -> f64 {
        self.since.map_or(0.0, |since| {
            view.elapsed.saturating_sub(since).as_secs_f64()
        })
    }

    /// Takes what was written in the current interval; the log is to be cleared next.
    pub(super) fn end(&mut self, view: &View<'_>) {
        let length = self.lasted(view);
        if length <= 0.0 {
            return;
        }
        self.masks
            .resize(usize::try_from(view.written.end()).unwrap_or(0), 0);
        if self.lengths.len() == INTERVALS {
            self.lengths.remove(0);
            self.masks.iter_mut().for_each(|mask| *mask >>= 1);
        }
        match &mut self.ever {
            Some(ever) => ever.union_with(view.written),
            None => self.ever = Some(view.written.clone()),
        }
        let bit = 1 << self.lengths.len();
        for gfn in view.written.iter() {
            if let Some(mask) = usize::try_from(gfn)
                .ok()
                .and_then(|at| self.masks.get_mut(at))
            {
                *mask |= bit;
            }
        }
        self.lengths.push(length);
    }

    /// Pages that were written in any interval, or since.
    pub(super) fn ever(&self, since: &PageSet) -> PageSet {
        let mut ever = since.clone();
        if let Some(before) = &self.ever {
            ever.union_with(before);
        }
        ever
    }

    /// In which intervals the page was written.
    pub(super) fn mask(&self, gfn: Gfn) -> u8 {
        usize::try_from(gfn)
            .ok()
            .and_then(|at| self.masks.get(at))
            .copied()
            .unwrap_or(0)
    }

    /// Whether each region of 2 MiB was written at all, up to `end`.
    pub(super) fn regions(&self, end: Gfn) -> Vec<bool> {
        let count = usize::try_from(end.div_ceil(REGION)).unwrap_or(0);
        let mut regions: Vec<bool> = self
            .masks
            .chunks(REGION_PAGES)
            .map(|region| region.iter().any(|mask| *mask != 0))
            .collect();
        regions.resize(count, false);
        regions
    }
}
