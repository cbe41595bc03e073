//! Which request does what.

use super::events::Subscription;
use super::http::Head;
use super::types::{
    BalloonRequest, ErrorBody, MemoryRequest, MigrateRequest, Migrations, Notice, RecordRequest,
    RecoverRequest, SnapshotRequest,
};
use super::{Control, Pieces, Refusal};
use ferry_migration::steering::Change;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// What a request means, known from its head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    Status,
    Configuration,
    Events,
    Migration,
    Migrations,
    MigrationRecord,
    Pause,
    Resume,
    Stop,
    Cancel,
    PowerButton,
    Migrate,
    Steer,
    Recover,
    Record,
    Balloon,
    SetBalloon,
    Memory,
    SetMemory,
    Snapshot,
    Metrics,
}

/// All that is served; `HEAD` goes wherever `GET` does. `openapi.yaml` has the same.
pub const TABLE: &[(&str, &str, Route)] = &[
    ("GET", "/v1/status", Route::Status),
    ("GET", "/v1/vm", Route::Configuration),
    ("GET", "/v1/events", Route::Events),
    ("GET", "/v1/migration", Route::Migration),
    ("GET", "/v1/migrations", Route::Migrations),
    ("GET", "/v1/migrations/{id}", Route::MigrationRecord),
    ("PUT", "/v1/pause", Route::Pause),
    ("PUT", "/v1/resume", Route::Resume),
    ("PUT", "/v1/stop", Route::Stop),
    ("PUT", "/v1/cancel", Route::Cancel),
    ("PUT", "/v1/power-button", Route::PowerButton),
    ("PUT", "/v1/migrate", Route::Migrate),
    ("PATCH", "/v1/migrate", Route::Steer),
    ("PUT", "/v1/recover", Route::Recover),
    ("PUT", "/v1/record", Route::Record),
    ("GET", "/v1/balloon", Route::Balloon),
    ("PUT", "/v1/balloon", Route::SetBalloon),
    ("GET", "/v1/memory", Route::Memory),
    ("PUT", "/v1/memory", Route::SetMemory),
    ("PUT", "/v1/snapshot", Route::Snapshot),
    ("GET", "/metrics", Route::Metrics),
];

