//! The writer: dirties pages at a chosen rate and checks every page it ever wrote.
//!
//! Each page carries its number, its generation and words that follow from both and the seed.
//! Before a page is written again its old contents are verified in full; the generation is also
//! kept in a table apart from the pages, so that a page that went back to an older, consistent
//! state is found as well. At the end every page is verified, and the generations are added up and
//! compared with the number of writes made.

mod access;
mod content;

use crate::math::index;
use crate::team::{Hooks, Parts, Team, share};
use access::Access;
use content::Shape;
pub use content::{Corruption, Fill};
use core::sync::atomic::{AtomicBool, Ordering};

/// Bytes of a page.
pub const PAGE_BYTES: u64 = 4096;

/// Words of a page.
const WORDS: usize = 512;

/// A page as 64-bit words.
pub type Page = [u64; WORDS];

/// In what order pages of the working set are written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pattern {
    /// One after the other, round and round.
    Sequential,
    /// Any page as likely as any other.
    Uniform,
    /// The k-th most popular page with a probability proportional to k^-exponent; the popular ones
    /// lie scattered.
    Zipf {
        /// How skewed: 0.99 is customary.
        exponent: f64,
    },
}

impl Pattern {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Sequential => "sequential",
            Self::Uniform => "uniform",
            Self::Zipf { .. } => "zipf",
        }
    }

    pub(crate) fn parse(name: &str) -> Option<Self> {
        let zipf = Self::Zipf { exponent: 0.99 };
        [Self::Sequential, Self::Uniform, zipf]
            .into_iter()
            .find(|pattern| pattern.name() == name)
    }
}

/// What the writer does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dirty {
    /// Pages that are written over and over; 0 for an idle guest.
    pub working_set_pages: u64,
    /// Pages per second over all ranks; 0 for as fast as it can.
    pub rate: u64,
    /// In what order.
    pub pattern: Pattern,
    /// What the pages hold.
    pub fill: Fill,
    /// Bytes at the start of a page that a write changes, a multiple of 8 from 16 to 4096; the rest
    /// of the page stays as it was filled.
    pub part: usize,
    /// When to stop by itself, in seconds after the set-up; 0 for never.
    pub seconds: u64,
    /// What the contents and the order follow from.
    pub seed: u64,
}

impl Default for Dirty {
    fn default() -> Self {
        Self {
            working_set_pages: 4096,
            rate: 5000,
            pattern: Pattern::Uniform,
            fill: Fill::Random,
            part: WORDS * 8,
            seconds: 0,
            seed: 1,
        }
    }
}

/// The memory the writer has.
#[derive(Debug)]
pub struct Memory<'a> {
    /// The working set comes first; the rest is filled once.
    pub pages: &'a mut [Page],
    /// One element for each page of the working set.
    pub generations: &'a mut [u32],
}

/// What the writer found in the end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Pages verified at the end.
    pub pages: u64,
    /// Pages written in the steady state.
    pub writes: u64,
    /// Mismatches found, during the run and at the end.
    pub corrupt: u64,
    /// Whether nothing was corrupt and every write is accounted for.
    pub verified: bool,
}

/// The working set does not fit the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooSmall {
    /// Pages of the working set.
    pub needed: u64,
    /// Pages that there are.
    pub given: u64,
}

impl core::fmt::Display for TooSmall {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(
            f,
            "the working set has {} pages and the memory only {}; give the guest more memory or a smaller wss",
            self.needed, self.given
        )
    }
}

impl core::error::Error for TooSmall {}

/// One rank's share: some of the working set and some of the rest.
struct Slice<'a> {
    first: u64,
    pages: &'a mut [Page],
    generations: &'a mut [u32],
    first_filled: u64,
    filled: &'a mut [Page],
    writes: u64,
    corrupt: u64,
}

/// Fills the memory, writes until told to stop or the time is over, and verifies everything.
///
/// # Errors
/// [`TooSmall`] if the working set does not fit.
pub fn run(
    dirty: &Dirty,
    memory: Memory<'_>,
    team: &impl Team,
    hooks: &impl Hooks,
) -> Result<Verdict, TooSmall> {
    let working_set = index(dirty.working_set_pages);
    let too_small = TooSmall {
        needed: dirty.working_set_pages,
        given: memory.pages.len() as u64,
    };
    let (mut pages, mut filled) = memory
        .pages
        .split_at_mut_checked(working_set)
        .ok_or(too_small)?;
    let mut generations = memory.generations.get_mut(..working_set).ok_or(too_small)?;
    if dirty.fill == Fill::None {
        filled = &mut [];
    }
    let (ranks, rest) = (team.size(), filled.len());
    let slices = (0..ranks).map(|rank| {
        let mine = share(working_set, ranks, rank);
        let also = share(rest, ranks, rank);
        Slice {
            first: mine.start as u64,
            pages: take(&mut pages, mine.len()),
            generations: take(&mut generations, mine.len()),
            first_filled: (working_set + also.start) as u64,
            filled: take(&mut filled, also.len()),
            writes: 0,
            corrupt: 0,
        }
    });
    let mut slices = Parts::new(slices);

    slices.run(team, |rank, slice| slice.set_up(dirty, hooks, rank));
    hooks.ready();
    let stop = AtomicBool::new(false);
    slices.run(team, |rank, slice| {
        slice.write(dirty, hooks, rank, ranks as u64, &stop)
    });
    slices.run(team, |rank, slice| slice.verify(dirty, hooks, rank));

    let mut verdict = Verdict {
        verified: true,
        ..Verdict::default()
    };
    for slice in slices.iter() {
        verdict.pages += (slice.pages.len() + slice.filled.len()) as u64;
        verdict.writes += slice.writes;
        verdict.corrupt += slice.corrupt;
        // Modulo 2^32, as each generation wraps.
        let counted = slice
            .generations
            .iter()
            .fold(0u32, |sum, &generation| sum.wrapping_add(generation));
        verdict.verified &= u64::from(counted) == slice.writes & u64::from(u32::MAX);
    }
    verdict.verified &= verdict.corrupt == 0;
    Ok(verdict)
}

