//! Watches the clock: how long each processor did not run, and what to print every second or so.

use crate::console;
use crate::cpu::{MAX_CPUS, tsc};
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};
use ferry_nas::Hooks;
use ferry_nas::dirty::Corruption;
use ferry_nas::line::{Gaps, Line, Work};
use ferry_nas::workload::BYTES_PER_CPU;

/// What one processor saw, in ticks. A cache line of its own, or the processors would slow each
/// other down.
#[repr(align(128))]
struct Processor {
    last: AtomicU64,
    gap: AtomicU64,
    max: AtomicU64,
    max_at: AtomicU64,
    writes: AtomicU64,
}

static PROCESSORS: [Processor; MAX_CPUS] = [const {
    Processor {
        last: AtomicU64::new(0),
        gap: AtomicU64::new(0),
        max: AtomicU64::new(0),
        max_at: AtomicU64::new(0),
        writes: AtomicU64::new(0),
    }
}; MAX_CPUS];

static COUNT: AtomicUsize = AtomicUsize::new(1);
/// Where the further processors' stacks begin; tells which processor is asking.
static STACKS: AtomicUsize = AtomicUsize::new(usize::MAX);

/// Notes that `rank` runs.
#[inline(always)]
fn note(rank: usize) -> u64 {
    let now = tsc();
    if let Some(processor) = PROCESSORS.get(rank) {
        let gap = now.saturating_sub(processor.last.load(Relaxed));
        processor.last.store(now, Relaxed);
        if gap > processor.gap.load(Relaxed) {
            processor.gap.store(gap, Relaxed);
            if gap > processor.max.load(Relaxed) {
                processor.max.store(gap, Relaxed);
                processor.max_at.store(now, Relaxed);
            }
        }
    }
    now
}

/// Notes that the calling processor runs. Prints nothing, so that printing may call it.
pub fn tick_here() {
    let here = 0u8;
    let stack = (&raw const here).addr();
    let rank = stack
        .checked_sub(STACKS.load(Relaxed))
        .map_or(0, |offset| offset / BYTES_PER_CPU + 1);
    note(if rank < MAX_CPUS { rank } else { 0 });
}

/// Notes that `rank` waits for work.
#[inline]
pub fn tick_waiting(rank: usize) {
    note(rank);
}

/// Starts watching `rank`.
pub fn begin(rank: usize) {
    if let Some(processor) = PROCESSORS.get(rank) {
        processor.last.store(tsc(), Relaxed);
    }
}

/// The guest's clock, and the work's progress.
pub struct Monitor {
    start: u64,
    khz: u64,
    /// Nanoseconds per tick, times 2^32.
    scale: u64,
    /// Ticks between two lines.
    rhythm: u64,
    /// Ticks between two signs of life.
    beat: Option<u64>,
    next_stat: AtomicU64,
    /// When to look for input.
    next_poll: AtomicU64,
    /// When to look around at all.
    next_look: AtomicU64,
    stop: AtomicBool,
    ready: AtomicBool,
    writer: bool,
    corrupt: AtomicU64,
    run: AtomicU64,
    done: AtomicU32,
    total: AtomicU32,
}

impl Monitor {
    /// Starts the clock. `writer` says what kind of progress there is to report, every `stat_ms`
    /// milliseconds; every `beat_ms` there is a sign of life.
    pub fn new(khz: u64, writer: bool, stat_ms: u64, beat_ms: Option<u64>) -> Self {
        let start = tsc();
        begin(0);
        let rhythm = khz.saturating_mul(stat_ms);
        Self {
            start,
            khz,
            scale: (1_000_000 << 32) / khz.max(1),
            rhythm,
            next_stat: AtomicU64::new(start + rhythm),
            next_poll: AtomicU64::new(start),
            next_look: AtomicU64::new(start),
            beat: beat_ms.map(|ms| khz.saturating_mul(ms)),
            stop: AtomicBool::new(false),
            ready: AtomicBool::new(false),
            writer,
            corrupt: AtomicU64::new(0),
            run: AtomicU64::new(1),
            done: AtomicU32::new(0),
            total: AtomicU32::new(0),
        }
    }

    /// There are `count` processors now; all but the first have their stacks from `stacks` on.
    pub fn processors(&self, count: usize, stacks: usize) {
        COUNT.store(count, Relaxed);
        STACKS.store(stacks, Relaxed);
    }

