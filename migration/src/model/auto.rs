//! `auto`: one goal instead of knobs.
//!
//! ```text
//!            first step measured           left of the pass: 0
//!  Watching ────────────────────▶ Passing ────────────────────▶ Going on with pre-copy ──▶ stop
//!  the log is cleared, a       cold pages first; now and then      │ measured ≠ predicted
//!  small step is sent          all ways to go on are predicted ◀───┘
//!                                   │
//!                                   └──▶ post-copy, MPLM, STORD, stop: where that is the best
//! ```
//!
//! The first pass is the same for pre-copy and hybrid, so nothing is wasted while `auto` watches:
//! it clears the dirty log a few times and keeps in which intervals each page was written
//! ([`observe`]), fits write rates to that ([`rates`]), has the model run the real policies over a
//! sample of the guest from where the migration stands ([`guest`], [`predict`]), and applies a rule
//! to what comes out ([`choose`]).
//!
//! Once the guest was handed over or stopped there is no way back, and nothing is asked any more.

mod choose;
mod guest;
mod observe;
mod predict;
mod rates;

use super::policy_of;
use crate::first_pass::FirstPass;
use crate::numbers::pages_in;
use crate::options::{OnTimeout, Options, PolicyKind};
use crate::page::PAGE_BYTES;
use crate::policy::{Decision, LONGEST_ROUND_TRIP, Policy, PreCopy, SendOrder, View};
pub(super) use choose::{Goal, Kind, Prediction, choose, sentence};
use guest::Sample;
use observe::Observed;

/// The first step: enough to measure the link, little to have sent before anything is known (4
/// MiB).
const FIRST_STEP: u64 = 1024;
/// Steps of a first pass.
const STEPS: u64 = 16;
/// The shortest interval of watching, in seconds; each is twice as long as the one before.
const INTERVAL: f64 = 0.025;
/// The part of memory that is still to be sent when a choice is made.
const LOOKS: [f64; 7] = [0.85, 0.7, 0.55, 0.4, 0.25, 0.1, 0.0];
/// Measured and predicted dirtying differ by so much before the choice is looked at again …
const DIFFERS: f64 = 0.3;
/// … and another way has to gain at least this share of the cost.
const GAINS: f64 = 0.1;
/// So many pages are no pattern.
const FEW: f64 = 64.0;
/// Looks back in all: each costs a prediction.
const MOST_LOOKS: u32 = 16;

/// Chooses among the policies by what it measures.
pub struct Auto {
    options: Options,
    /// What is left of the first pass; `None` before it begins.
    pass: Option<FirstPass>,
    observed: Observed,
    /// How long the next interval is to be.
    interval: f64,
    /// How many of [`LOOKS`] are behind.
    looks: usize,
    looked_back: u32,
    /// The round after which it was last asked.
    round: u32,
    chosen: Option<Chosen>,
    /// What is to be told.
    news: Option<String>,
    /// The goals have changed, and a round may have been cut short.
    tuned: bool,
    /// The time was up and the guest is slowed: pre-copy goes on to the end.
    slowing: Option<PreCopy>,
}

/// What was chosen last.
struct Chosen {
    prediction: Prediction,
    sample: Sample,
    why: String,
    feasible: bool,
    /// Who decides now; `None` in the first pass.
    policy: Option<Box<dyn Policy>>,
    /// Rounds before it began.
    rounds: u32,
    /// The live phase was said to be over.
    left: bool,
}

impl std::fmt::Debug for Auto {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = self.chosen.as_ref().map(|chosen| chosen.prediction.kind);
        f.debug_struct("Auto")
            .field("chosen", &kind)
            .finish_non_exhaustive()
    }
}

impl Auto {
    /// With the goals of the options.
    #[must_use]
    pub fn new(options: &Options) -> Self {
        Self {
            options: options.clone(),
            pass: None,
            observed: Observed::default(),
            interval: INTERVAL,
            looks: 0,
            looked_back: 0,
            round: 0,
            chosen: None,
            news: None,
            tuned: false,
            slowing: None,
        }
    }

    fn goal(&self, view: &View<'_>) -> Goal {
        Goal {
            downtime: self.options.downtime,
            timeout: self.options.timeout,
            post_copy: view.post_copy
                && !self.options.no_postcopy
                && view.round_trip <= LONGEST_ROUND_TRIP,
        }
    }

