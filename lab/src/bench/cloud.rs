//! The same bare guest under Cloud Hypervisor, moved by its HTTP API.
//!
//! Facts from its repository (`docs/live_migration.md`, `docs/api.md`, the API's OpenAPI
//! description): `vm.receive-migration` answers when the guest has arrived. `vm.send-migration`
//! does so too in old versions; in new ones it answers at once, and the source ends by itself.
//! The serial port reads input from a terminal only, so it gets one. Cloud Hypervisor reports no
//! figures of a migration: guest, listener, link and kernel are the only sources.

use super::cell::{Cell, Cloud, CloudMode};
use super::interrupt;
use super::measure::Told;
use super::net::Net;
use super::pair::{Files, Machine, Pair, free_port, guest_command_line};
use super::process::{Process, version_of};
use ferry_terminal::output::Failure;
use ferry_vmm::api::client::Client;
use nix::pty::openpty;
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The program, where none is named.
pub const PROGRAM: &str = "cloud-hypervisor";
/// What names it otherwise.
pub const VARIABLE: &str = "FERRY_CLOUD_HYPERVISOR";
/// The first version that has a downtime target, connections and post-copy; an older one would
/// overlook them.
const OLDEST: u32 = 53;
/// Its own default for the whole migration, which the benchmark's timeout replaces.
const SECOND_MS: u64 = 1000;

/// The program that flags or the environment name.
pub fn program(named: Option<&Path>) -> PathBuf {
    let of_environment = || std::env::var_os(VARIABLE).map(PathBuf::from);
    named
        .map(Path::to_owned)
        .or_else(of_environment)
        .unwrap_or_else(|| PROGRAM.into())
}

/// Why its runs cannot be made, if so.
pub fn missing(program: &Path) -> Option<String> {
    let Some(version) = version_of(program) else {
        return Some(format!(
            "{} is not installed; name its binary by --cloud-hypervisor PATH or {VARIABLE}",
            program.display()
        ));
    };
    major(&version)
        .is_some_and(|major| major < OLDEST)
        .then(|| {
            format!(
                "{} is {version}, which knows no downtime target, connections or post-copy; version {OLDEST} is needed",
                program.display()
            )
        })
}

/// The first number of `cloud-hypervisor v53.0-12-g…`; a build of one's own may have none.
fn major(version: &str) -> Option<u32> {
    let number = version.split_whitespace().last()?.trim_start_matches('v');
    number.split('.').next()?.parse().ok()
}

/// The two processes.
pub struct Pairing {
    processes: [Process; 2],
    source: Client,
    destination: Client,
    how: Cloud,
    url: String,
    timeout: Duration,
}

/// A process whose serial port is its stdin and stdout.
fn start_one(
    name: &'static str,
    mut command: Command,
    api: &Path,
    errors: &Path,
    log: &super::log::Log,
) -> Result<Process, Failure> {
    let terminal = openpty(None, None)
        .map_err(|e| Failure(format!("there is no pseudo-terminal to be had ({e})")))?;
    // Raw: a byte arrives as it is, and at once.
    let raw = tcgetattr(&terminal.slave).and_then(|mut modes| {
        cfmakeraw(&mut modes);
        tcsetattr(&terminal.slave, SetArg::TCSANOW, &modes)
    });
    raw.map_err(|e| Failure(format!("a pseudo-terminal cannot be set up ({e})")))?;
    command
        .arg("--api-socket")
        .arg(format!("path={}", api.display()))
        .stdin(Stdio::from(terminal.slave))
        .stdout(Stdio::piped())
        .stderr(File::create(errors)?);
    let process = Process::start(name, &mut command)?.recorded_in(log)?;
    Ok(process.typed_at(File::from(terminal.master)))
}

/// Starts both, and the guest.
pub fn start(
    of: &Machine,
    cell: &Cell,
    how: &Cloud,
    net: &Net,
    files: &Files,
) -> Result<Pairing, Failure> {
    if net.cap.is_some() {
        return Err(Failure(
            "Cloud Hypervisor cannot cap itself; a link with a rate needs root".into(),
        ));
    }
    let destination = start_one(
        "the receiving Cloud Hypervisor",
        net.at_destination(&of.cloud),
        &files.path("b.api"),
        &files.path("b.err"),
        &files.destination(),
    )?;
    let mut command = net.at_source(&of.cloud);
    command
        .arg("--kernel")
        .arg(files.image()?)
        .args(["--cmdline", &guest_command_line(cell, of.tsc_khz)])
        .args(["--memory", &format!("size={}M", cell.guest.mib())])
        .args(["--cpus", &format!("boot={}", cell.guest.cpus)])
        .args(["--serial", "tty", "--console", "off"]);
    let source = start_one(
        "the sending Cloud Hypervisor",
        command,
        &files.path("a.api"),
        &files.path("a.err"),
        &files.source(),
    )?;
    let pair = Pairing {
        processes: [source, destination],
        source: Client::new(&files.path("a.api")),
        destination: Client::new(&files.path("b.api")),
        how: how.clone(),
        url: format!("tcp:{}:{}", net.address(), free_port()?),
        timeout: of.timeout,
    };
    for (client, process) in [&pair.source, &pair.destination]
        .iter()
        .zip(&pair.processes)
    {
        interrupt::until(
            Duration::from_secs(30),
            || "Cloud Hypervisor does not answer on its API's socket".to_owned(),
            || {
                process.must_run()?;
                Ok(client.call("GET", "/api/v1/vmm.ping", None, None).ok())
            },
        )?;
    }
    Ok(pair)
}

