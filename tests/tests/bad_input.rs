//! Everything that a user can get wrong: one sentence on stderr, nothing on stdout (with --json,
//! one object), exit status 1 (2 for a wrong command line), and no panic.
#![allow(clippy::unwrap_used, clippy::panic)]

use ferry_guest_images::BARE;
use ferry_migration::options::{OnTimeout, Options, PolicyKind};
use ferry_migration::report::{Report, Status};
use ferry_tests::{Action, Host, Proxy, Way, can_pretend, guests_run, run};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

fn fails(args: &[&str], code: i32) -> String {
    let ran = run(args);
    assert_eq!(ran.code, Some(code), "{args:?}: {ran:?}");
    if args.contains(&"--json") {
        let object: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
        assert!(object["code"].is_string(), "{args:?}: {object}");
    } else {
        assert_eq!(ran.stdout, "", "{args:?}");
    }
    assert_eq!(ran.stderr.lines().count(), 1, "{args:?}: {}", ran.stderr);
    assert!(
        ran.stderr.starts_with("ferry: ") && ran.stderr.len() > 20,
        "{args:?}: {}",
        ran.stderr
    );
    assert!(
        !ran.stderr.chars().any(|c| c.is_control() && c != '\n'),
        "{args:?}: {:?}",
        ran.stderr
    );
    ran.stderr
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Command lines that cannot be meant.
#[test]
fn usage() {
    for args in [
        &["migrate", "--api", "s", "tcp:h:1", "--bandwidth", "fast"][..],
        &["migrate", "--api", "s", "tcp:h:1", "--bandwidth", "-1"],
        &["migrate", "--api", "s", "tcp:h:1", "--downtime", "10"],
        &[
            "migrate",
            "--api",
            "s",
            "tcp:h:1",
            "--downtime",
            "99999999999999999999s",
        ],
        &["migrate", "--api", "s", "tcp:h:1", "--channels", "many"],
        &["migrate", "--api", "s", "tcp:h:1", "--channels", "70000"],
        &["migrate", "--api", "s", "tcp:h:1", "--on-timeout", "panic"],
        &["migrate", "--api", "s", "tcp:h:1", "--free-source"],
        &["migrate", "--api", "s", "tcp:h:1", "--json", "--frobnicate"],
        &["receive"],
        &["receive", "tcp:"],
        &["receive", "tcp:host"],
        &["receive", "tcp:host:99999"],
        &["receive", "unix:"],
        &["receive", "smoke-signals:hill"],
        &["run", "--nas", "dirty:wss=lots"],
        &["run", "--nas", "dirty:rate="],
        &["run", "--nas", "xx.S"],
        &["run", "--nas", "mg.S", "--memory", "-5M"],
        &["run", "--nas", "mg.S", "--memory", "99999999999G"],
        &["run", "--nas", "mg.S", "--cpus", "two"],
        &["run", "--nas", "mg.S", "--serial", "file:"],
        &["run", "--kernel", "k", "--memory"],
        &["run", "--initrd", "i"],
        &["status", "--api", "s", "extra"],
        &["\u{1b}[31m"],
        &[""],
    ] {
        fails(args, 2);
    }
}

/// Kernels that are missing, empty, cut short, or something else.
#[test]
fn kernels() {
    if !guests_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kernel");
    let try_it = || {
        fails(
            &[
                "run",
                "--serial",
                "null",
                "--memory",
                "64M",
                "--kernel",
                text(&path),
                "--api",
                text(&dir.path().join("api")),
            ],
            1,
        )
    };
    assert!(try_it().contains(text(&path)));
    for (name, bytes) in [
        ("empty", vec![]),
        ("text", b"#!/bin/sh\necho hello\n".repeat(100)),
        ("zeros", vec![0; 1 << 20]),
        ("an ELF header and no more", BARE[..64].to_vec()),
        ("half an ELF", BARE[..BARE.len() / 2].to_vec()),
        ("a bzImage's magic and no more", {
            let mut bytes = vec![0; 4096];
            bytes[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
            bytes[0x202..0x206].copy_from_slice(b"HdrS");
            bytes
        }),
        ("an ELF with a broken table", {
            let mut bytes = BARE.to_vec();
            bytes[32..40].fill(0xff);
            bytes
        }),
    ] {
        std::fs::write(&path, bytes).unwrap();
        let sentence = try_it();
        eprintln!("{name}: {sentence}");
        assert!(sentence.contains(text(&path)), "{name}: {sentence}");
    }
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    assert!(try_it().contains(text(&path)));
    // A good kernel with too little memory, and with an initrd that is not there.
    let kernel = dir.path().join("bare");
    std::fs::write(&kernel, BARE).unwrap();
    fails(
        &[
            "run",
            "--serial",
            "null",
            "--memory",
            "64K",
            "--kernel",
            text(&kernel),
        ],
        1,
    );
    let sentence = fails(
        &[
            "run",
            "--serial",
            "null",
            "--memory",
            "64M",
            "--kernel",
            text(&kernel),
            "--initrd",
            "/nonexistent/initrd",
        ],
        1,
    );
    assert!(sentence.contains("/nonexistent/initrd"), "{sentence}");
    let sentence = fails(
        &[
            "run", "--serial", "null", "--nas", "mg.A", "--memory", "64M",
        ],
        1,
    );
    assert!(sentence.contains("needs"), "{sentence}");
    let sentence = fails(
        &["run", "--serial", "null", "--nas", "mg.S", "--cpus", "65"],
        1,
    );
    assert!(sentence.contains("64"), "{sentence}");
}

/// Places that cannot be written to or listened on.
#[test]
fn places() {
    if !guests_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "not a socket").unwrap();
    for (args, expected) in [
        (
            &["--serial", "file:/nonexistent/log"][..],
            "/nonexistent/log",
        ),
        (&["--serial", "file:/proc"], "/proc"),
        (
            &["--serial", "null", "--api", "/nonexistent/api"],
            "/nonexistent",
        ),
        (&["--serial", "null", "--api", "/proc/api"], "/proc"),
        (&["--serial", "null", "--api", text(&file)], text(&file)),
    ] {
        for command in [
            &["run", "--nas", "is.S"][..],
            &["receive", "tcp:127.0.0.1:0"],
        ] {
            let sentence = fails(&[command, args].concat(), 1);
            assert!(sentence.contains(expected), "{sentence}");
        }
    }
    assert_eq!(
        std::fs::read(&file).unwrap(),
        b"not a socket",
        "a file that is no socket was touched"
    );
    // A path too long for a socket.
    let long = dir.path().join("x".repeat(150));
    let sentence = fails(
        &[
            "run",
            "--nas",
            "is.S",
            "--serial",
            "null",
            "--api",
            text(&long),
        ],
        1,
    );
    eprintln!("{sentence}");
    let busy = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("tcp:{}", busy.local_addr().unwrap());
    let api = dir.path().join("api");
    let sentence = fails(
        &["receive", &uri, "--serial", "null", "--api", text(&api)],
        1,
    );
    assert!(
        sentence.contains(&uri) && sentence.contains("something listens there already"),
        "{sentence}"
    );
    let link = dir.path().join("link");
    let _held = UnixListener::bind(&link).unwrap();
    let uri = format!("unix:{}", link.display());
    let sentence = fails(
        &["receive", &uri, "--serial", "null", "--api", text(&api)],
        1,
    );
    assert!(sentence.contains(text(&link)), "{sentence}");
    for uri in [
        "tcp:203.0.113.1:7000",
        "unix:/nonexistent/link",
        "tcp:no.such.host.invalid:7000",
    ] {
        let sentence = fails(
            &["receive", uri, "--serial", "null", "--api", text(&api)],
            1,
        );
        assert!(sentence.contains(uri), "{sentence}");
    }
    assert!(
        !api.exists(),
        "a command that failed left its socket behind"
    );
}

/// Control sockets that are missing, dead, busy or of another program.
#[test]
fn control_sockets() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api");
    let commands = [
        &["status"][..],
        &["pause"],
        &["resume"],
        &["stop"],
        &["cancel"],
        &["recover"],
        &["migrate", "tcp:127.0.0.1:1"],
        &["migrate", "tcp:127.0.0.1:1", "--json"],
    ];
    let all = |expected: &str| {
        for command in commands {
            let sentence = fails(&[command, &["--api", text(&path)]].concat(), 1);
            assert!(sentence.contains(expected), "{sentence}");
        }
    };
    all("there is no socket");
    std::fs::write(&path, "").unwrap();
    all(text(&path));
    std::fs::remove_file(&path).unwrap();
    drop(UnixListener::bind(&path).unwrap());
    // A process that a test beside this one is about to start may hold it for a moment.
    while UnixStream::connect(&path).is_ok() {
        std::thread::yield_now();
    }
    all("is the guest's VMM running?");
    // A socket of a program that does not speak HTTP.
    std::fs::remove_file(&path).unwrap();
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            // It hangs up as soon as it has babbled.
            let _ = std::io::Write::write_all(&mut stream, b"220 mail ready\r\n\r\n");
        }
    });
    for command in commands {
        fails(&[command, &["--api", text(&path)]].concat(), 1);
    }
    if !guests_run() {
        return;
    }
    let host = Host::run("dirty:wss=4M,rate=500", "64M", 1);
    let api = host.api();
    let sentence = fails(
        &[
            "run",
            "--nas",
            "is.S",
            "--serial",
            "null",
            "--api",
            text(&api),
        ],
        1,
    );
    assert!(
        sentence.contains("a process already uses the socket"),
        "{sentence}"
    );
    host.proves_running();
    host.verdict();
}

