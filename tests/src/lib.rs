//! What the end-to-end tests are made of.
//!
//! A test starts real `ferry` processes ([`Host`]), joins them by a network that misbehaves on
//! request ([`Proxy`]), and lets the guest say what became of its memory. [`fuzz_bodies`] holds
//! what the fuzz targets do, as ordinary functions.
//!
//! Nothing here asserts how long anything takes: [`TIMEOUT`] only turns a hang into a failure.
#![forbid(unsafe_code)]
// This crate is test code: a broken expectation must stop the test where it is seen.
#![allow(clippy::unwrap_used, clippy::panic)]

pub mod book;
pub mod browser;
mod fd_passing;
mod ferry;
pub mod fuzz_bodies;
pub mod fuzz_seeds;
mod host;
mod nested;
pub mod peer;
pub mod pki;
mod proxy;
mod relay;
pub mod soak;
mod wire;

/// What the test program `confined` says where files are confined.
pub const CONFINED: &str = "\
done read folder
done write folder
done make folder
done tmpfile folder
done remove folder
refused read other
refused write other
refused make other
refused tmpfile other
refused remove other
done read open
done read status
refused list /
";

pub use ferry::{Ran, can_pretend, ferry, guests_run, run, run_by};
pub use host::{Host, Migration, State};
pub use nested::{NESTED_TIMEOUT, NestedClient, NestedHost, NestedVmm, Turn, asks, nested_hosts};
pub use proxy::{Action, Proxy, Way};
pub use relay::{Relay, UnixLink};
pub use wire::{Moment, Strike, Wire};

use ferry_devices::block::Disk;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long anything may take before the test calls it a hang.
pub const TIMEOUT: Duration = Duration::from_secs(90);

/// This host's KVM, for the benchmark of `what`; says loudly where it does not run: without KVM,
/// and without the `--bench` that `cargo bench` adds.
pub fn benchmark_host(what: &str, bench: bool) -> Option<ferry_vmm::kvm::Host> {
    let host = if bench {
        ferry_vmm::kvm::Host::open().map_err(|error| error.to_string())
    } else {
        Err("use cargo bench".to_owned())
    };
    host.inspect_err(|why| eprintln!("NOT RUN: benchmark of {what}: {why}"))
        .ok()
}

/// Whether a disk is in use: by a host that may run its guest.
pub fn is_locked(disk: &Path) -> bool {
    let disk = Disk::open(disk, false).unwrap();
    let locked = disk.lock().is_err();
    // Closing it is not enough: a process that another test is just starting has the open file too,
    // and its lock.
    disk.unlock().unwrap();
    locked
}

/// Waits until `what` is so.
///
/// # Panics
/// After [`TIMEOUT`], with the name of what was waited for.
pub fn until(name: &str, mut what: impl FnMut() -> bool) {
    let deadline = Instant::now() + TIMEOUT;
    while !what() {
        assert!(Instant::now() < deadline, "waited in vain until {name}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
