//! Which request does what.

use super::events::Subscription;
use super::http::Head;
use super::types::{
    BalloonRequest, ErrorBody, MigrateRequest, RecordRequest, RecoverRequest, SnapshotRequest,
};
use super::{Control, Pieces, Refusal};
use ferry_migration::steering::Change;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// What a request means, known from its head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    Status,
    Migration,
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
    Snapshot,
}

/// An answer.
pub enum Answer {
    /// A JSON body.
    Json(u16, Vec<u8>),
    /// 204.
    Done,
    /// A refusal; the second is the `Allow` header of a 405.
    Error(u16, Option<&'static str>, String),
    /// A refusal with a name for programs.
    Coded(u16, &'static str, String),
    /// A stream of events.
    Stream(Subscription),
    /// A stream of bytes.
    Bytes(Pieces),
}

const READ: &str = "GET, HEAD";
const WRITE: &str = "PUT";
const CHANGE: &str = "PATCH";
const WRITE_OR_CHANGE: &str = "PUT, PATCH";
const BOTH: &str = "GET, HEAD, PUT";

/// Finds the route, or the answer that says that there is none.
pub fn find(head: &Head) -> Result<Route, Answer> {
    let (route, allow) = match head.path.as_str() {
        "/v1/status" => (Route::Status, READ),
        "/v1/migration" => (Route::Migration, READ),
        "/v1/pause" => (Route::Pause, WRITE),
        "/v1/resume" => (Route::Resume, WRITE),
        "/v1/stop" => (Route::Stop, WRITE),
        "/v1/cancel" => (Route::Cancel, WRITE),
        "/v1/power-button" => (Route::PowerButton, WRITE),
        "/v1/migrate" if head.method == CHANGE => (Route::Steer, WRITE_OR_CHANGE),
        "/v1/migrate" => (Route::Migrate, WRITE_OR_CHANGE),
        "/v1/recover" => (Route::Recover, WRITE),
        "/v1/record" => (Route::Record, WRITE),
        "/v1/balloon" if head.method == WRITE => (Route::SetBalloon, BOTH),
        "/v1/balloon" => (Route::Balloon, BOTH),
        "/v1/snapshot" => (Route::Snapshot, WRITE),
        path => {
            // The client's bytes in a sentence of the VMM: shortened, and escaped by the JSON.
            let shown: String = path.chars().take(80).collect();
            let sentence = format!("there is nothing at {shown}; GET /v1/status is a good start");
            return Err(Answer::Error(404, None, sentence));
        }
    };
    if !allow.split(", ").any(|m| m == head.method) {
        let sentence = format!("{} takes {allow} only", head.path);
        return Err(Answer::Error(405, Some(allow), sentence));
    }
    let needs_body = matches!(
        route,
        Route::Migrate
            | Route::Steer
            | Route::Recover
            | Route::Record
            | Route::SetBalloon
            | Route::Snapshot
    );
    if needs_body && head.length.is_none() {
        let sentence = format!("{} needs a JSON body and a Content-Length", head.path);
        return Err(Answer::Error(411, None, sentence));
    }
    Ok(route)
}

/// Does it.
pub fn serve(control: &dyn Control, route: Route, body: &[u8]) -> Answer {
    answer(control, route, body).unwrap_or_else(|refusal| {
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

fn answer(control: &dyn Control, route: Route, body: &[u8]) -> Result<Answer, Refusal> {
    let simple = |action: fn(&dyn Control) -> Result<(), Refusal>| {
        expect_nothing(body)?;
        action(control).map(|()| Answer::Done)
    };
    match route {
        Route::Status => Ok(json(200, &control.status())),
        Route::Migration => Ok(json(200, &control.migration())),
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

/// A JSON answer, newline-terminated for those who read it in a terminal.
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
