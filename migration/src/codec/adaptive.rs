//! Which coders the data channels use, from what they measure: a pure object, batches in, a
//! decision out.
//!
//! Every page costs time on the link, and coding costs time on a processor. While a batch is coded
//! the link still drains what the socket holds, so that in the best case a page takes the *larger*
//! of the two, and where the "link" is itself a processor copying bytes (loopback) their *sum*. So:
//!
//! - a level is *tried* when its prospect, the best case, beats the cost of raw pages by `TRY`;
//! - what it costs then is measured, and it is left unless it saves a tenth of what raw pages cost;
//!   it is not tried again for a while, each time four times as long, nor is another that makes
//!   pages no smaller, unless the link has become half as fast;
//! - what raw pages cost is measured while they are sent. While others are, it is only known to be
//!   at most what sending and coding took: a receiver that decodes looks like a slow link, so that
//!   nothing is believed slower before raw pages are looked at, which they are now and then, the
//!   more seldom the more is gained by then;
//! - a sender that waits, waits for what the receiver does with pages that were sent long before:
//!   the sockets' buffers lie between them. So nothing is measured after a change before a data
//!   channel has sent as much as they hold (`FLUSH`), and then from wait to wait.
//!
//! Prospects come from samples: a few pages are coded and thrown away, for at most [`SAMPLE_SHARE`]
//! of the time.

mod measured;

use crate::page::PAGE_BYTES;
use std::time::Duration;

pub use measured::{DataChannel, Outcome};
use measured::{FLUSH, Lately, Pace};

/// Which coders are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Level {
    /// None: pages go straight from guest memory.
    Raw,
    /// Those that cost about as much as a copy: patches, against zeros and against what the
    /// destination has.
    Patch,
    /// Those and zstd.
    Full,
}

impl Level {
    const fn index(self) -> usize {
        self as usize
    }
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
    /// What a raw page cost at that time, in seconds.
    at: f64,
    /// Raw pages until it may be tried again.
    left: u64,
    /// How many there were at first.
    timeout: u64,
}

/// The decision, for all data channels of a migration.
#[derive(Clone, Debug)]
pub struct Chooser {
    level: Level,
    /// What the link takes for a raw page.
    link: Pace,
    /// The same at least, by the user's cap.
    floor: f64,
    /// What `link` was made of lately: what enough batches came to, each time, the latest anywhere.
    links: [f64; STEADY],
    /// How many there were.
    seen: usize,
    /// By level; those of [`Level::Raw`] are known.
    estimates: [Option<Estimate>; 3],
    /// By level: where it was found not to pay, since the link is what it is.
    refuted: [Option<Refuted>; 3],
    /// Seconds for a page, coding and sending, at this level.
    wall: Pace,
    /// Pages that were measured since the level was chosen.
    pages: u64,
    /// How often judgement was passed since then.
    judged: u32,
    /// Counts the changes.
    change: u64,
    /// A look at raw pages interrupts the level.
    looking: bool,
    /// What they cost when they were sent last; `None` where none were yet.
    looked: Option<f64>,
    /// What the last batches came to, until there are enough of them to tell.
    lately: Lately,
    /// Pages after which the next such look is due, at the least.
    look_after: u64,
    sampled: Duration,
    elapsed: Duration,
}

