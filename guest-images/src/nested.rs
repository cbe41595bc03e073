//! A nested host: a whole Linux machine with hardware KVM, emulated by QEMU.
//!
//! Where this machine has no KVM, or one that cannot run Linux guests, QEMU's TCG emulates a
//! machine with AMD's SVM, and in it Debian's kernel has a complete KVM. It is slow (some twenty
//! times slower than hardware) and faithful; QEMU needs no KVM, no root and no network for it. Two
//! of them can be joined by a cable: then a migration between them crosses two kernels and their
//! network stacks.
//!
//! ```text
//!   this process                        QEMU ── Debian's kernel ── init, as agent
//!     Nested::start ─── token ────────────────────────▶ command line
//!     listens ◀────────────────────── TCP, QEMU's user network ─── Hello(token)
//!     spawn ────────────────────────────────────────▶ Run, and so on: ferry_linux_init::frames
//! ```
//!
//! [`Nested::spawn`] runs a program in it; dropping the [`Nested`] ends QEMU, and if this process
//! dies the agent notices and powers the machine off.

mod process;
mod program;

use std::fs;
use std::io;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

pub use process::{Process, Ran};
pub use program::program;

use crate::linux::{CONSOLE_MODULES, GUEST_MODULES, Kernel, LinuxError, RamDisk, VSOCK_MODULES};

/// The emulator.
pub const QEMU: &str = "qemu-system-x86_64";

/// What the nested host's kernel needs: KVM, network, what tests shape networks with, and what
/// codes the records of TLS: it has no modprobe.
const HOST_MODULES: &[&str] = &[
    "kvm-amd",
    "virtio_pci",
    "virtio_net",
    "virtio-rng",
    "tun",
    "bridge",
    "sch_netem",
    "sch_tbf",
    "tls",
    "gcm",
    "ctr",
    "ghash-generic",
];

/// How long it may take until the agent reports. Seven seconds are usual; this is for machines that
/// hang.
const PATIENCE: Duration = Duration::from_secs(180);
const LOOK: Duration = Duration::from_millis(20);

/// Where the nested host's own copy of the kernel lies: ferry there finds it as it does here.
const CACHE: &str = "cache";

/// Why there is no nested host.
#[derive(Debug, thiserror::Error)]
pub enum NestedError {
    /// The kernel.
    #[error(transparent)]
    Linux(#[from] LinuxError),
    /// No emulator.
    #[error("{QEMU} cannot be started ({0}); it is in Debian's package qemu-system-x86")]
    Qemu(io::Error),
    /// It ended, or never reported.
    #[error("the nested host {0}; its console ended with: {1}")]
    Ended(String, String),
    /// A file on this side.
    #[error("{path}, which the nested host needs, cannot be {what} ({source})")]
    Io {
        /// Read, written or made.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A program that should run there.
    #[error("{0} cannot be brought into the nested host: {1}")]
    Program(PathBuf, String),
    /// The way to the agent.
    #[error("the nested host's agent cannot be reached ({0})")]
    Agent(#[from] io::Error),
}

/// A cable between two nested hosts.
#[derive(Clone, Debug)]
pub struct Cable {
    /// A Unix socket that stands for it.
    pub socket: PathBuf,
    /// Whether this end makes the socket: the host that is started first.
    pub first: bool,
    /// This end's address.
    pub address: [u8; 4],
}

/// A nested host to be started.
#[derive(Clone, Debug)]
pub struct Config {
    /// RAM in MiB.
    pub memory_mib: u32,
    /// Processors.
    pub cpus: u32,
    /// Programs of this machine to take along, with the libraries that they need: at `/bin/NAME`.
    pub programs: Vec<PathBuf>,
    /// Further files to take along: where they are there, and their bytes.
    pub files: Vec<(PathBuf, Vec<u8>)>,
    /// A cable to another one.
    pub cable: Option<Cable>,
    /// Pages of 2 MiB in its pool of huge pages, of its RAM.
    pub huge_pages: u32,
    /// NUMA nodes, among which RAM and processors are shared out evenly; processors that are left
    /// over are a node without memory. 0 says nothing of nodes.
    pub nodes: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            memory_mib: 2048,
            cpus: 2,
            programs: Vec::new(),
            files: Vec::new(),
            cable: None,
            huge_pages: 0,
            nodes: 0,
        }
    }
}

/// A nested host that runs.
#[derive(Debug)]
pub struct Nested {
    qemu: Mutex<Child>,
    listener: TcpListener,
    token: String,
    dir: tempfile::TempDir,
    took: Duration,
}

impl Nested {
    /// Starts a nested host and waits until its agent reports. `tell` gets a sentence when the
    /// kernel has to be downloaded.
    ///
    /// # Errors
    /// [`NestedError`].
    pub fn start(config: &Config, tell: &dyn Fn(&str)) -> Result<Self, NestedError> {
        let kernel = Kernel::get(tell)?;
        let dir = tempfile::Builder::new().prefix("ferry-nested-").tempdir()?;
        let initrd = dir.path().join("initrd");
        fs::write(&initrd, ram_disk(&kernel, config)?).map_err(failed("written", &initrd))?;
        let listener = TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        let mut token = [0; 16];
        getrandom::fill(&mut token).map_err(io::Error::other)?;
        let token: String = token.iter().map(|b| format!("{b:02x}")).collect();
        let report_to = format!("10.0.2.2:{},{token}", listener.local_addr()?.port());
        let began = Instant::now();
        let mut command = qemu(
            config,
            &kernel.image()?,
            &initrd,
            &dir.path().join("console"),
            &report_to,
        );
        let errors = dir.path().join("errors");
        let errors = fs::File::create(&errors).map_err(failed("written", &errors))?;
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(errors);
        let second = config.cable.as_ref().is_some_and(|cable| !cable.first);
        let child = on_one_processor(usize::from(second), || command.spawn());
        let mut nested = Self {
            qemu: Mutex::new(child.map_err(NestedError::Qemu)?),
            listener,
            token,
            dir,
            took: Duration::ZERO,
        };
        // A first command proves that all of it works.
        nested
            .spawn(&["/init", "cat", "/proc/version"])?
            .wait(PATIENCE)?;
        nested.took = began.elapsed();
        Ok(nested)
    }

