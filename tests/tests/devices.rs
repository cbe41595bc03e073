//! Guests with disks and network cards move, and what is behind these is given, locked and told at
//! both ends.
#![allow(clippy::unwrap_used, clippy::panic)]

use ferry_migration::options::{Handover, Options, PolicyKind};
use ferry_migration::report::Status;
use ferry_tests::{Host, State, guests_run, is_locked, run, until};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

const WORK: &str = "dirty:wss=8M,rate=2000";

fn image(dir: &Path, name: &str, bytes: u64) -> String {
    let path = dir.join(name);
    std::fs::File::create(&path)
        .unwrap()
        .set_len(bytes)
        .unwrap();
    path.to_str().unwrap().to_owned()
}

/// What `ferry run` says of a disk that it cannot have.
fn refused(disk: &str) -> String {
    let ran = run(&[
        "run",
        "--nas",
        WORK,
        "--serial",
        "null",
        "--api",
        "/nonexistent/api",
        "--disk",
        disk,
    ]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert_eq!(ran.stderr.trim_end().lines().count(), 1, "{ran:?}");
    ran.stderr
}

fn moves_with_its_disk(options: &Options) {
    let dir = tempfile::tempdir().unwrap();
    let disk = image(dir.path(), "disk.img", 1 << 20);
    let other = image(dir.path(), "other.img", 1 << 19);
    let mut source = Host::run_with(WORK, "64M", 1, &["--disk", &disk, "--balloon"]);
    assert!(refused(&disk).contains("in use"));
    // Nothing was sent to a receiver that has no disk, or another: the guest stays.
    let wrong: [(&[&str], &str); 4] = [
        (&[], "1 disks, but 0"),
        (&["--disk", &other], "is not the file that the guest uses"),
        (&["--disk", &other, "--force"], "524288 bytes"),
        (&["--disk", &format!("{disk},ro")], "read-only"),
    ];
    for (args, sentence) in wrong {
        let destination = Host::receive_with(args);
        let report = source.migrate(destination.uri(), options);
        assert_eq!(report.status, Status::Failed, "{report:#?}");
        let error = report.error.unwrap();
        assert!(error.contains(sentence), "{error}");
        assert_eq!(source.state(), State::Running);
    }
    let destination = Host::receive_with(&["--disk", &disk]);
    source.migrate_well(destination.uri(), options);
    assert_eq!(source.ends(), Some(0), "{:#?}", source.said());
    destination.proves_running();
    assert!(
        refused(&disk).contains("in use"),
        "the destination has the lock"
    );
    assert!(destination.verdict().writes > 0);
    assert!(!is_locked(disk.as_ref()), "the lock is still held");
}

#[test]
fn a_guest_moves_with_its_disk_by_pre_copy() {
    if guests_run() {
        moves_with_its_disk(&Host::options());
    }
}

#[test]
fn a_guest_moves_with_its_disk_by_post_copy() {
    if guests_run() {
        moves_with_its_disk(&Options {
            policy: PolicyKind::Postcopy,
            ..Host::options()
        });
    }
}

#[test]
fn disks_and_cards_that_cannot_be_are_refused_with_a_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("missing.img");
    let ran = |args: &[&str]| {
        let common = [
            "run",
            "--nas",
            WORK,
            "--serial",
            "null",
            "--api",
            "/nonexistent/api",
        ];
        let ran = run(&[&common, args].concat());
        assert_eq!(ran.stderr.trim_end().lines().count(), 1, "{ran:?}");
        (ran.code, ran.stderr)
    };
    let usage = |args: &[&str], part: &str| {
        let (code, text) = ran(args);
        assert_eq!(code, Some(2), "{text}");
        assert!(text.contains(part), "{text}");
    };
    usage(&["--disk", ""], "disk.img");
    usage(&["--net", "eth0"], "tap=NAME");
    usage(&["--net", "tap=t0,mac=1"], "MAC address");
    if !guests_run() {
        return;
    }
    assert!(refused(missing.to_str().unwrap()).contains("truncate"));
    assert!(refused(dir.path().to_str().unwrap()).contains("image file"));
    assert!(refused(&image(dir.path(), "odd", 1000)).contains("1000 bytes"));
    let (code, text) = ran(&["--net", "tap=no-such-tap"]);
    assert_eq!(code, Some(1));
    assert!(text.contains("ip tuntap add dev no-such-tap"), "{text}");
}

