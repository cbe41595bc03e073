//! Guests that grow and shrink, and have a console beside their serial port; and what of it goes
//! where the guest goes.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use ferry_guest_images::nested::Process;
use ferry_migration::options::{Handover, Options, PolicyKind};
use ferry_migration::report::Status;
use ferry_migration::snapshot::Snapshot;
use ferry_tests::{Host, NestedHost, NestedVmm, State, asks, guests_run, nested_hosts, run, until};
use ferry_vmm::api::types::{BalloonRequest, MemoryRequest, MemoryStatus};
use rustix::termios::{Winsize, tcsetwinsize};

const WORK: &str = "dirty:wss=8M,rate=2000";
const MIB: u64 = 1 << 20;
/// `O_NOCTTY`.
const NO_CONTROLLING_TERMINAL: i32 = 0o400;

fn memory(host: &Host) -> MemoryStatus {
    host.client().memory().unwrap()
}

fn set(host: &Host, size_bytes: u64) -> Result<MemoryStatus, String> {
    let set = host.client().set_memory(&MemoryRequest { size_bytes });
    set.map_err(|e| e.to_string())
}

/// The size that is asked for, and the RAM.
fn sizes(memory: &MemoryStatus) -> (u64, u64) {
    (memory.size_bytes / MIB, memory.max_bytes / MIB)
}

