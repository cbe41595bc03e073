//! A `ferry` process that is a guest's VMM.

mod lines;
mod migration;

use crate::{TIMEOUT, ferry, until};
use ferry_guest_images::{Line, STOP, Verdict};
use ferry_migration::options::{OnTimeout, Options};
use ferry_migration::report::Report;
use ferry_vmm::api::client::{Action, Client};
use ferry_vmm::api::types::{MigrateRequest, RecoverRequest, Security};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use lines::Lines;
pub use migration::Migration;
use migration::check;

pub use ferry_vmm::api::types::StateName as State;

/// A VMM process; dropping it ends the process.
#[derive(Debug)]
pub struct Host {
    child: Child,
    stdin: ChildStdin,
    guest: Lines,
    said: Lines,
    client: Client,
    uri: Option<String>,
    _dir: tempfile::TempDir,
}

impl Host {
    /// `ferry run --nas WORK`, once the guest is in its steady state.
    pub fn run(work: &str, memory: &str, cpus: u32) -> Self {
        Self::run_with(work, memory, cpus, &[])
    }

    /// As [`Host::run`], with more options.
    pub fn run_with(work: &str, memory: &str, cpus: u32, more: &[&str]) -> Self {
        let cpus = cpus.to_string();
        let args = [
            "run", "--nas", work, "--memory", memory, "--cpus", &cpus, "--serial", "stdio",
        ];
        let host = Self::start(&[&args, more].concat());
        host.guest_line("ready", |line| matches!(line, Line::Ready { .. }));
        host
    }

    /// As [`Host::run`], a kernel that is run until it is told to stop.
    pub fn run_kernel(kernel: &str, memory: &str, cpus: u32) -> Self {
        let cpus = cpus.to_string();
        let host = Self::start(&[
            "run", "--nas", kernel, "--repeat", "0", "--memory", memory, "--cpus", &cpus,
            "--serial", "stdio",
        ]);
        host.guest_line("ready", |line| matches!(line, Line::Ready { .. }));
        host
    }

    /// `ferry receive` on a free port, once it listens.
    pub fn receive() -> Self {
        Self::receive_with(&[])
    }

    /// As [`Host::receive`], with more options.
    pub fn receive_with(more: &[&str]) -> Self {
        let args = ["receive", "tcp:127.0.0.1:0", "--serial", "stdio"];
        Self::listening(Self::start(&[&args, more].concat()))
    }

    /// As [`Host::receive`], on a Unix socket.
    pub fn receive_unix() -> Self {
        Self::receive_unix_with(&[])
    }

    /// As [`Host::receive_unix`], with more options.
    pub fn receive_unix_with(more: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let uri = format!("unix:{}", dir.path().join("link").display());
        Self::listening(Self::start_in(
            dir,
            &[],
            &[&["receive", &uri, "--serial", "stdio"], more].concat(),
        ))
    }

    /// As [`Host::receive`], started by a shell that first runs `preparation` in a mount namespace
    /// of its own, where it may change what the receiver sees of this host; `wrapper` then starts
    /// ferry. Needs root.
    pub fn receive_where(preparation: &str, wrapper: &str) -> Self {
        let args = ["receive", "tcp:127.0.0.1:0", "--serial", "stdio"];
        Self::listening(Self::start_where(preparation, wrapper, &args))
    }

    /// As [`Host::start`], in such a place.
    pub fn start_where(preparation: &str, wrapper: &str, args: &[&str]) -> Self {
        let script = format!("{preparation} && exec {wrapper} \"$@\"");
        let shell = ["unshare", "--mount", "sh", "-c", &script, "sh"];
        Self::start_in(tempfile::tempdir().unwrap(), &shell, args)
    }

