//! `ferry ps`: the guests that have a name on this host.

use super::outcome::Ended;
use ferry_migration::report::Progress;
use ferry_terminal::names::{GuestName, RuntimeFolder};
use ferry_terminal::output::{clean, put, put_json};
use ferry_terminal::progress::line;
use ferry_terminal::rows::columns;
use ferry_terminal::units::{memory, span, to_the_second};
use ferry_vmm::api::client::{Client, ClientError};
use ferry_vmm::api::types::{StateName, Status};
use ferry_vmm::sync::lock;
use ferry_vmm::thread;
use serde::Serialize;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

/// How long all VMMs together may take. One answers in about a millisecond; one that is stopped
/// (SIGSTOP) never does.
const DEADLINE: Duration = Duration::from_secs(1);
/// VMMs that are asked at the same time.
const ASKERS: usize = 32;

/// List the guests that have a name on this host.
///
/// A guest has one by `--name` without --api. `stale` is a guest whose VMM was killed: the next
/// guest of that name takes its place. `no-answer` is one whose VMM did not answer within a second.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  ferry ps")]
pub struct Args {
    /// Print one JSON object instead.
    #[arg(long)]
    json: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
struct List {
    schema: u32,
    folder: PathBuf,
    guests: Vec<Row>,
}

/// One guest.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    api: PathBuf,
    /// As in `ferry status`, or `stale` or `no-answer`.
    state: &'static str,
    explanation: String,
    /// The name that the guest brought along, if that is another.
    guest_name: Option<String>,
    pid: Option<u32>,
    cpus: Option<u32>,
    memory_bytes: Option<u64>,
    /// When its VMM was started, RFC 3339.
    since: Option<String>,
    uptime_ms: Option<u64>,
    /// Where a migration goes, or went.
    to: Option<String>,
    listening: Option<String>,
    migration: Option<Progress>,
}

impl Row {
    fn of(name: &GuestName, api: &Path, answer: Option<Result<Status, ClientError>>) -> Self {
        let mut row = Self {
            name: name.to_string(),
            api: api.to_owned(),
            state: "no-answer",
            explanation: "its VMM does not answer".into(),
            guest_name: None,
            pid: None,
            cpus: None,
            memory_bytes: None,
            since: None,
            uptime_ms: None,
            to: None,
            listening: None,
            migration: None,
        };
        match answer {
            None => {}
            Some(Err(ClientError::Lost { cause, .. }))
                if matches!(
                    cause.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                ) => {}
            Some(Err(ClientError::NoAnswer { cause, .. }))
                if cause.kind() == io::ErrorKind::ConnectionRefused =>
            {
                row.state = "stale";
                row.explanation = format!(
                    "its VMM was killed; `ferry run --name {name}` or deleting the socket ends this entry"
                );
            }
            Some(Err(error)) => row.explanation = error.to_string(),
            Some(Ok(status)) => row.answered(status),
        }
        row
    }

    fn answered(&mut self, status: Status) {
        self.state = status.state.name();
        self.explanation = status.explanation;
        self.pid = Some(status.pid);
        self.since = since(status.uptime_ms);
        self.uptime_ms = Some(status.uptime_ms);
        self.to = status.to;
        self.listening = status.listening;
        self.migration = status.migration;
        if let Some(guest) = status.guest {
            self.cpus = Some(guest.cpus);
            self.memory_bytes = Some(guest.memory_bytes);
            self.guest_name = guest.name.filter(|own| *own != self.name);
        }
    }

    /// What is going on, where that is more than its state.
    fn note(&self) -> String {
        if let (Some(to), Some(progress)) = (&self.to, &self.migration) {
            return format!("to {to}: {}", line(progress));
        }
        let quiet = [StateName::Running, StateName::Paused].map(StateName::name);
        match (&self.to, &self.listening) {
            (Some(to), _) => format!("to {to}"),
            (None, Some(uri)) => format!("on {uri}"),
            _ if quiet.contains(&self.state) => String::new(),
            _ => self.explanation.clone(),
        }
    }

    fn cells(&self) -> [String; 6] {
        let or_nothing = |text: Option<String>| text.unwrap_or_else(|| "–".into());
        // Exact to 2⁵³ milliseconds.
        #[allow(clippy::cast_precision_loss)]
        let up = self.uptime_ms.map(|ms| span(ms as f64));
        [
            self.name.clone(),
            self.state.to_owned(),
            or_nothing(self.cpus.map(|n| n.to_string())),
            or_nothing(self.memory_bytes.map(memory)),
            or_nothing(up),
            clean(&self.note()),
        ]
    }
}

/// The moment that was so long ago, by this host's clock.
fn since(uptime_ms: u64) -> Option<String> {
    let moment = SystemTime::now().checked_sub(Duration::from_millis(uptime_ms))?;
    Some(to_the_second(moment.into()) + "Z")
}

