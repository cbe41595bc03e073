//! The rule by which `auto` chooses among predictions.

use crate::options::Options;
use std::time::Duration;

/// A feasible pre-copy is taken when it costs at most this much more than the best.
const WORTH: f64 = 1.10;

/// What `auto` can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Go on sending rounds.
    PreCopy,
    /// The rest of the first pass, then post-copy.
    Hybrid,
    /// What is left of the pages that are not written, then post-copy.
    ColdThenPostCopy,
    /// Post-copy at once.
    PostCopy,
    /// Memory-bound pre-copy.
    Mplm,
    /// Split rounds.
    Stord,
    /// Stop at once.
    Stop,
}

impl Kind {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::PreCopy => "pre-copy",
            Self::Hybrid => "hybrid",
            Self::ColdThenPostCopy | Self::PostCopy => "post-copy",
            Self::Mplm => "MPLM",
            Self::Stord => "STORD",
            Self::Stop => "stopping now",
        }
    }

    /// Whether the guest needs both hosts for a while.
    pub(crate) const fn follows(self) -> bool {
        matches!(self, Self::Hybrid | Self::ColdThenPostCopy | Self::PostCopy)
    }
}

/// What one of them comes to. Times in seconds.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Prediction {
    pub(crate) kind: Kind,
    /// The options that it runs with.
    pub(crate) options: Options,
    /// From the beginning of the migration.
    pub(crate) total: f64,
    pub(crate) pause: f64,
    /// Of the vCPU, in post-copy.
    pub(crate) stall: f64,
    /// Whether the guest moves at all.
    pub(crate) completes: bool,
}

impl Prediction {
    /// Whether both go on in the same way.
    pub(crate) fn is_same_way(&self, other: &Self) -> bool {
        self.kind == other.kind
            && self.options.split == other.options.split
            && self.options.turn_share == other.options.turn_share
            && self.options.order == other.options.order
    }

    /// What it costs the user.
    pub(crate) fn cost(&self) -> f64 {
        self.total + self.pause + self.stall
    }
}

/// What the user wants, and what can be had.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Goal {
    pub(crate) downtime: Duration,
    pub(crate) timeout: Duration,
    /// The guest may run before its pages are there, and the round trip is short enough.
    pub(crate) post_copy: bool,
}

impl Goal {
    /// Whether the user would be content.
    pub(crate) fn feasible(&self, prediction: &Prediction) -> bool {
        prediction.completes
            && prediction.pause <= self.downtime.as_secs_f64()
            && prediction.total <= self.timeout.as_secs_f64()
            && (self.post_copy || !prediction.kind.follows())
    }
}

fn least<'p>(
    of: impl Iterator<Item = &'p Prediction>,
    by: impl Fn(&Prediction) -> f64,
) -> Option<&'p Prediction> {
    of.min_by(|a, b| by(a).total_cmp(&by(b)))
}

/// The best of the predictions, by the goal.
pub(crate) fn choose<'p>(predictions: &'p [Prediction], goal: &Goal) -> Option<&'p Prediction> {
    let feasible = || predictions.iter().filter(|p| goal.feasible(p));
    let best = least(feasible(), Prediction::cost);
    // No residual dependency: worth a little time.
    let pre_copy = feasible().filter(|p| p.kind == Kind::PreCopy);
    if let (Some(best), Some(pre_copy)) = (best, least(pre_copy, Prediction::cost))
        && pre_copy.cost() <= best.cost() * WORTH
    {
        return Some(pre_copy);
    }
    let follows = feasible().filter(|p| p.kind.follows());
    if let Some(follows) = least(follows, Prediction::cost) {
        return Some(follows);
    }
    // Without post-copy any of the others will do that keeps the goal.
    if best.is_some() {
        return best;
    }
    let moves = predictions
        .iter()
        .filter(|p| p.completes && (goal.post_copy || !p.kind.follows()));
    let in_time = moves
        .clone()
        .filter(|p| p.total <= goal.timeout.as_secs_f64());
    least(in_time, |p| p.pause).or_else(|| least(moves, |p| p.pause))
}

fn time(seconds: f64) -> String {
    if seconds < 1.0 {
        format!("{:.0} ms", seconds * 1e3)
    } else {
        format!("{seconds:.1} s")
    }
}