/// A guest without a balloon driver keeps all of its memory, and is told so; what it is asked for
/// is noted, and bad requests are refused with a sentence.
#[test]
fn a_size_is_asked_for_and_nonsense_is_refused() {
    if !guests_run() {
        return;
    }
    let guest = Host::run_with(WORK, "64M,max=128M", 1, &[]);
    let before = memory(&guest);
    assert_eq!(sizes(&before), (64, 128));
    assert_eq!((before.actual_bytes, before.driver), (128 * MIB, false));
    assert_eq!(before.min_bytes, 32 * MIB);
    assert!(guest.client().configuration().unwrap().balloon);
    let api = guest.api();
    let cli = |more: &[&str]| {
        let args = ["set", "--api", api.to_str().unwrap(), "--memory"];
        run(&[&args, more].concat())
    };
    let ran = cli(&["96M"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.stderr.contains("no balloon driver yet"), "{ran:?}");
    assert_eq!(sizes(&memory(&guest)), (96, 128));
    // One that never comes to it is waited for no longer than was said.
    let ran = cli(&["100M", "--wait", "300ms"]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(
        ran.stderr.contains("after 300.0 ms, the guest has no"),
        "{ran:?}"
    );
    let ran = cli(&["80M", "--json"]);
    let told: MemoryStatus = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(told, memory(&guest));
    for (size, part) in [
        (129 * MIB, "at most 134217728"),
        (31 * MIB, "at least 33554432"),
    ] {
        let refused = set(&guest, size).unwrap_err();
        assert!(refused.contains(part), "{refused}");
    }
    assert_eq!(sizes(&memory(&guest)), (80, 128));
    // It is the balloon's size, seen from the other side, and ends what moves it automatically.
    let auto = BalloonRequest {
        size_bytes: None,
        auto: Some(Default::default()),
    };
    guest.client().set_balloon(&auto).unwrap();
    assert!(memory(&guest).auto);
    assert!(!set(&guest, 64 * MIB).unwrap().auto);
    assert_eq!(guest.client().balloon().unwrap().target_bytes, 64 * MIB);

    let none = Host::run(WORK, "64M", 1);
    let refused = set(&none, 32 * MIB).unwrap_err();
    assert!(refused.contains("max=MAX"), "{refused}");
    for (value, more, part) in [
        ("512M,max=64M", &[][..], "max= is less"),
        ("64M,128M", &[], "max=SIZE"),
        ("16M,max=128M", &[], "at least 33554432"),
        (
            "64M,max=128M",
            &["--balloon", "auto"],
            "leave one of them out",
        ),
    ] {
        let args = ["run", "--nas", WORK, "--serial", "null", "--memory", value];
        let ran = run(&[&args, more].concat());
        assert!(matches!(ran.code, Some(1 | 2)), "{ran:?}");
        assert!(ran.stderr.contains(part), "{ran:?}");
    }
}

/// The terminal of a guest's console, and what is typed at it.
struct Terminal(File);

impl Terminal {
    fn of(host: &Host) -> Self {
        let place = host.client().status().unwrap().console.unwrap();
        let path = place.strip_prefix("pty:").unwrap();
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        options.custom_flags(NO_CONTROLLING_TERMINAL);
        Self(options.open(path).unwrap())
    }
}

/// Whether a guest's state has all of this in it, by a snapshot of it.
fn state_has(host: &Host, dir: &Path, number: u32, words: &[&[u8]]) -> bool {
    let path = dir.join(format!("{number}.snap"));
    let api = host.api();
    let (path, api) = (path.to_str().unwrap(), api.to_str().unwrap());
    let saved = run(&["snapshot", path, "--api", api]);
    assert_eq!(saved.code, Some(0), "{saved:?}");
    let snapshot = Snapshot::open(File::open(path).unwrap()).unwrap();
    let state = snapshot.state();
    let has = |word: &&[u8]| state.windows(word.len()).any(|part| part == *word);
    words.iter().all(has)
}

fn complete(host: &Host) {
    until("all of its memory has come", || {
        host.client().status().unwrap().missing.is_none()
    });
}

/// Console, vsock device and the size of the memory go with a guest by every way there is, and so
/// does what was typed and not read: the bare guest has no driver, and reads nothing.
#[test]
fn hand_over_post_copy_and_a_snapshot_keep_all_of_it() {
    if !guests_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let vsock = |n: u32| format!("socket={}", dir.path().join(format!("{n}.vsock")).display());
    let first = format!("{},cid=42", vsock(0));
    let mut guest = Host::run_with(
        WORK,
        "64M,max=128M",
        1,
        &["--console", "pty", "--vsock", &first],
    );
    let mut typed = b"typed in flight".to_vec();
    let mut terminal = Terminal::of(&guest);
    // The size of the terminal goes with the keys that are typed in it.
    let size = Winsize {
        ws_col: 132,
        ws_row: 43,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(&terminal.0, size).unwrap();
    terminal.0.write_all(&typed).unwrap();
    let mut snapshots = 0..;
    let mut in_state = |host: &Host, word: &[u8]| {
        let number = snapshots.next().unwrap();
        // As CBOR has them: 132 and 43 take a byte behind their type.
        let size = b"gcolumns\x18\x84drows\x18\x2b";
        state_has(host, dir.path(), number, &[word, size])
    };
    until("the console has what was typed", || {
        in_state(&guest, &typed)
    });
    set(&guest, 96 * MIB).unwrap();

    for (number, policy) in [
        (1, Some(PolicyKind::Postcopy)),
        (2, None),
        (3, Some(PolicyKind::Hybrid)),
        (4, None),
    ] {
        let socket = vsock(number);
        let more = ["--console", "pty", "--vsock", &socket];
        let (destination, options) = match policy {
            Some(policy) => (
                Host::receive_with(&more),
                Options {
                    policy,
                    ..Host::options()
                },
            ),
            // The memory itself changes its process.
            None => (
                Host::receive_unix_with(&more),
                Options {
                    handover: Handover::On,
                    ..Host::options()
                },
            ),
        };
        let report = guest.migrate_well(destination.uri(), &options);
        assert_eq!(report.policy == "handover", policy.is_none(), "{report:#?}");
        assert_eq!(guest.ends(), Some(0), "{:#?}", guest.said());
        destination.proves_running();
        complete(&destination);
        assert_eq!(sizes(&memory(&destination)), (96, 128));
        let shown = destination.client().configuration().unwrap();
        assert_eq!(shown.vsock.unwrap().cid, 42);
        assert!(shown.console.unwrap().starts_with("pty:/dev/"));
        assert!(in_state(&destination, &typed), "what was typed is lost");
        // With a key the guest is told of the terminal's size; the new one has none.
        Terminal::of(&destination).0.write_all(b".").unwrap();
        typed.push(b'.');
        until("the console has a further key", || {
            in_state(&destination, &typed)
        });
        guest = destination;
    }
    // The size can be set there, and after a restore it is what it was.
    assert_eq!(sizes(&set(&guest, 112 * MIB).unwrap()), (112, 128));
    let path = dir.path().join("last.snap");
    let (snapshot, api) = (path.to_str().unwrap(), guest.api());
    let saved = run(&[
        "snapshot",
        snapshot,
        "--then",
        "stop",
        "--api",
        api.to_str().unwrap(),
    ]);
    assert_eq!(saved.code, Some(0), "{saved:?}");
    drop(guest);
    let socket = vsock(5);
    let restored = Host::start(&["restore", snapshot, "--serial", "stdio", "--vsock", &socket]);
    restored.says("the guest runs here");
    restored.reaches(State::Running);
    complete(&restored);
    assert_eq!(sizes(&memory(&restored)), (112, 128));
    // Without a place for it the guest keeps its console, and what it prints there is dropped.
    let shown = restored.client().configuration().unwrap();
    assert_eq!(shown.console.as_deref(), Some("null"));
    assert!(in_state(&restored, &typed));
}

/// A size that is set while the guest moves goes along.
#[test]
fn a_size_that_is_set_during_a_migration_goes_along() {
    if !guests_run() {
        return;
    }
    let guest = Host::run_with("dirty:wss=24M,rate=2000", "64M,max=128M", 1, &[]);
    let destination = Host::receive();
    let slow = Options {
        bandwidth: Some(8_000_000),
        ..Host::options()
    };
    let migration = guest.begin_migration(destination.uri(), &slow);
    assert_eq!(sizes(&set(&guest, 80 * MIB).unwrap()), (80, 128));
    let report = migration.report();
    assert_eq!(report.status, Status::Completed, "{report:#?}");
    destination.reaches(State::Running);
    assert_eq!(sizes(&memory(&destination)), (80, 128));
    let refused = set(&guest, 96 * MIB);
    assert!(refused.is_err(), "it is not here any more: {refused:?}");
}

/// A size that is set at the source while the rest of the memory follows would be set in what is
/// left of the guest there.
#[test]
fn a_size_that_is_set_where_the_guest_was_is_refused() {
    if !guests_run() {
        return;
    }
    let guest = Host::run_with("dirty:wss=24M,rate=2000", "64M,max=128M", 1, &[]);
    let destination = Host::receive();
    let slow = Options {
        policy: PolicyKind::Postcopy,
        bandwidth: Some(4_000_000),
        ..Host::options()
    };
    let migration = guest.begin_migration(destination.uri(), &slow);
    destination.reaches(State::Running);
    let auto = BalloonRequest {
        size_bytes: None,
        auto: Some(Default::default()),
    };
    let auto = guest.client().set_balloon(&auto);
    for refused in [
        set(&guest, 80 * MIB).unwrap_err(),
        auto.unwrap_err().to_string(),
    ] {
        assert!(
            refused.contains("handed over to") && refused.contains(destination.uri()),
            "{refused}"
        );
    }
    assert_eq!(sizes(&set(&destination, 72 * MIB).unwrap()), (72, 128));
    let report = migration.report();
    assert_eq!(report.status, Status::Completed, "{report:#?}");
    assert_eq!(sizes(&memory(&destination)), (72, 128));
}

#[test]
fn consoles_are_given_and_refused_with_a_sentence() {
    if !guests_run() {
        return;
    }
    let source = Host::run(WORK, "64M", 1);
    let destination = Host::receive_with(&["--console", "null"]);
    let report = source.migrate(destination.uri(), &Host::options());
    let error = report.error.unwrap();
    assert!(error.contains("leave --console out"), "{error}");
    assert_eq!(source.client().configuration().unwrap().console, None);
    let api = source.api();
    let ran = run(&["console", "--api", api.to_str().unwrap()]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.stderr.contains("--console pty"), "{ran:?}");
    for (args, part) in [
        (&["--console", "loud"][..], "pty or null"),
        (&["--console", "stdio"], "one terminal"),
        (&["--console", "file:/nonexistent/log"], "console output"),
    ] {
        let ran = run(&[&["run", "--nas", WORK], args].concat());
        assert!(matches!(ran.code, Some(1 | 2)), "{ran:?}");
        assert!(ran.stderr.contains(part), "{ran:?}");
    }
}

/// MemAvailable in MiB, by the guest's own word on its console.
fn available(console: &Process) -> u64 {
    let line = asks(console, "meminfo", "ferry-linux: meminfo");
    let value = line.split("available=").nth(1).unwrap();
    value.trim().parse::<u64>().unwrap() >> 10
}

fn resize(vmm: &NestedVmm<'_>, size: &str) -> MemoryStatus {
    let ran = vmm.command(&["set", "--memory", size, "--wait", "300s", "--json"]);
    serde_json::from_str(&ran.stdout).unwrap_or_else(|e| panic!("{e}: {ran:?}; {}", vmm.all()))
}

/// A stock kernel with its own drivers, in a nested host: it begins small, is typed at and answers
/// on its console, grows, shrinks, moves, and does all of that there too.
#[test]
fn linux_grows_shrinks_and_is_typed_at_before_and_after_a_move() {
    let Some(_turn) = nested_hosts() else { return };
    let host = NestedHost::start();
    let guest = host.guest(&["--linux", "--memory", "160M,max=320M", "--console", "pty"]);
    guest.prints("ferry-guest: ready");
    let console = guest.console();
    let status = asks(&console, "status", "ferry-linux: kernel=");
    assert!(status.contains("virtio0"), "{status}");
    // More than one buffer, in both directions.
    let long = "x".repeat(3000);
    asks(&console, &long, "commands: status");

    let small = resize(&guest, "160M");
    assert_eq!(
        (small.actual_bytes, small.max_bytes),
        (160 * MIB, 320 * MIB)
    );
    assert!(small.driver);
    let few = available(&console);
    assert_eq!(resize(&guest, "320M").actual_bytes, 320 * MIB);
    let many = available(&console);
    assert!(
        few < 160 && many > few + 120,
        "{few} MiB, and {many} MiB after it has grown"
    );
    assert_eq!(resize(&guest, "144M").actual_bytes, 144 * MIB);
    let fewer = available(&console);
    assert!(
        fewer < few,
        "{fewer} MiB, and {few} MiB of a guest with 16 MiB more"
    );

    let there = host.receive_with(&["--console", "pty"]);
    let report = guest.migrate(there.uri(), &["--verify", "--compress", "none"]);
    // What is in the balloon is not sent.
    let in_balloon = 176 * MIB / 4096;
    assert!(report.pages.skipped >= in_balloon, "{report:#?}");
    assert!(report.bytes_wire < 150 * MIB, "{report:#?}");
    assert_eq!(guest.ends().code, 0);
    let moved = there.console();
    let after = available(&moved);
    assert!(
        after.abs_diff(fewer) < 24,
        "{fewer} MiB, and {after} MiB after a move"
    );
    assert_eq!(resize(&there, "256M").actual_bytes, 256 * MIB);
    assert!(available(&moved) > after + 80);
    asks(&moved, &long, "commands: status");
    moved.input(b"poweroff\n").unwrap();
    assert_eq!(there.ends().code, 0);
}
