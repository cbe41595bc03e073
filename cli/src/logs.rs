//! `ferry logs`: what a guest has written to its serial port or console, where that is a file.

use super::outcome::Ended;
use ferry_terminal::flags::Target;
use ferry_terminal::output::Failure;
use ferry_vmm::api::client::Client;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

/// How often --follow looks for more.
const LOOK: Duration = Duration::from_millis(200);

/// Print what a guest has written to its serial port, where `--serial file:PATH` keeps it, or else
/// to its console, where `--console file:PATH` does.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  ferry logs web --follow")]
pub struct Args {
    #[command(flatten)]
    target: Target,
    /// Go on with what the guest writes, until its VMM ends.
    #[arg(short, long)]
    follow: bool,
}

pub fn run(args: &Args) -> Result<ExitCode, Ended> {
    let client = Client::new(&args.target.socket()?);
    let status = client.status()?;
    let is_file = |place: &Option<String>| place.as_ref().is_some_and(|p| p.starts_with("file:"));
    let console = is_file(&status.console) && !is_file(&status.serial);
    let serial = if console {
        status.console
    } else {
        status.serial
    };
    let path = match serial.as_deref().map(|serial| serial.split_once(':')) {
        Some(Some(("file", path))) => Path::new(path),
        Some(Some(("pty", _))) => {
            return Err(elsewhere("a pseudo-terminal; `ferry console` shows it"));
        }
        _ => {
            let place = serial
                .as_deref()
                .unwrap_or("a place that its VMM does not tell");
            return Err(elsewhere(&format!(
                "{place}; `--serial file:PATH` keeps it"
            )));
        }
    };
    let failed = |e: io::Error| Failure(format!("{} cannot be read ({e})", path.display()));
    if !fs::metadata(path).map_err(failed)?.is_file() {
        return Err(elsewhere(&format!("{}, which is no file", path.display())));
    }
    let mut log = File::open(path).map_err(failed)?;
    let mut there = true;
    loop {
        match copy(&mut log) {
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => break,
            copied => copied.map_err(failed)?,
        };
        if !args.follow || !there {
            break;
        }
        std::thread::sleep(LOOK);
        // After its end, once more: for its last words.
        there = client.status().is_ok();
    }
    Ok(ExitCode::SUCCESS)
}

fn elsewhere(place: &str) -> Ended {
    Failure(format!("the guest's serial port goes to {place}")).into()
}

/// Copies what has come since the last time; from the beginning where the file was truncated.
fn copy(log: &mut File) -> io::Result<()> {
    if log.metadata()?.len() < log.stream_position()? {
        log.seek(SeekFrom::Start(0))?;
    }
    let mut out = io::stdout().lock();
    let mut bytes = [0; 16 << 10];
    loop {
        let n = match log.read(&mut bytes) {
            Ok(0) => return out.flush(),
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        out.write_all(&bytes[..n])?;
    }
}
