//! A stock Debian kernel as the guest, in nested hosts: on whatever machine the tests run, this is
//! Linux on a whole KVM.
#![allow(clippy::unwrap_used, clippy::panic)]

use ferry_guest_images::Line;
use ferry_guest_images::nested::Process;
use ferry_tests::{CONFINED, NestedHost, NestedVmm, asks, nested_hosts};
use std::path::Path;

/// What a guest of these tests does: it writes memory and verifies what it wrote.
const WRITER: &str = "ferry.run=dirty:wss=8M,rate=300";

/// The command line finds, the processors, the clock, the console in both directions; reset, switch
/// and power button.
#[test]
fn linux_boots_and_ends_as_it_wants() {
    let Some(_turn) = nested_hosts() else { return };
    let host = NestedHost::start_with_program(Path::new(env!("CARGO_BIN_EXE_confined")));
    // Debian's kernel has landlock: the sandbox keeps a process to its files.
    let confined = host.run_well(&["confined", "/tmp/folder", "/tmp/other"]);
    assert_eq!(confined, CONFINED);
    let doctor = host.run(&["ferry", "doctor"]);
    assert!(
        doctor.code == 0 && doctor.stdout.starts_with("hardware KVM"),
        "{doctor:?}"
    );

    // Less than the host has: TCG emulates AVX2.
    let guest = host.guest(&["--linux", "--cpus", "2", "--cpu", "x86-64-v2"]);
    guest.prints("ferry-guest: ready");
    guest.prints("clocksource=kvm-clock cpus=2");
    guest.types("flags");
    guest.prints("end-of-flags");
    let flags = guest.all();
    for (flag, there) in [
        ("sse4_2", true),
        ("popcnt", true),
        ("avx", false),
        ("xsave", false),
    ] {
        assert_eq!(flags.contains(&format!(" {flag} ")), there, "{flags}");
    }
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

/// The boot's stages, as they are measured on a host that runs Linux guests itself.
#[test]
fn a_boot_is_measured_stage_by_stage() {
    let Some(_turn) = nested_hosts() else { return };
    let host = NestedHost::start();
    let told = host.run_well(&["ferry", "bench", "boot", "--runs", "1", "--json"]);
    let boots: serde_json::Value = serde_json::from_str(&told).unwrap();
    let stages = boots["stages"].as_array().unwrap();
    let names: Vec<&str> = stages.iter().filter_map(|s| s["name"].as_str()).collect();
    assert_eq!(
        names,
        [
            "start", "machine", "images", "load", "entry", "console", "init", "ready"
        ]
    );
    let mut sum = 0.0;
    for stage in stages {
        let (took, at) = (&stage["ms"]["median"], &stage["since_start_ms"]);
        sum += took.as_f64().unwrap();
        eprintln!("{}: {took} ms, at {at} ms (emulated)", stage["name"]);
        assert!((at.as_f64().unwrap() - sum).abs() < 1e-3, "{told}");
    }
    assert!((boots["total_ms"]["median"].as_f64().unwrap() - sum).abs() < 1e-3);
}

/// Two hosts, two kernels, and a network between them to which both bridge the guest's card: one
/// guest with two processors moves from host to host, once with each policy, while a client on the
/// first host makes requests to it on one connection.
#[test]
fn linux_moves_between_hosts_and_keeps_its_connections() {
    let Some(_turn) = nested_hosts() else { return };
    let (first, second, _cable) = NestedHost::pair();
    first.bridge("10.9.0.1/24", &["eth1"], &["tap0"]);
    second.bridge("10.9.0.2/24", &["eth1"], &["tap0"]);
    let card = ["--net", "tap=tap0"];
    let cmdline = format!("{WRITER} ferry.net=eth0=10.9.0.100/24");
    let mut guest = first.guest(
        &[
            &[
                "--linux",
                "--memory",
                "128M",
                "--cpus",
                "2",
                "--cmdline",
                &cmdline,
            ],
            card.as_slice(),
        ]
        .concat(),
    );
    guest.line("ready", |line| {
        matches!(line, Line::Ready { .. }).then_some(())
    });
    let mut client = first.client("10.9.0.100:80");
    client.lap();
    guest.goes_on();
    let quiet = client.lap();
    let mut answered = quiet.answered;
    eprintln!(
        "before any move: longest gap of the guest {} ms, of its client {} ms (emulated)",
        guest.longest_gap_ms(),
        quiet.gap_us / 1000
    );
    // The pause of the first move is that of a move as it is; the other looks at all memory in
    // its own.
    let plain = ["--policy", "precopy", "--channels", "2"];
    // There and back: each takes up to a minute here, and tests/tests/matrix.rs has every policy.
    let back = vec!["--verify", "--policy", "postcopy"];
    for (options, to) in [(plain.to_vec(), &second), (back, &first)] {
        let there = to.receive_with(&card);
        let report = guest.migrate(there.uri(), &options);
        assert_eq!(guest.ends().code, 0);
        there.goes_on();
        let lap = client.lap();
        eprintln!(
            "{options:?}: {} rounds, {:.0} ms, downtime {:.0} ms; longest gap of the guest {} ms, of its client {} ms; \
             {} requests, none lost (emulated)",
            report.rounds.len(),
            report.total_ms,
            report.downtime_ms,
            there.longest_gap_ms(),
            lap.gap_us / 1000,
            lap.answered - answered,
        );
        let faults = &report.faults;
        if faults.count > 0 {
            eprintln!(
                "  {} faults crossed the network: median {:.0} ms, longest {:.0} ms, {:.0} ms stalled in all",
                faults.count,
                faults.p50_us / 1e3,
                faults.max_us / 1e3,
                faults.stalled_ms
            );
        }
        answered = lap.answered;
        guest = there;
    }
    client.lap();
    client.ends();
    guest.verdict();
}

/// Twenty moves, two of them without a copy, with all devices at work: a disk on storage that both
/// processes reach, written all over and verified, a network card with a client, random numbers
/// that must not repeat, a balloon. The guest's clock must not drift by more than the pauses.
#[test]
#[ignore = "takes 10 minutes: tests/run --long"]
fn linux_moves_twenty_times_with_all_devices_busy() {
    const MOVES: usize = 20;
    /// What the readings of two clocks can be off beside the pauses and what is known of the
    /// readings, in milliseconds.
    const TOLERANCE_MS: f64 = 50.0;
    let Some(_turn) = nested_hosts() else { return };
    let host = NestedHost::start();
    host.run_well(&["/init", "truncate", "/tmp/disk", "4194304"]);
    host.bridge("10.8.0.1/24", &[], &["tap0", "tap1"]);
    let disk = ["--disk", "/tmp/disk"];
    let devices = |tap| [&disk[..], &["--net", tap]].concat();
    let cmdline = "ferry.disk=/dev/vda ferry.rng=/dev/hwrng ferry.net=eth0=10.8.0.2/24";
    let linux = [
        "--linux",
        "--memory",
        "160M",
        "--balloon",
        "--cmdline",
        cmdline,
    ];
    let mut guest = host.guest(&[linux.to_vec(), devices("tap=tap0")].concat());
    guest.prints("ferry-guest: ready");
    let mut client = host.client("10.8.0.2:80");
    let before = client.lap();
    let mut paused_ms = 0.0;
    let mut taps = ["tap=tap1", "tap=tap0"].into_iter().cycle();
    for n in 1..=MOVES {
        // Looking at all memory takes longer than all else, and what the guest does is verified
        // anyway.
        let verify: &[&str] = if n % 5 == 0 { &["--verify"] } else { &[] };
        let (there, how) = if n % 7 == 0 {
            // Memory and card as they are, to another process of this host.
            let there = host.receive_at(&format!("unix:/tmp/{n}"), &disk);
            (there, vec!["--handover", "on"])
        } else {
            let there = host.receive_with(&devices(taps.next().unwrap_or_default()));
            let policy = if n % 3 == 0 { "postcopy" } else { "precopy" };
            (there, [&["--policy", policy], verify].concat())
        };
        let report = guest.migrate(there.uri(), &how);
        paused_ms += report.downtime_ms;
        assert_eq!(guest.ends().code, 0);
        guest = there;
        let lap = client.lap();
        eprintln!(
            "move {n}, {}: {:.0} ms, downtime {:.0} ms, the client's longest gap {} ms (emulated)",
            report.policy,
            report.total_ms,
            report.downtime_ms,
            lap.gap_us / 1000
        );
    }
    let here = guest.disk_writes(0);
    // As many writes again as the disk has blocks, several times over: what was written before the
    // moves is read after them.
    guest.disk_writes(here + 4096);
    guest.prints("ferry-rng: blocks=");
    assert!(!guest.all().contains("CORRUPT"), "{}", guest.all());
    let after = client.lap();
    let drift_ms = ms(after.clock_us - before.clock_us);
    let unknown_ms = ms(after.clock_error_us) + ms(before.clock_error_us);
    eprintln!(
        "{MOVES} moves: {paused_ms:.0} ms of downtime in all, {} requests, none lost; the guest's clock drifted by \
         {drift_ms:.3} ms, known to {unknown_ms:.3} ms (emulated)",
        after.answered
    );
    assert!(
        drift_ms.abs() <= paused_ms + unknown_ms + TOLERANCE_MS,
        "{before} {after}"
    );
    client.ends();
    // The power button's enable bit and interrupt came along, too.
    let pressed = guest.command(&["power-button"]);
    assert_eq!(pressed.code, 0, "{pressed:?}");
    guest.prints("the power button was pressed");
    let ran = guest.ends();
    assert!(ran.code == 0 && ran.stderr.contains("shut down"), "{ran:?}");
}

/// Two hosts, two kernels, a network between them; no storage that both reach: the disk comes
/// along.
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
    let report = guest.migrate(there.uri(), &["--copy-disk", "--verify"]);
    eprintln!(
        "between hosts: {:.0} ms, downtime {:.0} ms (emulated), {:?}",
        report.total_ms, report.downtime_ms, report.disk
    );
    assert!(report.disk.is_some_and(|disk| disk.sent > 0), "{report:#?}");
    assert_eq!(guest.ends().code, 0);
    // As many writes again as the disk has blocks, twice over: what was written before the move is
    // read after it.
    let here = there.disk_writes(0);
    there.disk_writes(here + 2048);
    there.goes_on();
    // Back over what was left there.
    let back = first.receive_with(&DISK);
    there.migrate(back.uri(), &["--copy-disk", "--verify"]);
    back.goes_on();
    let here = back.disk_writes(0);
    back.disk_writes(here + 1024);
    back.verdict();
}

