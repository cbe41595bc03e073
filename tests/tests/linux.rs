//! A stock Debian kernel as the guest, in nested hosts: on whatever machine the tests run, this is Linux on a whole KVM.
#![allow(clippy::unwrap_used, clippy::panic)]

use ferry_guest_images::Line;
use ferry_migration::options::PolicyKind;
use ferry_tests::{NestedHost, nested_hosts};

/// What a guest of these tests does: it writes memory and verifies what it wrote.
const WRITER: &str = "ferry.run=dirty:wss=8M,rate=300";

/// The command line finds, the processors, the clock, the console in both directions; reset, switch and power button.
#[test]
fn linux_boots_and_ends_as_it_wants() {
    let Some(_turn) = nested_hosts() else { return };
    let host = NestedHost::start();
    let doctor = host.run(&["ferry", "doctor"]);
    assert!(
        doctor.code == 0 && doctor.stdout.starts_with("hardware KVM"),
        "{doctor:?}"
    );

    let guest = host.guest(&["--linux", "--cpus", "2"]);
    guest.prints("ferry-guest: ready");
    guest.prints("clocksource=kvm-clock cpus=2");
    guest.types("run is.S");
    let verified = guest.line("the kernel's result", |line| match line {
        Line::Result(result) => Some(result.verified),
        _ => None,
    });
    assert!(verified, "{}", guest.all());
    guest.types("reboot");
    let ran = guest.ends();
    assert!(
        ran.stderr.contains("reset") || ran.stderr.contains("reboot"),
        "{ran:?}"
    );

    let guest = host.guest(&["--linux"]);
    guest.prints("ferry-guest: ready");
    guest.types("poweroff");
    let ran = guest.ends();
    assert!(ran.code == 0 && ran.stderr.contains("shut down"), "{ran:?}");
}

/// The power button reaches the guest, also after a move: the button's enable bit and interrupt came along.
#[test]
fn linux_heeds_the_power_button() {
    let Some(_turn) = nested_hosts() else { return };
    let host = NestedHost::start();
    let guest = host.guest(&["--linux"]);
    guest.prints("ferry-guest: ready");
    let destination = host.receive();
    guest.migrate(destination.uri(), &[]);
    let pressed = destination.command(&["power-button"]);
    assert_eq!(pressed.code, 0, "{pressed:?}");
    destination.prints("the power button was pressed");
    let ran = destination.ends();
    assert!(ran.code == 0 && ran.stderr.contains("shut down"), "{ran:?}");
}

/// One guest with two processors hops from process to process, once with each policy, and verifies its memory in the end.
#[test]
fn linux_moves_with_every_policy() {
    let Some(_turn) = nested_hosts() else { return };
    let host = NestedHost::start();
    let mut guest = host.guest(&["--linux", "--cpus", "2", "--cmdline", WRITER]);
    guest.line("ready", |line| {
        matches!(line, Line::Ready { .. }).then_some(())
    });
    for policy in PolicyKind::ALL {
        let destination = host.receive();
        let report = guest.migrate(destination.uri(), &["--policy", policy.name()]);
        eprintln!(
            "{}: {} rounds, {:.0} ms, downtime {:.0} ms (emulated)",
            policy.name(),
            report.rounds.len(),
            report.total_ms,
            report.downtime_ms
        );
        assert_eq!(guest.ends().code, 0);
        destination.line("a line after the move", |line| {
            matches!(line, Line::Stat { .. }).then_some(())
        });
        guest = destination;
    }
    guest.verdict();
}

/// A disk on storage that both processes reach: the guest writes all over it and verifies, before, during and after a move.
#[test]
fn linux_moves_with_its_disk() {
    let Some(_turn) = nested_hosts() else { return };
    let host = NestedHost::start();
    host.run_well(&["/init", "truncate", "/tmp/disk", "16777216"]);
    let guest = host.guest(&[
        "--linux",
        "--disk",
        "/tmp/disk",
        "--balloon",
        "--cmdline",
        "ferry.disk=/dev/vda",
    ]);
    guest.prints("blocks=vda");
    guest.disk_writes(512);
    let destination = host.receive_with(&["--disk", "/tmp/disk"]);
    guest.migrate(destination.uri(), &[]);
    // As many writes again as the disk has blocks, twice over: what was written before the move is read after it. Any whole
    // line tells: one of them may have been printed half on either side, or be torn by a word of the kernel's.
    let here = destination.disk_writes(0);
    destination.disk_writes(here + 8192);
    assert!(
        !destination.all().contains("CORRUPT"),
        "{}",
        destination.all()
    );
    destination.types("poweroff");
    assert_eq!(destination.ends().code, 0);
}

/// Two hosts, two kernels, a network between them; no storage that both reach: the disk comes along.
#[test]
fn linux_moves_between_hosts() {
    let Some(_turn) = nested_hosts() else { return };
    let (first, second, _cable) = NestedHost::pair();
    const DISK: [&str; 2] = ["--disk", "/tmp/copied"];
    first.run_well(&["/init", "truncate", DISK[1], "4194304"]);
    let work = format!("{WRITER} ferry.disk=/dev/vda");
    let guest = first.guest(&[&["--linux", "--cmdline", &work][..], &DISK].concat());
    guest.line("ready", |line| {
        matches!(line, Line::Ready { .. }).then_some(())
    });
    guest.disk_writes(512);
    let there = second.receive_with(&DISK);
    let report = guest.migrate(there.uri(), &["--copy-disk"]);
    eprintln!(
        "between hosts: {:.0} ms, downtime {:.0} ms (emulated), {:?}",
        report.total_ms, report.downtime_ms, report.disk
    );
    assert!(report.disk.is_some_and(|disk| disk.sent > 0), "{report:#?}");
    assert_eq!(guest.ends().code, 0);
    // As many writes again as the disk has blocks, twice over: what was written before the move is read after it.
    let here = there.disk_writes(0);
    there.disk_writes(here + 2048);
    there.line("a line after the move", |line| {
        matches!(line, Line::Stat { .. }).then_some(())
    });
    // Back over what was left there.
    let back = first.receive_with(&DISK);
    there.migrate(back.uri(), &["--copy-disk"]);
    back.line("a line after the way back", |line| {
        matches!(line, Line::Stat { .. }).then_some(())
    });
    let here = back.disk_writes(0);
    back.disk_writes(here + 1024);
    back.verdict();
}

/// A network card: the guest's server counts on, on the other host's tap.
#[test]
fn linux_moves_with_its_network_card() {
    let Some(_turn) = nested_hosts() else { return };
    let (first, second, _cable) = NestedHost::pair();
    for host in [&first, &second] {
        host.run_well(&["/init", "tap", "tap0=10.8.0.1/24"]);
    }
    let count = |host: &NestedHost| {
        let answer = host.run_well(&["/init", "get", "10.8.0.2:80", "/"]);
        let count = answer.lines().find_map(|l| l.strip_prefix("X-Count: "));
        count
            .and_then(|n| n.trim().parse::<u64>().ok())
            .unwrap_or_else(|| panic!("{answer}"))
    };
    let guest = first.guest(&[
        "--linux",
        "--net",
        "tap=tap0",
        "--cmdline",
        "ferry.net=eth0=10.8.0.2/24",
    ]);
    guest.prints("ferry-guest: ready");
    assert_eq!([count(&first), count(&first)], [1, 2]);
    let there = second.receive_with(&["--net", "tap=tap0"]);
    guest.migrate(there.uri(), &[]);
    assert_eq!([count(&second), count(&second)], [3, 4]);
    there.types("poweroff");
    assert_eq!(there.ends().code, 0);
}
