//! Real guests over TLS and by a pairing line, and those who have no business at a receiver: after
//! each of them the source's guest runs on, and the receiver still waits for the right source.
#![allow(clippy::unwrap_used, clippy::panic)]

use ferry_migration::net::StreamLink;
use ferry_migration::net::tls::{ClientTls, Secret};
use ferry_migration::options::{Options, PolicyKind};
use ferry_migration::report::Status;
use ferry_migration::wire::{PREAMBLE_BYTES, Preamble, Role};
use ferry_tests::peer::{SESSION, abort_of, dial};
use ferry_tests::pki::{Authority, Certificates, FAR, HERE};
use ferry_tests::{Host, Proxy, State, Way, guests_run, run, until};
use ferry_vmm::api::types::Security;
use ferry_vmm::migrate::{Peer, Uri, measure};
use std::fs;
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;

const WORK: &str = "dirty:wss=4M,rate=1000";

fn receiver(certificates: &Certificates) -> Host {
    Host::receive_with(&["--tls", certificates.text()])
}

/// `ferry receive --pair`, and the line that it prints.
fn pairing() -> (Host, Security) {
    let host = Host::receive_with(&["--pair"]);
    let said = host.says("--pair ");
    let (_, line) = said.split_once("--pair ").unwrap();
    let security = Security {
        tls: None,
        pair: Some(line.to_owned()),
    };
    (host, security)
}

fn options(policy: PolicyKind) -> Options {
    Options {
        policy,
        channels: Some(2),
        ..Host::options()
    }
}

/// The migration fails with this in its sentence; the guest runs on, and the receiver waits.
fn is_refused(source: &Host, receiver: &Host, security: &Security, expected: &str) {
    let report = source.migrate_as(receiver.uri(), &Host::options(), security);
    assert_eq!(report.status, Status::Failed, "{report:#?}");
    let error = report.error.unwrap();
    eprintln!("refused: {error}");
    assert!(
        error.contains(expected) && !error.contains('\n'),
        "{error:?} does not contain {expected:?}; the receiver said {:#?}",
        receiver.said()
    );
    source.proves_running();
    receiver.reaches(State::Receiving);
}

/// The right source gets its guest across, whatever was before.
fn arrives(mut source: Host, receiver: Host, security: &Security) {
    source.migrate_well_as(receiver.uri(), &Host::options(), security);
    assert_eq!(source.ends(), Some(0));
    assert!(receiver.verdict().writes > 0);
}

/// On and on with each policy, on two data channels; the guest verifies its memory in the end.
#[test]
fn every_policy_moves_a_guest_through_tls() {
    if !guests_run() {
        return;
    }
    let certificates = Authority::default().host("node1");
    let policies = [
        PolicyKind::Precopy,
        PolicyKind::Stord,
        PolicyKind::Mplm,
        PolicyKind::Postcopy,
        PolicyKind::Hybrid,
    ];
    let receivers: Vec<Host> = policies.iter().map(|_| receiver(&certificates)).collect();
    let mut here = Host::run(WORK, "64M", 2);
    for (policy, next) in policies.into_iter().zip(receivers) {
        let report = here.migrate_well_as(next.uri(), &options(policy), &certificates.security());
        assert_eq!(report.channels.opened, 2, "{report:#?}");
        assert_eq!(here.ends(), Some(0), "{:#?}", here.said());
        here = next;
    }
    assert!(here.verdict().writes > 0);
}

/// Neither the first bytes nor any that follow say what they are.
#[test]
fn nothing_crosses_in_clear() {
    if !guests_run() {
        return;
    }
    let certificates = Authority::default().host("node1");
    let receiver = receiver(&certificates);
    let proxy = Proxy::to(receiver.address());
    let mut source = Host::run(WORK, "64M", 1);
    source.migrate_well_as(&proxy.uri(), &Host::options(), &certificates.security());
    assert_eq!(source.ends(), Some(0));
    let opening = proxy.opening();
    // A handshake record of TLS, and no preamble of ours.
    assert_eq!(opening[..2], [22, 3], "{:02x?}", &opening[..16]);
    assert!(opening.len() > 4096);
    let preamble = Preamble::new(Role::Control, 0, SESSION).encode();
    assert!(!opening.windows(8).any(|bytes| bytes == &preamble[..8]));
    // Memory of zeros and counters would show as runs of zeros.
    assert!(!opening.windows(64).any(|bytes| bytes == [0; 64]));
    assert!(receiver.verdict().writes > 0);
}

