//! The command line.

use super::case::Case;
use std::path::PathBuf;

/// Measures migrations on this machine, ferry's beside QEMU's.
#[derive(Debug, clap::Parser)]
pub struct Args {
    /// Runs of every contestant in every case.
    #[arg(long, default_value_t = 5, value_parser = at_least_one)]
    pub runs: usize,
    /// Only this case.
    #[arg(long, value_enum)]
    pub case: Option<Case>,
    /// Only ferry.
    #[arg(long, conflicts_with = "peer_only")]
    pub ferry_only: bool,
    /// Only QEMU.
    #[arg(long)]
    pub peer_only: bool,
    /// Where the JSON goes; by default into the build directory.
    #[arg(long, value_name = "PATH")]
    pub output: Option<PathBuf>,
    /// What `cargo bench` adds, and `cargo test` does not.
    #[arg(long, hide = true)]
    pub bench: bool,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err("give a number from 1 on".into()),
        Ok(number) => Ok(number),
    }
}

impl Args {
    /// The cases to measure.
    pub fn cases(&self) -> Vec<Case> {
        self.case
            .map_or_else(|| vec![Case::Idle, Case::Writer], |case| vec![case])
    }
}
