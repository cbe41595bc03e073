//! The small commands: status, pause, resume, stop, cancel, recover.

use super::outcome::Ended;
use super::security::Certificates;
use ferry_terminal::flags::{Target, TargetAnd, Word};
use ferry_terminal::output::{clean, put, put_json, say};
use ferry_terminal::progress::line;
use ferry_terminal::rows::Rows;
use ferry_terminal::units::{memory, span};
use ferry_vmm::api::client::{Action, Client};
use ferry_vmm::api::types::{
    Configuration, MemoryInfo, RecoverRequest, StateName, Status as StatusBody,
};
use ferry_vmm::migrate::absolute_uri;
use std::ffi::OsString;
use std::process::ExitCode;

/// Show where a guest is and what its VMM does.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  ferry status web")]
pub struct Status {
    #[command(flatten)]
    target: Target,
    /// Show what the guest's machine is made of instead.
    #[arg(long)]
    config: bool,
    /// Print one JSON object instead.
    #[arg(long)]
    json: bool,
}

macro_rules! simple {
    ($(#[$meta:meta])* $name:ident, $action:expr, $done:expr, $example:literal) => {
        $(#[$meta])*
        #[derive(Debug, clap::Args)]
        #[command(after_help = concat!("Example:\n  ", $example))]
        pub struct $name {
            #[command(flatten)]
            target: Target,
        }

        impl $name {
            pub fn run(&self) -> Result<ExitCode, Ended> {
                Client::new(&self.target.socket()?).act($action)?;
                say($done);
                Ok(ExitCode::SUCCESS)
            }
        }
    };
}

simple!(
    /// Stop a guest's processors until `ferry resume`.
    Pause, Action::Pause, "the guest is paused", "ferry pause web"
);
simple!(
    /// Let a paused guest run on.
    Resume, Action::Resume, "the guest runs", "ferry resume web"
);
simple!(
    /// End a guest and its VMM; a migration that has not committed is cancelled first.
    Stop, Action::Stop, "the guest is being ended", "ferry stop web"
);
simple!(
    /// Cancel the migration that is under way; the guest runs on where it is.
    Cancel, Action::Cancel, "the migration is being cancelled; the guest stays where it is, unless it has just moved",
    "ferry cancel web"
);

simple!(
    /// Press the power button of a guest's machine: a guest with ACPI, such as Linux, shuts down in
    /// its own time.
    PowerButton, Action::PowerButton, "the power button was pressed", "ferry power-button web"
);

/// Resolve a migration that ended in doubt, or that lost its connection in post-copy.
///
/// At the source: asks the destination again and sends its missing pages, secured as the migration
/// was. The VMM here ends when the destination has all of the guest. With --take-over, at either
/// side: runs the guest here.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  ferry recover web
  ferry recover web --take-over      after making sure that the guest does not run on the other side")]
pub struct Recover {
    #[command(flatten)]
    target: TargetAnd<NewAddress>,
    #[command(flatten)]
    certificates: Certificates,
    /// Run the guest here. Only when you know that it does not run on the other side: two copies of
    /// one guest destroy each other's data.
    #[arg(long)]
    take_over: bool,
    /// With --take-over: insist although the guest's disks were, or may have been, written since
    /// its state was saved.
    #[arg(long, requires = "take_over")]
    force: bool,
}

/// Where the destination of `ferry recover` listens now.
#[derive(Clone, Debug)]
struct NewAddress(Option<String>);

impl Word for NewAddress {
    const VALUE: &'static str = "URI";
    const HELP: &'static str = "Where the destination listens now, if that has changed";

    fn read(word: Option<OsString>) -> Result<Self, String> {
        let text = word.map(OsString::into_string).transpose();
        text.map(Self)
            .map_err(|odd| format!("{} is no URI", odd.display()))
    }
}

impl Recover {
    pub fn run(&self) -> Result<ExitCode, Ended> {
        let uri = self.target.word.0.as_deref();
        if uri.is_some() && self.take_over {
            return Err(Ended::usage(
                "--take-over runs the guest here, and asks no destination; leave out the URI or --take-over",
            ));
        }
        let request = RecoverRequest {
            uri: uri.map(absolute_uri),
            tls: self.certificates.files()?,
            take_over: self.take_over,
            force: self.force,
        };
        Client::new(&self.target.socket()?).recover(&request)?;
        say(if self.take_over {
            "the guest runs here"
        } else {
            "the guest runs at the destination"
        });
        Ok(ExitCode::SUCCESS)
    }
}

impl Status {
    pub fn run(&self) -> Result<ExitCode, Ended> {
        let client = Client::new(&self.target.socket()?);
        if self.config {
            let configuration = client.configuration()?;
            match self.json {
                true => put_json(&configuration)?,
                false => put(&machine(&configuration))?,
            }
            return Ok(ExitCode::SUCCESS);
        }
        let status = client.status()?;
        if self.json {
            put_json(&status)?
        } else {
            put(&text(&status))?
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// For people.
fn text(status: &StatusBody) -> String {
    let mut rows = Rows::default();
    rows.add(
        "state",
        format!("{}: {}", status.state.name(), clean(&status.explanation)),
    );
    if let Some(guest) = &status.guest {
        let name = guest.name.as_deref().map_or("unnamed".into(), clean);
        let cpus = if guest.cpus == 1 { "CPU" } else { "CPUs" };
        let size = memory(guest.memory_bytes);
        rows.add("guest", format!("{name}, {size}, {} {cpus}", guest.cpus));
        if let Some(info) = &guest.memory {
            pages(info, &mut rows);
        }
    }
    if let Some(balloon) = &status.balloon {
        super::balloon::show(balloon, &mut rows);
    }
    if status.serial_output_lost > 0 {
        let lost = status.serial_output_lost;
        rows.add(
            "serial",
            format!("{lost} bytes of output were dropped, as nothing took them"),
        );
    }
    if status.console_output_lost > 0 {
        let lost = status.console_output_lost;
        rows.add(
            "console",
            format!("{lost} bytes of output were dropped, as nothing took them"),
        );
    }
    if let Some(progress) = &status.migration {
        rows.add("migration", line(progress));
    } else if status.state == StateName::InDoubt {
        rows.add(
            "migration",
            "ended in doubt; nothing is lost as long as this VMM is kept",
        );
    }
    // Exact to 2⁵³ milliseconds.
    #[allow(clippy::cast_precision_loss)]
    let up = span(status.uptime_ms as f64);
    let (version, pid) = (clean(&status.version), status.pid);
    rows.add("VMM", format!("ferry {version}, process {pid}, up {up}"));
    rows.text()
}

/// The configuration, for people.
fn machine(configuration: &Configuration) -> String {
    let c = configuration;
    let mut rows = Rows::default();
    rows.add("name", c.name.as_deref().map_or("unnamed".into(), clean));
    let mhz = c
        .cpu
        .tsc_khz
        .map_or(String::new(), |khz| format!(", TSC {} MHz", khz / 1000));
    let brand = c.cpu.brand.as_deref().unwrap_or(&c.cpu.vendor);
    rows.add("CPUs", format!("{} × {}{mhz}", c.cpus, clean(brand)));
    let taken = if c.memory.preallocated {
        ", preallocated"
    } else {
        ""
    };
    let size = memory(c.memory.bytes);
    rows.add(
        "memory",
        format!("{size}, {}{taken}", clean(&c.memory.backing)),
    );
    nodes(configuration, &mut rows);
    if let Some(boot) = &c.boot {
        let parts = [
            boot.path.as_ref().map(|path| path.display().to_string()),
            boot.initrd
                .as_ref()
                .map(|path| format!("initrd {}", path.display())),
            boot.cmdline.clone(),
        ];
        let parts = parts
            .iter()
            .flatten()
            .map(|part| format!(" {}", clean(part)));
        rows.add(
            "boot",
            format!("{}:{}", boot.from, parts.collect::<String>()),
        );
    }
    for disk in &c.disks {
        let path = disk.path.as_deref().map_or("unknown".into(), clean);
        let read_only = if disk.read_only { ", read-only" } else { "" };
        rows.add("disk", format!("{path}, {}{read_only}", memory(disk.bytes)));
    }
    for network in &c.networks {
        let tap = network.tap.as_deref().map_or("unknown".into(), clean);
        rows.add("network", format!("tap {tap}, {}", clean(&network.mac)));
    }
    if let Some(vsock) = &c.vsock {
        let socket = vsock.socket.as_deref().map_or("unknown".into(), clean);
        rows.add("vsock", format!("{socket}, CID {}", vsock.cid));
    }
    let others = [(c.balloon, "balloon"), (c.rng, "random numbers")];
    let others = others
        .iter()
        .filter(|(there, _)| *there)
        .map(|(_, name)| *name);
    let others: Vec<&str> = others.collect();
    if !others.is_empty() {
        rows.add("devices", others.join(", "));
    }
    rows.add(
        "dirty",
        format!("pages are found by the {}", clean(&c.dirty)),
    );
    let places = [
        ("serial", &c.serial),
        ("console", &c.console),
        ("sandbox", &c.sandbox),
        ("metrics", &c.metrics),
    ];
    for (name, place) in places {
        if let Some(place) = place {
            rows.add(name, clean(place));
        }
    }
    rows.text()
}

/// The guest's NUMA nodes.
fn nodes(configuration: &Configuration, rows: &mut Rows) {
    for (number, node) in configuration.memory.nodes.iter().enumerate() {
        let host = node.host.map_or("unknown".into(), |host| host.to_string());
        let cpus: Vec<String> = node.cpus.iter().map(u32::to_string).collect();
        let (cpus, size) = (cpus.join(","), memory(node.bytes));
        rows.add(
            &format!("node {number}"),
            format!("{size}, CPUs {cpus}, on host node {host}"),
        );
    }
}

/// What the RAM is made of.
fn pages(info: &MemoryInfo, rows: &mut Rows) {
    let kind = match info.backing.as_str() {
        "thp" => "transparent 2 MiB pages",
        "hugetlb" => "2 MiB pages of the host's pool",
        _ => "4 KiB pages",
    };
    let (huge, used) = (memory(info.huge_bytes), memory(info.resident_bytes));
    rows.add(
        "RAM",
        format!("{kind}: {huge} of {used} in use are in pages of 2 MiB"),
    );
    if let Some(note) = &info.note {
        rows.add("", clean(note));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_migration::report::{Phase, Progress};
    use ferry_vmm::api::types::GuestInfo;

    #[test]
    fn a_configuration_for_people() {
        use ferry_vmm::api::types::{
            Boot, Cpu, DiskConfiguration, NetworkConfiguration, VsockConfiguration,
        };
        let mut configuration = Configuration {
            name: Some("web".into()),
            cpus: 2,
            cpu: Cpu {
                vendor: "GenuineIntel".into(),
                brand: Some("A\u{1b}CPU".into()),
                tsc_khz: Some(2_500_000),
            },
            boot: Some(Boot {
                from: "kernel".into(),
                path: Some("/k".into()),
                initrd: None,
                cmdline: Some("quiet".into()),
            }),
            disks: vec![DiskConfiguration {
                path: Some("a.img".into()),
                bytes: 1 << 30,
                read_only: true,
            }],
            networks: vec![NetworkConfiguration {
                tap: None,
                mac: "02:00:00:00:00:01".into(),
            }],
            rng: true,
            vsock: Some(VsockConfiguration {
                cid: 3,
                socket: Some("/run/v.sock".into()),
            }),
            dirty: "log".into(),
            sandbox: Some("on".into()),
            ..Configuration::default()
        };
        configuration.memory.bytes = 512 << 20;
        configuration.memory.backing = "thp".into();
        assert_eq!(
            machine(&configuration),
            "name       web\nCPUs       2 × A CPU, TSC 2500 MHz\nmemory     512 MiB, thp\n\
             boot       kernel: /k quiet\ndisk       a.img, 1 GiB, read-only\n\
             network    tap unknown, 02:00:00:00:00:01\nvsock      /run/v.sock, CID 3\ndevices    random numbers\n\
             dirty      pages are found by the log\nsandbox    on\n"
        );
    }

    #[test]
    fn a_status_for_people() {
        let mut status = StatusBody {
            schema: 1,
            version: "0.1.0".into(),
            pid: 42,
            state: StateName::Migrating,
            explanation: "the guest is being migrated to tcp:b:7000; `ferry cancel` keeps it here"
                .into(),
            guest: Some(GuestInfo {
                name: Some("web\u{1b}".into()),
                memory_bytes: 512 << 20,
                cpus: 2,
                memory: Some(MemoryInfo {
                    backing: "thp".into(),
                    resident_bytes: 300 << 20,
                    huge_bytes: 298 << 20,
                    note: Some("because".into()),
                }),
            }),
            uptime_ms: 61_500,
            migration: Some(Progress {
                phase: Phase::Live,
                round: 3,
                pending_pages: 12_345,
                mbps: 934.25,
                predicted_downtime_ms: Some(12.34),
                ..Progress::default()
            }),
            listening: None,
            serial_output_lost: 0,
            serial: None,
            console_output_lost: 0,
            console: None,
            to: None,
            missing: None,
            balloon: None,
        };
        assert_eq!(
            text(&status),
            "state      migrating: the guest is being migrated to tcp:b:7000; `ferry cancel` keeps it here\n\
             guest      web , 512 MiB, 2 CPUs\n\
             RAM        transparent 2 MiB pages: 298 MiB of 300 MiB in use are in pages of 2 MiB\n           because\n\
             migration  round 3, 12,345 pages pending, 934.2 MB/s, downtime ≈ 12.3 ms\n\
             VMM        ferry 0.1.0, process 42, up 1 min 01 s\n"
        );
        status.guest = None;
        status.migration = None;
        status.state = StateName::Receiving;
        status.explanation = "waits on tcp:0.0.0.0:7000 for a guest to arrive".into();
        assert_eq!(
            text(&status),
            "state      receiving: waits on tcp:0.0.0.0:7000 for a guest to arrive\n\
             VMM        ferry 0.1.0, process 42, up 1 min 01 s\n"
        );
    }
}
