//! The program that is measured.

use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where this benchmark's release build is: its executable lies in `<target>/release/deps`.
pub fn release() -> Result<PathBuf> {
    let me = std::env::current_exe()?;
    let release = me.parent().and_then(Path::parent);
    let release = release.context("the benchmark must be run by cargo bench")?;
    Ok(release.to_owned())
}

/// Builds the release binary; the benchmark of a debug build would be one of the compiler.
pub fn build(release: &Path) -> Result<PathBuf> {
    let target = release.parent().context("no target directory")?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args([
            "build",
            "--quiet",
            "--release",
            "-p",
            "ferry-vmm",
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

/// Whether guests can be run at all.
pub fn kvm() -> Result<()> {
    let mut how = std::fs::File::options();
    let opened = how.read(true).write(true).open("/dev/kvm");
    opened.context("/dev/kvm cannot be opened")?;
    Ok(())
}
