//! `ferry` processes in a nested host: what [`Host`](crate::Host) is on this one.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use ferry_guest_images::linux::Kernel;
use ferry_guest_images::nested::{Cable, Config, Nested, Process, QEMU, Ran};
use ferry_guest_images::{Lap, Line, Verdict};
use ferry_migration::report::{Report, Status};

use crate::ferry;

/// How long anything may take in a nested host before the test calls it a hang: it is emulated, and
/// shares its processors with other tests.
pub const NESTED_TIMEOUT: Duration = Duration::from_secs(400);

/// A test's turn: nested hosts are emulated, and two tests at a time would only be slower.
pub type Turn = MutexGuard<'static, ()>;

/// Waits for this test's turn, where nested hosts run; says so loudly where they do not.
pub fn nested_hosts() -> Option<Turn> {
    static READY: OnceLock<Result<(), String>> = OnceLock::new();
    static TURN: Mutex<()> = Mutex::new(());
    if let Err(why) = READY.get_or_init(ready) {
        eprintln!("NOT RUN: Linux guests in a nested host ({why})");
        return None;
    }
    // A test that failed leaves nothing behind that the next could trip over.
    Some(TURN.lock().unwrap_or_else(PoisonError::into_inner))
}

fn ready() -> Result<(), String> {
    let qemu = Command::new(QEMU).arg("--version").output();
    if !qemu.is_ok_and(|o| o.status.success()) {
        return Err(format!(
            "{QEMU} is not here: apt-get install qemu-system-x86"
        ));
    }
    Kernel::get(&|sentence| eprintln!("{sentence}"))
        .map(drop)
        .map_err(|e| e.to_string())
}

/// A nested host with this `ferry` in it.
#[derive(Debug)]
pub struct NestedHost {
    nested: Nested,
    address: String,
}

impl NestedHost {
    /// One by itself.
    pub fn start() -> Self {
        Self::start_with(Config::default())
    }

    /// One by itself with so much memory.
    pub fn start_of(memory_mib: u32) -> Self {
        Self::start_with(Config {
            memory_mib,
            ..Config::default()
        })
    }

    /// One by itself with so many pages of 2 MiB in its pool of huge pages.
    pub fn start_with_pool(huge_pages: u32) -> Self {
        Self::start_with(Config {
            huge_pages,
            ..Config::default()
        })
    }

    /// One by itself with two NUMA nodes, of a processor and half of the memory each, and a third
    /// that has a processor only; and so many pages of 2 MiB in their pools together.
    pub fn start_with_nodes(huge_pages: u32) -> Self {
        Self::start_with(Config {
            nodes: 2,
            cpus: 3,
            huge_pages,
            ..Config::default()
        })
    }

    /// One by itself, with further files.
    pub fn start_with_files(files: Vec<(PathBuf, Vec<u8>)>) -> Self {
        Self::start_with(Config {
            files,
            ..Config::default()
        })
    }

    /// One by itself, with a further program.
    pub fn start_with_program(program: &Path) -> Self {
        Self::start_with(Config {
            programs: vec![program.to_owned()],
            ..Config::default()
        })
    }

    /// Two that are joined by a cable.
    pub fn pair() -> (Self, Self, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let start = |first, last| {
            Self::start_with(Config {
                cable: Some(Cable {
                    socket: dir.path().join("cable"),
                    first,
                    address: [10, 9, 0, last],
                }),
                ..Config::default()
            })
        };
        let (first, second) = (start(true, 1), start(false, 2));
        (first, second, dir)
    }

    fn start_with(config: Config) -> Self {
        let cable = config.cable.as_ref();
        let address = cable.map_or([127, 0, 0, 1], |c| c.address);
        let config = Config {
            programs: [&[ferry().to_owned()], config.programs.as_slice()].concat(),
            ..config
        };
        let start = || {
            Nested::start(&config, &|sentence| eprintln!("{sentence}")).map_err(|e| e.to_string())
        };
        // An assertion of QEMU's own while the host boots, before there is a ferry in it: seen
        // once.
        let nested = start().or_else(|error| {
            if !error.contains("Assertion") {
                return Err(error);
            }
            eprintln!("another nested host is started, since QEMU failed inside: {error}");
            start()
        });
        let nested = nested.unwrap_or_else(|e| panic!("{e}"));
        eprintln!(
            "a nested host is up after {:.1} s",
            nested.took().as_secs_f64()
        );
        Self {
            nested,
            address: std::net::Ipv4Addr::from(address).to_string(),
        }
    }

