//! `ferry sim paper mplm`: memory-bound pre-copy, multiplexed (Chanchio and Yaothanee 2018).

use super::findings::Finding;
use super::plot::{self, Bars};
use super::{Output, Paper, each, percent};
use crate::record::{self, record};
use crate::vmm_process::VmmProcess;
use ferry_guest_images::Workload;
use ferry_migration::model::{Outcome, Replay, Setup, migrate};
use ferry_migration::options::{Options, PolicyKind};
use ferry_migration::trace::Trace;
use ferry_terminal::output::{Failure, say};
use ferry_terminal::rows::wrapped;
use ferry_terminal::units::{duration, memory, rate};
use ferry_vmm::api::client::Action;
use ferry_vmm::api::types::RecordRequest;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Total time and downtime of MPLM and of pre-copy at a sweep of downtime targets, on the NAS
/// kernels.
///
/// The guests are recorded traces of the built-in kernels: given with --trace, or recorded here
/// from guests booted for it.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  ferry sim paper mplm
  ferry sim paper mplm --trace mg=mg.trace --trace is=is.trace")]
pub struct Args {
    #[command(flatten)]
    output: Output,
    /// A kernel's recorded trace; without any, the kernels are booted and recorded.
    #[arg(long, value_name = "KERNEL=PATH", value_parser = named_trace)]
    trace: Vec<(String, PathBuf)>,
    /// The class of the kernels to boot.
    #[arg(
        long,
        value_name = "CLASS",
        default_value = "A",
        conflicts_with = "trace"
    )]
    class: String,
    /// How long to record each.
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "10s", conflicts_with = "trace")]
    record: Duration,
    /// The link; by default 1 Gbit/s scaled as the guest's memory is to the paper's 8 GB, so that a
    /// pass takes as long.
    #[arg(long, value_name = "RATE", value_parser = rate)]
    bandwidth: Option<u64>,
    /// When pre-copy that does not converge is given up.
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "10m")]
    timeout: Duration,
}

impl Args {
    pub const fn json(&self) -> bool {
        self.output.json
    }
}

/// The paper's guest in bytes, its link in bytes per second, and its class.
const MEMORY: u64 = 8 << 30;
const LINK: f64 = 125e6;
const CLASS: &str = "C";
/// The kernels of the paper, in its order.
const KERNELS: [&str; 4] = ["mg", "is", "sp", "bt"];
/// Downtime targets in seconds; 0.3 is QEMU's default.
const TARGETS: [f64; 6] = [0.3, 1.0, 3.0, 10.0, 20.0, 40.0];
/// Shares (in per cent) and sync intervals (in seconds) of MPLM that are compared; the paper fixes
/// neither.
const SHARES: [u32; 4] = [0, 50, 100, 200];
const SYNCS: [f64; 3] = [0.25, 1.0, 3.0];

pub fn named_trace(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, path)) if !name.is_empty() && !path.is_empty() => {
            Ok((name.to_owned(), PathBuf::from(path)))
        }
        _ => Err("a trace is given as KERNEL=PATH, such as mg=mg.trace".into()),
    }
}

/// A kernel's trace and what was modelled over it.
struct Case {
    kernel: String,
    what: String,
    memory: u64,
    link: f64,
    dirtied_per_second: f64,
    mplm: Outcome,
    targets: Vec<Outcome>,
    /// By share, then by sync interval.
    variants: Vec<Outcome>,
}

impl Case {
    /// What one pass over the memory takes, in seconds.
    fn pass(&self) -> f64 {
        self.memory as f64 / self.link
    }

    /// MPLM's live phase in seconds.
    fn live(&self) -> f64 {
        (self.mplm.total - self.mplm.downtime).as_secs_f64()
    }
}

