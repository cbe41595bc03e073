//! Guests move between processes under load, and say themselves that nothing was lost.
//!
//! Every migration here compares all memory of both sides in the pause (`verify`), and every guest
//! verifies its memory or its result in the end.
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "moves/versions.rs"]
mod versions;

use ferry_guest_images::{Class, Kernel, Line, Problem};
use ferry_migration::options::{Compress, Handover, Options};
use ferry_migration::report::{Event, Phase, Report, Status};
use ferry_tests::{Host, Proxy, State, TIMEOUT, Way, ferry, guests_run, run, until};
use ferry_vmm::api::client::Action;
use ferry_vmm::api::types::{Notice, What};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::Duration;

/// For people: what the report says and what the guest saw. Not asserted: a host that is busy shows
/// in the gap.
fn show(name: &str, report: &Report, destination: &Host) {
    let gap = destination
        .guest_lines()
        .iter()
        .rev()
        .find_map(|line| match Line::parse(line)? {
            Line::Stat { gaps, .. } | Line::Verdict { gaps, .. } => Some(gaps.max_us),
            Line::Result(result) => Some(result.gaps.max_us),
            _ => None,
        });
    eprintln!(
        "{name}: {} rounds, {:.0} ms, downtime {:.2} ms, the guest's own gap {:?} ms",
        report.rounds.len(),
        report.total_ms,
        report.downtime_ms,
        gap.map(|us| us / 1000),
    );
}

fn moves(work: &str, cpus: u32, unix: bool) {
    let mut source = Host::run(work, "64M", cpus);
    let destination = if unix {
        Host::receive_unix()
    } else {
        Host::receive()
    };
    // Over a Unix socket as well, pages are what is to be tested here.
    let options = Options {
        handover: Handover::Off,
        ..Host::options()
    };
    let report = source.migrate_well(destination.uri(), &options);
    assert_eq!(source.ends(), Some(0), "{:#?}", source.said());
    assert!(
        source
            .said()
            .iter()
            .any(|l| l.contains("the guest has moved to"))
    );
    destination.proves_running();
    destination.says("the guest has arrived");
    show(&format!("{work} on {cpus}"), &report, &destination);
    assert!(destination.verdict().writes > 0);
}

/// Writers of every pattern and fill, on one processor.
#[test]
fn writers_move_on_one_processor() {
    if !guests_run() {
        return;
    }
    for (pattern, fill) in PATTERNS {
        moves(
            &format!("dirty:wss=8M,rate=4000,pattern={pattern},fill={fill}"),
            1,
            false,
        );
    }
}

/// The same on two processors, over a Unix socket.
#[test]
fn writers_move_on_two_processors() {
    if !guests_run() {
        return;
    }
    for (pattern, fill) in PATTERNS {
        moves(
            &format!("dirty:wss=8M,rate=4000,pattern={pattern},fill={fill}"),
            2,
            true,
        );
    }
}

const PATTERNS: [(&str, &str); 6] = [
    ("sequential", "random"),
    ("sequential", "zero-rich"),
    ("uniform", "random"),
    ("uniform", "zero-rich"),
    ("zipf", "random"),
    ("zipf", "zero-rich"),
];

/// The results that a host's guest has printed: run and value.
fn results(host: &Host) -> Vec<(u64, f64)> {
    let lines = host.guest_lines();
    let results = lines.iter().filter_map(|line| match Line::parse(line)? {
        Line::Result(result) => Some((result.run, result.value)),
        _ => None,
    });
    results.collect()
}

/// Kernels compute on while they move, and their results agree with the published references.
#[test]
fn kernels_compute_on_while_they_move() {
    if !guests_run() {
        return;
    }
    for (kernel, cpus) in Kernel::ALL
        .into_iter()
        .flat_map(|kernel| [(kernel, 1), (kernel, 2)])
    {
        // Most runs are long enough for the move to be in the middle of one. The longest of two
        // processors that wait for each other after every sweep would take minutes where they do
        // not have two processors to themselves.
        let class = match (kernel, cpus) {
            (Kernel::Bt | Kernel::Sp, 2) => Class::S,
            _ => Class::W,
        };
        let kernel = &Problem { kernel, class }.to_string();
        let mut source = Host::run_kernel(kernel, "96M", cpus);
        let destination = Host::receive();
        let report = source.migrate_well(destination.uri(), &Host::options());
        assert_eq!(source.ends(), Some(0));
        let before = results(&source);
        destination.guest_line("a result", |l| matches!(l, Line::Result(_)));
        show(&format!("{kernel} on {cpus}"), &report, &destination);
        // The run that was moved is the one after the last that ended before, or that whose line
        // the move has torn; it and every other came to the very same value.
        let after = results(&destination);
        let (run, value) = after[0];
        let last = before.last().map_or(0, |(run, _)| *run);
        assert!((last + 1..=last + 2).contains(&run), "{before:?} {after:?}");
        for (_, other) in before.iter().chain(&after) {
            assert_eq!(*other, value, "{kernel}: {before:?} {after:?}");
        }
        destination.result();
    }
}