    /// Predicts all ways to go on, and takes the one that the rule names: another one than before
    /// only if that gains enough.
    fn look(&mut self, view: &View<'_>) {
        let Some(sample) = Sample::new(view, &self.observed) else {
            return;
        };
        let goal = self.goal(view);
        let predictions = predict::all(view, &sample, &self.options);
        let Some(best) = choose(&predictions, &goal) else {
            return;
        };
        let mut taken = best;
        if let Some(before) = &self.chosen
            && before.policy.is_some()
            && let Some(same) = predictions
                .iter()
                .find(|p| before.prediction.is_same_way(p))
            && goal.feasible(same) == goal.feasible(best)
            && same.cost() <= best.cost() / (1.0 - GAINS)
        {
            taken = same;
        }
        let why = sentence(taken, &predictions, &goal);
        let feasible = goal.feasible(taken);
        let changed = self.chosen.as_ref().is_none_or(|before| {
            !before.prediction.is_same_way(taken) || before.feasible != feasible
        });
        if changed {
            self.news = Some(why.clone());
        }
        let before = self.chosen.take().filter(|_| !changed);
        let (policy, rounds) = before.map_or((None, 0), |before| (before.policy, before.rounds));
        self.chosen = Some(Chosen {
            prediction: taken.clone(),
            sample,
            why,
            feasible,
            policy,
            rounds,
            left: false,
        });
    }

    /// The goals are others: what a step that was cut short has left is taken up again, and the
    /// choice is looked at again where one was made.
    fn start_again(&mut self, view: &View<'_>) {
        if let Some(pass) = &mut self.pass {
            let mut unsent = view.pending.clone();
            unsent.subtract(view.sent);
            *pass = FirstPass::new(unsent);
        }
        if self.chosen.is_some() {
            self.look(view);
            if let Some(chosen) = &mut self.chosen {
                chosen.policy = None;
            }
        }
    }

    /// Takes note of what was written, and says whether the log is to be cleared for the next
    /// interval.
    fn watch(&mut self, view: &View<'_>) -> bool {
        if self.observed.lasted(view) < self.interval {
            return false;
        }
        self.observed.end(view);
        self.observed.begin(view);
        self.interval *= 2.0;
        true
    }

    /// How many pages the next step of the first pass has.
    fn step(&self, view: &View<'_>) -> u64 {
        let most = (view.total_pages / STEPS).max(64);
        // While a step is under way one more is sent: together they outlast a round trip, or the
        // link idles.
        let long = view.round_trip >= LONGEST_ROUND_TRIP;
        match view.live_rate() {
            None if long => view.total_pages / 4,
            None => FIRST_STEP.min(most),
            Some(rate) => {
                let in_flight = 2.0 * rate * view.round_trip.as_secs_f64() / PAGE_BYTES as f64;
                let interval = rate * self.interval / PAGE_BYTES as f64;
                pages_in(interval.max(in_flight)).clamp(64, most.max(pages_in(in_flight)))
            }
        }
    }

    /// The first pass: cold pages first, and looks on the way.
    fn pass(&mut self, view: &View<'_>) -> Option<Decision> {
        let Some(pass) = &self.pass else {
            self.pass = Some(FirstPass::new(view.pending.clone()));
            self.observed.begin(view);
            return Some(Decision::Watch);
        };
        let mut left = pass.left().clone();
        // What the engine has announced meanwhile need not be sent.
        left.intersect_with(view.pending);
        let share = left.len() as f64 / view.total_pages.max(1) as f64;
        if view.round > 0 && self.watch(view) {
            return Some(Decision::Watch);
        }
        let due = LOOKS.get(self.looks).is_some_and(|look| share <= *look);
        if due && view.bandwidth.is_some() && !self.observed.lengths.is_empty() {
            while LOOKS.get(self.looks).is_some_and(|look| share <= *look) {
                self.looks += 1;
            }
            self.look(view);
            // That took a while: what follows is decided by newer numbers.
            return Some(Decision::Watch);
        }
        if let Some(decision) = self.leave_the_pass(view) {
            return Some(decision);
        }
        if left.is_empty() {
            return None;
        }
        if view.elapsed >= self.options.timeout {
            let why = format!(
                "the time limit of {:?} has passed with {} pages never sent",
                self.options.timeout,
                left.len()
            );
            return Some(Decision::Stop { why });
        }
        let step = self.step(view);
        let warm = self.observed.ever(view.written);
        let pages = self.pass.as_mut()?.take(&warm, step);
        Some(Decision::Send {
            pages,
            order: SendOrder::Address,
        })
    }

    /// Whether what was chosen goes another way than the first pass.
    fn leave_the_pass(&mut self, view: &View<'_>) -> Option<Decision> {
        let kind = self.chosen.as_ref()?.prediction.kind;
        match kind {
            Kind::PreCopy | Kind::Hybrid | Kind::ColdThenPostCopy => None,
            Kind::PostCopy | Kind::Mplm | Kind::Stord | Kind::Stop => self.follow(view),
        }
    }

