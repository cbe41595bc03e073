//! The kernels on the host: OS threads, the monotonic clock, memory from the allocator.

use crate::problem::{Outcome, Problem, RunError, Workspace, run};
use crate::team::{Hooks, MAX_RANKS, Team};
use std::time::Instant;
use std::vec::Vec;

/// A team of OS threads, forked for each parallel step (tens of microseconds, against milliseconds
/// of work).
#[derive(Clone, Copy, Debug)]
pub struct Threads(usize);

impl Threads {
    /// A team of `size` threads, held to 1..=[`MAX_RANKS`].
    pub fn new(size: usize) -> Self {
        Self(size.clamp(1, MAX_RANKS))
    }
}

impl Team for Threads {
    fn size(&self) -> usize {
        self.0
    }

    fn each<T: Send, F: Fn(usize, &mut T) + Sync>(&self, parts: &mut [T], work: F) {
        let Some((own, others)) = parts.split_first_mut() else {
            return;
        };
        std::thread::scope(|scope| {
            for (i, part) in others.iter_mut().enumerate() {
                let work = &work;
                scope.spawn(move || work(i + 1, part));
            }
            work(0, own);
        });
    }
}

/// The host's monotonic clock.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Instant);

impl Clock {
    /// A clock that starts now.
    pub fn start() -> Self {
        Self(Instant::now())
    }
}

impl Hooks for Clock {
    fn nanos(&self) -> u64 {
        u64::try_from(self.0.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

/// Runs one kernel once on `threads` OS threads, in memory of its own.
///
/// # Errors
/// [`RunError::Memory`] if the memory cannot be had.
pub fn run_on_threads(problem: Problem, threads: usize) -> Result<Outcome, RunError> {
    run_with(problem, threads, &Clock::start())
}

/// As [`run_on_threads`], reporting to `hooks`.
///
/// # Errors
/// [`RunError::Memory`] if the memory cannot be had.
pub fn run_with(problem: Problem, threads: usize, hooks: &impl Hooks) -> Result<Outcome, RunError> {
    let team = Threads::new(threads);
    let needs = problem.needs(team.size());
    let available = available();
    let short = |given| RunError::Memory {
        problem,
        needs: needs.bytes(),
        given,
    };
    // The kernel overcommits, and would kill a process once the memory is used.
    if needs.bytes() > available {
        return Err(short(Some(available)));
    }
    let (mut floats, mut words) = (Vec::new(), Vec::new());
    // A limit of the process may be tighter.
    floats
        .try_reserve_exact(needs.floats)
        .and_then(|()| words.try_reserve_exact(needs.words))
        .map_err(|_| short(None))?;
    floats.resize(needs.floats, 0.0);
    words.resize(needs.words, 0);
    run(
        problem,
        Workspace {
            floats: &mut floats,
            words: &mut words,
            kept: false,
        },
        &team,
        hooks,
    )
}

/// Memory that can be had without swapping, in bytes (`MemAvailable` of proc_meminfo(5)); all there
/// could be, where the system does not say.
fn available() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.split_ascii_whitespace().next()?.parse::<u64>().ok())
        .map_or(u64::MAX, |kib| kib.saturating_mul(1024))
}
