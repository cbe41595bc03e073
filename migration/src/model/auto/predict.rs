//! What each way of going on comes to: the model runs the real policies over a sample of the guest.

use super::super::{PUSH_PAGES, Setup, policy_of, run_from};
use super::choose::{Kind, Prediction};
use super::guest::{Future, Sample};
use crate::numbers::pages_in;
use crate::options::{OnTimeout, Options, PolicyKind};
use crate::order::PushOrder;
use crate::page::{PAGE_BYTES, PageSet};
use crate::policy::{Decision, Policy, SendOrder, View};

/// The guest's writes are taken in so many steps of a pass, and in four of the longest pause.
const STEPS: f64 = 512.0;
/// But in none shorter than this.
const SHORTEST_STEP: f64 = 0.5e-3;

/// Stops at once.
struct StopNow;

impl Policy for StopNow {
    fn name(&self) -> &'static str {
        "stop"
    }

    fn next(&mut self, _: &View<'_>) -> Decision {
        Decision::Stop {
            why: "auto stops here".into(),
        }
    }
}

/// Sends what is not written, then hands over.
struct ColdThenPostCopy(PushOrder);

impl Policy for ColdThenPostCopy {
    fn name(&self) -> &'static str {
        "postcopy"
    }

    fn next(&mut self, view: &View<'_>) -> Decision {
        let mut pages = PageSet::new(view.pending.end());
        let cold = view.pending.iter().filter(|gfn| view.heat.of(*gfn) == 0);
        cold.for_each(|gfn| {
            pages.insert(gfn);
        });
        pages.subtract(view.sent);
        if view.round == 0 && !pages.is_empty() {
            return Decision::Send {
                pages,
                order: SendOrder::Address,
            };
        }
        Decision::HandOver {
            order: self.0,
            why: "what is not written was sent".into(),
        }
    }
}

/// The ways to go on from where the migration stands.
fn ways(view: &View<'_>, options: &Options) -> Vec<(Kind, Options)> {
    let mut unsent = view.pending.clone();
    unsent.subtract(view.sent);
    let first_pass = !unsent.is_empty();
    let with = |policy| Options {
        policy,
        bandwidth: None,
        on_timeout: OnTimeout::Stop,
        timeout: options.timeout.saturating_sub(view.elapsed),
        ..options.clone()
    };
    let mut ways = vec![
        (Kind::PreCopy, with(PolicyKind::Precopy)),
        (Kind::Stop, with(PolicyKind::Precopy)),
    ];
    ways.extend([options.split.max(2), 4].map(|split| {
        let stord = Options {
            split,
            ..with(PolicyKind::Stord)
        };
        (Kind::Stord, stord)
    }));
    if first_pass {
        ways.extend([0, options.turn_share].map(|turn_share| {
            let mplm = Options {
                turn_share,
                ..with(PolicyKind::Mplm)
            };
            (Kind::Mplm, mplm)
        }));
    }
    if view.post_copy {
        // After the first pass they are the same.
        let kinds: &[_] = if first_pass {
            &[
                (Kind::PostCopy, PolicyKind::Postcopy),
                (Kind::ColdThenPostCopy, PolicyKind::Postcopy),
                (Kind::Hybrid, PolicyKind::Hybrid),
            ]
        } else {
            &[(Kind::Hybrid, PolicyKind::Postcopy)]
        };
        for (kind, policy) in kinds {
            ways.extend([PushOrder::Flush, PushOrder::Bubble].map(|order| {
                let follows = Options {
                    order,
                    ..with(*policy)
                };
                (*kind, follows)
            }));
        }
    }
    ways
}

/// What all ways to go on come to.
pub(super) fn all(view: &View<'_>, sample: &Sample, options: &Options) -> Vec<Prediction> {
    let Some(bandwidth) = view.live_rate() else {
        return Vec::new();
    };
    let page_bytes = PAGE_BYTES as f64 * sample.stands_for;
    let setup = Setup {
        page_bytes,
        state_bytes: view.state_bytes,
        pause_overhead: view.pause_overhead,
        push_pages: (PUSH_PAGES / pages_in(sample.stands_for).max(1)).max(1),
        stands_for: sample.stands_for,
        ..Setup::with_round_trip(sample.layout.clone(), bandwidth, view.round_trip)
    };
    let pass = sample.layout.pages() as f64 * page_bytes / bandwidth.max(1.0);
    let step = (pass / STEPS)
        .min(options.downtime.as_secs_f64() / 4.0)
        .max(SHORTEST_STEP);
    let predict = |(kind, options): (Kind, Options)| {
        let mut policy: Box<dyn Policy> = match kind {
            Kind::Stop => Box::new(StopNow),
            Kind::ColdThenPostCopy => Box::new(ColdThenPostCopy(options.order)),
            _ => policy_of(&options),
        };
        let mut guest = Future::new(sample, step);
        let outcome = run_from(
            &setup,
            &options,
            policy.as_mut(),
            &mut guest,
            Some(sample.start.clone()),
        );
        Prediction {
            stall: outcome.stalled().as_secs_f64(),
            kind,
            options,
            total: (view.elapsed + outcome.total).as_secs_f64(),
            pause: outcome.downtime.as_secs_f64(),
            completes: outcome.completed,
        }
    };
    ways(view, options).into_iter().map(predict).collect()
}
