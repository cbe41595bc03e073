//! Receivers that the agent has started. Each is a process of its own, which outlives the agent and
//! ends by itself where no guest comes in time.

use crate::commands::ferry;
use crate::settings::Settings;
use crate::types::{Receiver, Wanted};
use ferry_terminal::names::{GuestName, RuntimeFolder};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Child;
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
    let failed = |e: std::io::Error| format!("a receiver could not be started ({e})");
    let host = match address {
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => format!("[{ip}]"),
    };
    let mut command = ferry().map_err(failed)?;
    command
        .args([
            "receive",
            &format!("tcp:{host}:0"),
            "--pair",
            "--wait",
            WAIT,
        ])
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
    // Of its own group: a Ctrl-C for the agent is none for a guest.
    let mut child = command
        .process_group(0)
        .stdout(std::process::Stdio::null())
        .stderr(words(&log)?)
        .spawn()
        .map_err(failed)?;
    match listening(&mut child, &log) {
        Ok(receiver) => Ok(Started { receiver, child }),
        Err(why) => {
            // It may have ended.
            let _ = child.kill();
            let _ = child.wait();
            Err(why)
        }
    }
}

/// Starts the guest of a file, as a process of its own.
///
/// # Errors
/// Its own sentence, or why it could not be started.
pub fn start_guest(file: &Path, name: &GuestName) -> Result<(), String> {
    let folder = RuntimeFolder::find().map_err(|e| e.to_string())?;
    let log = folder.path().join(format!("{name}.run.log"));
    let failed = |e: std::io::Error| format!("the guest could not be started ({e})");
    let mut command = ferry().map_err(failed)?;
    let mut child = command
        .arg("run")
        .arg(file)
        .args(["--name", name.as_str()])
        .process_group(0)
        .stdout(std::process::Stdio::null())
        .stderr(words(&log)?)
        .spawn()
        .map_err(failed)?;
    let deadline = Instant::now() + START;
    while Instant::now() < deadline {
        if child.try_wait().map_err(|e| e.to_string())?.is_some() {
            return Err(format!("the guest did not start: {}", last(&read(&log))));
        }
        let there = folder
            .existing(name)
            .is_ok_and(|socket| UnixStream::connect(socket).is_ok());
        if there {
            follow(child, name);
            return Ok(());
        }
        std::thread::sleep(LOOK);
    }
    follow(child, name);
    Err(format!(
        "the guest did not answer within {} s",
        START.as_secs()
    ))
}

/// Takes note of a process's end, whenever that is.
pub fn follow(mut child: Child, name: &GuestName) {
    let named = name.clone();
    let wait = move || match child.wait() {
        Ok(status) => tracing::info!(name = %named, %status, "a VMM has ended"),
        Err(error) => tracing::warn!(name = %named, %error, "a VMM cannot be waited for"),
    };
    let thread = std::thread::Builder::new()
        .name("ferry-child".into())
        .spawn(wait);
    if let Err(error) = thread {
        tracing::warn!(%name, %error, "a VMM will stay a zombie when it ends");
    }
}

/// Where the words of a process go. They outlast the agent: a pipe would not.
fn words(log: &Path) -> Result<File, String> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(log)
        .map_err(|e| format!("{} cannot be written ({e})", log.display()))
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

/// Waits for the receiver's own words.
fn listening(child: &mut Child, log: &Path) -> Result<Receiver, String> {
    let deadline = Instant::now() + START;
    loop {
        let ended = child.try_wait().map_err(|e| e.to_string())?.is_some();
        let words = read(log);
        if let Some(receiver) = heard(&words) {
            return Ok(receiver);
        }
        if ended {
            return Err(format!("the receiver did not start: {}", last(&words)));
        }
        if Instant::now() > deadline {
            return Err(format!(
                "the receiver did not listen within {} s",
                START.as_secs()
            ));
        }
        std::thread::sleep(LOOK);
    }
}

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
