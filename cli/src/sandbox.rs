//! `--sandbox`.

use ferry_terminal::output::{Failure, say};
use ferry_vmm::machine::Backends;
use ferry_vmm::sandbox::{Files, Mode, enter};
use std::path::{Path, PathBuf};

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
    /// In the sandbox: a folder where requests on the control socket may name files, to write
    /// snapshots and to read certificates. May be given more than once. Without it, the folder in
    /// which ferry is started, unless that is the home folder or holds it. Certificates may be in
    /// /etc as well.
    #[arg(long = "allow", value_name = "DIR", help_heading = "VMM")]
    allow: Vec<PathBuf>,
}

impl Args {
    /// Whether to enter it.
    pub const fn mode(&self) -> Mode {
        self.mode
    }

    /// What a VMM with these devices and this control socket opens in the sandbox.
    pub fn files(&self, backends: &Backends, socket: Option<&Path>) -> Result<Files, Failure> {
        let mut files = Files::of_a_vmm();
        for disk in &backends.disks {
            files.disk(&disk.path, disk.read_only);
        }
        if !backends.nets.is_empty() {
            files.taps();
        }
        // What listens beside it is connected to, which the rules for files do not restrict.
        if let Some(vsock) = &backends.vsock {
            files.socket(vsock.path());
        }
        // The file of one that was passed on is another's.
        if let Some(path) = socket {
            files.socket(path);
        }
        for folder in &self.allow {
            if !folder.is_dir() {
                return Err(Failure(format!(
                    "--allow {} is no folder; make it, or name another",
                    folder.display()
                )));
            }
            files.nameable(folder);
        }
        if self.allow.is_empty()
            && let Some(folder) = working_folder()
        {
            files.nameable(&folder);
        }
        Ok(files)
    }

    /// Enters the sandbox: to be called before a thread is started, and after what it does not let
    /// through. `backends` tells what the guest's memory will need.
    pub fn enter(&self, backends: &Backends, files: Files) -> Result<(), Failure> {
        // A mount, and perhaps a child that makes it.
        backends.memory.prepare();
        if let Some(missing) = enter(self.mode, files)? {
            say(&format!("the sandbox is not whole: {missing}"));
        }
        Ok(())
    }
}

/// Where requests may name files if nothing is said. The home folder holds what a shell runs.
fn working_folder() -> Option<PathBuf> {
    let folder = std::env::current_dir().ok()?;
    let home = std::env::home_dir().unwrap_or_else(|| "/".into());
    (!holds(&folder, &home)).then_some(folder)
}

fn holds(folder: &Path, home: &Path) -> bool {
    let home = home.canonicalize().unwrap_or_else(|_| home.to_owned());
    folder == Path::new("/") || home.starts_with(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_home_folder_is_not_given_away_unasked() {
        for (folder, home, held) in [
            ("/", "", true),
            ("/home", "/home/ada", true),
            ("/home/ada", "/home/ada", true),
            ("/home/ada/guests", "/home/ada", false),
            ("/var/lib/ferry", "/", false),
        ] {
            let found = holds(Path::new(folder), Path::new(home));
            assert_eq!(found, held, "{folder} {home}");
        }
    }
}
