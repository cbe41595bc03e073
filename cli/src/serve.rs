//! The main loop of a VMM: control socket, console, signals, and the guest's end, in one epoll.

use super::console::{KEYS, Key, Terminal, feed_from_pipe};
use super::devices;
use super::lines::{Line, Lines, Opened};
use super::observe::{self, Scraping};
use super::passed::Api;
use super::sandbox;
use super::serial::Serial;
use super::socket::ControlSocket;
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use ferry_migration::options::Tracking;
use ferry_terminal::flags::choice;
use ferry_terminal::names::GuestName;
use ferry_terminal::output::{Failure, say};
use ferry_terminal::units::span;
use ferry_vmm::api::server::Server;
use ferry_vmm::api::types::Setup;
use ferry_vmm::machine::Backends;
use ferry_vmm::migrate::SerialFactory;
use ferry_vmm::numa::{HostNodes, NumaMap};
use ferry_vmm::priority::in_background;
use ferry_vmm::sandbox::Files;
use ferry_vmm::vmm::{Outcome, Vmm};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long replies in hand, such as the report of the migration that has just ended, may take.
const FAREWELL: Duration = Duration::from_secs(5);
/// How often keys are offered again to a guest that did not take them, in milliseconds.
const RETRY_MS: i32 = 20;

/// Signals that come closer together than this count as one. timeout(1) signals a process and then
/// its group, and the second must not discard a guest in doubt.
pub const SAME_WISH: Duration = Duration::from_secs(1);

const SERVER: u32 = 0;
const FINISHED: u32 = 1;
const SIGNAL: u32 = 2;
const TERMINAL: u32 = 3;

/// SIGINT, SIGTERM and SIGHUP as a descriptor, as far as the caller of this process does not have
/// them ignored (`nohup`). To be taken before any thread is started: threads inherit that they are
/// blocked, and one that did not would be killed by them.
pub struct Signals(SignalFd);

impl Signals {
    pub fn take() -> Result<Self, Failure> {
        let ignored = ignored_signals();
        let set: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]
            .into_iter()
            .filter(|signal| ignored & 1 << (*signal as u32 - 1) == 0)
            .collect();
        let take = || {
            set.thread_block()?;
            SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        };
        take()
            .map(Self)
            .map_err(|e: nix::errno::Errno| Failure(format!("cannot watch for signals ({e})")))
    }

    /// Whether one has come; for what is done before [`serve`].
    pub fn came(&self) -> bool {
        matches!(self.0.read_signal(), Ok(Some(_)))
    }
}

/// The signals that this process ignores, by `SigIgn` of proc_pid_status(5); none where that cannot
/// be read. A signal that is blocked reaches a signalfd even if it is ignored, so ignored ones must
/// be left alone.
fn ignored_signals() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0)
}

/// What a VMM is told here whose guest comes from elsewhere: all else comes with the guest.
#[derive(Debug, clap::Args)]
pub struct Place {
    /// The control socket to make; by default that of --name, or one in $XDG_RUNTIME_DIR or /tmp.
    /// Or one that listens already: the open descriptor N (fd:N), or systemd's with
    /// FileDescriptorName=api (systemd) or another (systemd:NAME).
    #[arg(long, value_name = "SOCKET", help_heading = "VMM")]
    pub api: Option<Api>,
    /// The name by which commands on this host find the guest; one guest has it at a time.
    #[arg(long, value_name = "NAME", help_heading = "VMM")]
    pub name: Option<GuestName>,
    /// Where the guest's serial port goes: stdio, file:PATH, pty (for `ferry console`) or
    /// null.
    #[arg(
        long,
        value_name = "WHERE",
        default_value = "stdio",
        help_heading = "VMM"
    )]
    pub serial: Serial,
    /// How the pages that the guest dirties are found when it is migrated on: by KVM's log, by its
    /// rings, or auto.
    #[arg(long, value_name = "HOW", default_value = "auto", value_parser = choice::<Tracking>(), help_heading = "Machine")]
    pub dirty: Tracking,
    /// Which NUMA node of this host each of the guest's nodes goes to. Nodes that it leaves out go
    /// where memory is free and little is done; without it all do.
    #[arg(long, value_name = "GUEST=HOST,…", help_heading = "Machine")]
    pub numa_map: Option<NumaMap>,
    #[command(flatten)]
    pub devices: devices::Args,
    #[command(flatten)]
    pub sandbox: sandbox::Args,
    #[command(flatten)]
    pub observe: observe::Args,
}