    /// Another run of a kernel begins.
    pub fn run(&self, number: u64) {
        self.run.store(number, Relaxed);
        self.done.store(0, Relaxed);
        self.total.store(0, Relaxed);
    }

    fn us(&self, ticks: u64) -> u64 {
        ticks.saturating_mul(1000) / self.khz.max(1)
    }

    /// Milliseconds since the start.
    pub fn ms(&self, now: u64) -> u64 {
        now.saturating_sub(self.start) / self.khz.max(1)
    }

    fn processors_seen(&self) -> impl Iterator<Item = &'static Processor> {
        PROCESSORS.iter().take(COUNT.load(Relaxed))
    }

    /// The gaps over all processors; `restart` begins the next interval.
    pub fn gaps(&self, restart: bool) -> Gaps {
        let mut gaps = Gaps::default();
        for processor in self.processors_seen() {
            let last = if restart {
                processor.gap.swap(0, Relaxed)
            } else {
                processor.gap.load(Relaxed)
            };
            gaps.last_us = gaps.last_us.max(self.us(last));
            let max = self.us(processor.max.load(Relaxed));
            if max > gaps.max_us {
                gaps.max_us = max;
                gaps.max_at_ms = self.ms(processor.max_at.load(Relaxed));
            }
        }
        gaps
    }

    #[cold]
    #[inline(never)]
    fn look_around(&self, now: u64) {
        let poll = self.khz * 10;
        if now >= self.next_poll.load(Relaxed) {
            self.next_poll.store(now + poll, Relaxed);
            if console::receive() == Some(b'q') {
                self.stop.store(true, Relaxed);
            }
        }
        if self.beat.is_some() {
            console::beat();
        }
        self.next_look
            .store(now + self.beat.map_or(poll, |beat| beat.min(poll)), Relaxed);
        if now < self.next_stat.load(Relaxed) {
            return;
        }
        // After a pause the rhythm starts anew; missed lines are not printed in a burst.
        let next = self.next_stat.load(Relaxed) + self.rhythm;
        self.next_stat.store(
            if next > now { next } else { now + self.rhythm },
            Relaxed,
        );
        let work = if self.writer {
            Work::Writes {
                writes: self
                    .processors_seen()
                    .map(|processor| processor.writes.load(Relaxed))
                    .sum(),
                corrupt: self.corrupt.load(Relaxed),
            }
        } else {
            Work::Steps {
                run: self.run.load(Relaxed),
                done: self.done.load(Relaxed),
                total: self.total.load(Relaxed),
            }
        };
        console::print(&Line::Stat {
            t_ms: self.ms(now),
            work,
            gaps: self.gaps(true),
        });
    }
}

impl Hooks for Monitor {
    #[inline(always)]
    fn nanos(&self) -> u64 {
        let ticks = tsc().wrapping_sub(self.start);
        // The product has 96 bits for centuries; what is kept fits 64.
        ((u128::from(ticks) * u128::from(self.scale)) >> 32)
            .try_into()
            .unwrap_or(u64::MAX)
    }

    #[inline(always)]
    fn tick(&self, rank: usize) {
        let now = note(rank);
        if rank == 0 && now >= self.next_look.load(Relaxed) {
            self.look_around(now);
        }
    }

    fn progress(&self, done: u32, total: u32) {
        self.done.store(done, Relaxed);
        self.total.store(total, Relaxed);
    }

    fn ready(&self) {
        if self.ready.swap(true, Relaxed) {
            return;
        }
        console::print(&Line::Ready {
            t_ms: self.ms(tsc()),
        });
        for processor in self.processors_seen() {
            processor.gap.store(0, Relaxed);
            processor.max.store(0, Relaxed);
        }
    }

    #[inline(always)]
    fn wrote(&self, rank: usize, writes: u64) {
        if let Some(processor) = PROCESSORS.get(rank) {
            processor.writes.store(writes, Relaxed);
        }
    }

    #[cold]
    fn corrupt(&self, _rank: usize, what: &Corruption) {
        // The first ones say what is wrong; thousands more would only delay the verdict, which
        // counts them all.
        if self.corrupt.fetch_add(1, Relaxed) < 20 {
            console::print(&Line::Corrupt(*what));
        }
    }

    fn stop(&self) -> bool {
        self.stop.load(Relaxed)
    }
}