fn ip(args: &[&str]) -> Option<()> {
    let ran = Command::new("ip").args(args).output();
    ran.is_ok_and(|out| out.status.success()).then_some(())
}

/// Tap devices, while it lives.
struct Taps(Vec<String>);

impl Taps {
    fn make(count: usize) -> Option<Self> {
        let mut taps = Self(Vec::new());
        for n in 0..count {
            static COUNT: AtomicU32 = AtomicU32::new(0);
            let unique = COUNT.fetch_add(1, Ordering::Relaxed);
            let name = format!("ft{}x{unique}x{n}", std::process::id());
            ip(&["tuntap", "add", "dev", &name, "mode", "tap"])?;
            taps.0.push(name.clone());
            ip(&["link", "set", &name, "up"])?;
        }
        Some(taps)
    }

    /// Two for a test, which says so if it has none.
    fn pair(test: &str) -> Option<Self> {
        let taps = Self::make(2);
        if taps.is_none() {
            eprintln!("NOT RUN: {test}: no tap can be made here (root and ip are needed)");
        }
        taps
    }

    /// Frames that the interface had from its VMM.
    fn frames(&self, n: usize) -> u64 {
        self.says(n, "statistics/rx_packets")
    }

    fn says(&self, n: usize, what: &str) -> u64 {
        let path = format!("/sys/class/net/{}/{what}", self.0[n]);
        let text = std::fs::read_to_string(path).unwrap();
        text.trim().parse().unwrap()
    }
}

impl Drop for Taps {
    fn drop(&mut self) {
        for name in &self.0 {
            let _ = ip(&["link", "del", name]);
        }
    }
}

#[test]
fn the_network_is_told_where_the_guest_is() {
    if !guests_run() {
        return;
    }
    let Some(taps) = Taps::pair("the_network_is_told_where_the_guest_is") else {
        return;
    };
    let net = |n: usize| format!("tap={}", taps.0[n]);
    let with_mac = format!("{},mac=52:54:00:00:00:01", net(0));
    let mut source = Host::run_with(WORK, "64M", 1, &["--net", &with_mac]);
    // A tap has one user.
    let destination = Host::receive_with(&["--net", &net(0)]);
    let report = source.migrate(destination.uri(), &Host::options());
    assert!(report.error.unwrap().contains("in use"));
    let destination = Host::receive_with(&["--net", &net(1)]);
    assert_eq!(taps.frames(1), 0);
    source.migrate_well(destination.uri(), &Host::options());
    assert_eq!(source.ends(), Some(0));
    // The guest has no driver for its card: what comes is the host's announcement, four times.
    until("the guest was announced", || taps.frames(1) >= 4);
    assert_eq!(taps.frames(0), 0);
    assert!(destination.verdict().writes > 0);
}

