//! Threads that carry requests out, several at once.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::disk::Disk;
use super::request::{Done, Options, Request};
use crate::virtio::{Event, Memory};

/// Requests of a disk that are carried out at once. They wait for the disk, not for a processor.
const THREADS: usize = 4;
/// How long a pause waits for requests that the disk has.
pub(super) const TIMEOUT: Duration = Duration::from_secs(5);

struct State {
    waiting: VecDeque<Request>,
    running: usize,
    done: Vec<Done>,
    options: Options,
    stop: bool,
}

struct Shared<M> {
    state: Mutex<State>,
    /// Something waits, or it is time to end.
    work: Condvar,
    /// A thread has nothing to do.
    idle: Condvar,
    /// Something is done.
    finished: Event,
    disk: Arc<Disk>,
    memory: Arc<M>,
}

impl<M> Shared<M> {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) struct Pool<M> {
    shared: Arc<Shared<M>>,
    threads: Vec<JoinHandle<()>>,
}

impl<M: Memory> Pool<M> {
    pub(super) fn new(disk: Arc<Disk>, memory: Arc<M>, options: Options) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                waiting: VecDeque::new(),
                running: 0,
                done: Vec::new(),
                options,
                stop: false,
            }),
            work: Condvar::new(),
            idle: Condvar::new(),
            finished: Event::new()?,
            disk,
            memory,
        });
        let mut pool = Self {
            shared,
            threads: Vec::new(),
        };
        for _ in 0..THREADS {
            let shared = Arc::clone(&pool.shared);
            let thread = std::thread::Builder::new()
                .name("disk".into())
                .spawn(move || serve(&shared))?;
            pool.threads.push(thread);
        }
        Ok(pool)
    }

    /// Readable when requests are done.
    pub(super) fn finished(&self) -> &Event {
        &self.shared.finished
    }

    pub(super) fn set_write_through(&self, on: bool) {
        self.shared.lock().options.write_through = on;
    }

    pub(super) fn submit(&self, request: Request) {
        self.shared.lock().waiting.push_back(request);
        self.shared.work.notify_one();
    }

    /// What is done since the last time.
    pub(super) fn collect(&self) -> Vec<Done> {
        self.shared.finished.drain();
        std::mem::take(&mut self.shared.lock().done)
    }

    /// Waits for what has begun and returns what has not, oldest first. When the disk does not answer in time all goes
    /// on, and the number of requests that it has is the error.
    pub(super) fn drain(&self) -> Result<Vec<Request>, usize> {
        let deadline = Instant::now() + TIMEOUT;
        let mut state = self.shared.lock();
        let waiting = std::mem::take(&mut state.waiting);
        while state.running > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let running = state.running;
                state.waiting = waiting;
                drop(state);
                self.shared.work.notify_all();
                return Err(running);
            }
            state = self
                .shared
                .idle
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Ok(waiting.into())
    }
}

impl<M> Drop for Pool<M> {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            // One that panicked has said so on stderr.
            let _ = thread.join();
        }
    }
}

fn serve<M: Memory>(shared: &Shared<M>) {
    let mut state = shared.lock();
    loop {
        if state.stop {
            return;
        }
        let Some(request) = state.waiting.pop_front() else {
            state = shared
                .work
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        state.running += 1;
        let options = state.options.clone();
        drop(state);
        let done = request.run(&*shared.memory, &shared.disk, &options);
        state = shared.lock();
        state.running -= 1;
        state.done.push(done);
        // Before the lock is given up: who sees that nothing runs finds all that is done.
        shared.finished.signal();
        if state.running == 0 {
            shared.idle.notify_all();
        }
    }
}
