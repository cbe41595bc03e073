//! Guests whose pages follow them.

use super::*;

/// A guest that is moved by post-copy, in this order.
fn moved_first(policy: PolicyKind, order: PushOrder, seed: u64) -> Scenario {
    let mut scenario = Scenario::calm(seed);
    scenario.write_rate = 20_000.0;
    scenario.racing_writes = 0.0;
    scenario.options.policy = policy;
    scenario.options.order = order;
    scenario.options.verify = seed.is_multiple_of(2);
    scenario
}

#[test]
fn post_copy_sends_each_page_once() {
    for order in [PushOrder::Demand, PushOrder::Flush, PushOrder::Bubble] {
        for seed in 0..10 {
            let scenario = moved_first(PolicyKind::Postcopy, order, seed);
            let outcome = run(&scenario);
            assert_eq!(outcome.violations, Vec::<String>::new(), "{order:?} {seed}");
            let report = &outcome.report;
            assert_eq!(report.status, Status::Completed, "{report:?}");
            assert_eq!(
                report.pages.sent + report.pages.zero,
                scenario.pages,
                "{report:?}"
            );
            assert_eq!(report.pages.resent, 0);
            assert_eq!(report.verified, seed.is_multiple_of(2).then_some(true));
            assert_eq!(report.faults.count, outcome.faults, "{report:?}");
            assert!(
                outcome.faults > 0 && report.faults.stalled_ms > 0.0,
                "{report:?}"
            );
        }
    }
}

#[test]
fn hybrid_sends_what_was_dirtied_once_more() {
    for seed in 0..10 {
        let scenario = moved_first(PolicyKind::Hybrid, PushOrder::Bubble, seed);
        let outcome = run(&scenario);
        assert_eq!(outcome.violations, Vec::<String>::new());
        let report = &outcome.report;
        assert_eq!(report.status, Status::Completed, "{report:?}");
        assert_eq!(report.rounds.len(), 2, "{report:?}");
        assert_eq!(report.rounds[0].pages, scenario.pages);
        assert_eq!(
            report.rounds[1].pages, report.rounds[0].dirtied,
            "{report:?}"
        );
    }
}

/// A guest that dirties faster than the link carries moves nevertheless.
#[test]
fn pre_copy_that_does_not_converge_turns_into_post_copy() {
    let mut scenario = evenly(PolicyKind::Precopy, 3.0, 1);
    scenario.options.on_timeout = OnTimeout::Postcopy;
    let outcome = run(&scenario);
    assert_eq!(outcome.violations, Vec::<String>::new());
    assert_eq!(
        outcome.report.status,
        Status::Completed,
        "{:?}",
        outcome.report
    );
    let why = outcome.report.why.unwrap();
    assert!(why.contains("its pages follow"), "{why}");
    assert!(outcome.report.faults.count > 0);
}

#[test]
fn bubbling_takes_fewer_faults_than_demand() {
    for walk in [false, true] {
        let faults = |order| {
            let mut scenario = moved_first(PolicyKind::Postcopy, order, 3);
            scenario.pages = 4000;
            scenario.working_set = 1000;
            scenario.walk = walk;
            scenario.zero_share = 0.0;
            let outcome = run(&scenario);
            assert_eq!(outcome.violations, Vec::<String>::new());
            outcome.faults
        };
        let (demand, bubble) = (faults(PushOrder::Demand), faults(PushOrder::Bubble));
        // Here each message, and each word about what is in place, stops everything for 20 µs: by
        // far more are hidden elsewhere (see the model's tests, and `ferry bench goals`).
        assert!(
            bubble * 3 < demand * 2,
            "walk {walk}: {bubble} against {demand}"
        );
    }
}

/// Every fault at every message of a short post-copy, and recovery from it.
#[test]
fn every_fault_at_every_message_of_post_copy() {
    let base = |verify, order| {
        let mut scenario = moved_first(PolicyKind::Postcopy, order, 7);
        scenario.pages = 60;
        scenario.options.verify = verify;
        scenario
    };
    let mut interrupted = 0;
    for (verify, order) in [(false, PushOrder::Demand), (true, PushOrder::Bubble)] {
        println!("{order:?}, verify {verify}");
        let outcomes = at_every_message(&base(verify, order));
        interrupted += outcomes
            .iter()
            .filter(|outcome| outcome.report.status == Status::Interrupted)
            .count();
    }
    assert!(interrupted > 100, "{interrupted}");
}
