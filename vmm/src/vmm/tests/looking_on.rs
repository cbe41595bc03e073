//! Listeners, kept migrations, and what is counted.

use super::*;
use crate::api::types::{ArrivalOutcome, Direction, IncomingReport, Notice, RecordStatus};
use crate::vmm::feed::LISTENERS;
use ferry_migration::report::Round;

fn notices(events: &Subscription<Notice>) -> Vec<What> {
    let mut heard = Vec::new();
    loop {
        match events.next(Duration::from_secs(60)) {
            Next::Event(e) => heard.push(e.what),
            Next::Closed => return heard,
            Next::Lost(_) | Next::Idle => panic!("{heard:?}"),
        }
    }
}

/// A state's name, an event's kind.
fn names(heard: &[What]) -> Vec<String> {
    let name = |what: &What| match what {
        What::State { state, .. } => state.name().to_owned(),
        What::Migration(Event::Report(report)) => format!("report {:?}", report.status),
        What::Migration(Event::Round(round)) => format!("round {}", round.n),
        other => format!("{other:?}"),
    };
    heard.iter().map(name).collect()
}

#[test]
fn a_listener_hears_each_state_and_the_migration_until_the_guest_has_moved() {
    let rig = Rig::new();
    let all = rig.vmm.events().unwrap();
    rig.vmm.pause().unwrap();
    rig.vmm.resume().unwrap();
    let events = rig.begin();
    let late = rig.vmm.events().unwrap();
    let round = Round {
        n: 1,
        ..Round::default()
    };
    rig.steps.send(Step::Event(Event::Round(round))).unwrap();
    rig.end(&events, Step::End(report::Status::Completed));
    let heard = notices(&all);
    assert_eq!(
        names(&heard),
        [
            "running",
            "paused",
            "running",
            "migrating",
            "round 1",
            "report Completed",
            "moved"
        ]
    );
    let What::State { to, migration, .. } = &heard[3] else {
        panic!("{heard:?}");
    };
    assert_eq!(
        (to.as_deref(), migration.as_deref()),
        (Some("tcp:there:1"), Some("m1"))
    );
    assert_eq!(notices(&late)[0], heard[3]);
    // After the end a new listener hears how it ended.
    assert_eq!(names(&notices(&rig.vmm.events().unwrap())), ["moved"]);
}

#[test]
fn a_listener_that_never_reads_holds_up_nothing_and_is_told_what_it_missed() {
    let rig = Rig::new();
    let slow = rig.vmm.events().unwrap();
    let events = rig.begin();
    for n in 0..2000 {
        let round = Round {
            n,
            ..Round::default()
        };
        rig.steps.send(Step::Event(Event::Round(round))).unwrap();
    }
    rig.steps
        .send(Step::End(report::Status::Completed))
        .unwrap();
    // Its own stream was not read either: the report is there.
    let heard = super::drain(&events);
    assert!(matches!(heard.last(), Some(Event::Report(_))));
    let Next::Lost(lost) = slow.next(Duration::ZERO) else {
        panic!("it is not told");
    };
    let rest = notices(&slow);
    // Two states before, 2000 rounds, the report and the last state.
    assert_eq!(lost + rest.len() as u64, 2004);
    assert_eq!(names(&rest).last().unwrap(), "moved");
}

#[test]
fn a_thousand_listeners_are_refused_but_for_some_and_places_come_back() {
    let rig = Rig::new();
    let mut kept: Vec<_> = (0..1000).filter_map(|_| rig.vmm.events().ok()).collect();
    assert_eq!(kept.len(), LISTENERS);
    let refused = rig.vmm.events().unwrap_err();
    assert!(
        matches!(
            &refused,
            Refusal::Coded {
                status: 503,
                code: "too-many-listeners",
                ..
            }
        ),
        "{refused:?}"
    );
    kept.pop();
    assert!(rig.vmm.events().is_ok());
}

