//! `ferry evacuate`: all guests leave this host.

use super::migrate::on_signal;
use super::outcome::{Ended, Outcome, row};
use super::security::Certificates;
use super::to_host::{check_version, move_to, wanted};
use ferry_agent::{Agent, Settings, Wanted};
use ferry_migration::options::Options;
use ferry_terminal::flags::PolicyFlags;
use ferry_terminal::names::{GuestName, RuntimeFolder};
use ferry_terminal::output::{Failure, clean, put, put_json, say};
use ferry_terminal::rows::columns;
use ferry_terminal::units::{memory, span};
use ferry_vmm::api::client::{Action, Client};
use ferry_vmm::api::types::{MigrateRequest, StateName};
use ferry_vmm::sync::lock;
use serde::Serialize;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// Move every named guest of this host to others.
///
/// The agents of the other hosts say what they have and check that each guest can come, before
/// anything moves. The largest guests are placed and moved first, each on the host with the most
/// free memory that can take it. A guest that cannot move stays here and runs on.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  ferry evacuate --to hostb,hostc --parallel 2
  ferry evacuate --to hostb --dry-run")]
pub struct Args {
    /// The hosts, HOST or HOST:PORT each [default: `peers` of /etc/ferry/agent.toml].
    #[arg(long, value_name = "HOST", value_delimiter = ',')]
    to: Vec<String>,
    /// How many guests move at a time.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    parallel: u16,
    /// Say what would move where, and move nothing.
    #[arg(long)]
    dry_run: bool,
    /// Print one JSON object instead.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    policy: PolicyFlags,
    #[command(flatten)]
    certificates: Certificates,
}

/// Where the peers of this host are listed.
const SETTINGS: &str = "/etc/ferry/agent.toml";

/// A guest that is to leave.
struct Leaving {
    name: GuestName,
    client: Client,
    wanted: Wanted,
    /// What has to cross.
    resident: u64,
}

/// What became of one.
#[derive(Debug, Serialize)]
struct Row {
    guest: String,
    /// `null` where no host can take it.
    host: Option<String>,
    memory_bytes: u64,
    resident_bytes: u64,
    /// As `ferry migrate --json` says it; `planned` in a dry run, `no-place` where none can take
    /// it.
    code: &'static str,
    total_ms: Option<f64>,
    downtime_ms: Option<f64>,
    /// Why it did not move.
    error: Option<String>,
    #[serde(skip)]
    status: u8,
}

#[derive(Serialize)]
struct Printed<'a> {
    schema: u32,
    code: &'static str,
    guests: &'a [Row],
}

pub fn run(args: &Args) -> Result<ExitCode, Ended> {
    let options = args.policy.options();
    options.check().map_err(|e| Ended::usage(e.to_string()))?;
    let mut places = args.places()?;
    let (mut leaving, mut rows) = guests()?;
    leaving.sort_by_key(|guest| std::cmp::Reverse(guest.resident));
    let mut planned = Vec::new();
    for guest in leaving {
        match place(&guest, &mut places) {
            Ok(agent) => planned.push((guest, agent)),
            Err(why) => rows.push(Row::stays(&guest, None, NO_PLACE, why)),
        }
    }
    if args.dry_run {
        let plan = |(guest, agent)| Row::new(&guest, Some(&agent), PLANNED);
        rows.extend(planned.into_iter().map(plan));
    } else if !planned.is_empty() {
        rows.extend(move_all(planned, usize::from(args.parallel), &options)?);
    }
    rows.sort_by(|a, b| a.guest.cmp(&b.guest));
    // In doubt is worse than all else.
    let worst = rows.iter().max_by_key(|row| (row.status == 4, row.status));
    let best = if args.dry_run { PLANNED } else { MOVED };
    let (status, code) = worst.map_or((0, best.code), |row| (row.status, row.code));
    if args.json {
        put_json(&Printed {
            schema: 1,
            code,
            guests: &rows,
        })?;
    } else if rows.is_empty() {
        say("no named guest is on this host");
    } else {
        put(&text(&rows))?;
    }
    for row in rows.iter().filter(|row| row.status != 0) {
        let why = row.error.as_deref().unwrap_or("it did not move");
        say(&format!("{}: {}", row.guest, clean(why)));
    }
    Ok(status.into())
}

impl Args {
    /// The hosts that answer, each with the memory that it has.
    fn places(&self) -> Result<Vec<(Agent, u64)>, Ended> {
        let mut names = self.to.clone();
        if names.is_empty() && Path::new(SETTINGS).exists() {
            let settings = Settings::read(Path::new(SETTINGS));
            names = settings.map_err(|e| Failure(e.to_string()))?.peers;
        }
        if names.is_empty() {
            return Err(Ended::usage(format!(
                "where to is missing: give --to HOST, or list `peers` in {SETTINGS}"
            )));
        }
        let tls = self.certificates.folder_or_default();
        let mut places = Vec::new();
        let mut last = None;
        for name in names {
            let agent = Agent::new(&name, &tls, self.certificates.name())?;
            let host = agent.host().map_err(Ended::from).and_then(|host| {
                check_version(&host, agent.host_name())?;
                Ok(host)
            });
            match host {
                Ok(host) => places.push((agent, host.memory_available_bytes)),
                Err(ended) => {
                    say(&format!("{}; this goes on without it", ended.sentence));
                    last = Some(ended);
                }
            }
        }
        match last {
            Some(ended) if places.is_empty() => Err(ended),
            _ => Ok(places),
        }
    }
}