impl Place {
    /// Where the control socket is made.
    pub fn socket(&self) -> Result<ControlSocket, Failure> {
        ControlSocket::choose(self.api.as_ref(), self.name.as_ref())
    }

    /// Enters the sandbox, where `more` may be opened too, and opens where the guest's lines go:
    /// for [`serve`], and for the machine that comes.
    pub fn console(
        &self,
        socket: &ControlSocket,
        more: impl FnOnce(&mut Files),
    ) -> Result<Console<'_>, Failure> {
        let numa_map = self.numa_map.clone().unwrap_or_default();
        // Said now: a guest may come much later.
        numa_map.check(&HostNodes::read())?;
        let backends = Backends {
            numa_map,
            ..self.devices.backends()?
        };
        let scraping = self.observe.bind()?;
        let setup = setup(&backends, &self.sandbox, &scraping);
        let opened = Opened::open(&self.serial, self.devices.console())?;
        let mut files = self.sandbox.files(&backends, socket.path())?;
        more(&mut files);
        self.sandbox.enter(&backends, files)?;
        let lines = opened.spool()?;
        Ok(Console {
            serial: lines.serial(),
            backends: Backends {
                console: lines.console(),
                ..backends
            },
            lines,
            scraping,
            setup,
        })
    }
}

/// What a VMM is told here, opened.
pub struct Console<'a> {
    pub lines: Lines<'a>,
    pub serial: SerialFactory,
    pub backends: Backends,
    pub scraping: Scraping,
    pub setup: Setup,
}

/// What `GET /v1/vm` shows of a command line, but for what was booted.
pub fn setup(backends: &Backends, sandbox: &sandbox::Args, scraping: &Scraping) -> Setup {
    let taps = backends.nets.iter();
    Setup {
        boot: None,
        taps: taps
            .map(|net| (!net.tap.is_empty()).then(|| net.tap.clone()))
            .collect(),
        sandbox: Some(sandbox.mode().name().to_owned()),
        metrics: scraping.url(),
    }
}

/// Serves until the VMM has nothing more to do, and `linger` longer where its guest has moved;
/// `held` is what keeps the guest, or its way here, until then.
pub fn serve(
    vmm: &Vmm,
    server: Server,
    signals: Signals,
    lines: &Lines<'_>,
    (linger, held): (Duration, impl Sized),
) -> Result<ExitCode, Failure> {
    let line = lines.on_stdio();
    let mut terminal = line.and_then(Terminal::take);
    match (&mut terminal, line) {
        (Some(terminal), _) => {
            say(KEYS);
            // Its size, where the guest is here.
            terminal.flush(vmm);
        }
        (None, Some(line)) => feed_stdin(vmm, line)?,
        (None, None) => {}
    }
    lines.feed(vmm)?;
    let server = Arc::new(server);
    let subscriber = Loop {
        vmm: vmm.clone(),
        server: Arc::clone(&server),
        signals,
        terminal,
        pending: false,
        signalled: None,
    };
    let failed = |e: event_manager::Error| Failure(format!("the event loop failed ({e})"));
    let mut manager = EventManager::new().map_err(failed)?;
    let id = manager.add_subscriber(subscriber);
    let outcome = loop {
        let pending = manager.subscriber_mut(id).map_err(failed)?.retry();
        manager
            .run_with_timeout(if pending { RETRY_MS } else { -1 })
            .map_err(failed)?;
        if let Some(outcome) = vmm.outcome() {
            break outcome;
        }
    };
    // The guest may have moved to another process of this host.
    in_background();
    drop(held);
    if outcome.moved && !linger.is_zero() {
        say(&format!(
            "{}; this VMM stays for {}",
            outcome.sentence,
            span_of(linger)
        ));
        vmm.linger();
        let until = Instant::now() + linger;
        while !vmm.is_released() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            // Rounded up, or the last millisecond would be spun away.
            let ms = i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX);
            manager.run_with_timeout(ms).map_err(failed)?;
        }
    }
    // The terminal is the user's again before we speak.
    drop(manager);
    lines.close(FAREWELL);
    if let Some(server) = Arc::into_inner(server) {
        server.shutdown(FAREWELL);
    }
    Ok(tell(&outcome))
}

