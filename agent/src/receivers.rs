//! Receivers that the agent has started. Each is a process of its own, which outlives the agent and
//! ends by itself where no guest comes in time.

use crate::commands::ferry;
use crate::settings::Settings;
use crate::types::{Receiver, Wanted};
use ferry_terminal::names::{GuestName, RuntimeFolder};
use ferry_vmm::thread;
use rustix::process::{Pid, Signal, kill_process};
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a receiver waits for its guest to begin arriving.
const WAIT: &str = "60s";
/// How long it may take to listen.
const START: Duration = Duration::from_secs(20);
/// How often its words are looked for.
const LOOK: Duration = Duration::from_millis(20);
/// The most of its words that are read.
const MOST: u64 = 64 << 10;

/// A receiver that listens.
pub struct Started {
    /// What the source needs.
    pub receiver: Receiver,
    /// Its process.
    pub child: Child,
}

/// Starts `ferry receive` for a guest, and waits until it listens at `address`.
///
/// # Errors
/// Its own sentence, or why it could not be started.
pub fn start(
    wanted: &Wanted,
    name: &GuestName,
    settings: &Settings,
    address: IpAddr,
) -> Result<Started, String> {
    let folder = RuntimeFolder::find().map_err(|e| e.to_string())?;
    let log = folder.path().join(format!("{name}.receive.log"));
    let failed = |e: io::Error| format!("a receiver could not be started ({e})");
    let uri = format!("tcp:{}", SocketAddr::new(address, 0));
    let mut command = ferry().map_err(failed)?;
    command
        .args(["receive", &uri, "--pair", "--wait", WAIT])
        .args(["--name", name.as_str(), "--serial", "null"])
        .args(["--max-memory", &wanted.memory_bytes.to_string()])
        .args(["--max-cpus", &wanted.cpus.to_string()]);
    for disk in &wanted.disks {
        let mut value = settings.disk(&disk.path).into_os_string();
        if disk.read_only {
            value.push(",ro");
        }
        command.arg("--disk").arg(value);
    }
    for network in &wanted.networks {
        command.args(["--net", &format!("tap={}", settings.tap(&network.tap))]);
    }
    if let Some(path) = &wanted.vsock {
        let mut value = OsString::from("socket=");
        value.push(path);
        command.arg("--vsock").arg(value);
    }
    let mut child = spawn(&mut command, &log).map_err(failed)?;
    let why = match await_start(&mut child, &log, || heard(&read(&log))) {
        Ok(receiver) => return Ok(Started { receiver, child }),
        Err(Some(last)) => format!("the receiver did not start: {last}"),
        Err(None) => format!("the receiver did not listen within {} s", START.as_secs()),
    };
    // It may have ended.
    let _ = child.kill();
    let _ = child.wait();
    Err(why)
}

/// Starts the guest of a file, as a process of its own.
///
/// # Errors
/// Its own sentence, or why it could not be started.
pub fn start_guest(file: &Path, name: &GuestName) -> Result<(), String> {
    let folder = RuntimeFolder::find().map_err(|e| e.to_string())?;
    let log = folder.path().join(format!("{name}.run.log"));
    let failed = |e: io::Error| format!("the guest could not be started ({e})");
    let mut command = ferry().map_err(failed)?;
    command.arg("run").arg(file).args(["--name", name.as_str()]);
    let mut child = spawn(&mut command, &log).map_err(failed)?;
    let there = || {
        let socket = folder.existing(name).ok()?;
        UnixStream::connect(socket).ok().map(drop)
    };
    let started = await_start(&mut child, &log, there);
    follow(child, name);
    started.map_err(|last| match last {
        Some(last) => format!("the guest did not start: {last}"),
        None => format!("the guest did not answer within {} s", START.as_secs()),
    })
}

/// Starts a process of its own, whose words go into a file: they outlast the agent, as a pipe would
/// not.
fn spawn(command: &mut Command, log: &Path) -> io::Result<Child> {
    let words = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(log)
        .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", log.display())))?;
    // Of its own group: a Ctrl-C for the agent is none for a guest.
    command
        .process_group(0)
        .stdout(Stdio::null())
        .stderr(words)
        .spawn()
}

/// Waits until a process that was started is `ready`. Otherwise its last words, if it has ended.
fn await_start<T>(
    child: &mut Child,
    log: &Path,
    ready: impl Fn() -> Option<T>,
) -> Result<T, Option<String>> {
    let deadline = Instant::now() + START;
    loop {
        // In this order: what it said before its end is read.
        let ended = child.try_wait().is_ok_and(|status| status.is_some());
        if let Some(ready) = ready() {
            return Ok(ready);
        }
        if ended {
            return Err(Some(last(&read(log)).to_owned()));
        }
        if Instant::now() > deadline {
            return Err(None);
        }
        std::thread::sleep(LOOK);
    }
}

/// Takes note of a process's end, whenever that is.
pub fn follow(mut child: Child, name: &GuestName) {
    let named = name.clone();
    let wait = move || {
        let status = child.wait().map_err(|e| e.to_string())?;
        tracing::info!(name = %named, %status, "a VMM has ended");
        Ok(())
    };
    let failed = |why| tracing::warn!("a VMM cannot be waited for: {why}");
    if let Err(error) = thread::spawn(thread::Kind::Vmm, "ferry-child", wait, failed) {
        tracing::warn!(%name, %error, "a VMM will stay a zombie when it ends");
    }
}

fn read(log: &Path) -> String {
    let file = File::open(log).and_then(|file| {
        let mut text = String::new();
        file.take(MOST).read_to_string(&mut text)?;
        Ok(text)
    });
    file.unwrap_or_default()
}

fn last(words: &str) -> &str {
    let last = words.trim().lines().last().unwrap_or("it said nothing");
    last.trim_start_matches("ferry: ")
}

/// What a receiver says when it listens.
fn heard(words: &str) -> Option<Receiver> {
    let after = |part: &str| {
        let line = words.lines().find_map(|line| line.split_once(part))?.1;
        line.split_whitespace().next()
    };
    Some(Receiver {
        schema: 1,
        pair: after("--pair ")?.to_owned(),
        uri: after("waiting on ")?.to_owned(),
    })
}

/// Asks a receiver without a guest to end.
///
/// # Errors
/// It cannot be signalled.
pub fn end(pid: u32) -> Result<(), String> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or("it has no process")?;
    kill_process(pid, Signal::TERM).map_err(|e| format!("it could not be ended ({e})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_words_are_waited_for() {
        let first = "ferry: the source needs: --pair ferry1:abc\n";
        assert_eq!(heard(first), None);
        let both = format!("{first}ferry: waiting on tcp:192.0.2.1:4000 for a guest\n");
        let receiver = heard(&both).unwrap();
        assert_eq!(receiver.uri, "tcp:192.0.2.1:4000");
        assert_eq!(receiver.pair, "ferry1:abc");
    }
}