/// The sentence about a choice: its numbers, and those of the best that was not chosen.
pub(crate) fn sentence(chosen: &Prediction, predictions: &[Prediction], goal: &Goal) -> String {
    let mut text = format!("{}: {}", chosen.kind.name(), time(chosen.total));
    text += &if chosen.kind.follows() {
        format!(" with {} of stalls", time(chosen.stall))
    } else {
        format!(" and a pause of {}", time(chosen.pause))
    };
    if !goal.feasible(chosen) {
        text += &format!(
            " (nothing predicted keeps the pause within {} and the time within {})",
            time(goal.downtime.as_secs_f64()),
            time(goal.timeout.as_secs_f64())
        );
    }
    let other = |p: &&Prediction| {
        if chosen.kind.follows() {
            p.kind == Kind::PreCopy
        } else {
            p.kind.follows()
        }
    };
    let others = || predictions.iter().filter(|p| p.completes);
    let rival = least(others().filter(other), Prediction::cost)
        .or_else(|| least(others().filter(|p| p.kind != chosen.kind), Prediction::cost));
    if let Some(rival) = rival {
        text += &format!("; {} would need {}", rival.kind.name(), time(rival.total));
        text += &if rival.kind.follows() {
            format!(" with {} of stalls", time(rival.stall))
        } else {
            format!(" and would pause {}", time(rival.pause))
        };
        if rival.kind.follows() && !goal.post_copy {
            text += ", but is not allowed or the link's round trip is too long";
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn prediction(kind: Kind, total: f64, pause: f64, stall: f64) -> Prediction {
        Prediction {
            kind,
            options: Options::default(),
            total,
            pause,
            stall,
            completes: true,
        }
    }

    fn goal(post_copy: bool) -> Goal {
        Goal {
            downtime: Duration::from_millis(300),
            timeout: Duration::from_secs(60),
            post_copy,
        }
    }

    const KINDS: [Kind; 6] = [
        Kind::PreCopy,
        Kind::Hybrid,
        Kind::PostCopy,
        Kind::Mplm,
        Kind::Stord,
        Kind::Stop,
    ];

    #[test]
    fn pre_copy_within_a_tenth_of_the_best() {
        let of = |pre_copy| {
            let list = [
                prediction(Kind::PreCopy, pre_copy, 0.1, 0.0),
                prediction(Kind::Hybrid, 5.0, 0.0, 0.0),
            ];
            choose(&list, &goal(true)).unwrap().kind
        };
        assert_eq!(of(5.3), Kind::PreCopy);
        assert_eq!(of(5.5), Kind::Hybrid);
    }

    #[test]
    fn without_post_copy_the_least_pause() {
        let list = [
            prediction(Kind::PreCopy, 9.0, 0.9, 0.0),
            prediction(Kind::Hybrid, 5.0, 0.0, 0.1),
            prediction(Kind::Mplm, 8.0, 0.5, 0.0),
            prediction(Kind::Stop, 6.0, 0.7, 0.0),
        ];
        assert_eq!(choose(&list, &goal(false)).unwrap().kind, Kind::Mplm);
        assert_eq!(choose(&list, &goal(true)).unwrap().kind, Kind::Hybrid);
    }

    #[test]
    fn the_sentence_has_both_numbers() {
        let list = [
            prediction(Kind::PreCopy, 7.4, 0.26, 0.0),
            prediction(Kind::Hybrid, 5.3, 0.01, 0.3),
        ];
        let goal = goal(true);
        let chosen = choose(&list, &goal).unwrap();
        assert_eq!(
            sentence(chosen, &list, &goal),
            "hybrid: 5.3 s with 300 ms of stalls; pre-copy would need 7.4 s and would pause 260 ms"
        );
    }

    proptest! {
        /// Whatever is predicted: where something keeps the goal, what is chosen does too, and
        /// nothing that keeps it is cheaper by more than the tenth and the share of post-copy.
        #[test]
        fn nothing_infeasible_is_chosen_where_something_is_feasible(
            list in proptest::collection::vec(
                (0..6_usize, 0.0..100.0_f64, 0.0..1.0_f64, 0.0..5.0_f64, any::<bool>()), 1..12),
            post_copy in any::<bool>(),
        ) {
            let list: Vec<Prediction> = list
                .into_iter()
                .map(|(kind, total, pause, stall, completes)| Prediction {
                    completes,
                    ..prediction(KINDS[kind], total, pause, stall)
                })
                .collect();
            let goal = goal(post_copy);
            let chosen = choose(&list, &goal);
            if list.iter().any(|p| goal.feasible(p)) {
                prop_assert!(goal.feasible(chosen.unwrap()));
            }
            if let Some(chosen) = chosen {
                prop_assert!(chosen.completes && (post_copy || !chosen.kind.follows()));
                prop_assert!(sentence(chosen, &list, &goal).contains(chosen.kind.name()));
            } else {
                prop_assert!(!list.iter().any(|p| p.completes && (post_copy || !p.kind.follows())));
            }
        }
    }
}
