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

/// Two hosts, two kernels, a network between them.
#[test]
fn linux_moves_between_hosts() {
    let Some(_turn) = nested_hosts() else { return };
    let (first, second, _cable) = NestedHost::pair();
    let guest = first.guest(&["--linux", "--cmdline", WRITER]);
    guest.line("ready", |line| {
        matches!(line, Line::Ready { .. }).then_some(())
    });
    let there = second.receive();
    let report = guest.migrate(there.uri(), &[]);
    eprintln!(
        "between hosts: {:.0} ms, downtime {:.0} ms (emulated)",
        report.total_ms, report.downtime_ms
    );
    assert_eq!(guest.ends().code, 0);
    there.line("a line after the move", |line| {
        matches!(line, Line::Stat { .. }).then_some(())
    });
    let back = first.receive();
    there.migrate(back.uri(), &[]);
    back.line("a line after the way back", |line| {
        matches!(line, Line::Stat { .. }).then_some(())
    });
    back.verdict();
}