/// A guest whose memory is huge pages, on a host that has a pool of them: it is moved, handed over
/// with its memory, moved out of memory that this process never mapped, saved and restored. What
/// cannot be is refused in a sentence, and the guest goes on.
#[test]
fn a_guest_of_huge_pages_goes_all_ways_but_one() {
    const MEMORY: [&str; 3] = ["--memory", "32M", "--hugepages"];
    /// Of 2 MiB: two such guests and half of a third.
    const POOL: u32 = 40;
    let Some(_turn) = nested_hosts() else { return };
    let host = NestedHost::start_with_pool(POOL);
    let free = || {
        let doctor = host.run(&["ferry", "doctor"]);
        let told = doctor.stdout.split(" free pages of 2048 KiB").next();
        let told = told.and_then(|before| before.split_ascii_whitespace().last());
        let free: Option<u32> = told.and_then(|number| number.parse().ok());
        free.unwrap_or_else(|| panic!("{doctor:?}"))
    };
    assert_eq!(free(), POOL);
    let writer = ["--nas", "dirty:wss=4M,rate=300,fill=half"];
    let guest = host.guest(&[&writer[..], &MEMORY].concat());
    guest.goes_on();
    assert!(free() < POOL, "its memory is not of the pool");
    let there = host.receive();
    guest.migrate(there.uri(), &["--verify"]);
    assert_eq!(guest.ends().code, 0);
    there.goes_on();

    for how in [["--policy", "hybrid"], ["--on-timeout", "postcopy"]] {
        let ran = there.command(&[&["migrate", "tcp:127.0.0.1:1"], &how[..]].concat());
        assert!(
            ran.code == 1 && ran.stderr.contains("migrate it by pre-copy"),
            "{ran:?} {}",
            there.all()
        );
    }

    let here = host.receive_at("unix:/tmp/link", &[]);
    let report = there.migrate(here.uri(), &["--handover", "on"]);
    assert_eq!(report.pages.sent, 0, "{report:#?}");
    assert_eq!(there.ends().code, 0);
    here.goes_on();
    let there = host.receive();
    here.migrate(there.uri(), &["--verify"]);
    assert_eq!(here.ends().code, 0);
    there.goes_on();

    let saved = there.command(&["snapshot", "/tmp/huge.snap"]);
    assert_eq!(saved.code, 0, "{saved:?}");
    let copy = host.restore("/tmp/huge.snap");
    copy.says("all memory was read before the guest ran");
    copy.goes_on();
    // There is no room for a third.
    let third = [
        &["ferry", "run"],
        &writer[..],
        &MEMORY,
        &["--api", "/tmp/third"],
    ]
    .concat();
    let ran = host.run(&third);
    assert!(
        ran.code == 1 && ran.stderr.contains("pool of 2 MiB pages"),
        "{ran:?}"
    );
    copy.verdict();
    there.verdict();
    assert_eq!(free(), POOL, "all of it was given back");
}

