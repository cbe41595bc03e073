//! `ferry report`.

use super::outcome::{Ended, row};
use ferry_terminal::flags::{TargetAnd, Word};
use ferry_terminal::output::{clean, put, put_json};
use ferry_terminal::progress::line;
use ferry_terminal::rows::Rows;
use ferry_terminal::summary::{faults, sentence, table};
use ferry_terminal::units::{grouped, span, traffic};
use ferry_vmm::api::client::Client;
use ferry_vmm::api::types::{Direction, IncomingReport, MigrationRecord, RecordStatus};
use serde::Serialize;
use std::ffi::OsString;
use std::process::ExitCode;

/// Show the report of a migration that has ended, or how far it is.
///
/// A VMM keeps its last 16 migrations: those that left, with the report of `ferry migrate`, and
/// those that arrived, with what the destination has seen. The source of a guest that has moved
/// ends, and its reports with it, unless it was started with --linger.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  ferry report web
  ferry report web 6f1e0c4b5a7d4e0f9b1c2d3e4f5a6b7c --json")]
pub struct Args {
    #[command(flatten)]
    target: TargetAnd<Id>,
    /// Print one JSON object instead. Its `code` is that of `ferry migrate`, or `under-way`.
    #[arg(long)]
    json: bool,
}

/// Which migration.
#[derive(Clone, Debug)]
struct Id(Option<String>);

impl Word for Id {
    const VALUE: &'static str = "ID";
    const HELP: &'static str =
        "The migration, as `ferry migrate --detach` prints it; without it, the last one";

    fn read(word: Option<OsString>) -> Result<Self, String> {
        let text = word.map(OsString::into_string).transpose();
        text.map(Self)
            .map_err(|odd| format!("{} is no migration's ID", odd.display()))
    }
}

/// What `--json` prints.
#[derive(Serialize)]
struct Coded<'a> {
    code: &'static str,
    #[serde(flatten)]
    record: &'a MigrationRecord,
}

pub fn run(args: &Args) -> Result<ExitCode, Ended> {
    let client = Client::new(&args.target.socket()?);
    let record = match &args.target.word.0 {
        Some(id) => client.migration_record(id)?,
        None => client.migrations()?.migrations.pop().ok_or_else(|| Ended {
            outcome: row(1, "refused"),
            sentence: "this VMM has seen no migration yet".into(),
        })?,
    };
    if args.json {
        let code = code(&record);
        put_json(&Coded {
            code,
            record: &record,
        })?;
    } else {
        put(&text(&record))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn code(record: &MigrationRecord) -> &'static str {
    match (record.status, &record.report) {
        (RecordStatus::Completed, Some(report)) if report.verified == Some(false) => "not-equal",
        (RecordStatus::Completed, _) => "moved",
        (status, _) => status.name(),
    }
}

fn text(record: &MigrationRecord) -> String {
    let (id, to) = (clean(&record.id), record.to.as_deref().unwrap_or_default());
    let status = record.status.name();
    match (record.direction, &record.report, &record.incoming) {
        (_, Some(report), _) => {
            let resolved = match record.status == report.status.into() {
                true => String::new(),
                false => format!("since then: {status}\n"),
            };
            let ended = sentence(report, &clean(to));
            format!("{id}: {ended}\n{resolved}\n{}", table(report))
        }
        (Direction::Incoming, _, incoming) => {
            let policy = match record.policy.as_str() {
                "" => String::new(),
                policy => format!(" by {}", clean(policy)),
            };
            let arrived = incoming.as_ref().map(arrived).unwrap_or_default();
            format!("{id}: arrives here{policy}, {status}\n\n{arrived}")
        }
        _ => {
            let progress = record.progress.as_ref().map(line).unwrap_or_default();
            format!("{id}: to {}, {status}: {progress}\n", clean(to))
        }
    }
}

fn arrived(incoming: &IncomingReport) -> String {
    let mut rows = Rows::default();
    rows.add("news", clean(&incoming.explanation));
    rows.add("time", span(incoming.total_ms));
    rows.add("received", traffic(incoming.bytes_received));
    if incoming.missing_pages > 0 {
        let pages = grouped(incoming.missing_pages);
        rows.add("missing", format!("{pages} pages"));
    }
    if let Some(text) = faults(&incoming.faults) {
        rows.add("faults", text);
    }
    rows.text()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_migration::report::{Report, Status};

    fn record() -> MigrationRecord {
        MigrationRecord {
            schema: 1,
            id: "6f1e".into(),
            direction: Direction::Outgoing,
            to: Some("tcp:b:1".into()),
            policy: "auto".into(),
            status: RecordStatus::InDoubt,
            begun_unix_ms: 1,
            ended_unix_ms: None,
            progress: None,
            report: None,
            incoming: None,
        }
    }

    #[test]
    fn what_left_has_the_report_of_migrate_and_what_became_of_it() {
        let report = Report::bare(
            "6f1e".into(),
            "auto".into(),
            Status::InDoubt,
            "no word".into(),
        );
        let mut record = MigrationRecord {
            report: Some(report),
            ..record()
        };
        let text = |record: &MigrationRecord| super::text(record);
        assert!(
            text(&record).starts_with("6f1e: the migration to tcp:b:1 ended in doubt (no word)")
        );
        assert!(!text(&record).contains("since then"));
        assert_eq!(code(&record), "in-doubt");
        record.status = RecordStatus::Completed;
        assert!(text(&record).contains("\nsince then: completed\n"));
        assert_eq!(code(&record), "moved");
    }

    #[test]
    fn what_arrives_and_what_is_under_way() {
        let incoming = IncomingReport {
            total_ms: 1500.0,
            bytes_received: 1_000_000,
            missing_pages: 1234,
            faults: Default::default(),
            explanation: "its pages follow".into(),
        };
        let arriving = MigrationRecord {
            direction: Direction::Incoming,
            status: RecordStatus::UnderWay,
            incoming: Some(incoming),
            to: None,
            ..record()
        };
        assert_eq!(
            text(&arriving),
            "6f1e: arrives here by auto, under-way\n\n\
             news       its pages follow\ntime       1.50 s\nreceived   1.0 MB\nmissing    1,234 pages\n"
        );
        let leaving = MigrationRecord {
            status: RecordStatus::UnderWay,
            progress: Some(Default::default()),
            ..record()
        };
        assert_eq!(text(&leaving), "6f1e: to tcp:b:1, under-way: connecting\n");
    }
}