    /// As [`Host::start`]; `wrapper` is a command that starts the one after it.
    pub fn start_by(wrapper: &[&str], args: &[&str]) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), wrapper, args)
    }

    /// Waits until it listens, and notes where.
    pub fn listening(mut host: Self) -> Self {
        let line = host.says("waiting on");
        let uri = line
            .split(' ')
            .find(|w| w.starts_with("tcp:") || w.starts_with("unix:"));
        host.uri = Some(uri.unwrap().to_owned());
        host
    }

    /// Any long-running command, with `--api` added.
    pub fn start(args: &[&str]) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), &[], args)
    }

    /// `wrapper` is a command that starts the one after it.
    fn start_in(dir: tempfile::TempDir, wrapper: &[&str], args: &[&str]) -> Self {
        let api = dir.path().join("api");
        let mut command = match wrapper.split_first() {
            Some((program, before)) => {
                let mut command = Command::new(program);
                command.args(before).arg(ferry());
                command
            }
            None => Command::new(ferry()),
        };
        let mut child = command
            .args(args)
            .arg("--api")
            .arg(&api)
            // Tests have their snapshots and certificates there.
            .arg("--allow")
            .arg(std::env::temp_dir())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            stdin: child.stdin.take().unwrap(),
            guest: Lines::follow(child.stdout.take().unwrap()),
            said: Lines::follow(child.stderr.take().unwrap()),
            client: Client::new(&api),
            child,
            uri: None,
            _dir: dir,
        }
    }

    /// Where it listens.
    pub fn uri(&self) -> &str {
        self.uri.as_deref().expect("a receiver")
    }

    /// The address that it listens on.
    pub fn address(&self) -> std::net::SocketAddr {
        self.uri().strip_prefix("tcp:").unwrap().parse().unwrap()
    }

    /// Its control socket.
    pub fn api(&self) -> PathBuf {
        self._dir.path().join("api")
    }

    /// Speaks to its control socket.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a line of its guest. One that goes on printing others is no hang: a kernel takes
    /// as long as it takes.
    pub fn guest_line(&self, name: &str, wanted: impl Fn(&Line<'_>) -> bool) -> String {
        let name = format!("the guest printed {name}");
        let limit = Instant::now() + 10 * TIMEOUT;
        let mut lines = Vec::new();
        loop {
            let known = lines.len();
            let is_it = |l: &String| Line::parse(l).is_some_and(|l| wanted(&l));
            if let Some(line) = lines.into_iter().find(is_it) {
                return line;
            }
            assert!(Instant::now() < limit, "waited in vain until {name}");
            lines = self.wait_for(&name, || {
                let lines = self.guest.all();
                (lines.len() > known).then_some(lines)
            });
        }
    }

    /// All that its guest printed here.
    pub fn guest_lines(&self) -> Vec<String> {
        self.guest.all()
    }

    /// Waits until it has said a line on stderr with this in it.
    pub fn says(&self, part: &str) -> String {
        self.wait_for(&format!("it said {part:?}"), || {
            self.said.all().into_iter().find(|l| l.contains(part))
        })
    }

    /// All that it said on stderr.
    pub fn said(&self) -> Vec<String> {
        self.said.all()
    }

    /// How many lines it has said: for [`Host::settles`].
    pub fn mark(&self) -> usize {
        self.said.all().len()
    }

    /// Waits until this receiver has said, since the mark, that what arrived has ended, and waits
    /// for the next.
    pub fn settles(&self, mark: usize) {
        self.wait_for("it said that it waits on", || {
            let said = self.said.all();
            let over = |l: &String| l.contains("keeps its guest") || l.contains("was refused");
            said.get(mark..)?.iter().any(over).then_some(())
        });
        self.reaches(State::Receiving);
    }

    fn wait_for<T>(&self, name: &str, mut what: impl FnMut() -> Option<T>) -> T {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            if let Some(found) = what() {
                return found;
            }
            assert!(
                Instant::now() < deadline,
                "waited in vain until {name}; guest {:#?} said {:#?}",
                self.guest.all().iter().rev().take(5).collect::<Vec<_>>(),
                self.said.all()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What `ferry status` says.
    pub fn state(&self) -> State {
        self.client
            .status()
            .unwrap_or_else(|e| panic!("{e}; it said {:#?}", self.said()))
            .state
    }

    /// Waits for a state.
    pub fn reaches(&self, state: State) {
        self.wait_for(&format!("its state is {}", state.name()), || {
            (self.state() == state).then_some(())
        });
    }

    /// Options for a migration whose outcome does not depend on how fast this machine is: whatever
    /// is still pending after a while is sent in the pause, and all memory is compared.
    pub fn options() -> Options {
        Options {
            timeout: Duration::from_secs(15),
            on_timeout: OnTimeout::Stop,
            verify: true,
            // One connection, whatever processors this host has.
            channels: Some(1),
            ..Options::default()
        }
    }

    /// Migrates and waits for the end.
    pub fn migrate(&self, uri: &str, options: &Options) -> Report {
        self.migrate_as(uri, options, &Security::default())
    }

    /// As [`Host::migrate`], secured.
    pub fn migrate_as(&self, uri: &str, options: &Options, security: &Security) -> Report {
        let request = request(uri, options, security);
        let report = self.client.migrate(&request, &mut |_| {});
        report.unwrap_or_else(|e| panic!("{e}; it said {:#?}", self.said()))
    }

    /// Migrates, expects that it completes, and checks the report.
    pub fn migrate_well(&self, uri: &str, options: &Options) -> Report {
        self.migrate_well_as(uri, options, &Security::default())
    }

    /// As [`Host::migrate_well`], secured.
    pub fn migrate_well_as(&self, uri: &str, options: &Options, security: &Security) -> Report {
        let report = self.migrate_as(uri, options, security);
        check(&report, options);
        report
    }

    /// Migrates in the background.
    pub fn begin_migration(&self, uri: &str, options: &Options) -> Migration {
        self.begin_migration_as(uri, options, &Security::default())
    }

    /// As [`Host::begin_migration`], secured.
    pub fn begin_migration_as(
        &self,
        uri: &str,
        options: &Options,
        security: &Security,
    ) -> Migration {
        let request = request(uri, options, security);
        let client = self.client.clone();
        let thread = std::thread::spawn(move || client.migrate(&request, &mut |_| {}));
        until("the migration has begun", || {
            thread.is_finished() || self.state() != State::Running && self.state() != State::Paused
        });
        Migration(thread)
    }

    /// Pause, resume, stop or cancel; the sentence of a refusal.
    pub fn act(&self, action: Action) -> Result<(), String> {
        self.client.act(action).map_err(|e| e.to_string())
    }

    /// `ferry recover`.
    pub fn recover(&self, take_over: bool) -> Result<(), String> {
        let request = RecoverRequest {
            take_over,
            ..RecoverRequest::default()
        };
        self.client.recover(&request).map_err(|e| e.to_string())
    }

    /// Tells the guest to finish.
    pub fn finish(&mut self) {
        self.stdin.write_all(&[STOP]).unwrap();
        self.stdin.flush().unwrap();
    }

    /// Tells the writer to finish, waits for its verdict and for the end of the process. Every page
    /// of the guest was verified by the guest itself then.
    pub fn verdict(mut self) -> Verdict {
        self.finish();
        let line = self.guest_line("its verdict", |line| matches!(line, Line::Verdict { .. }));
        let Some(Line::Verdict { verdict, .. }) = Line::parse(&line) else {
            unreachable!()
        };
        assert!(
            verdict.verified && verdict.corrupt == 0,
            "{line}\n{:#?}",
            self.guest_lines()
        );
        assert_eq!(self.ends(), Some(0), "{:#?}", self.said());
        verdict
    }

    /// Tells a kernel to finish and expects that the run in hand, and every one whose result was
    /// printed here, agrees with the published reference.
    pub fn result(mut self) -> u64 {
        self.finish();
        self.guest_line("its end", |line| matches!(line, Line::End));
        let mut runs = 0;
        for line in self.guest_lines() {
            if let Some(Line::Result(result)) = Line::parse(&line) {
                assert!(result.verified, "{line}");
                runs += 1;
            }
        }
        assert!(runs > 0, "{:#?}", self.guest_lines());
        assert_eq!(self.ends(), Some(0), "{:#?}", self.said());
        runs
    }

    /// Waits for the process's end, and until all that it printed was read: its exit status.
    pub fn ends(&mut self) -> Option<i32> {
        let deadline = Instant::now() + TIMEOUT;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().unwrap() {
                self.wait_for("all that it printed was read", || {
                    (self.guest.ended() && self.said.ended()).then_some(())
                });
                assert!(
                    !self.said().iter().any(|l| l.contains("panicked")),
                    "{:#?}",
                    self.said()
                );
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("the process does not end; it said {:#?}", self.said());
    }

    /// Whether the process has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Sends a signal to the process.
    pub fn signal(&self, signal: Signal) {
        kill(
            Pid::from_raw(i32::try_from(self.child.id()).unwrap()),
            signal,
        )
        .unwrap();
    }

    /// `kill -9`, and waits until it is gone.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Resident memory in bytes.
    pub fn rss(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
        line.split_ascii_whitespace()
            .nth(1)
            .unwrap()
            .parse::<u64>()
            .unwrap()
            << 10
    }

    /// Expects that the guest runs here: the state says so, and it prints another line.
    pub fn proves_running(&self) {
        assert_eq!(self.state(), State::Running, "{:#?}", self.said());
        let before = self.guest.all().len();
        self.wait_for("the guest printed another line", || {
            (self.guest.all().len() > before).then_some(())
        });
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if !std::thread::panicking() {
            assert!(
                !self.said().iter().any(|l| l.contains("panicked")),
                "{:#?}",
                self.said()
            );
        }
    }
}

fn request(uri: &str, options: &Options, security: &Security) -> MigrateRequest {
    MigrateRequest {
        uri: uri.to_owned(),
        options: options.clone(),
        detach: false,
        tls: security.tls.clone(),
        pair: security.pair.clone(),
    }
}
