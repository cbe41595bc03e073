//! The end of the live phase on the user's word: `ferry switchover`.
//!
//! The guest goes as its policy would let it go at its own end. Hybrid and post-copy hand it over,
//! and what is pending follows, pages that were never sent included. The others stop and copy; but
//! where that would pause the guest for longer than the target, and the user accepts post-copy
//! (`--on-timeout postcopy`, or `auto` without `--no-postcopy`), they hand over too.

use super::{Decision, LONGEST_ROUND_TRIP, Policy, View};
use crate::options::{OnTimeout, Options, PolicyKind};

/// What to do when the live phase is to end now.
pub(crate) fn switch_over(policy: &dyn Policy, view: &View<'_>, options: &Options) -> Decision {
    let over = view
        .predicted_downtime()
        .is_none_or(|pause| pause > options.downtime);
    let accepted = options.on_timeout == OnTimeout::Postcopy
        || options.policy == PolicyKind::Auto
            && !options.no_postcopy
            && view.round_trip <= LONGEST_ROUND_TRIP;
    let why = format!(
        "the user asked to switch over, with {} pages pending",
        view.pending_pages
    );
    if view.post_copy && (policy.hands_over() || over && accepted) {
        let order = options.order;
        return Decision::HandOver { order, why };
    }
    Decision::Stop { why }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::policy_of;
    use crate::page::{Heat, PageSet, Run};
    use std::time::Duration;

    /// Whether the guest is handed over before its pages: 1000 pages are pending, a tenth of a
    /// second of the link.
    fn hands_over(options: &Options, post_copy: bool) -> bool {
        let mut pending = PageSet::new(2000);
        pending.insert_run(Run::new(0, 1000));
        let none = PageSet::new(2000);
        let view = View {
            round: 1,
            total_pages: 2000,
            pending: &pending,
            pending_pages: 1000,
            sent: &none,
            heat: &Heat::new(2000),
            written: &none,
            dirtied_pages: 0,
            dirtied_over: Duration::from_secs(1),
            cap: None,
            bandwidth: Some(40.96e6),
            state_bytes: 0,
            disk_bytes: 0,
            pause_overhead: Duration::ZERO,
            round_trip: Duration::ZERO,
            post_copy,
            elapsed: Duration::from_secs(1),
        };
        match switch_over(&*policy_of(options), &view, options) {
            Decision::HandOver { .. } => true,
            Decision::Stop { .. } => false,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn each_policy_ends_as_it_would_by_itself() {
        for (policy, follows) in [
            (PolicyKind::Precopy, false),
            (PolicyKind::Stord, false),
            (PolicyKind::Mplm, false),
            (PolicyKind::Hybrid, true),
            (PolicyKind::Postcopy, true),
        ] {
            let options = Options {
                policy,
                ..Options::default()
            };
            assert_eq!(hands_over(&options, true), follows, "{policy:?}");
            assert!(!hands_over(&options, false), "{policy:?}");
        }
    }

    #[test]
    fn a_pause_over_the_target_is_avoided_where_the_user_accepts_post_copy() {
        let accepted = |policy, on_timeout, downtime| Options {
            policy,
            on_timeout,
            downtime: Duration::from_millis(downtime),
            ..Options::default()
        };
        for (options, follows) in [
            (accepted(PolicyKind::Precopy, OnTimeout::Postcopy, 50), true),
            (
                accepted(PolicyKind::Precopy, OnTimeout::Postcopy, 200),
                false,
            ),
            (accepted(PolicyKind::Precopy, OnTimeout::Stop, 50), false),
            (accepted(PolicyKind::Auto, OnTimeout::Cancel, 50), true),
            (accepted(PolicyKind::Auto, OnTimeout::Cancel, 200), false),
        ] {
            assert_eq!(hands_over(&options, true), follows, "{options:?}");
        }
        let never = Options {
            no_postcopy: true,
            ..accepted(PolicyKind::Auto, OnTimeout::Cancel, 50)
        };
        assert!(!hands_over(&never, true));
    }
}
