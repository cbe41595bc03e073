//! A guest's work, in a process of its own: the same kernels and the same writer as in the bare
//! guest, on threads.

use std::io::Read;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};

use ferry_nas::dirty::{self, Corruption, Dirty};
use ferry_nas::host::{Clock, Threads};
use ferry_nas::line::{Gaps, KernelResult, Line, Work};
use ferry_nas::team::MAX_RANKS;
use ferry_nas::workload::Workload;
use ferry_nas::{Hooks, Problem, Workspace};

/// The byte on stdin that tells the work to finish; the end of stdin does too.
pub const STOP: u8 = b'q';
/// Corrupt pages that are printed; all are counted.
const PRINTED: u64 = 20;

/// `init work SPEC THREADS REPEAT`.
pub fn run(spec: &str, threads: &str, repeat: &str) -> Result<(), String> {
    let workload = Workload::parse(spec).map_err(|e| e.to_string())?;
    let number = |text: &str| {
        text.parse::<u64>()
            .map_err(|_| format!("`{text}` is not a number"))
    };
    let threads = usize::try_from(number(threads)?)
        .unwrap_or(MAX_RANKS)
        .clamp(1, MAX_RANKS);
    let repeat = number(repeat)?;
    let monitor = Monitor::new(matches!(workload, Workload::Dirty(_)));
    std::thread::scope(|scope| {
        scope.spawn(|| monitor.listen());
        let done = match workload {
            Workload::Nas(problem) => kernel(problem, threads, repeat, &monitor),
            Workload::Dirty(dirty) => writer(&dirty, threads, &monitor),
        };
        // The listener sits in a read of stdin that may never end: leave without it.
        match done {
            Ok(()) => std::process::exit(0),
            Err(sentence) => {
                println!("{}", Line::Error(&sentence));
                std::process::exit(1);
            }
        }
    })
}

fn kernel(problem: Problem, threads: usize, repeat: u64, monitor: &Monitor) -> Result<(), String> {
    let needs = problem.needs(threads);
    let (mut floats, mut words) = (vec![0.0; needs.floats], vec![0; needs.words]);
    let name = problem.to_string();
    let mut run = 1;
    loop {
        monitor.run.store(run, Relaxed);
        monitor.total.store(0, Relaxed);
        monitor.done.store(0, Relaxed);
        let workspace = Workspace {
            floats: &mut floats,
            words: &mut words,
            kept: run > 1,
        };
        let outcome = ferry_nas::run(problem, workspace, &Threads::new(threads), monitor)
            .map_err(|e| e.to_string())?;
        println!(
            "{}",
            Line::Result(KernelResult {
                kernel: &name,
                run,
                verified: outcome.verified,
                value: outcome.check.value,
                reference: outcome.check.reference,
                error: outcome.error,
                mops: outcome.mops,
                seconds: outcome.seconds,
                gaps: monitor.gaps(false),
            })
        );
        if run == repeat || monitor.stop() {
            return Ok(());
        }
        run += 1;
    }
}

fn writer(dirty: &Dirty, threads: usize, monitor: &Monitor) -> Result<(), String> {
    let count = usize::try_from(dirty.working_set_pages).map_err(|e| e.to_string())?;
    let zero: dirty::Page = std::array::from_fn(|_| 0);
    let mut pages = vec![zero; count];
    let mut generations = vec![0; count];
    let memory = dirty::Memory {
        pages: &mut pages,
        generations: &mut generations,
    };
    let verdict = dirty::run(dirty, memory, &Threads::new(threads), monitor)
        .map_err(|e| format!("the writer needs {} pages and has {}", e.needed, e.given))?;
    println!(
        "{}",
        Line::Verdict {
            verdict,
            gaps: monitor.gaps(false)
        }
    );
    Ok(())
}

/// One thread's part, in nanoseconds of the clock.
#[derive(Default)]
struct Rank {
    last: AtomicU64,
    gap: AtomicU64,
    max: AtomicU64,
    max_at: AtomicU64,
    writes: AtomicU64,
}