/// One writer moves fifty times in a row, from receiver to receiver, and loses nothing.
#[test]
fn fifty_moves_in_a_row() {
    if !guests_run() {
        return;
    }
    let mut here = Host::run("dirty:wss=8M,rate=5000", "64M", 1);
    let mut next = Host::receive();
    for n in 1..=50 {
        let report = here.migrate_well(next.uri(), &Host::options());
        // The next receiver starts while the old VMM ends.
        let after = Host::receive();
        assert_eq!(here.ends(), Some(0), "move {n}: {:#?}", here.said());
        assert_eq!(next.state(), State::Running);
        if n % 10 == 0 {
            show(&format!("move {n}"), &report, &next);
        }
        here = std::mem::replace(&mut next, after);
    }
    let verdict = here.verdict();
    assert!(verdict.pages > 12_000, "{verdict:?}");
}

/// Pages travel on four connections beside the control channel; what the proxy counted is what the
/// report says.
#[test]
fn four_channels_and_every_byte_is_counted() {
    if !guests_run() {
        return;
    }
    for channels in [1, 2, 4] {
        let mut source = Host::run("dirty:wss=8M,rate=4000", "64M", 2);
        let destination = Host::receive();
        let proxy = Proxy::to(destination.address());
        let options = Options {
            channels: Some(channels),
            ..Host::options()
        };
        let report = source.migrate_well(&proxy.uri(), &options);
        // What arrived may have been answered before it was counted.
        until("the proxy has counted all", || {
            proxy.total(Way::Forth) >= report.bytes_wire
        });
        assert_eq!(report.bytes_wire, proxy.total(Way::Forth));
        let data_channels = if channels == 1 {
            0
        } else {
            u64::from(channels)
        };
        assert_eq!(proxy.connections(), 1 + data_channels);
        assert_eq!(source.ends(), Some(0));
        show(&format!("{channels} channels"), &report, &destination);
        destination.verdict();
    }
}

/// Every way of making pages smaller, on one connection and on two; the guest's pages are of every
/// kind.
#[test]
fn every_coder_moves_a_guest_whole() {
    if !guests_run() {
        return;
    }
    let all = [
        Compress::Auto,
        Compress::None,
        Compress::Zstd,
        Compress::Delta,
        Compress::Adaptive,
    ];
    for compress in all {
        for (fill, channels) in [("zero-rich", 1), ("half", 2), ("random", 1)] {
            let work = format!("dirty:wss=8M,rate=4000,fill={fill}");
            let mut source = Host::run(&work, "64M", 1);
            let destination = Host::receive();
            let options = Options {
                compress,
                channels: Some(channels),
                delta_cache: 4 << 20,
                // A slow link, so that there is something to gain and several rounds.
                bandwidth: Some(100_000_000),
                downtime: Duration::from_millis(10),
                ..Host::options()
            };
            let report = source.migrate_well(destination.uri(), &options);
            assert_eq!(source.ends(), Some(0), "{:#?}", source.said());
            destination.proves_running();
            show(&format!("{compress:?}, {fill}"), &report, &destination);
            let codecs = report.codecs;
            match compress {
                Compress::None => assert!(codecs.is_empty()),
                Compress::Zstd if fill != "random" => assert!(codecs.zstd.pages > 0, "{codecs:?}"),
                Compress::Delta | Compress::Adaptive if fill != "random" => {
                    assert!(codecs.sparse.pages > 0, "{codecs:?}");
                }
                _ => {}
            }
            assert!(destination.verdict().writes > 0);
        }
    }
}