    /// How long it took from QEMU's start until the agent answered.
    #[must_use]
    pub fn took(&self) -> Duration {
        self.took
    }

    /// Starts a program in the nested host, found in `/bin` or by its path.
    ///
    /// # Errors
    /// [`NestedError`]; a program that cannot be started says so when it is waited for.
    pub fn spawn(&self, arguments: &[&str]) -> Result<Process, NestedError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    if let Some(process) = Process::start(stream, &self.token, arguments)? {
                        return Ok(process);
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(LOOK),
                Err(e) => return Err(e.into()),
            }
            let status = self
                .qemu
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .try_wait()?;
            if let Some(status) = status {
                return Err(NestedError::Ended(
                    format!("ended ({status})"),
                    self.console(),
                ));
            }
            if Instant::now() > deadline {
                return Err(NestedError::Ended(
                    format!("did not report within {PATIENCE:?}"),
                    self.console(),
                ));
            }
        }
    }

    /// Runs a program to its end.
    ///
    /// # Errors
    /// [`NestedError`]; also when it takes longer than `patience`.
    pub fn run(&self, arguments: &[&str], patience: Duration) -> Result<Ran, NestedError> {
        self.spawn(arguments)?.wait(patience)
    }

    /// The last lines that it and QEMU printed, and how QEMU ended if it has.
    #[must_use]
    pub fn console(&self) -> String {
        let read = |name: &str| fs::read(self.dir.path().join(name)).unwrap_or_default();
        let text = [read("console"), read("errors")].concat();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text
            .lines()
            .map(str::trim_end)
            .filter(|l| !l.is_empty())
            .collect();
        let said = lines[lines.len().saturating_sub(12)..].join(" | ");
        let mut qemu = self.qemu.lock().unwrap_or_else(PoisonError::into_inner);
        match qemu.try_wait() {
            Ok(Some(status)) => format!("{said} | QEMU has ended ({status})"),
            _ => said,
        }
    }
}

