//! `ferry nas`.

use super::output::{Failure, put, put_json};
use ferry_guest_images::{Outcome, Problem, Workload, run_on_threads};
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
    let outcome = run_on_threads(args.problem, args.threads)?;
    if args.json {
        put_json(&json!({
            "schema": 1,
            "kernel": outcome.problem.to_string(),
            "threads": args.threads,
            "verified": outcome.verified,
            "value": outcome.check.value,
            "reference": outcome.check.reference,
            "error": outcome.error,
            "seconds": outcome.seconds,
            "mops": outcome.mops,
        }))?;
    } else {
        put(&text(&outcome))?;
    }
    Ok(if outcome.verified {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn text(o: &Outcome) -> String {
    let verdict = if o.verified {
        "verified"
    } else {
        "NOT VERIFIED"
    };
    format!(
        "{}  {verdict}  {:.2} s  {:.1} Mop/s  value {:.13e}  reference {:.13e}  error {:.1e}\n",
        o.problem, o.seconds, o.mops, o.check.value, o.check.reference, o.error
    )
}
