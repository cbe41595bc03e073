//! `ferry demo`: two live migrations on this host, with this program alone. A Linux guest runs in a
//! nested host where this host's KVM cannot run it.

use crate::nested::{Elsewhere, linux_runs_here, why};
use crate::vmm_process::{KernelRun, LOOK, TIMEOUT, VmmProcess};
use ferry_guest_images::Workload;
use ferry_migration::options::Options;
use ferry_migration::report::{Report, Status};
use ferry_terminal::output::{Failure, put, say};
use ferry_terminal::progress::Display;
use ferry_terminal::summary::{sentence, table};
use ferry_vmm::api::client::Action;
use ferry_vmm::api::types::MigrateRequest;
use ferry_vmm::doctor::examine;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Boot a guest that computes, move it twice between processes while it does, and check everything.
///
/// The guest is the built-in one; it runs the NAS kernel MG, which checks its own results. The
/// first move is a plain one, and its downtime is compared with the longest gap that the guest
/// itself saw; the second also compares all memory of both sides in the pause.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  ferry demo\n  ferry demo --linux")]
pub struct Args {
    /// The guest's work: a NAS kernel and its class; mg.A, or mg.S with --linux.
    #[arg(long, value_name = "KERNEL.CLASS", value_parser = Workload::parse)]
    nas: Option<Workload>,
    /// The guest is a stock Debian Linux (downloaded once). Where this host's KVM cannot run it,
    /// all of the demo runs in a host that QEMU emulates.
    #[arg(long)]
    linux: bool,
    /// Virtual processors.
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u32,
}

/// Shows the two moves.
///
/// # Errors
/// A process cannot be started, or a move fails.
pub fn run(args: &Args) -> Result<ExitCode, Failure> {
    let work = args.nas.map_or_else(
        || if args.linux { "mg.S" } else { "mg.A" }.to_owned(),
        |w| w.to_string(),
    );
    let cpus = args.cpus.to_string();
    if !args.linux {
        put(&format!(
            "1. A guest boots and runs {work} on {cpus} vCPU, over and over; the kernel checks its results.\n"
        ))?;
        let run = ["run", "--nas", &work, "--cpus", &cpus, "--repeat", "0"];
        return moves(&run);
    }
    let found = examine();
    if !linux_runs_here(&found) {
        return in_nested_host(&why(&found), &work, &cpus);
    }
    put(&format!(
        "1. Linux boots on this host's own KVM ({}, Debian's kernel unchanged), and runs {work} on {cpus} vCPU in a process, \
         over and over; the kernel checks its results.\n",
        found.modules.join(", ")
    ))?;
    let workload = Workload::parse(&work)?;
    let needed = workload.memory_needed(usize::try_from(args.cpus).unwrap_or(1));
    let memory = format!("{}K", (LINUX_ITSELF + needed) >> 10);
    let cmdline = format!("ferry.run={work} ferry.repeat=0");
    moves(&[
        "run",
        "--linux",
        "--cpus",
        &cpus,
        "--memory",
        &memory,
        "--cmdline",
        &cmdline,
    ])
}

/// Memory that a Linux guest needs in addition to that of its work.
const LINUX_ITSELF: u64 = 224 << 20;