/// A command of the API.
fn command(client: &Client, name: &str, body: &Value, timeout: Duration) -> Result<(), Failure> {
    let target = format!("/api/v1/{name}");
    let body = serde_json::to_vec(body)?;
    let (status, answer) = client
        .call("PUT", &target, Some(body), Some(timeout))
        .map_err(|e| Failure(format!("Cloud Hypervisor was told {name}: {e}")))?;
    if (200..300).contains(&status) {
        return Ok(());
    }
    let why = String::from_utf8_lossy(&answer);
    let why: Vec<&str> = why.split_whitespace().collect();
    Err(Failure(format!(
        "Cloud Hypervisor refuses {name} ({status}): {}",
        why.join(" ")
    )))
}

/// Whether a port is listened on in the network namespace of a process (`/proc/PID/net/tcp`,
/// proc(5)).
fn listens(pid: u32, port: u16) -> bool {
    let text = fs::read_to_string(format!("/proc/{pid}/net/tcp")).unwrap_or_default();
    let end = format!(":{port:04X}");
    text.lines().skip(1).any(|line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        // The local address, and the state TCP_LISTEN.
        fields.next().is_some_and(|local| local.ends_with(&end)) && fields.nth(1) == Some("0A")
    })
}

impl Pairing {
    fn port(&self) -> u16 {
        let port = self.url.rsplit(':').next().unwrap_or_default();
        port.parse().unwrap_or(0)
    }

    /// What the source is told.
    fn request(&self) -> Value {
        let mut request = json!({
            "destination_url": self.url,
            "downtime_ms": self.how.downtime_ms.max(1),
            "timeout_s": self.timeout.as_secs().max(1),
            "connections": self.how.connections,
        });
        if let Some(ms) = self.how.stop_after_ms {
            request["timeout_s"] = json!(ms.div_ceil(SECOND_MS).max(1));
            request["timeout_strategy"] = json!("Ignore");
        }
        if self.how.mode == CloudMode::Postcopy {
            request["memory_mode"] = json!("Postcopy");
        }
        request
    }
}

impl Pair for Pairing {
    fn processes(&mut self) -> [&mut Process; 2] {
        let [source, destination] = &mut self.processes;
        [source, destination]
    }

    fn migrate(&mut self) -> Result<Told, Failure> {
        let mut wanted = json!({ "receiver_url": self.url });
        if self.how.mode == CloudMode::Postcopy {
            wanted["memory_mode"] = json!("Postcopy");
        }
        // A connection that waits for its answer longer than the migration may take.
        let timeout = self.timeout + Duration::from_secs(60);
        let receiver = self.destination.clone();
        let receive = std::thread::spawn(move || {
            command(&receiver, "vm.receive-migration", &wanted, timeout)
        });
        let (pid, port) = (self.processes[1].id(), self.port());
        let ready = interrupt::until(
            Duration::from_secs(30),
            || "the receiving Cloud Hypervisor does not listen".to_owned(),
            || Ok((listens(pid, port) || receive.is_finished()).then_some(())),
        );
        let began = Instant::now();
        let sent = ready
            .and_then(|()| command(&self.source, "vm.send-migration", &self.request(), timeout));
        if sent.is_err() {
            // No guest will come, and the receiver would wait on.
            super::process::end_by_force(pid);
        }
        let received = receive
            .join()
            .unwrap_or_else(|_| Err(Failure("the thread that waited for the guest died".into())));
        sent.and(received)?;
        let total_ms = began.elapsed().as_secs_f64() * 1e3;
        // One that stays is asked; one that has gone by itself cannot be, and need not.
        let _ = command(&self.source, "vmm.shutdown", &json!({}), timeout);
        Ok(Told {
            total_ms,
            report: json!({ "told": self.request() }),
            ..Told::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_where_there_are_any() {
        assert_eq!(major("cloud-hypervisor v53.0"), Some(53));
        assert_eq!(major("cloud-hypervisor v48.0-12-gabcdef"), Some(48));
        assert_eq!(major("cloud-hypervisor 6f1e2d3"), None);
        let sentence = missing(Path::new("/nonexistent/cloud-hypervisor")).unwrap();
        assert!(
            sentence.contains("/nonexistent/cloud-hypervisor is not installed")
                && sentence.contains(VARIABLE),
            "{sentence}"
        );
    }

    #[test]
    fn a_port_that_is_listened_on_is_seen() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        assert!(listens(std::process::id(), address.port()));
        // A port that is used and not listened on. One that was closed could be another's by now,
        // or still be held by a process that a test beside this one is about to start.
        let client = std::net::TcpStream::connect(address).unwrap();
        let port = client.local_addr().unwrap().port();
        assert!(!listens(std::process::id(), port));
    }
}
