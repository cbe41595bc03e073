//! When a round-based policy stops: the downtime target, and the limits that the user set.

use super::stall::Stall;
use super::{Decision, View};
use crate::options::{OnTimeout, Options};
use crate::order::PushOrder;
use std::time::Duration;

/// The stop condition that pre-copy and its variants share.
#[derive(Debug)]
pub(super) struct Limits {
    downtime: Duration,
    timeout: Duration,
    on_timeout: OnTimeout,
    push: PushOrder,
    max_rounds: Option<u32>,
    stall: Stall,
    slowing: Option<Slowing>,
}

/// A guest that is being slowed.
#[derive(Debug)]
struct Slowing {
    since: Duration,
    /// The round after which that was last adapted.
    round: u32,
    why: String,
}

impl Slowing {
    /// Slows the guest further, once for each round, until the time is up for that, too.
    fn check(&mut self, view: &View<'_>, timeout: Duration) -> Option<Decision> {
        let over = view.elapsed.saturating_sub(self.since);
        if over >= timeout {
            let why = format!(
                "{}; the guest was slowed for {over:?}, and that did not suffice: raise --downtime, --throttle or \
                 --bandwidth, or use --on-timeout stop or postcopy",
                self.why
            );
            return Some(Decision::GiveUp { why });
        }
        let news = self.round != view.round;
        self.round = view.round;
        news.then(|| Limits::slow(view, String::new()))
    }
}

impl Limits {
    /// Passes over the set without fewer pending pages after which nothing more is expected.
    pub(super) const STALLED_ROUNDS: u32 = 6;
    /// Another round is worth its time while it leaves at most this share of what it sends …
    const WORTHWHILE: f64 = 0.5;
    /// … and sending what is left takes longer than this: the pause has fixed costs of that order.
    const SHORT_ENOUGH: Duration = Duration::from_millis(1);

    /// With the limits of the options; one pass over a set takes so many rounds.
    pub(super) const fn new(options: &Options, rounds_per_set: u32) -> Self {
        Self {
            downtime: options.downtime,
            timeout: options.timeout,
            on_timeout: options.on_timeout,
            push: options.order,
            max_rounds: options.max_rounds,
            stall: Stall::new(Self::STALLED_ROUNDS.saturating_mul(rounds_per_set)),
            slowing: None,
        }
    }

    /// Other limits from now on; how the rounds went stays known.
    pub(super) const fn tune(&mut self, options: &Options) {
        self.downtime = options.downtime;
        self.timeout = options.timeout;
        self.on_timeout = options.on_timeout;
        self.push = options.order;
        self.max_rounds = options.max_rounds;
    }

    /// Which limit is reached, in words.
    fn limit(&mut self, view: &View<'_>) -> Option<String> {
        let stalled = self.stall.is_best_moment(view.round, view.pending_bytes());
        if view.elapsed >= self.timeout {
            return Some(format!("the time limit of {:?} has passed", self.timeout));
        }
        if self.max_rounds.is_some_and(|max| view.round >= max) {
            return Some(format!("the limit of {} rounds is reached", view.round));
        }
        // Only where the user accepts what follows does it end the live phase early: with
        // `cancel` the guest may calm down before the time limit, and waiting costs nothing.
        (stalled && self.on_timeout != OnTimeout::Cancel).then(|| {
            format!(
                "pending pages have not shrunk for {} rounds, and this round is near the best",
                Self::STALLED_ROUNDS
            )
        })
    }

    /// A guest that dirties half of what the link carries leaves half as much after each round.
    fn slow(view: &View<'_>, why: String) -> Decision {
        let rate = view.live_rate().unwrap_or(0.0);
        Decision::Throttle {
            dirty_rate: rate * Self::WORTHWHILE / crate::page::PAGE_BYTES as f64,
            why,
        }
    }

    /// What the limits say before another round: stop, leave the guest, or (`None`) go on.
    pub(super) fn check(&mut self, view: &View<'_>) -> Option<Decision> {
        let predicted = view.predicted_downtime();
        // What another round could still save is next to nothing. The rest of the pause is round
        // trips and state, which no round makes shorter: going on would go on for ever.
        let short = view
            .predicted_last_pages()
            .is_some_and(|time| time <= Self::SHORT_ENOUGH);
        if let Some(predicted) = predicted
            && (short || predicted <= self.downtime)
        {
            return self.within_target(view, predicted, short);
        }
        if self.on_timeout == OnTimeout::Throttle
            && let Some(slowing) = &mut self.slowing
        {
            return slowing.check(view, self.timeout);
        }
        self.at_the_limit(view, predicted)
    }

    /// Stops where the pause is short enough and another round is not worth it.
    fn within_target(
        &mut self,
        view: &View<'_>,
        predicted: Duration,
        short: bool,
    ) -> Option<Decision> {
        // While a round still halves what is left, it is cheaper than the pause that it saves: all
        // such rounds together take less than twice the first.
        let rate = view.live_rate().unwrap_or(f64::INFINITY);
        let left = view.dirty_rate() * crate::page::PAGE_BYTES as f64 / rate;
        if short || left > Self::WORTHWHILE || self.limit(view).is_some() {
            let (ms, target) = (
                predicted.as_secs_f64() * 1e3,
                self.downtime.as_secs_f64() * 1e3,
            );
            let why = if predicted <= self.downtime {
                format!("the predicted pause of {ms:.1} ms is within the target of {target:.0} ms")
            } else {
                format!(
                    "the predicted pause of {ms:.1} ms is over the target of {target:.0} ms, but it is round trips \
                         and state: another round would not shorten it"
                )
            };
            return Some(Decision::Stop { why });
        }
        None
    }

    /// What the user wants where a limit is reached.
    fn at_the_limit(&mut self, view: &View<'_>, predicted: Option<Duration>) -> Option<Decision> {
        let limit = self.limit(view)?;
        let state = predicted.map_or_else(
            || "and no bandwidth could be measured".to_owned(),
            |predicted| {
                format!(
                    "and stopping would pause the guest for about {:.0} ms, over the target of {:.0} ms: it \
                     dirties {:.1} MB/s, the link carries {:.1} MB/s",
                    predicted.as_secs_f64() * 1e3,
                    self.downtime.as_secs_f64() * 1e3,
                    view.dirty_rate() * crate::page::PAGE_BYTES as f64 / 1e6,
                    view.bandwidth.unwrap_or(0.0) / 1e6
                )
            },
        );
        Some(match self.on_timeout {
            OnTimeout::Stop => Decision::Stop {
                why: format!("{limit}, {state}"),
            },
            OnTimeout::Postcopy => Decision::HandOver {
                order: self.push,
                why: format!("{limit}, {state}; so the guest moves and its pages follow"),
            },
            OnTimeout::Throttle => {
                let why = format!("{limit}, {state}");
                self.slowing = Some(Slowing {
                    since: view.elapsed,
                    round: view.round,
                    why: why.clone(),
                });
                Self::slow(view, format!("{why}; so the guest is slowed"))
            }
            OnTimeout::Cancel => Decision::GiveUp {
                why: format!(
                    "{limit}, {state}; raise --downtime or --timeout, or use --on-timeout throttle, stop or postcopy"
                ),
            },
        })
    }
}