pub fn run(args: &Args) -> Result<ExitCode, Ended> {
    let folder = RuntimeFolder::find()?;
    let guests = ask(folder.guests()?);
    if args.json {
        put_json(&List {
            schema: 1,
            folder: folder.path().to_owned(),
            guests,
        })?;
    } else {
        put(&text(&guests))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn text(guests: &[Row]) -> String {
    let head = ["NAME", "STATE", "CPUS", "MEMORY", "UP", ""].map(str::to_owned);
    let rows: Vec<_> = [head]
        .into_iter()
        .chain(guests.iter().map(Row::cells))
        .collect();
    columns(&rows)
}

/// Asks all of them. Those that have not answered by the deadline are left to the process's end.
fn ask(found: Vec<(GuestName, PathBuf)>) -> Vec<Row> {
    let deadline = Instant::now() + DEADLINE;
    let (answered, answers) = channel();
    let askers = found.len().min(ASKERS);
    let all: Vec<_> = found.iter().map(|(_, api)| api.clone()).collect();
    let left = Arc::new(Mutex::new(all.into_iter().enumerate()));
    for _ in 0..askers {
        let (left, answered) = (Arc::clone(&left), answered.clone());
        let work = move || {
            let next = || lock(&left).next();
            while let Some((at, api)) = next() {
                let status = Client::with_timeout(&api, DEADLINE).status();
                if answered.send((at, status)).is_err() {
                    break;
                }
            }
            Ok(())
        };
        // With fewer threads the others ask for it; without any, no VMM is asked.
        let failed = |why| tracing::warn!("{why}");
        let _ = thread::spawn(thread::Kind::Vmm, "ferry-ps", work, failed);
    }
    drop(answered);
    let mut known = BTreeMap::new();
    while known.len() < found.len() {
        let wait = deadline.saturating_duration_since(Instant::now());
        match answers.recv_timeout(wait) {
            Ok((at, status)) => known.insert(at, status),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
        };
    }
    let rows = found.iter().enumerate().map(|(at, (name, api))| {
        let answer = known.remove(&at);
        // Gone since the folder was read: its guest has ended.
        let gone = matches!(answer, Some(Err(ClientError::NoSocket(_))));
        (!gone).then(|| Row::of(name, api, answer))
    });
    rows.flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};

    /// A VMM that answers each connection with this status.
    fn answers(path: &Path, body: String) {
        let vmm = UnixListener::bind(path).unwrap();
        std::thread::spawn(move || {
            for stream in vmm.incoming() {
                let mut stream = stream.unwrap();
                let _ = stream.read(&mut [0; 4096]);
                let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
                let _ = stream.write_all((head + &body).as_bytes());
            }
        });
    }

    fn status(state: &str, more: &str) -> String {
        format!(
            r#"{{"schema":1,"version":"0.1.0","pid":7,"state":"{state}","explanation":"as it is","uptime_ms":61500,
                "guest":{{"name":"own","memory_bytes":67108864,"cpus":2}}{more}}}"#
        )
    }

    fn list(dir: &Path) -> Vec<Row> {
        let mut found: Vec<_> = std::fs::read_dir(dir)
            .unwrap()
            .map(|entry| {
                let path = entry.unwrap().path();
                let stem = path.file_stem().unwrap().to_str().unwrap();
                (stem.parse().unwrap(), path)
            })
            .collect();
        found.sort();
        ask(found)
    }

    #[test]
    fn each_kind_of_guest_has_its_line() {
        let dir = tempfile::tempdir().unwrap();
        let socket = |name: &str| dir.path().join(format!("{name}.sock"));
        answers(&socket("web"), status("running", ""));
        answers(
            &socket("moving"),
            status("migrating", r#","to":"tcp:b:7000""#),
        );
        answers(&socket("odd"), "nonsense".into());
        drop(UnixListener::bind(socket("dead")).unwrap());
        // A process that a test beside this one is about to start may hold it for a moment.
        while UnixStream::connect(socket("dead")).is_ok() {
            std::thread::yield_now();
        }
        // Its queue takes the connection, and no process reads the request.
        let _silent = UnixListener::bind(socket("silent")).unwrap();
        let rows = list(dir.path());
        let states: Vec<_> = rows.iter().map(|r| (r.name.as_str(), r.state)).collect();
        assert_eq!(
            states,
            [
                ("dead", "stale"),
                ("moving", "migrating"),
                ("odd", "no-answer"),
                ("silent", "no-answer"),
                ("web", "running"),
            ]
        );
        let text = text(&rows);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "NAME    STATE      CPUS  MEMORY  UP");
        assert_eq!(lines[5], "web     running    2     64 MiB  1 min 01 s");
        assert!(lines[2].ends_with("to tcp:b:7000"), "{text}");
        assert!(lines[1].contains("its VMM was killed"), "{text}");
        assert!(lines[3].contains("is no ferry"), "{text}");
        assert_eq!(rows[4].guest_name.as_deref(), Some("own"));
    }

    #[test]
    fn more_guests_than_askers_are_all_asked() {
        let dir = tempfile::tempdir().unwrap();
        for n in 0..2 * ASKERS {
            answers(
                &dir.path().join(format!("g{n:03}.sock")),
                status("paused", ""),
            );
        }
        let rows = list(dir.path());
        assert_eq!(rows.len(), 2 * ASKERS);
        assert!(rows.iter().all(|row| row.state == "paused"), "{rows:?}");
    }
}
