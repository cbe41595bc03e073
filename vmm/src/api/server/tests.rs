//! The server against a fake [`Control`], by bytes, by our client and by curl.

mod looking_on;

use super::super::Refusal;
use super::super::client::{Action, Client, ClientError};
use super::super::events::Publisher;
use super::super::types::{
    BalloonRequest, BalloonStatus, Configuration, Direction, GuestInfo, MemoryConfiguration,
    MigrateRequest, MigrationRecord, MigrationStatus, Migrations, Notice, RecordRequest,
    RecordStatus, RecoverRequest, SnapshotReport, SnapshotRequest, StateName, Status, What,
};
use super::*;
use ferry_migration::options::Options;
use ferry_migration::report::{self, Event, Progress, Report};
use ferry_migration::steering::Change;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

#[derive(Default)]
struct Fake {
    calls: Mutex<Vec<String>>,
    migration: Mutex<Option<Publisher>>,
    events: Mutex<Publisher<Notice>>,
}

impl Fake {
    fn called(&self, what: &str) -> Result<(), Refusal> {
        self.calls.lock().unwrap().push(what.into());
        Ok(())
    }
}

impl Control for Fake {
    fn record(&self, request: &RecordRequest) -> Result<Pieces, Refusal> {
        self.called("record")?;
        let pieces = (0..request.duration_ms / request.interval_ms)
            .map(|n| vec![u8::try_from(n).unwrap(); 3]);
        Ok(Box::new(pieces))
    }

    fn status(&self) -> Status {
        Status {
            schema: Status::SCHEMA,
            version: "0".into(),
            pid: 1,
            state: StateName::Running,
            explanation: "It runs.".into(),
            guest: Some(GuestInfo {
                name: Some("fake".into()),
                memory_bytes: 1 << 20,
                memory: None,
                cpus: 1,
            }),
            uptime_ms: 1,
            migration: None,
            missing: None,
            balloon: None,
            listening: None,
            serial_output_lost: 0,
            serial: None,
            console_output_lost: 0,
            console: None,
            to: None,
        }
    }
    fn pause(&self) -> Result<(), Refusal> {
        self.called("pause")
    }
    fn resume(&self) -> Result<(), Refusal> {
        Err(Refusal::Conflict("the guest is not paused".into()))
    }
    fn stop(&self) -> Result<(), Refusal> {
        self.called("stop")
    }
    fn power_button(&self) -> Result<(), Refusal> {
        self.called("power-button")
    }
    fn cancel(&self) -> Result<(), Refusal> {
        panic!("a defect");
    }
    fn migrate(&self, request: &MigrateRequest) -> Result<Subscription, Refusal> {
        self.called(&format!(
            "migrate {} verify={}",
            request.uri, request.options.verify
        ))?;
        let mut publisher = Publisher::default();
        let subscription = publisher.subscribe();
        publisher.publish(&Event::Progress(Progress {
            round: 1,
            ..Progress::default()
        }));
        *self.migration.lock().unwrap() = Some(publisher);
        Ok(subscription)
    }
    fn steer(&self, change: &Change) -> Result<(), Refusal> {
        if change.switchover {
            return Err(Refusal::Coded {
                status: 409,
                code: "too-late",
                sentence: "it is over".into(),
            });
        }
        self.called(&format!("steer {change}"))
    }
    fn migration(&self) -> MigrationStatus {
        MigrationStatus::default()
    }
    fn migrations(&self) -> Migrations {
        let record = MigrationRecord {
            schema: MigrationRecord::SCHEMA,
            id: "aa11".into(),
            direction: Direction::Outgoing,
            to: Some("tcp:there:1".into()),
            policy: "precopy".into(),
            status: RecordStatus::Completed,
            begun_unix_ms: 1,
            ended_unix_ms: Some(2),
            progress: None,
            report: Some(report()),
            incoming: None,
        };
        Migrations {
            migrations: vec![record],
        }
    }
    fn configuration(&self) -> Result<Configuration, Refusal> {
        Ok(Configuration {
            schema: Configuration::SCHEMA,
            memory: MemoryConfiguration {
                backing: "thp".into(),
                ..MemoryConfiguration::default()
            },
            dirty: "log".into(),
            ..Configuration::default()
        })
    }
    fn events(&self) -> Result<Subscription<Notice>, Refusal> {
        let first = Notice::now(What::State {
            state: StateName::Running,
            explanation: "It runs.".into(),
            to: None,
            migration: None,
        });
        Ok(self.events.lock().unwrap().subscribe_after(Some(first)))
    }
    fn recover(&self, _: &RecoverRequest) -> Result<(), Refusal> {
        Err(Refusal::Failed("it broke".into()))
    }
    fn balloon(&self) -> Result<BalloonStatus, Refusal> {
        Ok(BalloonStatus {
            actual_bytes: 4096,
            ..BalloonStatus::default()
        })
    }
    fn set_balloon(&self, request: &BalloonRequest) -> Result<(), Refusal> {
        self.called(&format!("balloon {request:?}"))
    }
    fn snapshot(&self, request: &SnapshotRequest) -> Result<SnapshotReport, Refusal> {
        self.called(&format!("snapshot {}", request.path.display()))?;
        Ok(SnapshotReport {
            path: request.path.clone(),
            ..SnapshotReport::default()
        })
    }
}

