//! Several data channels between real processes: every family of policies, before and after the
//! commit, and what a lost channel means.
#![allow(clippy::unwrap_used, clippy::panic)]

use ferry_migration::options::{Compress, OnTimeout, Options, PolicyKind};
use ferry_migration::order::PushOrder;
use ferry_migration::report::Status;
use ferry_tests::{Host, Proxy, State, Way, guests_run, until};

fn options(policy: PolicyKind, channels: Option<u16>) -> Options {
    Options {
        policy,
        channels,
        ..Host::options()
    }
}

/// Every family on data channels, on one processor and on two, memory compared on both sides and by
/// the guest.
#[test]
fn every_family_moves_on_data_channels() {
    if !guests_run() {
        return;
    }
    let wanted = [
        options(PolicyKind::Precopy, None),
        options(PolicyKind::Postcopy, Some(3)),
        Options {
            order: PushOrder::Flush,
            compress: Compress::None,
            ..options(PolicyKind::Postcopy, Some(2))
        },
        options(PolicyKind::Hybrid, Some(2)),
        options(PolicyKind::Hybrid, None),
        options(PolicyKind::Mplm, Some(2)),
        Options {
            on_timeout: OnTimeout::Postcopy,
            max_rounds: Some(1),
            ..options(PolicyKind::Stord, Some(2))
        },
    ];
    for cpus in [1, 2] {
        let mut here = Host::run("dirty:wss=16M,rate=4000,fill=half", "48M", cpus);
        for options in &wanted {
            let next = Host::receive();
            let report = here.migrate_well(next.uri(), options);
            let channels = &report.channels;
            eprintln!("{} on {cpus}: {channels:?}", report.policy);
            if let Some(asked) = options.channels {
                assert_eq!((channels.opened, channels.used), (asked, asked));
                // How they share it is the scheduler's affair.
                let on_data_channels: u64 = channels.bytes.iter().sum();
                // Pages that the guest asks for go beside them.
                let asked_for = report.faults.count << 12;
                let pushed = report.bytes_wire.saturating_sub(asked_for);
                assert!(on_data_channels > pushed / 2, "{report:#?}");
            }
            assert!(!channels.why.is_empty());
            assert_eq!(here.ends(), Some(0), "{:#?}", here.said());
            assert_eq!(next.state(), State::Running);
            here = next;
        }
        here.proves_running();
        assert!(here.verdict().writes > 0);
    }
}

/// Before the commit a lost data channel, or control channel, is a failed migration: the guest runs
/// on where it was, and moves the next time.
#[test]
fn a_lost_channel_before_the_commit_changes_nothing() {
    if !guests_run() {
        return;
    }
    let mut source = Host::run("dirty:wss=8M,rate=2000", "40M", 1);
    let destination = Host::receive();
    for cut in [0, 1, 2] {
        let proxy = Proxy::to(destination.address());
        let options = Options {
            bandwidth: Some(8_000_000),
            ..options(PolicyKind::Precopy, Some(2))
        };
        proxy.stall_at(4 << 20);
        let mark = destination.mark();
        let migration = source.begin_migration(&proxy.uri(), &options);
        until("pages are on their way", || {
            proxy.total(Way::Forth) >= 4 << 20
        });
        assert_eq!(proxy.connections(), 3);
        proxy.cut_one(cut);
        let report = migration.report();
        assert_eq!(report.status, Status::Failed, "{cut}: {report:#?}");
        let error = report.error.unwrap();
        eprintln!("connection {cut}: {error}");
        assert!(!error.is_empty() && !error.contains('\n'), "{error}");
        source.proves_running();
        destination.settles(mark);
    }
    source.migrate_well(destination.uri(), &options(PolicyKind::Precopy, Some(2)));
    assert_eq!(source.ends(), Some(0), "{:#?}", source.said());
    assert!(destination.verdict().writes > 0);
}
