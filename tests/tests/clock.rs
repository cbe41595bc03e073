//! A Linux guest's clocks across moves and snapshots, beside this machine's: what passes is counted
//! once, or not at all. The guest keeps time by its time stamp counter, which is the harder way.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::time::{Duration, Instant};

use ferry_tests::{NestedHost, NestedVmm, nested_hosts};

/// What the clocks can be off beside what is known of the readings: all of it is emulated, and the
/// hosts' clocks are set by hand.
const TOLERANCE_MS: i64 = 700;
/// The writer's memory, written faster than it is sent, takes some seconds of the pause.
const LONG_PAUSE: [&str; 4] = ["--bandwidth", "4M", "--downtime", "20s"];
/// Of readings the quickest is taken.
const READINGS: usize = 5;

/// The guest's clocks, CLOCK_REALTIME and uptime, less this machine's, in milliseconds, and how far
/// that can be off.
#[derive(Debug, Clone, Copy)]
struct Reading {
    time_ms: i64,
    uptime_ms: i64,
    error_ms: i64,
}

fn ms(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap()
}

/// Reads both clocks; `name` is new for each reading of a guest.
fn read(guest: &NestedVmm<'_>, began: Instant, name: &str) -> Reading {
    let one = |n: usize| {
        let mark = format!("{name}-{n}.");
        let asked = Instant::now();
        guest.types(&format!("time {mark}"));
        // Its console echoes the command.
        let line = guest.line_with(|line| line.contains("time_ms=") && line.contains(&mark));
        let took = asked.elapsed();
        let here = ms(asked - began + took / 2);
        let value = |name: &str| -> i64 {
            let mut words = line.split_ascii_whitespace();
            let value = words.find_map(|word| word.strip_prefix(name));
            value.unwrap_or_else(|| panic!("{line}")).parse().unwrap()
        };
        Reading {
            time_ms: value("time_ms=") - here,
            uptime_ms: value("uptime_ms=") - here,
            error_ms: ms(took / 2) + 1,
        }
    };
    let best = (0..READINGS).map(one).min_by_key(|r| r.error_ms);
    best.unwrap()
}

/// Sets the second host's clock to the first's: KVM counts a move's time by both.
fn synchronise(hosts: [&NestedHost; 2]) {
    let began = Instant::now();
    let [first, second] = hosts.map(|host| {
        let asked = began.elapsed();
        let time: i64 = host.run_well(&["/init", "clock"]).trim().parse().unwrap();
        time - ms((asked + began.elapsed()) / 2)
    });
    let by = (first - second).to_string();
    hosts[1].run_well(&["/init", "clock", &by]);
    eprintln!("the second host's clock was moved by {by} ms");
}

fn boot<'a>(host: &'a NestedHost, work: &str) -> NestedVmm<'a> {
    let cmdline = format!("clocksource=tsc tsc=reliable {work}");
    let guest = host.guest(&[
        "--linux",
        "--cpus",
        "2",
        "--memory",
        "128M",
        "--cmdline",
        &cmdline,
    ]);
    guest.prints("ferry-guest: ready");
    guest.prints("clocksource=tsc");
    guest
}

/// Between two hosts whose counters began at different times: none of the pauses is lost, and none
/// is counted twice.
fn keeps_time(moves: usize) {
    let (first, second, _cable) = NestedHost::pair();
    synchronise([&first, &second]);
    let began = Instant::now();
    let mut guest = boot(&first, "ferry.run=dirty:wss=12M,rate=4000");
    let before = read(&guest, began, "before");
    let mut paused_ms = 0.0;
    for n in 0..moves {
        let there = [&second, &first][n % 2].receive();
        let report = guest.migrate(there.uri(), &LONG_PAUSE);
        assert_eq!(guest.ends().code, 0);
        guest = there;
        paused_ms += report.downtime_ms;
        let now = read(&guest, began, &format!("move{n}"));
        eprintln!(
            "move {}: downtime {:.0} ms; drift {} ms of CLOCK_REALTIME, {} ms of uptime, known to {} ms (emulated)",
            n + 1,
            report.downtime_ms,
            now.time_ms - before.time_ms,
            now.uptime_ms - before.uptime_ms,
            now.error_ms + before.error_ms
        );
    }
    let after = read(&guest, began, "after");
    let known = after.error_ms + before.error_ms + TOLERANCE_MS;
    // Or they could be lost, or counted twice, without a trace.
    let enough = Duration::from_millis(known.unsigned_abs()).as_secs_f64() * 1e3;
    if paused_ms <= enough {
        eprintln!(
            "NOT RUN: a guest's clock over moves: this machine is too busy, and {paused_ms:.0} ms of pauses tell \
             nothing where the clocks are known to {known} ms"
        );
        return;
    }
    for (before, after) in [
        (before.time_ms, after.time_ms),
        (before.uptime_ms, after.uptime_ms),
    ] {
        assert!(
            (after - before).abs() <= known,
            "{before} ms, {after} ms after {paused_ms:.0} ms of pauses, known to {known} ms"
        );
    }
    guest.types("poweroff");
    assert_eq!(guest.ends().code, 0);
}

#[test]
fn two_moves_between_hosts_keep_time() {
    let Some(_turn) = nested_hosts() else { return };
    keeps_time(2);
}

#[test]
#[ignore = "takes 10 minutes: tests/run --long"]
fn twenty_moves_between_hosts_keep_time() {
    let Some(_turn) = nested_hosts() else { return };
    keeps_time(20);
}

/// A guest in a file does not notice how long it was there.
#[test]
fn a_snapshots_clock_stands_still() {
    /// Between the snapshot and the restore.
    const AWAY: Duration = Duration::from_secs(10);
    let Some(_turn) = nested_hosts() else { return };
    let host = NestedHost::start();
    let began = Instant::now();
    let guest = boot(&host, "");
    let before = read(&guest, began, "before");
    let asked = Instant::now();
    let saved = guest.command(&["snapshot", "/tmp/clock.snap", "--then", "stop"]);
    assert_eq!(saved.code, 0, "{saved:?}");
    assert_eq!(guest.ends().code, 0);
    std::thread::sleep(AWAY);
    let copy = host.restore("/tmp/clock.snap");
    copy.says("the guest runs here");
    let away = ms(asked.elapsed());
    let after = read(&copy, began, "after");
    let known = after.error_ms + before.error_ms + TOLERANCE_MS;
    for (before, after) in [
        (before.time_ms, after.time_ms),
        (before.uptime_ms, after.uptime_ms),
    ] {
        let behind = before - after;
        eprintln!("the guest is {behind} ms behind, after {away} ms at most (emulated)");
        assert!(
            (ms(AWAY) - known..=away + known).contains(&behind),
            "{behind} ms, known to {known} ms"
        );
    }
    copy.types("poweroff");
    assert_eq!(copy.ends().code, 0);
}
