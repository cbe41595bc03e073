//! MPLM against pre-copy at a sweep of downtime targets (Chanchio and Yaothanee 2018), on real NAS
//! kernels over a real link.

use super::super::Common;
use super::super::cell::{Guest, Link, Policy, Qemu, QemuMode};
use super::{Experiment, Results, extremes, ours, pass_seconds, shown, verdict, whole};
use crate::findings::Finding;
use ferry_guest_images::Workload;
use ferry_migration::options::{OnTimeout, Options, PolicyKind};
use ferry_terminal::output::{Failure, say};
use ferry_terminal::units::{memory, rate};
use std::time::Duration;

/// MPLM (Chanchio 2018): total time and downtime of MG, IS, SP and BT, against pre-copy at a sweep
/// of downtime targets.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  ferry bench paper mplm --runs 1 --kernels mg.B,is.B --targets 0.3,40"
)]
pub struct Args {
    #[command(flatten)]
    pub common: Common,
    /// Kernels and their classes; by default mg.B,is.B,sp.A,bt.A. The paper has class C.
    #[arg(long, value_name = "KERNEL.CLASS", value_delimiter = ',')]
    kernels: Vec<String>,
    /// Downtime targets of pre-copy, in seconds of the paper's guest.
    #[arg(long, value_name = "SECONDS", value_delimiter = ',', default_values_t = TARGETS, value_parser = target)]
    targets: Vec<f64>,
    /// Virtual processors; the paper has 8.
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u32,
    /// The link; the paper has 1 Gbit/s.
    #[arg(long, value_name = "RATE", value_parser = rate, default_value = "1Gbit")]
    link: u64,
    /// Leave QEMU's pre-copy out, the paper's own opponent.
    #[arg(long)]
    no_qemu: bool,
}

/// The paper's kernels in classes that fit this machine. MG's class B has the memory of class A and
/// five times the iterations: its timed loop takes longer than a pass, as the paper's does.
const KERNELS: [&str; 4] = ["mg.B", "is.B", "sp.A", "bt.A"];
/// The paper's guest and link: 8 GB over 1 Gbit/s.
const PAPER_MEMORY: u64 = 8 << 30;
const PAPER_LINK: u64 = 125_000_000;
/// Downtime targets of the paper's guest in seconds; 0.3 is QEMU's default. They are scaled with
/// the guest, so that they stay the same share of a pass.
const TARGETS: [f64; 5] = [0.3, 3.0, 10.0, 20.0, 40.0];
/// Pre-copy that has not ended after so many passes is stopped.
const PASSES: f64 = 8.0;
const MPLM: &str = "mplm";

fn target(text: &str) -> Result<f64, String> {
    let seconds = text.parse().ok().filter(|s| (0.001..=3600.0).contains(s));
    seconds.ok_or_else(|| format!("`{text}` is no target; give seconds, such as 0.3"))
}

fn works(args: &Args) -> Result<Vec<(String, Workload)>, Failure> {
    if !args.kernels.is_empty() {
        let read = |name: &String| Ok((name.clone(), Workload::parse(name)?));
        return args.kernels.iter().map(read).collect();
    }
    let mut works = Vec::new();
    for name in KERNELS {
        match Workload::parse(name) {
            Ok(work) => works.push((name.to_owned(), work)),
            Err(error) => say(&format!("{name} of the paper is left out: {error}")),
        }
    }
    Ok(works)
}

fn pre_copy_name(target: f64) -> String {
    format!("pre-copy {target} s")
}

