//! Dynamic self-ballooning: how large the balloon shall be, so that memory which the guest does not
//! use is not its own.
//!
//! After Hines and Gopalan's DSB ("Post-Copy Live Migration of Virtual Machines", their slides on
//! the balloon driver): inflate on an interval, deflate under memory pressure. A pure function of
//! what the guest says about its memory, without a clock: who calls it says how much time has
//! passed.
//!
//! ```text
//!  available
//!      ▲         inflate, on the interval, by half of what is above the goal
//!      │ ─────── goal + band
//!      │         nothing: the two thresholds are apart, so that noise moves nothing
//!      │ ─────── reserve            (goal = reserve + band)
//!      │         deflate at once, up to the goal
//! ```
//!
//! Pressure that the amount does not show (swapping, stalled allocations, processes killed, pages
//! that the guest takes back unasked, as Linux does before it kills) deflates too, and forbids
//! inflating for a number of intervals. All numbers are the guest's own and may be lies: they are
//! bounded by its RAM, and harm only the guest itself.

use std::time::Duration;

use super::{PAGE, Statistics};
pub use crate::state::Settings;

/// Intervals without inflating after pressure.
const CALM: u32 = 4;
/// Intervals without inflating after the guest ran out of memory.
const CALM_AFTER_OOM: u32 = 12;
/// Statistics that are asked for in an interval: pressure is seen so much sooner.
const SAMPLES: u32 = 5;
/// More page faults that need I/O than this in a second: the guest reads back what it had cached.
const FAULTING: u64 = 100;

impl Settings {
    /// The slides' interval.
    pub const INTERVAL_MS: u32 = 5000;
    /// What an interval can be, in milliseconds: a second is five questions to the guest, and a day
    /// is never.
    pub const INTERVALS_MS: std::ops::RangeInclusive<u32> = 500..=3_600_000;

    /// Those for a guest with `ram` bytes: a twentieth of it stays available, 16 MiB at least and 1
    /// GiB at most.
    #[must_use]
    pub fn for_ram(ram: u64) -> Self {
        Self {
            interval_ms: Self::INTERVAL_MS,
            reserve_bytes: (ram / 20).clamp(16 << 20, 1 << 30).min(ram / 2),
        }
    }

    /// Within what can be meant, for a guest with `ram` bytes: settings may have come over a
    /// network.
    #[must_use]
    pub fn bounded(self, ram: u64) -> Self {
        let (least, most) = Self::INTERVALS_MS.into_inner();
        Self {
            interval_ms: self.interval_ms.clamp(least, most),
            reserve_bytes: self.reserve_bytes.clamp(PAGE, (ram / 2).max(PAGE)),
        }
    }

    /// Between two steps of inflating.
    #[must_use]
    pub fn interval(&self) -> Duration {
        Duration::from_millis(u64::from(self.interval_ms))
    }

    /// Between two questions to the guest.
    #[must_use]
    pub fn sampling(&self) -> Duration {
        self.interval() / SAMPLES
    }
}

/// What is known at a moment.
#[derive(Debug, Clone, Copy)]
pub struct Sample<'a> {
    /// What the guest says.
    pub statistics: &'a Statistics,
    /// Pages in the balloon when it said that.
    pub actual: u32,
    /// Pages that it was asked for until now.
    pub target: u32,
    /// Whether inflating is of use now.
    pub may_inflate: bool,
}

/// What a step did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Nothing.
    Keep,
    /// The balloon grows.
    Inflate,
    /// The guest gave less than it was asked for, and is not asked any more.
    Settle,
    /// The balloon shrinks: less than the reserve is available.
    Short,
    /// The balloon shrinks: the guest swaps, or waits for memory.
    Strained,
    /// The balloon shrinks: the guest is out of memory, and takes pages back or kills for them.
    OutOfMemory,
}

/// The counters of a sample; what counts is that they grow.
#[derive(Debug, Clone, Copy)]
struct Seen {
    actual: u32,
    swap_out: Option<u64>,
    stalls: Option<u64>,
    kills: Option<u64>,
    faults: Option<u64>,
}

/// Decides on the balloon's size from one sample to the next.
#[derive(Debug, Clone)]
pub struct Controller {
    ram: u64,
    reserve: u64,
    interval: Duration,
    last: Option<Seen>,
    /// Since the balloon was last moved.
    still: Duration,
    /// Since the guest last gave or took pages.
    idle: Duration,
    /// Until it may be inflated.
    calm: Duration,
}

