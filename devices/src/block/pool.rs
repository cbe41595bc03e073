//! Threads that carry requests out, several at once.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use super::disk::Disk;
use super::request::{Done, Options, Request};
use crate::sync::{Allowance, lock, wait};
use crate::thread;
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
    /// Why a thread has failed, with the request that it had.
    failure: Option<String>,
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
        lock(&self.state)
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
                failure: None,
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
            let (shared, failed) = (Arc::clone(&pool.shared), Arc::clone(&pool.shared));
            let work = move || {
                serve(&shared);
                Ok(())
            };
            let thread = thread::spawn(thread::Kind::Device, "disk", work, move |why| {
                fail(&failed, why)
            })?;
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

    /// Why a thread has failed, if one has.
    pub(super) fn failure(&self) -> Option<String> {
        self.shared.lock().failure.clone()
    }

    /// Waits for what has begun and returns what has not, oldest first. When the disk does not
    /// answer in time, or a thread has failed, all goes on, and the number of requests that have
    /// not come back is the error.
    pub(super) fn drain(&self) -> Result<Vec<Request>, usize> {
        let mut allowance = Allowance::new(TIMEOUT);
        let mut state = self.shared.lock();
        let waiting = std::mem::take(&mut state.waiting);
        while state.running > 0 || state.failure.is_some() {
            if allowance.is_spent() || state.failure.is_some() {
                let running = state.running.max(1);
                state.waiting = waiting;
                drop(state);
                self.shared.work.notify_all();
                return Err(running);
            }
            state = allowance.wait(&self.shared.idle, state);
        }
        Ok(waiting.into())
    }
}

impl<M> Drop for Pool<M> {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            // One that failed has said so.
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
            state = wait(&shared.work, state);
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

/// A thread has failed with a request in hand, which never comes back: the device's worker finds
/// out why.
fn fail<M>(shared: &Shared<M>, why: String) {
    shared.lock().failure.get_or_insert(why);
    shared.finished.signal();
    shared.idle.notify_all();
}
