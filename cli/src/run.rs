//! `ferry run`.

use super::balloon::Setting;
use super::devices::{self, VsockFile};
use super::lines::Opened;
use super::memory::Memory;
use super::numa::{self, NodeOption};
use super::observe;
use super::outcome::Ended;
use super::passed::Api;
use super::sandbox;
use super::serial::Serial;
use super::serve::{Signals, serve, setup};
use super::socket::ControlSocket;
use ferry_guest_images::linux::{self, CONSOLE_MODULES, GUEST_MODULES, RamDisk, VSOCK_MODULES};
use ferry_guest_images::{BARE, MAX_CPUS, Manner, Workload};
use ferry_migration::options::Tracking;
use ferry_terminal::flags::choice;
use ferry_terminal::names::GuestName;
use ferry_terminal::output::{Failure, say};
use ferry_terminal::timeline::Timeline;
use ferry_terminal::units::{duration, memory};
use ferry_vmm::api::types::{BalloonRequest, Boot, MemoryRequest};
use ferry_vmm::boot::Kernel;
use ferry_vmm::doctor::cpuid_is_native;
use ferry_vmm::machine::{Backends, CpuModel, Machine};
use ferry_vmm::memory::Backing;
use ferry_vmm::sandbox::Files;
use ferry_vmm::vmm::{Guest, GuestBalloon, MachineGuest, Vmm};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::io::Write;
use std::ops::RangeInclusive;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// RAM of `--linux` where none is asked for.
const LINUX_MEMORY: u64 = 256 << 20;
/// A thread that was woken is in the guest long before.
const FIRST_ENTRY: Duration = Duration::from_secs(5);
/// Of --cpu, where CPUID is native.
const UNHIDDEN: &str = "this host's KVM hides nothing of its CPU from guests: --cpu decides where the guest may move, \
                        and the guest may use features that are not everywhere there";
/// There is no PCI, and looking for it takes time; a guest that panics shall end.
const LINUX_CMDLINE: &str = "console=ttyS0 quiet panic=-1 pci=off";

/// Boot a guest and be its VMM until it ends or moves away.
///
/// With a terminal as its console: Ctrl-A x ends the guest, Ctrl-A h shows the keys. SIGINT and
/// SIGTERM end the guest too; a migration that is under way is cancelled first.
///
/// A guest file has these options as TOML: `cpus = 2`, `disk = ["a.img"]`, `balloon = true`. What
/// stands beside it on the command line wins.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  ferry run --nas dirty:wss=64M,rate=2000 --name web
  ferry run --linux --cpus 2 --name web
  ferry run --kernel vmlinux --initrd initrd.img --cmdline console=ttyS0 --memory 512M --cpus 2 --api /tmp/a.sock
  ferry run --linux --name web --print-config >web.toml
  ferry run web.toml --cpus 4")]