/// An answer.
pub enum Answer {
    /// A JSON body.
    Json(u16, Vec<u8>),
    /// The page for Prometheus.
    Metrics(String),
    /// 204.
    Done,
    /// A refusal; the second is the `Allow` header of a 405.
    Error(u16, Option<String>, String),
    /// A refusal with a name for programs.
    Coded(u16, &'static str, String),
    /// A stream of a migration's events.
    Stream(Subscription),
    /// A stream of what happens.
    Events(Subscription<Notice>),
    /// A stream of bytes.
    Bytes(Pieces),
}

impl Answer {
    /// Whether the connection ends with it.
    pub const fn is_stream(&self) -> bool {
        matches!(self, Self::Stream(_) | Self::Events(_) | Self::Bytes(_))
    }
}

/// Whether a path is that of a template.
fn fits(template: &str, path: &str) -> bool {
    match template.split_once('{') {
        None => template == path,
        Some((before, _)) => path
            .strip_prefix(before)
            .is_some_and(|rest| !rest.is_empty() && !rest.contains('/')),
    }
}

/// The client's bytes in a sentence of the VMM: shortened, and escaped by the JSON.
fn shown(path: &str) -> String {
    path.chars().take(80).collect()
}

/// Finds the route, or the answer that says that there is none.
pub fn find(head: &Head) -> Result<Route, Answer> {
    let here = || TABLE.iter().filter(|(_, path, _)| fits(path, &head.path));
    let asked = match head.method.as_str() {
        "HEAD" => "GET",
        method => method,
    };
    let Some((_, _, route)) = here().find(|(method, _, _)| *method == asked) else {
        let allow = here().map(|(method, _, _)| match *method {
            "GET" => "GET, HEAD",
            method => method,
        });
        let allow = allow.collect::<Vec<_>>().join(", ");
        let path = shown(&head.path);
        return Err(match allow.is_empty() {
            true => {
                let sentence =
                    format!("there is nothing at {path}; GET /v1/status is a good start");
                Answer::Error(404, None, sentence)
            }
            false => {
                let sentence = format!("{path} takes {allow} only");
                Answer::Error(405, Some(allow), sentence)
            }
        });
    };
    let needs_body = matches!(
        route,
        Route::Migrate
            | Route::Steer
            | Route::Recover
            | Route::Record
            | Route::SetBalloon
            | Route::SetMemory
            | Route::Snapshot
    );
    if needs_body && head.length.is_none() {
        let sentence = format!("{} needs a JSON body and a Content-Length", head.path);
        return Err(Answer::Error(411, None, sentence));
    }
    Ok(*route)
}

/// Does it.
pub fn serve(control: &dyn Control, route: Route, path: &str, body: &[u8]) -> Answer {
    answer(control, (route, path), body).unwrap_or_else(|refusal| {
        let status = match refusal {
            Refusal::Invalid(_) => 400,
            Refusal::Conflict(_) => 409,
            Refusal::Failed(_) => 500,
            Refusal::Coded {
                status,
                code,
                sentence,
            } => return Answer::Coded(status, code, sentence),
        };
        Answer::Error(status, None, refusal.to_string())
    })
}

fn answer(
    control: &dyn Control,
    (route, path): (Route, &str),
    body: &[u8],
) -> Result<Answer, Refusal> {
    let simple = |action: fn(&dyn Control) -> Result<(), Refusal>| {
        expect_nothing(body)?;
        action(control).map(|()| Answer::Done)
    };
    match route {
        Route::Status => Ok(json(200, &control.status())),
        Route::Configuration => Ok(json(200, &control.configuration()?)),
        Route::Events => control.events().map(Answer::Events),
        Route::Migration => Ok(json(200, &control.migration())),
        Route::Migrations => Ok(json(200, &control.migrations())),
        Route::MigrationRecord => {
            let id = path.rsplit('/').next().unwrap_or_default();
            let record = control.migration_record(id).ok_or_else(|| Refusal::Coded {
                status: 404,
                code: "unknown-migration",
                sentence: format!(
                    "no migration {} is kept here, only the last {} of this VMM are; GET /v1/migrations lists them",
                    shown(id),
                    Migrations::KEPT
                ),
            })?;
            Ok(json(200, &record))
        }
        Route::Metrics => Ok(Answer::Metrics(control.metrics())),
        Route::Pause => simple(|c| c.pause()),
        Route::Resume => simple(|c| c.resume()),
        Route::Stop => simple(|c| c.stop()),
        Route::Cancel => simple(|c| c.cancel()),
        Route::PowerButton => simple(|c| c.power_button()),
        Route::Migrate => {
            let request: MigrateRequest = parse(body)?;
            request
                .options
                .check()
                .map_err(|e| Refusal::Invalid(e.to_string()))?;
            let events = control.migrate(&request)?;
            Ok(if request.detach {
                json(202, &control.migration())
            } else {
                Answer::Stream(events)
            })
        }
        Route::Steer => {
            let change: Change = parse(body)?;
            control.steer(&change).map(|()| Answer::Done)
        }
        Route::Recover => {
            let request: RecoverRequest = parse(body)?;
            control.recover(&request).map(|()| Answer::Done)
        }
        Route::Record => {
            let request: RecordRequest = parse(body)?;
            request.check().map_err(Refusal::Invalid)?;
            control.record(&request).map(Answer::Bytes)
        }
        Route::Balloon => control.balloon().map(|balloon| json(200, &balloon)),
        Route::SetBalloon => {
            let request: BalloonRequest = parse(body)?;
            control.set_balloon(&request).map(|()| Answer::Done)
        }
        Route::Memory => control.memory().map(|memory| json(200, &memory)),
        Route::SetMemory => {
            let request: MemoryRequest = parse(body)?;
            control
                .set_memory(&request)
                .map(|memory| json(200, &memory))
        }
        Route::Snapshot => {
            let request: SnapshotRequest = parse(body)?;
            Ok(json(200, &control.snapshot(&request)?))
        }
    }
}

fn expect_nothing(body: &[u8]) -> Result<(), Refusal> {
    match body.trim_ascii() {
        b"" | b"{}" => Ok(()),
        _ => Err(Refusal::Invalid("this request takes no body, or {}".into())),
    }
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
    serde_json::from_slice(body).map_err(|e| {
        // serde's words about an unknown field may hold the field; keep the sentence short.
        let why: String = e.to_string().chars().take(400).collect();
        Refusal::Invalid(format!("the body does not fit: {why}"))
    })
}

/// A JSON answer, newline-terminated for terminals.
pub fn json<T: Serialize>(status: u16, value: &T) -> Answer {
    match serde_json::to_vec(value) {
        Ok(mut body) => {
            body.push(b'\n');
            Answer::Json(status, body)
        }
        Err(e) => Answer::Error(
            500,
            None,
            format!("the answer cannot be written as JSON ({e})"),
        ),
    }
}

/// An error's body.
pub fn error_body(sentence: &str, code: Option<&str>) -> Vec<u8> {
    let body = ErrorBody {
        error: sentence.to_owned(),
        code: code.map(str::to_owned),
    };
    match json(200, &body) {
        Answer::Json(_, bytes) => bytes,
        _ => b"{\"error\":\"internal error\"}\n".to_vec(),
    }
}
