//! Where words go: results on stdout, everything else on stderr; a closed pipe is no panic.

use serde::Serialize;
use std::io::{self, Write};

/// Why a command failed: one sentence for stderr.
#[derive(Debug)]
pub struct Failure(pub String);

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Self(error.to_string())
    }
}

/// One sentence on stderr. An error of stderr itself has nowhere to go.
pub fn say(sentence: &str) {
    let _ = writeln!(io::stderr(), "ferry: {sentence}");
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
