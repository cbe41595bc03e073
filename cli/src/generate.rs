//! `ferry completions` and `ferry man`: made from the definition of the command line.

use super::outcome::Ended;
use clap::Command;
use clap_complete::{Shell, generate};
use ferry_terminal::output::{Failure, put, say};
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

/// Print what makes a shell complete ferry's commands and options.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  ferry completions bash >/usr/share/bash-completion/completions/ferry
  ferry completions zsh >/usr/share/zsh/vendor-completions/_ferry
  ferry completions fish >~/.config/fish/completions/ferry.fish")]
pub struct Completions {
    /// The shell.
    #[arg(value_name = "SHELL")]
    shell: Shell,
}

/// Write manual pages: ferry.1, and one for each command.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  ferry man /usr/local/share/man/man1")]
pub struct Man {
    /// The folder; it is made if it is missing, and pages that are there are replaced.
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

impl Completions {
    pub fn run(&self, mut definition: Command) -> Result<ExitCode, Ended> {
        let mut text = Vec::new();
        generate(self.shell, &mut definition, "ferry", &mut text);
        put(&String::from_utf8_lossy(&text))?;
        Ok(ExitCode::SUCCESS)
    }
}

impl Man {
    pub fn run(&self, definition: Command) -> Result<ExitCode, Ended> {
        let write = || {
            fs::create_dir_all(&self.dir)?;
            clap_mangen::generate_to(definition, &self.dir)
        };
        write().map_err(|e| {
            Failure(format!(
                "the manual pages cannot be written to {} ({e}); choose another folder",
                self.dir.display()
            ))
        })?;
        say(&format!("the manual pages are in {}", self.dir.display()));
        Ok(ExitCode::SUCCESS)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Cli;
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn every_command_has_a_manual_page() {
        let dir = tempfile::tempdir().unwrap();
        let man = Man {
            dir: dir.path().join("man1"),
        };
        man.run(Cli::command()).unwrap();
        let page = |name: &str| fs::read_to_string(man.dir.join(name)).unwrap();
        assert!(page("ferry.1").contains("ferry\\-migrate(1)"));
        assert!(page("ferry-migrate.1").contains("\\-\\-downtime"));
        for command in Cli::command().get_subcommands() {
            page(&format!("ferry-{}.1", command.get_name()));
        }
    }

    #[test]
    fn every_shell_completes_the_commands() {
        for shell in [
            Shell::Bash,
            Shell::Zsh,
            Shell::Fish,
            Shell::Elvish,
            Shell::PowerShell,
        ] {
            let mut text = Vec::new();
            generate(shell, &mut Cli::command(), "ferry", &mut text);
            let text = String::from_utf8(text).unwrap();
            assert!(
                text.contains("migrate") && text.contains("on-timeout"),
                "{shell}"
            );
        }
    }
}