/// Every connection is cut while pages follow the guest: the VMM proves by itself that it is the
/// same source.
#[test]
fn recover_goes_on_through_tls_and_a_stranger_with_a_certificate_cannot() {
    if !guests_run() {
        return;
    }
    /// How much has crossed when the guest runs there, and most of it is still here.
    const BEGUN: u64 = 6 << 20;
    let authority = Authority::default();
    let certificates = authority.host("node1");
    for paired in [false, true] {
        let (receiver, security) = match paired {
            true => pairing(),
            false => (receiver(&certificates), certificates.security()),
        };
        let mut source = Host::run("dirty:wss=24M,rate=2000", "40M", 1);
        let proxy = Proxy::to(receiver.address());
        proxy.stall_at(BEGUN);
        let how = Options {
            policy: PolicyKind::Postcopy,
            bandwidth: Some(8_000_000),
            ..Host::options()
        };
        let migration = source.begin_migration_as(&proxy.uri(), &how, &security);
        let missing = || receiver.client().status().unwrap().missing;
        until("pages follow the guest", || {
            proxy.total(Way::Forth) >= BEGUN && missing().is_some()
        });
        proxy.cut();
        let report = migration.report();
        assert_eq!(report.status, Status::Interrupted, "{report:#?}");
        source.reaches(State::Interrupted);

        // Another host of the same authority knows the session's identifier, and not its secret.
        let session = session_of(&report.session);
        if !paired {
            let other = authority.host("node2").client();
            for role in [Role::Recover, Role::Data, Role::Fault, Role::Control] {
                for secret in [None, Some(secret_of(&other, receiver.address()))] {
                    let said = turned_away(&other, secret, receiver.address(), role, session);
                    assert!(
                        said.contains("does not prove") || said.contains("has its guest"),
                        "{said}"
                    );
                }
            }
        }
        let api = source.api();
        let ran = run(&["recover", "--api", api.to_str().unwrap(), receiver.uri()]);
        assert_eq!(ran.code, Some(0), "{ran:?}; it said {:#?}", source.said());
        assert_eq!(source.ends(), Some(0));
        until("nothing is missing", || missing().is_none());
        assert!(receiver.verdict().writes > 0);
    }
}

fn session_of(text: &str) -> ferry_migration::wire::SessionId {
    let mut id = [0; 16];
    for (byte, at) in id.iter_mut().zip((0..32).step_by(2)) {
        *byte = u8::from_str_radix(&text[at..at + 2], 16).unwrap();
    }
    ferry_migration::wire::SessionId(id)
}

/// The secret of a connection of its own: of another session than the receiver's.
fn secret_of(client: &ClientTls, to: SocketAddr) -> Secret {
    let mut link = StreamLink::connect_tcp(to).unwrap();
    link.secure_as_source(client, None).unwrap();
    link.secret().unwrap()
}

/// Opens a channel with a good certificate; why it is refused.
fn turned_away(
    client: &ClientTls,
    secret: Option<Secret>,
    to: SocketAddr,
    role: Role,
    session: ferry_migration::wire::SessionId,
) -> String {
    let mut link = StreamLink::connect_tcp(to).unwrap();
    link.secure_as_source(client, secret).unwrap();
    let mut channel = ferry_tests::peer::handshake_on(link, role, 0, session);
    abort_of(&mut channel)
}

/// A channel of another session, while a migration arrives here.
#[test]
fn channels_of_another_session_are_refused() {
    if !guests_run() {
        return;
    }
    let certificates = Authority::default().host("node1");
    let receiver = receiver(&certificates);
    let client = certificates.client();
    for role in [Role::Data, Role::Fault, Role::Recover] {
        for secret in [None, Some(secret_of(&client, receiver.address()))] {
            let said = turned_away(&client, secret, receiver.address(), role, SESSION);
            assert!(said.contains("does not prove"), "{said}");
        }
    }
    // A control channel needs no secret, and none makes one.
    let secret = secret_of(&client, receiver.address());
    let said = turned_away(
        &client,
        Some(secret),
        receiver.address(),
        Role::Control,
        SESSION,
    );
    assert!(said.contains("does not prove"), "{said}");
    receiver.reaches(State::Receiving);
    arrives(
        Host::run(WORK, "64M", 1),
        receiver,
        &certificates.security(),
    );
}

