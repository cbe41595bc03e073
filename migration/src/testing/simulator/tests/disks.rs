//! Disks that move with their guest.

use super::*;

/// A guest whose disk moves with it.
fn with_disk(seed: u64) -> Scenario {
    let mut scenario = Scenario::calm(seed);
    scenario.pages = 40;
    scenario.working_set = 20;
    scenario.write_rate = 5_000.0;
    scenario.disk_blocks = 8;
    scenario.options.copy_disk = true;
    scenario
}

#[test]
fn a_disk_moves_with_its_guest() {
    let (mut resent, mut in_pause) = (0, 0);
    for (seed, policy) in (0..40).zip(PolicyKind::ALL.iter().cycle()) {
        let mut scenario = with_disk(seed);
        scenario.disk_blocks = 1 + seed * 5;
        scenario.options.policy = *policy;
        scenario.options.verify = seed % 2 == 0;
        scenario.options.compress =
            [Compress::None, Compress::Zstd, Compress::Auto][usize::try_from(seed).unwrap() % 3];
        let outcome = run(&scenario);
        assert_eq!(outcome.violations, Vec::<String>::new(), "seed {seed}");
        let report = &outcome.report;
        assert_eq!(report.status, Status::Completed, "{report:?}");
        let disk = report.disk.unwrap();
        let blocks = scenario.disk_blocks * (64 << 10);
        assert_eq!((disk.disks, disk.total), (1, blocks - 3 * 512));
        assert_eq!(disk.sent + disk.zero, blocks + disk.resent, "{disk:?}");
        assert!(disk.rounds >= 1 && disk.bytes_wire > 0 && disk.ms > 0.0);
        assert!(seed < 5 || disk.zero > 0 && disk.sent > 0, "{disk:?}");
        (resent, in_pause) = (resent + disk.resent, in_pause + disk.in_pause);
        // What is left for the pause is what the guest wrote in the last round.
        assert!(disk.in_pause < blocks / 2 + (256 << 10), "{disk:?}");
    }
    assert!(resent > in_pause && in_pause > 0, "{resent} {in_pause}");
}

#[test]
fn without_being_asked_for_a_disk_stays_and_nothing_is_said_of_it() {
    let mut scenario = with_disk(1);
    scenario.options.copy_disk = false;
    let outcome = run(&scenario);
    assert_eq!(outcome.report.disk, None);
    // The simulated world has no storage that both sides reach: the guest finds no disk.
    assert!(
        outcome.violations.iter().all(|v| v.contains("no disk")),
        "{:?}",
        outcome.violations
    );
}

/// The checks can fail: a device that forgets to count its writes is found out, by the guest and by
/// `--verify`.
#[test]
fn a_lost_write_to_the_disk_is_noticed() {
    let mut found = 0;
    for seed in 0..20 {
        let mut scenario = with_disk(seed);
        scenario.write_rate = 50_000.0;
        scenario.forgetful_disk = true;
        scenario.options.verify = seed % 2 == 0;
        let outcome = run(&scenario);
        found += u32::from(if scenario.options.verify {
            let error = outcome.report.error.unwrap_or_default();
            outcome.violations.is_empty() && error.contains("disk 0 differs")
        } else {
            outcome
                .violations
                .iter()
                .any(|v| v.contains("lost write: block"))
        });
    }
    assert!(found >= 15, "only {found} of 20 noticed");
}

/// Every fault at every message of a migration with a disk: the source's guest runs on, or the
/// destination's has all of it.
#[test]
fn every_fault_at_every_message_with_a_disk() {
    for (policy, verify, compress) in [
        (PolicyKind::Precopy, true, Compress::None),
        (PolicyKind::Postcopy, false, Compress::Zstd),
    ] {
        let mut scenario = with_disk(5);
        scenario.options.policy = policy;
        scenario.options.verify = verify;
        scenario.options.compress = compress;
        at_every_message(&scenario);
    }
}

/// Disks that cannot be read, written, flushed or made: the guest stays, and the sentence names it.
#[test]
fn a_disk_that_fails_keeps_the_guest_where_it_is() {
    for (fault, part) in [
        (PortFault::TakeDisks, "TakeDisks"),
        (PortFault::DiskRead(0), "reading a disk of the guest"),
        (PortFault::DiskRead(1), "reading a disk of the guest"),
        (PortFault::DiskWrite(1), "disk 0 failed"),
        (PortFault::DiskFlush, "flushing disk 0"),
    ] {
        let mut scenario = with_disk(3);
        scenario.disk_blocks = 40;
        scenario.port_fault = Some(fault);
        let outcome = run(&scenario);
        assert_eq!(outcome.violations, Vec::<String>::new(), "{fault:?}");
        assert_eq!(outcome.report.status, Status::Failed, "{fault:?}");
        assert_eq!(
            (outcome.source, outcome.destination),
            (Fate::Runs, Fate::Empty)
        );
        let error = outcome.report.error.unwrap();
        assert!(error.contains(part), "{fault:?}: {error}");
    }
}

/// What the guest was told is on its disk is there before another host can have it; a disk that
/// cannot be flushed keeps the guest here.
#[test]
fn disks_are_flushed_before_the_guest_leaves() {
    for n in 0..3 {
        let mut scenario = with_disk(n);
        scenario.flush_time = Duration::from_micros(50);
        let outcome = run(&scenario);
        assert_eq!(outcome.violations, Vec::<String>::new());
        assert_eq!(outcome.report.status, Status::Completed);

        // One while the guest runs, and one in the pause.
        scenario.port_fault = Some(PortFault::Flush(n % 2));
        let outcome = run(&scenario);
        assert_eq!(outcome.violations, Vec::<String>::new());
        assert_eq!(outcome.report.status, Status::Failed, "flush {n}");
        assert_eq!(outcome.source, Fate::Runs);
        let error = outcome.report.error.unwrap();
        assert!(error.contains("flushing the guest's disks"), "{error}");
    }
}
