//! Every policy moves every kind of guest, on one and on two processors.
//!
//! All memory is compared (`verify`), and in the end every guest verifies its memory or its result
//! itself. One test per policy, so that a failure names it.
#![allow(clippy::unwrap_used, clippy::panic)]

use ferry_guest_images::Line;
use ferry_migration::options::{OnTimeout, Options, PolicyKind};
use ferry_migration::order::PushOrder;
use ferry_migration::report::Report;
use ferry_tests::{Host, State, guests_run};
use std::cell::Cell;
use std::time::Duration;

/// Small, so that the whole table takes a few minutes on a busy machine; all of it is filled.
const MEMORY: &str = "32M";

/// A guest's task.
struct Work {
    text: &'static str,
    /// A kernel with a result, rather than a writer with a verdict.
    kernel: bool,
    /// Whether it touches memory all the time.
    writes: bool,
}

const WORKLOADS: [Work; 6] = [
    Work {
        text: "idle:fill=half",
        kernel: false,
        writes: false,
    },
    Work {
        text: "dirty:wss=8M,rate=4000,pattern=sequential,fill=random",
        kernel: false,
        writes: true,
    },
    Work {
        text: "dirty:wss=8M,rate=4000,pattern=uniform,fill=zero-rich",
        kernel: false,
        writes: true,
    },
    Work {
        text: "dirty:wss=8M,rate=4000,pattern=zipf,fill=random",
        kernel: false,
        writes: true,
    },
    Work {
        text: "mg.S",
        kernel: true,
        writes: true,
    },
    Work {
        text: "is.S",
        kernel: true,
        writes: true,
    },
];

impl Work {
    fn start(&self, cpus: u32) -> Host {
        if self.kernel {
            Host::run_kernel(self.text, MEMORY, cpus)
        } else {
            Host::run(self.text, MEMORY, cpus)
        }
    }

    /// The guest goes on here, and verifies its memory or its result.
    fn verified(&self, host: Host) {
        if self.kernel {
            host.guest_line("a result", |l| matches!(l, Line::Result(_)));
            host.result();
        } else {
            host.proves_running();
            let verdict = host.verdict();
            assert_eq!(verdict.writes > 0, self.writes, "{verdict:?}");
        }
    }
}

/// Moves every workload on one and on two processors; `expect` looks at the report as this policy
/// demands.
fn every_workload(options: &Options, expect: impl Fn(&Work, &Report)) {
    if !guests_run() {
        return;
    }
    for cpus in [1, 2] {
        for work in &WORKLOADS {
            let mut source = work.start(cpus);
            let destination = Host::receive();
            let report = source.migrate_well(destination.uri(), options);
            eprintln!(
                "{} of {} on {cpus}: {} rounds, {:.0} ms, downtime {:.2} ms, {} faults; {}",
                report.policy,
                work.text,
                report.rounds.len(),
                report.total_ms,
                report.downtime_ms,
                report.faults.count,
                report.why.as_deref().unwrap_or_default(),
            );
            assert_eq!(report.policy, options.policy.name());
            assert!(report.why.is_some(), "{report:#?}");
            expect(work, &report);
            assert_eq!(source.ends(), Some(0), "{:#?}", source.said());
            work.verified(destination);
        }
    }
}

/// No page followed the guest, and none was asked for.
fn nothing_follows(_: &Work, report: &Report) {
    assert!(report.rounds.iter().all(|r| !r.follows), "{report:#?}");
    assert_eq!(report.faults.count, 0, "{report:#?}");
}

/// Pages followed the guest, in one round, the last; what is said about its faults fits together.
fn pages_follow(report: &Report) {
    let following = report.rounds.iter().filter(|r| r.follows).count();
    assert_eq!(following, 1, "{report:#?}");
    assert!(report.rounds.last().unwrap().follows, "{report:#?}");
    let faults = &report.faults;
    let counted: u64 = faults.histogram.iter().map(|bucket| bucket.count).sum();
    assert!(counted <= faults.count, "{report:#?}");
    assert!(
        faults.p50_us <= faults.p99_us && faults.p99_us <= faults.max_us,
        "{report:#?}"
    );
    assert!(
        faults.stalled_ms * 1e3 >= faults.max_us - 0.001,
        "{report:#?}"
    );
}