/// `ferry migrate --json`, as a script meets it: one object on stdout, nothing on stderr.
#[test]
fn the_command_prints_one_report() {
    if !guests_run() {
        return;
    }
    let mut source = Host::run("dirty:wss=4M,rate=2000", "64M", 1);
    let destination = Host::receive();
    let api = source.api();
    let ran = run(&[
        "migrate".as_ref(),
        "--api".as_ref(),
        api.as_os_str(),
        destination.uri().as_ref(),
        "--verify".as_ref(),
        "--channels".as_ref(),
        "4".as_ref(),
        "--json".as_ref(),
        "--quiet".as_ref(),
    ]);
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "{ran:?}");
    // One object and nothing else.
    let report: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(report["status"], "completed");
    assert_eq!(report["verified"], true);
    for name in [
        "schema",
        "policy",
        "error",
        "total_ms",
        "downtime_ms",
        "rounds",
        "bytes_wire",
        "mbps",
        "why",
    ] {
        assert!(report.get(name).is_some(), "{name}");
    }
    for (group, names) in [
        (
            "downtime",
            &[
                "quiesce_ms",
                "last_pages_ms",
                "verify_ms",
                "state_ms",
                "start_ms",
            ][..],
        ),
        ("pages", &["sent", "resent", "zero", "skipped"]),
        (
            "faults",
            &["count", "p50_us", "p99_us", "max_us", "stalled_ms"],
        ),
    ] {
        for name in names {
            assert!(report[group][name].is_number(), "{group}.{name}");
        }
    }
    assert_eq!(source.ends(), Some(0));
    destination.verdict();
}

