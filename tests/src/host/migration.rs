//! A migration that was begun, and what its report must say.

use ferry_migration::options::Options;
use ferry_migration::report::{Report, Status};
use ferry_vmm::api::client::ClientError;
use std::thread::JoinHandle;

/// A migration in the background.
#[derive(Debug)]
pub struct Migration(pub(super) JoinHandle<Result<Report, ClientError>>);

impl Migration {
    /// Its report.
    pub fn report(self) -> Report {
        self.0.join().unwrap().unwrap()
    }

    /// Its report, or why there is none.
    pub fn outcome(self) -> Result<Report, String> {
        self.0.join().unwrap().map_err(|e| e.to_string())
    }

    /// Whether it has ended.
    pub fn is_over(&self) -> bool {
        self.0.is_finished()
    }
}

/// What must be so in the report of any migration that completed.
pub(super) fn check(report: &Report, options: &Options) {
    assert_eq!(report.status, Status::Completed, "{report:#?}");
    assert_eq!(report.error, None);
    assert_eq!(
        report.verified,
        options.verify.then_some(true),
        "{report:#?}"
    );
    assert_eq!(report.session.len(), 32);
    let d = &report.downtime;
    let sum = d.quiesce_ms + d.last_pages_ms + d.verify_ms + d.state_ms + d.start_ms;
    assert!((sum - report.downtime_ms).abs() < 0.01, "{report:#?}");
    assert!(
        report.downtime_ms > 0.0 && report.downtime_ms <= report.total_ms,
        "{report:#?}"
    );
    if report.policy == "handover" {
        // Nothing was sent, and the rest is about what was.
        assert_eq!((report.pages.sent, report.pages.zero), (0, 0));
        assert!(report.rounds.is_empty() && report.why.is_some());
        return;
    }
    // The stop-and-copy is a round too; post-copy sends nothing in the pause.
    let least = if options.may_post_copy() { 1 } else { 2 };
    assert!(report.rounds.len() >= least, "{report:#?}");
    let pages = &report.pages;
    // Every page crossed, or was said to be zero, or was skipped; some more than once.
    assert_eq!(
        pages.sent + pages.zero + pages.skipped - pages.resent,
        pages.total,
        "{report:#?}"
    );
    if report.rounds_omitted == 0 {
        assert_eq!(
            report.rounds.iter().map(|r| r.pages).sum::<u64>(),
            pages.sent + pages.zero + pages.skipped,
            "{report:#?}"
        );
        let rounds = report.rounds.iter().map(|r| r.bytes).sum::<u64>();
        assert!(rounds <= report.bytes_wire, "{report:#?}");
    }
    let c = &report.codecs;
    let saved: u64 = [c.zstd, c.delta, c.sparse, c.copied]
        .iter()
        .map(|coder| coder.bytes_saved)
        .sum();
    assert!(
        report.bytes_wire + saved >= pages.sent * 4096,
        "{report:#?}"
    );
}
