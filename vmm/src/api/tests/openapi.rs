//! `openapi.yaml` against what is served: every route, and every reply of the server's tests.
//!
//! The validator knows the keywords that the file uses and no others. It takes every object as
//! closed: a field that the file does not describe is a fault, and so is one that no sample has.

use crate::api::routes::TABLE;
use crate::api::types::*;
use crate::machine::{BalloonAuto, STATE_VERSION};
use ferry_migration::options::{Compress, Handover, OnTimeout, Options, PolicyKind, Tracking};
use ferry_migration::order::PushOrder;
use ferry_migration::report::{
    Bucket, Change, Disk, Event, Faults, Freed, Phase, Progress, Report, Round, Slowed, SlowedVcpu,
    Status as End, Steered,
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::sync::{LazyLock, Mutex};
use std::time::Duration;

static FILE: LazyLock<Value> =
    LazyLock::new(|| serde_yaml_ng::from_str(include_str!("../openapi.yaml")).unwrap());

/// What replies of tests had that the file does not describe.
pub static FAULTS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Properties that some value had, as `schema.property`.
type Seen = BTreeSet<String>;

fn resolve(schema: &Value) -> (&Value, Option<&str>) {
    let Some(to) = schema["$ref"].as_str() else {
        return (schema, None);
    };
    let target = FILE.pointer(&to[1..]);
    (
        target.unwrap_or_else(|| panic!("{to} leads nowhere")),
        Some(to),
    )
}

fn names(schema: &Value) -> BTreeSet<String> {
    let (schema, _) = resolve(schema);
    let own = schema["properties"].as_object().into_iter().flatten();
    let mut all: BTreeSet<_> = own.map(|(name, _)| name.clone()).collect();
    for part in schema["allOf"].as_array().into_iter().flatten() {
        all.extend(names(part));
    }
    all
}

fn is_type(name: &str, value: &Value) -> bool {
    match name {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "string" => value.is_string(),
        "integer" => value.is_u64() || value.is_i64(),
        "number" => value.is_number(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        other => panic!("the validator does not know the type {other}"),
    }
}

/// Checks a value; `others` are properties that another part of an `allOf` describes.
fn check(
    schema: &Value,
    value: &Value,
    others: &BTreeSet<String>,
    at: &str,
    seen: &mut Seen,
) -> Result<(), String> {
    let (schema, name) = resolve(schema);
    let at = name.unwrap_or(at);
    let fault = |what: String| Err(format!("{at}: {what}: {value}"));
    for keyword in schema.as_object().unwrap().keys() {
        let known = [
            "type",
            "enum",
            "const",
            "minimum",
            "maximum",
            "required",
            "properties",
            "items",
            "anyOf",
            "allOf",
            "additionalProperties",
            "description",
            "format",
        ];
        assert!(
            known.contains(&keyword.as_str()),
            "{at}: the keyword {keyword}"
        );
    }
    let types = match &schema["type"] {
        Value::String(one) => vec![one.as_str()],
        Value::Array(all) => all.iter().map(|t| t.as_str().unwrap()).collect(),
        _ => Vec::new(),
    };
    if !types.is_empty() && !types.iter().any(|t| is_type(t, value)) {
        return fault(format!("it is none of {types:?}"));
    }
    if schema["enum"]
        .as_array()
        .is_some_and(|all| !all.contains(value))
    {
        return fault("it is none of the enum".into());
    }
    if !schema["const"].is_null() && schema["const"] != *value {
        return fault(format!("it is not {}", schema["const"]));
    }
    if let Some(number) = value.as_f64() {
        let low = schema["minimum"].as_f64().is_some_and(|min| number < min);
        let high = schema["maximum"].as_f64().is_some_and(|max| number > max);
        if low || high {
            return fault("it is out of bounds".into());
        }
    }
    let own = names(schema);
    let known: BTreeSet<_> = own.union(others).cloned().collect();
    if let Some(object) = value.as_object() {
        for needed in schema["required"].as_array().into_iter().flatten() {
            if !object.contains_key(needed.as_str().unwrap()) {
                return fault(format!("it has no {needed}"));
            }
        }
        for (key, inner) in object {
            match &schema["properties"][key] {
                Value::Null if schema.get("anyOf").is_some() || known.contains(key) => {}
                Value::Null => return fault(format!("the file does not describe {key}")),
                property => {
                    let place = format!("{at}.{key}");
                    check(property, inner, &BTreeSet::new(), &place, seen)?;
                    seen.insert(place);
                }
            }
        }
    }
    for (n, inner) in value.as_array().into_iter().flatten().enumerate() {
        if let Some(items) = schema.get("items") {
            check(items, inner, &BTreeSet::new(), &format!("{at}[]"), seen)
                .map_err(|e| format!("item {n}: {e}"))?;
        }
    }
    for part in schema["allOf"].as_array().into_iter().flatten() {
        check(part, value, &known, at, seen)?;
    }
    if let Some(any) = schema["anyOf"].as_array() {
        let (mut fits, mut why) = (false, Vec::new());
        for one in any {
            // What a choice that does not fit has seen does not count.
            let mut own = Seen::new();
            match check(one, value, &known, at, &mut own) {
                Ok(()) => {
                    fits = true;
                    seen.append(&mut own);
                }
                Err(e) => why.push(e),
            }
        }
        if !fits {
            return fault(format!("no choice fits ({})", why.join("; ")));
        }
    }
    Ok(())
}

/// Where the file describes what is answered to a request, with this status and media type.
fn answer(
    method: &str,
    path: &str,
    status: u16,
    content: Option<&str>,
) -> Result<&'static Value, String> {
    let method = match method {
        "HEAD" => "get".to_owned(),
        method => method.to_lowercase(),
    };
    let fits = |template: &str| match template.split_once("{id}") {
        None => template == path,
        Some((before, _)) => path.len() > before.len() && path.starts_with(before),
    };
    let paths = FILE["paths"].as_object().unwrap();
    let operation = paths
        .iter()
        .find(|(template, item)| fits(template) && item.get(&method).is_some());
    let responses = match operation {
        Some((_, item)) => &item[&method]["responses"],
        // No route: the client is told so as everywhere.
        None => &FILE["paths"]["/v1/status"]["get"]["responses"],
    };
    let own = responses.get(status.to_string());
    let response = match own {
        Some(own) => own,
        None if status >= 400 => &responses["default"],
        None => return Err(format!("{method} {path} is not to answer {status}")),
    };
    let (response, _) = resolve(response);
    match content {
        None if response.get("content").is_none() => Ok(&Value::Null),
        None => Err(format!("{method} {path} answers {status} without a body")),
        Some(content) => {
            let plain = content.split(';').next().unwrap_or_default();
            let schema = response["content"].get(plain).map(|media| &media["schema"]);
            schema
                .ok_or_else(|| format!("{method} {path} is not to answer {status} with {content}"))
        }
    }
}

/// Notes what the file does not say of a reply, or of a line of a stream.
pub fn note(method: &str, path: &str, status: u16, body: Option<(&str, &[u8])>) {
    let checked =
        answer(method, path, status, body.map(|(content, _)| content)).and_then(|schema| {
            let Some((content, text)) = body.filter(|(content, _)| content.contains("json")) else {
                return Ok(());
            };
            let value = serde_json::from_slice(text).map_err(|e| format!("{content}: {e}"))?;
            check(schema, &value, &Seen::new(), path, &mut Seen::new())
        });
    if let Err(why) = checked {
        FAULTS
            .lock()
            .unwrap()
            .push(format!("{method} {path}, {status}: {why}"));
    }
}

#[test]
fn every_route_is_in_the_file_and_the_other_way_round() {
    let served: BTreeSet<_> = TABLE
        .iter()
        .map(|(method, path, _)| (method.to_lowercase(), (*path).to_owned()))
        .collect();
    assert_eq!(served.len(), TABLE.len());
    let paths = FILE["paths"].as_object().unwrap();
    let described: BTreeSet<_> = paths
        .iter()
        .flat_map(|(path, item)| {
            let methods = item.as_object().unwrap().keys();
            methods.map(|method| (method.clone(), path.clone()))
        })
        .collect();
    assert_eq!(described, served);
}

/// A value of each type with nothing left out.
fn samples() -> Vec<(&'static str, Value)> {
    let value = |v: &dyn erased::Json| v.json();
    let progress = Progress {
        disk_total: Some(1),
        disk_pending: Some(1),
        predicted_downtime_ms: Some(1.5),
        ..Progress::default()
    };
    let change = Change {
        policy: Some(PolicyKind::Auto),
        bandwidth: Some(None),
        downtime: Some(Duration::from_secs(1)),
        timeout: Some(Duration::from_secs(1)),
        on_timeout: Some(OnTimeout::Stop),
        throttle: Some(5),
        switchover: true,
    };
    let steered = Steered {
        change,
        ..Steered::default()
    };
    let faults = Faults {
        histogram: vec![Bucket::default()],
        ..Faults::default()
    };
    let mut report = Report::bare("s".into(), "auto".into(), End::Failed, "e".into());
    report.rounds = vec![Round {
        dirtied_regions: vec![1],
        ..Round::default()
    }];
    report.disk = Some(Disk::default());
    report.channels.bytes = vec![1];
    report.faults = faults.clone();
    report.steered = vec![steered.clone()];
    report.slowed = Some(Slowed {
        vcpus: vec![SlowedVcpu::default()],
        ..Slowed::default()
    });
    report.freed = Some(Freed::default());
    let record = MigrationRecord {
        schema: 1,
        id: "a".into(),
        direction: Direction::Incoming,
        to: Some("tcp:b:1".into()),
        policy: "auto".into(),
        status: RecordStatus::UnderWay,
        begun_unix_ms: 1,
        ended_unix_ms: Some(1),
        progress: Some(progress.clone()),
        report: Some(report.clone()),
        incoming: Some(IncomingReport {
            faults,
            ..IncomingReport::default()
        }),
    };
    let balloon = BalloonStatus {
        auto: Some(BalloonAuto {
            interval_ms: 1,
            reserve_bytes: 1,
        }),
        guest: Some(GuestMemory::default()),
        ..BalloonStatus::default()
    };
    let status = Status {
        schema: 1,
        version: "0".into(),
        pid: 1,
        state: StateName::InDoubt,
        explanation: "e".into(),
        guest: Some(GuestInfo {
            memory: Some(MemoryInfo {
                backing: "thp".into(),
                ..MemoryInfo::default()
            }),
            ..GuestInfo::default()
        }),
        uptime_ms: 1,
        migration: Some(progress.clone()),
        listening: None,
        missing: Some(Missing::default()),
        balloon: Some(balloon.clone()),
        serial_output_lost: 0,
        serial: None,
        console_output_lost: 0,
        console: None,
        to: None,
    };
    let configuration = Configuration {
        memory: MemoryConfiguration {
            backing: "4k".into(),
            nodes: vec![NodeConfiguration::default()],
            ..MemoryConfiguration::default()
        },
        boot: Some(Boot {
            from: "nas".into(),
            ..Boot::default()
        }),
        disks: vec![DiskConfiguration::default()],
        networks: vec![NetworkConfiguration::default()],
        vsock: Some(VsockConfiguration::default()),
        dirty: "log".into(),
        sandbox: Some("on".into()),
        ..Configuration::default()
    };
    let tls = Some(TlsFiles::default());
    let migrate = MigrateRequest {
        options: Options {
            max_pause: Some(Duration::from_secs(1)),
            free_source: true,
            ..Options::default()
        },
        tls: tls.clone(),
        ..MigrateRequest::default()
    };
    let recover = RecoverRequest {
        tls,
        ..RecoverRequest::default()
    };
    let set_balloon = BalloonRequest {
        size_bytes: None,
        auto: Some(BalloonWish::default()),
    };
    let snapshot = SnapshotRequest {
        path: "/a".into(),
        compress: Compress::Auto,
        live: true,
        force: true,
        then: Then::Stop,
        state_version: Some(STATE_VERSION),
    };
    let error = ErrorBody {
        error: "e".into(),
        code: Some("c".into()),
    };
    let state = What::State {
        state: StateName::Running,
        explanation: "e".into(),
        to: None,
        migration: None,
    };
    let arrival = What::Arrival {
        outcome: ArrivalOutcome::Arrived,
        explanation: "e".into(),
    };
    let mut all = vec![
        ("Error", value(&error)),
        ("Status", value(&status)),
        ("Configuration", value(&configuration)),
        ("Migrations", json!({ "migrations": [value(&record)] })),
        (
            "MigrationStatus",
            value(&MigrationStatus {
                id: Some("a".into()),
                progress: Some(progress.clone()),
                report: Some(report.clone()),
            }),
        ),
        ("BalloonStatus", value(&balloon)),
        ("MemoryStatus", value(&MemoryStatus::of(1 << 30, &balloon))),
        ("SnapshotReport", value(&SnapshotReport::default())),
        ("MigrateRequest", value(&migrate)),
        ("Change", value(&change)),
        ("RecoverRequest", value(&recover)),
        ("RecordRequest", value(&RecordRequest::default())),
        ("BalloonRequest", value(&set_balloon)),
        ("MemoryRequest", value(&MemoryRequest::default())),
        ("SnapshotRequest", value(&snapshot)),
    ];
    let events = [
        Event::Progress(progress),
        Event::Round(Round::default()),
        Event::Choice { why: "w".into() },
        Event::Steered(steered),
        Event::Report(Box::new(report)),
    ];
    for event in events {
        all.push(("MigrationEvent", value(&event)));
        all.push(("Notice", value(&Notice::now(What::Migration(event)))));
    }
    for what in [state, arrival, What::Lost { lost: 1 }] {
        all.push(("Notice", value(&Notice::now(what))));
    }
    all
}

mod erased {
    /// Any value, as JSON.
    pub trait Json {
        fn json(&self) -> serde_json::Value;
    }

    impl<T: serde::Serialize> Json for T {
        fn json(&self) -> serde_json::Value {
            serde_json::to_value(self).unwrap()
        }
    }
}

/// `schema.property` for all that the file describes.
fn described(schema: &Value, at: &str, all: &mut Seen) {
    if let Some(properties) = schema["properties"].as_object() {
        for (name, inner) in properties {
            let place = format!("{at}.{name}");
            described(inner, &place, all);
            all.insert(place);
        }
    }
    if let Some(items) = schema.get("items") {
        described(items, &format!("{at}[]"), all);
    }
    for part in ["anyOf", "allOf"] {
        for one in schema[part].as_array().into_iter().flatten() {
            described(one, at, all);
        }
    }
}

#[test]
fn every_field_is_in_the_file_and_the_other_way_round() {
    let mut seen = Seen::new();
    for (name, value) in samples() {
        let at = json!({ "$ref": format!("#/components/schemas/{name}") });
        check(&at, &value, &Seen::new(), name, &mut seen).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    let mut all = Seen::new();
    for (name, schema) in FILE["components"]["schemas"].as_object().unwrap() {
        described(schema, &format!("#/components/schemas/{name}"), &mut all);
    }
    let unserved: Vec<_> = all.difference(&seen).collect();
    assert!(
        unserved.is_empty(),
        "the file describes what no value has: {unserved:?}"
    );
}

/// The names that the file has for an enum, by the place of that in the schemas, and those that its
/// type reads: serde lists them for one that it does not know.
fn same_names<T: DeserializeOwned>(place: &str) {
    let listed = FILE
        .pointer(&format!("/components/schemas/{place}"))
        .unwrap();
    let listed: BTreeSet<_> = listed
        .as_array()
        .unwrap()
        .iter()
        .filter_map(Value::as_str)
        .collect();
    let error = serde_json::from_value::<T>(json!("?"))
        .err()
        .unwrap()
        .to_string();
    let read: BTreeSet<_> = error.split('`').skip(3).step_by(2).collect();
    assert_eq!(listed, read, "{place}");
}

#[test]
fn enums_have_the_same_names() {
    same_names::<StateName>("State/enum");
    same_names::<Phase>("Phase/enum");
    same_names::<PolicyKind>("Policy/enum");
    same_names::<OnTimeout>("OnTimeout/enum");
    same_names::<Compress>("Compress/enum");
    same_names::<PushOrder>("Options/properties/order/enum");
    same_names::<Tracking>("Options/properties/dirty/enum");
    same_names::<Handover>("Options/properties/handover/enum");
    same_names::<End>("Report/properties/status/enum");
    same_names::<RecordStatus>("MigrationRecord/properties/status/enum");
    same_names::<Direction>("MigrationRecord/properties/direction/enum");
    same_names::<ArrivalOutcome>("ArrivalEvent/properties/outcome/enum");
    same_names::<Then>("SnapshotRequest/properties/then/enum");
}

#[test]
fn the_validator_finds_what_is_wrong() {
    let test = |schema: &str, value: Value| {
        let at = json!({ "$ref": format!("#/components/schemas/{schema}") });
        check(&at, &value, &Seen::new(), schema, &mut Seen::new())
    };
    assert_eq!(test("Error", json!({"error": "e"})), Ok(()));
    for (schema, value, why) in [
        (
            "Error",
            json!({"error": "e", "more": 1}),
            "does not describe more",
        ),
        ("Error", json!({"code": "e"}), "has no"),
        ("Error", json!({"error": 1}), "none of"),
        ("Count", json!(-1), "out of bounds"),
        ("State", json!("asleep"), "enum"),
        ("LostEvent", json!({"event": "found", "lost": 1}), "is not"),
        (
            "Notice",
            json!({"unix_ms": 1, "event": "lost", "lost": 1, "x": 1}),
            "no choice fits",
        ),
        (
            "Notice",
            json!({"unix_ms": 1, "event": "round"}),
            "no choice fits",
        ),
    ] {
        let error = test(schema, value).unwrap_err();
        assert!(error.contains(why), "{schema}: {error}");
    }
}
