//! What the guest does not use is not sent: a balloon that moves itself, and free pages that Linux
//! reports.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::time::{Duration, Instant};

use ferry_migration::options::{Options, PolicyKind};
use ferry_migration::report::Report;
use ferry_tests::{Host, NestedHost, NestedVmm, State, guests_run, nested_hosts};
use ferry_vmm::api::types::{BalloonRequest, BalloonStatus, BalloonWish};

const MIB: u64 = 1 << 20;

/// A guest that uses part of its memory, and has used more.
struct Use {
    /// RAM, in MiB.
    ram: u64,
    /// What a process keeps and verifies.
    keeps: u64,
    /// What it filled and gave back to its kernel.
    frees: u64,
}

fn balloon(vmm: &NestedVmm<'_>) -> BalloonStatus {
    let ran = vmm.command(&["balloon", "--json"]);
    serde_json::from_str(&ran.stdout).unwrap_or_else(|e| panic!("{e}: {ran:?}; {}", vmm.all()))
}

/// Waits until the balloon has taken what it will, or two minutes: on a busy machine, emulated, it
/// may come less far.
fn balloon_rests(vmm: &NestedVmm<'_>) -> BalloonStatus {
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        let balloon = balloon(vmm);
        // What is left over is the reserve and two bands of a quarter of it, and half a step more.
        let reserve = balloon.auto.map_or(0, |auto| auto.reserve_bytes);
        let available = balloon.guest.as_ref().and_then(|g| g.available_bytes);
        let rests = balloon.actual_bytes == balloon.target_bytes
            && available.is_some_and(|bytes| bytes < reserve * 2);
        if balloon.actual_bytes > 0 && (rests || Instant::now() > deadline) {
            eprintln!("{balloon:?}");
            return balloon;
        }
        assert!(
            Instant::now() < deadline + ferry_tests::NESTED_TIMEOUT,
            "the balloon was never filled: {balloon:?}; {}",
            vmm.all()
        );
        std::thread::sleep(Duration::from_millis(500));
    }
}

/// Boots a guest, has it use memory, and moves it once with each of the policies; how many bytes it
/// used each time, by its own account (all of its RAM, where it has no balloon and gives none), and
/// the reports.
fn moves(
    host: &NestedHost,
    what: &Use,
    more: &[&str],
    policies: &[PolicyKind],
) -> Vec<(u64, Report)> {
    let ram = format!("{}M", what.ram);
    let mut guest = host.guest(&[&["--linux", "--memory", &ram], more].concat());
    guest.prints("ferry-guest: ready");
    guest.types(&format!("memory {} {}", what.keeps, what.frees));
    guest.prints(&format!(
        "ferry-memory: kept={} freed={}",
        what.keeps, what.frees
    ));
    let mut reports = Vec::new();
    for policy in policies {
        let mut used = what.ram * MIB;
        if !more.is_empty() {
            let rests = balloon_rests(&guest);
            let available = rests.guest.and_then(|g| g.available_bytes).unwrap();
            used -= rests.actual_bytes + available;
        }
        let destination = host.receive();
        let report = guest.migrate(
            destination.uri(),
            &["--policy", policy.name(), "--compress", "none", "--verify"],
        );
        eprintln!(
            "{} MiB of RAM, {} kept, {} freed, {more:?}, {}: {} used, {:.1} MiB on the wire; {:?}",
            what.ram,
            what.keeps,
            what.frees,
            policy.name(),
            used / MIB,
            report.bytes_wire as f64 / MIB as f64,
            report.pages
        );
        assert_eq!(guest.ends().code, 0);
        destination.prints("ferry-memory: verified=");
        assert!(!destination.all().contains("CORRUPT"));
        guest = destination;
        reports.push((used, report));
    }
    guest.types("poweroff");
    assert_eq!(guest.ends().code, 0);
    reports
}

