//! How much of post-copy's push stream is under way at a time.
//!
//! The link carries the pushed pages and the answers to faults in one queue, wherever that is: an
//! answer waits for what was pushed before it. So the destination says when batches are in place,
//! and no more is sent ahead of its word than what keeps the link busy:
//!
//! ```text
//! window = rate × (shortest round trip + slack)
//! ```
//!
//! The rate is the highest at which batches were placed lately, and the slack both bounds the queue
//! and lets a window grow on a link that could carry more: there it makes the rate rise, and with
//! that the window. The slack is what it must be: where the rate falls behind its best although the
//! window is full, both hosts are slower to react than was thought, and the link runs dry. (BBR's
//! model, Cardwell et al. 2016, without its probing: what is measured here is the destination's
//! placing, not the network alone.)

use crate::numbers::{pages_in, seconds};
use crate::page::PAGE_BYTES;
use std::collections::VecDeque;
use std::time::Duration;

/// How long an answer waits at most behind what is pushed, where the round trip is short: between
/// these, in seconds.
const SLACK: [f64; 2] = [75e-6, 5e-3];
/// From measurement to measurement the slack shrinks or grows by these; below this share of the
/// best rate it grows.
const SHRINK: f64 = 0.95;
const GROW: f64 = 1.25;
const ENOUGH: f64 = 0.95;
/// How long the link carries one batch, unless larger ones pay.
const BATCH: Duration = Duration::from_micros(150);
/// Pages in a batch at least: system calls must not cost more than the pages.
const FEWEST: u64 = 4;
/// A batch is larger than that where what it costs beside its bytes holds the push up: every so
/// many measurements twice as many pages, or half, or a wider window are tried; more are kept if
/// the rate grows by this much, fewer if it does not fall below that.
const TRY_EVERY: u32 = 10;
const GAIN: f64 = 1.1;
const LOSS: f64 = 0.95;
/// The largest batch is so many times what the rate alone asks for.
const LARGEST: u64 = 64;
/// Pages in the largest batch.
const MOST_PAGES: u64 = crate::order::PUSH_PAGES;
/// The most bytes that are ever under way.
const MOST: u64 = 64 << 20;
/// A rate is measured over at least so long, and over so many batches, and counts for so many
/// measurements.
const PERIOD: Duration = Duration::from_millis(10);
const BATCHES: u32 = 50;
const KEPT: usize = 20;
/// The best rate is that which one in five is above, or both of the last two: what waited elsewhere
/// and comes at once is not the path's rate.
const BEST: usize = 5;
/// A shortest round trip counts for one to two times so long: paths change. Then the window is the
/// smallest for a moment, so that what it holds itself is not taken for the path.
const FORGET: Duration = Duration::from_secs(5);
const MOMENT: Duration = Duration::from_millis(5);
/// While the rate rises by this much from measurement to measurement the window is twice as wide.
const RISING: f64 = 1.25;
/// A window that is tried for one measurement is wider by this. If the rate then rises by this
/// much, round trips are longer than the shortest was, and the slack becomes this share of it.
const WIDER: f64 = 1.5;
const RISEN: f64 = 1.05;
const OF_ROUND_TRIP: f64 = 0.5;

/// A batch that was sent and is not in place.
#[derive(Clone, Copy, Debug)]
struct Batch {
    bytes: u64,
    sent: Duration,
}

/// What a measurement may try.
#[derive(Clone, Copy, Debug)]
enum Trial {
    /// Batches of another size than this, which it was before.
    Size(u64),
    /// A wider window.
    Width,
}

