//! Processes that are measured, and that never outlive a run.

use super::interrupt;
use super::listener::Listener;
use super::log::Log;
use ferry_terminal::output::Failure;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command};
use std::time::{Duration, Instant};

/// A child process; killed when dropped.
pub struct Process {
    child: Child,
    name: &'static str,
    listener: Option<Listener>,
    terminal: Option<File>,
}

/// Resident memory in KiB, as `/proc/PID/status` has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Rss {
    /// Anonymous memory.
    pub anon_kib: u64,
    /// The executable and its libraries.
    pub file_kib: u64,
    /// Shared memory: where a guest lies in a memfd, the guest.
    pub shmem_kib: u64,
}

impl Rss {
    /// What the process itself holds, without its guest's `guest_kib`. `None` while anonymous
    /// memory is being filled with the guest.
    const fn own_kib(&self, guest_kib: u64) -> Option<u64> {
        let private = self.anon_kib + self.file_kib;
        if self.shmem_kib >= self.anon_kib {
            Some(private)
        } else if self.anon_kib >= guest_kib / 10 * 9 {
            Some(private.saturating_sub(guest_kib))
        } else {
            None
        }
    }

    /// The same of a process that is not receiving its guest: it has all of it or nothing.
    const fn own_at_rest_kib(&self, guest_kib: u64) -> u64 {
        match self.own_kib(guest_kib) {
            Some(own) => own,
            None => self.anon_kib + self.file_kib,
        }
    }
}

impl Process {
    /// Starts it.
    ///
    /// In a process group of its own: the benchmark gets Ctrl-C, and ends its processes in order.
    pub fn start(name: &'static str, command: &mut Command) -> Result<Self, Failure> {
        let child = command.process_group(0).spawn().map_err(|e| {
            let program = command.get_program().display();
            Failure(format!(
                "{name} ({program}) cannot be started ({e}); is it installed?"
            ))
        })?;
        Ok(Self {
            child,
            name,
            listener: None,
            terminal: None,
        })
    }

    /// Writes its stdout, which must be a pipe, into a file, and records when bytes arrive.
    pub fn recorded_in(mut self, log: &Log) -> Result<Self, Failure> {
        let stdout = self.child.stdout.take();
        let stdout =
            stdout.ok_or_else(|| Failure(format!("the stdout of {} is no pipe", self.name)))?;
        self.listener = Some(Listener::listen(stdout, &log.0)?);
        Ok(self)
    }

    /// Types into this file instead of its stdin.
    pub fn typed_at(mut self, terminal: File) -> Self {
        self.terminal = Some(terminal);
        self
    }

    /// When bytes arrived, so far; all of them once it has `ended`.
    pub fn arrivals(&mut self, ended: bool) -> Vec<Instant> {
        let Some(listener) = &mut self.listener else {
            return Vec::new();
        };
        if ended {
            listener.end();
        }
        listener.arrivals()
    }

    /// Its number.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether it still runs; one that has ended is not reaped, so that its times can still be
    /// read.
    pub fn runs(&self) -> bool {
        stat(self.id()).is_some_and(|stat| stat.state != 'Z')
    }

    /// Writes to its stdin.
    pub fn type_in(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        if let Some(terminal) = &mut self.terminal {
            return Ok(terminal.write_all(bytes)?);
        }
        let stdin = self.child.stdin.as_mut();
        let stdin =
            stdin.ok_or_else(|| Failure(format!("the stdin of {} is closed", self.name)))?;
        stdin.write_all(bytes)?;
        Ok(stdin.flush()?)
    }

    /// Its stdout, where that is a pipe; once.
    pub fn take_stdout(&mut self) -> Result<ChildStdout, Failure> {
        let stdout = self.child.stdout.take();
        stdout.ok_or_else(|| Failure(format!("the stdout of {} is taken", self.name)))
    }

    /// Waits for its end.
    pub fn end(&self, timeout: Duration) -> Result<(), Failure> {
        interrupt::until(
            timeout,
            || format!("{} has not ended in {timeout:?}", self.name),
            || Ok((!self.runs()).then_some(())),
        )
    }

    /// Fails if it has ended by itself.
    pub fn must_run(&self) -> Result<(), Failure> {
        if self.runs() {
            return Ok(());
        }
        Err(Failure(format!("{} ended too early", self.name)))
    }
}

/// What a program calls itself; nothing if it cannot be run.
pub fn version_of(program: &Path) -> Option<String> {
    let output = Command::new(program).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    output
        .status
        .success()
        .then(|| text.lines().next().unwrap_or_default().to_owned())
}

