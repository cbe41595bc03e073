//! `ferry nas`.

use ferry_guest_images::{Facts, Outcome, Problem, Workload, run_on_threads};
use ferry_terminal::output::{Failure, put, put_json};
use serde_json::json;
use std::process::ExitCode;

/// Run one of the bare guest's kernels on the host itself, to compare.
///
/// Exits with 0 when the result is the published one, 1 otherwise.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  ferry nas mg.A --threads 2")]
pub struct Args {
    /// KERNEL.CLASS, such as mg.A: ep is cg mg ft bt sp in S W A B C.
    #[arg(value_name = "KERNEL.CLASS", value_parser = problem)]
    problem: Problem,
    /// Threads to run on, as --cpus of a guest.
    #[arg(long, value_name = "N", default_value_t = 1)]
    threads: usize,
    /// Print one JSON object instead.
    #[arg(long)]
    json: bool,
}

fn problem(text: &str) -> Result<Problem, String> {
    let workload = Workload::parse(text).map_err(|e| e.to_string())?;
    match workload.kind() {
        ferry_nas::workload::Workload::Nas(problem) => Ok(*problem),
        ferry_nas::workload::Workload::Dirty(_) => {
            Err("the writer runs in guests only; name a KERNEL.CLASS such as mg.A".into())
        }
    }
}

pub fn run(args: &Args) -> Result<ExitCode, Failure> {
    let facts = args.problem.facts();
    if !args.json {
        put(&banner(args.problem, &facts, args.threads))?;
    }
    let outcome = run_on_threads(args.problem, args.threads)?;
    if args.json {
        put_json(&json!({
            "schema": 1,
            "kernel": outcome.problem.to_string(),
            "class": outcome.problem.class.name(),
            "size": size(&facts),
            "iterations": facts.iterations,
            "threads": args.threads,
            "verified": outcome.verified,
            "value": outcome.check.value,
            "reference": outcome.check.reference,
            "error": outcome.error,
            "seconds": outcome.seconds,
            "mops": outcome.mops,
            "mops_per_thread": per_thread(&outcome, args.threads),
            "operation": facts.operation,
        }))?;
    } else {
        put(&text(&outcome, &facts, args.threads))?;
    }
    Ok(if outcome.verified {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// A size as NPB writes it.
fn size(facts: &Facts) -> String {
    let edges = facts.size;
    match edges {
        [one, 1, 1] => one.to_string(),
        _ => edges.map(|edge| edge.to_string()).join(" x "),
    }
}

fn per_thread(outcome: &Outcome, threads: usize) -> f64 {
    outcome.mops / threads.max(1) as f64
}

/// What NPB prints before it computes.
fn banner(problem: Problem, facts: &Facts, threads: usize) -> String {
    let name = problem.kernel.name().to_uppercase();
    format!(
        "NAS Parallel Benchmarks, {name}: ferry's own implementation of the published specification\n\
         size {}, iterations {}, threads {threads}\n\n",
        size(facts),
        facts.iterations
    )
}

/// What NPB prints of a result, field by field, and the value that was verified.
fn text(o: &Outcome, facts: &Facts, threads: usize) -> String {
    let verdict = if o.verified {
        "SUCCESSFUL"
    } else {
        "UNSUCCESSFUL"
    };
    let fields = [
        ("class", o.problem.class.name().to_owned()),
        ("size", size(facts)),
        ("iterations", facts.iterations.to_string()),
        ("time in seconds", format!("{:.2}", o.seconds)),
        ("total threads", threads.to_string()),
        ("Mop/s total", format!("{:.2}", o.mops)),
        ("Mop/s/thread", format!("{:.2}", per_thread(o, threads))),
        ("operation type", facts.operation.to_owned()),
        ("verification", verdict.to_owned()),
        ("value", format!("{:.13e}", o.check.value)),
        ("reference", format!("{:.13e}", o.check.reference)),
        ("relative error", format!("{:.1e}", o.error)),
    ];
    let mut text = format!("{} completed\n", o.problem.kernel.name().to_uppercase());
    for (name, value) in fields {
        text.push_str(&format!("  {name:<16}= {value:>24}\n"));
    }
    text
}