    /// Runs a program to its end.
    pub fn run(&self, arguments: &[&str]) -> Ran {
        self.nested
            .run(arguments, NESTED_TIMEOUT)
            .unwrap_or_else(|e| panic!("{arguments:?}: {e}; {}", self.tasks()))
    }

    /// What all threads in it are doing, and what it printed last, for messages.
    pub fn tasks(&self) -> String {
        /// One that answers does so within seconds; one that does not has told enough.
        const TIMEOUT: Duration = Duration::from_secs(30);
        let tasks = match self.nested.run(&["/init", "tasks"], TIMEOUT) {
            Ok(ran) => ran.stdout,
            Err(e) => format!("what its threads are doing is not known ({e})"),
        };
        format!("{tasks}; its console: {}", self.nested.console())
    }

    /// `ferry run` with these options, whose guest is on its console.
    pub fn guest(&self, arguments: &[&str]) -> NestedVmm<'_> {
        NestedVmm::start(self, &[&["run"], arguments].concat())
    }

    /// `ferry restore` of a file of this host.
    pub fn restore(&self, path: &str) -> NestedVmm<'_> {
        self.restore_with(path, &[])
    }

    /// As [`NestedHost::restore`], with these options.
    pub fn restore_with(&self, path: &str, options: &[&str]) -> NestedVmm<'_> {
        NestedVmm::start(self, &[&["restore", path], options].concat())
    }

    /// Runs a program that must succeed; what it printed.
    pub fn run_well(&self, arguments: &[&str]) -> String {
        let ran = self.run(arguments);
        assert_eq!(ran.code, 0, "{arguments:?}: {ran:?}");
        ran.stdout
    }

    /// A bridge with this host's address (`10.9.0.1/24`) that joins these interfaces and new taps
    /// for guests' cards.
    pub fn bridge(&self, address: &str, interfaces: &[&str], taps: &[&str]) {
        for tap in taps {
            self.run_well(&["/init", "tap", tap]);
        }
        let network = format!("br0={address}");
        let command = [&["/init", "bridge", &network], interfaces, taps].concat();
        self.run_well(&command);
    }

    /// A client that makes requests to a guest's server, on one connection, from now on.
    pub fn client(&self, server: &str) -> NestedClient<'_> {
        let process = self.nested.spawn(&["/init", "client", server]);
        NestedClient {
            host: self,
            process: process.unwrap_or_else(|e| panic!("{e}")),
            laps: 0,
        }
    }

    /// Starts a program.
    pub fn program(&self, arguments: &[&str]) -> Process {
        let process = self.nested.spawn(arguments);
        process.unwrap_or_else(|e| panic!("{arguments:?}: {e}"))
    }

    /// `ferry receive` on a free port of this host, once it listens.
    pub fn receive(&self) -> NestedVmm<'_> {
        self.receive_with(&[])
    }

    /// As [`NestedHost::receive`], with these devices.
    pub fn receive_with(&self, devices: &[&str]) -> NestedVmm<'_> {
        self.receive_at(&format!("tcp:{}:0", self.address), devices)
    }

    /// `ferry receive` at `uri` with these devices, once it listens.
    pub fn receive_at(&self, uri: &str, devices: &[&str]) -> NestedVmm<'_> {
        let scheme = uri.split_inclusive(':').next().unwrap_or_default();
        let secured = devices.contains(&"--tls");
        let open: &[&str] = if secured { &[] } else { &["--insecure"] };
        let mut vmm = NestedVmm::start(self, &[&["receive", uri], open, devices].concat());
        let uri = vmm.process.until(NESTED_TIMEOUT, |_, said| {
            said.split_ascii_whitespace()
                .find(|w| w.starts_with(scheme))
                .map(str::to_owned)
        });
        vmm.uri = uri.unwrap_or_else(|| panic!("it does not listen; {}", vmm.all()));
        vmm
    }
}

