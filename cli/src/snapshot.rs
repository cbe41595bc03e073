//! `ferry snapshot`.

use super::migrate::cancel_on_signal;
use super::outcome::Ended;
use clap::builder::TypedValueParser;
use ferry_migration::options::Compress;
use ferry_terminal::flags::{FileToMake, TargetAnd, choice};
use ferry_terminal::output::{Failure, put, put_json};
use ferry_terminal::rows::Rows;
use ferry_terminal::units::{grouped, span};
use ferry_vmm::api::client::Client;
use ferry_vmm::api::types::{SnapshotReport, SnapshotRequest, Then};
use std::process::ExitCode;

/// Write a guest to a file, for `ferry restore`.
///
/// The guest stands still while its memory is written, and goes on afterwards. With --live it runs
/// while most of it is written, which takes longer and a larger file. The file is the guest at one
/// moment.
///
/// The guest's VMM writes the file, and only that user can read it. It gets its name when it is
/// complete: Ctrl-C (or `ferry cancel`) leaves none. Pages of zeros take no room. Disks are not in
/// it: copy them while the guest stands still (--then pause), with `cp -p`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  ferry snapshot web web.snap
  ferry snapshot web web.snap --then stop --compress zstd")]
pub struct Args {
    #[command(flatten)]
    target: TargetAnd<FileToMake>,
    /// What becomes of the guest: resume (it goes on as before), pause or stop (the VMM ends).
    #[arg(long, value_name = "ACTION", default_value = "resume", value_parser = choice::<Then>())]
    then: Then,
    /// Let the guest run while most of its memory is written.
    #[arg(long)]
    live: bool,
    /// How pages are compressed; auto compresses only where writing is slower than that.
    #[arg(long, value_name = "HOW", default_value = "auto", value_parser = choice::<Compress>().try_map(compress))]
    compress: Compress,
    /// Replace a file of that name.
    #[arg(long)]
    force: bool,
    /// The version of the machine's state to write, for an older ferry that is to restore it; the
    /// newest without it.
    #[arg(long, value_name = "N")]
    state_version: Option<u32>,
    /// Print the report as one JSON object.
    #[arg(long)]
    json: bool,
}

/// Of the migration's ways those that need nothing at the other side.
fn compress(compress: Compress) -> Result<Compress, &'static str> {
    match compress {
        Compress::Delta => {
            Err("a snapshot has no earlier pages to differ from; give none, zstd, adaptive or auto")
        }
        compress => Ok(compress),
    }
}

pub fn run(args: &Args) -> Result<ExitCode, Ended> {
    // The VMM has another working directory.
    let path = &args.target.word.0;
    let path = std::path::absolute(path)
        .map_err(|e| Failure(format!("{} is no path for a file ({e})", path.display())))?;
    let request = SnapshotRequest {
        path,
        compress: args.compress,
        live: args.live,
        force: args.force,
        then: args.then,
        state_version: args.state_version,
    };
    let client = Client::new(&args.target.socket()?);
    cancel_on_signal(client.clone(), "cancelling; no file is made")?;
    let report = client.snapshot(&request)?;
    if args.json {
        put_json(&report)?;
    } else {
        put(&text(&report, args.then))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn text(report: &SnapshotReport, then: Then) -> String {
    let what = match then {
        Then::Resume => "the guest goes on as before",
        Then::Pause => "the guest is paused",
        Then::Stop => "the guest was ended",
    };
    let written = match report.rounds {
        0 | 1 => String::new(),
        rounds => format!(
            ", in {rounds} passes; {} pages were written again",
            grouped(report.superseded)
        ),
    };
    let mut rows = Rows::default();
    rows.add(
        "downtime",
        format!(
            "{:.1} ms = quiesce {:.2} ms + memory {:.1} ms + state {:.2} ms + start",
            report.downtime_ms, report.quiesce_ms, report.pages_ms, report.state_ms
        ),
    );
    let (data, all) = (grouped(report.data_pages), grouped(report.pages));
    rows.add("pages", format!("{data} of {all} hold something{written}"));
    format!(
        "{}: {:.1} MB in {}; {what}\n{}",
        report.path.display(),
        report.bytes as f64 / 1e6,
        span(report.total_ms),
        rows.text()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn what_it_takes() {
        let parse = |more: &[&str]| {
            let line = [&["x", "--api", "s", "f"], more].concat();
            Line::try_parse_from(line).map(|line| line.args)
        };
        let args = parse(&[]).unwrap();
        assert_eq!(
            (args.then, args.compress, args.live),
            (Then::Resume, Compress::Auto, false)
        );
        let args = parse(&["--then", "stop", "--compress", "zstd", "--live"]).unwrap();
        assert_eq!(
            (args.then, args.compress, args.live),
            (Then::Stop, Compress::Zstd, true)
        );
        assert!(parse(&["--compress", "delta"]).is_err());
        assert!(parse(&["--then", "fly"]).is_err());
    }
}