fn model(args: &Args, kernel: &str, trace: &Trace) -> Case {
    let header = trace.header();
    let scaled = LINK * header.memory_bytes as f64 / MEMORY as f64;
    let link = args.bandwidth.map_or(scaled, |link| link as f64);
    let setup = Setup::new(header.layout.clone(), link);
    let options = Options {
        timeout: args.timeout,
        ..Options::as_published()
    };
    let run = |options: Options| migrate(&setup, &options, &mut Replay::new(trace, 1));
    let mplm = |share: u32, sync: f64| Options {
        policy: PolicyKind::Mplm,
        turn_share: share,
        sync: Duration::from_secs_f64(sync),
        // The paper's has no limit of any kind.
        timeout: Duration::MAX,
        ..options.clone()
    };
    let mut jobs = vec![mplm(options.turn_share, options.sync.as_secs_f64())];
    jobs.extend(TARGETS.map(|target| Options {
        downtime: Duration::from_secs_f64(target),
        ..options.clone()
    }));
    jobs.extend(
        SHARES
            .iter()
            .flat_map(|&share| SYNCS.map(|sync| mplm(share, sync))),
    );
    let mut outcomes = each(jobs, run).into_iter();
    let dirtied: u64 = trace.frames().iter().map(|frame| frame.pages()).sum();
    let mut next = |count: usize| outcomes.by_ref().take(count).collect::<Vec<_>>();
    let (first, targets) = (next(1), next(TARGETS.len()));
    Case {
        kernel: kernel.to_owned(),
        what: header
            .workload
            .as_ref()
            .map_or_else(|| "unnamed".to_owned(), |w| w.escape_debug().to_string()),
        memory: header.memory_bytes,
        link,
        dirtied_per_second: dirtied as f64 / trace.duration().as_secs_f64().max(1e-6),
        mplm: first[0].clone(),
        targets,
        variants: outcomes.collect(),
    }
}

/// The traces that were given, or that are recorded now.
fn traces(args: &Args) -> Result<Vec<(String, Trace)>, Failure> {
    if !args.trace.is_empty() {
        let read = |(name, path): &(String, PathBuf)| Ok((name.clone(), record::read(path)?));
        return args.trace.iter().map(read).collect();
    }
    let doctor = ferry_vmm::doctor::examine();
    if !doctor.ready {
        return Err(Failure(
            "no guest can be booted on this host to record its trace (see `ferry doctor`); record them on another \
             with `ferry record` and give them with --trace mg=PATH --trace is=PATH"
                .into(),
        ));
    }
    let dir = tempfile::Builder::new().prefix("ferry-mplm-").tempdir()?;
    let mut traces = Vec::new();
    for kernel in KERNELS {
        let work = format!("{kernel}.{}", args.class);
        match Workload::parse(&work) {
            Ok(workload) => traces.push((
                kernel.to_owned(),
                recorded(args, dir.path(), kernel, workload)?,
            )),
            Err(error) => say(&format!("{work} is left out: {error}")),
        }
    }
    if traces.is_empty() {
        return Err(Failure(format!(
            "none of the paper's kernels exists in class {}; give --class A",
            args.class
        )));
    }
    Ok(traces)
}

/// Boots a kernel in memory of which it takes the same share as in the paper's guest, and records
/// it.
fn recorded(
    args: &Args,
    dir: &Path,
    kernel: &'static str,
    workload: Workload,
) -> Result<Trace, Failure> {
    let needed = workload.memory_needed(1);
    let original = Workload::parse(&format!("{kernel}.{CLASS}"))?.memory_needed(1);
    // At least what it needs; whole MiB.
    let share = needed as f64 / original.clamp(1, MEMORY) as f64;
    let ram = needed
        .max(whole_bytes(MEMORY as f64 * share))
        .next_multiple_of(1 << 20);
    say(&format!(
        "recording {workload} for {:?} in a guest of {}",
        args.record,
        memory(ram)
    ));
    let (text, size) = (workload.to_string(), format!("{}M", ram >> 20));
    let run = [
        "run", "--nas", &text, "--repeat", "0", "--memory", &size, "--name", kernel,
    ];
    let mut host = VmmProcess::start(dir, kernel, &run)?;
    // Its first run makes the memory; what follows is the steady state.
    host.result(0)?;
    let request = RecordRequest {
        duration_ms: u64::try_from(args.record.as_millis()).unwrap_or(u64::MAX),
        ..RecordRequest::default()
    };
    request.check().map_err(Failure)?;
    let path = dir.join(format!("{kernel}.trace"));
    record(&host.client(), &request, &path)?;
    host.client().act(Action::Stop)?;
    record::read(&path)
}

/// Bytes from a product: no guest has 2⁵³ of them.
fn whole_bytes(bytes: f64) -> u64 {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let bytes = bytes as u64;
    bytes
}

