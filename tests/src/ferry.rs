//! The `ferry` binary: built once, run with arguments.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// The binary, built in the profile of this test. `FERRY_BIN` names another one to test.
///
/// # Panics
/// When it does not build.
pub fn ferry() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| match std::env::var_os("FERRY_BIN") {
        Some(path) => path.into(),
        None => build(),
    })
}

/// The test runs as `TARGET/PROFILE/deps/NAME`. Cargo itself keeps several builders of one target
/// directory apart.
fn build() -> PathBuf {
    let exe = std::env::current_exe().unwrap();
    let profile_dir = exe
        .parent()
        .and_then(Path::parent)
        .expect("a test lies in TARGET/PROFILE/deps");
    let name = profile_dir.file_name().and_then(|n| n.to_str()).unwrap();
    let profile = if name == "debug" { "dev" } else { name };
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| env!("CARGO").into());
    let mut command = Command::new(cargo);
    // What cargo says of the test's own package would make it build ring, and all above it, again.
    for (name, _) in std::env::vars_os() {
        let shown = name.to_string_lossy();
        if ["CARGO_PKG_", "CARGO_MANIFEST_"]
            .iter()
            .any(|own| shown.starts_with(own))
        {
            command.env_remove(&name);
        }
    }
    let built = command
        .args(["build", "--quiet", "--package", "ferry", "--bin", "ferry"])
        .args(["--profile", profile, "--target-dir"])
        .arg(profile_dir.parent().unwrap())
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .status()
        .unwrap();
    assert!(built.success(), "ferry does not build");
    profile_dir.join("ferry")
}

/// What a command that has ended printed.
#[derive(Debug)]
pub struct Ran {
    /// Its exit status; `None` when a signal ended it.
    pub code: Option<i32>,
    /// What it wrote to stdout.
    pub stdout: String,
    /// What it wrote to stderr.
    pub stderr: String,
}

/// Runs `ferry` to its end, without input.
///
/// # Panics
/// When it cannot be started, or says that it panicked.
pub fn run<S: AsRef<std::ffi::OsStr>>(args: &[S]) -> Ran {
    let mut command = Command::new(ferry());
    command.args(args);
    run_by(command)
}

/// As [`run`], by a command that is `ferry` with its arguments.
///
/// # Panics
/// As there.
pub fn run_by(mut command: Command) -> Ran {
    let out = command.stdin(Stdio::null()).output().unwrap();
    let ran = Ran {
        code: out.status.code(),
        stdout: String::from_utf8_lossy(&out.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&out.stderr).into_owned(),
    };
    assert!(!ran.stderr.contains("panicked"), "{ran:?}");
    ran
}

/// Whether guests run here; says so loudly where they do not.
pub fn guests_run() -> bool {
    static READY: OnceLock<bool> = OnceLock::new();
    let ready = *READY.get_or_init(|| run(&["doctor", "--json"]).code == Some(0));
    if !ready {
        eprintln!("NOT RUN: no guest can run on this host, see `ferry doctor`");
    }
    ready
}

/// Whether this process may change what another sees of this host; says so loudly where not.
#[must_use]
pub fn can_pretend() -> bool {
    let tried = Command::new("unshare")
        .args(["--mount", "setpriv", "--version"])
        .output();
    let can = tried.is_ok_and(|out| out.status.success());
    if !can {
        eprintln!(
            "NOT RUN: guests on hosts that cannot do something (needs root, unshare and setpriv)"
        );
    }
    can
}
