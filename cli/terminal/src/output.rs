//! Where words go: results on stdout, everything else on stderr, and nothing panics when nobody reads.

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

/// One sentence on stderr. Failing that, there is nobody to tell.
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
