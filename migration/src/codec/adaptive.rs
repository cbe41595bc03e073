//! Which coders the lanes use, from what they measure: a pure object, batches in, a decision out.
//!
//! Every page costs time on the link, and coding costs time on a processor. While a batch is coded the link still
//! drains what the socket holds, so that in the best case a page takes the *larger* of the two, and where the "link" is
//! itself a processor copying bytes (loopback) their *sum*. So:
//!
//! - a level is *tried* when its prospect, the best case, beats the cost of raw pages by [`TRY`];
//! - what it costs then is measured, and it is left unless it saves a tenth of what raw pages cost; it is not tried again
//!   for a while, each time four times as long, unless the link has become slower by half;
//! - what raw pages cost is measured while they are sent. While others are, it is only known to be at most what sending
//!   and coding took: a receiver that decodes looks like a slow link, so that nothing is believed slower before raw pages
//!   are looked at, which they are now and then.
//!
//! Prospects come from samples: a few pages are coded and thrown away, for at most [`SAMPLE_SHARE`] of the time.

use crate::page::PAGE_BYTES;
use std::time::Duration;

/// Which coders are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// None: pages go straight from guest memory.
    Raw,
    /// Those that cost about as much as a copy: patches, against zeros and against what the destination has.
    Patch,
    /// Those and zstd.
    Full,
}

impl Level {
    const fn index(self) -> usize {
        self as usize
    }
}

/// What a batch came to.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// How it was coded.
    pub level: Level,
    /// Its pages, those known to be zero not counted.
    pub pages: u64,
    /// Bytes that went out for them.
    pub bytes: u64,
    /// Time spent copying, classing and coding them.
    pub encode: Duration,
    /// Time spent in sending.
    pub link: Duration,
}

/// What a level costs.
#[derive(Clone, Copy, Debug)]
struct Estimate {
    /// Seconds of coding for a page.
    encode: f64,
    /// Bytes on the wire for a byte of memory.
    ratio: f64,
}

/// That a level was found not to pay.
#[derive(Clone, Copy, Debug)]
struct Refuted {
    /// Seconds for a byte on the link at that time.
    at: f64,
    /// Raw batches until it may be tried again.
    left: u32,
    /// How many there were at first.
    patience: u32,
}

/// What batches of one level came to.
#[derive(Clone, Copy, Debug)]
struct Lately {
    batches: u32,
    pages: u64,
    bytes: u64,
    encode: Duration,
    link: Duration,
}

impl Lately {
    const NONE: Self = Self {
        batches: 0,
        pages: 0,
        bytes: 0,
        encode: Duration::ZERO,
        link: Duration::ZERO,
    };

    fn add(&mut self, outcome: &Outcome) {
        self.batches += 1;
        self.pages = self.pages.saturating_add(outcome.pages);
        self.bytes = self.bytes.saturating_add(outcome.bytes);
        self.encode = self.encode.saturating_add(outcome.encode);
        self.link = self.link.saturating_add(outcome.link);
    }

    fn is_enough(&self) -> bool {
        self.encode.saturating_add(self.link) >= ENOUGH_TIME
            || self.batches >= ENOUGH_BATCHES && self.bytes >= ENOUGH_BYTES
    }
}

/// The decision, for all lanes of a migration.
#[derive(Clone, Debug)]
pub struct Chooser {
    level: Level,
    /// Seconds that the link takes for a byte; `None` while unknown.
    link: Option<f64>,
    /// The same by the user's cap.
    floor: f64,
    /// What `link` was made of lately: what enough batches came to, each time, the latest anywhere.
    links: [f64; STEADY],
    /// How many there were.
    seen: usize,
    /// By level; those of [`Level::Raw`] are known.
    estimates: [Option<Estimate>; 3],
    /// By level: where it was found not to pay, since the link is what it is.
    refuted: [Option<Refuted>; 3],
    /// Seconds for a page, coding and sending, at this level; `None` while unknown.
    wall: Option<f64>,
    /// Batches since the level was chosen.
    batches: u32,
    /// A look at raw pages interrupts the level: the batches that are still to pass before it is begun in earnest.
    looking: Option<u32>,
    /// What the last batches came to, until there are enough of them to tell.
    lately: Lately,
    /// Batches after which the next such look is due.
    look_after: u32,
    sampled: Duration,
    elapsed: Duration,
}