impl Drop for Nested {
    fn drop(&mut self) {
        let qemu = self.qemu.get_mut().unwrap_or_else(PoisonError::into_inner);
        // Gone already is as good.
        let _ = qemu.kill();
        let _ = qemu.wait();
    }
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> NestedError {
    let path = path.to_owned();
    move |source| NestedError::Io { what, path, source }
}

/// init and modules, the programs, and a kernel for the guests.
fn ram_disk(kernel: &Kernel, config: &Config) -> Result<Vec<u8>, NestedError> {
    let mut disk = RamDisk::new(&kernel.modules(HOST_MODULES)?)?;
    for path in &config.programs {
        for (place, bytes) in program(path)? {
            disk.add(&place, &bytes)?;
        }
    }
    for (place, bytes) in &config.files {
        disk.add(place, bytes)?;
    }
    let modules = [GUEST_MODULES, VSOCK_MODULES, CONSOLE_MODULES].concat();
    for (file, bytes) in kernel.export(&kernel.modules(&modules)?)? {
        disk.add(&Path::new(CACHE).join(file), &bytes)?;
    }
    Ok(disk.finish())
}

/// Starts a process that inherits this thread's affinity: on the processor that comes `nth` among
/// those that we may use.
///
/// QEMU's emulation of SVM is not safe against QEMU's own threads: where they truly run at the same
/// time, guests that are not migrated triple-fault or hang within a minute, and now and then the
/// nested host itself (seen in 7.2.22 and 10.0.2, with `thread=multi` and `thread=single`: most
/// runs of a Linux guest on two processors, none on one). Its virtual processors still interleave
/// wherever the scheduler takes the one away, and two nested hosts have one each.
fn on_one_processor<T>(nth: usize, start: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let all = sched_getaffinity(None)?;
    let allowed: Vec<usize> = (0..CpuSet::MAX_CPU)
        .filter(|&cpu| all.is_set(cpu))
        .collect();
    let mut one = CpuSet::new();
    match allowed.get(nth % allowed.len().max(1)) {
        Some(&cpu) => one.set(cpu),
        None => return start(),
    }
    sched_setaffinity(None, &one)?;
    let started = start();
    sched_setaffinity(None, &all)?;
    started
}

fn qemu(config: &Config, kernel: &Path, initrd: &Path, console: &Path, report_to: &str) -> Command {
    let mut cmdline = format!(
        "console=ttyS0 quiet panic=-1 mitigations=off ferry.role=host ferry.agent={report_to} \
         ferry.net=eth0=10.0.2.15/24,10.0.2.2"
    );
    if config.huge_pages > 0 {
        cmdline.push_str(&format!(" hugepagesz=2M hugepages={}", config.huge_pages));
    }
    if let Some(khz) = ferry_linux_init::tsc::measure_khz() {
        cmdline.push_str(&format!(" tsc=reliable tsc_early_khz={khz}"));
    }
    let mut command = Command::new(QEMU);
    command.args([
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
    ]);
    // TCG's SVM does not intercept XSETBV (seen in QEMU 7.2): KVM there would never learn of a
    // guest's XCR0, and tell it a wrong size of its own state. Without XSAVE there is nothing to be
    // wrong about.
    command.args(["-M", "q35", "-accel", "tcg,thread=multi"]);
    command.args(["-cpu", "max,xsave=off"]);
    command
        .arg("-smp")
        .arg(config.cpus.to_string())
        .arg("-m")
        .arg(config.memory_mib.to_string());
    for node in 0..config.nodes {
        let (mib, cpus) = (config.memory_mib / config.nodes, config.cpus / config.nodes);
        let (first, last) = (node * cpus, (node + 1) * cpus - 1);
        command.args([
            "-object",
            &format!("memory-backend-ram,id=node{node},size={mib}M"),
        ]);
        command.args([
            "-numa",
            &format!("node,nodeid={node},cpus={first}-{last},memdev=node{node}"),
        ]);
    }
    if config.nodes > 0 && !config.cpus.is_multiple_of(config.nodes) {
        let (node, last) = (config.nodes, config.cpus - 1);
        let first = config.cpus / node * node;
        command.args(["-numa", &format!("node,nodeid={node},cpus={first}-{last}")]);
    }
    command
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initrd);
    command
        .arg("-serial")
        .arg(format!("file:{}", console.display()));
    // Without the cards' boot code: there is nothing to boot from, and Debian packs it separately.
    command.args([
        "-netdev",
        "user,id=host",
        "-device",
        "virtio-net-pci,netdev=host,romfile=",
    ]);
    command.args(["-device", "virtio-rng-pci"]);
    if let Some(cable) = &config.cable {
        let server = if cable.first { "on" } else { "off" };
        let path = cable.socket.display();
        command.arg("-netdev").arg(format!(
            "stream,id=cable,server={server},addr.type=unix,addr.path={path}"
        ));
        let [a, b, c, d] = cable.address;
        command.arg("-device").arg(format!(
            "virtio-net-pci,netdev=cable,romfile=,mac=52:54:{a:02x}:{b:02x}:{c:02x}:{d:02x}"
        ));
        cmdline.push_str(&format!(" ferry.net=eth1={a}.{b}.{c}.{d}/24"));
    }
    command.arg("-append").arg(cmdline);
    command
}