fn take<'a, T>(rest: &mut &'a mut [T], len: usize) -> &'a mut [T] {
    let (mine, others) = core::mem::take(rest).split_at_mut(len);
    *rest = others;
    mine
}

impl Slice<'_> {
    fn set_up(&mut self, dirty: &Dirty, hooks: &impl Hooks, rank: usize) {
        self.generations.fill(0);
        let shape = dirty.fill.working_set();
        for (number, page) in (self.first..).zip(self.pages.iter_mut()) {
            shape.write(page, dirty.seed, number, 0, WORDS);
            hooks.tick(rank);
        }
        for (number, page) in (self.first_filled..).zip(self.filled.iter_mut()) {
            dirty
                .fill
                .rest(number)
                .write(page, dirty.seed, number, 0, WORDS);
            hooks.tick(rank);
        }
    }

    fn write(
        &mut self,
        dirty: &Dirty,
        hooks: &impl Hooks,
        rank: usize,
        ranks: u64,
        stop: &AtomicBool,
    ) {
        let shape = dirty.fill.working_set();
        let mut access = Access::new(dirty.pattern, self.pages.len(), dirty.seed ^ rank as u64);
        let start = hooks.nanos();
        let mut pace = Pace::new(dirty.rate, ranks, rank as u64, start);
        loop {
            hooks.tick(rank);
            // Two readings a microsecond apart at most would be a waste; one per turn does for both
            // purposes.
            let now = hooks.nanos();
            if rank == 0
                && (hooks.stop()
                    || (dirty.seconds > 0 && now - start >= dirty.seconds * 1_000_000_000))
            {
                stop.store(true, Ordering::Relaxed);
            }
            if stop.load(Ordering::Relaxed) {
                return;
            }
            if self.pages.is_empty() || !pace.due(now) {
                core::hint::spin_loop();
                continue;
            }
            let at = access.next();
            let (Some(page), Some(generation)) =
                (self.pages.get_mut(at), self.generations.get_mut(at))
            else {
                continue;
            };
            let number = self.first + at as u64;
            self.corrupt += check(shape, page, dirty, number, *generation, hooks, rank);
            *generation = generation.wrapping_add(1);
            shape.write(page, dirty.seed, number, *generation, dirty.part / 8);
            self.writes += 1;
            hooks.wrote(rank, self.writes);
        }
    }

    fn verify(&mut self, dirty: &Dirty, hooks: &impl Hooks, rank: usize) {
        let shape = dirty.fill.working_set();
        let pages = self.pages.iter().zip(self.generations.iter());
        for (number, (page, &generation)) in (self.first..).zip(pages) {
            self.corrupt += check(shape, page, dirty, number, generation, hooks, rank);
            hooks.tick(rank);
        }
        for (number, page) in (self.first_filled..).zip(self.filled.iter()) {
            self.corrupt += check(dirty.fill.rest(number), page, dirty, number, 0, hooks, rank);
            hooks.tick(rank);
        }
    }
}

/// 1 if the page is not what it should be, after reporting it; else 0.
fn check(
    shape: Shape,
    page: &Page,
    dirty: &Dirty,
    number: u64,
    generation: u32,
    hooks: &impl Hooks,
    rank: usize,
) -> u64 {
    match shape.verify(page, dirty.seed, number, generation, dirty.part / 8) {
        None => 0,
        Some(corruption) => {
            hooks.corrupt(rank, &corruption);
            1
        }
    }
}

/// When the next write is due.
struct Pace {
    /// Nanoseconds between two writes of this rank, in units of 1/256; 0 for no pacing.
    period: u64,
    /// When the next write is due, in the same units.
    next: u64,
}

impl Pace {
    /// Debt beyond this is forgiven: after a pause the guest goes on at its rate instead of
    /// catching up in a burst.
    const PATIENCE: u64 = 10_000_000 << 8;

    fn new(rate: u64, ranks: u64, rank: u64, now: u64) -> Self {
        let period = ((ranks * 1_000_000_000) << 8)
            .checked_div(rate)
            .unwrap_or(0);
        // The ranks take turns instead of writing all at once.
        Self {
            period,
            next: (now << 8) + period / ranks.max(1) * rank,
        }
    }

    fn due(&mut self, now: u64) -> bool {
        let now = now << 8;
        if now < self.next {
            return false;
        }
        self.next = if now - self.next > Self::PATIENCE {
            now
        } else {
            self.next
        } + self.period;
        true
    }
}

#[cfg(test)]
mod tests;