    /// What was chosen decides.
    fn follow(&mut self, view: &View<'_>) -> Option<Decision> {
        let options = &self.options;
        let chosen = self.chosen.as_mut()?;
        let why = &chosen.why;
        chosen.left = true;
        match chosen.prediction.kind {
            Kind::Stop => return Some(Decision::Stop { why: why.clone() }),
            Kind::PostCopy | Kind::ColdThenPostCopy | Kind::Hybrid => {
                return Some(Decision::HandOver {
                    order: chosen.prediction.options.order,
                    why: why.clone(),
                });
            }
            Kind::PreCopy | Kind::Mplm | Kind::Stord => {}
        }
        let policy = chosen.policy.get_or_insert_with(|| {
            chosen.rounds = view.round.saturating_sub(1);
            let real = Options {
                // What is to happen when rounds stop shrinking is decided here: see `end`.
                on_timeout: OnTimeout::Stop,
                timeout: options.timeout,
                ..chosen.prediction.options.clone()
            };
            policy_of(&real)
        });
        let view = View {
            round: view.round.saturating_sub(chosen.rounds),
            ..*view
        };
        Some(match policy.next(&view) {
            Decision::Stop { why: end } => Decision::Stop {
                why: format!("{why}; {end}"),
            },
            Decision::HandOver { order, why: end } => Decision::HandOver {
                order,
                why: format!("{why}; {end}"),
            },
            other => other,
        })
    }

    /// Before a pause over the goal: once more looks for a better way, or does what the user wants
    /// at the timeout.
    fn end(&mut self, decision: Decision, view: &View<'_>) -> Decision {
        let Decision::Stop { why } = decision else {
            return decision;
        };
        let kept = view
            .predicted_downtime()
            .is_some_and(|pause| pause <= self.options.downtime);
        if kept {
            return Decision::Stop { why };
        }
        if view.elapsed >= self.options.timeout {
            return match self.options.on_timeout {
                OnTimeout::Stop => Decision::Stop { why },
                OnTimeout::Postcopy => Decision::HandOver {
                    order: self.options.order,
                    why,
                },
                OnTimeout::Throttle => {
                    let options = Options {
                        policy: PolicyKind::Precopy,
                        ..self.options.clone()
                    };
                    self.slowing.insert(PreCopy::new(&options)).next(view)
                }
                OnTimeout::Cancel => Decision::GiveUp {
                    why: format!(
                        "{why}; raise --downtime or --timeout, or use --on-timeout stop or postcopy"
                    ),
                },
            };
        }
        let promised = self
            .chosen
            .as_ref()
            .is_some_and(|chosen| chosen.feasible && chosen.policy.is_some());
        if promised && self.looked_back < MOST_LOOKS {
            self.looked_back += 1;
            self.look(view);
            if let Some(chosen) = &mut self.chosen {
                chosen.policy = None;
            }
            return Decision::Watch;
        }
        Decision::Stop { why }
    }

    /// Whether the guest does something else than was predicted.
    fn differs(&self, view: &View<'_>) -> bool {
        let Some(chosen) = &self.chosen else {
            return false;
        };
        let over = view.dirtied_over.as_secs_f64();
        // A page that was sent in the round shows only what was written to it after that: half of
        // the time, on average.
        let low = chosen.sample.written_in(over / 2.0) * (1.0 - DIFFERS);
        let high = chosen.sample.written_in(over) * (1.0 + DIFFERS);
        let measured = view.dirtied_pages as f64;
        measured < low - FEW || measured > high + FEW
    }
}

impl Policy for Auto {
    fn name(&self) -> &'static str {
        "auto"
    }

    fn next(&mut self, view: &View<'_>) -> Decision {
        if let Some(slowing) = &mut self.slowing {
            return slowing.next(view);
        }
        let again = std::mem::replace(&mut self.round, view.round) == view.round;
        // A link that is being drained for the pause is no time for second thoughts.
        let leaving = self.chosen.as_ref().is_some_and(|chosen| {
            let kind = chosen.prediction.kind;
            chosen.left && (kind.follows() || kind == Kind::Stop)
        });
        if std::mem::take(&mut self.tuned) && !leaving {
            self.start_again(view);
        }
        if !leaving
            && self
                .chosen
                .as_ref()
                .is_none_or(|chosen| chosen.policy.is_none())
            && let Some(decision) = self.pass(view)
        {
            return self.end(decision, view);
        }
        if !leaving && !again {
            let watched = self.watch(view);
            if self.looked_back < MOST_LOOKS && self.differs(view) {
                self.looked_back += 1;
                self.look(view);
                return Decision::Watch;
            }
            if watched {
                return Decision::Watch;
            }
        }
        let Some(decision) = self.follow(view) else {
            // Nothing could be measured: as pre-copy does.
            let options = Options {
                policy: PolicyKind::Precopy,
                ..self.options.clone()
            };
            return PreCopy::new(&options).next(view);
        };
        self.end(decision, view)
    }

    fn choice(&mut self) -> Option<String> {
        self.news.take()
    }

    fn tune(&mut self, options: &Options) {
        self.options = options.clone();
        self.tuned = true;
        if let Some(slowing) = &mut self.slowing {
            slowing.tune(options);
        }
    }

    fn hands_over(&self) -> bool {
        let chosen = self.chosen.as_ref();
        chosen.is_some_and(|chosen| chosen.prediction.kind.follows())
    }
}

#[cfg(test)]
mod tests;