/// After a pass of pre-copy little may be missing, or nothing: pages follow where something was,
/// and of all the guests some have missed a page.
fn what_is_missing_follows(options: &Options) {
    let (followed, faults) = (Cell::new(0), Cell::new(0));
    every_workload(options, |_, report| {
        if report.rounds.iter().any(|r| r.follows) {
            pages_follow(report);
            followed.set(followed.get() + 1);
            faults.set(faults.get() + report.faults.count);
            // What follows crossed before, but for what the time limit kept out of the first pass.
            let [first, .., last] = &report.rounds[..] else {
                panic!("{report:#?}");
            };
            assert!(
                report.pages.resent + report.pages.total >= first.pages + last.pages,
                "{report:#?}"
            );
        } else {
            assert_eq!(report.faults.count, 0, "{report:#?}");
        }
    });
    let (followed, faults) = (followed.get(), faults.get());
    assert!(
        !guests_run() || followed > 0 && faults > 0,
        "{followed} guests were followed by pages and missed {faults}"
    );
}

fn policy(policy: PolicyKind) -> Options {
    Options {
        policy,
        ..Host::options()
    }
}

#[test]
fn precopy() {
    every_workload(&policy(PolicyKind::Precopy), nothing_follows);
}

#[test]
fn precopy_by_address() {
    let options = Options {
        reorder: Some(false),
        ..policy(PolicyKind::Precopy)
    };
    every_workload(&options, nothing_follows);
}

#[test]
fn stord_in_halves() {
    let options = Options {
        split: 2,
        ..policy(PolicyKind::Stord)
    };
    every_workload(&options, nothing_follows);
}

#[test]
fn stord_in_quarters() {
    let options = Options {
        split: 4,
        ..policy(PolicyKind::Stord)
    };
    every_workload(&options, nothing_follows);
}

#[test]
fn mplm() {
    every_workload(&policy(PolicyKind::Mplm), nothing_follows);
}

/// Each page crosses once, whatever the order.
fn postcopy(order: PushOrder) {
    let options = Options {
        order,
        // A guest that never becomes quiet ends demand paging by this; nothing else depends on it.
        timeout: Duration::from_secs(4),
        ..policy(PolicyKind::Postcopy)
    };
    let faults = Cell::new(0);
    every_workload(&options, |work, report| {
        pages_follow(report);
        faults.set(faults.get() + report.faults.count);
        // A push can be faster than a small guest on a busy machine; demand paging brings nothing
        // unasked.
        assert!(
            order != PushOrder::Demand || !work.writes || report.faults.count > 0,
            "{report:#?}"
        );
        let pages = &report.pages;
        assert_eq!(pages.resent, 0, "{report:#?}");
        assert_eq!(
            pages.sent + pages.zero + pages.skipped,
            pages.total,
            "{report:#?}"
        );
    });
    assert!(!guests_run() || faults.get() > 0, "no guest missed a page");
}

#[test]
fn postcopy_on_demand() {
    postcopy(PushOrder::Demand);
}

#[test]
fn postcopy_flushed() {
    postcopy(PushOrder::Flush);
}

#[test]
fn postcopy_bubbling() {
    postcopy(PushOrder::Bubble);
}

/// One pass of pre-copy, then what the guest has written meanwhile.
#[test]
fn hybrid() {
    what_is_missing_follows(&policy(PolicyKind::Hybrid));
}

/// Pre-copy of a writer that is faster than the cap does not converge; the guest moves all the
/// same.
#[test]
fn precopy_that_becomes_postcopy() {
    what_is_missing_follows(&Options {
        timeout: Duration::from_secs(1),
        on_timeout: OnTimeout::Postcopy,
        bandwidth: Some(30_000_000),
        downtime: Duration::from_millis(1),
        ..policy(PolicyKind::Precopy)
    });
}

/// One guest goes round, each hop by another policy: what one leaves behind (write protection,
/// pages that were registered as missing, holes) does not disturb the next. The guest's own check
/// at the end covers the whole way.
#[test]
fn a_round_trip_with_another_policy_at_each_hop() {
    if !guests_run() {
        return;
    }
    let hops = [
        policy(PolicyKind::Postcopy),
        policy(PolicyKind::Precopy),
        policy(PolicyKind::Hybrid),
        Options {
            order: PushOrder::Flush,
            channels: Some(2),
            ..policy(PolicyKind::Postcopy)
        },
        policy(PolicyKind::Stord),
        policy(PolicyKind::Mplm),
    ];
    for (work, cpus) in [(&WORKLOADS[2], 1), (&WORKLOADS[4], 2)] {
        let mut here = work.start(cpus);
        for options in &hops {
            let next = Host::receive();
            let report = here.migrate_well(next.uri(), options);
            eprintln!(
                "{} on {cpus}: {} in {:.0} ms, downtime {:.2} ms",
                work.text, report.policy, report.total_ms, report.downtime_ms
            );
            assert_eq!(here.ends(), Some(0), "{:#?}", here.said());
            assert_eq!(next.state(), State::Running);
            here = next;
        }
        work.verified(here);
    }
}
