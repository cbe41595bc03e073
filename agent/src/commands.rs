//! The commands of this very `ferry`, which the agent runs for others.

use serde::Deserialize;
use std::io;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// The most that is read of a command's output.
const MOST: usize = 4 << 20;

/// A guest of this host, as `ferry ps --json` says.
#[derive(Clone, Debug, Deserialize)]
pub struct Guest {
    /// Its name.
    pub name: String,
    /// Its state.
    pub state: String,
    /// Its VMM's process, where that answers.
    pub pid: Option<u32>,
}

/// This program, to be run again; the newer one, where it was replaced.
///
/// # Errors
/// The system does not say where it is.
pub fn ferry() -> io::Result<Command> {
    let mut command = Command::new(place(std::env::current_exe()?));
    command.stdin(Stdio::null());
    Ok(command)
}

/// Where a program is by now: Linux marks the name of one whose file was replaced (proc(5), `exe`).
fn place(said: PathBuf) -> PathBuf {
    let replaced = said
        .to_str()
        .and_then(|path| path.strip_suffix(" (deleted)"));
    match replaced.map(PathBuf::from) {
        Some(newer) if !said.exists() && newer.exists() => newer,
        _ => said,
    }
}

/// Runs a command to its end, and returns what it printed.
///
/// # Errors
/// Its own sentence, or why it could not be run.
pub fn output(args: &[&str]) -> Result<Vec<u8>, String> {
    let failed = |e: io::Error| format!("ferry {} could not be run ({e})", args[0]);
    let ran = ferry()
        .and_then(|mut ferry| ferry.args(args).output())
        .map_err(failed)?;
    if ran.status.success() && ran.stdout.len() <= MOST {
        return Ok(ran.stdout);
    }
    let said = String::from_utf8_lossy(&ran.stderr);
    let last = said.trim().lines().last().unwrap_or("it said nothing");
    Err(last.trim_start_matches("ferry: ").to_owned())
}

/// The guests of this host, and what `ferry ps --json` printed.
///
/// # Errors
/// Why they are not known.
pub fn guests() -> Result<(Vec<Guest>, serde_json::Value), String> {
    #[derive(Deserialize)]
    struct List {
        guests: Vec<Guest>,
    }
    let printed = output(&["ps", "--json"])?;
    let whole: serde_json::Value = serde_json::from_slice(&printed).map_err(|e| e.to_string())?;
    let list = List::deserialize(&whole).map_err(|e| e.to_string())?;
    Ok((list.guests, whole))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_was_replaced_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let ferry = dir.path().join("ferry");
        let marked = dir.path().join("ferry (deleted)");
        assert_eq!(place(marked.clone()), marked);
        std::fs::write(&ferry, "").unwrap();
        assert_eq!(place(marked.clone()), ferry);
        assert_eq!(place(ferry.clone()), ferry);
        // A program of that very name.
        std::fs::write(&marked, "").unwrap();
        assert_eq!(place(marked.clone()), marked);
    }
}