/// What the scraper of `host` gets for a request.
fn scrape(host: &Host, request: &str) -> String {
    let line = host.says("metrics: http://");
    let address = line.rsplit("//").next().unwrap();
    let mut stream = TcpStream::connect(address.trim_end_matches("/metrics")).unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    write!(stream, "{request} HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

/// `ferry migrate --detach`: listeners hear it, and both ends keep its report and count it.
#[test]
fn a_detached_migration_is_seen_at_both_ends() {
    if !guests_run() {
        return;
    }
    let watched = ["--metrics", "0", "--linger", "1h"];
    let mut source = Host::run_with("dirty:wss=4M,rate=2000", "64M", 1, &watched);
    let destination = Host::receive_with(&["--metrics", "0"]);
    let ask = |host: &Host, args: &[&str]| {
        let api = host.api();
        let ran = run(&[&args[..1], &["--api", api.to_str().unwrap()], &args[1..]].concat());
        assert_eq!(ran.code, Some(0), "{ran:?}");
        ran.stdout
    };
    let object = |host: &Host, args: &[&str]| -> serde_json::Value {
        serde_json::from_str(&ask(host, &[args, &["--json"]].concat())).unwrap()
    };
    let mut events = Command::new(ferry());
    events.args(["events", "--json", "--api"]).arg(source.api());
    let mut events = events.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(events.stdout.take().unwrap()).lines();
    let first: Notice = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
    assert!(
        matches!(
            first.what,
            What::State {
                state: State::Running,
                ..
            }
        ),
        "{first:?}"
    );
    assert_eq!(
        object(&source, &["status", "--config"])["boot"]["from"],
        "nas"
    );

    let id = ask(&source, &["migrate", destination.uri(), "--detach"]);
    let id = id.trim();
    // Until nothing more can happen at the source.
    let heard: Vec<Notice> = lines
        .map(|l| serde_json::from_str(&l.unwrap()).unwrap())
        .collect();
    assert!(events.wait().unwrap().success());
    let states = heard.iter().filter_map(|notice| match &notice.what {
        What::State { state, .. } => Some(*state),
        _ => None,
    });
    assert_eq!(states.collect::<Vec<_>>(), [State::Migrating, State::Moved]);
    let report = heard.iter().find_map(|notice| match &notice.what {
        What::Migration(Event::Report(report)) => Some(report),
        _ => None,
    });
    assert_eq!(report.unwrap().session, id);

    let left = object(&source, &["report", id]);
    assert_eq!(
        (&left["code"], &left["report"]["status"]),
        (&"moved".into(), &"completed".into())
    );
    destination.says("the guest has arrived");
    let arrived = object(&destination, &["report", id]);
    assert_eq!(
        (&arrived["code"], &arrived["policy"]),
        (&"moved".into(), &"precopy".into())
    );
    // All that one side has sent the other has received; the other way goes little.
    let sent = left["report"]["bytes_wire"].as_u64().unwrap();
    let received = arrived["incoming"]["bytes_received"].as_u64().unwrap();
    assert!(
        received <= sent && received > sent / 10 * 9,
        "{received} of {sent} bytes"
    );
    assert!(object(&destination, &["status", "--config"])["boot"].is_null());

    for (host, direction) in [(&source, "outgoing"), (&destination, "incoming")] {
        let page = scrape(host, "GET /metrics");
        let line = format!(
            "\nferry_migrations_total{{direction=\"{direction}\",policy=\"precopy\",outcome=\"completed\"}} 1\n"
        );
        assert!(page.contains(&line), "{page}");
        assert!(scrape(host, "PUT /v1/stop").starts_with("HTTP/1.1 404"));
    }
    let api = source.api();
    let unknown = run(&["report", "--api", api.to_str().unwrap(), "beef"]);
    assert_eq!(unknown.code, Some(1), "{unknown:?}");
    assert!(
        unknown.stderr.contains("no migration beef is kept"),
        "{unknown:?}"
    );
    // It stays until it is told to go.
    assert_eq!(source.state(), State::Moved);
    ask(&source, &["stop"]);
    assert_eq!(source.ends(), Some(0), "{:#?}", source.said());
    destination.verdict();
}

/// The way is measured, every policy is forecast, and the command that is advised moves the guest.
#[test]
fn advice_can_be_followed() {
    if !guests_run() {
        return;
    }
    let mut source = Host::run("dirty:wss=4M,rate=2000,fill=none", "64M", 1);
    let destination = Host::receive();
    let api = source.api();
    let ran = run(&[
        "advise".as_ref(),
        "--json".as_ref(),
        "--duration".as_ref(),
        "1s".as_ref(),
        "--api".as_ref(),
        api.as_os_str(),
        "--to".as_ref(),
        destination.uri().as_ref(),
    ]);
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "{ran:?}");
    let advice: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(advice["measured"], true);
    assert!(
        advice["path"]["bandwidth"].as_f64().unwrap() > 1e6,
        "{advice:#}"
    );
    // The guest writes 2,000 pages a second where it is let; its memory is empty but for those, and
    // a page of 50 ms counts once.
    let rate = advice["dirtied_pages_per_second"].as_f64().unwrap();
    assert!(rate > 0.0 && rate < 1024.0 * 20.0 * 1.5, "{advice:#}");
    let empty = advice["empty_pages"].as_u64().unwrap();
    assert!((8 << 10..16 << 10).contains(&empty), "{advice:#}");
    let forecasts = advice["forecasts"].as_array().unwrap();
    assert_eq!(forecasts.len(), 6, "{advice:#}");
    for forecast in forecasts {
        assert!(forecast["total_ms"].as_f64().unwrap() > 0.0, "{forecast:#}");
    }
    let policy = advice["policy"].as_str().unwrap();
    let command = advice["command"].as_str().unwrap();
    assert!(command.contains(&format!("--policy {policy}")), "{command}");
    let words: Vec<&str> = command.split(' ').skip(1).collect();
    let ran = run(&[&words[..], &["--verify", "--quiet"]].concat());
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_eq!(source.ends(), Some(0));
    assert!(destination.verdict().writes > 0);
}

/// A guest that was paused arrives paused, and goes on when it is resumed.
#[test]
fn a_paused_guest_stays_paused() {
    if !guests_run() {
        return;
    }
    let mut source = Host::run("dirty:wss=4M,rate=2000", "64M", 1);
    source.act(Action::Pause).unwrap();
    let destination = Host::receive();
    source.migrate_well(destination.uri(), &Host::options());
    assert_eq!(source.ends(), Some(0));
    assert_eq!(destination.state(), State::Paused);
    assert!(
        destination.guest_lines().is_empty(),
        "{:?}",
        destination.guest_lines()
    );
    destination.act(Action::Resume).unwrap();
    destination.proves_running();
    destination.verdict();
}

/// A guest that ends while it is being moved ends where it was, and the receiver waits for the
/// next.
#[test]
fn a_guest_that_ends_on_the_way_ends() {
    if !guests_run() {
        return;
    }
    let destination = Host::receive();
    let mut source = Host::run("dirty:wss=4M,rate=1000", "64M", 1);
    let options = Options {
        // Minutes.
        bandwidth: Some(100_000),
        timeout: Duration::from_secs(600),
        ..Host::options()
    };
    let mark = destination.mark();
    let migration = source.begin_migration(destination.uri(), &options);
    until("pages are on their way", || {
        let progress = source.client().status().unwrap().migration;
        progress.is_some_and(|p| p.phase == Phase::Live && p.bytes_wire > 0)
    });
    source.finish();
    source.guest_line(
        "its verdict",
        |l| matches!(l, Line::Verdict { verdict, .. } if verdict.verified),
    );
    let report = migration.outcome();
    let code = source.ends();
    eprintln!(
        "ended on the way: exit {code:?}, report {report:?}, said {:?}",
        source.said()
    );
    assert_eq!(code, Some(0));
    if let Ok(report) = report {
        assert_ne!(report.status, Status::Completed);
    }
    destination.settles(mark);
    let mut next = Host::run("dirty:wss=4M,rate=1000", "64M", 1);
    next.migrate_well(destination.uri(), &Host::options());
    assert_eq!(next.ends(), Some(0));
    destination.verdict();
}