#[test]
fn certificates_that_are_no_good_are_refused() {
    if !guests_run() {
        return;
    }
    let authority = Authority::default();
    let (ours, strangers) = (authority.host("node1"), Authority::default().host("node1"));
    let late = authority.host_of(&["node1", HERE], 2001);
    let source = Host::run(WORK, "64M", 1);
    let waiting = receiver(&ours);
    is_refused(
        &source,
        &waiting,
        &strangers.security(),
        "another authority",
    );
    is_refused(
        &source,
        &waiting,
        &late.security(),
        "certificate has expired",
    );
    // On one side only, either way.
    is_refused(&source, &waiting, &Security::default(), "speaks TLS");
    let plain = Host::receive();
    is_refused(&source, &plain, &ours.security(), "does not speak TLS");
    plain.says("the peer speaks TLS here, and this side does not");
    // The receiver's: expired, and of a name that the source does not connect to.
    is_refused(
        &source,
        &receiver(&late),
        &ours.security(),
        "certificate has expired",
    );
    let elsewhere = authority.host_of(&["node2"], FAR);
    is_refused(
        &source,
        &receiver(&elsewhere),
        &ours.security(),
        "for another name",
    );
    let mut by_name = ours.security();
    by_name.tls.as_mut().unwrap().authz = Some("node2".into());
    is_refused(&source, &waiting, &by_name, "for another name");
    let node2 = receiver(&elsewhere);
    source.migrate_well_as(node2.uri(), &Host::options(), &by_name);
    drop(source);
    // And back, to one who wants another name first.
    let node1 = Host::receive_with(&["--tls", ours.text(), "--tls-authz", "node3,node4"]);
    is_refused(
        &node2,
        &node1,
        &elsewhere.security(),
        "none of the names of --tls-authz",
    );
    let node1 = Host::receive_with(&["--tls", ours.text(), "--tls-authz", "node3,node2"]);
    arrives(node2, node1, &elsewhere.security());
}

