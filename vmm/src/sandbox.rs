//! What a break-in reaches: the calling process drops the rights that a VMM does not need.
//!
//! [`enter`] is the process's own step, before it starts its first thread:
//!
//! - no program that it would start could gain rights (`no_new_privs`), it leaves no core file with
//!   the guest's memory, and other processes of its user cannot look into it;
//! - it opens no file but those of [`Files`] (landlock);
//! - each thread may make the system calls that its [kind](Kind) makes, and no others (seccomp). A
//!   thread that tries another ends the process with a sentence on stderr and the exit status
//!   [`VIOLATION`].
//!
//! A thread's kind and its filter are one thing: [`thread::spawn`] takes the
//! kind, and has the thread apply the filter before its work. Threads that are started otherwise
//! inherit the filter of the one that starts them.
//!
//! Nothing of this happens unless it is asked for: a process that embeds this library may have
//! needs of its own.

mod calls;
mod files;
mod filter;
mod inherited;
mod names;
mod support;
mod violation;

use std::fmt;
use std::io;
use std::str::FromStr;

use ferry_devices::thread::{self, Kind};
use rustix::process::{DumpableBehavior, Resource, Rlimit};

pub use files::{Files, Outside, may_make, may_read};
pub use inherited::{Descriptor, DescriptorError, Passed};
pub use support::{Support, support};

/// The exit status after a violation: what a shell says of a process that SIGSYS has ended.
pub const VIOLATION: u8 = 159;

/// Whether to enter the sandbox: `--sandbox`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Mode {
    /// With what the kernel has.
    #[default]
    On,
    /// Not.
    Off,
    /// With all of it, or not at all.
    Require,
}

impl Mode {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::On, Self::Off, Self::Require];

    /// The name on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::On => "on",
            Self::Off => "off",
            Self::Require => "require",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let named = Self::ALL.into_iter().find(|mode| mode.name() == text);
        named.ok_or_else(|| format!("'{text}' is not one of on, off, require"))
    }
}

/// Why there is no sandbox.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SandboxError {
    /// The kernel lacks something, and all was required.
    #[error("this host cannot give the whole sandbox: {0}; `--sandbox on` goes on with the rest")]
    Missing(String),
    /// Threads run that would stay outside.
    #[error(
        "the sandbox must be entered before threads are started, and this process has {0} already"
    )]
    Threads(usize),
    /// It was entered before.
    #[error("this process confines its threads already")]
    Twice,
    /// The kernel refuses.
    #[error("the sandbox cannot be entered: {what} ({source}); `--sandbox off` runs without it")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A rule was not taken.
    #[error("{0}; `--sandbox off` runs without it")]
    Filter(String),
}

/// Enters the sandbox, for good: no way leads out of it. From now on only `files` can be opened.
/// Returns what the kernel here could not give, as one sentence.
///
/// To be called while the process has one thread.
///
/// # Errors
/// [`SandboxError`]; the process may be in a part of it.
pub fn enter(mode: Mode, files: Files) -> Result<Option<String>, SandboxError> {
    if mode == Mode::Off {
        return Ok(None);
    }
    let missing = support().missing();
    if let (Some(missing), Mode::Require) = (&missing, mode) {
        return Err(SandboxError::Missing(missing.clone()));
    }
    match threads() {
        Ok(1) | Err(_) => {}
        Ok(more) => return Err(SandboxError::Threads(more)),
    }
    confine_process()?;
    if support().landlock > 0 {
        files.apply().map_err(SandboxError::Filter)?;
    }
    files.restrict_names();
    if support().seccomp {
        let filters = filter::All::new().map_err(SandboxError::Filter)?;
        violation::handle().map_err(|source| SandboxError::System {
            what: "a handler of SIGSYS",
            source,
        })?;
        filters.apply(Kind::Vmm).map_err(SandboxError::Filter)?;
        if !thread::confine(Box::new(move |kind| filters.apply(kind))) {
            return Err(SandboxError::Twice);
        }
    }
    Ok(missing)
}

/// What holds for the whole process.
fn confine_process() -> Result<(), SandboxError> {
    let system = |what| {
        move |e: rustix::io::Errno| SandboxError::System {
            what,
            source: e.into(),
        }
    };
    rustix::thread::set_no_new_privs(true).map_err(system("no_new_privs"))?;
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    rustix::process::setrlimit(Resource::Core, none).map_err(system("a limit of core files"))?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(system("PR_SET_DUMPABLE"))
}

/// How many threads this process has.
fn threads() -> io::Result<usize> {
    Ok(std::fs::read_dir("/proc/self/task")?.count())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_read_back() {
        for mode in Mode::ALL {
            assert_eq!(mode.name().parse(), Ok(mode));
        }
        assert!("yes".parse::<Mode>().unwrap_err().contains("'yes'"));
        assert_eq!(Mode::default(), Mode::On);
    }

    #[test]
    fn a_process_with_threads_does_not_enter() {
        let (hold, held) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || held.recv());
        let error = enter(Mode::On, Files::default()).unwrap_err();
        assert!(matches!(error, SandboxError::Threads(2..)), "{error}");
        drop(hold);
        let _ = thread.join().unwrap();
        assert!(matches!(enter(Mode::Off, Files::default()), Ok(None)));
    }
}
