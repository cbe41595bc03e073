//! Post-copy against pre-copy over the working set (Hines and Gopalan 2009), with a real guest over
//! a real link.

use super::super::Common;
use super::super::cell::{Guest, Link};
use super::{Experiment, Results, extremes, ours, pass_seconds, percent, shown, verdict, whole};
use crate::findings::Finding;
use ferry_guest_images::Workload;
use ferry_migration::options::{OnTimeout, Options, PolicyKind};
use ferry_migration::order::PushOrder;
use ferry_terminal::output::Failure;
use ferry_terminal::units::{memory, rate, size};
use std::time::Duration;

/// Post-copy with pre-paging (Hines 2009): page faults, pages, times and degradation over the
/// working set.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  ferry bench paper postcopy --runs 1 --sets 16M,128M")]
pub struct Args {
    #[command(flatten)]
    pub common: Common,
    /// Working sets.
    #[arg(long, value_name = "SIZE", value_delimiter = ',', value_parser = size, default_value = "8M,32M,128M,256M")]
    sets: Vec<u64>,
    /// How the guest walks its working set: the slides' stress test is an endless loop.
    #[arg(long, value_name = "HOW", default_value = "sequential", value_parser = ["sequential", "uniform", "zipf"])]
    pattern: String,
    /// Pages that the guest writes per second; 0 is as fast as it can.
    #[arg(long, value_name = "PAGES", default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(0..=10_000_000))]
    rate: u32,
    /// The guest's memory; the slides' is 1024 MB.
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "512M")]
    memory: u64,
    /// The link; the slides' is Gigabit Ethernet.
    #[arg(long, value_name = "RATE", value_parser = rate, default_value = "1Gbit")]
    link: u64,
}

/// Xen's limit of rounds, at which the slides' pre-copy ended.
const ROUNDS: u32 = 29;
const PASSES: f64 = 10.0;
const PRE_COPY: &str = "pre-copy";
const DEMAND: &str = "demand paging";
const FLUSH: &str = "flush";
const SINGLE: &str = "bubble, 1 pivot";
const BUBBLE: &str = "bubble, 8 pivots";
const HYBRID: &str = "hybrid";

fn set_name(bytes: u64) -> String {
    format!("set of {}", memory(bytes))
}

pub fn experiment(args: &Args) -> Result<Experiment, Failure> {
    let mut guests = Vec::new();
    for &set in &args.sets {
        let work = format!(
            "dirty:wss={}K,rate={},pattern={},fill=random",
            set >> 10,
            args.rate,
            args.pattern
        );
        guests.push(Guest {
            name: set_name(set),
            work: Workload::parse(&work)?,
            memory: args.memory,
            cpus: 1,
        });
    }
    let pass = pass_seconds(args.memory, args.link);
    let way = |policy, order, pivots| Options {
        policy,
        order,
        pivots,
        downtime: Duration::from_millis(30),
        max_rounds: Some(ROUNDS),
        timeout: Duration::from_millis(whole(pass * PASSES * 1e3)),
        on_timeout: OnTimeout::Stop,
        ..Options::as_published()
    };
    let post = |order, pivots| way(PolicyKind::Postcopy, order, pivots);
    let policies = [
        ours(PRE_COPY, way(PolicyKind::Precopy, PushOrder::Bubble, 8)),
        ours(DEMAND, post(PushOrder::Demand, 1)),
        ours(FLUSH, post(PushOrder::Flush, 1)),
        ours(SINGLE, post(PushOrder::Bubble, 1)),
        ours(BUBBLE, post(PushOrder::Bubble, 8)),
        ours(HYBRID, way(PolicyKind::Hybrid, PushOrder::Bubble, 8)),
    ];
    let link = Link {
        name: "the link".into(),
        rate: Some(args.link),
    };
    let scale = format!(
        "The slides: a guest of 1024 MB under Xen on Gigabit Ethernet, its stress test writes a working set in an endless loop, \
         page faults are found by pseudo-paging. Here: a guest of {} over {} Mbit/s ({pass:.1} s a pass), a {} writer of {} pages a \
         second, page faults by userfaultfd. Demand paging ends when the guest has missed nothing for two seconds; \
         the rest then follows by address. Lost work is the slides' degradation: what the guest would have done in that time undisturbed.",
        memory(args.memory),
        args.link / 125_000,
        args.pattern,
        args.rate
    );
    let sets = args.sets.clone();
    let judge = move |results: &Results<'_>| judge(results, &sets);
    let title = "Post-copy against pre-copy (Hines and Gopalan 2009)";
    let mut experiment = Experiment::new(title, &guests, &link, &policies, scale, judge)?;
    // Each page on demand takes a minute or more: these come last, where time may be short.
    let cells = &mut experiment.spec.cells;
    cells.sort_by_key(|cell| cell.policy.name == DEMAND);
    Ok(experiment)
}