pub fn report() -> Report {
    Report {
        schema: Report::SCHEMA,
        session: "s".into(),
        policy: "precopy".into(),
        status: report::Status::Completed,
        error: None,
        total_ms: 1.0,
        downtime_ms: 1.0,
        downtime: report::Downtime::default(),
        rounds: Vec::new(),
        rounds_omitted: 0,
        pages: report::Pages::default(),
        codecs: Default::default(),
        channels: Default::default(),
        steered: Vec::new(),
        slowed: None,
        freed: None,
        disk: None,
        bytes_wire: 1,
        mbps: 1.0,
        faults: report::Faults::default(),
        verified: None,
        why: None,
        guest_ended: false,
        retry_commit: false,
        abort_untold: None,
    }
}

struct Running {
    fake: Arc<Fake>,
    path: PathBuf,
    server: Option<Arc<Server>>,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
    _dir: tempfile::TempDir,
}

impl Running {
    fn with(limits: Limits) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let fake = Arc::new(Fake::default());
        let server = Arc::new(Server::bind(&path, Arc::clone(&fake) as _, limits).unwrap());
        let stop = Arc::new(AtomicBool::new(false));
        let (s, st) = (Arc::clone(&server), Arc::clone(&stop));
        // The event loop's part, by polling.
        let thread = std::thread::spawn(move || {
            while !st.load(Ordering::Relaxed) {
                s.accept();
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        Self {
            fake,
            path,
            server: Some(server),
            stop,
            thread: Some(thread),
            _dir: dir,
        }
    }

    fn new() -> Self {
        Self::with(Limits {
            linger: Duration::from_millis(200),
            ..Limits::default()
        })
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        // A hang is a failure, not a wait.
        stream
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        stream
    }

    /// Sends bytes and reads until the server closes.
    fn say(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        let _ = stream.write_all(bytes);
        let mut text = Vec::new();
        let _ = stream.read_to_end(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    }

    fn status_of(&self, bytes: &[u8]) -> String {
        let text = self.say(bytes);
        text.split(' ')
            .nth(1)
            .unwrap_or_else(|| panic!("no reply but {text:?}"))
            .to_owned()
    }

    fn halt(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(t) = self.thread.take() {
            t.join().unwrap();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(t) = self.thread.take() {
            let _ = t.join();
        }
        let faults = lock(&crate::api::tests::openapi::FAULTS).clone();
        if !std::thread::panicking() {
            assert!(faults.is_empty(), "{faults:#?}");
        }
    }
}

const CLOSE: &str = "Host: x\r\nConnection: close\r\n";

#[test]
fn serves_each_route() {
    let r = Running::new();
    let status = |line: &str, rest: &str| {
        r.status_of(format!("{line} HTTP/1.1\r\n{CLOSE}{rest}").as_bytes())
    };
    assert_eq!(status("GET /v1/status", "\r\n"), "200");
    assert_eq!(status("GET /v1/migration", "\r\n"), "200");
    assert_eq!(status("PUT /v1/pause", "\r\n"), "204");
    assert_eq!(
        status("PUT /v1/pause", "Content-Length: 2\r\n\r\n{}"),
        "204"
    );
    assert_eq!(
        status("PUT /v1/pause", "Content-Length: 3\r\n\r\n[1]"),
        "400"
    );
    assert_eq!(status("PUT /v1/resume", "\r\n"), "409");
    assert_eq!(status("PUT /v1/power-button", "\r\n"), "204");
    assert_eq!(status("PUT /v1/cancel", "\r\n"), "500");
    assert_eq!(
        status("PUT /v1/recover", "Content-Length: 2\r\n\r\n{}"),
        "500"
    );
    assert_eq!(status("GET /v1/nothing", "\r\n"), "404");
    assert_eq!(status("GET /v1/pause", "\r\n"), "405");
    assert_eq!(status("BREW /v1/status", "\r\n"), "405");
    assert_eq!(status("PUT /v1/migrate", "\r\n"), "411");
    assert_eq!(
        status("PUT /v1/migrate", "Content-Length: 2\r\n\r\n{}"),
        "400"
    );
    assert_eq!(
        status("PUT /v1/migrate", "Content-Length: 9999999\r\n\r\n"),
        "413"
    );
    let bad = br#"{"uri":"tcp:x:1","options":{"channels":0}}"#;
    let rest = format!(
        "Content-Length: {}\r\n\r\n{}",
        bad.len(),
        String::from_utf8_lossy(bad)
    );
    assert_eq!(status("PUT /v1/migrate", &rest), "400");
    assert_eq!(status("GET /v1/balloon", "\r\n"), "200");
    assert_eq!(status("PUT /v1/balloon", "\r\n"), "411");
    assert_eq!(status("DELETE /v1/balloon", "\r\n"), "405");
    for (body, answer) in [
        (r#"{"size_bytes":4096}"#, "204"),
        (r#"{"auto":{"interval_ms":1000}}"#, "204"),
        (r#"{"size":4096}"#, "400"),
        (r#"{"size_bytes":-1}"#, "400"),
    ] {
        let rest = format!("Content-Length: {}\r\n\r\n{body}", body.len());
        assert_eq!(status("PUT /v1/balloon", &rest), answer, "{body}");
    }
    assert_eq!(status("GET /v1/memory", "\r\n"), "200");
    assert_eq!(status("PUT /v1/memory", "\r\n"), "411");
    assert_eq!(status("PATCH /v1/memory", "\r\n"), "405");
    // The fake guest has 1 MiB, and can do with no less.
    for (body, answer) in [
        (r#"{"size_bytes":1048576}"#, "200"),
        (r#"{"size_bytes":1048575}"#, "400"),
        (r#"{"size_bytes":1048577}"#, "400"),
        ("{}", "400"),
    ] {
        let rest = format!("Content-Length: {}\r\n\r\n{body}", body.len());
        assert_eq!(status("PUT /v1/memory", &rest), answer, "{body}");
    }
    let calls = std::mem::take(&mut *r.fake.calls.lock().unwrap());
    assert_eq!(calls[..3], ["pause", "pause", "power-button"]);
    assert!(
        calls.len() == 6
            && calls[3].contains("4096")
            && calls[4].contains("1000")
            && calls[5].contains("Some(0)"),
        "{calls:?}"
    );
    assert_eq!(status("PATCH /v1/migrate", "\r\n"), "411");
    for (body, answer) in [
        (r#"{"bandwidth":null,"downtime_ms":5}"#, "204"),
        (r#"{"downtime_ms":-5}"#, "400"),
        (r#"{"verify":true}"#, "400"),
    ] {
        let rest = format!("Content-Length: {}\r\n\r\n{body}", body.len());
        assert_eq!(status("PATCH /v1/migrate", &rest), answer, "{body}");
    }
    let calls = r.fake.calls.lock().unwrap().clone();
    assert_eq!(calls, ["steer no bandwidth cap, downtime 5 ms"]);
    let text = r.say(format!("POST /v1/pause HTTP/1.1\r\n{CLOSE}\r\n").as_bytes());
    assert!(text.contains("\r\nAllow: PUT\r\n"), "{text}");
    assert!(
        text.ends_with("{\"error\":\"/v1/pause takes PUT only\"}\n"),
        "{text}"
    );
}

#[test]
fn head_has_the_length_and_no_body() {
    let r = Running::new();
    let get = r.say(format!("GET /v1/status HTTP/1.1\r\n{CLOSE}\r\n").as_bytes());
    let head = r.say(format!("HEAD /v1/status HTTP/1.1\r\n{CLOSE}\r\n").as_bytes());
    assert_eq!(get.split("\r\n\r\n").next(), head.split("\r\n\r\n").next());
    assert!(head.ends_with("\r\n\r\n"));
}

#[test]
fn keeps_connections_and_answers_a_pipeline_in_order() {
    let r = Running::new();
    let text = r.say(
        format!(
            "GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\nPUT /v1/resume HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{{}}\
             GET /nothing HTTP/1.1\r\nHost: x\r\n\r\nPUT /v1/pause HTTP/1.1\r\n{CLOSE}\r\n"
        )
        .as_bytes(),
    );
    let all: Vec<&str> = text
        .match_indices("HTTP/1.1 ")
        .map(|(at, _)| &text[at + 9..at + 12])
        .collect();
    assert_eq!(all, ["200", "409", "404", "204"]);
}

#[test]
fn garbage_after_a_request_is_refused_after_its_answer() {
    let r = Running::new();
    let text = r.say(b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n\x00\x01\x02 what\r\n\r\n");
    assert!(text.starts_with("HTTP/1.1 200 "), "{text}");
    assert!(text.contains("HTTP/1.1 400 "), "{text}");
    assert!(r.status_of(&[0xff; 100_000]).starts_with("4"));
    assert_eq!(r.status_of(&[b'A'; 100_000]), "431");
    let endless = [b"GET / HTTP/1.1\r\nX: ".as_slice(), &[b'y'; 200_000]].concat();
    assert_eq!(r.status_of(&endless), "431");
    // A megabyte more than allowed, sent although refused: the refusal is readable nevertheless.
    let mut huge =
        format!("PUT /v1/migrate HTTP/1.1\r\n{CLOSE}Content-Length: 2097152\r\n\r\n").into_bytes();
    huge.resize(huge.len() + (2 << 20), b' ');
    assert_eq!(r.status_of(&huge), "413");
    assert_eq!(
        r.status_of(format!("GET /v1/status HTTP/1.1\r\n{CLOSE}\r\n").as_bytes()),
        "200"
    );
}

#[test]
fn a_client_that_trickles_is_cut_off() {
    let request = Duration::from_millis(150);
    let r = Running::with(Limits {
        request,
        linger: Duration::ZERO,
        ..Limits::default()
    });
    let mut stream = r.connect();
    let mut reader = stream.try_clone().unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&done);
    let answer = std::thread::spawn(move || {
        let mut text = Vec::new();
        let _ = reader.read_to_end(&mut text);
        seen.store(true, Ordering::Relaxed);
        String::from_utf8_lossy(&text).into_owned()
    });
    stream.write_all(b"GET /v1/status HTTP/1.1\r\nX: ").unwrap();
    // Each byte comes well in time; only their sum does not.
    while !done.load(Ordering::Relaxed) && stream.write_all(b"y").is_ok() {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(answer.join().unwrap().starts_with("HTTP/1.1 408 "));
}

#[test]
fn a_silent_client_is_closed_without_a_word() {
    let r = Running::with(Limits {
        idle: Duration::from_millis(50),
        ..Limits::default()
    });
    assert_eq!(r.say(b""), "");
}

/// A connection that is busy: it streams a migration.
fn busy(r: &Running) -> UnixStream {
    let mut s = r.connect();
    let body = r#"{"uri":"tcp:x:1"}"#;
    let length = body.len();
    write!(
        s,
        "PUT /v1/migrate HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n{body}"
    )
    .unwrap();
    let mut first = [0; 12];
    s.read_exact(&mut first).unwrap();
    assert_eq!(&first, b"HTTP/1.1 200");
    s
}

#[test]
fn too_many_busy_connections_are_told_so_and_places_come_back() {
    let r = Running::with(Limits {
        connections: 1,
        ..Limits::default()
    });
    let held = busy(&r);
    assert_eq!(r.status_of(b""), "503");
    // The migration ends, and its stream with it.
    *r.fake.migration.lock().unwrap() = None;
    drop(held);
    // The thread notices in its own time.
    let ask = format!("GET /v1/status HTTP/1.1\r\n{CLOSE}\r\n");
    while r.status_of(ask.as_bytes()) == "503" {}
}

#[test]
fn clients_without_a_request_keep_no_client_out() {
    let r = Running::with(Limits::default());
    let limit = Limits::default().connections;
    let stream = busy(&r);
    // Silent ones, ones that have had their answer, and ones in the middle of a request.
    let idle: Vec<_> = (0..limit * 2)
        .map(|n| {
            let mut s = r.connect();
            let text: &[u8] = match n % 3 {
                0 => b"",
                1 => b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n",
                _ => b"PUT /v1/pause HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{",
            };
            let _ = s.write_all(text);
            s
        })
        .collect();
    let client = Client::new(&r.path);
    for _ in 0..10 {
        assert_eq!(client.status().unwrap().state, StateName::Running);
    }
    // The migration's stream was not touched.
    let mut publisher = r.fake.migration.lock().unwrap().take().unwrap();
    publisher.publish(&Event::Report(Box::new(report())));
    drop(publisher);
    let mut text = String::new();
    let mut stream = stream;
    stream.read_to_string(&mut text).unwrap();
    assert!(text.contains("\"event\":\"report\""), "{text}");
    drop(idle);
}

#[test]
fn a_reader_that_stalls_keeps_neither_a_migration_nor_others_waiting() {
    let r = Running::with(Limits {
        reply: Duration::from_millis(100),
        ..Limits::default()
    });
    let _stalled = busy(&r);
    let mut publisher = r.fake.migration.lock().unwrap().take().unwrap();
    // Far more than the socket's buffer and the queue hold.
    for _ in 0..20_000 {
        publisher.publish(&Event::Report(Box::new(report())));
    }
    let client = Client::new(&r.path);
    assert_eq!(client.status().unwrap().state, StateName::Running);
    // The stalled reader is dropped while the migration goes on.
    while !r.server.as_ref().unwrap().shared.open().streams.is_empty() {
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(publisher);
}

#[test]
fn many_connections_at_once_are_all_served() {
    let r = Running::with(Limits::default());
    std::thread::scope(|s| {
        for _ in 0..32 {
            s.spawn(|| {
                let client = Client::new(&r.path);
                for _ in 0..5 {
                    assert_eq!(client.status().unwrap().state, StateName::Running);
                }
            });
        }
    });
}

#[test]
fn the_client_hears_a_migration_to_its_end_and_shutdown_waits_for_that() {
    let mut r = Running::new();
    let client = Client::new(&r.path);
    assert!(matches!(
        client.act(Action::Resume),
        Err(ClientError::Refused { status: 409, .. })
    ));
    client.act(Action::Pause).unwrap();
    let refused = client.steer(&Change::switchover()).unwrap_err();
    assert!(
        matches!(&refused, ClientError::Refused { status: 409, code: Some(code), .. } if code == "too-late"),
        "{refused:?}"
    );
    let options = Options {
        verify: true,
        ..Options::default()
    };
    let request = MigrateRequest {
        uri: "tcp:there:1".into(),
        options,
        ..MigrateRequest::default()
    };
    let migrating = std::thread::spawn(move || {
        let mut events = 0;
        (
            client.migrate(&request, &mut |_| events += 1).unwrap(),
            events,
        )
    });
    while r.fake.migration.lock().unwrap().is_none() {
        std::thread::yield_now();
    }
    assert!(
        r.fake
            .calls
            .lock()
            .unwrap()
            .contains(&"migrate tcp:there:1 verify=true".to_owned())
    );
    r.halt();
    let server = Arc::into_inner(r.server.take().unwrap()).unwrap();
    let fake = Arc::clone(&r.fake);
    let ending = std::thread::spawn(move || server.shutdown(Duration::from_secs(30)));
    let mut publisher = fake.migration.lock().unwrap().take().unwrap();
    publisher.publish(&Event::Report(Box::new(report())));
    drop(publisher);
    let (got, events) = migrating.join().unwrap();
    assert_eq!((got, events), (report(), 2));
    ending.join().unwrap();
    assert!(!r.path.exists());
}

#[test]
fn shutdown_does_not_wait_for_idle_connections() {
    let mut r = Running::new();
    let mut idle = r.connect();
    idle.write_all(b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n")
        .unwrap();
    let mut first = [0; 12];
    idle.read_exact(&mut first).unwrap();
    r.halt();
    let server = Arc::into_inner(r.server.take().unwrap()).unwrap();
    // Longer than any test may take: it returns because the connection ends.
    server.shutdown(Duration::from_secs(3600));
}

#[test]
fn old_http_gets_the_stream_until_close() {
    let r = Running::new();
    let body = r#"{"uri":"tcp:x:1"}"#;
    let fake = Arc::clone(&r.fake);
    let teller = std::thread::spawn(move || {
        loop {
            if let Some(mut p) = fake.migration.lock().unwrap().take() {
                return p.publish(&Event::Report(Box::new(report())));
            }
            std::thread::yield_now();
        }
    });
    let request = format!(
        "PUT /v1/migrate HTTP/1.0\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let text = r.say(request.as_bytes());
    teller.join().unwrap();
    let lines: Vec<_> = text.split("\r\n\r\n").nth(1).unwrap().lines().collect();
    assert_eq!(lines.len(), 2, "{text}");
    assert!(serde_json::from_str::<Event>(lines[1]).is_ok());
}

#[test]
fn curl_understands_it() {
    if Command::new("curl").arg("--version").output().is_err() {
        eprintln!("NOT RUN: curl is not installed");
        return;
    }
    let r = Running::new();
    let curl = |args: &[&str]| {
        let out = Command::new("curl")
            .args([
                "-sS",
                "--max-time",
                "30",
                "-w",
                " %{http_code}",
                "--unix-socket",
            ])
            .arg(&r.path)
            .args(args)
            .output()
            .unwrap();
        assert!(
            out.status.success(),
            "{}",
            String::from_utf8_lossy(&out.stderr)
        );
        String::from_utf8_lossy(&out.stdout).into_owned()
    };
    let status = curl(&["http://localhost/v1/status"]);
    assert!(
        status.contains("\"state\":\"running\"") && status.ends_with(" 200"),
        "{status}"
    );
    assert_eq!(curl(&["-X", "PUT", "http://localhost/v1/pause"]), " 204");
    assert!(curl(&["-I", "http://localhost/v1/status"]).contains("200 OK"));
    let expect = curl(&[
        "-X",
        "PUT",
        "-H",
        "Expect: 100-continue",
        "-d",
        "{}",
        "http://localhost/v1/pause",
    ]);
    assert_eq!(expect, " 204");
    let chunked = curl(&[
        "-X",
        "PUT",
        "-H",
        "Transfer-Encoding: chunked",
        "-d",
        "{}",
        "http://localhost/v1/pause",
    ]);
    assert!(chunked.ends_with(" 411"), "{chunked}");

    let file = r.path.with_extension("json");
    std::fs::write(&file, vec![b' '; 3 << 20]).unwrap();
    let data = format!("@{}", file.display());
    let big = curl(&[
        "-X",
        "PUT",
        "--data-binary",
        &data,
        "http://localhost/v1/migrate",
    ]);
    assert!(big.ends_with(" 413"), "{big}");

    let fake = Arc::clone(&r.fake);
    let teller = std::thread::spawn(move || {
        loop {
            if let Some(mut p) = fake.migration.lock().unwrap().take() {
                return p.publish(&Event::Report(Box::new(report())));
            }
            std::thread::yield_now();
        }
    });
    let stream = curl(&[
        "-X",
        "PUT",
        "-d",
        r#"{"uri":"tcp:x:1"}"#,
        "http://localhost/v1/migrate",
    ]);
    teller.join().unwrap();
    assert_eq!(stream.lines().count(), 3, "{stream}");
    assert!(
        stream
            .lines()
            .nth(1)
            .unwrap()
            .starts_with("{\"event\":\"report\""),
        "{stream}"
    );
}

#[test]
fn a_recording_streams_bytes_and_other_failures_are_told() {
    let r = Running::new();
    let client = Client::new(&r.path);
    let mut trace = Vec::new();
    let request = RecordRequest {
        duration_ms: 4,
        interval_ms: 1,
    };
    client.record(&request, &mut trace).unwrap();
    assert_eq!(trace, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]);
    let request = RecordRequest {
        interval_ms: 0,
        ..request
    };
    let error = client.record(&request, &mut trace).unwrap_err();
    assert!(
        matches!(error, ClientError::Refused { status: 400, .. }),
        "{error}"
    );
    /// A full disk.
    struct Full;
    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let error = client
        .record(&RecordRequest::default(), &mut Full)
        .unwrap_err();
    assert!(matches!(error, ClientError::Output(_)), "{error}");
}
