//! Runs a kernel on the host:
//! `cargo run --release -p ferry-nas --features std --example host -- mg.A [THREADS [RUNS]]`.
#![forbid(unsafe_code)]

use ferry_nas::host::run_on_threads;
use ferry_nas::workload::Workload;
use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let text = arguments.next().unwrap_or_else(|| "mg.S".to_owned());
    let threads = arguments.next().map_or(Ok(1), |text| text.parse())?;
    let runs = arguments.next().map_or(Ok(1), |text| text.parse::<u32>())?;
    let Workload::Nas(problem) = Workload::parse(&text).map_err(|error| error.to_string())? else {
        return Err(format!("`{text}` is not a kernel; write KERNEL.CLASS such as mg.A").into());
    };
    for _ in 0..runs {
        let outcome = run_on_threads(problem, threads)?;
        let verified = if outcome.verified {
            "verified"
        } else {
            "NOT VERIFIED"
        };
        println!(
            "{problem} on {threads}: {verified}, {:.2} Mop/s, {:.3} s",
            outcome.mops, outcome.seconds
        );
    }
    Ok(())
}
