//! Times of pieces of work.

use rustix::time::{ClockId, clock_gettime};
use std::ops::AddAssign;
use std::time::Instant;

/// What a piece of work took, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, PartialOrd)]
pub struct Cost {
    /// On the clock.
    pub wall: f64,
    /// Of this thread's processor time, that of the kernel on its behalf included. Other work on
    /// the machine hardly moves it.
    pub cpu: f64,
}

impl AddAssign for Cost {
    fn add_assign(&mut self, other: Self) {
        self.wall += other.wall;
        self.cpu += other.cpu;
    }
}

/// Does it, in this thread.
pub fn timed<T>(work: impl FnOnce() -> T) -> (T, Cost) {
    let (began, cpu) = (Instant::now(), thread_cpu());
    let result = work();
    let cost = Cost {
        cpu: thread_cpu() - cpu,
        wall: began.elapsed().as_secs_f64(),
    };
    (result, cost)
}

/// Processor time of the whole process so far, in seconds.
#[allow(dead_code, reason = "not every benchmark is alone in its process")]
pub fn process_cpu() -> f64 {
    cpu(ClockId::ProcessCPUTime)
}

fn thread_cpu() -> f64 {
    cpu(ClockId::ThreadCPUTime)
}

fn cpu(clock: ClockId) -> f64 {
    let now = clock_gettime(clock);
    now.tv_sec as f64 + now.tv_nsec as f64 / 1e9
}