impl Controller {
    /// For a guest with `ram` bytes.
    #[must_use]
    pub fn new(settings: Settings, ram: u64) -> Self {
        let settings = settings.bounded(ram);
        Self {
            ram: ram / PAGE,
            reserve: (settings.reserve_bytes / PAGE).max(1),
            interval: settings.interval(),
            last: None,
            still: Duration::ZERO,
            idle: Duration::ZERO,
            calm: Duration::ZERO,
        }
    }

    /// Between the threshold below which the balloon shrinks and the size that it shrinks to, and
    /// again to the one above which it grows.
    fn band(&self) -> u64 {
        (self.reserve / 4).max(1)
    }

    fn goal(&self) -> u64 {
        self.reserve + self.band()
    }

    /// The balloon's next size in pages, and why; `passed` is the time since the step before.
    pub fn step(&mut self, sample: &Sample<'_>, passed: Duration) -> (u32, Step) {
        self.still = self.still.saturating_add(passed);
        self.calm = self.calm.saturating_sub(passed);
        let told = sample.statistics;
        let seen = Seen {
            actual: sample.actual,
            swap_out: told.swap_out,
            stalls: told.allocation_stalls,
            kills: told.oom_kills,
            faults: told.major_faults,
        };
        let last = self.last.replace(seen);
        self.idle = match last {
            Some(last) if last.actual == sample.actual => self.idle.saturating_add(passed),
            _ => Duration::ZERO,
        };
        let Some(available) = told.available_memory.or(told.free_memory) else {
            return (sample.target, Step::Keep);
        };
        let available = (available / PAGE).min(self.ram);
        let actual = u64::from(sample.actual).min(self.ram);
        let short_of = self.goal().saturating_sub(available);

        if let Some(last) = last {
            // Pages that are not in the balloon any more are unrequested. (A driver that starts
            // anew looks the same.)
            let unasked = sample.actual < last.actual && sample.target >= last.actual;
            if unasked || grew(last.kills, seen.kills) > 0 {
                let back = short_of.max(actual / 2);
                return self.shrink(sample, actual, back, CALM_AFTER_OOM, Step::OutOfMemory);
            }
            if grew(last.swap_out, seen.swap_out) > 0 || grew(last.stalls, seen.stalls) > 0 {
                let back = short_of.max(self.band());
                return self.shrink(sample, actual, back, CALM, Step::Strained);
            }
        }
        if available < self.reserve {
            return self.shrink(sample, actual, short_of, 1, Step::Short);
        }
        if sample.actual < sample.target {
            // It gives as it can. What it could not give for an interval it needs.
            if self.idle.min(self.still) < self.interval {
                return (sample.target, Step::Keep);
            }
            self.moved(CALM);
            return (sample.actual, Step::Settle);
        }
        let faulting = last.is_some_and(|last| {
            let faults = u128::from(grew(last.faults, seen.faults)) * 1000;
            faults > u128::from(FAULTING) * passed.as_millis()
        });
        let surplus = available.saturating_sub(self.goal());
        if !sample.may_inflate
            || sample.actual > sample.target
            || faulting
            || !self.calm.is_zero()
            || self.still < self.interval
            || surplus <= self.band()
        {
            return (sample.target, Step::Keep);
        }
        // By halves, so that caches which are of use are seen to be; the rest is not worth many
        // steps.
        let more = (surplus / 2).max((self.ram / 64).min(surplus));
        let most = self.ram.saturating_sub(self.goal());
        let size = pages((actual + more).min(most));
        if size <= sample.target {
            return (sample.target, Step::Keep);
        }
        self.moved(0);
        (size, Step::Inflate)
    }

    /// Takes `back` pages from what is in the balloon, unless as many were asked back already.
    fn shrink(
        &mut self,
        sample: &Sample<'_>,
        actual: u64,
        back: u64,
        calm: u32,
        step: Step,
    ) -> (u32, Step) {
        self.moved(calm);
        let size = pages(actual.saturating_sub(back));
        if size < sample.target {
            (size, step)
        } else {
            (sample.target, Step::Keep)
        }
    }

    fn moved(&mut self, calm: u32) {
        self.still = Duration::ZERO;
        self.calm = self.calm.max(self.interval * calm);
    }
}

/// By how much a counter has grown. One that went back belongs to a guest that started anew.
fn grew(before: Option<u64>, now: Option<u64>) -> u64 {
    match (before, now) {
        (Some(before), Some(now)) => now.saturating_sub(before),
        _ => 0,
    }
}

fn pages(count: u64) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
