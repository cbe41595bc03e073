//! `ferry record`.

use ferry_migration::trace::Trace;
use ferry_terminal::output::{Failure, put, put_json, say};
use ferry_terminal::units::{duration, grouped, memory, span};
use ferry_vmm::api::client::Client;
use ferry_vmm::api::types::RecordRequest;
use serde_json::json;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// Record which pages a running guest dirties, for `ferry sim --trace`.
///
/// The guest runs on, whatever becomes of this command; a recording that is interrupted can be used
/// up to there. Meanwhile the guest cannot be migrated, and each page that it writes costs it a
/// fault per interval.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  ferry record --api /tmp/a.sock guest.trace --duration 30s")]
pub struct Args {
    /// The control socket of the guest's VMM.
    #[arg(long, value_name = "SOCKET")]
    api: PathBuf,
    /// The file to write.
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// How long to record.
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "10s")]
    duration: Duration,
    /// How often the dirty log is looked at.
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "100ms")]
    interval: Duration,
    /// Print one JSON object instead.
    #[arg(long)]
    json: bool,
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Records, and says what was recorded.
///
/// # Errors
/// The guest cannot be recorded, or the file cannot be written.
pub fn run(args: &Args) -> Result<ExitCode, Failure> {
    let request = RecordRequest {
        duration_ms: millis(args.duration),
        interval_ms: millis(args.interval),
    };
    request.check().map_err(Failure)?;
    record(&Client::new(&args.api), &request, &args.path)?;
    let trace = read(&args.path)?;
    let header = trace.header();
    let dirtied: u64 = trace.frames().iter().map(|frame| frame.pages()).sum();
    let seconds = trace.duration().as_secs_f64();
    let rate = dirtied as f64 / seconds.max(1e-6);
    if args.json {
        put_json(&json!({
            "schema": 1,
            "path": args.path,
            "whole": trace.is_whole(),
            "frames": trace.frames().len(),
            "seconds": seconds,
            "dirtied_pages": dirtied,
            "dirtied_pages_per_second": rate,
            "header": header,
        }))?;
    } else {
        let what = header.workload.as_deref().or(header.name.as_deref());
        put(&format!(
            "{}: {} of {} ({}), {} intervals, {} pages dirtied, {:.0} a second\n",
            args.path.display(),
            span(seconds * 1e3),
            what.unwrap_or("a guest").escape_debug(),
            memory(header.memory_bytes),
            trace.frames().len(),
            grouped(dirtied),
            rate
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Records into a file.
pub fn record(client: &Client, request: &RecordRequest, path: &Path) -> Result<(), Failure> {
    let mut file =
        File::create(path).map_err(|e| Failure(format!("cannot make {} ({e})", path.display())))?;
    let result = client.record(request, &mut file);
    if result.is_err() && file.metadata().is_ok_and(|m| m.len() == 0) {
        drop(file);
        // Nothing began: no empty file is left behind. It was this command's own.
        let _ = std::fs::remove_file(path);
    }
    Ok(result?)
}

/// Reads a trace, and says so when it was broken off.
pub fn read(path: &Path) -> Result<Trace, Failure> {
    let sentence = |e: &dyn std::fmt::Display| Failure(format!("{}: {e}", path.display()));
    let file = File::open(path).map_err(|e| sentence(&e))?;
    let trace = Trace::read(BufReader::new(file)).map_err(|e| sentence(&e))?;
    if !trace.is_whole() {
        say(&format!(
            "the recording in {} was broken off; what is there is used",
            path.display()
        ));
    }
    Ok(trace)
}
