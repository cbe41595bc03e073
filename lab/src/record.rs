//! `ferry record`.

use ferry_migration::trace::Trace;
use ferry_terminal::flags::{FileToMake, TargetAnd};
use ferry_terminal::output::{Failure, put, put_json, say};
use ferry_terminal::units::{duration, grouped, memory, span};
use ferry_vmm::api::client::Client;
use ferry_vmm::api::types::RecordRequest;
use ferry_vmm::new_file::{Making, NewFile};
use ferry_vmm::sync::lock;
use ferry_vmm::thread;
use nix::sys::signal::{SigSet, Signal};
use serde_json::json;
use std::fs::File;
use std::io::{self, BufReader, Seek};
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Record which pages a running guest dirties, for `ferry sim --trace`.
///
/// The guest runs on, whatever becomes of this command. The file has its name when the recording
/// has ended; one that Ctrl-C ends can be used up to there. Meanwhile the guest cannot be migrated,
/// and each page that it writes costs it a fault per interval.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  ferry record web web.trace --duration 30s")]
pub struct Args {
    #[command(flatten)]
    target: TargetAnd<FileToMake>,
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

/// Records, and says what was recorded.
///
/// # Errors
/// The guest cannot be recorded, or the file cannot be written.
pub fn run(args: &Args) -> Result<ExitCode, Failure> {
    let request = RecordRequest::new(args.duration, args.interval).map_err(Failure)?;
    let path = &args.target.word.0;
    record(&Client::new(&args.target.socket()?), &request, path)?;
    let trace = read(path)?;
    let header = trace.header();
    let (dirtied, rate) = (trace.dirtied_pages(), trace.dirty_rate());
    let seconds = trace.duration().as_secs_f64();
    if args.json {
        put_json(&json!({
            "schema": 1,
            "path": path,
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
            path.display(),
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

/// Records into a file, which has its name when the recording has ended. What was recorded until
/// the VMM, or Ctrl-C, broke it off can be used: it takes the name if no file has it, and
/// `NAME.partial` otherwise. A recording that did not begin changes nothing.
///
/// # Errors
/// The guest cannot be recorded, or the file cannot be written.
pub fn record(client: &Client, request: &RecordRequest, path: &Path) -> Result<(), Failure> {
    let file = NewFile::create(path, Making::REPLACE)?;
    let mut output = file.file().try_clone()?;
    let unfinished = Arc::new(Mutex::new(Some(file)));
    keep_on_signal(Arc::clone(&unfinished))?;
    let result = client.record(request, &mut output);
    // None where a signal has ended the command, which is about to exit.
    let Some(file) = take(&unfinished) else {
        return Ok(result?);
    };
    match result {
        Ok(_) => file.publish()?,
        Err(error) => {
            keep(file)?;
            return Err(error.into());
        }
    }
    Ok(())
}

type Unfinished = Mutex<Option<NewFile>>;

fn take(unfinished: &Unfinished) -> Option<NewFile> {
    lock(unfinished).take()
}

/// Keeps a recording that was broken off, if anything was recorded.
fn keep(file: NewFile) -> Result<(), Failure> {
    let mut from = file.file().try_clone()?;
    if from.metadata()?.len() == 0 {
        return Ok(());
    }
    let path = file.path();
    if path.symlink_metadata().is_err() {
        say(&format!(
            "the recording was broken off; {} has what there is",
            path.display()
        ));
        return Ok(file.publish()?);
    }
    let mut name = path.as_os_str().to_owned();
    name.push(".partial");
    let partial = NewFile::create(Path::new(&name), Making::REPLACE)?;
    from.rewind()?;
    io::copy(&mut from, &mut partial.file())?;
    say(&format!(
        "the recording was broken off; {} has what there is, and {} stays as it was",
        partial.path().display(),
        path.display()
    ));
    Ok(partial.publish()?)
}

/// SIGINT and SIGTERM end the command, and what was recorded is kept.
fn keep_on_signal(unfinished: Arc<Unfinished>) -> Result<(), Failure> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.thread_block()?;
    let wait = move || {
        let signal = signals.wait().map_err(|e| e.to_string())?;
        if let Some(file) = take(&unfinished)
            && let Err(error) = keep(file)
        {
            say(&error.0);
        }
        // As a shell reports a command that a signal has ended.
        std::process::exit(128 + signal as i32);
    };
    let ended = |why: String| say(&format!("Ctrl-C keeps nothing of a recording now: {why}"));
    thread::spawn(thread::Kind::Vmm, "ferry-signals", wait, ended)?;
    Ok(())
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
