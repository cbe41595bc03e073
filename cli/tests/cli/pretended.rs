//! Commands of a VMM that is pretended, so that it says what a real one says seldom.

use crate::support::{ferry, request, send, stderr};
use ferry_migration::report::{Event, Progress, Report, Status};
use std::io::{BufReader, Write};
use std::os::unix::net::UnixListener;
use std::process::{Command, Output, Stdio};

#[test]
fn ctrl_c_cancels_a_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let (api, file) = (dir.path().join("api"), dir.path().join("file"));
    let vmm = UnixListener::bind(&api).unwrap();
    let child = Command::new(env!("CARGO_BIN_EXE_ferry"))
        .arg("snapshot")
        .arg("--api")
        .args([&api, &file])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut writing = BufReader::new(vmm.accept().unwrap().0);
    let asked = request(&mut writing);
    assert!(asked.starts_with("PUT /v1/snapshot "), "{asked}");
    send(&child, nix::sys::signal::Signal::SIGINT);
    let mut cancel = BufReader::new(vmm.accept().unwrap().0);
    let asked = request(&mut cancel);
    assert!(asked.starts_with("PUT /v1/cancel "), "{asked}");
    let done = b"HTTP/1.1 204 No Content\r\n\r\n";
    cancel.get_mut().write_all(done).unwrap();
    let why = r#"{"error":"the snapshot was cancelled"}"#;
    let refused = format!(
        "HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{why}",
        why.len()
    );
    writing.get_mut().write_all(refused.as_bytes()).unwrap();
    let out = child.wait_with_output().unwrap();
    let text = stderr(&out);
    assert_eq!(out.status.code(), Some(1), "{text}");
    assert_eq!(
        text.lines().collect::<Vec<_>>(),
        [
            "ferry: cancelling; no file is made",
            "ferry: the snapshot was cancelled"
        ]
    );
}

/// Runs `ferry migrate --json` with a VMM that answers with these lines of its event stream, and
/// then hangs up.
fn migrate(events: &[String]) -> (Output, serde_json::Value) {
    let dir = tempfile::tempdir().unwrap();
    let api = dir.path().join("api");
    let vmm = UnixListener::bind(&api).unwrap();
    let answer = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut stream = BufReader::new(vmm.accept().unwrap().0);
            let asked = request(&mut stream);
            assert!(asked.starts_with("PUT /v1/migrate "), "{asked}");
            let mut text = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".to_owned();
            for line in events {
                text += &format!("{:x}\r\n{line}\n\r\n", line.len() + 1);
            }
            stream.get_mut().write_all(text.as_bytes()).unwrap();
        });
        let api = api.to_str().unwrap();
        ferry(&["migrate", "--json", "--api", api, "tcp:127.0.0.1:1"])
    });
    let value = serde_json::from_slice(&answer.stdout).unwrap();
    (answer, value)
}

fn report(status: Status, verified: Option<bool>) -> String {
    let mut report = Report::bare("s".into(), "precopy".into(), status, "why".into());
    report.verified = verified;
    serde_json::to_string(&Event::Report(Box::new(report))).unwrap()
}

#[test]
fn a_script_tells_the_ends_of_a_migration_apart() {
    for (status, verified, exit, code, name) in [
        (Status::Completed, None, 0, "moved", "completed"),
        (Status::Completed, Some(true), 0, "moved", "completed"),
        (Status::Failed, None, 1, "failed", "failed"),
        (Status::Cancelled, None, 3, "cancelled", "cancelled"),
        (Status::InDoubt, None, 4, "in-doubt", "in-doubt"),
        (Status::Interrupted, None, 5, "interrupted", "interrupted"),
        (Status::Completed, Some(false), 6, "not-equal", "completed"),
    ] {
        let (out, value) = migrate(&[report(status, verified)]);
        let said = stderr(&out);
        assert_eq!(out.status.code(), Some(exit), "{status:?}: {said}");
        assert_eq!(value["code"], code, "{value}");
        // The names of before stay.
        assert_eq!(
            (&value["status"], &value["schema"]),
            (&name.into(), &1.into()),
            "{value}"
        );
        assert_eq!(said.lines().count(), usize::from(exit != 0), "{said}");
    }
}

#[test]
fn a_vmm_that_ends_in_a_migration_leaves_the_guest_in_doubt() {
    let progress = serde_json::to_string(&Event::Progress(Progress::default())).unwrap();
    let (out, value) = migrate(&[progress]);
    assert_eq!(out.status.code(), Some(4), "{}", stderr(&out));
    assert_eq!(value["code"], "lost");
    assert!(
        value["error"].as_str().unwrap().contains("went away"),
        "{value}"
    );
    // The migration had not begun: the guest of this VMM, if there is one, has not left.
    let (out, value) = migrate(&[]);
    assert_eq!(out.status.code(), Some(1), "{}", stderr(&out));
    assert_eq!(value["code"], "no-vmm");
}
