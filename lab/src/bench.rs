//! `ferry bench`: measures migrations on this machine, ferry's and those of QEMU and Cloud
//! Hypervisor; and how Linux boots.
//!
//! A matrix of guests, links and policies, with several runs of every cell. Each run starts fresh
//! processes with the same guest and the same link, and the guest verifies its own memory. A run is
//! written to the journal when it ends, so that an interrupted benchmark goes on where it stopped.

mod boot;
mod cell;
mod charts;
mod cloud;
mod estimate;
mod ferry;
mod flags;
mod forecast;
mod goals;
mod host;
mod html;
mod interrupt;
mod journal;
mod listener;
mod log;
mod markdown;
mod measure;
mod net;
mod pair;
mod paper;
mod process;
mod qemu;
mod qmp;
mod runner;
mod spec;
mod statistics;
mod table;
mod warm;

use ferry_terminal::output::{Failure, put, say};
use ferry_terminal::units::duration;
use journal::{Host, Journal, Run};
use pair::Machine;
use spec::Spec;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// Measure migrations: guests × links × policies, ferry's and those of other hypervisors.
///
/// Results go into a directory: results.jsonl with every run, table.txt, report.md, and report.html
/// with plots. The same command goes on where it was interrupted. A shaped link needs root: two
/// network namespaces with tc between them; without it the senders cap themselves, which the
/// results say.
#[derive(Debug, clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Examples:
  ferry bench --guest mg.A --policy precopy --policy postcopy --peer qemu:postcopy --link 1Gbit --runs 3
  ferry bench tests/bench/goals.toml --out goals
  ferry bench goals
  ferry bench report goals"
)]
pub struct Args {
    #[command(subcommand)]
    what: Option<What>,
    /// A bench file, which says what to measure; instead of flags.
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
    #[command(flatten)]
    flags: flags::Flags,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Measure ferry's goals against QEMU, and say which are met.
    #[command(after_help = "Example:\n  ferry bench goals --runs 3")]
    Goals(Common),
    /// Repeat a paper's experiment with real guests, and compare the figures.
    #[command(
        subcommand,
        after_help = "Example:\n  ferry bench paper stord --runs 1"
    )]
    Paper(paper::Paper),
    Boot(boot::Args),
    /// Show the results of a directory again.
    #[command(after_help = "Example:\n  ferry bench report ferry-bench")]
    Report {
        /// The directory of the results.
        #[arg(value_name = "DIR")]
        directory: PathBuf,
        /// The bench file that they are of; it says which goals there were.
        #[arg(value_name = "FILE")]
        file: Option<PathBuf>,
    },
    /// Say what is measured, and how.
    #[command(after_help = "Example:\n  ferry bench legend")]
    Legend,
}

/// What every benchmark takes.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Runs")]
struct Common {
    /// Runs of every cell; by default what the file says, or 5.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: Option<u32>,
    /// The directory for the results; it is made.
    #[arg(long, value_name = "DIR", default_value = "ferry-bench")]
    out: PathBuf,
    /// QEMU.
    #[arg(long, value_name = "PATH", default_value = qemu::PROGRAM)]
    qemu: PathBuf,
    /// Cloud Hypervisor; by default $FERRY_CLOUD_HYPERVISOR, or cloud-hypervisor.
    #[arg(long, value_name = "PATH")]
    cloud_hypervisor: Option<PathBuf>,
    /// How long a migration may take before its run fails.
    #[arg(long, alias = "patience", value_name = "TIME", value_parser = duration, default_value = "10m")]
    timeout: Duration,
    /// How long to measure: runs are made in rounds, one of every cell, and no round is begun that
    /// is not expected to end in time. The first goes as far as the time does.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    budget: Option<Duration>,
    /// Leave out what is done right before each migration, for every VMM alike: to have the host's
    /// 2 MiB pages at hand, as a host has that is not a guest itself.
    #[arg(long)]
    cold: bool,
    /// Only say how many runs are to be made, and about how long they take.
    #[arg(long)]
    plan: bool,
    /// Only cells whose guest, link and policy contain all of these words.
    #[arg(long, value_name = "WORD")]
    only: Vec<String>,
}

/// The goals, as the repository has them.
const GOALS: &str = include_str!("../../tests/bench/goals.toml");
/// Runs of a cell, where nothing is said.
const RUNS: u32 = 5;