#[command(group = clap::ArgGroup::new("guest").required(true))]
pub struct Args {
    /// A guest file.
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
    /// Print the guest file of this command line instead of running it.
    #[arg(long, help_heading = "VMM")]
    print_config: bool,
    /// The kernel: an ELF file (PVH or vmlinux) or a bzImage.
    #[arg(
        long,
        value_name = "PATH",
        group = "guest",
        requires = "memory",
        help_heading = "Guest"
    )]
    kernel: Option<PathBuf>,
    /// The built-in bare guest's work: KERNEL.CLASS such as mg.A (ep is cg mg ft bt sp; S W A B C),
    /// dirty:… or idle:….
    #[arg(long, value_name = "WORK", group = "guest", value_parser = Workload::parse, help_heading = "Guest")]
    nas: Option<Workload>,
    /// Debian's kernel for clouds (downloaded once, see FERRY_CACHE) with ferry's own init: HTTP on
    /// port 80, commands on the console, and the work that --cmdline names, such as ferry.run=mg.S.
    #[arg(long, group = "guest", help_heading = "Guest")]
    linux: bool,
    /// An initial RAM disk.
    #[arg(long, value_name = "PATH", requires = "kernel", help_heading = "Guest")]
    initrd: Option<PathBuf>,
    /// The kernel's command line; with --linux, what to add to it.
    #[arg(
        long,
        value_name = "TEXT",
        conflicts_with = "nas",
        help_heading = "Guest"
    )]
    cmdline: Option<String>,
    /// How often --nas runs its kernel; 0 is until it is told to stop.
    #[arg(long, value_name = "TIMES", requires = "nas", help_heading = "Guest")]
    repeat: Option<u64>,
    /// How often --nas prints a line about its progress; every second without it.
    #[arg(long, value_name = "TIME", requires = "nas", value_parser = stat_interval, help_heading = "Guest")]
    stat: Option<Duration>,
    /// How often --nas sends a zero byte between its lines, a sign of life for programs that read
    /// the serial port.
    #[arg(long, value_name = "TIME", requires = "nas", value_parser = beat_interval, help_heading = "Guest")]
    beat: Option<Duration>,
    /// RAM, such as 512M; what the work needs, with --nas; 256M with --linux. With max= the guest
    /// has a balloon and can grow to MAX: see `ferry set`.
    #[arg(long, value_name = "SIZE[,max=MAX]", help_heading = "Machine")]
    memory: Option<Memory>,
    /// Virtual processors.
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Machine")]
    cpus: u32,
    /// A NUMA node of the guest, for each node once: its processors and its memory, which add up to
    /// --cpus and --memory. With host= it is on that node of this host and nowhere else; otherwise
    /// on one that is chosen by free memory and load. distance= is how far it is from each node, as
    /// the guest is told; without it, 10 from itself and 20 from the others.
    #[arg(
        long,
        value_name = "cpus=A-B,memory=SIZE[,host=N][,distance=D:D…]",
        help_heading = "Machine"
    )]
    numa: Vec<NodeOption>,
    /// The CPU that the guest sees: the host's, x86-64-v2, -v3 or -v4, or that of a file of
    /// `ferry doctor --baseline`; without the features that follow, such as host,-avx512f. It keeps
    /// it for good, and moves only to hosts that have all of it.
    #[arg(
        long,
        value_name = "CPU[,-FEATURE…]",
        default_value = "host",
        help_heading = "Machine"
    )]
    cpu: String,
    /// The control socket to make; by default that of --name, or one in $XDG_RUNTIME_DIR or /tmp.
    /// Or one that listens already: the open descriptor N (fd:N), or systemd's with
    /// FileDescriptorName=api (systemd) or another (systemd:NAME).
    #[arg(long, value_name = "SOCKET", help_heading = "VMM")]
    api: Option<Api>,
    /// Where the serial port goes: stdio, file:PATH, pty (for `ferry console`) or null.
    #[arg(
        long,
        value_name = "WHERE",
        default_value = "stdio",
        help_heading = "VMM"
    )]
    serial: Serial,
    /// The old name of --memory-backing hugetlb.
    #[arg(long, conflicts_with = "memory_backing", help_heading = "Machine")]
    hugepages: bool,
    /// How the pages that the guest dirties are found while it is migrated: by KVM's log, by its
    /// rings, or auto.
    #[arg(long, value_name = "HOW", default_value = "auto", value_parser = choice::<Tracking>(), help_heading = "Machine")]
    dirty: Tracking,
    /// The guest's name, by which commands on this host find it; one guest has it at a time.
    #[arg(long, value_name = "NAME", help_heading = "VMM")]
    name: Option<GuestName>,
    #[command(flatten)]
    devices: devices::Args,
    #[command(flatten)]
    sandbox: sandbox::Args,
    #[command(flatten)]
    observe: observe::Args,
    /// A memory balloon: the guest can give memory back to the host, and says how much it has free.
    /// With auto it gives what it does not use, every 5s, and gets it back when it is short; see
    /// `ferry balloon`.
    #[arg(
        long,
        value_name = "auto|SIZE",
        num_args = 0..=1,
        default_missing_value = "on",
        value_parser = Setting::parse, help_heading = "Machine")]
    balloon: Option<Setting>,
    /// Where to write when each stage of the start was reached, for ferry bench boot.
    #[arg(long, value_name = "PATH", hide = true)]
    timeline: Option<PathBuf>,
}

/// What the bare guest takes for the time between two lines.
fn stat_interval(text: &str) -> Result<Duration, String> {
    let refusal = "the guest prints a line every 20ms to 60s; give a time between";
    interval(text, &Manner::STAT_MS, refusal)
}

/// What the bare guest takes for the time between two signs of life.
fn beat_interval(text: &str) -> Result<Duration, String> {
    let refusal = "the guest sends a byte every 1ms to 1s; give a time between";
    interval(text, &Manner::BEAT_MS, refusal)
}

fn interval(text: &str, ms: &RangeInclusive<u64>, refusal: &str) -> Result<Duration, String> {
    let interval = duration(text)?;
    match u64::try_from(interval.as_millis()) {
        Ok(found) if ms.contains(&found) => Ok(interval),
        _ => Err(refusal.into()),
    }
}

impl Args {
    /// What of the command line does not fit together.
    pub fn check(&self) -> Result<(), Ended> {
        numa::check(&self.numa, self.memory, self.cpus)
    }

