//! Builds the bare guest's image, and the first process of Linux guests, with the host's own
//! toolchain.
//!
//! By rustc directly rather than by a nested cargo: crates without dependencies need no lock, no
//! network and none of the outer build's flags, so clippy, coverage or a wrapper around the host
//! build cannot change the guest.

use std::env;
use std::error::Error;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() -> Result<(), Box<dyn Error>> {
    let here = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(variable("OUT_DIR")?);
    for source in [
        "bare/src",
        "bare/link.ld",
        "linux/src",
        "nas/src",
        "build.rs",
    ] {
        println!("cargo::rerun-if-changed={}", here.join(source).display());
    }
    let target = env::var("TARGET")?;
    if target != "x86_64-unknown-linux-gnu" && target != "x86_64-unknown-linux-musl" {
        return Err(format!(
            "the guest images are for x86-64 and built on Linux, not for {target}"
        )
        .into());
    }

    bare(&here, &out, &target)?;
    linux_init(&here, &out, &target)
}

/// The kernels as a library, the bare guest as an ELF around it.
fn bare(here: &Path, out: &Path, target: &str) -> Result<(), Box<dyn Error>> {
    let nas = out.join("libferry_nas.rlib");
    let mut command = rustc(target)?;
    command
        .args(["--crate-name", "ferry_nas", "--crate-type", "rlib"])
        .arg(here.join("nas/src/lib.rs"));
    run(command.arg("-o").arg(&nas))?;

    let image = out.join("bare.elf");
    let mut command = rustc(target)?;
    command
        .args(["--crate-name", "ferry_bare", "--crate-type", "bin"])
        .arg(here.join("bare/src/main.rs"));
    command.arg("--extern").arg(joined("ferry_nas=", &nas));
    command.args(["-C", "lto=fat", "-C", "codegen-units=1"]);
    // Through gcc, with nothing of the C library: only the linker script says what goes where.
    for argument in [
        "-nostartfiles",
        "-nostdlib",
        "-static",
        "-no-pie",
        "-Wl,--build-id=none",
        "-Wl,--gc-sections",
    ] {
        command.arg("-C").arg(format!("link-arg={argument}"));
    }
    command
        .arg("-C")
        .arg(joined("link-arg=-Wl,-T,", &here.join("bare/link.ld")));
    run(command.arg("-o").arg(&image))?;
    println!("cargo::rustc-env=FERRY_BARE_IMAGE={}", image.display());
    Ok(())
}

/// `/init`: linked statically, because an initial RAM disk has no libraries. With threads and std,
/// unlike the bare guest.
fn linux_init(here: &Path, out: &Path, target: &str) -> Result<(), Box<dyn Error>> {
    let libraries = out.join("linux");
    std::fs::create_dir_all(&libraries)?;
    let (nas, library) = (
        libraries.join("libferry_nas.rlib"),
        libraries.join("libferry_linux_init.rlib"),
    );
    let mut command = rustc(target)?;
    command
        .args(["--crate-name", "ferry_nas", "--crate-type", "rlib"])
        .args(["--cfg", "feature=\"std\""])
        .arg(here.join("nas/src/lib.rs"));
    run(command.arg("-o").arg(&nas))?;
    let mut command = rustc(target)?;
    command
        .args(["--crate-name", "ferry_linux_init", "--crate-type", "rlib"])
        .arg(here.join("linux/src/lib.rs"))
        .arg("--extern")
        .arg(joined("ferry_nas=", &nas));
    run(command.arg("-o").arg(&library))?;
    let image = out.join("linux-init");
    let mut command = rustc(target)?;
    command
        .args(["--crate-name", "init", "--crate-type", "bin"])
        .arg(here.join("linux/src/main.rs"))
        .arg("--extern")
        .arg(joined("ferry_linux_init=", &library))
        .arg("-L")
        .arg(&libraries);
    command.args(["-C", "target-feature=+crt-static", "-C", "strip=symbols"]);
    run(command.arg("-o").arg(&image))?;
    println!("cargo::rustc-env=FERRY_LINUX_INIT={}", image.display());
    Ok(())
}

fn variable(name: &str) -> Result<OsString, String> {
    env::var_os(name).ok_or_else(|| format!("{name} is not set; this script is to be run by cargo"))
}

fn joined(prefix: &str, path: &Path) -> OsString {
    let mut text = OsString::from(prefix);
    text.push(path);
    text
}

/// The compiler with what both crates have in common. The image is always optimised, whatever the
/// profile.
fn rustc(target: &str) -> Result<Command, String> {
    let mut command = Command::new(variable("RUSTC")?);
    command.args([
        "--edition",
        "2024",
        "--target",
        target,
        "--cap-lints",
        "warn",
    ]);
    for option in [
        "opt-level=3",
        "panic=abort",
        "relocation-model=static",
        "debuginfo=0",
        "overflow-checks=off",
    ] {
        command.arg("-C").arg(option);
    }
    // What cargo says to the outer compiler is not meant for this one.
    for name in [
        "RUSTFLAGS",
        "CARGO_ENCODED_RUSTFLAGS",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "CLIPPY_ARGS",
    ] {
        command.env_remove(name);
    }
    Ok(command)
}

fn run(command: &mut Command) -> Result<(), String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let status = command.status().map_err(|error| {
        format!("{program} could not be started to build the guest image: {error}; is the toolchain complete?")
    })?;
    if status.success() {
        Ok(())
    } else {
        Err(format!(
            "{program} could not build the guest image ({status}); see above"
        ))
    }
}