/// The guests that can leave, and those of which it is not clear.
fn guests() -> Result<(Vec<Leaving>, Vec<Row>), Ended> {
    let mut leaving = Vec::new();
    let mut rows = Vec::new();
    for (name, api) in RuntimeFolder::find()?.guests()? {
        let client = Client::new(&api);
        let Ok(status) = client.status() else {
            // Stale: `ferry ps` tells.
            continue;
        };
        if status.state == StateName::Receiving {
            continue;
        }
        let resident = status
            .guest
            .as_ref()
            .and_then(|guest| guest.memory.as_ref());
        let resident = resident.map_or(0, |memory| memory.resident_bytes);
        let what = match status.state {
            StateName::Running | StateName::Paused => client
                .configuration()
                .map_err(|e| e.to_string())
                .and_then(|guest| wanted(guest, name.as_str()).map_err(|e| e.0)),
            _ => Err(status.explanation),
        };
        match what {
            Ok(wanted) => leaving.push(Leaving {
                name,
                client,
                wanted,
                resident,
            }),
            Err(why) => rows.push(Row {
                guest: name.to_string(),
                host: None,
                memory_bytes: 0,
                resident_bytes: resident,
                code: "failed",
                total_ms: None,
                downtime_ms: None,
                error: Some(why),
                status: 1,
            }),
        }
    }
    Ok((leaving, rows))
}

/// The host with the most memory left that can take a guest; why none can.
fn place(guest: &Leaving, places: &mut [(Agent, u64)]) -> Result<Agent, String> {
    places.sort_by_key(|(_, free)| std::cmp::Reverse(*free));
    let mut why = Vec::new();
    for (agent, free) in places {
        if *free < guest.wanted.memory_bytes {
            let left = memory(*free);
            why.push(format!("{} has {left} left", agent.host_name()));
            continue;
        }
        let asked = Wanted {
            dry_run: true,
            ..guest.wanted.clone()
        };
        match agent.receive(&asked) {
            Ok(_) => {
                *free -= guest.wanted.memory_bytes;
                return Ok(agent.clone());
            }
            Err(error) => why.push(error.to_string()),
        }
    }
    Err(why.join("; "))
}

/// Moves all of them, so many at a time.
fn move_all(
    planned: Vec<(Leaving, Agent)>,
    parallel: usize,
    options: &Options,
) -> Result<Vec<Row>, Ended> {
    let clients: Vec<Client> = planned
        .iter()
        .map(|(guest, _)| guest.client.clone())
        .collect();
    let cancelled = Arc::new(AtomicBool::new(false));
    let stop = Arc::clone(&cancelled);
    on_signal(
        "cancelling; the guests that have not moved stay here",
        move || {
            stop.store(true, Ordering::SeqCst);
            // Those that do not move now have nothing to cancel.
            clients
                .iter()
                .for_each(|client| drop(client.act(Action::Cancel)));
        },
    )?;
    let left = Mutex::new(planned.into_iter());
    let done = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..parallel {
            scope.spawn(|| {
                let next = || lock(&left).next();
                while let Some((guest, agent)) = next() {
                    let row = match cancelled.load(Ordering::SeqCst) {
                        true => {
                            let why = "it was cancelled before it began".to_owned();
                            Row::stays(&guest, Some(&agent), CANCELLED, why)
                        }
                        false => move_one(&guest, &agent, options),
                    };
                    say(&format!("{}: {}", row.guest, row.code));
                    lock(&done).push(row);
                }
            });
        }
    });
    Ok(done.into_inner().unwrap_or_default())
}

fn move_one(guest: &Leaving, agent: &Agent, options: &Options) -> Row {
    let request = MigrateRequest {
        options: options.clone(),
        ..MigrateRequest::default()
    };
    match move_to(agent, &guest.client, &guest.wanted, request, &mut |_| {}) {
        Ok(report) => Row {
            total_ms: Some(report.total_ms),
            downtime_ms: Some(report.downtime_ms),
            error: report.error.clone(),
            ..Row::new(guest, Some(agent), Outcome::of(&report))
        },
        Err(ended) => Row::stays(guest, Some(agent), ended.outcome, ended.sentence),
    }
}

const MOVED: Outcome = row(0, "moved");
const PLANNED: Outcome = row(0, "planned");
const NO_PLACE: Outcome = row(1, "no-place");
const CANCELLED: Outcome = row(3, "cancelled");

impl Row {
    fn new(guest: &Leaving, agent: Option<&Agent>, outcome: Outcome) -> Self {
        Self {
            guest: guest.name.to_string(),
            host: agent.map(|agent| agent.host_name().to_owned()),
            memory_bytes: guest.wanted.memory_bytes,
            resident_bytes: guest.resident,
            code: outcome.code,
            total_ms: None,
            downtime_ms: None,
            error: None,
            status: outcome.status,
        }
    }

    fn stays(guest: &Leaving, agent: Option<&Agent>, outcome: Outcome, why: String) -> Self {
        Self {
            error: Some(why),
            ..Self::new(guest, agent, outcome)
        }
    }
}

fn text(rows: &[Row]) -> String {
    let head = ["GUEST", "TO", "MEMORY", "RESULT", "TOTAL", "DOWNTIME"].map(str::to_owned);
    let ms = |ms: Option<f64>| ms.map_or_else(|| "–".to_owned(), span);
    let cells = rows.iter().map(|row| {
        [
            row.guest.clone(),
            row.host.clone().unwrap_or_else(|| "–".to_owned()),
            memory(row.memory_bytes),
            row.code.to_owned(),
            ms(row.total_ms),
            ms(row.downtime_ms),
        ]
    });
    let lines: Vec<_> = std::iter::once(head).chain(cells).collect();
    columns(&lines)
}
