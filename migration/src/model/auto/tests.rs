//! `auto` over the model, and over the engines in the simulator.

use super::*;
use crate::model::{Activity, Outcome, Pattern, Setup, Writer, migrate, run};
use crate::page::{RamLayout, Run};
use crate::report::Status;
use crate::testing::simulator::{Scenario, run as simulate};
use proptest::prelude::*;
use std::time::Duration;

const PAGES: u64 = 16 << 10;

fn setup(bandwidth: f64, round_trip: Duration) -> Setup {
    let layout = RamLayout::new(vec![Run::new(0, PAGES)]).unwrap();
    Setup::with_round_trip(layout, bandwidth, round_trip)
}

fn options(downtime: u64, no_postcopy: bool) -> Options {
    Options {
        policy: PolicyKind::Auto,
        downtime: Duration::from_millis(downtime),
        no_postcopy,
        ..Options::default()
    }
}

fn moved(setup: &Setup, options: &Options, pattern: Pattern, pages: u64, rate: f64) -> Outcome {
    let mut guest = Writer::new(&setup.layout, pattern, pages, rate, 1);
    migrate(setup, options, &mut guest)
}

const NEAR: Duration = Duration::from_micros(200);

#[test]
fn a_calm_guest_is_moved_by_pre_copy() {
    let setup = setup(125e6, NEAR);
    let outcome = moved(&setup, &options(300, false), Pattern::Uniform, 1024, 100.0);
    assert!(outcome.completed && outcome.faults.is_none(), "{outcome:?}");
    assert!(outcome.why.starts_with("pre-copy: "), "{}", outcome.why);
    let pass = PAGES as f64 / setup.pages_per_second();
    assert!(outcome.total.as_secs_f64() < 1.1 * pass, "{outcome:?}");
}

/// Pre-copy cannot end here: the guest writes to half of its memory faster than the link carries
/// it.
#[test]
fn a_busy_guest_is_followed_by_its_pages() {
    let busy = |setup: &Setup, no_postcopy| {
        moved(
            setup,
            &options(30, no_postcopy),
            Pattern::Uniform,
            PAGES / 2,
            60_000.0,
        )
    };
    let near = setup(125e6, NEAR);
    let outcome = busy(&near, false);
    assert!(outcome.completed && outcome.faults.is_some(), "{outcome:?}");
    assert!(outcome.downtime < Duration::from_millis(30));
    assert!(
        outcome.why.contains("pre-copy would need"),
        "{}",
        outcome.why
    );
    // Not where the user does not want it, nor over a long way: then it moves with the least pause.
    for outcome in [
        busy(&near, true),
        busy(&setup(125e6, Duration::from_millis(30)), false),
    ] {
        assert!(outcome.completed && outcome.faults.is_none(), "{outcome:?}");
        assert!(
            outcome.why.contains("nothing predicted keeps"),
            "{}",
            outcome.why
        );
    }
}

/// At the timeout the user's word counts, whatever `auto` would do.
#[test]
fn the_timeout_is_the_users() {
    let setup = setup(12.5e6, NEAR);
    let at_timeout = |on_timeout| {
        let options = Options {
            timeout: Duration::from_secs(2),
            on_timeout,
            ..options(1, true)
        };
        // The first pass takes 5.4 s.
        moved(&setup, &options, Pattern::Uniform, PAGES / 4, 60_000.0)
    };
    assert!(!at_timeout(OnTimeout::Cancel).completed);
    assert!(at_timeout(OnTimeout::Stop).completed);
}

/// A guest that calms down or wakes up in the middle.
struct Changes(Writer, Writer, f64);

impl Activity for Changes {
    fn peek(&mut self) -> Option<crate::model::Touch> {
        while self.1.peek().is_some_and(|touch| touch.at < self.2) {
            self.1.pop();
        }
        let first = self.0.peek().filter(|touch| touch.at < self.2);
        first.or_else(|| self.1.peek())
    }

    fn pop(&mut self) {
        if self.0.peek().is_some_and(|touch| touch.at < self.2) {
            self.0.pop();
        } else {
            self.1.pop();
        }
    }
}