    /// RAM that was asked for: with --numa the nodes say it, too.
    fn memory(&self) -> Option<u64> {
        let nodes = numa::topology(&self.numa);
        let nodes = nodes.map(|nodes| nodes.memory());
        self.memory.map(Memory::ram).or(nodes)
    }
}

pub fn run(args: &Args) -> Result<ExitCode, Failure> {
    let mut timeline = Timeline::new(args.timeline.as_deref());
    timeline.mark("start");
    let signals = Signals::take()?;
    let memory = ram(args)?;
    let balloon = balloon(args, memory)?;
    // A file of it is read before the sandbox.
    let cpu = CpuModel::choose(&args.cpu)?;
    let unhidden = !cpu.is_host() && cpuid_is_native();
    // It may have to be downloaded.
    let linux = match args.linux {
        true => Some(linux::Kernel::get(&|sentence| say(sentence))?),
        false => None,
    };
    let socket = ControlSocket::choose(args.api.as_ref(), args.name.as_ref())?;
    let opened = Opened::open(&args.serial, args.devices.console())?;
    let backends = args.devices.backends()?;
    let scraping = args.observe.bind()?;
    let mut setup = setup(&backends, &args.sandbox, &scraping);
    setup.boot = Some(boot(args));
    let files = files(args, linux.as_ref(), (&backends, &socket))?;
    args.sandbox.enter(&backends, files)?;
    let lines = opened.spool()?;
    let mut backends = Backends {
        balloon: balloon.is_some(),
        console: lines.console(),
        // The built-in guest has no use for random numbers.
        rng: args.nas.is_none(),
        numa_map: numa::map(&args.numa),
        ..backends
    };
    if args.hugepages {
        backends.memory.backing = Backing::Hugetlb;
    }
    let vsock = VsockFile::of(&backends);
    let mut builder = Machine::builder()
        .memory(memory)
        .cpus(args.cpus)
        .cpu(cpu)
        .numa(numa::topology(&args.numa))
        .dirty(args.dirty)
        .devices(backends)
        .serial((lines.serial())()?);
    if let Some(name) = &args.name {
        builder = builder.name(name.as_str());
    }
    let machine = Arc::new(builder.build()?);
    if unhidden {
        say(UNHIDDEN);
    }
    if let Some(note) = machine.ram().note().filter(|_| !args.numa.is_empty()) {
        say(note);
    }
    timeline.mark("machine");
    load(args, linux, &machine, &mut timeline)?;
    timeline.mark("load");
    let guest = MachineGuest::with_workload(Arc::clone(&machine), workload(args));
    if let Some(setting) = balloon {
        GuestBalloon::set(&*guest, &setting)?;
    }
    let vmm = Vmm::new(Arc::clone(&guest) as _, false)?;
    guest.watch(&vmm)?;
    lines.tell(&vmm);
    vmm.set_setup(setup);
    let server = socket.bind(&vmm)?;
    let _scraped = scraping.serve(&vmm)?;
    // Through the VMM, which keeps the state: the last thing that can fail is behind us.
    ferry_vmm::api::Control::resume(&vmm)?;
    if timeline.is_wanted() {
        let entered = machine.wait_first_entry(FIRST_ENTRY);
        timeline.mark_at("entry", entered.unwrap_or_else(Instant::now));
        timeline.write()?;
    }
    tracing::info!(?memory, cpus = args.cpus, guest = ?guest.info().name, "the guest runs");
    let held = (args.observe.linger(), (machine, guest, vsock));
    serve(&vmm, server, signals, &lines, held)
}

/// What is booted, for `GET /v1/vm`.
fn boot(args: &Args) -> Boot {
    let nas = args.nas.as_ref().map(ToString::to_string);
    let from = match (&nas, args.linux) {
        (Some(_), _) => "nas",
        (None, true) => "linux",
        (None, false) => "kernel",
    };
    Boot {
        from: from.into(),
        path: args.kernel.clone(),
        initrd: args.initrd.clone(),
        cmdline: nas.or_else(|| args.cmdline.clone()),
    }
}

/// What is opened in the sandbox.
fn files(
    args: &Args,
    linux: Option<&linux::Kernel>,
    (backends, socket): (&Backends, &ControlSocket),
) -> Result<Files, Failure> {
    let mut files = args.sandbox.files(backends, socket.path())?;
    for path in args.kernel.iter().chain(&args.initrd) {
        files.read(path);
    }
    if let Some(kernel) = linux {
        files.read(kernel.folder());
    }
    if let Some(path) = &args.timeline {
        files.new_file(path);
    }
    Ok(files)
}