/// By pre-copy and by post-copy at most half as much again as it uses: 300 MiB for 200.
fn sends_what_is_used(host: &NestedHost, what: &Use) {
    let policies = [PolicyKind::Precopy, PolicyKind::Postcopy];
    let auto = ["--balloon=auto,interval=1s"];
    let with = moves(host, what, &auto, &policies);
    let without = moves(host, what, &[], &policies[..1]);
    for (used, report) in &with {
        assert!(report.bytes_wire <= used * 3 / 2, "{used} {report:#?}");
        assert!(report.pages.skipped > 0, "{report:#?}");
    }
    // Without a balloon, what was freed is sent with the rest.
    let freed = (what.frees + what.keeps) * MIB;
    assert!(without[0].1.bytes_wire > freed, "{:#?}", without[0]);
}

/// A Linux guest that has filled most of its memory once and uses little of it.
#[test]
fn a_linux_guest_sends_what_it_uses() {
    let Some(_turn) = nested_hosts() else { return };
    let what = Use {
        ram: 256,
        keeps: 20,
        frees: 120,
    };
    sends_what_is_used(&NestedHost::start(), &what);
}

/// The same at full size; takes minutes on an emulated machine.
#[test]
#[ignore = "a guest of 1 GiB takes minutes in an emulated host"]
fn a_linux_guest_of_a_gib_sends_what_it_uses() {
    let Some(_turn) = nested_hosts() else { return };
    let what = Use {
        ram: 1024,
        keeps: 115,
        frees: 700,
    };
    sends_what_is_used(&NestedHost::start_of(4096), &what);
}

/// Whether the balloon is moved, and how, goes where the guest goes; so does a size.
#[test]
fn the_balloon_setting_moves_with_the_guest() {
    if !guests_run() {
        return;
    }
    let more = ["--balloon", "auto,interval=2s,reserve=8M"];
    let mut guest = Host::run_with("dirty:wss=8M,rate=2000", "64M", 1, &more);
    let auto = guest.client().balloon().unwrap().auto.unwrap();
    assert_eq!((auto.interval_ms, auto.reserve_bytes), (2000, 8 * MIB));
    for policy in [PolicyKind::Precopy, PolicyKind::Postcopy] {
        let destination = Host::receive();
        let options = Options {
            policy,
            ..Host::options()
        };
        guest.migrate_well(destination.uri(), &options);
        assert_eq!(guest.ends(), Some(0));
        assert_eq!(destination.state(), State::Running);
        let status = destination.client().status().unwrap().balloon.unwrap();
        assert_eq!(status.auto, Some(auto));
        guest = destination;
    }
    let set = |request| guest.client().set_balloon(&request);
    let size = |bytes| BalloonRequest {
        size_bytes: Some(bytes),
        auto: None,
    };
    set(size(16 * MIB)).unwrap();
    let balloon = guest.client().balloon().unwrap();
    assert_eq!((balloon.target_bytes, balloon.auto), (16 * MIB, None));
    // More than there is; nothing, and two things at once; an interval that is out of range.
    let auto = |interval_ms| BalloonRequest {
        size_bytes: None,
        auto: Some(BalloonWish {
            interval_ms,
            reserve_bytes: None,
        }),
    };
    for bad in [
        size(65 * MIB),
        BalloonRequest::default(),
        BalloonRequest {
            size_bytes: Some(0),
            ..auto(None)
        },
        auto(Some(1)),
    ] {
        let refused = set(bad.clone()).unwrap_err().to_string();
        assert!(refused.contains("give"), "{bad:?}: {refused}");
    }
    assert_eq!(
        guest.client().balloon().unwrap().target_bytes,
        balloon.target_bytes
    );
    let destination = Host::receive();
    guest.migrate_well(destination.uri(), &Host::options());
    assert_eq!(destination.state(), State::Running);
    let moved = destination.client().balloon().unwrap();
    assert_eq!((moved.target_bytes, moved.auto), (16 * MIB, None));
    drop(guest);
    assert!(destination.verdict().writes > 0);

    let none = Host::run("dirty:wss=8M,rate=2000", "64M", 1);
    let refused = none.client().balloon().unwrap_err().to_string();
    assert!(refused.contains("--balloon"), "{refused}");
}