/// A sample's weight.
const SAMPLE_WEIGHT: f64 = 0.2;
/// The weight of what enough batches came to.
const WEIGHT: f64 = 0.5;
/// The same while raw pages are looked at.
const LOOK_WEIGHT: f64 = 0.7;
/// Batches are judged together until they have taken so long, or are so many and so large: a sender that waits for room in
/// its socket is woken when a third of it is free, so that of several batches one waits for all.
const ENOUGH_TIME: Duration = Duration::from_millis(25);
const ENOUGH_BATCHES: u32 = 4;
const ENOUGH_BYTES: u64 = 4 << 20;
/// Of so many judgements the median tells what the link is, once there are some.
const STEADY: usize = 7;
const STEADY_AT_LEAST: usize = 3;
/// A level is tried where it promises to cost at most this much of what raw pages cost.
const TRY: f64 = 0.8;
/// A level is kept where it costs at most this much of what raw pages cost: what is measured is a tenth off, and to
/// code for nothing takes a processor from somebody.
const KEEP: f64 = 0.9;
/// Raw batches after which a level that did not pay is tried again, the first time; each further time it is four times as many.
const FIRST_PATIENCE: u32 = 64;
/// Another coded level is taken when it promises at most this much of what the present one costs.
const BETTER: f64 = 0.9;
/// Batches that pass at the beginning of a look: what lies coded in the socket's buffer holds them up.
const PASS: u32 = 4;
/// Batches after which a level is judged: the socket's buffer hides what the first cost.
const SETTLE: u32 = 8;
/// The first look comes after this many batches, each further one after twice as many.
const FIRST_LOOK: u32 = 32;
/// A coded page that takes longer than this (2.2 Gbit/s, at two to one) is most likely held up by the link, and not by what
/// the receiver makes of it: the first look can wait.
const SLOW_LINK: f64 = 15e-6;
/// Batches until then.
const FIRST_LOOK_SLOW: u32 = 1024;
/// Seconds that patching a page takes at least: a copy, a comparison, and a copy into the cache.
const PATCH: f64 = 3e-6;
/// Share of the time that samples may take.
pub const SAMPLE_SHARE: f64 = 0.005;

impl Chooser {
    /// Begins at `start`; `floor` is the seconds that a byte takes at least, by the user's cap.
    #[must_use]
    pub const fn new(start: Level, floor: f64) -> Self {
        Self {
            level: start,
            link: None,
            floor,
            links: [0.0; STEADY],
            seen: 0,
            estimates: [
                Some(Estimate {
                    encode: 0.0,
                    ratio: 1.0,
                }),
                None,
                None,
            ],
            refuted: [None; 3],
            wall: None,
            batches: 0,
            looking: None,
            lately: Lately::NONE,
            look_after: FIRST_LOOK,
            sampled: Duration::ZERO,
            elapsed: Duration::ZERO,
        }
    }

    /// How the next batch is to be coded.
    #[must_use]
    pub const fn level(&self) -> Level {
        if self.looking.is_some() {
            Level::Raw
        } else {
            self.level
        }
    }

    /// What a raw page costs, in seconds.
    fn raw(&self) -> Option<f64> {
        let link = if self.floor > 0.0 {
            self.link.unwrap_or(0.0).max(self.floor)
        } else {
            self.link?
        };
        Some(link * PAGE_BYTES as f64)
    }

    /// Whether the link is slow enough that trying patches of pages that are sent again costs nothing that anybody
    /// would notice: less than a quarter of what they take on the link. By the median of what was measured lately: on a fast
    /// link a single pause of the receiver looks like a slow one, and pages that are copied then hold it up in earnest.
    #[must_use]
    pub fn link_has_time(&self) -> bool {
        let patch = self.estimates[Level::Patch.index()].map_or(0.0, |e| e.encode);
        let usual = self.usual_link().unwrap_or(0.0).max(self.floor);
        4.0 * patch.max(PATCH) < usual * PAGE_BYTES as f64
    }

    /// Seconds that the link takes for a byte, usually; `None` while that is unknown.
    fn usual_link(&self) -> Option<f64> {
        let mut links = self.links;
        let links = links.get_mut(..self.seen.min(STEADY))?;
        if self.seen < STEADY_AT_LEAST {
            return None;
        }
        let middle = (links.len() - 1) / 2;
        Some(*links.select_nth_unstable_by(middle, f64::total_cmp).1)
    }

    /// Whether a sample is due: raw pages are being sent, and little was spent on samples so far.
    #[must_use]
    pub fn wants_sample(&self) -> bool {
        self.level == Level::Raw
            && self.sampled.as_secs_f64() <= SAMPLE_SHARE * self.elapsed.as_secs_f64()
    }

    /// What coding a few pages at `level` came to: bytes that would go out, and the time it took.
    pub fn sample(&mut self, level: Level, pages: u64, bytes: u64, took: Duration) {
        self.sampled += took;
        self.learn(level, pages, bytes, took, SAMPLE_WEIGHT);
    }

    fn learn(&mut self, level: Level, pages: u64, bytes: u64, took: Duration, weight: f64) {
        if pages == 0 || level == Level::Raw {
            return;
        }
        let seen = Estimate {
            encode: took.as_secs_f64() / pages as f64,
            ratio: bytes as f64 / (pages * PAGE_BYTES) as f64,
        };
        let slot = &mut self.estimates[level.index()];
        *slot = Some(slot.map_or(seen, |old| Estimate {
            encode: blend(old.encode, seen.encode, weight),
            ratio: blend(old.ratio, seen.ratio, weight),
        }));
    }