#[test]
fn a_migration_is_kept_with_its_report_and_counted() {
    let rig = Rig::new();
    let events = rig.begin();
    let running = rig.vmm.migration_record("m1").unwrap();
    assert_eq!(
        (running.status, running.direction, running.to.as_deref()),
        (
            RecordStatus::UnderWay,
            Direction::Outgoing,
            Some("tcp:there:1")
        )
    );
    assert!(running.progress.is_some() && running.report.is_none());
    assert_eq!(rig.vmm.migration().id.as_deref(), Some("m1"));
    let page = rig.vmm.metrics();
    assert!(page.contains("\nferry_migration_running 1\n"), "{page}");
    assert!(page.contains("\nferry_guest_state{state=\"migrating\"} 1\n"));
    rig.end(&events, Step::End(report::Status::InDoubt));
    let ended = rig.vmm.migration_record("m1").unwrap();
    assert_eq!(ended.status, RecordStatus::InDoubt);
    assert!(ended.progress.is_none() && ended.report.is_some());
    let page = rig.vmm.metrics();
    assert!(
        page.contains("\nferry_migrations_total{direction=\"outgoing\",policy=\"other\",outcome=\"in-doubt\"} 1\n"),
        "{page}"
    );
    assert!(page.contains("\nferry_migration_duration_seconds_count{direction=\"outgoing\"} 1\n"));
    assert!(page.contains("\nferry_migration_downtime_seconds_count 0\n"));
    assert_eq!(rig.vmm.migration_record("m2"), None);
    assert_eq!(rig.vmm.migrations().migrations.len(), 1);
}

#[test]
fn the_dirty_rate_is_that_of_the_latest_round_and_goes_with_the_migration() {
    let rig = Rig::new();
    let events = rig.begin();
    let round = Round {
        n: 1,
        ms: 500.0,
        dirtied: 100,
        ..Round::default()
    };
    rig.steps
        .send(Step::Event(Event::Round(round.clone())))
        .unwrap();
    assert_eq!(
        events.next(Duration::from_secs(60)),
        Next::Event(Box::new(Event::Round(round)))
    );
    let page = rig.vmm.metrics();
    assert!(
        page.contains("\nferry_migration_dirty_bytes_per_second 819200\n"),
        "{page}"
    );
    rig.end(&events, Step::End(report::Status::Cancelled));
    assert!(!rig.vmm.metrics().contains("dirty_bytes"));
}

#[test]
fn what_arrives_is_kept_and_counted_once() {
    let vmm = Vmm::receiving("tcp:here:1".into()).unwrap();
    let heard = vmm.events().unwrap();
    let news = |bytes_received| IncomingReport {
        bytes_received,
        total_ms: 2000.0,
        ..IncomingReport::default()
    };
    vmm.incoming("s", "hybrid", RecordStatus::UnderWay, news(100));
    vmm.incoming("s", "hybrid", RecordStatus::Interrupted, news(150));
    vmm.incoming("s", "hybrid", RecordStatus::Completed, news(200));
    vmm.tell_arrival(ArrivalOutcome::Complete, "all is here".into());
    let page = vmm.metrics();
    for line in [
        "ferry_migration_received_bytes_total 200",
        "ferry_migrations_total{direction=\"incoming\",policy=\"hybrid\",outcome=\"interrupted\"} 1",
        "ferry_migration_duration_seconds_bucket{direction=\"incoming\",le=\"2.5\"} 1",
        "ferry_guests 0",
    ] {
        assert!(page.contains(&format!("\n{line}\n")), "{line}: {page}");
    }
    assert!(!page.contains("outcome=\"completed\""));
    let record = vmm.migration_record("s").unwrap();
    assert_eq!(record.status, RecordStatus::Completed);
    drop(vmm);
    let heard = notices(&heard);
    assert_eq!(names(&heard)[0], "receiving");
    assert!(matches!(
        heard[1],
        What::Arrival {
            outcome: ArrivalOutcome::Complete,
            ..
        }
    ));
}

#[test]
fn a_vmm_that_lingers_gives_its_guest_up_and_ends_when_it_is_told() {
    let rig = Rig::migrated(report::Status::Completed);
    rig.vmm.linger();
    assert_eq!(rig.journal.calls(), ["stop"]);
    let status = rig.vmm.status();
    assert_eq!((status.state, status.guest), (StateName::Moved, None));
    assert!(rig.vmm.migration_record("m1").unwrap().report.is_some());
    assert!(
        rig.vmm.finished_event().read().is_err(),
        "a loop would spin"
    );
    assert!(!rig.vmm.is_released());
    rig.vmm.stop().unwrap();
    assert!(rig.vmm.is_released());
    assert_eq!(rig.vmm.finished_event().read().unwrap(), 1);
}

#[test]
fn a_request_to_end_that_comes_before_it_lingers_counts() {
    let rig = Rig::migrated(report::Status::Completed);
    rig.vmm.stop().unwrap();
    rig.vmm.linger();
    assert!(rig.vmm.is_released());
}