/// Microseconds in milliseconds, exact far beyond any test.
fn ms(us: impl TryInto<i32, Error: std::fmt::Debug>) -> f64 {
    f64::from(us.try_into().unwrap()) / 1e3
}

/// The terminal that is a guest's virtio console in its host gets this size; the guest sees it.
fn resize(
    host: &NestedHost,
    guest: &NestedVmm<'_>,
    console: &Process,
    (columns, rows): (u16, u16),
) {
    let status = guest.command(&["status", "--json"]).stdout;
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    let path = status["console"].as_str().unwrap().strip_prefix("pty:");
    let path = path.unwrap_or_else(|| panic!("{status}"));
    let (columns, rows) = (columns.to_string(), rows.to_string());
    host.run_well(&["/init", "resize", path, &columns, &rows]);
    let size = format!("columns={columns} rows={rows}");
    let seen = || asks(console, "terminal", "ferry-linux: terminal ").contains(&size);
    assert!((0..100).any(|_| seen()), "never {size}: {}", guest.all());
}

/// A stock driver's virtio console in post-copy, where its queues are in pages that are still
/// missing: it answers there, both ways, and the terminal is as large as it was.
#[test]
fn a_virtio_console_and_its_size_go_along_in_post_copy() {
    let Some(_turn) = nested_hosts() else { return };
    let (first, second, _cable) = NestedHost::pair();
    let pty = ["--console", "pty"];
    let guest = first.guest(&[&["--linux", "--memory", "128M"], &pty[..]].concat());
    guest.prints("ferry-guest: ready");
    let console = guest.console();
    asks(&console, "status", "ferry-linux: kernel=");
    resize(&first, &guest, &console, (132, 43));
    // More than one buffer.
    let long = "x".repeat(3000);
    let mut here = (guest, &first);
    for (there, policy) in [(&second, "postcopy"), (&first, "hybrid")] {
        let destination = there.receive_with(&pty);
        let report = here
            .0
            .migrate(destination.uri(), &["--policy", policy, "--verify"]);
        assert!(policy == "hybrid" || report.faults.count > 0, "{report:#?}");
        assert_eq!(here.0.ends().code, 0);
        let console = destination.console();
        let size = asks(&console, "terminal", "ferry-linux: terminal ");
        assert!(size.ends_with("columns=132 rows=43"), "{size}");
        asks(&console, &long, "commands: status");
        here = (destination, there);
    }
    let (guest, host) = here;
    let console = guest.console();
    resize(host, &guest, &console, (80, 25));
    console.input(b"poweroff\n").unwrap();
    assert_eq!(guest.ends().code, 0);
}
