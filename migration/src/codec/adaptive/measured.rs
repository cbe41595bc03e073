//! What batches came to, added up so that it tells something.

use std::time::Duration;

use super::Level;

/// What a batch came to.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// How it was coded.
    pub level: Level,
    /// Data channels that were sending at the same time: of all they do together, a page takes that
    /// part of its time on one of them.
    pub data_channels: u16,
    /// Its pages, those known to be zero not counted.
    pub pages: u64,
    /// Bytes that went out for them.
    pub bytes: u64,
    /// Time spent copying, classing and coding them.
    pub encode: Duration,
    /// Time spent in sending.
    pub link: Duration,
}

impl Outcome {
    /// Seconds for a page, coding and sending.
    pub(super) fn wall(&self) -> f64 {
        per_page(self.encode.saturating_add(self.link), self.pages)
    }
}

/// What was measured counts for so many pages at most.
const MEMORY: f64 = 16_384.0;
/// Seconds for a page, lately.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    pub(super) seconds: f64,
    pub(super) pages: f64,
}

impl Pace {
    pub(super) const UNKNOWN: Self = Self {
        seconds: 0.0,
        pages: 0.0,
    };

    pub(super) fn get(&self) -> Option<f64> {
        (self.pages > 0.0).then(|| self.seconds / self.pages)
    }

    pub(super) fn add(&mut self, seconds: f64, pages: f64) {
        self.count_for(MEMORY);
        self.seconds += seconds;
        self.pages += pages;
    }

    /// It cannot be more than that.
    pub(super) fn is_at_most(&mut self, most: f64) {
        match self.get() {
            Some(known) if known > most => self.seconds *= most / known,
            Some(_) => {}
            // The first that is measured itself replaces it.
            None => (self.seconds, self.pages) = (most, 1.0),
        }
    }

    /// What was added is to count for so much at most.
    pub(super) fn count_for(&mut self, pages: f64) {
        if self.pages > pages {
            self.seconds *= pages / self.pages;
            self.pages = pages;
        }
    }
}

/// What batches of one level came to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lately {
    pub(super) batches: u32,
    pub(super) pages: u64,
    pub(super) bytes: u64,
    pub(super) encode: Duration,
    pub(super) link: Duration,
}

impl Lately {
    pub(super) const NONE: Self = Self {
        batches: 0,
        pages: 0,
        bytes: 0,
        encode: Duration::ZERO,
        link: Duration::ZERO,
    };

    pub(super) fn add(&mut self, outcome: &Outcome) {
        self.batches += 1;
        self.pages = self.pages.saturating_add(outcome.pages);
        self.bytes = self.bytes.saturating_add(outcome.bytes);
        self.encode = self.encode.saturating_add(outcome.encode);
        self.link = self.link.saturating_add(outcome.link);
    }

    /// Coding and sending.
    pub(super) const fn time(&self) -> Duration {
        self.encode.saturating_add(self.link)
    }

    /// Seconds for a page of it.
    pub(super) fn wall(&self) -> f64 {
        per_page(self.time(), self.pages)
    }

    pub(super) fn is_enough(&self) -> bool {
        self.time() >= ENOUGH_TIME || self.batches >= ENOUGH_BATCHES && self.bytes >= ENOUGH_BYTES
    }
}

/// What a data channel has sent since the last change.
#[derive(Clone, Copy, Debug)]
pub struct DataChannel {
    /// Which it was.
    change: u64,
    sent: Lately,
    /// It tells in what is measured.
    tells: bool,
}

impl Default for DataChannel {
    fn default() -> Self {
        Self::since(0)
    }
}

impl DataChannel {
    pub(super) const fn since(change: u64) -> Self {
        Self {
            change,
            sent: Lately::NONE,
            tells: false,
        }
    }

    /// Whether what the data channel measures for this batch is the change's doing: from the first
    /// wait on after what was sent before has left the buffers.
    pub(super) fn tells(&mut self, change: u64, outcome: &Outcome) -> bool {
        if self.change != change {
            *self = Self::since(change);
        }
        let told = self.tells;
        if !told {
            self.sent.add(outcome);
            // At first buffers are empty: who waits has filled them.
            let first_wait = change == 0 && outcome.wall() > WAIT;
            let flushed = self.sent.bytes >= FLUSH && outcome.wall() >= self.sent.wall();
            self.tells = first_wait || flushed;
        }
        told
    }
}

/// Batches are judged together until they have taken so long, or are so many and so large: a sender
/// that waits for room in its socket is woken when a third of it is free, so that of several
/// batches one waits for all.
const ENOUGH_TIME: Duration = Duration::from_millis(25);
const ENOUGH_BATCHES: u32 = 4;
const ENOUGH_BYTES: u64 = 4 << 20;
/// Bytes that a data channel sends after a change before what it measures is the change's doing:
/// those before lie in the socket's buffers, here and at the receiver, 14 MB of them by Linux's
/// defaults.
pub(super) const FLUSH: u64 = 16 << 20;
/// A batch that takes longer than this for a page has waited.
const WAIT: f64 = 15e-6;

pub(super) fn per_page(time: Duration, pages: u64) -> f64 {
    time.as_secs_f64() / pages.max(1) as f64
}
