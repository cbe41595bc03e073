//! QEMU's runs: the same image, driven by QMP.

use crate::{Case, Kill, Sample, gap_ms, ready, until};
use ferry_guest_images::BARE;
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

pub const QEMU: &str = "qemu-system-x86_64";

/// A monitor.
struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Qmp {
    fn connect(path: &Path) -> Self {
        let writer = until("QEMU's monitor", || UnixStream::connect(path).ok());
        let mut qmp = Self {
            reader: BufReader::new(writer.try_clone().unwrap()),
            writer,
        };
        qmp.read();
        qmp.ask("qmp_capabilities", json!({}));
        qmp
    }

    fn read(&mut self) -> Value {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn ask(&mut self, command: &str, arguments: Value) -> Value {
        let request = json!({ "execute": command, "arguments": arguments });
        writeln!(self.writer, "{request}").unwrap();
        loop {
            let answer = self.read();
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            if let Some(value) = answer.get("return") {
                return value.clone();
            }
        }
    }
}

pub fn run(case: &Case, multifd: Option<u64>) -> Sample {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name);
    fs::write(file("bare.elf"), BARE).unwrap();
    let command_line = case.workload.command_line(1, case.tsc_khz);
    let start = |name: &str, incoming: bool| {
        let mut command = Command::new(QEMU);
        command
            .args([
                "-M",
                "microvm,acpi=off",
                "-enable-kvm",
                "-cpu",
                "host,arch-capabilities=off",
                "-smp",
                "1",
            ])
            .args([
                "-m",
                &format!("{}M", case.memory_mib),
                "-append",
                &command_line,
            ])
            .args([
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-no-reboot",
            ])
            .arg("-kernel")
            .arg(file("bare.elf"))
            .arg("-serial")
            .arg(format!("file:{}", file(&format!("{name}.log")).display()))
            .arg("-qmp")
            .arg(format!(
                "unix:{},server=on,wait=off",
                file(&format!("{name}.qmp")).display()
            ));
        if incoming {
            command.args(["-incoming", "defer"]);
        }
        Kill(
            command
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap(),
        )
    };
    let (_destination, _source) = (start("b", true), start("a", false));
    let (mut to, mut from) = (Qmp::connect(&file("b.qmp")), Qmp::connect(&file("a.qmp")));
    for side in [&mut to, &mut from] {
        if let Some(channels) = multifd {
            let capability = json!([{ "capability": "multifd", "state": true }]);
            side.ask(
                "migrate-set-capabilities",
                json!({ "capabilities": capability }),
            );
            side.ask(
                "migrate-set-parameters",
                json!({ "multifd-channels": channels }),
            );
        }
    }
    from.ask(
        "migrate-set-parameters",
        json!({ "downtime-limit": case.downtime_ms, "max-bandwidth": 1_u64 << 40 }),
    );
    // A free port; nobody else asks for one between here and QEMU's bind.
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let uri = format!("tcp:127.0.0.1:{port}");
    to.ask("migrate-incoming", json!({ "uri": uri }));
    ready(&file("a.log"));
    from.ask("migrate", json!({ "uri": uri }));
    let info = until("QEMU's migration", || {
        let info = from.ask("query-migrate", json!({}));
        assert_ne!(info["status"], "failed", "{info}");
        (info["status"] == "completed").then_some(info)
    });
    Sample {
        total_ms: info["total-time"].as_f64().unwrap(),
        gap_ms: gap_ms(&file("b.log")),
        reported_ms: info["downtime"].as_f64().unwrap(),
        wire_mb: info["ram"]["transferred"].as_f64().unwrap() / 1e6,
        own_kib: [0, 0],
    }
}