/// The same demo, in a nested host.
fn in_nested_host(why: &str, work: &str, cpus: &str) -> Result<ExitCode, Failure> {
    put(&format!(
        "{why}\nThe demo runs in it: about half a minute on an idle machine, at some twentieth of its speed.\n"
    ))?;
    let nested = Elsewhere::start(&|sentence| say(sentence))?;
    put(&format!(
        "The emulated host is up after {:.0} s.\n\n",
        nested.took().as_secs_f64()
    ))?;
    let process = nested.ferry(&["demo", "--linux", "--nas", work, "--cpus", cpus])?;
    let mut seen = 0;
    while let Some(bytes) = process.stdout_after(seen, TIMEOUT) {
        seen += bytes.len();
        std::io::stdout().write_all(&bytes)?;
        std::io::stdout().flush()?;
    }
    let ran = process.wait(LOOK)?;
    for sentence in ran.stderr.lines() {
        say(sentence.trim_start_matches("ferry: "));
    }
    Ok(if ran.code == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Boots a guest by `run`, which runs a kernel over and over, and moves it twice.
fn moves(run: &[&str]) -> Result<ExitCode, Failure> {
    let dir = tempfile::Builder::new().prefix("ferry-demo-").tempdir()?;
    let began = Instant::now();
    let run = [run, &["--name", "demo"]].concat();
    let mut source = VmmProcess::start(dir.path(), "A", &run)?;
    let before = source.result(0)?;
    put(&format!(
        "   its first result came after {:.1} s\n",
        began.elapsed().as_secs_f64()
    ))?;
    show("before the move", &before)?;
    // Into the middle of the next run, when its arrays are full of numbers.
    std::thread::sleep(Duration::from_secs_f64(
        before.seconds.clamp(0.0, 10.0) / 2.0,
    ));

    put("\n2. It moves from process A to process B over TCP, while it runs.\n")?;
    let (mut b, report) = hop(dir.path(), &mut source, "B", false)?;
    // The run that was under way during the move.
    let during = b.result(before.run + 1)?;
    show("the run that was moved", &during)?;
    std::thread::sleep(Duration::from_secs_f64(
        during.seconds.clamp(0.0, 10.0) / 2.0,
    ));
    put(&format!(
        "   the guest's own longest gap: {:.1} ms; ferry reported {:.1} ms of downtime\n",
        ms(during.gap_max_us),
        report.downtime_ms
    ))?;

    put("\n3. It moves on to process C; this time all memory is compared in the pause.\n")?;
    let (mut c, report) = hop(dir.path(), &mut b, "C", true)?;
    let after = c.result(during.run + 1)?;
    show("the run that was moved", &after)?;
    c.client().act(Action::Stop)?;

    let good =
        before.verified && during.verified && after.verified && report.verified == Some(true);
    put(if good {
        "\nThe guest moved twice, lost nothing, and every result is right.\n"
    } else {
        "\nSomething is wrong: see above.\n"
    })?;
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Moves the guest to a new process.
fn hop(
    dir: &Path,
    from: &mut VmmProcess,
    name: &'static str,
    verify: bool,
) -> Result<(VmmProcess, Report), Failure> {
    let mut to = VmmProcess::start(dir, name, &["receive", "tcp:127.0.0.1:0"])?;
    let client = to.client();
    let uri = to.until("listen", |_| Ok(client.status()?.listening))?;
    let request = MigrateRequest {
        uri,
        options: Options {
            verify,
            ..Options::default()
        },
        ..MigrateRequest::default()
    };
    let mut display = Display::new(false, false);
    let result = from
        .client()
        .migrate(&request, &mut |event| display.show(event));
    display.clear();
    let report = result?;
    if report.status != Status::Completed {
        return Err(Failure(sentence(&report, &request.uri)));
    }
    let text = format!("{}\n{}", sentence(&report, &request.uri), table(&report));
    for line in text.lines() {
        put(&format!("   {line}\n"))?;
    }
    if verify && report.verified != Some(true) {
        say("memory was not compared, although that was asked for");
    }
    Ok((to, report))
}

fn show(when: &str, result: &KernelRun) -> Result<(), Failure> {
    put(&format!(
        "   {when}: run {} {} ({}), {:.0} Mop/s\n",
        result.run,
        if result.verified {
            "VERIFIED"
        } else {
            "NOT VERIFIED"
        },
        result.text,
        result.mops
    ))
}

/// Exact far beyond any pause.
#[allow(clippy::cast_precision_loss)]
fn ms(us: u64) -> f64 {
    us as f64 / 1e3
}
