//! The guest as it was observed: a sample of its pages, and what it will write to them.

use super::super::{Activity, Start, Touch};
use super::observe::{INTERVALS, Observed, REGION};
use super::rates::Rates;
use crate::page::{Gfn, Heat, PageSet, RamLayout, Run};
use crate::policy::View;
use crate::rng::Rng;

/// Pages of the sample: what is pending is then known to 1 %, and a prediction takes milliseconds.
pub(super) const SAMPLE: u64 = 4096;
/// Of the pages written only once, this share of what chance would write twice: fewer, and the
/// guest walks.
const REPEATED: f64 = 0.5;

/// A sample of a guest, and where its migration stands.
#[derive(Clone, Debug)]
pub(super) struct Sample {
    /// Its pages: as many as the sample has.
    pub(super) layout: RamLayout,
    /// Pages of the guest that each stands for.
    pub(super) stands_for: f64,
    /// What is pending and what was sent.
    pub(super) start: Start,
    /// Writes per second to each page, as places in `speeds`; the first is none.
    classes: Vec<u8>,
    speeds: Vec<f64>,
    /// Pages that are written one after the other, and how many a second.
    walk: (Vec<Gfn>, f64),
}

impl Sample {
    /// From what was observed; `None` where there is no memory.
    pub(super) fn new(view: &View<'_>, observed: &Observed) -> Option<Self> {
        let every = view.total_pages.div_ceil(SAMPLE).max(1);
        let ram = ram_of(view);
        let mut rng = Rng::new(view.total_pages);
        // One page, anywhere, of each so many.
        let mut pages = Vec::new();
        let mut at = 0;
        while let Some(run) = ram.next_run(at, every) {
            at = run.end();
            pages.push(run.first + rng.below(run.count));
        }
        let count = pages.len() as u64;
        let layout = RamLayout::new(vec![Run::new(0, count)]).ok()?;
        let regions = observed.regions(view.pending.end());
        let warm = |gfn: Gfn| {
            let region = usize::try_from(gfn / REGION).unwrap_or(usize::MAX);
            regions.get(region).copied().unwrap_or(false)
        };
        let mut counts = [0.0; 1 << INTERVALS];
        for gfn in ram.iter().filter(|gfn| warm(*gfn)) {
            counts[usize::from(observed.mask(gfn))] += 1.0;
        }
        let walks = walks(&counts, &observed.lengths);
        if walks.is_some() {
            // Whom it is not known to come back to, it will not come back to soon.
            (1..1 << INTERVALS)
                .filter(|mask: &usize| mask.is_power_of_two())
                .for_each(|mask| counts[mask] = 0.0);
        }
        let rates = Rates::fit(&counts, &observed.lengths);
        let draw = rates.draw();
        let (mut pending, mut sent) = (PageSet::new(count), PageSet::new(count));
        let mut classes = Vec::with_capacity(pages.len());
        let mut heat = Heat::new(count);
        let mut walk = Vec::new();
        for (index, gfn) in (0..).zip(&pages) {
            if view.pending.contains(*gfn) {
                pending.insert(index);
            }
            if view.sent.contains(*gfn) {
                sent.insert(index);
            }
            let mask = observed.mask(*gfn);
            let once = mask.count_ones() <= 1;
            let class = if walks.is_some() && once {
                walk.push((index, mask));
                0
            } else if warm(*gfn) {
                draw(mask, &mut rng)
            } else {
                0
            };
            // Warmer ones go later, and the engine knows how often a page was found dirty.
            heat.set(index, class / 2);
            classes.push(class);
        }
        let stands_for = view.total_pages as f64 / count as f64;
        Some(Self {
            layout,
            stands_for,
            start: Start {
                pending,
                sent,
                heat,
            },
            classes,
            speeds: rates.into_speeds(),
            walk: (
                ahead(walk, observed.lengths.len()),
                walks.unwrap_or(0.0) / stands_for,
            ),
        })
    }

    /// Pages of the guest that are written within so many seconds, at least once.
    pub(super) fn written_in(&self, seconds: f64) -> f64 {
        let written = self.shares(seconds);
        let often: f64 = self
            .classes
            .iter()
            .map(|class| written[usize::from(*class)])
            .sum();
        let walked = (self.walk.1 * seconds).min(self.walk.0.len() as f64);
        (often + walked) * self.stands_for
    }
}

impl Sample {
    /// By class, the share of pages that are written within so many seconds.
    fn shares(&self, seconds: f64) -> Vec<f64> {
        let share = |speed: &f64| 1.0 - (-speed * seconds).exp();
        self.speeds.iter().map(share).collect()
    }
}

/// All RAM: what is pending or was sent.
fn ram_of(view: &View<'_>) -> PageSet {
    let mut ram = view.pending.clone();
    ram.union_with(view.sent);
    ram
}

