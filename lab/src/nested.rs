//! This very program in a nested host, where this host's KVM cannot run Linux guests.

use ferry_guest_images::nested::{Config, Nested, Process, QEMU};
use ferry_terminal::output::Failure;
use ferry_vmm::doctor::{Diagnosis, Kind};
use std::time::Duration;

/// A nested host with this program in it.
pub struct Elsewhere {
    nested: Nested,
    name: String,
}

/// Whether Linux guests run on this host's own KVM.
pub fn linux_runs_here(found: &Diagnosis) -> bool {
    found.kind == Kind::Hardware && found.ready
}

/// Why there has to be a nested host, in a sentence.
pub fn why(found: &Diagnosis) -> String {
    format!(
        "This host's KVM cannot run Linux guests ({}), so {QEMU} emulates a host with hardware KVM.",
        found.kind.meaning()
    )
}

impl Elsewhere {
    /// Starts it; `tell` gets a sentence when a kernel has to be downloaded for it.
    pub fn start(tell: &dyn Fn(&str)) -> Result<Self, Failure> {
        let program = std::env::current_exe()?;
        let name = program.file_name().unwrap_or_default();
        let name = name.to_string_lossy().into_owned();
        let config = Config {
            programs: vec![program],
            ..Config::default()
        };
        let nested = Nested::start(&config, tell)?;
        Ok(Self { nested, name })
    }

    /// How long it took until it was up.
    pub fn took(&self) -> Duration {
        self.nested.took()
    }

    /// Starts this program there.
    pub fn ferry(&self, arguments: &[&str]) -> Result<Process, Failure> {
        Ok(self
            .nested
            .spawn(&[&[self.name.as_str()], arguments].concat())?)
    }
}
