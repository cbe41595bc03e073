//! `ferry restore`.

use super::devices::VsockFile;
use super::serial::Serial;
use super::serve::{Place, Signals, serve};
use ferry_terminal::output::{Failure, put_json, say};
use ferry_terminal::units::{grouped, span};
use ferry_vmm::api::types::Boot;
use ferry_vmm::snapshot::{RestoreOptions, RestoreReport, restore};
use ferry_vmm::thread;
use ferry_vmm::vmm::{MachineGuest, Vmm};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

/// Run a guest from a snapshot, and be its VMM.
///
/// The guest runs at once, and its memory is read while it does: first where it waits for a page,
/// and around there. Give what is behind its disks and network cards, in their order, and its
/// vsock; the disks must be as they were at the snapshot. The guest's clock goes on from the
/// snapshot. It is told that it is a copy, by a new VM generation id, and what else it shares with
/// other copies is its own to change. The keys and signals of `ferry run` work here too.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  ferry restore web.snap --name web")]
pub struct Args {
    /// The file.
    #[arg(value_name = "PATH")]
    path: PathBuf,
    #[command(flatten)]
    place: Place,
    /// Read all memory before the guest runs.
    #[arg(long)]
    eager: bool,
    /// Take disks that were changed since the snapshot (the guest's file systems may be destroyed),
    /// and a CPU (vendor, frequency of its time stamp counter, IA32_ARCH_CAPABILITIES) that the
    /// guest does not count on.
    #[arg(long)]
    force: bool,
    /// Keep the guest's VM generation id: it goes on as the one that was saved, which does not run any
    /// more, and is restored from this file once only.
    #[arg(long)]
    same_identity: bool,
    /// Print a report as one JSON object, when all memory is there.
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Result<ExitCode, Failure> {
    let console = args.place.devices.console();
    if args.json && [Some(&args.place.serial), console].contains(&Some(&Serial::Stdio)) {
        return Err(Failure(
            "--json prints on stdout, where the guest's serial port or console is; add --serial null or --serial file:PATH, \
             and give --console another place".into(),
        ));
    }
    let signals = Signals::take()?;
    let socket = args.place.socket()?;
    let mut console = args.place.console(&socket, |files| {
        files.read(&args.path);
    })?;
    console.setup.boot = Some(Boot {
        from: "snapshot".into(),
        path: Some(args.path.clone()),
        ..Boot::default()
    });
    // The socket before the guest: once that runs nothing may fail.
    let vmm = Vmm::receiving(format!("the snapshot {}", args.path.display()))?;
    console.lines.tell(&vmm);
    vmm.set_setup(console.setup);
    let server = socket.bind(&vmm)?;
    let _scraped = console.scraping.serve(&vmm)?;
    let mut options = RestoreOptions::new(&args.path);
    options.eager = args.eager;
    options.force = args.force;
    options.same_identity = args.same_identity;
    options.dirty = args.place.dirty;
    let vsock = VsockFile::of(&console.backends);
    let restored = restore(&options, console.serial, console.backends, &|| {
        signals.came()
    })?;
    let running = restored.is_running();
    let guest = MachineGuest::followed(restored.machine, restored.following);
    vmm.arrived(Arc::clone(&guest) as _, running);
    guest.watch(&vmm)?;
    say(match running {
        true => "the guest runs here",
        false => "the guest is here, paused as it was; `ferry resume` lets it run",
    });
    let reporting = tell_when_done(restored.report, args)?;
    let held = (args.place.observe.linger(), (guest, vsock));
    let result = serve(&vmm, server, signals, &console.lines, held);
    // A guest that ended needs no more memory, so this ends soon.
    let _ = reporting.join();
    result
}

fn tell_when_done(
    report: mpsc::Receiver<RestoreReport>,
    args: &Args,
) -> Result<JoinHandle<()>, Failure> {
    let (json, copied) = (args.json, !args.same_identity);
    let tell = move || {
        // Without one the guest was ended, with a sentence of its own.
        let Ok(report) = report.recv() else {
            return Ok(());
        };
        if copied && report.generation.is_none() {
            say(
                "the guest has no VM generation id, since it was started by an older ferry: it is not told that it is a copy",
            );
        }
        if let Some(why) = &report.why_eager {
            say(&format!("all memory was read before the guest ran: {why}"));
        }
        if !json {
            say(&sentence(&report));
        } else if let Err(Failure(why)) = put_json(&report) {
            say(&why);
        }
        Ok(())
    };
    let failed = |why: String| say(&why);
    Ok(thread::spawn(
        thread::Kind::Vmm,
        "ferry-report",
        tell,
        failed,
    )?)
}

fn sentence(report: &RestoreReport) -> String {
    if let Some(error) = &report.error {
        return error.clone();
    }
    if report.unread_pages > 0 {
        return format!(
            "the guest ended before {} pages of its memory were read",
            grouped(report.unread_pages)
        );
    }
    let faults = &report.faults;
    let waits = match faults.count {
        0 => String::new(),
        count => format!(
            "; it waited {} times for a page (median {:.0} µs, p99 {:.0} µs, at most {:.0} µs)",
            grouped(count),
            faults.p50_us,
            faults.p99_us,
            faults.max_us
        ),
    };
    format!(
        "all of the guest's memory is here after {}: {} of {} pages from {:.1} MB; it could run after {:.1} ms{waits}",
        span(report.total_ms),
        grouped(report.data_pages),
        grouped(report.pages),
        report.bytes_read as f64 / 1e6,
        report.start_ms
    )
}