/// Ends a process by force, wherever it stands.
pub fn end_by_force(pid: u32) {
    if let Ok(pid) = i32::try_from(pid) {
        // It may have ended by itself.
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Gone already if all went well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The end of what processes wrote to stderr, for the message about a failed run.
pub fn said(files: &[PathBuf]) -> String {
    let texts = files.iter().map(|file| {
        let text = fs::read(file).unwrap_or_default();
        let name = file.file_name().unwrap_or_default().display();
        let text = &text[text.len().saturating_sub(600)..];
        let words = String::from_utf8_lossy(text);
        format!(
            "{name}: {}",
            words.split_whitespace().collect::<Vec<_>>().join(" ")
        )
    });
    let told = texts.filter(|text| !text.ends_with(": "));
    told.collect::<Vec<_>>().join("; ")
}

struct Stat {
    state: char,
    ticks: u64,
}

/// State and times of a process from `/proc/PID/stat` (proc(5)): the fields after the name, which
/// may hold anything.
fn stat(pid: u32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    let ticks = |at: usize| fields.get(at)?.parse::<u64>().ok();
    Some(Stat {
        state: fields.first()?.chars().next()?,
        ticks: ticks(11)? + ticks(12)?,
    })
}

/// CPU time of all threads that the process ever had; stays readable until it is reaped. Linux
/// counts in 1/100 s.
fn cpu(pid: u32) -> Duration {
    Duration::from_millis(stat(pid).map_or(0, |stat| stat.ticks * 10))
}

/// The resident memory now.
pub fn rss(pid: u32) -> Rss {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let field = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name))
            .and_then(|rest| rest.split_ascii_whitespace().next()?.parse().ok())
            .unwrap_or(0)
    };
    Rss {
        anon_kib: field("RssAnon:"),
        file_kib: field("RssFile:"),
        shmem_kib: field("RssShmem:"),
    }
}

/// Adds the CPU time of every vCPU thread to `times`, by thread.
fn vcpu_times(pid: u32, times: &mut BTreeMap<String, Duration>) {
    for task in fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
    {
        let Ok(task) = task else { continue };
        let read = |file: &str| fs::read_to_string(task.path().join(file)).unwrap_or_default();
        let name = read("comm");
        // ferry's "vcpu0", QEMU's "CPU 0/KVM".
        if !(name.starts_with("vcpu") || name.starts_with("CPU ")) {
            continue;
        }
        // Nanoseconds on a processor are its first field (Documentation/scheduler/sched-stats).
        if let Some(Ok(ns)) = read("schedstat").split(' ').next().map(str::parse) {
            let thread = task.file_name().to_string_lossy().into_owned();
            times.insert(thread, Duration::from_nanos(ns));
        }
    }
}

/// What a process used while it was watched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Use {
    /// CPU time in seconds without its vCPU threads.
    pub cpu_s: f64,
    /// CPU time in seconds of its vCPU threads.
    pub vcpu_s: f64,
    /// Resident memory when the watching began.
    pub rss_before: Rss,
    /// What it held itself then, in KiB: beyond its guest's memory.
    pub own_before_kib: u64,
    /// The most that it held itself meanwhile, in KiB.
    pub own_kib: u64,
}

/// Watches a process: a look every 20 ms, which costs what three small reads cost.
pub struct Watch {
    pid: u32,
    cpu: Duration,
    vcpu_before: BTreeMap<String, Duration>,
    vcpu: BTreeMap<String, Duration>,
    used: Use,
    guest_kib: u64,
}

impl Watch {
    /// Begins.
    pub fn new(pid: u32, guest_kib: u64) -> Self {
        let mut vcpu = BTreeMap::new();
        vcpu_times(pid, &mut vcpu);
        let rss_before = rss(pid);
        let used = Use {
            rss_before,
            own_before_kib: rss_before.own_at_rest_kib(guest_kib),
            ..Use::default()
        };
        Self {
            pid,
            cpu: cpu(pid),
            vcpu_before: vcpu.clone(),
            vcpu,
            used,
            guest_kib,
        }
    }

    /// Takes a look.
    pub fn look(&mut self) {
        let now = rss(self.pid);
        vcpu_times(self.pid, &mut self.vcpu);
        let used = &mut self.used;
        used.own_kib = used.own_kib.max(now.own_kib(self.guest_kib).unwrap_or(0));
    }

    /// Looks for the last time, and sums up.
    pub fn finish(mut self) -> Use {
        self.look();
        // The vCPU's time is taken off the whole: both of the same moment, or as near as can be.
        let whole = cpu(self.pid).saturating_sub(self.cpu).as_secs_f64();
        let before = |thread| self.vcpu_before.get(thread).copied().unwrap_or_default();
        let vcpu: Duration = self
            .vcpu
            .iter()
            .map(|(thread, time)| time.saturating_sub(before(thread)))
            .sum();
        self.used.vcpu_s = vcpu.as_secs_f64();
        self.used.cpu_s = (whole - self.used.vcpu_s).max(0.0);
        self.used
    }
}