/// Watches the clock and the work's progress; prints them once a second.
struct Monitor {
    clock: Clock,
    writer: bool,
    ranks: Vec<Rank>,
    next: AtomicU64,
    ready: AtomicBool,
    stop: AtomicBool,
    corrupt: AtomicU64,
    run: AtomicU64,
    done: AtomicU32,
    total: AtomicU32,
}

const SECOND: u64 = 1_000_000_000;

impl Monitor {
    fn new(writer: bool) -> Self {
        Self {
            clock: Clock::start(),
            writer,
            ranks: (0..MAX_RANKS).map(|_| Rank::default()).collect(),
            next: AtomicU64::new(SECOND),
            ready: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            corrupt: AtomicU64::new(0),
            run: AtomicU64::new(1),
            done: AtomicU32::new(0),
            total: AtomicU32::new(0),
        }
    }

    /// Waits for the word to stop.
    fn listen(&self) {
        let mut byte = [0];
        while std::io::stdin().read(&mut byte).is_ok_and(|n| n > 0) && byte[0] != STOP {}
        self.stop.store(true, Relaxed);
    }

    fn gaps(&self, next_second: bool) -> Gaps {
        let mut gaps = Gaps::default();
        for rank in &self.ranks {
            let last = if next_second {
                rank.gap.swap(0, Relaxed)
            } else {
                rank.gap.load(Relaxed)
            };
            gaps.last_us = gaps.last_us.max(last / 1000);
            let max = rank.max.load(Relaxed) / 1000;
            if max > gaps.max_us {
                gaps.max_us = max;
                gaps.max_at_ms = rank.max_at.load(Relaxed) / 1_000_000;
            }
        }
        gaps
    }

    fn report(&self, now: u64) {
        let work = if self.writer {
            let writes = self.ranks.iter().map(|r| r.writes.load(Relaxed)).sum();
            Work::Writes {
                writes,
                corrupt: self.corrupt.load(Relaxed),
            }
        } else {
            Work::Steps {
                run: self.run.load(Relaxed),
                done: self.done.load(Relaxed),
                total: self.total.load(Relaxed),
            }
        };
        println!(
            "{}",
            Line::Stat {
                t_ms: now / 1_000_000,
                work,
                gaps: self.gaps(true)
            }
        );
    }
}

impl Hooks for Monitor {
    fn nanos(&self) -> u64 {
        self.clock.nanos()
    }

    fn tick(&self, rank: usize) {
        let now = self.nanos();
        let Some(mine) = self.ranks.get(rank) else {
            return;
        };
        let last = mine.last.swap(now, Relaxed);
        if last != 0 && self.ready.load(Relaxed) {
            let gap = now.saturating_sub(last);
            mine.gap.fetch_max(gap, Relaxed);
            if mine.max.fetch_max(gap, Relaxed) < gap {
                mine.max_at.store(now, Relaxed);
            }
        }
        let due = self.next.load(Relaxed);
        if rank == 0 && now >= due && self.ready.load(Relaxed) {
            self.next.store(now + SECOND, Relaxed);
            self.report(now);
        }
    }

    fn progress(&self, done: u32, total: u32) {
        self.done.store(done, Relaxed);
        self.total.store(total, Relaxed);
    }

    fn ready(&self) {
        if !self.ready.swap(true, Relaxed) {
            println!(
                "{}",
                Line::Ready {
                    t_ms: crate::machine::uptime_ms()
                }
            );
        }
    }

    fn wrote(&self, rank: usize, writes: u64) {
        if let Some(rank) = self.ranks.get(rank) {
            rank.writes.store(writes, Relaxed);
        }
    }

    fn corrupt(&self, _rank: usize, what: &Corruption) {
        if self.corrupt.fetch_add(1, Relaxed) < PRINTED {
            println!("{}", Line::Corrupt(*what));
        }
    }

    fn stop(&self) -> bool {
        self.stop.load(Relaxed)
    }
}