/// The window of one channel.
#[derive(Debug)]
pub(super) struct Window {
    batches: VecDeque<Batch>,
    under_way: u64,
    /// Shortest round trips: of this period of [`FORGET`], and of the one before.
    nearest: [Option<Duration>; 2],
    nearest_since: Duration,
    /// The window is the smallest until then: its own queue is to empty.
    looking_until: Option<Duration>,
    /// Bytes per second, the newest last.
    rates: VecDeque<f64>,
    /// The best of them, by [`BEST`]; `None` before the first.
    rate: Option<f64>,
    /// Since when placed bytes are being counted, and how many they are.
    counting: (Duration, u64),
    /// The window was full in this measurement: it shows what the path can do.
    limited: bool,
    /// The rate rises as fast as the window lets it.
    rising: bool,
    /// In seconds.
    slack: f64,
    /// Batches are so many times as large as the rate asks for.
    larger: u64,
    /// What is tried in this measurement, and the rate before.
    trial: Option<(Trial, f64)>,
    /// Measurements since the last trial, and how many there were.
    trials: (u32, u32),
}

impl Window {
    pub(super) fn new(now: Duration) -> Self {
        Self {
            batches: VecDeque::new(),
            under_way: 0,
            nearest: [None; 2],
            nearest_since: now,
            looking_until: None,
            rates: VecDeque::with_capacity(KEPT),
            rate: None,
            counting: (now, 0),
            limited: false,
            rising: true,
            slack: SLACK[0],
            larger: 1,
            trial: None,
            trials: (0, 0),
        }
    }

    /// What the path carries, of all that was measured.
    fn best(&self) -> Option<f64> {
        let mut rates: Vec<f64> = self.rates.iter().copied().collect();
        rates.sort_by(f64::total_cmp);
        let above = if self.rising { 0 } else { rates.len() / BEST };
        let best = rates.iter().rev().nth(above).copied()?;
        let last_two = self.rates.iter().rev().take(2).copied();
        Some(
            last_two
                .reduce(f64::min)
                .map_or(best, |both| best.max(both)),
        )
    }

    fn round_trip(&self) -> Option<Duration> {
        self.nearest.iter().flatten().min().copied()
    }

    /// Pages in the next batch.
    pub(super) fn batch_pages(&self, most: u64) -> u64 {
        self.rate.map_or(FEWEST, |rate| {
            let pages = pages_in(rate * BATCH.as_secs_f64() / PAGE_BYTES as f64);
            (pages.max(FEWEST) * self.larger).min(most)
        })
    }

    /// How many bytes may be under way.
    fn width(&self) -> u64 {
        // One batch on the link and one at its end, whatever was measured.
        let least = (2 * self.batch_pages(MOST_PAGES) * PAGE_BYTES).min(MOST);
        let (Some(rate), Some(round_trip), None) =
            (self.rate, self.round_trip(), self.looking_until)
        else {
            return least;
        };
        let gain = match self.trial {
            _ if self.rising => 2.0,
            Some((Trial::Width, _)) => WIDER,
            _ => 1.0,
        };
        let round_trip = round_trip.as_secs_f64();
        let width = gain * rate * (round_trip + self.slack.max(round_trip / 4.0));
        pages_in(width / PAGE_BYTES as f64)
            .saturating_mul(PAGE_BYTES)
            .clamp(least, MOST)
    }

    /// Whether the destination's word is to be awaited before the next batch.
    pub(super) fn is_full(&mut self) -> bool {
        let full = self.under_way >= self.width();
        self.limited |= full;
        full
    }

    /// A batch is on its way.
    pub(super) fn sent(&mut self, bytes: u64, now: Duration) {
        self.under_way += bytes;
        self.batches.push_back(Batch { bytes, sent: now });
    }