    /// Takes what a batch came to, and decides anew.
    pub fn record(&mut self, outcome: Outcome) {
        self.elapsed += outcome.encode + outcome.link;
        // What was on its way on another lane when the level changed tells nothing about this one.
        if outcome.pages == 0 || outcome.bytes == 0 || outcome.level != self.level() {
            return;
        }
        if let Some(passing @ 1..) = &mut self.looking {
            *passing -= 1;
            return;
        }
        self.lately.add(&outcome);
        if !self.lately.is_enough() {
            return;
        }
        let level = outcome.level;
        let Lately {
            batches,
            pages,
            bytes,
            encode,
            link,
        } = std::mem::replace(&mut self.lately, Lately::NONE);
        self.learn(level, pages, bytes, encode, WEIGHT);
        let at_least = link.as_secs_f64() / bytes as f64;
        let at_most = (encode + link).as_secs_f64() / bytes as f64;
        let seen = match self.link {
            Some(known) if level > Level::Raw => known.min(at_most),
            _ => at_least,
        };
        self.links[self.seen % STEADY] = seen;
        self.seen += 1;
        // A look is short, and meant to replace what was believed.
        let looked = self.looking.take().is_some();
        let weight = if looked { LOOK_WEIGHT } else { WEIGHT };
        self.link = Some(self.link.map_or(seen, |old| blend(old, seen, weight)));
        if looked {
            self.batches = 0;
            self.judge(true);
            return;
        }
        if level == Level::Raw {
            for refuted in self.refuted.iter_mut().flatten() {
                refuted.left = refuted.left.saturating_sub(batches);
            }
        }
        let wall = (encode + link).as_secs_f64() / pages as f64;
        self.wall = Some(self.wall.map_or(wall, |old| blend(old, wall, WEIGHT)));
        self.batches = self.batches.saturating_add(batches);
        self.judge(false);
        let slow = self.wall.is_some_and(|wall| wall > SLOW_LINK);
        let after = self.look_after.max(if slow { FIRST_LOOK_SLOW } else { 0 });
        // The cap is known, and no look would show it.
        if self.level > Level::Raw && self.batches >= after && self.floor == 0.0 {
            self.looking = Some(PASS);
            self.look_after = after.saturating_mul(2);
        }
    }

    /// What a level promises, the time for a page if all goes well; `None` where that was refuted a short while ago.
    fn prospect(&self, level: Level, raw: f64) -> Option<f64> {
        let Estimate { encode, ratio } = self.estimates[level.index()]?;
        if self.refuted[level.index()].is_some_and(|refuted| refuted.left > 0) {
            return None;
        }
        let link = ratio * raw;
        Some(encode.max(link) + 0.1 * encode.min(link))
    }

    fn judge(&mut self, looked: bool) {
        let Some(raw) = self.raw() else { return };
        for refuted in &mut self.refuted {
            if refuted.is_some_and(|refuted| raw > 1.5 * refuted.at * PAGE_BYTES as f64) {
                *refuted = None;
            }
        }
        if !looked && self.batches < SETTLE {
            return;
        }
        let now = match (self.level, self.wall) {
            (Level::Raw, _) => raw,
            (level, Some(wall)) => {
                let capped = self.estimates[level.index()]
                    .map_or(0.0, |e| e.ratio * self.floor * PAGE_BYTES as f64);
                wall.max(capped)
            }
            (_, None) => return,
        };
        if self.level > Level::Raw && now > KEEP * raw {
            let refuted = &mut self.refuted[self.level.index()];
            let patience = refuted.map_or(FIRST_PATIENCE, |r| r.patience.saturating_mul(4));
            *refuted = Some(Refuted {
                at: raw / PAGE_BYTES as f64,
                left: patience,
                patience,
            });
            self.go_to(Level::Raw);
            return;
        }
        let limit = if self.level == Level::Raw {
            TRY * raw
        } else {
            BETTER * now
        };
        let best = [Level::Patch, Level::Full]
            .into_iter()
            .filter(|level| *level != self.level)
            .filter_map(|level| Some((level, self.prospect(level, raw)?)))
            .min_by(|a, b| a.1.total_cmp(&b.1));
        if let Some((level, cost)) = best
            && cost < limit
        {
            self.go_to(level);
        }
    }

    fn go_to(&mut self, level: Level) {
        self.level = level;
        self.wall = None;
        self.lately = Lately::NONE;
        self.batches = 0;
        self.look_after = FIRST_LOOK;
    }
}

fn blend(old: f64, new: f64, weight: f64) -> f64 {
    old + weight * (new - old)
}

#[cfg(test)]
#[path = "adaptive/tests.rs"]
mod tests;
