//! `--sandbox`.

use ferry_terminal::output::{Failure, say};
use ferry_vmm::machine::Backends;
use ferry_vmm::sandbox::{Mode, enter};

/// For every command that is a VMM.
#[derive(Debug, clap::Args)]
// The commands have a group of this name already.
#[group(skip)]
pub struct Args {
    /// Confine this process, so that a break-in reaches little more than the guest: on (with what
    /// this host's kernel has), require (with all of it, or do not start) or off.
    #[arg(
        long = "sandbox",
        value_name = "on|off|require",
        default_value_t,
        help_heading = "VMM"
    )]
    mode: Mode,
}

impl Args {
    /// Enters the sandbox: to be called before a thread is started, and after what it does not let
    /// through. `backends` tells what the guest's memory will need.
    pub fn enter(&self, backends: &Backends) -> Result<(), Failure> {
        // A mount, and perhaps a child that makes it.
        backends.memory.prepare();
        if let Some(missing) = enter(self.mode)? {
            say(&format!("the sandbox is not whole: {missing}"));
        }
        Ok(())
    }
}