    /// The oldest batch is in place; `false` when there is none.
    pub(super) fn placed(&mut self, now: Duration) -> bool {
        let Some(batch) = self.batches.pop_front() else {
            return false;
        };
        self.under_way -= batch.bytes;
        self.counting.1 += batch.bytes;
        let took = now.saturating_sub(batch.sent);
        if now.saturating_sub(self.nearest_since) >= FORGET {
            let round_trip = self.round_trip().unwrap_or_default();
            self.nearest = [None, self.nearest[0]];
            self.nearest_since = now;
            self.looking_until = Some(now + took + round_trip + MOMENT);
        }
        self.nearest[0] = Some(self.nearest[0].map_or(took, |nearest| nearest.min(took)));
        match self.looking_until {
            Some(until) if now >= until => {
                self.looking_until = None;
                self.count_from(now);
            }
            Some(_) => {}
            None => self.measure(now),
        }
        true
    }

    fn measure(&mut self, now: Duration) {
        let (since, bytes) = self.counting;
        let took = now.saturating_sub(since);
        let batches = seconds(batch_time(self.rate, self.batch_pages(MOST_PAGES))) * BATCHES;
        let round_trips = self.round_trip().unwrap_or_default() * 2;
        let period = PERIOD.max(round_trips).max(batches);
        if took < period {
            return;
        }
        let rate = bytes as f64 / took.as_secs_f64();
        let before = self.rate;
        // Without a full window it was the sender that was slow: that says nothing against the
        // path.
        if self.limited || before.is_none_or(|before| rate > before) {
            if self.rates.len() == KEPT {
                self.rates.pop_front();
            }
            self.rates.push_back(rate);
        }
        if let Some(best) = before.filter(|_| self.limited && !self.rising) {
            let factor = if rate < best * ENOUGH { GROW } else { SHRINK };
            self.slack = (self.slack * factor).clamp(SLACK[0], SLACK[1]);
        }
        self.end_trial(rate);
        self.begin_trial(rate);
        self.rising &= before.is_none_or(|before| rate > before * RISING);
        self.rate = self.best();
        self.count_from(now);
    }

    /// What was tried stays if it paid.
    fn end_trial(&mut self, rate: f64) {
        let Some((trial, before)) = self.trial.take() else {
            return;
        };
        match trial {
            Trial::Size(previous) => {
                let needed = if self.larger > previous { GAIN } else { LOSS };
                if rate > before * needed {
                    // As long as it pays it goes on in that direction.
                    self.trials = (TRY_EVERY, self.trials.1.wrapping_sub(1));
                } else {
                    self.larger = previous;
                }
            }
            Trial::Width if rate > before * RISEN => {
                let round_trip = self.round_trip().unwrap_or_default().as_secs_f64();
                let slack = (round_trip * OF_ROUND_TRIP).max(self.slack * GROW);
                self.slack = slack.clamp(SLACK[0], SLACK[1]);
            }
            Trial::Width => {}
        }
    }

    /// Now and then tries larger batches, smaller ones, or a wider window, in turn.
    fn begin_trial(&mut self, rate: f64) {
        self.trials.0 += 1;
        if self.rising || self.trials.0 < TRY_EVERY {
            return;
        }
        self.trials = (0, self.trials.1.wrapping_add(1));
        let larger = match self.trials.1 % 3 {
            0 => self.larger / 2,
            1 => self.larger * 2,
            _ => {
                self.trial = Some((Trial::Width, rate));
                return;
            }
        };
        if (1..=LARGEST).contains(&larger) {
            self.trial = Some((Trial::Size(self.larger), rate));
            self.larger = larger;
        }
    }

    fn count_from(&mut self, now: Duration) {
        self.counting = (now, 0);
        self.limited = false;
    }

    /// How long the oldest batch has been under way.
    pub(super) fn waiting(&self, now: Duration) -> Duration {
        self.batches
            .front()
            .map_or(Duration::ZERO, |batch| now.saturating_sub(batch.sent))
    }
}

