//! `ferry set`: changes what a guest has while it runs.

use super::outcome::Ended;
use ferry_terminal::flags::Target;
use ferry_terminal::output::{Failure, put_json, say};
use ferry_terminal::units::{duration, memory, size, span};
use ferry_vmm::api::client::Client;
use ferry_vmm::api::types::{MemoryRequest, MemoryStatus};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// How often --wait looks.
const LOOK: Duration = Duration::from_millis(200);

/// Let a running guest grow or shrink, between what it keeps in any case and the MAX of
/// `ferry run --memory SIZE,max=MAX`.
///
/// The guest follows in its own time, by its balloon driver: what it is to give up goes into the
/// balloon and back to the host. One without that driver does nothing. The size goes where the
/// guest goes, and it can be set while the guest is migrated.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  ferry set web --memory 512M
  ferry set web --memory 1G --wait 10s")]
pub struct Args {
    #[command(flatten)]
    target: Target,
    /// The memory that it is to have.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    memory: u64,
    /// Wait at most so long until the guest has it, and fail if it has not.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    wait: Option<Duration>,
    /// Print one JSON object instead.
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Result<ExitCode, Ended> {
    let client = Client::new(&args.target.socket()?);
    let size_bytes = args.memory;
    let mut status = client.set_memory(&MemoryRequest { size_bytes })?;
    if let Some(wait) = args.wait {
        let until = Instant::now() + wait;
        while !status.is_reached() {
            if Instant::now() >= until {
                return Err(late(&status, wait).into());
            }
            std::thread::sleep(LOOK.min(wait));
            status = client.memory()?;
        }
    }
    if args.json {
        put_json(&status)?;
    } else {
        say(&sentence(&status));
    }
    Ok(ExitCode::SUCCESS)
}

fn late(status: &MemoryStatus, wait: Duration) -> Failure {
    let wait = span(wait.as_secs_f64() * 1e3);
    Failure(format!("after {wait}, {}", sentence(status)))
}

fn sentence(status: &MemoryStatus) -> String {
    let [size, actual, max] =
        [status.size_bytes, status.actual_bytes, status.max_bytes].map(memory);
    if !status.driver {
        return format!(
            "the guest has no balloon driver yet: it keeps {actual}, and comes to {size} of {max} when it loads one"
        );
    }
    match status.is_reached() {
        true => format!("the guest has {size} of {max}"),
        false => format!("the guest has {actual} of {max}, and is asked to come to {size}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_guest_has_is_said() {
        let mut status = MemoryStatus {
            size_bytes: 512 << 20,
            actual_bytes: 1 << 30,
            max_bytes: 1 << 30,
            ..MemoryStatus::default()
        };
        assert_eq!(
            sentence(&status),
            "the guest has no balloon driver yet: it keeps 1 GiB, and comes to 512 MiB of 1 GiB when it loads one"
        );
        status.driver = true;
        let late = late(&status, Duration::from_secs(2)).0;
        assert_eq!(
            late,
            "after 2.00 s, the guest has 1 GiB of 1 GiB, and is asked to come to 512 MiB"
        );
        status.actual_bytes = 512 << 20;
        assert_eq!(sentence(&status), "the guest has 512 MiB of 1 GiB");
    }
}