#[test]
fn it_changes_its_mind_when_the_guest_does() {
    let setup = setup(125e6, NEAR);
    let writer = |rate| Writer::new(&setup.layout, Pattern::Uniform, PAGES / 2, rate, 1);
    // It wakes up in the first pass, of 0.54 s.
    let mut guest = Changes(writer(50.0), writer(60_000.0), 0.3);
    let outcome = migrate(&setup, &options(5, false), &mut guest);
    assert!(
        outcome.completed && outcome.downtime < Duration::from_millis(5),
        "{outcome:?}"
    );
    assert!(outcome.faults.is_some(), "{}", outcome.why);
}

/// Passes decisions on, and holds that after the guest was handed over or stopped nothing else is
/// wanted.
struct Held<'a>(&'a mut Auto, Option<bool>);

impl Policy for Held<'_> {
    fn name(&self) -> &'static str {
        "held"
    }

    fn next(&mut self, view: &View<'_>) -> Decision {
        let decision = self.0.next(view);
        if let Some(handed_over) = self.1 {
            let same = matches!(decision, Decision::HandOver { .. }) == handed_over;
            assert!(same, "{decision:?}");
        }
        if let Decision::HandOver { .. } = decision {
            assert!(view.post_copy, "post-copy was not agreed on");
            self.1 = Some(true);
        }
        decision
    }
}

fn pattern() -> impl Strategy<Value = Pattern> {
    prop_oneof![
        Just(Pattern::Uniform),
        Just(Pattern::Sequential),
        Just(Pattern::Stride { step: 16 }),
        (0.5..1.5_f64).prop_map(|exponent| Pattern::Zipf { exponent }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Same guest, same link, same goals: the same decisions. It ends, and moves the guest.
    #[test]
    fn its_choices_are_deterministic_and_allowed(
        pattern in pattern(),
        pages in 1..PAGES,
        rate in 0.0..80_000.0_f64,
        bandwidth in 10e6..1.2e9_f64,
        far in any::<bool>(),
        downtime in 2..500_u64,
        no_postcopy in any::<bool>(),
    ) {
        let round_trip = if far { Duration::from_millis(30) } else { NEAR };
        let setup = setup(bandwidth, round_trip);
        let options = options(downtime, no_postcopy);
        let once = || {
            let mut auto = Auto::new(&options);
            let mut guest = Writer::new(&setup.layout, pattern, pages, rate, 1);
            run(&setup, &options, &mut Held(&mut auto, None), &mut guest)
        };
        let outcome = once();
        prop_assert_eq!(&outcome, &once());
        prop_assert!(outcome.completed, "{:?}", outcome);
        prop_assert!(outcome.faults.is_none() || !no_postcopy && !far, "{:?}", outcome);
    }
}

/// The engines drive it as the model does: it says what it chose at once, and in the report.
#[test]
fn the_engine_tells_the_choice() {
    let mut scenario = Scenario::calm(3);
    scenario.pages = 20_000;
    scenario.working_set = 10_000;
    scenario.write_rate = 100_000.0;
    scenario.zero_share = 0.0;
    scenario.zero_writes = 0.0;
    scenario.options.policy = PolicyKind::Auto;
    scenario.options.compress = crate::options::Compress::None;
    let outcome = simulate(&scenario);
    assert_eq!(outcome.violations, Vec::<String>::new());
    assert_eq!(
        outcome.report.status,
        Status::Completed,
        "{:?}",
        outcome.report
    );
    assert_eq!(outcome.report.policy, "auto");
    let why = outcome.report.why.unwrap();
    let last = outcome.choices.last().unwrap();
    assert!(why.contains("pre-copy would need"), "{why}");
    assert!(last.contains("pre-copy would need"), "{last}");
    assert!(outcome.report.rounds.iter().any(|round| round.follows));
    // Without post-copy it has to stop.
    scenario.options.no_postcopy = true;
    let outcome = simulate(&scenario);
    assert_eq!(
        outcome.report.status,
        Status::Completed,
        "{:?}",
        outcome.report
    );
    assert!(!outcome.report.rounds.iter().any(|round| round.follows));
}