/// What the balloon is to be asked for, if there is one.
fn balloon(args: &Args, ram: u64) -> Result<Option<BalloonRequest>, Failure> {
    let growing = args.memory.filter(|memory| memory.max.is_some());
    match (growing, args.balloon) {
        (None, setting) => Ok(setting.map(Setting::request)),
        (Some(memory), None | Some(Setting::Size(0))) => {
            let size_bytes = memory.size;
            let request = MemoryRequest { size_bytes }.balloon(ram);
            request.map(Some).map_err(Failure)
        }
        (Some(_), Some(_)) => Err(Failure(
            "--memory with max= says how much is in the balloon, and so does --balloon: leave one of them out".into(),
        )),
    }
}

/// The RAM that was asked for, or what the bare guest's work needs.
fn ram(args: &Args) -> Result<u64, Failure> {
    let Some(workload) = &args.nas else {
        return args
            .memory()
            .or(args.linux.then_some(LINUX_MEMORY))
            .ok_or_else(|| Failure("--kernel needs --memory, such as --memory 512M".into()));
    };
    let cpus = usize::try_from(args.cpus).unwrap_or(usize::MAX);
    if cpus > MAX_CPUS {
        return Err(Failure(format!(
            "the bare guest has at most {MAX_CPUS} processors; give --cpus {MAX_CPUS} or less"
        )));
    }
    // Huge pages are of 2 MiB; what the workload needs is whole ones.
    let needed = workload.memory_needed(cpus);
    match args.memory() {
        Some(given) if given < needed => Err(Failure(format!(
            "{workload} needs {} of memory on {cpus} processors, --memory gives {}; give it more or leave it out",
            memory(needed),
            memory(given)
        ))),
        Some(given) => Ok(given),
        None => Ok(needed),
    }
}

/// What the guest runs, for people.
fn workload(args: &Args) -> Option<String> {
    let nas = args.nas.as_ref().map(ToString::to_string);
    nas.or_else(|| args.cmdline.clone())
}

fn load(
    args: &Args,
    linux: Option<linux::Kernel>,
    machine: &Machine,
    timeline: &mut Timeline,
) -> Result<(), Failure> {
    if let Some(kernel) = linux {
        return load_linux(args, &kernel, machine, timeline);
    }
    if let Some(path) = &args.kernel {
        let cmdline = args.cmdline.clone().unwrap_or_default();
        timeline.mark("images");
        machine.load(&Kernel {
            path: path.clone(),
            initrd: args.initrd.clone(),
            cmdline,
        })?;
        return Ok(());
    }
    let Some(workload) = &args.nas else {
        return Err(Failure("there is no kernel to load".into()));
    };
    let cpus = usize::try_from(args.cpus).unwrap_or(usize::MAX);
    let millis = |interval: Duration| u64::try_from(interval.as_millis()).ok();
    let tsc_khz = machine.tsc_khz().map(u64::from);
    let manner = Manner {
        repeat: args.repeat,
        stat_ms: args.stat.and_then(millis),
        beat_ms: args.beat.and_then(millis),
    };
    let cmdline = workload.command_line_with(cpus, tsc_khz, manner);
    let (path, _image) = in_memory("the built-in guest", BARE)?;
    timeline.mark("images");
    machine.load(&Kernel {
        path,
        initrd: None,
        cmdline,
    })?;
    Ok(())
}

fn load_linux(
    args: &Args,
    kernel: &linux::Kernel,
    machine: &Machine,
    timeline: &mut Timeline,
) -> Result<(), Failure> {
    let mut modules = GUEST_MODULES.to_vec();
    if machine.vsock().is_some() {
        modules.extend(VSOCK_MODULES);
    }
    if machine.has_console() {
        modules.extend(CONSOLE_MODULES);
    }
    let disk = RamDisk::new(&kernel.modules(&modules)?)?.finish();
    let (initrd, _disk) = in_memory("the initial RAM disk", &disk)?;
    let cmdline = match &args.cmdline {
        Some(more) => format!("{LINUX_CMDLINE} {more}"),
        None => LINUX_CMDLINE.to_owned(),
    };
    let path = kernel.image()?;
    timeline.mark("images");
    machine.load(&Kernel {
        path,
        initrd: Some(initrd),
        cmdline,
    })?;
    Ok(())
}

/// A file in memory, for the loader, which takes paths: it lives as long as its descriptor, and its
/// path is that of the descriptor.
fn in_memory(what: &str, bytes: &[u8]) -> Result<(PathBuf, File), Failure> {
    let failed = |e: std::io::Error| Failure(format!("{what} cannot be unpacked ({e})"));
    let fd = memfd_create("ferry-image", MFdFlags::MFD_CLOEXEC).map_err(|e| failed(e.into()))?;
    let mut file = File::from(fd);
    file.write_all(bytes).map_err(failed)?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    Ok((path, file))
}
