//! Guests whose memory holds next to nothing.

use super::*;
use crate::sender::BATCH_PAGES;

/// Most of its memory was never written; some of it is written while it is being looked at.
fn nearly_empty(policy: PolicyKind, seed: u64) -> Scenario {
    let mut scenario = Scenario::calm(seed);
    scenario.pages = 100_000;
    scenario.zero_share = 1.0;
    scenario.given_back = 0.05;
    scenario.zero_writes = 0.0;
    scenario.options.policy = policy;
    scenario.options.verify = seed.is_multiple_of(2);
    scenario
}

#[test]
fn memory_that_holds_nothing_crosses_in_few_messages() {
    // The first pass of `auto` goes in steps, after each of which it looks.
    let in_steps = |policy: &&PolicyKind| **policy == PolicyKind::Auto;
    for &policy in PolicyKind::ALL.iter().filter(|policy| !in_steps(policy)) {
        let mut scenario = nearly_empty(policy, 1);
        scenario.write_rate = 0.0;
        scenario.racing_writes = 0.0;
        let outcome = run(&scenario);
        assert_eq!(outcome.violations, Vec::<String>::new(), "{policy:?}");
        let report = &outcome.report;
        assert_eq!(report.status, Status::Completed, "{report:?}");
        assert_eq!(report.pages.skipped, scenario.pages, "{report:?}");
        // Batches of 256 pages would be more by themselves.
        let batches = scenario.pages / BATCH_PAGES;
        let messages = outcome.messages;
        assert!(messages < batches, "{policy:?}: {messages} of {batches}");
    }
}

#[test]
fn what_is_written_to_empty_memory_while_it_is_told_is_not_lost() {
    for &policy in PolicyKind::ALL {
        for seed in 0..8 {
            let mut scenario = nearly_empty(policy, seed);
            scenario.working_set = 15_000;
            scenario.write_rate = 30_000.0;
            scenario.racing_writes = 0.5;
            scenario.options.on_timeout = OnTimeout::Stop;
            scenario.options.timeout = Duration::from_secs(2);
            let outcome = run(&scenario);
            let violations = &outcome.violations;
            assert_eq!(violations, &Vec::<String>::new(), "{policy:?} {seed}");
            let report = &outcome.report;
            assert_eq!(report.status, Status::Completed, "{report:?}");
            assert!(report.pages.sent > 0, "{report:?}");
        }
    }
}