/// Destinations that are not there: the guest runs on.
#[test]
fn destinations() {
    if !guests_run() {
        return;
    }
    let host = Host::run("dirty:wss=4M,rate=500", "64M", 1);
    let api = host.api();
    // No program can listen on a port while this test uses it for something else.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let used = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let closed = used.local_addr().unwrap();
    for uri in [
        format!("tcp:{closed}"),
        "tcp:no.such.host.invalid:7000".into(),
        "unix:/nonexistent/link".into(),
    ] {
        let sentence = fails(&["migrate", "--api", text(&api), &uri], 1);
        eprintln!("{sentence}");
        assert!(
            sentence.contains(&uri) && sentence.contains("the guest runs on where it was"),
            "{sentence}"
        );
        let report = host.migrate(&uri, &Host::options());
        assert_eq!(report.status, Status::Failed);
    }
    for uri in ["tcp:host", "carrier-pigeon:loft", ""] {
        // The VMM reads the place, so this is no usage error of the command's.
        fails(&["migrate", "--api", text(&api), uri], 1);
    }
    host.proves_running();
    host.verdict();
}

fn post_copy() -> Options {
    Options {
        policy: PolicyKind::Postcopy,
        ..Host::options()
    }
}

/// A receiver that may not handle page faults says so, and what to do, before anything is sent;
/// pre-copy still works.
#[test]
fn post_copy_to_a_host_where_it_is_forbidden() {
    if !guests_run() || !can_pretend() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let closed = dir.path().join("closed");
    std::fs::write(&closed, "").unwrap();
    std::fs::set_permissions(&closed, std::os::unix::fs::PermissionsExt::from_mode(0o000)).unwrap();
    let destination = Host::receive_where(
        &format!("mount --bind {} /dev/userfaultfd", closed.display()),
        "setpriv --bounding-set=-sys_ptrace,-dac_override,-dac_read_search",
    );
    let mut source = Host::run("dirty:wss=4M,rate=500", "32M", 1);
    let hybrid = Options {
        policy: PolicyKind::Hybrid,
        ..Host::options()
    };
    let turns = Options {
        on_timeout: OnTimeout::Postcopy,
        ..Host::options()
    };
    for options in [post_copy(), hybrid, turns] {
        let mark = destination.mark();
        let report = source.migrate(destination.uri(), &options);
        eprintln!("{:?}", report.error);
        assert_eq!(report.status, Status::Failed, "{report:#?}");
        let error = report.error.unwrap();
        assert!(
            error.contains("may not handle a guest's page faults")
                && error.contains("/dev/userfaultfd"),
            "{error}"
        );
        let pages = &report.pages;
        assert_eq!(pages.sent + pages.zero + pages.skipped, 0, "{error}");
        source.proves_running();
        destination.settles(mark);
    }
    source.migrate_well(destination.uri(), &Host::options());
    assert_eq!(source.ends(), Some(0));
    destination.verdict();
}

