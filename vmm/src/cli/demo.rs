//! `ferry demo`: the main job, on this host, with nothing but this program; with a Linux guest, in a nested host where this
//! host's KVM cannot run one.

use super::nested::{Elsewhere, linux_runs_here, why};
use super::output::{Failure, put, say};
use super::progress::Display;
use super::summary::{sentence, table};
use ferry_guest_images::{Line, Workload};
use ferry_migration::options::Options;
use ferry_migration::report::{Report, Status};
use ferry_vmm::api::client::{Action, Client};
use ferry_vmm::api::types::MigrateRequest;
use ferry_vmm::doctor::examine;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// Boot a guest that computes, move it twice between processes while it does, and check everything.
///
/// The guest is the built-in one; it runs the NAS kernel MG, which checks its own results. The first move is a plain one, and
/// its downtime is compared with the longest gap that the guest itself saw; the second also compares all memory of both sides
/// in the pause.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  ferry demo\n  ferry demo --linux")]
pub struct Args {
    /// The guest's work: a NAS kernel and its class; mg.A, or mg.S with --linux.
    #[arg(long, value_name = "KERNEL.CLASS", value_parser = Workload::parse)]
    nas: Option<Workload>,
    /// The guest is a stock Debian Linux (downloaded once). Where this host's KVM cannot run it, all of the demo runs in a
    /// host that QEMU emulates.
    #[arg(long)]
    linux: bool,
    /// Virtual processors.
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u32,
}

/// How long a step may take before the demo gives up on it: this is for hosts that hang, not a speed limit.
const TIMEOUT: Duration = Duration::from_secs(240);
/// How often files and sockets are looked at.
const LOOK: Duration = Duration::from_millis(20);

/// What a run of the guest's kernel came to.
pub struct KernelRun {
    run: u64,
    verified: bool,
    mops: f64,
    seconds: f64,
    gap_max_us: u64,
    text: String,
}

/// A VMM process of the demo.
pub struct Host {
    name: &'static str,
    child: Child,
    api: PathBuf,
    console: PathBuf,
    errors: PathBuf,
}

impl Drop for Host {
    fn drop(&mut self) {
        // Those that moved their guest have ended by themselves.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Host {
    pub fn start(dir: &Path, name: &'static str, arguments: &[&str]) -> Result<Self, Failure> {
        let file = |kind: &str| dir.join(format!("{name}.{kind}"));
        let (api, console, errors) = (file("sock"), file("console"), file("errors"));
        let child = Command::new(std::env::current_exe()?)
            .args(arguments)
            .arg("--api")
            .arg(&api)
            .arg("--serial")
            .arg(format!("file:{}", console.display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&errors)?)
            .spawn()?;
        let mut host = Self {
            name,
            child,
            api,
            console,
            errors,
        };
        let client = host.client();
        host.until("answer on its control socket", |_| {
            Ok(client.status().ok().map(drop))
        })?;
        Ok(host)
    }

    pub fn client(&self) -> Client {
        Client::new(&self.api)
    }

    /// Waits until `look` finds something, as long as the process lives.
    fn until<T>(
        &mut self,
        what: &str,
        look: impl Fn(&Self) -> Result<Option<T>, Failure>,
    ) -> Result<T, Failure> {
        let began = Instant::now();
        loop {
            if let Some(found) = look(self)? {
                return Ok(found);
            }
            if let Some(status) = self.child.try_wait()? {
                let said = fs::read_to_string(&self.errors).unwrap_or_default();
                let said = said.trim().trim_start_matches("ferry: ");
                return Err(Failure(format!(
                    "process {} ended too early ({status}): {said}",
                    self.name
                )));
            }
            if began.elapsed() > TIMEOUT {
                return Err(Failure(format!(
                    "process {} did not {what} within {TIMEOUT:?}",
                    self.name
                )));
            }
            std::thread::sleep(LOOK);
        }
    }

    /// The result of the first run numbered `from` or later on this host's console.
    pub fn result(&mut self, from: u64) -> Result<KernelRun, Failure> {
        self.until("see the guest finish a run of its kernel", |host| {
            let console = fs::read_to_string(&host.console).unwrap_or_default();
            for line in console.lines() {
                match Line::parse(line) {
                    Some(Line::Result(r)) if r.run >= from => {
                        return Ok(Some(KernelRun {
                            run: r.run,
                            verified: r.verified,
                            mops: r.mops,
                            seconds: r.seconds,
                            gap_max_us: r.gaps.max_us,
                            text: format!("value {:.12e}, reference {:.12e}", r.value, r.reference),
                        }));
                    }
                    Some(Line::Error(_) | Line::Fault { .. }) => {
                        return Err(Failure(format!("the guest says: {}", line.trim())));
                    }
                    _ => {}
                }
            }
            Ok(None)
        })
    }
}

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

/// Memory of a Linux guest beside that of its work.
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
    let mut source = Host::start(dir.path(), "A", &run)?;
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
    from: &mut Host,
    name: &'static str,
    verify: bool,
) -> Result<(Host, Report), Failure> {
    let mut to = Host::start(dir, name, &["receive", "tcp:127.0.0.1:0"])?;
    let client = to.client();
    let uri = to.until("listen", |_| Ok(client.status()?.listening))?;
    let request = MigrateRequest {
        uri,
        options: Options {
            verify,
            ..Options::default()
        },
        detach: false,
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
