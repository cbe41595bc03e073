//! STORD against pre-copy at a set dirty rate (Cha 2014), with a real writer over a real link.

use super::super::Common;
use super::super::cell::{Guest, Link};
use super::{Experiment, Results, ours, pages_per_second, pass_seconds, percent, shown, whole};
use crate::findings::Finding;
use ferry_guest_images::Workload;
use ferry_migration::options::{OnTimeout, Options, PolicyKind};
use ferry_terminal::output::Failure;
use ferry_terminal::units::{memory, rate, size};
use std::time::Duration;

/// STORD (Cha 2014): total time and bytes against pre-copy, at dirty rates that the writer is set
/// to.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  ferry bench paper stord --runs 1 --rates 50,90")]
pub struct Args {
    #[command(flatten)]
    pub common: Common,
    /// Dirty rates in per cent: the share of what the link carries that the writer dirties
    /// meanwhile.
    #[arg(long, value_name = "PERCENT", value_delimiter = ',', default_values_t = [20, 50, 90],
        value_parser = clap::value_parser!(u32).range(1..=99))]
    rates: Vec<u32>,
    /// Pieces into which STORD splits.
    #[arg(long, value_name = "K", value_delimiter = ',', default_values_t = [2, 4, 10],
        value_parser = clap::value_parser!(u32).range(2..=1024))]
    split: Vec<u32>,
    /// The guest's memory; the paper's is 4 GB.
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "256M")]
    memory: u64,
    /// The link; the paper's is 1 Gbit/s (120 MB/s). It must be so slow that a writer can dirty
    /// most of what it carries: with software KVM every first write to a page costs 30 to 50 µs.
    #[arg(long, value_name = "RATE", value_parser = rate, default_value = "250Mbit")]
    link: u64,
}

/// Memory of a guest outside the writer's working set, in bytes.
const OWN: u64 = 16 << 20;
/// Pre-copy is stopped after so many passes: at a dirty rate of 90 % the paper's takes ten.
const PASSES: f64 = 20.0;
/// The pause that ends the live phase; the paper has none, and stops when little is left.
const TARGET: Duration = Duration::from_millis(100);
/// The paper's pass: 4 GB at 120 MB/s.
const PAPER_PASS: f64 = 4e9 / 120e6;
/// The paper's savings in total time by dirty rate (Fig. 5), its best number of pieces.
const PAPER: [(u32, &str, f64); 3] = [
    (20, "10 %", 0.10),
    (50, "20 %", 0.20),
    (90, "up to 65 %", 0.65),
];

fn guest_name(rate: u32) -> String {
    format!("dirty {rate} %")
}

fn stord_name(k: u32) -> String {
    format!("stord k={k}")
}

const PRE_COPY: &str = "pre-copy";

pub fn experiment(args: &Args) -> Result<Experiment, Failure> {
    let pass = pass_seconds(args.memory, args.link);
    let mut guests = Vec::new();
    for &share in &args.rates {
        let set = args.memory.saturating_sub(OWN).max(1 << 20) >> 10;
        let pages = whole(pages_per_second(args.link) * f64::from(share) / 100.0).max(1);
        guests.push(Guest {
            name: guest_name(share),
            work: Workload::parse(&format!(
                "dirty:wss={set}K,rate={pages},pattern=uniform,fill=random"
            ))?,
            memory: args.memory,
            cpus: 1,
        });
    }
    let options = Options {
        downtime: TARGET,
        timeout: Duration::from_millis(whole(pass * PASSES * 1e3)),
        on_timeout: OnTimeout::Stop,
        ..Options::as_published()
    };
    let mut policies = vec![ours(PRE_COPY, options.clone())];
    policies.extend(args.split.iter().map(|&split| {
        let options = Options {
            policy: PolicyKind::Stord,
            split,
            ..options.clone()
        };
        ours(&stord_name(split), options)
    }));
    let link = Link {
        name: "the link".into(),
        rate: Some(args.link),
    };
    let scale = format!(
        "The paper: a model of 4 GB at 120 MB/s, {PAPER_PASS:.0} s a pass; the dirty rate is the share of what was transferred that \
         is dirty again after a round, evenly spread. Here: a real guest of {} over {} Mbit/s, {pass:.1} s a pass; its writer writes \
         that share of the pages which the link carries, at random over all of its memory, so that some are written twice: \
         \"dirty %\" above is what pre-copy's first round found. Both stop when the rest fits into {} ms, when they see no \
         progress, or after {PASSES:.0} passes.",
        memory(args.memory),
        args.link / 125_000,
        TARGET.as_millis()
    );
    let (rates, split) = (args.rates.clone(), args.split.clone());
    let judge = move |results: &Results<'_>| judge(results, &rates, &split, pass);
    Experiment::new(
        "STORD against pre-copy (Cha 2014)",
        &guests,
        &link,
        &policies,
        scale,
        judge,
    )
}

fn judge(results: &Results<'_>, rates: &[u32], split: &[u32], pass: f64) -> Vec<Finding> {
    let mut findings = Vec::new();
    for &rate in rates {
        let guest = guest_name(rate);
        let saved = |metric: &'static str| {
            let each = split.iter().map(|&k| {
                let saved = results.saved(&guest, &stord_name(k), PRE_COPY, metric);
                format!("{} (k={k})", percent(saved))
            });
            each.collect::<Vec<_>>().join(", ")
        };
        let known = PAPER.iter().find(|paper| paper.0 == rate);
        let best = split
            .iter()
            .filter_map(|&k| results.saved(&guest, &stord_name(k), PRE_COPY, "total_ms"));
        let best = super::extremes(best).map(|found| found.1);
        let why = match (known, best) {
            (Some(paper), Some(best)) => format!(
                "{:+.0} points at best. The first round found {} dirty, where the paper's would find {rate} %.",
                (best - paper.2) * 100.0,
                shown(results.median(&guest, PRE_COPY, "first_dirty"), " %", 0)
            ),
            _ => "No figure of the paper's to compare.".to_owned(),
        };
        findings.push(Finding::new(
            format!("Total time saved at {rate} %"),
            known.map_or("–", |paper| paper.1),
            saved("total_ms"),
            why,
        ));
        findings.push(Finding::new(
            format!("Bytes on the link saved at {rate} %"),
            "(not shown)",
            saved("link_mib"),
            "On a link that is always full, bytes are time.",
        ));
    }
    if rates.contains(&90) {
        let guest = guest_name(90);
        let passes = |policy: &str| {
            let total = results.median(&guest, policy, "total_ms");
            shown(total.map(|ms| ms / 1e3 / pass), " passes", 1)
        };
        findings.push(Finding::new(
            "Fig. 4: pre-copy's total at 90 %",
            format!("≈ 350 s, {:.1} passes", 350.0 / PAPER_PASS),
            passes(PRE_COPY),
            "A real writer hits pages twice and never stops; ferry's pre-copy ends when it sees no progress.",
        ));
        for &k in split {
            findings.push(Finding::new(
                format!("Fig. 4: STORD's total at 90 %, k={k}"),
                format!("≤ ≈ 120 s, {:.1} passes", 120.0 / PAPER_PASS),
                passes(&stord_name(k)),
                format!(
                    "The pause at the end: {} after pre-copy, {} here.",
                    shown(results.median(&guest, PRE_COPY, "gap_ms"), " ms", 0),
                    shown(results.median(&guest, &stord_name(k), "gap_ms"), " ms", 0)
                ),
            ));
        }
    }
    findings
}
