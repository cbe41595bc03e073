//! The machine that is measured on, described.

use super::journal::Host;
use super::pair::Machine;
use super::process::version_of;
use ferry_vmm::doctor;
use std::fs;
use std::time::SystemTime;

/// The first line of a file that begins with `key`, behind its colon.
fn field(path: &str, key: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find(|line| line.starts_with(key))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// Looks around.
pub fn describe(machine: &Machine) -> Host {
    let unknown = || "unknown".to_owned();
    let memory = field("/proc/meminfo", "MemTotal").and_then(|text| {
        let kib: u64 = text.split(' ').next()?.parse().ok()?;
        Some(kib / 1024)
    });
    Host {
        time: SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(0, |time| time.as_secs()),
        processor: field("/proc/cpuinfo", "model name").unwrap_or_else(unknown),
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        memory_mib: memory.unwrap_or(0),
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease")
            .map_or_else(|_| unknown(), |text| text.trim().to_owned()),
        kvm: match doctor::examine().kind {
            doctor::Kind::Hardware => "hardware KVM",
            doctor::Kind::Software => "software KVM",
            doctor::Kind::None => "no KVM",
        }
        .to_owned(),
        tsc_khz: machine.tsc_khz,
        ferry: format!(
            "ferry {} ({})",
            env!("CARGO_PKG_VERSION"),
            if cfg!(debug_assertions) {
                "DEBUG BUILD"
            } else {
                "release build"
            }
        ),
        qemu: version_of(&machine.qemu),
        cloud: version_of(&machine.cloud),
    }
}
