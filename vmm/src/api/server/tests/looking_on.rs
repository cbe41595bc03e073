//! Events, kept migrations, configuration and metrics, over the socket.

use super::*;
use crate::api::types::{Configuration, Notice, StateName, What};

fn notice(lost: u64) -> Notice {
    Notice {
        unix_ms: 1,
        what: What::Lost { lost },
    }
}

fn ask(line: &str) -> Vec<u8> {
    format!("{line} HTTP/1.1\r\n{CLOSE}\r\n").into_bytes()
}

/// Asks for events, and reads until the first of them has come.
fn listen(r: &Running, fields: &str) -> (UnixStream, String) {
    let mut s = r.connect();
    write!(s, "GET /v1/events HTTP/1.1\r\nHost: x\r\n{fields}\r\n").unwrap();
    let mut text = Vec::new();
    while !text.windows(9).any(|w| w == b"\"running\"") {
        let mut byte = [0];
        s.read_exact(&mut byte).unwrap();
        text.push(byte[0]);
    }
    (s, String::from_utf8(text).unwrap())
}

#[test]
fn several_listeners_hear_the_same_and_one_that_hangs_up_is_forgotten() {
    let r = Running::new();
    let (mut plain, head) = listen(&r, "");
    assert!(head.contains("Content-Type: application/x-ndjson\r\n"));
    assert!(head.contains("Cache-Control: no-store\r\n"));
    let (mut sse, head) = listen(&r, "Accept: text/event-stream\r\n");
    assert!(head.contains("Content-Type: text/event-stream\r\n"));
    assert!(head.contains("\r\ndata: {\"unix_ms\":"), "{head}");
    let (gone, _) = listen(&r, "");
    let mut events = r.fake.events.lock().unwrap();
    assert_eq!(events.listeners(), 3);
    drop(events);
    // It leaves while nothing happens: its place is free again all the same.
    drop(gone);
    while r.fake.events.lock().unwrap().listeners() > 2 {
        std::thread::sleep(Duration::from_millis(5));
    }
    r.fake.events.lock().unwrap().publish(&notice(7));
    std::mem::take(&mut *r.fake.events.lock().unwrap());
    let (mut a, mut b) = (String::new(), String::new());
    plain.read_to_string(&mut a).unwrap();
    sse.read_to_string(&mut b).unwrap();
    let line = r#"{"unix_ms":1,"event":"lost","lost":7}"#;
    assert!(a.contains(&format!("\n{line}\n\r\n0\r\n\r\n")), "{a}");
    assert!(
        b.contains(&format!("\ndata: {line}\n\n\r\n0\r\n\r\n")),
        "{b}"
    );
}

#[test]
fn a_listener_that_stalls_delays_no_other_and_one_that_is_slow_is_told_what_it_lost() {
    let r = Running::with(Limits {
        reply: Duration::from_millis(100),
        ..Limits::default()
    });
    let _stalled = listen(&r, "");
    for _ in 0..20_000 {
        let long = What::Arrival {
            outcome: crate::api::types::ArrivalOutcome::Refused,
            explanation: "x".repeat(500),
        };
        let event = Notice {
            unix_ms: 1,
            what: long,
        };
        r.fake.events.lock().unwrap().publish(&event);
    }
    assert_eq!(
        Client::new(&r.path).status().unwrap().state,
        StateName::Running
    );
    while r.fake.events.lock().unwrap().listeners() > 0 {
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_slow_listener_is_told_over_the_socket() {
    let r = Running::new();
    let client = Client::new(&r.path);
    let fake = Arc::clone(&r.fake);
    let mut heard = Vec::new();
    client
        .events(&mut |notice| {
            if heard.is_empty() {
                // All of it happens while this listener is busy. Long lines: the socket holds few.
                let what = What::Arrival {
                    outcome: crate::api::types::ArrivalOutcome::Refused,
                    explanation: "x".repeat(8000),
                };
                let event = Notice { unix_ms: 1, what };
                let mut events = fake.events.lock().unwrap();
                for _ in 0..5000 {
                    events.publish(&event);
                }
                *events = Publisher::default();
            }
            heard.push(notice.what.clone());
        })
        .unwrap();
    assert!(matches!(heard[0], What::State { .. }));
    let lost = heard.iter().map(|what| match what {
        What::Lost { lost } => *lost,
        _ => 1,
    });
    assert_eq!(lost.sum::<u64>(), 5001);
    assert!(heard.iter().any(|what| matches!(what, What::Lost { .. })));
}

#[test]
fn kept_migrations_are_found_by_their_id() {
    let r = Running::new();
    let client = Client::new(&r.path);
    let record = client.migration_record("aa11").unwrap();
    assert_eq!(
        (record.id.as_str(), record.report),
        ("aa11", Some(report()))
    );
    assert_eq!(client.migrations().unwrap().migrations.len(), 1);
    let error = client.migration_record("bb22").unwrap_err();
    assert!(
        matches!(&error, ClientError::Refused { status: 404, code: Some(code), sentence }
            if code == "unknown-migration" && sentence.contains("bb22")),
        "{error:?}"
    );
    for odd in ["/v1/migrations/", "/v1/migrations/aa11/x"] {
        assert_eq!(r.status_of(&ask(&format!("GET {odd}"))), "404", "{odd}");
    }
    assert_eq!(r.status_of(&ask("PUT /v1/migrations/aa11")), "405");
}

#[test]
fn configuration_and_metrics_are_served() {
    let r = Running::new();
    let configuration = Client::new(&r.path).configuration().unwrap();
    assert_eq!(configuration.schema, Configuration::SCHEMA);
    let page = r.say(&ask("GET /metrics"));
    assert!(page.contains("Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n"));
    assert!(
        page.contains("\nferry_guest_memory_bytes 1048576\n"),
        "{page}"
    );
    let head = r.say(&ask("HEAD /v1/events"));
    assert!(head.starts_with("HTTP/1.1 200") && head.ends_with("\r\n\r\n"));
}
