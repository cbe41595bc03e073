//! The processors as a team: the others wait for a job, spinning, and run their part of it.

use crate::cpu::MAX_CPUS;
use crate::monitor;
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use ferry_nas::Team;

/// A job with its types taken off.
#[derive(Clone, Copy)]
struct Job {
    call: unsafe fn(*const (), usize),
    context: *const (),
    parts: usize,
}

struct Pool {
    job: UnsafeCell<Option<Job>>,
    /// Grows by one with each job.
    number: AtomicU64,
    /// Others that are not done with it.
    pending: AtomicUsize,
}

// SAFETY: `job` is written by rank 0 while no other rank works (`pending` is 0) and before `number`
// is increased with release ordering; the others read it after they saw the increase with acquire
// ordering, and before they decrease `pending` with release ordering, which rank 0 awaits with
// acquire ordering before it writes again.
unsafe impl Sync for Pool {}

static POOL: Pool = Pool {
    job: UnsafeCell::new(None),
    number: AtomicU64::new(0),
    pending: AtomicUsize::new(0),
};

/// How many further processors are here.
pub static ARRIVED: AtomicU64 = AtomicU64::new(0);

/// The life of a further processor.
pub fn serve(rank: usize) -> ! {
    monitor::begin(rank);
    let mut seen = 0;
    ARRIVED.fetch_add(1, Ordering::AcqRel);
    loop {
        while POOL.number.load(Ordering::Acquire) == seen {
            monitor::tick_waiting(rank);
            core::hint::spin_loop();
        }
        seen += 1;
        // SAFETY: see the `Sync` implementation: rank 0 does not write until `pending` is 0.
        let job = unsafe { *POOL.job.get() };
        if let Some(job) = job
            && rank < job.parts
        {
            // SAFETY: `context` is what `call` expects, and lives until `pending` is 0; each rank
            // calls once.
            unsafe { (job.call)(job.context, rank) };
        }
        POOL.pending.fetch_sub(1, Ordering::Release);
    }
}

/// The team of `size` processors. There is one of them.
pub struct Processors {
    size: usize,
}

impl Processors {
    /// The team of the boot processor and the `others` that arrived.
    pub fn new(others: usize) -> Self {
        Self {
            size: (others + 1).min(MAX_CPUS),
        }
    }
}

struct Context<'a, T, F> {
    parts: *mut T,
    work: &'a F,
}

/// # Safety
/// `context` is a `Context<T, F>` with more than `rank` parts, and no other thread uses part `rank`
/// meanwhile.
unsafe fn call<T: Send, F: Fn(usize, &mut T) + Sync>(context: *const (), rank: usize) {
    // SAFETY: as the caller promises.
    let context = unsafe { &*context.cast::<Context<'_, T, F>>() };
    // SAFETY: as the caller promises; `T: Send` lets another processor use it.
    (context.work)(rank, unsafe { &mut *context.parts.add(rank) });
}

impl Team for Processors {
    fn size(&self) -> usize {
        self.size
    }

    fn each<T: Send, F: Fn(usize, &mut T) + Sync>(&self, parts: &mut [T], work: F) {
        // Steps too small to share are not worth a wake-up.
        if parts.len() <= 1 || self.size == 1 {
            for (rank, part) in parts.iter_mut().enumerate() {
                work(rank, part);
            }
            return;
        }
        let count = parts.len().min(self.size);
        let context = Context {
            parts: parts.as_mut_ptr(),
            work: &work,
        };
        let job = Job {
            call: call::<T, F>,
            context: (&raw const context).cast(),
            parts: count,
        };
        // SAFETY: only rank 0 calls `each`, and no other rank works now; see the `Sync`
        // implementation.
        unsafe { *POOL.job.get() = Some(job) };
        POOL.pending.store(self.size - 1, Ordering::Relaxed);
        POOL.number.fetch_add(1, Ordering::Release);
        // SAFETY: part 0 is this rank's; the others use theirs; the context lives until all are
        // done.
        unsafe { call::<T, F>((&raw const context).cast(), 0) };
        while POOL.pending.load(Ordering::Acquire) > 0 {
            monitor::tick_waiting(0);
            core::hint::spin_loop();
        }
    }
}