#[test]
fn files_that_are_no_good_are_told_before_anything_is_sent() {
    if !guests_run() {
        return;
    }
    let authority = Authority::default();
    let source = Host::run(WORK, "64M", 1);
    let receiver = receiver(&authority.host("node1"));
    type Spoil = fn(&Certificates);
    let spoil: [(&str, Spoil); 5] = [
        ("client-key.pem can be read by others (mode 0640)", |host| {
            let key = host.dir().join("client-key.pem");
            fs::set_permissions(key, fs::Permissions::from_mode(0o640)).unwrap();
        }),
        ("do not belong together", |host| {
            let other = Authority::default().host("node1");
            let cert = fs::read_to_string(other.dir().join("client-cert.pem"));
            host.put("client-cert.pem", &cert.unwrap());
        }),
        ("client-cert.pem is no certificate", |host| {
            host.put("client-cert.pem", "a diary");
        }),
        ("cannot read", |host| {
            fs::remove_file(host.dir().join("ca-cert.pem")).unwrap();
        }),
        ("is no private key", |host| host.put("client-key.pem", "")),
    ];
    for (expected, spoil) in spoil {
        let host = authority.host("node1");
        spoil(&host);
        let api = source.api();
        let api = api.to_str().unwrap();
        let ran = run(&[
            "migrate",
            "--api",
            api,
            receiver.uri(),
            "--tls",
            host.text(),
        ]);
        assert_eq!(ran.code, Some(1), "{ran:?}");
        assert!(ran.stderr.contains(expected), "{expected}: {ran:?}");
        assert_eq!(ran.stderr.lines().count(), 1, "{ran:?}");
        source.proves_running();
    }
    // A receiver does not even begin to wait.
    let host = authority.host("node1");
    let key = host.dir().join("server-key.pem");
    fs::set_permissions(key, fs::Permissions::from_mode(0o644)).unwrap();
    let ran = run(&["receive", "tcp:127.0.0.1:0", "--tls", host.text()]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(
        ran.stderr.contains("server-key.pem can be read by others"),
        "{ran:?}"
    );
    receiver.reaches(State::Receiving);
}

#[test]
fn a_pairing_line_is_good_for_one_guest() {
    if !guests_run() {
        return;
    }
    let (receiver, security) = pairing();
    let source = Host::run(WORK, "64M", 1);
    let line = security.pair.clone().unwrap();
    // A guess, with the right fingerprint.
    let guess = Security {
        tls: None,
        pair: Some(format!("{}{}", &line[..line.len() - 64], "0".repeat(64))),
    };
    is_refused(
        &source,
        &receiver,
        &guess,
        "its token is wrong or was used before",
    );
    // Another receiver has taken the place of the one that printed the line.
    let (impostor, _) = pairing();
    is_refused(
        &source,
        &impostor,
        &security,
        "not the one that printed the pairing line",
    );
    // In clear, and with a certificate of whatever authority.
    is_refused(&source, &receiver, &Security::default(), "speaks TLS");
    let certificates = Authority::default().host("node1");
    is_refused(
        &source,
        &receiver,
        &certificates.security(),
        "another authority",
    );
    // Measuring the way needs the token, and leaves it to be used.
    let uri: Uri = receiver.uri().parse().unwrap();
    let way = |security: &Security| measure(&Peer::new(uri.clone(), security).unwrap());
    assert!(
        way(&guess)
            .unwrap_err()
            .contains("is wrong or was used before")
    );
    assert!(way(&security).unwrap().bandwidth > 0.0);
    // The token is used, and the guest stays here: it is good for another try.
    let slow = Options {
        bandwidth: Some(200_000),
        ..options(PolicyKind::Precopy)
    };
    let migration = source.begin_migration_as(receiver.uri(), &slow, &security);
    receiver_has_begun(&receiver, &source);
    let second = Host::run(WORK, "64M", 1);
    let report = second.migrate_as(receiver.uri(), &Host::options(), &security);
    assert_eq!(report.status, Status::Failed);
    let error = report.error.unwrap();
    assert!(error.contains("was used before"), "{error}");
    second.proves_running();
    source.act(ferry_vmm::api::client::Action::Cancel).unwrap();
    assert_eq!(migration.report().status, Status::Cancelled);
    arrives(source, receiver, &security);
}

/// Pages cross.
fn receiver_has_begun(receiver: &Host, source: &Host) {
    until("pages cross", || {
        let progress = source.client().status().unwrap().migration;
        progress.is_some_and(|p| p.phase == ferry_migration::report::Phase::Live)
    });
    assert_eq!(receiver.state(), State::Receiving);
}

/// Connections that never finish their handshake, in TLS's own words and in none, do not keep the
/// right source out.
#[test]
fn a_crowd_without_certificates_keeps_no_source_out() {
    if !guests_run() {
        return;
    }
    let certificates = Authority::default().host("node1");
    let receiver = receiver(&certificates);
    // The beginning of a handshake of 512 bytes.
    let hello = [0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3];
    let mut crowd: Vec<_> = (0..200).map(|_| dial(receiver.address())).collect();
    for (i, link) in crowd.iter_mut().enumerate() {
        // Some of them were closed already: there were too many.
        let _ = link.0.write_all(&hello[..i % (hello.len() + 1)]);
    }
    for link in crowd.iter_mut().take(100) {
        let preamble = Preamble::new(Role::Control, 0, SESSION).encode();
        let _ = link.0.write_all(&preamble[..PREAMBLE_BYTES / 2]);
    }
    assert_eq!(receiver.state(), State::Receiving);
    assert!(receiver.rss() < 200 << 20, "{}", receiver.rss());
    // While they are all there.
    arrives(
        Host::run(WORK, "64M", 1),
        receiver,
        &certificates.security(),
    );
    drop(crowd);
}

#[test]
fn a_gate_is_kept() {
    if !guests_run() {
        return;
    }
    let source = Host::run(WORK, "64M", 2);
    let gate = |more: &[&str]| Host::receive_with(more);
    let none = Security::default();
    let elsewhere = gate(&["--accept-from", "192.0.2.0/24,2001:db8::/32"]);
    is_refused(
        &source,
        &elsewhere,
        &none,
        "the connection to the peer failed",
    );
    elsewhere.says("a connection from 127.0.0.1 was refused: its address is none of --accept-from");
    is_refused(
        &source,
        &gate(&["--max-memory", "32M"]),
        &none,
        "at most 32 MiB (--max-memory)",
    );
    is_refused(
        &source,
        &gate(&["--max-cpus", "1"]),
        &none,
        "at most 1 (--max-cpus)",
    );
    let fits = [
        "--accept-from",
        "192.0.2.1,127.0.0.0/8",
        "--max-memory",
        "64M",
        "--max-cpus",
        "2",
    ];
    arrives(source, gate(&fits), &none);
}

#[test]
fn beyond_this_host_an_option_must_say_who_may_come() {
    for uri in ["tcp:0.0.0.0:0", "tcp:[::]:0"] {
        let ran = run(&["receive", uri, "--serial", "null"]);
        assert_eq!(
            (ran.code, ran.stderr.lines().count()),
            (Some(1), 1),
            "{ran:?}"
        );
        for part in [
            "could place a guest here",
            "--tls DIR",
            "--pair",
            "--insecure",
        ] {
            assert!(ran.stderr.contains(part), "{part}: {ran:?}");
        }
    }
    for more in [
        &["--pair"][..],
        &["--tls", "/nonexistent"],
        &["--accept-from", "10.0.0.1"],
    ] {
        let ran = run(&[&["receive", "unix:/tmp/x", "--serial", "null"], more].concat());
        assert_eq!(ran.code, Some(1), "{ran:?}");
        assert!(ran.stderr.contains("stays on this host"), "{ran:?}");
    }
    if guests_run() {
        let mut open = Host::start(&[
            "receive",
            "tcp:0.0.0.0:0",
            "--insecure",
            "--serial",
            "stdio",
        ]);
        open.says("waiting on tcp:0.0.0.0:");
        open.kill();
    }
}

/// As an administrator does it.
#[test]
fn the_command_makes_certificates_that_work() {
    let dir = tempfile::tempdir().unwrap();
    let text = |path: &std::path::Path| path.to_str().unwrap().to_owned();
    let pki = text(&dir.path().join("pki"));
    let well = |args: &[&str]| {
        let ran = run(args);
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(0), ""), "{ran:?}");
        ran.stderr
    };
    let wrong = |args: &[&str], part: &str| {
        let ran = run(args);
        assert_eq!(
            (ran.code, ran.stderr.lines().count()),
            (Some(1), 1),
            "{ran:?}"
        );
        assert!(ran.stderr.contains(part), "{ran:?}");
    };
    wrong(&["pki", "host", &pki, "node1"], "ferry pki init");
    well(&["pki", "init", &pki]);
    wrong(&["pki", "init", &pki], "is there already");
    assert!(well(&["pki", "host", &pki, "node1", HERE]).contains("made"));
    assert!(well(&["pki", "host", &pki, "node1", HERE, "--days", "7"]).contains("renewed"));
    well(&["pki", "host", &pki, "node2", HERE]);
    for name in ["../node3", ".", "no name", ""] {
        let ran = run(&["pki", "host", &pki, name]);
        assert_eq!(ran.code, Some(1), "{ran:?}");
    }
    for (file, mode) in [
        ("ca-key.pem", 0o600),
        ("ca-cert.pem", 0o644),
        ("node1/server-key.pem", 0o600),
        ("node1/client-key.pem", 0o600),
        ("node1/server-cert.pem", 0o644),
    ] {
        let path = dir.path().join("pki").join(file);
        let found = fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        assert_eq!(found, mode, "{file}");
    }
    // An authority of another key is another authority.
    let other = text(&dir.path().join("other"));
    well(&["pki", "init", &other]);
    fs::copy(format!("{other}/ca-key.pem"), format!("{pki}/ca-key.pem")).unwrap();
    wrong(
        &["pki", "host", &pki, "node4"],
        "was not made by `ferry pki init` with",
    );
    if !guests_run() {
        return;
    }
    let (node1, node2) = (format!("{pki}/node1"), format!("{pki}/node2"));
    let receiver = Host::receive_with(&["--tls", &node2, "--tls-authz", "node1"]);
    let mut source = Host::run(WORK, "64M", 1);
    let api = text(&source.api());
    let args = ["migrate", "--api", &api, receiver.uri(), "--tls", &node1];
    let ran = run(&[&args[..], &["--tls-authz", "node2", "--verify"]].concat());
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_eq!(source.ends(), Some(0));
    assert!(receiver.verdict().writes > 0);
}
