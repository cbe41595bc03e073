//! The kill matrix: each step in which a guest changes its owner, each fault and each way to move a
//! guest. `tests/soak` runs more of it at random.
#![allow(clippy::unwrap_used, clippy::panic)]

use ferry_tests::guests_run;
use ferry_tests::soak::{Case, Method, run};
use std::collections::BTreeMap;
use std::time::Instant;

fn selected(method: Method) {
    if !guests_run() {
        return;
    }
    let mut failed = Vec::new();
    for case in Case::selection() {
        if case.method == method && !tried(&case.to_string(), &case) {
            failed.push(case.to_string());
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
}

/// Whether everything held.
fn tried(name: &str, case: &Case) -> bool {
    let began = Instant::now();
    let result = run(case);
    let took = began.elapsed().as_secs_f64();
    match &result {
        Ok(verdict) => eprintln!(
            "{name}: {:?}{}{} ({took:.1} s)",
            verdict.outcome,
            if verdict.struck {
                ""
            } else {
                ", the step did not come"
            },
            verdict
                .operator
                .iter()
                .map(|did| format!(", {did}"))
                .collect::<String>()
        ),
        Err(why) => eprintln!("{name}: FAILED ({took:.1} s): {why}"),
    }
    result.is_ok()
}

#[test]
fn pre_copy() {
    selected(Method::PreCopy);
}

#[test]
fn post_copy() {
    selected(Method::PostCopy);
}

#[test]
fn hand_over() {
    selected(Method::HandOver);
}

#[test]
fn copy_disk() {
    selected(Method::CopyDisk);
}

#[test]
fn snapshot() {
    selected(Method::Snapshot);
}

/// Every step of every way, every fault of every way and every fault at every step are selected.
#[test]
fn the_selection_has_every_step_and_every_fault() {
    let chosen = Case::selection();
    eprintln!("{} of {} cases", chosen.len(), Case::all().len());
    for case in Case::all() {
        let step = |c: &&Case| (c.method, c.step) == (case.method, case.step);
        let fault = |c: &&Case| (c.method, c.fault) == (case.method, case.fault);
        assert!(chosen.iter().any(|c| step(&c)), "{case}");
        assert!(chosen.iter().any(|c| fault(&c)), "{case}");
        let pair = |c: &&Case| (c.step, c.fault) == (case.step, case.fault);
        assert!(chosen.iter().any(|c| pair(&c)), "{case}");
        assert_eq!(case.to_string().parse(), Ok(case));
    }
}

/// Cases that have found a fault of ferry.
#[test]
fn what_failed_once() {
    if !guests_run() {
        return;
    }
    for case in [
        // A network that closed the connection before ABORT was sent was taken for the answer.
        "PreCopy/State/Cut/4087",
        "CopyDisk/Ready/Cut/1904",
    ] {
        assert!(tried(case, &case.parse().unwrap()), "{case}");
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

/// What `tests/soak` runs: as many seeds as `FERRY_SOAK_RUNS` says, from `FERRY_SOAK_SEED` on, or
/// the one case that `FERRY_SOAK_CASE` names.
#[test]
#[ignore = "takes as long as it is told to: tests/soak"]
fn soak() {
    if !guests_run() {
        return;
    }
    if let Ok(case) = std::env::var("FERRY_SOAK_CASE") {
        assert!(tried(&case, &case.parse().unwrap()));
        return;
    }
    let (first, runs) = (number("FERRY_SOAK_SEED", 1), number("FERRY_SOAK_RUNS", 100));
    let mut counts: [BTreeMap<String, [u64; 2]>; 3] = Default::default();
    let mut failed = Vec::new();
    for seed in first..first + runs {
        let case = Case::from_seed(seed);
        let good = tried(&format!("seed {seed} {case}"), &case);
        let names = [
            format!("{:?}", case.method),
            format!("{:?}", case.step),
            format!("{:?}", case.fault),
        ];
        for (counts, name) in counts.iter_mut().zip(names) {
            let count = counts.entry(name).or_default();
            count[0] += 1;
            count[1] += u64::from(!good);
        }
        if !good {
            eprintln!("replay with: tests/soak --runs 1 --seed {seed}");
            failed.push(seed);
        }
    }
    for (what, counts) in ["way", "step", "fault"].iter().zip(&counts) {
        for (name, [cases, failures]) in counts {
            eprintln!("{what:5} {name:16} {cases:6} cases {failures:4} failed");
        }
    }
    eprintln!(
        "{runs} runs from seed {first}, {} failed: {failed:?}",
        failed.len()
    );
    assert!(failed.is_empty());
}