/// Types a line at a guest's [console](NestedVmm::console), and waits for a line of the answer that
/// has this part.
pub fn asks(console: &Process, line: &str, part: &str) -> String {
    let before = console.stdout().len();
    console.input(format!("{line}\n").as_bytes()).unwrap();
    let answer = console.until(NESTED_TIMEOUT, |out, _| {
        // Whole lines only; a terminal ends them with a carriage return, too.
        let mut lines = out.get(before..)?.split_inclusive('\n');
        let line = lines.find(|line| line.ends_with('\n') && line.contains(part))?;
        Some(line.trim_end().to_owned())
    });
    let (out, said) = (console.stdout(), console.stderr());
    answer.unwrap_or_else(|| panic!("never {part:?} for {line:?}; {out} {said}"))
}

/// A client in a nested host; see `ferry_linux_init::client`.
#[derive(Debug)]
pub struct NestedClient<'a> {
    host: &'a NestedHost,
    process: Process,
    laps: u64,
}

impl NestedClient<'_> {
    /// What it saw since the last lap. None of its requests may have been lost, changed or answered
    /// out of turn.
    pub fn lap(&mut self) -> Lap {
        self.laps += 1;
        self.process.input(b"l").unwrap();
        let lap = self.process.until(NESTED_TIMEOUT, |out, _| {
            out.lines()
                .filter_map(Lap::parse)
                .find(|lap| lap.number == self.laps)
        });
        let lap = lap.unwrap_or_else(|| panic!("{} {}", self.said(), self.host.tasks()));
        assert_eq!(lap.answered, lap.made, "{lap}");
        lap
    }

    /// It ends, still on its one connection.
    pub fn ends(self) {
        self.process.end_input().unwrap();
        let ran = self.process.wait(NESTED_TIMEOUT);
        let ran = ran.unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(ran.code, 0, "{ran:?}");
        assert_eq!(ran.stdout.matches("connected to").count(), 1, "{ran:?}");
    }

    fn said(&self) -> String {
        format!("{}\n{}", self.process.stdout(), self.process.stderr())
    }
}

/// A `ferry` process in a nested host that is a guest's VMM; dropping it kills it.
#[derive(Debug)]
pub struct NestedVmm<'a> {
    host: &'a NestedHost,
    process: Process,
    api: String,
    uri: String,
}

impl<'a> NestedVmm<'a> {
    fn start(host: &'a NestedHost, arguments: &[&str]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let api = format!("/tmp/{}.sock", COUNT.fetch_add(1, Ordering::Relaxed));
        let command = [&["ferry"], arguments, &["--api", &api, "--allow", "/tmp"]].concat();
        let process = host
            .nested
            .spawn(&command)
            .unwrap_or_else(|e| panic!("{e}"));
        Self {
            host,
            process,
            api,
            uri: String::new(),
        }
    }

    /// Where it listens.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// All that it and its guest have printed, for messages.
    pub fn all(&self) -> String {
        format!("{}\n{}", self.process.stdout(), self.process.stderr())
    }

    /// [`NestedVmm::all`], and how its host is, for messages about what should not be.
    fn trouble(&self) -> String {
        format!("{}\n{}", self.all(), self.host.tasks())
    }

    /// Waits for a part of its guest's output.
    pub fn prints(&self, part: &str) {
        self.awaits("the guest never printed", part, |out, _| out.contains(part));
    }

    /// Waits for a part of what the program itself says.
    pub fn says(&self, part: &str) {
        self.awaits("it never said", part, |_, said| said.contains(part));
    }

    fn awaits(&self, never: &str, part: &str, has: impl Fn(&str, &str) -> bool) {
        let found = self
            .process
            .until(NESTED_TIMEOUT, |out, said| has(out, said).then_some(()));
        assert!(found.is_some(), "{never} {part:?}; {}", self.trouble());
    }

    /// Waits for a whole line of its guest.
    pub fn line_with(&self, wanted: impl Fn(&str) -> bool) -> String {
        let found = self.process.until(NESTED_TIMEOUT, |out, _| {
            let mut whole = out.split_inclusive('\n').filter(|l| l.ends_with('\n'));
            whole.find(|line| wanted(line)).map(str::to_owned)
        });
        found.unwrap_or_else(|| panic!("the guest never printed that line; {}", self.trouble()))
    }

