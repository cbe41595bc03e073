//! The balloon's size: as it is set, or moved automatically by a thread that asks the guest about
//! its memory.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ferry_devices::balloon::Balloon;
use ferry_devices::balloon::auto::{Controller, Sample, Settings, Step};
use ferry_devices::sync::{lock, wait_timeout_while, wait_while};
use ferry_devices::thread;
use ferry_devices::virtio::VirtioDevice;

use super::balloon::{BalloonInfo, HostPages};
use crate::memory::GuestMemory;

/// A balloon and the thread that moves it. The thread sleeps unless the size is to be moved
/// automatically.
#[derive(Debug)]
pub(super) struct Ballooning {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    balloon: Arc<VirtioDevice<Balloon, GuestMemory>>,
    pages: Arc<HostPages>,
    /// Bytes that the guest has.
    ram: u64,
    news: Mutex<News>,
    changed: Condvar,
    /// The balloon as last seen: a status reads it while the device is at work.
    known: Mutex<BalloonInfo>,
}

/// What the thread has to look at. Locked for moments, and never while a device is.
#[derive(Debug, Default)]
struct News {
    settings: bool,
    end: bool,
}

impl Ballooning {
    pub(super) fn start(
        balloon: Arc<VirtioDevice<Balloon, GuestMemory>>,
        pages: Arc<HostPages>,
        ram: u64,
    ) -> io::Result<Self> {
        let known = balloon.with(|balloon| BalloonInfo::of(balloon, &pages));
        let shared = Arc::new(Shared {
            known: Mutex::new(known),
            balloon,
            pages,
            ram,
            news: Mutex::default(),
            changed: Condvar::new(),
        });
        let worker = Arc::clone(&shared);
        let work = move || {
            worker.work();
            Ok(())
        };
        // The guest is the same without it.
        let failure =
            |why| tracing::error!("the balloon is not moved automatically any more: {why}");
        let thread = thread::spawn(thread::Kind::Device, "ferry-balloon", work, failure)?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    pub(super) fn pages(&self) -> &HostPages {
        &self.shared.pages
    }

    /// Has the thread look at the settings.
    pub(super) fn look(&self) {
        self.shared.news().settings = true;
        self.shared.changed.notify_all();
    }

    /// A size in pages, from now on.
    pub(super) fn set_size(&self, pages: u32) {
        self.shared.balloon.reconfigure(|balloon| {
            balloon.set_auto(None);
            balloon.set_target(pages);
        });
        self.look();
    }

    /// Moves the size automatically from now on.
    pub(super) fn set_auto(&self, settings: Settings) {
        let settings = settings.bounded(self.shared.ram);
        self.shared
            .balloon
            .with(|balloon| balloon.set_auto(Some(settings)));
        self.look();
    }

    /// Does not wait for a device that is at work: then it is what was known before.
    pub(super) fn info(&self) -> BalloonInfo {
        let shared = &*self.shared;
        let now = shared
            .balloon
            .try_with(|balloon| BalloonInfo::of(balloon, &shared.pages));
        let mut known = lock(&shared.known);
        if let Some(now) = now {
            *known = now;
            // For the next time.
            let _ = shared.balloon.try_with_queues(Balloon::ask_statistics);
        }
        known.clone()
    }
}

impl Drop for Ballooning {
    fn drop(&mut self) {
        self.shared.news().end = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // One that panicked has said so.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn news(&self) -> MutexGuard<'_, News> {
        lock(&self.news)
    }

    /// Asks the guest for newer statistics. One that is paused, has no driver, or still owes an
    /// answer is not asked.
    fn ask(&self) {
        let _ = self.balloon.with_queues(Balloon::ask_statistics);
    }

    /// Waits for news, or so long; `None` is for ever. Whether there is an end to it.
    fn wait(&self, time: Option<Duration>) -> bool {
        let quiet = |news: &mut News| !(news.settings || news.end);
        let news = self.news();
        let mut news = match time {
            Some(time) => wait_timeout_while(&self.changed, news, time, quiet),
            None => wait_while(&self.changed, news, quiet),
        };
        news.settings = false;
        news.end
    }

    fn work(&self) {
        let mut moving: Option<Moving> = None;
        let mut pause = None;
        while !self.wait(pause) {
            let Some(settings) = self.balloon.with(|balloon| balloon.auto()) else {
                (moving, pause) = (None, None);
                continue;
            };
            let settings = settings.bounded(self.ram);
            pause = Some(settings.sampling());
            match &mut moving {
                Some(moving) if moving.settings == settings => self.step(moving),
                _ => moving = Some(Moving::new(settings, self.ram)),
            }
            self.ask();
        }
    }

    /// Decides, if the guest has said something since the last time.
    fn step(&self, moving: &mut Moving) {
        let (known, statistics, target) = self
            .balloon
            .with(|b| (b.told(), b.statistics().cloned(), b.target()));
        let (Some(told), Some(statistics)) = (known, statistics) else {
            return;
        };
        if moving.told == Some(told.times) {
            return;
        }
        moving.told = Some(told.times);
        let passed = told.at.saturating_duration_since(moving.at);
        moving.at = moving.at.max(told.at);
        let sample = Sample {
            statistics: &statistics,
            actual: told.actual,
            target,
            // Of a guest whose pages still arrive nothing is given back to the host.
            may_inflate: !self.pages.keeps(),
        };
        let (next, step) = moving.controller.step(&sample, passed);
        if step == Step::Keep {
            return;
        }
        tracing::debug!(
            from = target,
            to = next,
            actual = told.actual,
            available = statistics.available_memory,
            ?step,
            "the balloon is moved"
        );
        self.balloon.reconfigure(|balloon| {
            // An operator may have set another size since.
            if balloon.auto().is_some() && balloon.target() == target {
                balloon.set_target(next);
            }
        });
    }
}

/// The state of moving it.
struct Moving {
    settings: Settings,
    controller: Controller,
    /// The number of the statistics that were looked at last.
    told: Option<u64>,
    at: Instant,
}

impl Moving {
    fn new(settings: Settings, ram: u64) -> Self {
        Self {
            settings,
            controller: Controller::new(settings, ram),
            told: None,
            at: Instant::now(),
        }
    }
}