/// A sample's weight.
const SAMPLE_WEIGHT: f64 = 0.2;
/// The weight of what enough batches came to, at least: of the first few it is the mean.
const WEIGHT: f64 = 0.2;
/// Bytes that a look takes.
const LOOK_BYTES: u64 = 16 << 20;
/// What was known counts for so much beside what a look shows.
const LOOK_LEAVES: f64 = 0.2;
/// Pages after which a level is judged.
const SETTLE: u64 = 4096;
/// Of few pages little is known: after that many, a level is left only where it costs this much
/// more than it may after many.
const DOUBT: f64 = 0.1;
/// Of so many judgements the median tells what the link is, once there are some.
const STEADY: usize = 7;
const STEADY_AT_LEAST: usize = 3;
/// A level is tried where it promises to cost at most this much of what raw pages cost.
const TRY: f64 = 0.8;
/// A level is kept where it costs at most this much of what raw pages cost: what is measured is a
/// tenth off, and coding without a gain takes processor time from the guest.
const KEEP: f64 = 0.9;
/// Raw pages after which a level that did not pay is tried again, the first time; each further time
/// it is four times as many.
const FIRST_TIMEOUT: u64 = 1 << 17;
/// Nor is another level tried meanwhile, unless it sends at most this much of what that one did.
const UNLIKE: f64 = 0.8;
/// It is tried again at once where raw pages cost so many times what they cost then.
const SLOWER: f64 = 2.0;
/// Another coded level is taken when it promises at most this much of what the present one did.
const BETTER: f64 = 0.9;
/// The first look comes after this many pages, each further one after twice as many.
const FIRST_LOOK: u64 = 1 << 15;
/// Pages until then where no raw page has been sent yet.
const FIRST_LOOK_UNKNOWN: u64 = 1 << 13;
/// Where coded pages show that raw ones cost less than this much of what they did, another look is
/// due.
const FASTER: f64 = 0.75;
/// Share of the time that other looks may take.
const LOOK_SHARE: f64 = 0.03;
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
            link: Pace::UNKNOWN,
            floor: floor * PAGE_BYTES as f64,
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
            wall: Pace::UNKNOWN,
            pages: 0,
            judged: 0,
            change: 0,
            looking: false,
            looked: None,
            lately: Lately::NONE,
            look_after: FIRST_LOOK,
            sampled: Duration::ZERO,
            elapsed: Duration::ZERO,
        }
    }

    /// How the next batch is to be coded.
    #[must_use]
    pub const fn level(&self) -> Level {
        if self.looking { Level::Raw } else { self.level }
    }

    /// What a raw page costs, in seconds.
    fn raw(&self) -> Option<f64> {
        if self.floor > 0.0 {
            return Some(self.link.get().unwrap_or(0.0).max(self.floor));
        }
        self.link.get()
    }

    /// Whether the link is slow enough that trying patches of pages that are sent again costs
    /// next to nothing: less than a quarter of what they take on the link. By the
    /// median of what was measured lately: on a fast link a single pause of the receiver looks like
    /// a slow one, and pages that are copied then hold it up in earnest.
    #[must_use]
    pub fn link_has_time(&self) -> bool {
        let patch = self.estimates[Level::Patch.index()].map_or(0.0, |e| e.encode);
        let usual = self.usual_link().unwrap_or(0.0).max(self.floor);
        4.0 * patch.max(PATCH) < usual
    }

    /// Seconds that the link takes for a raw page, usually; `None` while that is unknown.
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

    /// Takes what a batch came to on a data channel, and decides anew.
    pub fn record(&mut self, data_channel: &mut DataChannel, mut outcome: Outcome) {
        let data_channels = u32::from(outcome.data_channels.max(1));
        outcome.encode /= data_channels;
        outcome.link /= data_channels;
        self.elapsed += outcome.encode + outcome.link;
        // What was on its way on another data channel when the level changed tells nothing about
        // this one.
        if outcome.pages == 0 || outcome.bytes == 0 || outcome.level != self.level() {
            return;
        }
        let level = outcome.level;
        if !data_channel.tells(self.change, &outcome) {
            return;
        }
        self.lately.add(&outcome);
        let enough = if self.looking {
            self.lately.bytes >= LOOK_BYTES
        } else {
            self.lately.is_enough()
        };
        // From wait to wait: between them batches take nothing.
        if !enough || outcome.wall() < self.lately.wall() {
            return;
        }
        let lately = std::mem::replace(&mut self.lately, Lately::NONE);
        let pages = lately.pages;
        let link = lately.link.as_secs_f64();
        self.judged = self.judged.saturating_add(1);
        let weight = WEIGHT.max(1.0 / f64::from(self.judged));
        self.learn(level, pages, lately.bytes, lately.encode, weight);
        // As pages of so many bytes.
        let on_wire = lately.bytes as f64 / PAGE_BYTES as f64;
        // A look is short, and meant to replace what was believed.
        let looked = std::mem::take(&mut self.looking);
        if looked {
            self.link.count_for(LOOK_LEAVES * on_wire);
        } else {
            self.wall.add(lately.time().as_secs_f64(), pages as f64);
        }
        let seen = if level == Level::Raw {
            self.link.add(link, on_wire);
            self.looked = self.link.get();
            link / on_wire
        } else {
            let at_most = self.at_most();
            if self.pages >= SETTLE || self.link.get().is_none() {
                self.link.is_at_most(at_most);
            }
            self.link.get().map_or(at_most, |known| known.min(at_most))
        };
        self.links[self.seen % STEADY] = seen;
        self.seen += 1;
        if looked {
            self.turn();
            self.judge();
            return;
        }
        if level == Level::Raw {
            for refuted in self.refuted.iter_mut().flatten() {
                refuted.left = refuted.left.saturating_sub(pages);
            }
        }
        self.pages = self.pages.saturating_add(pages);
        self.judge();
        // The cap is known, and no look would show it.
        if self.level > Level::Raw && self.floor == 0.0 && self.is_look_due() {
            self.look();
            self.look_after = self.pages.saturating_mul(2);
        }
    }

    /// The more a level seems to gain, the more a look costs, and the less likely it is to show
    /// anything.
    fn is_look_due(&self) -> bool {
        let (Some(raw), Some(wall), Some(looked)) = (self.link.get(), self.wall.get(), self.looked)
        else {
            return self.pages >= FIRST_LOOK_UNKNOWN;
        };
        if raw < FASTER * looked {
            return true;
        }
        let costs = (raw / wall - 1.0) * ((FLUSH + LOOK_BYTES) / PAGE_BYTES) as f64;
        self.pages >= self.look_after && self.pages as f64 * LOOK_SHARE >= costs
    }

    /// Seconds that the link takes for a raw page at most, by what coded ones take.
    fn at_most(&self) -> f64 {
        let ratio = self.estimates[self.level.index()].map_or(1.0, |estimate| estimate.ratio);
        self.wall.get().unwrap_or(f64::MAX) / ratio
    }

    /// What a level promises, the time for a page if all goes well; `None` where that was refuted a
    /// short while ago.
    fn prospect(&self, level: Level, raw: f64) -> Option<f64> {
        let Estimate { ratio, .. } = self.estimates[level.index()]?;
        let alike = |(refuted, estimate): (&Option<Refuted>, &Option<Estimate>)| {
            refuted.is_some_and(|refuted| refuted.left > 0)
                && estimate.is_some_and(|estimate| ratio > UNLIKE * estimate.ratio)
        };
        if self.refuted.iter().zip(&self.estimates).any(alike) {
            return None;
        }
        self.at_best(level, raw)
    }

    /// Seconds for a page at a level if all goes well.
    fn at_best(&self, level: Level, raw: f64) -> Option<f64> {
        let Estimate { encode, ratio } = self.estimates[level.index()]?;
        let link = ratio * raw;
        Some(encode.max(link) + 0.1 * encode.min(link))
    }

    fn judge(&mut self) {
        let Some(raw) = self.raw() else { return };
        for refuted in &mut self.refuted {
            if refuted.is_some_and(|refuted| raw > SLOWER * refuted.at) {
                *refuted = None;
            }
        }
        let now = match (self.level, self.wall.get()) {
            (Level::Raw, _) => raw,
            (level, Some(wall)) if self.pages >= SETTLE => {
                let capped = self.estimates[level.index()].map_or(0.0, |e| e.ratio * self.floor);
                wall.max(capped)
            }
            _ => return,
        };
        let keep = KEEP + DOUBT * SETTLE as f64 / self.pages.max(1) as f64;
        if self.level > Level::Raw && now > keep * raw {
            if self.looked.is_none() {
                self.look();
                return;
            }
            let refuted = &mut self.refuted[self.level.index()];
            let timeout = refuted.map_or(FIRST_TIMEOUT, |r| r.timeout.saturating_mul(4));
            *refuted = Some(Refuted {
                at: raw,
                left: timeout,
                timeout,
            });
            self.go_to(Level::Raw);
            return;
        }
        // What another coder promises is compared with what this one did: both at their best.
        let limit = match self.level {
            Level::Raw => TRY * raw,
            level => BETTER * self.at_best(level, raw).unwrap_or(now),
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

    fn look(&mut self) {
        self.looking = true;
        self.turn();
    }

    fn go_to(&mut self, level: Level) {
        self.level = level;
        self.wall = Pace::UNKNOWN;
        self.pages = 0;
        self.judged = 0;
        self.look_after = FIRST_LOOK;
        self.turn();
    }

    /// What is measured from here on is of something else.
    fn turn(&mut self) {
        self.lately = Lately::NONE;
        self.change += 1;
    }
}

fn blend(old: f64, new: f64, weight: f64) -> f64 {
    old + weight * (new - old)
}

#[cfg(test)]
#[path = "adaptive/tests.rs"]
mod tests;
