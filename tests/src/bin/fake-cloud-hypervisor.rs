//! Speaks Cloud Hypervisor's API, as far as `ferry bench` uses it, and has `ferry` do the work: so
//! that the benchmark's driver meets a guest that really boots and moves where there is no Cloud
//! Hypervisor.
//!
//! `FERRY_BIN` is the ferry. It takes Cloud Hypervisor's own options; what they are and what it
//! answers is from that project's `docs/live_migration.md` and OpenAPI description.
#![allow(clippy::unwrap_used, clippy::panic)]

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{BufRead, BufReader, IsTerminal, Read, Write, stdin};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

struct Fake {
    options: BTreeMap<String, String>,
    vmm: Option<Child>,
}

impl Fake {
    /// An option's value, without the key that some of them have.
    fn option(&self, name: &str) -> Option<&str> {
        let value = self.options.get(name)?;
        Some(value.split_once('=').map_or(value, |(_, value)| value))
    }

    /// Where ferry's own control socket lies.
    fn api(&self) -> String {
        format!("{}.f", self.option("--api-socket").unwrap())
    }

    fn ferry(&self) -> Command {
        let ferry: OsString = std::env::var_os("FERRY_BIN").unwrap();
        // It ends with this process, however that ends.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).arg(ferry);
        command
    }

    /// Boots the guest of the command line, as Cloud Hypervisor does where it names a kernel.
    fn boot(&mut self) {
        let Some(kernel) = self.options.get("--kernel") else {
            return;
        };
        assert_eq!(self.option("--console"), Some("off"));
        assert_eq!(self.option("--serial"), Some("tty"));
        // It reads a serial port's input from a terminal only.
        assert!(stdin().is_terminal());
        let child = self
            .ferry()
            .args(["run", "--kernel", kernel, "--cmdline"])
            .arg(&self.options["--cmdline"])
            .args(["--memory", self.option("--memory").unwrap()])
            .args(["--cpus", self.option("--cpus").unwrap()])
            .args(["--serial", "stdio", "--api", &self.api()])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        self.vmm = Some(typed_to(child));
    }

    /// Waits for a guest.
    fn receive(&mut self, body: &Value) -> Result<(), String> {
        let url = body["receiver_url"].as_str().ok_or("no receiver_url")?;
        let api = self.api();
        let child = self
            .ferry()
            .args(["receive", url, "--serial", "stdio", "--api", &api])
            .stdin(Stdio::piped())
            .spawn()
            .map_err(|e| e.to_string())?;
        self.vmm = Some(typed_to(child));
        loop {
            std::thread::sleep(Duration::from_millis(5));
            if let Some(ended) = self.vmm.as_mut().unwrap().try_wait().unwrap() {
                return Err(format!("the receiver ended: {ended}"));
            }
            let status = self
                .ferry()
                .args(["status", "--json", "--api", &api])
                .output();
            let status = status.map_err(|e| e.to_string())?;
            let status: Value = serde_json::from_slice(&status.stdout).unwrap_or_default();
            if status["state"] == "running" {
                return Ok(());
            }
        }
    }

    /// Sends it away.
    fn send(&mut self, body: &Value) -> Result<(), String> {
        let url = body["destination_url"]
            .as_str()
            .ok_or("no destination_url")?;
        if body["connections"]
            .as_u64()
            .is_none_or(|n| !(1..=128).contains(&n))
        {
            return Err("connections must be between 1 and 128".into());
        }
        let downtime = format!(
            "{}ms",
            body["downtime_ms"].as_u64().ok_or("no downtime_ms")?
        );
        let policy = match body.get("memory_mode").and_then(Value::as_str) {
            Some("Postcopy") => "postcopy",
            None => "precopy",
            Some(other) => return Err(format!("unknown variant `{other}`")),
        };
        let output = self
            .ferry()
            .args(["migrate", "--api", &self.api(), url, "--policy", policy])
            .args(["--downtime", &downtime, "--json"])
            .output()
            .map_err(|e| e.to_string())?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        let ended = self.vmm.as_mut().ok_or("no guest")?.wait();
        ended.map(drop).map_err(|e| e.to_string())
    }

    /// Answers one request; whether there may be more.
    fn serve(&mut self, stream: UnixStream) -> bool {
        let mut reader = BufReader::new(stream);
        let (mut first, mut length) = (String::new(), 0);
        reader.read_line(&mut first).unwrap();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            if line.trim().is_empty() {
                break;
            }
            if let Some((name, value)) = line.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                length = value.trim().parse().unwrap();
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).unwrap();
        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
        let mut more = true;
        let mut words = first.split(' ');
        let done = match (words.next(), words.next()) {
            (Some("GET"), Some("/api/v1/vmm.ping")) => {
                respond(reader.get_mut(), "200 OK", &json!({ "version": "v53.0" }));
                return true;
            }
            (Some("PUT"), Some("/api/v1/vm.receive-migration")) => self.receive(&body),
            (Some("PUT"), Some("/api/v1/vm.send-migration")) => self.send(&body).inspect(|()| {
                // The source ends by itself.
                more = false;
            }),
            (Some("PUT"), Some("/api/v1/vmm.shutdown")) => {
                more = false;
                Ok(())
            }
            _ => Err(format!("no such request: {first}")),
        };
        match done {
            // As its server does, and it keeps the connection open.
            Ok(()) => write!(reader.get_mut(), "HTTP/1.1 204 \r\nServer: Fake\r\n\r\n").unwrap(),
            Err(why) => respond(reader.get_mut(), "500 ", &json!([why])),
        }
        more
    }
}

/// Passes on what is typed: ferry itself does not read a terminal that is not its own.
fn typed_to(mut child: Child) -> Child {
    let mut to = child.stdin.take().unwrap();
    std::thread::spawn(move || {
        let mut from = stdin();
        let mut byte = [0];
        while from.read_exact(&mut byte).is_ok() && to.write_all(&byte).is_ok() {}
    });
    child
}

fn respond(stream: &mut UnixStream, status: &str, body: &Value) {
    let body = body.to_string();
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Length: {length}\r\n\r\n{body}"
    )
    .unwrap();
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments == ["--version"] {
        println!("cloud-hypervisor v53.0-fake");
        return ExitCode::SUCCESS;
    }
    let pairs = arguments.chunks_exact(2);
    let options = pairs
        .map(|pair| (pair[0].clone(), pair[1].clone()))
        .collect();
    let mut fake = Fake { options, vmm: None };
    let listener = UnixListener::bind(fake.option("--api-socket").unwrap()).unwrap();
    fake.boot();
    for stream in listener.incoming() {
        if !fake.serve(stream.unwrap()) {
            return ExitCode::SUCCESS;
        }
    }
    ExitCode::FAILURE
}