pub fn run(args: &Args) -> Result<Paper, Failure> {
    let traces = traces(args)?;
    let cases: Vec<Case> = traces
        .iter()
        .map(|(kernel, trace)| model(args, kernel, trace))
        .collect();
    let out = args.output.directory("mplm")?;
    let seconds = |outcome: &Outcome, of: fn(&Outcome) -> Duration| {
        outcome.completed.then(|| of(outcome).as_secs_f64())
    };
    let bars = |title, y, of: fn(&Outcome) -> Duration| Bars {
        title,
        y,
        names: TARGETS
            .iter()
            .map(|target| format!("pre-copy, target {target} s"))
            .chain(["MPLM".to_owned()])
            .collect(),
        groups: cases
            .iter()
            .map(|case| {
                let values = case.targets.iter().chain([&case.mplm]);
                let values = values.map(|outcome| seconds(outcome, of)).collect();
                (case.kernel.to_uppercase(), values)
            })
            .collect(),
        missing: "∞",
    };
    let plots = vec![
        out.file("total-time.svg", |path| {
            let title = "Total migration time (∞: given up, never converged)";
            plot::bars(path, &bars(title, "seconds", |o| o.total))
        })?,
        out.file("downtime.svg", |path| {
            let title = "Downtime (∞: given up, never converged)";
            plot::bars(path, &bars(title, "seconds", |o| o.downtime))
        })?,
    ];
    let data: Vec<_> = cases
        .iter()
        .map(|case| {
            let cell = |o: &Outcome| {
                json!({ "completed": o.completed, "total_ms": o.total.as_secs_f64() * 1e3,
                    "downtime_ms": o.downtime.as_secs_f64() * 1e3, "pages_sent": o.pages_sent })
            };
            json!({
                "kernel": case.kernel, "workload": case.what, "memory_bytes": case.memory, "bandwidth": case.link,
                "dirtied_pages_per_second": case.dirtied_per_second, "mplm": cell(&case.mplm),
                "precopy": TARGETS.iter().zip(&case.targets).map(|(t, o)| json!({ "target_ms": t * 1e3, "outcome": cell(o) })).collect::<Vec<_>>(),
            })
        })
        .collect();
    let scale = match args.bandwidth {
        None => {
            "The link is scaled as the memory is, so that one pass over it takes the paper's 69 s and times can be compared."
        }
        Some(_) => "The link is what was asked for: times do not compare with the paper's.",
    };
    Ok(Paper {
        name: "mplm",
        setup: format!(
            "The paper: 8 vCPU, 8 GB, class C, 1 Gbit/s, QEMU 2.9. Here: recorded traces of {}, 1 vCPU each. {scale} Recording slows a \
             guest (each page that it writes costs it a fault per interval), so its dirty rate is a lower bound. Every page costs the same, \
             free ones too. The slides' charts are pictures: their text gives no numbers, so its claims are checked instead.",
            cases
                .iter()
                .map(|c| format!(
                    "{} ({}, {:.1} MB/s)",
                    c.what,
                    memory(c.memory),
                    c.link / 1e6
                ))
                .collect::<Vec<_>>()
                .join(", ")
        ),
        findings: findings(args, &cases),
        tables: vec![targets_table(args, &cases), variants_table(&cases)],
        data: json!({ "cases": data }),
        plots,
    })
}

fn pair(outcome: &Outcome) -> String {
    if !outcome.completed {
        return "given up".to_owned();
    }
    format!(
        "{:.1} / {:.2}",
        outcome.total.as_secs_f64(),
        outcome.downtime.as_secs_f64()
    )
}