fn span_of(time: Duration) -> String {
    span(time.as_secs_f64() * 1e3)
}

fn tell(outcome: &Outcome) -> ExitCode {
    say(&outcome.sentence);
    if outcome.success {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// A process in the background must not read its terminal: reading would stop it.
fn feed_stdin(vmm: &Vmm, line: Line) -> Result<(), Failure> {
    if io::IsTerminal::is_terminal(&io::stdin()) {
        return Ok(());
    }
    feed_from_pipe(vmm.clone(), line)
        .map_err(|e| Failure(format!("cannot start a thread for stdin ({e})")))
}

struct Loop {
    vmm: Vmm,
    server: Arc<Server>,
    signals: Signals,
    terminal: Option<Terminal>,
    /// Keys wait for the guest.
    pending: bool,
    /// When the last signal was heeded.
    signalled: Option<Instant>,
}

impl Loop {
    /// Offers waiting keys again; whether some are left.
    fn retry(&mut self) -> bool {
        if self.pending {
            self.pending = self.terminal.as_mut().is_some_and(|t| t.flush(&self.vmm));
        }
        self.pending
    }

    fn signal(&mut self) {
        while let Ok(Some(info)) = self.signals.0.read_signal() {
            if self.signalled.is_some_and(|at| at.elapsed() < SAME_WISH) {
                continue;
            }
            self.signalled = Some(Instant::now());
            let number = i32::try_from(info.ssi_signo).unwrap_or(0);
            let name = Signal::try_from(number).map_or("a signal", Signal::as_str);
            self.interrupt(&format!("on {name}"));
        }
    }

    fn interrupt(&self, how: &str) {
        if let Some(sentence) = self.vmm.interrupt(how) {
            say(&sentence);
        }
    }

    fn typed(&mut self, ops: &mut EventOps) {
        let Some(terminal) = &mut self.terminal else {
            return;
        };
        let Some(keys) = terminal.read() else {
            // The terminal is gone; its SIGHUP decides what that means.
            let _ = ops.remove(Events::empty(terminal));
            return;
        };
        self.pending = terminal.flush(&self.vmm);
        for key in keys {
            match key {
                Key::Quit => self.interrupt("by Ctrl-A x"),
                Key::Help => say(KEYS),
            }
        }
    }
}

impl MutEventSubscriber for Loop {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            SERVER => self.server.accept(),
            // The loop looks at the outcome after every event; the descriptor stays readable.
            FINISHED => {}
            SIGNAL => self.signal(),
            TERMINAL => self.typed(ops),
            _ => {}
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        let signals = self.signals.0.as_fd().as_raw_fd();
        let finished = self.vmm.finished_event().as_raw_fd();
        let mut all = vec![
            (SERVER, self.server.as_raw_fd()),
            (FINISHED, finished),
            (SIGNAL, signals),
        ];
        all.extend(self.terminal.as_ref().map(|t| (TERMINAL, t.as_raw_fd())));
        for (data, fd) in all {
            if let Err(e) = ops.add(Events::with_data_raw(fd, data, EventSet::IN)) {
                tracing::error!("cannot watch descriptor {fd}: {e}");
            }
        }
    }
}
