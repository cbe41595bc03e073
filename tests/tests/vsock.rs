//! Sockets between a guest and its host, and what becomes of them when the guest moves.
#![allow(clippy::unwrap_used, clippy::panic)]

use ferry_guest_images::nested::Process;
use ferry_migration::report::Status;
use ferry_tests::{Host, NESTED_TIMEOUT, NestedHost, State, guests_run, nested_hosts, run, until};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

const WORK: &str = "dirty:wss=8M,rate=2000";

fn option(path: &Path) -> String {
    format!("socket={}", path.display())
}

/// A guest without a driver: the socket is made, guarded, shown, given anew at the destination, and
/// removed.
#[test]
fn the_socket_is_made_where_the_guest_is() {
    if !guests_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (here, there) = (dir.path().join("a.vsock"), dir.path().join("b.vsock"));
    let with_cid = format!("{},cid=42", option(&here));
    let mut source = Host::run_with(WORK, "64M", 1, &["--vsock", &with_cid]);
    let mode = std::fs::metadata(&here).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let shown = source.client().configuration().unwrap().vsock.unwrap();
    assert_eq!(shown.cid, 42);
    assert_eq!(shown.socket.as_deref(), here.to_str());
    // A second guest does not take it away.
    let second = run(&[
        "run", "--nas", WORK, "--serial", "null", "--vsock", &with_cid,
    ]);
    assert_eq!(second.code, Some(1), "{second:?}");
    assert!(second.stderr.contains("already uses"), "{second:?}");
    // A program that connects waits for the guest's driver, and the guest does not wait for it.
    let mut program = UnixStream::connect(&here).unwrap();
    program.write_all(b"CONNECT 52\n").unwrap();

    let wrong: [(&[&str], &str); 2] = [
        (&[], "give --vsock socket=PATH"),
        (
            &["--vsock", &format!("{},cid=7", option(&there))],
            "leave cid= out",
        ),
    ];
    for (args, sentence) in wrong {
        let destination = Host::receive_with(args);
        let report = source.migrate(destination.uri(), &Host::options());
        assert_eq!(report.status, Status::Failed, "{report:#?}");
        let error = report.error.unwrap();
        assert!(error.contains(sentence), "{error}");
        assert_eq!(source.state(), State::Running);
    }
    let destination = Host::receive_with(&["--vsock", &option(&there)]);
    source.migrate_well(destination.uri(), &Host::options());
    assert_eq!(source.ends(), Some(0), "{:#?}", source.said());
    assert!(!here.exists(), "the source's socket is left");
    assert!(there.exists());
    destination.proves_running();
    let snapshot = dir.path().join("web.snap");
    let api = destination.api();
    let saved = run(&[
        "snapshot",
        snapshot.to_str().unwrap(),
        "--api",
        api.to_str().unwrap(),
    ]);
    assert_eq!(saved.code, Some(0), "{saved:?}");
    let without = run(&["restore", snapshot.to_str().unwrap(), "--serial", "null"]);
    assert_eq!(without.code, Some(1), "{without:?}");
    assert!(without.stderr.contains("give --vsock"), "{without:?}");
    let _ = destination.verdict();
    until("its socket goes", || !there.exists());
}

#[test]
fn a_guest_without_one_takes_none() {
    if !guests_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v.sock");
    let source = Host::run_with(WORK, "64M", 1, &[]);
    let destination = Host::receive_with(&["--vsock", &option(&path)]);
    let report = source.migrate(destination.uri(), &Host::options());
    let error = report.error.unwrap();
    assert!(error.contains("leave --vsock out"), "{error}");
}

#[test]
fn nonsense_is_refused_with_a_sentence() {
    let usage = |value: &str, code, part: &str| {
        let ran = run(&["run", "--nas", WORK, "--serial", "null", "--vsock", value]);
        assert_eq!(ran.code, Some(code), "{ran:?}");
        assert!(ran.stderr.contains(part), "{ran:?}");
    };
    usage("v.sock", 2, "socket=PATH");
    usage("socket=v.sock,cid=x", 2, "socket=PATH");
    usage("socket=/tmp/v.sock,cid=2", 1, "cid of 3");
    usage("socket=/nonexistent/v.sock", 1, "no directory");
    let long = format!("socket=/tmp/{}", "x".repeat(95));
    usage(&long, 1, "choose a shorter one");
}

fn prints(program: &Process, part: &str) {
    let found = program.until(NESTED_TIMEOUT, |out, _| out.contains(part).then_some(()));
    let (out, said) = (program.stdout(), program.stderr());
    assert!(found.is_some(), "never {part:?}; {out} {said}");
}

/// A stock kernel with its own driver: connections of both sides, a move that ends them with
/// ECONNRESET, new ones at the destination at once, by the listener that the guest had.
#[test]
fn linux_talks_to_its_host_and_is_told_of_a_move() {
    let Some(_turn) = nested_hosts() else { return };
    let host = NestedHost::start();
    let at_source = host.program(&["/init", "unix-serve", "/tmp/a.vsock_5"]);
    prints(&at_source, "serves");
    let guest = host.guest(&["--linux", "--vsock", "socket=/tmp/a.vsock,cid=42"]);
    guest.prints("ferry-guest: ready");
    guest.types("vsock-serve 52");
    guest.prints("ferry-vsock: serves 52");
    guest.types("vsock 5");
    guest.prints("ferry-vsock: heard from the guest");
    prints(&at_source, "accepted");
    let held = host.program(&["/init", "unix-hold", "/tmp/a.vsock", "52", "hello"]);
    prints(&held, "heard hello");
    // No program serves this port, and no process of the guest's that one.
    guest.types("vsock 6");
    guest.prints("port 6 of the host cannot be reached (Connection reset by peer");
    let refused = host.run(&["/init", "unix-ask", "/tmp/a.vsock", "53", "hello"]);
    assert_ne!(refused.code, 0, "{refused:?}");
    // A pause ends nothing.
    assert_eq!(guest.command(&["pause"]).code, 0);
    assert_eq!(guest.command(&["resume"]).code, 0);
    assert_eq!(
        host.run_well(&["/init", "unix-ask", "/tmp/a.vsock", "52", "again"]),
        "ferry-vsock: heard again\n"
    );
    assert!(!guest.all().contains("ended (Conn"), "{}", guest.all());

    let at_destination = host.program(&["/init", "unix-serve", "/tmp/b.vsock_5"]);
    prints(&at_destination, "serves");
    let there = host.receive_with(&["--vsock", "socket=/tmp/b.vsock"]);
    guest.migrate(there.uri(), &["--verify"]);
    // Both of the guest's are told, and both programs of the source see the end.
    there.prints("ferry-vsock: to 5 ended (Connection reset by peer");
    there.prints("ferry-vsock: served 52 ended (Connection reset by peer");
    prints(&held, "to 52 ended");
    prints(&at_source, "ended");
    assert_eq!(guest.ends().code, 0);
    there.types("vsock 5");
    there.prints("ferry-vsock: heard from the guest");
    prints(&at_destination, "accepted");
    assert_eq!(
        host.run_well(&["/init", "unix-ask", "/tmp/b.vsock", "52", "there"]),
        "ferry-vsock: heard there\n"
    );
    let gone = host.run(&["/init", "unix-ask", "/tmp/a.vsock", "52", "hello"]);
    assert_ne!(gone.code, 0, "{gone:?}");
    there.types("poweroff");
    assert_eq!(there.ends().code, 0);
}
