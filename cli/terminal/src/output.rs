//! Where words go: results on stdout, everything else on stderr; a closed pipe is no panic.

use super::units::to_the_second;
use serde::Serialize;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use time::OffsetDateTime;

/// Why a command failed: one sentence for stderr.
#[derive(Debug)]
pub struct Failure(pub String);

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Self(error.to_string())
    }
}

static JSON: AtomicBool = AtomicBool::new(false);

/// From now on a sentence is an object, as the log's lines are with `--log-format json`.
pub fn say_in_json() {
    JSON.store(true, Ordering::Relaxed);
}

/// One sentence on stderr. An error of stderr itself has nowhere to go.
pub fn say(sentence: &str) {
    if JSON.load(Ordering::Relaxed) {
        let now = OffsetDateTime::now_utc();
        let _ = writeln!(io::stderr(), "{}", object(sentence, now));
    } else {
        let _ = writeln!(io::stderr(), "ferry: {sentence}");
    }
}

/// A sentence as tracing-subscriber writes an event.
fn object(sentence: &str, now: OffsetDateTime) -> String {
    let timestamp = format!("{}.{:06}Z", to_the_second(now), now.microsecond());
    let fields = serde_json::json!({ "message": sentence });
    let object = serde_json::json!({
        "timestamp": timestamp, "level": "INFO", "fields": fields, "target": "ferry",
    });
    object.to_string()
}

/// A result on stdout. A reader that left early, such as `head`, is no failure.
///
/// # Errors
/// stdout cannot be written, for example because the disk is full.
pub fn put(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure(format!("cannot write the result ({e})")))
        }
        _ => Ok(()),
    }
}

/// One JSON object on stdout.
///
/// # Errors
/// As [`put`].
pub fn put_json<T: Serialize>(value: &T) -> Result<(), Failure> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    put(&text)
}

/// What `--json` prints in place of a result.
#[derive(Serialize)]
struct NoResult<'a> {
    schema: u32,
    code: &'a str,
    error: &'a str,
}

/// A failure for scripts, where the command line asks for JSON: a stable `code` and the sentence.
pub fn put_failure(code: &str, sentence: &str) {
    if std::env::args_os().any(|argument| argument == "--json") {
        let schema = 1;
        let error = sentence;
        // The sentence is on stderr too; a stdout that cannot be written has been told of.
        let _ = put_json(&NoResult {
            schema,
            code,
            error,
        });
    }
}

/// Words of another process or of a guest: no control character reaches the terminal.
#[must_use]
pub fn clean(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sentence_is_an_object_on_one_line() {
        let at = OffsetDateTime::from_unix_timestamp_nanos(1_732_950_000_001_002_003).unwrap();
        let text = object("a \"b\"\nc", at);
        assert!(!text.contains('\n'));
        let read: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(read["timestamp"], "2024-11-30T07:00:00.001002Z");
        assert_eq!(read["fields"]["message"], "a \"b\"\nc");
        assert_eq!(read["level"], "INFO");
    }
}