/// How long a batch is on the link, in seconds.
fn batch_time(rate: Option<f64>, pages: u64) -> f64 {
    rate.map_or(0.0, |rate| (pages * PAGE_BYTES) as f64 / rate.max(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A link with a queue, in virtual time: pushes for `time`, changing to another rate half way;
    /// bytes placed in the second half, and the longest waits in the link's queue in the last
    /// quarter: as long as a faster rate was remembered, and then.
    fn push(rates: [f64; 2], delay: Duration, time: Duration) -> (f64, [Duration; 2]) {
        let mut window = Window::new(Duration::ZERO);
        let (mut now, mut free) = (Duration::ZERO, Duration::ZERO);
        let mut missing_pages: VecDeque<Duration> = VecDeque::new();
        let (mut placed, mut longest) = (0.0, [Duration::ZERO; 2]);
        while now < time {
            let rate = rates[usize::from(now >= time / 2)];
            if window.is_full() {
                now = now.max(missing_pages.pop_front().unwrap());
                assert!(window.placed(now));
                continue;
            }
            while missing_pages.front().is_some_and(|at| *at <= now) {
                missing_pages.pop_front();
                assert!(window.placed(now));
            }
            let bytes = window.batch_pages(64) * PAGE_BYTES;
            free = free.max(now);
            if now >= time * 3 / 4 {
                let forgotten = window.rates.iter().all(|seen| *seen <= rates[1] * 1.1);
                let longest = &mut longest[usize::from(forgotten)];
                *longest = (*longest).max(free - now);
            }
            free += seconds(bytes as f64 / rate);
            missing_pages.push_back(free + delay);
            window.sent(bytes, now);
            if now >= time / 2 {
                placed += bytes as f64;
            }
            // What a system call takes.
            now += Duration::from_micros(5);
        }
        (placed, longest)
    }

    #[test]
    fn a_word_without_a_batch_is_none() {
        let mut window = Window::new(Duration::ZERO);
        assert!(!window.placed(Duration::from_secs(1)));
        window.sent(1, Duration::ZERO);
        assert_eq!(
            window.waiting(Duration::from_secs(2)),
            Duration::from_secs(2)
        );
        assert!(window.placed(Duration::from_secs(2)));
        assert!(!window.placed(Duration::from_secs(2)));
    }

    /// Whatever the link: it is kept busy, in all of the two seconds after it has changed, and its
    /// queue is short.
    fn is_busy_with_a_short_queue(
        rate: f64,
        then: f64,
        delay_us: u64,
    ) -> Result<(), TestCaseError> {
        let delay = Duration::from_micros(delay_us);
        let time = Duration::from_secs(4);
        let (placed, longest) = push([rate, rate * then], delay, time);
        let most = rate * then * time.as_secs_f64() / 2.0;
        prop_assert!(placed >= 0.75 * most, "{placed:.0} of {most:.0}");
        // The link is steady here, but for its change: some slack, batches of which twice as large
        // ones are tried, and what the fewest pages take.
        let fewest = seconds(9.0 * (FEWEST * PAGE_BYTES) as f64 / (rate * then));
        let allowed = (seconds(SLACK[0]).max(delay / 3) + BATCH * 2) * 3 + fewest;
        prop_assert!(longest[1] <= allowed, "{longest:?} of {allowed:?}");
        // What a faster link had under way in a round trip takes this one longer.
        let allowed = allowed + delay.mul_f64((1.0 / then - 1.0).max(0.0));
        prop_assert!(
            longest[0] <= allowed,
            "{longest:?} of {allowed:?}, at first"
        );
        Ok(())
    }

    /// It became slower, and what it was before is remembered for longer than the first second.
    #[test]
    fn the_old_rate_is_remembered_for_a_while() {
        is_busy_with_a_short_queue(13_390_554.843_142_05, 0.302_308_374_447_254_4, 19_604).unwrap();
    }

    proptest! {
        #[test]
        fn a_busy_link_and_a_short_queue(
            rate in 10e6..1e9f64,
            then in 0.3..2.0f64,
            delay_us in 20..20_000u64,
        ) {
            is_busy_with_a_short_queue(rate, then, delay_us)?;
        }
    }
}
