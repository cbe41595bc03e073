//! The program that is measured.

use anyhow::{Context, Result};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What there is to measure.
pub struct Built {
    /// The program.
    pub ferry: PathBuf,
    /// The directory of the build.
    target: PathBuf,
}

/// Builds it, where there is something to measure with it; says loudly where not.
///
/// `bench` is what `cargo bench` says: `cargo test --all-targets` runs benchmarks too, for minutes
/// that would test nothing.
pub fn built(name: &str, bench: bool) -> Result<Option<Built>> {
    if !bench {
        eprintln!("NOT RUN: benchmark of {name}: use cargo bench");
        return Ok(None);
    }
    // This executable lies in <target>/release/deps; ferry belongs into the same house.
    let me = std::env::current_exe()?;
    let target = me.ancestors().nth(3);
    let target = target.context("the benchmark must be run by cargo bench")?;
    let ferry = build(target)?;
    let mut how = std::fs::File::options();
    if let Err(error) = how.read(true).write(true).open("/dev/kvm") {
        eprintln!("NOT RUN: benchmark of {name}: /dev/kvm cannot be opened ({error})");
        return Ok(None);
    }
    let target = target.to_owned();
    Ok(Some(Built { ferry, target }))
}

impl Built {
    /// Writes every run to `path`, or to a file of that name in the directory of the build.
    pub fn write(&self, path: Option<PathBuf>, name: &str, report: &Value) -> Result<()> {
        let path = path.unwrap_or_else(|| self.target.join(name));
        std::fs::write(&path, serde_json::to_vec_pretty(report)?)
            .with_context(|| format!("writing {}", path.display()))?;
        println!(
            "every run: {}",
            path.canonicalize().unwrap_or(path).display()
        );
        Ok(())
    }
}

/// Builds the release binary; the benchmark of a debug build would be one of the compiler.
fn build(target: &Path) -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args([
            "build",
            "--quiet",
            "--release",
            "-p",
            "ferry",
            "--bin",
            "ferry",
            "--target-dir",
        ])
        .arg(target)
        .status()
        .context("running cargo")?;
    anyhow::ensure!(status.success(), "ferry cannot be built ({status})");
    Ok(target.join("release/ferry"))
}