/// A host that is short of memory refuses before anything is sent, or, when the shortage comes
/// later, before the guest is handed over: it runs on where it was.
#[test]
fn post_copy_to_a_host_without_memory() {
    if !guests_run() || !can_pretend() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let meminfo = dir.path().join("meminfo");
    let available = |kib: u64| {
        std::fs::write(&meminfo, format!("MemAvailable: {kib} kB\n")).unwrap();
    };
    available(16 << 10);
    let destination = Host::receive_where(
        &format!("mount --bind {} /proc/meminfo", meminfo.display()),
        "",
    );
    let mut source = Host::run("dirty:wss=8M,rate=500", "32M", 1);
    let refused = |mark, report: Report| {
        eprintln!("{:?}", report.error);
        assert_eq!(report.status, Status::Failed, "{report:#?}");
        let error = report.error.as_deref().unwrap();
        assert!(
            error.contains("more than this host has available"),
            "{error}"
        );
        source.proves_running();
        destination.settles(mark);
        report.pages
    };
    for options in [post_copy(), Host::options()] {
        let mark = destination.mark();
        let pages = refused(mark, source.migrate(destination.uri(), &options));
        assert_eq!(pages.sent + pages.zero + pages.skipped, 0);
    }
    available(1 << 20);
    let hybrid = Options {
        policy: PolicyKind::Hybrid,
        ..Host::options()
    };
    let proxy = Proxy::to(destination.address());
    proxy.plan(Way::Forth, 2 << 20, Action::Freeze(Way::Forth));
    let mark = destination.mark();
    let migration = source.begin_migration(&proxy.uri(), &hybrid);
    proxy.wait_hits(1);
    available(0);
    proxy.thaw(Way::Forth);
    assert!(refused(mark, migration.report()).sent > 0);
    available(1 << 20);
    source.migrate_well(destination.uri(), &post_copy());
    assert_eq!(source.ends(), Some(0));
    destination.verdict();
}