fn findings(args: &Args, cases: &[Case]) -> Vec<Finding> {
    let share = f64::from(Options::default().turn_share) / 100.0;
    let timeout = args.timeout.as_secs_f64();
    let mut list = Vec::new();
    for case in cases {
        let name = case.kernel.to_uppercase();
        let bound = case.pass() * (1.0 + share);
        list.push(Finding::new(
            format!("{name}: MPLM's live phase ends"),
            "in a memory-bound time",
            format!("{:.1} s, bound {:.1} s", case.live(), bound),
            format!(
                "{} of the bound, memory ÷ bandwidth × (1 + share of the dirty group, {}); the guest dirties {:.0} pages/s, {:.1} times what the \
                 link carries.",
                percent(case.live() / bound),
                percent(share),
                case.dirtied_per_second,
                case.dirtied_per_second * 4096.0 / case.link
            ),
        ));
        let low = &case.targets[0];
        list.push(Finding::new(
            format!("{name}: pre-copy, {} s (default)", TARGETS[0]),
            "exceedingly long",
            if low.completed {
                format!("{:.0} s", low.total.as_secs_f64())
            } else {
                format!("> {timeout:.0} s, given up")
            },
            if low.completed {
                format!(
                    "{:.1} times MPLM's {:.0} s.",
                    low.total.as_secs_f64() / case.mplm.total.as_secs_f64(),
                    case.mplm.total.as_secs_f64()
                )
            } else {
                "QEMU has no time limit by default and goes on for as long as the kernel runs; ferry's pre-copy ends at --timeout."
                    .to_owned()
            },
        ));
        let first = case.targets.iter().position(|o| o.completed);
        let ours = first.map_or_else(
            || format!("no target up to {} s", TARGETS[TARGETS.len() - 1]),
            |at| {
                format!(
                    "{:.2} s of downtime at {} s",
                    case.targets[at].downtime.as_secs_f64(),
                    TARGETS[at]
                )
            },
        );
        let versus = case.mplm.downtime.as_secs_f64();
        list.push(Finding::new(
            format!("{name}: the target that converges"),
            "high downtime",
            ours,
            format!(
                "MPLM, which needs no target, pauses for {versus:.2} s after {:.0} s.",
                case.live()
            ),
        ));
    }
    let mut by_rate: Vec<&Case> = cases.iter().collect();
    by_rate.sort_by(|a, b| {
        let share = |c: &Case| c.dirtied_per_second / c.memory as f64;
        share(a).total_cmp(&share(b))
    });
    if by_rate.len() > 1 {
        let line = by_rate.iter().map(|c| {
            let pages = c.memory as f64 / 4096.0;
            let pause = c.mplm.downtime.as_secs_f64();
            format!(
                "{} {:.2}/s: {pause:.1} s",
                c.kernel.to_uppercase(),
                c.dirtied_per_second / pages
            )
        });
        list.push(Finding::new(
            "more dirty pages, longer downtime",
            "yes",
            line.collect::<Vec<_>>().join("; "),
            "Memories dirtied per second, and MPLM's downtime. What counts is how many different pages are dirty at the end, which grows \
             with the rate only until the working set is dirty.",
        ));
    }
    list
}

fn targets_table(args: &Args, cases: &[Case]) -> String {
    let mut rows = Vec::new();
    for case in cases {
        let mut row = vec![case.kernel.to_uppercase(), format!("{:.1}", case.pass())];
        row.extend(case.targets.iter().chain([&case.mplm]).map(pair));
        rows.push(row);
    }
    let head: Vec<String> = TARGETS
        .iter()
        .map(|target| format!("target {target} s"))
        .collect();
    let head: Vec<&str> = ["", "pass"]
        .into_iter()
        .chain(head.iter().map(String::as_str))
        .chain(["MPLM"])
        .collect();
    let widths: Vec<usize> = [3, 5].into_iter().chain([13; 7]).collect();
    format!(
        "Pre-copy at downtime targets, and MPLM: total / downtime in seconds (given up after {:.0} s)\n{}",
        args.timeout.as_secs_f64(),
        wrapped(&head, &widths, &rows)
    )
}

fn variants_table(cases: &[Case]) -> String {
    let mut rows = Vec::new();
    for case in cases {
        for (at, share) in SHARES.iter().enumerate() {
            let mut row = vec![case.kernel.to_uppercase(), format!("{share} %")];
            let of = case.variants.iter().skip(at * SYNCS.len());
            row.extend(of.take(SYNCS.len()).map(pair));
            rows.push(row);
        }
    }
    let head: Vec<String> = SYNCS.iter().map(|sync| format!("sync {sync} s")).collect();
    let head: Vec<&str> = ["", "share"]
        .into_iter()
        .chain(head.iter().map(String::as_str))
        .collect();
    format!(
        "MPLM's parameters, which the paper does not fix (its code syncs every 3 s): total / downtime in seconds\n{}",
        wrapped(&head, &[3, 6, 15, 15, 15], &rows)
    )
}