/// From one process to the next on this host, with the tap: no other process can have it in
/// between, and it never goes down.
#[test]
fn a_tap_goes_along_with_the_memory() {
    if !guests_run() {
        return;
    }
    let Some(taps) = Taps::pair("a_tap_goes_along_with_the_memory") else {
        return;
    };
    let options = Options {
        handover: Handover::On,
        ..Host::options()
    };
    let net = |n: usize| format!("tap={}", taps.0[n]);
    let mut here = Host::run_with(WORK, "64M", 1, &["--net", &net(0)]);
    until("the tap is up", || taps.says(0, "carrier") == 1);
    let links = taps.says(0, "carrier_changes");
    // A destination that refuses when it has the tap already: the card goes on where the guest
    // does.
    let two = ["--net", &net(0), "--net", &net(1)];
    let strange = Host::receive_unix_with(&two);
    let why = here.migrate(strange.uri(), &options).error.unwrap();
    assert!(why.contains("1 network cards, but 2"), "{why}");
    here.proves_running();
    drop(strange);
    let named = ["--net", &net(0)];
    for more in [&[][..], &named[..], &[][..]] {
        let next = Host::receive_unix_with(more);
        let before = taps.frames(0);
        here.migrate_well(next.uri(), &options);
        assert_eq!(here.ends(), Some(0), "{:#?}", here.said());
        until("the guest was announced", || taps.frames(0) > before);
        next.proves_running();
        // It is in use all the while.
        let another = Host::receive_with(&named);
        let report = next.migrate(another.uri(), &Host::options());
        assert!(report.error.unwrap().contains("in use"));
        here = next;
    }
    assert_eq!(taps.says(0, "carrier_changes"), links);
    // Another one, because it is asked for.
    let last = Host::receive_unix_with(&["--net", &net(1)]);
    here.migrate_well(last.uri(), &options);
    assert_eq!(here.ends(), Some(0), "{:#?}", here.said());
    until("the guest was announced", || taps.frames(1) > 0);
    until("the first tap is free", || taps.says(0, "carrier") == 0);
    assert!(last.verdict().writes > 0);
}

/// A bridge between taps, while it lives.
struct Bridge(String);

impl Bridge {
    fn between(taps: &Taps) -> Option<Self> {
        let name = format!("fb{}", std::process::id());
        ip(&["link", "add", &name, "type", "bridge"])?;
        let bridge = Self(name);
        for tap in &taps.0 {
            ip(&["link", "set", tap, "master", &bridge.0])?;
        }
        ip(&["link", "set", &bridge.0, "up"])?;
        Some(bridge)
    }

    /// The number of the port behind which it takes this address to be (Linux `struct __fdb_entry`
    /// of `linux/if_bridge.h`).
    fn port_of(&self, mac: [u8; 6]) -> Option<u8> {
        let path = format!("/sys/class/net/{}/brforward", self.0);
        let table = std::fs::read(path).unwrap();
        let entry = table.chunks_exact(16).find(|e| e[..6] == mac)?;
        Some(entry[6])
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        let _ = ip(&["link", "del", &self.0]);
    }
}

/// A bridge that takes the guest to be where it was learns from the announcements alone where it is
/// now: this guest says nothing by itself.
#[test]
fn a_bridge_learns_where_the_guest_is() {
    const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 7];
    if !guests_run() {
        return;
    }
    let made = Taps::make(2).and_then(|taps| Bridge::between(&taps).map(|bridge| (bridge, taps)));
    let Some((bridge, taps)) = made else {
        eprintln!(
            "NOT RUN: a_bridge_learns_where_the_guest_is: no bridge can be made here (root, ip and the module bridge are needed)"
        );
        return;
    };
    let port = |n: usize| {
        let path = format!("/sys/class/net/{}/brport/port_no", taps.0[n]);
        let text = std::fs::read_to_string(path).unwrap();
        u8::from_str_radix(text.trim().trim_start_matches("0x"), 16).unwrap()
    };
    let net = |n: usize| format!("tap={},mac=52:54:00:00:00:07", taps.0[n]);
    let mut source = Host::run_with(WORK, "64M", 1, &["--net", &net(0)]);
    // As if the guest had sent something from there.
    let learnt = Command::new("bridge")
        .args(["fdb", "replace", "52:54:00:00:00:07", "dev", &taps.0[0]])
        .args(["master", "dynamic"])
        .status();
    assert!(learnt.is_ok_and(|status| status.success()));
    assert_eq!(bridge.port_of(MAC), Some(port(0)));
    let tap = format!("tap={}", taps.0[1]);
    let destination = Host::receive_with(&["--net", &tap]);
    source.migrate_well(destination.uri(), &Host::options());
    until("the bridge has learnt", || {
        bridge.port_of(MAC) == Some(port(1))
    });
    assert_eq!(source.ends(), Some(0));
    assert!(destination.verdict().writes > 0);
}
