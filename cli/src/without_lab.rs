//! The laboratory's commands in a build that is without it: each says so.

use ferry_terminal::output::Failure;
use std::process::ExitCode;

/// The command, whatever it is given.
#[derive(Debug, clap::Args)]
#[command(
    hide = true,
    disable_help_flag = true,
    after_help = "Example:\n  cargo install --path cli"
)]
pub struct Args {
    #[arg(hide = true, trailing_var_arg = true, allow_hyphen_values = true)]
    _ignored: Vec<std::ffi::OsString>,
}

macro_rules! command {
    ($name:ident) => {
        pub mod $name {
            pub use super::Args;
            use super::{ExitCode, Failure};

            pub fn run(_: &Args) -> Result<ExitCode, Failure> {
                Err(super::absent(stringify!($name)))
            }
        }
    };
}

command!(bench);
command!(demo);
command!(record);
command!(sim);

fn absent(command: &str) -> Failure {
    Failure(format!(
        "this ferry is built without the laboratory, so it has no `{command}`; build it with the feature lab (cargo build -p ferry)"
    ))
}