/// Measures, or shows what was measured.
///
/// # Errors
/// A bench file is wrong, a process cannot be started, or results cannot be written.
pub fn run(args: &Args) -> Result<ExitCode, Failure> {
    match &args.what {
        Some(What::Goals(common)) => {
            measure(Spec::parse("goals.toml", GOALS)?, common, None, |_, _| {
                String::new()
            })
        }
        Some(What::Paper(paper)) => {
            let experiment = paper.experiment()?;
            let verdict = |spec: &Spec, runs: &[Run]| experiment.verdict(spec, runs);
            measure(experiment.spec.clone(), paper.common(), None, verdict)
        }
        Some(What::Boot(args)) => boot::run(args),
        Some(What::Report { directory, file }) => report(directory, file.as_deref()),
        Some(What::Legend) => {
            put(&table::legend())?;
            Ok(ExitCode::SUCCESS)
        }
        None => {
            let named = args.flags.cloud();
            measure(spec(args)?, &args.common, named, |_, _| String::new())
        }
    }
}

/// What the file or the flags ask for.
fn spec(args: &Args) -> Result<Spec, Failure> {
    match &args.file {
        Some(path) if args.flags.is_empty() => Spec::read(path),
        Some(path) => Err(Failure(format!(
            "{} says what to measure, and so do flags; give one or the other",
            path.display()
        ))),
        None if args.flags.is_empty() => Err(Failure(
            "nothing is said about what to measure; give a bench file, or flags such as --guest mg.A --policy precopy \
             --peer qemu, or `ferry bench goals`"
                .into(),
        )),
        None => args.flags.spec(RUNS),
    }
}

/// Makes the missing runs and shows all results. `named` is the binary of Cloud Hypervisor that
/// flags name; `verdict` interprets the results.
fn measure(
    mut spec: Spec,
    common: &Common,
    named: Option<&Path>,
    verdict: impl Fn(&Spec, &[Run]) -> String,
) -> Result<ExitCode, Failure> {
    if let Some(runs) = common.runs {
        spec.runs = runs;
    }
    spec.keep(&common.only)?;
    if common.plan {
        let made = Journal::look(&common.out.join("results.jsonl"))?;
        let missing = journal::missing(&made, &spec.cells, spec.runs);
        let all = runner::all(&spec.cells, spec.runs);
        let plan = runner::plan(&made, &missing, all, common.budget);
        put(&format!("{}: {plan}\n", spec.title))?;
        return Ok(ExitCode::SUCCESS);
    }
    let doctor = ferry_vmm::doctor::examine();
    if !doctor.ready {
        return Err(Failure(
            "no guest can run on this host; `ferry doctor` says why".into(),
        ));
    }
    let out = &common.out;
    std::fs::create_dir_all(out)
        .map_err(|e| Failure(format!("{} cannot be made ({e})", out.display())))?;
    interrupt::watch()?;
    let ferry = std::env::current_exe()?;
    let machine = Machine {
        tsc_khz: pair::tsc_khz(&ferry)?,
        ferry,
        qemu: common.qemu.clone(),
        cloud: cloud::program(named.or(common.cloud_hypervisor.as_deref())),
        timeout: common.timeout,
        cold: common.cold,
    };
    if cfg!(debug_assertions) {
        say("this ferry is a debug build: its figures say nothing; use cargo build --release");
    }
    let mut journal = Journal::open(&out.join("results.jsonl"), host::describe(&machine))?;
    let result = runner::run(
        &machine,
        &mut journal,
        &spec.cells,
        spec.runs,
        common.budget,
    );
    let verdict = verdict(&spec, &journal.runs);
    show(out, &journal.host, &spec, &journal.runs, &verdict)?;
    if interrupt::wanted() {
        say(&format!(
            "interrupted: the same command goes on; so far in {}",
            out.display()
        ));
        return Ok(ExitCode::from(130));
    }
    result?;
    say(&format!("every run is in {}", out.display()));
    let good = |cell| {
        let row = statistics::Row::of(cell, &journal.runs);
        row.failed.is_empty() && row.verified() == row.good.len()
    };
    Ok(if spec.cells.iter().all(good) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Shows results again.
fn report(directory: &Path, file: Option<&Path>) -> Result<ExitCode, Failure> {
    let (host, runs) = Journal::show(&directory.join("results.jsonl"))?;
    let spec = match file {
        Some(path) => Spec::read(path)?,
        None => Spec::of(&runs),
    };
    show(directory, &host, &spec, &runs, "")?;
    Ok(ExitCode::SUCCESS)
}

/// The main figures on stdout, all of them in files with the results.
fn show(out: &Path, host: &Host, spec: &Spec, runs: &[Run], verdict: &str) -> Result<(), Failure> {
    let write = |name: &str, text: &str| {
        Ok::<(), Failure>(ferry_vmm::new_file::write(
            &out.join(name),
            text.as_bytes(),
        )?)
    };
    write(
        "table.txt",
        &(table::text(host, spec, runs, false) + verdict),
    )?;
    write("report.md", &markdown::page(host, spec, runs, verdict))?;
    write("report.html", &html::page(host, spec, runs, verdict)?)?;
    put(&(table::text(host, spec, runs, true) + verdict))
}