fn judge(results: &Results<'_>, sets: &[u64]) -> Vec<Finding> {
    let over = |of: &dyn Fn(&str) -> Option<f64>| {
        extremes(sets.iter().filter_map(|&set| of(&set_name(set))))
    };
    let saved = |policy: &'static str, other: &'static str, metric: &'static str| {
        over(&move |guest: &str| results.saved(guest, policy, other, metric))
    };
    let range = |found: Option<(f64, f64)>| {
        found.map_or_else(
            || "not measured".to_owned(),
            |(low, high)| format!("{} … {}", percent(Some(low)), percent(Some(high))),
        )
    };
    let values = |policy: &'static str, metric: &'static str, unit: &str| {
        let found = over(&move |guest: &str| results.median(guest, policy, metric));
        found.map_or_else(
            || "not measured".to_owned(),
            |(low, high)| format!("{low:.0} … {high:.0}{unit}"),
        )
    };
    let total = saved(BUBBLE, PRE_COPY, "total_ms");
    let pages = saved(BUBBLE, PRE_COPY, "pages_sent");
    let hidden = saved(BUBBLE, DEMAND, "faults");
    let single = saved(SINGLE, DEMAND, "faults");
    let mut findings = vec![
        Finding::new(
            "Total time, against pre-copy",
            "more than 50 % less",
            range(total),
            format!(
                "{} By working set, from the smallest saving to the largest.",
                verdict(total.map(|t| t.1 > 0.5))
            ),
        ),
        Finding::new(
            "Pages transferred, against pre-copy",
            "up to 75 % less",
            range(pages),
            format!(
                "{} Each page crosses once.",
                verdict(pages.map(|p| p.1 >= 0.75))
            ),
        ),
        Finding::new(
            "Faults that bubbling hides, worst",
            "≥ 50 %",
            percent(hidden.map(|h| h.0)),
            format!(
                "{} Against demand paging, by working set; with one pivot {}.",
                verdict(hidden.map(|h| h.0 >= 0.5)),
                percent(single.map(|s| s.0))
            ),
        ),
        Finding::new(
            "Faults that bubbling hides, best",
            "80 %",
            percent(hidden.map(|h| h.1)),
            format!(
                "{} With one pivot {}.",
                verdict(hidden.map(|h| h.1 >= 0.8)),
                percent(single.map(|s| s.1))
            ),
        ),
        Finding::new(
            "Faults that flushing hides",
            "(less)",
            range(saved(FLUSH, DEMAND, "faults")),
            "Pushing in the order of addresses, whatever the guest asks for.",
        ),
        Finding::new(
            "Downtime, pre-copy",
            "grows with the set",
            values(PRE_COPY, "gap_ms", " ms"),
            "The guest's own longest gap at the move.",
        ),
        Finding::new(
            "Downtime, post-copy",
            "remains low",
            values(BUBBLE, "gap_ms", " ms"),
            "The slides' own was higher than pre-copy's on light guests: pseudo-paging had to prepare the guest's memory in the pause.",
        ),
        Finding::new(
            "Downtime, hybrid",
            "(not shown)",
            values(HYBRID, "gap_ms", " ms"),
            "The set of stale pages is sent in the pause.",
        ),
    ];
    for &set in sets {
        let guest = set_name(set);
        let each = |policy: &str| {
            format!(
                "{} / {}",
                shown(results.median(&guest, policy, "lost_ms"), "", 0),
                shown(results.median(&guest, policy, "stall_ms"), "", 0)
            )
        };
        findings.push(Finding::new(
            format!("Degradation, {guest}: ms of work lost / of waiting"),
            "(curves)",
            format!("bubble {}; flush {}", each(BUBBLE), each(FLUSH)),
            format!(
                "Demand paging {}; pre-copy lost {}.",
                each(DEMAND),
                shown(results.median(&guest, PRE_COPY, "lost_ms"), " ms", 0)
            ),
        ));
    }
    findings
}