pub fn experiment(args: &Args) -> Result<Experiment, Failure> {
    let cpus = usize::try_from(args.cpus).unwrap_or(usize::MAX);
    let works = works(args)?;
    let guests: Vec<Guest> = works
        .iter()
        .map(|(name, work)| Guest {
            name: name.clone(),
            work: *work,
            memory: work.memory_needed(cpus).next_multiple_of(1 << 20),
            cpus: args.cpus,
        })
        .collect();
    let largest = guests
        .iter()
        .map(|guest| guest.memory)
        .max()
        .unwrap_or(1 << 20);
    let pass = pass_seconds(largest, args.link);
    let shrunk = pass / pass_seconds(PAPER_MEMORY, PAPER_LINK);
    let timeout = Duration::from_millis(whole(pass * PASSES * 1e3));
    let target = |seconds: f64| Duration::from_millis(whole(seconds * shrunk * 1e3).max(1));
    let mut policies = vec![ours(
        MPLM,
        Options {
            policy: PolicyKind::Mplm,
            ..Options::default()
        },
    )];
    let mut targets = args.targets.clone();
    targets.sort_by(f64::total_cmp);
    targets.dedup();
    let (low, high) = extremes(targets.iter().copied()).unwrap_or((TARGETS[0], TARGETS[4]));
    policies.extend(targets.iter().map(|&seconds| {
        let options = Options {
            downtime: target(seconds),
            timeout,
            on_timeout: OnTimeout::Stop,
            ..Options::as_published()
        };
        ours(&pre_copy_name(seconds), options)
    }));
    if !args.no_qemu {
        let mut opponents = vec![low, high];
        opponents.dedup();
        for seconds in opponents {
            let downtime_ms = u64::try_from(target(seconds).as_millis()).unwrap_or(u64::MAX);
            let qemu = Qemu {
                stop_after_ms: Some(u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX)),
                ..Qemu::new(QemuMode::Precopy, downtime_ms)
            };
            let name = format!("qemu {}", pre_copy_name(seconds));
            policies.push(Policy::of_qemu(&name, qemu));
        }
    }
    let sizes: Vec<String> = guests
        .iter()
        .map(|g| format!("{} {}", g.name, memory(g.memory)))
        .collect();
    let scale = format!(
        "The paper: MG, IS, SP and BT of class C on 8 vCPUs and 8 GB over 1 Gbit/s, {:.0} s a pass, under QEMU/KVM 2.9. Here: {} on {} \
         vCPU over {} Mbit/s, {pass:.1} s a pass of the largest. Targets are named as the paper's guest would have them and scaled \
         by {shrunk:.3}, so that they are the same share of a pass. Pre-copy is stopped after {PASSES:.0} passes of the largest, or \
         when it sees no progress. A kernel is moved from the first quarter of its timed loop on, when its memory holds what it works \
         on; when a run is over, the guest verifies it and sets up the next: \"beside ms\" says how much of the move that was. A third of \
         mg's memory, its right side, is zero all the time, as NPB has it. The paper's bars carry no numbers in our copy: its claims are compared.",
        pass_seconds(PAPER_MEMORY, PAPER_LINK),
        sizes.join(", "),
        args.cpus,
        args.link / 125_000
    );
    let link = Link {
        name: "the link".into(),
        rate: Some(args.link),
    };
    let share = f64::from(Options::default().turn_share) / 100.0;
    let rate = args.link;
    let names: Vec<(String, u64)> = guests.iter().map(|g| (g.name.clone(), g.memory)).collect();
    let judge = move |results: &Results<'_>| {
        let mut findings = Vec::new();
        for (name, memory) in &names {
            findings.extend(judge(
                results,
                name,
                pass_seconds(*memory, rate),
                share,
                (low, high, shrunk),
            ));
        }
        findings
    };
    Experiment::new(
        "MPLM against pre-copy (Chanchio and Yaothanee 2018)",
        &guests,
        &link,
        &policies,
        scale,
        judge,
    )
}

/// `targets` are the lowest and the highest of the paper's guest, and what they are scaled by.
fn judge(
    results: &Results<'_>,
    guest: &str,
    pass: f64,
    share: f64,
    targets: (f64, f64, f64),
) -> Vec<Finding> {
    let (lowest, highest, shrunk) = targets;
    let seconds =
        |policy: &str, metric: &str| results.median(guest, policy, metric).map(|ms| ms / 1e3);
    let both = |policy: &str| {
        format!(
            "{}, pause {}",
            shown(seconds(policy, "total_ms"), " s", 1),
            shown(seconds(policy, "gap_ms"), " s", 2)
        )
    };
    let live = seconds(MPLM, "total_ms")
        .zip(seconds(MPLM, "gap_ms"))
        .map(|(total, gap)| total - gap);
    let bound = pass * (1.0 + share);
    let low = pre_copy_name(lowest);
    let high = pre_copy_name(highest);
    // A bound of the link's time, and what setting up takes.
    let bounded = live.map(|live| live <= bound * 1.05 + 0.2);
    let held = |policy: &str, target: f64| {
        seconds(policy, "gap_ms").map(|gap| gap <= target * shrunk * 1.5 + 0.02)
    };
    let longer = seconds(&low, "total_ms")
        .zip(seconds(MPLM, "total_ms"))
        .map(|(low, ours)| low > ours * 1.5);
    let deeper = seconds(&high, "gap_ms")
        .zip(seconds(MPLM, "gap_ms"))
        .map(|(high, ours)| high > ours);
    vec![
        Finding::new(
            format!("{guest}: MPLM ends"),
            "in a memory-bound time",
            both(MPLM),
            format!(
                "{} The live phase took {}, the bound is {bound:.1} s: a pass and what the dirty group adds.",
                verdict(bounded),
                shown(live, " s", 1)
            ),
        ),
        Finding::new(
            format!("{guest}: a low target ({lowest} s)"),
            "exceedingly long",
            both(&low),
            format!(
                "{} The target of {:.0} ms was {}. QEMU's own: {}.",
                verdict(longer),
                lowest * shrunk * 1e3,
                match held(&low, lowest) {
                    Some(true) => "held",
                    Some(false) => "not held: it was stopped",
                    None => "not tried",
                },
                both(&format!("qemu {low}"))
            ),
        ),
        Finding::new(
            format!("{guest}: a high target ({highest} s)"),
            "high downtime",
            both(&high),
            format!(
                "{} The target is {:.2} s here. QEMU's own: {}.",
                verdict(deeper),
                highest * shrunk,
                both(&format!("qemu {high}"))
            ),
        ),
    ]
}
