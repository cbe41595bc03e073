//! ferry's runs.

use crate::{Case, Kill, Sample, gap_ms, ready, until};
use ferry_vmm::api::client::Client;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The program as users run it.
pub fn build() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
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
        ])
        .current_dir(&root)
        .status()
        .unwrap();
    assert!(status.success(), "ferry cannot be built");
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    target.join("release/ferry")
}

/// Memory of a process beside shared memory, which is the guest's.
fn own_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let field = |name: &str| -> u64 {
        let line = status.lines().find(|l| l.starts_with(name));
        line.and_then(|l| l.split_whitespace().nth(1)?.parse().ok())
            .unwrap_or(0)
    };
    field("RssAnon:") + field("RssFile:")
}

pub fn run(ferry: &Path, case: &Case) -> Sample {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name);
    let start = |name: &str, arguments: &[&str]| {
        let child = Command::new(ferry)
            .args(arguments)
            .arg("--api")
            .arg(file(&format!("{name}.sock")))
            .arg("--serial")
            .arg(format!("file:{}", file(&format!("{name}.log")).display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Kill(child)
    };
    let receive = start("b", &["receive", "tcp:127.0.0.1:0"]);
    let workload = case.workload.to_string();
    let memory = format!("{}M", case.memory_mib);
    let source = start("a", &["run", "--nas", &workload, "--memory", &memory]);
    let client = Client::new(&file("b.sock"));
    let uri = until("the receiver", || client.status().ok()?.listening);
    ready(&file("a.log"));
    let own_kib = [own_kib(source.0.id()), own_kib(receive.0.id())];
    let downtime = format!("{}ms", case.downtime_ms);
    let output = Command::new(ferry)
        .args([
            "migrate",
            "--json",
            "--quiet",
            "--downtime",
            &downtime,
            "--api",
        ])
        .arg(file("a.sock"))
        .arg(&uri)
        .output()
        .unwrap();
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["status"], "completed", "{report}");
    let number = |name: &str| report[name].as_f64().unwrap();
    Sample {
        total_ms: number("total_ms"),
        gap_ms: gap_ms(&file("b.log")),
        reported_ms: number("downtime_ms"),
        wire_mb: number("bytes_wire") / 1e6,
        own_kib,
    }
}