    /// Waits for a line of its guest that `wanted` makes something of.
    pub fn line<T>(&self, name: &str, wanted: impl Fn(&Line<'_>) -> Option<T>) -> T {
        let found = self.process.until(NESTED_TIMEOUT, |out, _| {
            out.lines()
                .filter_map(Line::parse)
                .find_map(|line| wanted(&line))
        });
        found.unwrap_or_else(|| panic!("the guest never printed {name}; {}", self.trouble()))
    }

    /// Waits for a line that its guest's writer prints here, once a second while it runs.
    pub fn goes_on(&self) {
        self.line("a line of its writer", |line| {
            matches!(line, Line::Stat { .. }).then_some(())
        });
    }

    /// Waits until its guest's disk writer (`ferry.disk=`) has made and verified this many writes;
    /// how many it has made.
    pub fn disk_writes(&self, at_least: u64) -> u64 {
        let found = self.process.until(NESTED_TIMEOUT, |out, _| {
            assert!(!out.contains("CORRUPT"), "{out}");
            out.lines()
                .filter_map(|l| {
                    let writes = l.trim_end().strip_prefix("ferry-disk: writes=")?;
                    writes.strip_suffix(" corrupt=0")?.parse().ok()
                })
                .find(|writes| *writes >= at_least)
        });
        found.unwrap_or_else(|| panic!("fewer than {at_least} writes; {}", self.trouble()))
    }

    /// The longest time that the guest itself stood still, by the lines that it printed here once a
    /// second, in milliseconds.
    pub fn longest_gap_ms(&self) -> u64 {
        let out = self.process.stdout();
        let gaps = out.lines().filter_map(Line::parse).filter_map(|l| match l {
            Line::Stat { gaps, .. } => Some(gaps.last_us / 1000),
            _ => None,
        });
        gaps.max().unwrap_or(0)
    }

    /// Types a line on the guest's console.
    pub fn types(&self, line: &str) {
        self.process.input(format!("{line}\n").as_bytes()).unwrap();
    }

    /// `ferry console` about this VMM: stdin is typed at the guest's console, and what the guest
    /// prints there from then on is stdout.
    pub fn console(&self) -> Process {
        self.host.program(&["ferry", "console", "--api", &self.api])
    }

    /// Its process in its host.
    pub fn pid(&self) -> u32 {
        let status = self.command(&["status", "--json"]);
        let status: serde_json::Value = serde_json::from_str(&status.stdout).unwrap();
        status["pid"]
            .as_u64()
            .and_then(|pid| pid.try_into().ok())
            .unwrap()
    }

    /// A command about this VMM, to its end.
    pub fn command(&self, arguments: &[&str]) -> Ran {
        self.host
            .run(&[&["ferry"], arguments, &["--api", &self.api]].concat())
    }

    /// Migrates to `uri` with these further options and expects that all went well; with
    /// `--verify`, that all memory is equal.
    pub fn migrate(&self, uri: &str, options: &[&str]) -> Report {
        let ran = self.command(&[&["migrate", uri, "--json"], options].concat());
        let report: Report = serde_json::from_str(&ran.stdout)
            .unwrap_or_else(|e| panic!("{e}: {ran:?}; {}", self.trouble()));
        let verified = options.contains(&"--verify").then_some(true);
        assert_eq!(
            (report.status, report.verified),
            (Status::Completed, verified),
            "{report:#?} {}",
            self.trouble()
        );
        report
    }

    /// Waits for its end, which must be a success; what it said.
    pub fn ends(self) -> Ran {
        let ran = self
            .process
            .wait(NESTED_TIMEOUT)
            .unwrap_or_else(|e| panic!("{e}"));
        assert!(!ran.stderr.contains("panicked"), "{ran:?}");
        ran
    }

    /// Tells the guest's writer to finish, and expects that no page was ever wrong.
    pub fn verdict(self) -> Verdict {
        self.types("q");
        let verdict = self.line("its verdict", |line| match line {
            Line::Verdict { verdict, .. } => Some(*verdict),
            _ => None,
        });
        assert!(verdict.verified && verdict.corrupt == 0, "{}", self.all());
        let ran = self.ends();
        assert_eq!(ran.code, 0, "{ran:?}");
        verdict
    }
}