/// Pages per second of a guest that writes one page after the other; `None` where chance explains
/// what was seen.
fn walks(counts: &[f64; 1 << INTERVALS], lengths: &[f64]) -> Option<f64> {
    let all: f64 = lengths.iter().sum();
    let (mut once, mut twice) = (0.0, 0.0);
    for (mask, count) in counts.iter().enumerate() {
        match mask.count_ones() {
            1 => once += count,
            2 => twice += count,
            _ => {}
        }
    }
    if once < 64.0 || lengths.len() < 2 || all <= 0.0 {
        return None;
    }
    // Pages of the same regions that were written never, once and twice: Poisson's λ by the first
    // two, and the third.
    let mean = once / counts[0].max(once / 4.0);
    let expected = once * mean / 2.0;
    // Intervals hide that a page was written twice in one of them.
    let hidden: f64 = lengths.iter().map(|length| (length / all).powi(2)).sum();
    let expected = expected * (1.0 - hidden);
    (expected > 16.0 && twice < REPEATED * expected).then_some(once / all)
}

/// The pages of a walk, those that come next first: behind those of the newest interval.
fn ahead(mut walk: Vec<(Gfn, u8)>, intervals: usize) -> Vec<Gfn> {
    let newest = 1_u8 << intervals.saturating_sub(1).min(INTERVALS - 1);
    let last = walk.iter().rposition(|(_, mask)| *mask == newest);
    walk.rotate_left(last.map_or(0, |last| last + 1));
    walk.into_iter().map(|(index, _)| index).collect()
}

/// What a sampled guest does from now on.
#[derive(Clone, Debug)]
pub(super) struct Future<'a> {
    sample: &'a Sample,
    active: Vec<(Gfn, u8)>,
    rng: Rng,
    now: f64,
    /// Time is taken in steps of so many seconds.
    step: f64,
    walked: f64,
    /// First touches from when pages are asked for one by one, the next one last.
    touches: Option<Vec<Touch>>,
}

impl<'a> Future<'a> {
    pub(super) fn new(sample: &'a Sample, step: f64) -> Self {
        let classes = (0..).zip(sample.classes.iter().copied());
        Self {
            sample,
            active: classes.filter(|(_, class)| *class > 0).collect(),
            rng: Rng::new(7),
            now: 0.0,
            step,
            walked: 0.0,
            touches: None,
        }
    }

    fn walk_at(&self, index: f64) -> Option<Gfn> {
        let walk = &self.sample.walk.0;
        let index = crate::numbers::pages_in(index);
        let index = index.checked_rem(walk.len() as u64)?;
        walk.get(usize::try_from(index).ok()?).copied()
    }

    /// The first touch of every page from now on: no other matters once the guest has moved.
    fn first_touches(&mut self) -> Vec<Touch> {
        let mut touches: Vec<Touch> = Vec::with_capacity(self.active.len());
        for (gfn, class) in &self.active {
            let speed = self.sample.speeds[usize::from(*class)];
            let wait = -(1.0 - self.rng.unit()).ln() / speed;
            touches.push(Touch {
                at: self.now + wait,
                gfn: *gfn,
            });
        }
        let rate = self.sample.walk.1;
        if rate > 0.0 {
            touches.extend((0..self.sample.walk.0.len()).filter_map(|n| {
                let gfn = self.walk_at(self.walked + n as f64)?;
                let at = self.now + (n + 1) as f64 / rate;
                Some(Touch { at, gfn })
            }));
        }
        touches.sort_by(|a, b| b.at.total_cmp(&a.at));
        touches
    }
}

impl Activity for Future<'_> {
    fn peek(&mut self) -> Option<Touch> {
        if self.touches.is_none() {
            self.touches = Some(self.first_touches());
        }
        self.touches
            .as_ref()
            .and_then(|touches| touches.last().copied())
    }

    fn pop(&mut self) {
        if let Some(touches) = &mut self.touches {
            touches.pop();
        }
    }

    fn advance(&mut self, to: f64, marks: &mut PageSet) {
        let passed = to - self.now;
        if passed < self.step {
            return;
        }
        self.now = to;
        let written = self.sample.shares(passed);
        for (gfn, class) in &self.active {
            if !marks.contains(*gfn) && self.rng.unit() < written[usize::from(*class)] {
                marks.insert(*gfn);
            }
        }
        let until = self.walked + self.sample.walk.1 * passed;
        let mut at = self.walked.ceil();
        while at < until && at < self.walked + self.sample.walk.0.len() as f64 {
            if let Some(gfn) = self.walk_at(at) {
                marks.insert(gfn);
            }
            at += 1.0;
        }
        self.walked = until;
    }
}
