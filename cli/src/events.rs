//! `ferry events`.

use super::outcome::Ended;
use ferry_migration::report::Event;
use ferry_terminal::flags::Target;
use ferry_terminal::output::clean;
use ferry_terminal::progress::line;
use ferry_terminal::summary::sentence;
use ferry_terminal::units::{grouped, span};
use ferry_vmm::api::client::Client;
use ferry_vmm::api::types::{Notice, What};
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Follow what happens to a guest and its VMM.
///
/// The first line is the state as it is. Ends when the VMM has nothing more to do, and fails when
/// it is killed.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  ferry events web")]
pub struct Args {
    #[command(flatten)]
    target: Target,
    /// Print one JSON object a line instead.
    #[arg(long)]
    json: bool,
}

/// Progress comes several times a second.
const PROGRESS: Duration = Duration::from_secs(1);

pub fn run(args: &Args) -> Result<ExitCode, Ended> {
    let client = Client::new(&args.target.socket()?);
    let (mut to, mut shown) = (String::new(), None);
    client.events(&mut |notice| {
        let text = match args.json {
            true => serde_json::to_string(notice).ok(),
            false => text(notice, &mut to, &mut shown),
        };
        let Some(text) = text else {
            return;
        };
        let mut out = io::stdout().lock();
        if writeln!(out, "{text}").and_then(|()| out.flush()).is_err() {
            // The reader has closed the pipe, which is how it ends this.
            std::process::exit(0);
        }
    })?;
    Ok(ExitCode::SUCCESS)
}

/// A line for people; `None` where there is none.
fn text(notice: &Notice, to: &mut String, shown: &mut Option<Instant>) -> Option<String> {
    let what = match &notice.what {
        What::State {
            state,
            explanation,
            to: goal,
            ..
        } => {
            goal.as_deref().unwrap_or_default().clone_into(to);
            format!("{}: {}", state.name(), clean(explanation))
        }
        What::Arrival { explanation, .. } => format!("arrival: {}", clean(explanation)),
        What::Lost { lost } => format!("{} events were missed here", grouped(*lost)),
        What::Migration(Event::Progress(progress)) => {
            if shown.is_some_and(|at| at.elapsed() < PROGRESS) {
                return None;
            }
            *shown = Some(Instant::now());
            line(progress)
        }
        What::Migration(Event::Round(round)) => format!(
            "round {} is there: {} pages in {}, {} dirtied meanwhile",
            round.n,
            grouped(round.pages),
            span(round.ms),
            grouped(round.dirtied)
        ),
        What::Migration(Event::Choice { why }) => format!("chosen: {}", clean(why)),
        What::Migration(Event::Steered(steered)) => format!("steered: {}", steered.change),
        What::Migration(Event::Report(report)) => sentence(report, &clean(to)),
        // Of a newer ferry.
        _ => return None,
    };
    Some(format!("{}  {what}", time_of_day(notice.unix_ms)))
}

/// In UTC, as logs have it.
fn time_of_day(unix_ms: u64) -> String {
    let (seconds, ms) = (unix_ms / 1000 % 86_400, unix_ms % 1000);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{hour:02}:{minute:02}:{second:02}.{ms:03}Z")
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_migration::report::{Progress, Report, Round, Status};
    use ferry_vmm::api::types::StateName;

    #[test]
    fn lines_for_people() {
        let (mut to, mut shown) = (String::new(), None);
        let mut say = |what| {
            let notice = Notice {
                unix_ms: 86_400_000 * 3 + 3_723_004,
                what,
            };
            text(&notice, &mut to, &mut shown)
        };
        let state = What::State {
            state: StateName::Migrating,
            explanation: "it\u{1b}moves".into(),
            to: Some("tcp:b:1".into()),
            migration: None,
        };
        assert_eq!(say(state).unwrap(), "01:02:03.004Z  migrating: it moves");
        let progress = || What::Migration(Event::Progress(Progress::default()));
        assert_eq!(say(progress()).unwrap(), "01:02:03.004Z  connecting");
        assert_eq!(say(progress()), None);
        let round = What::Migration(Event::Round(Round::default()));
        assert!(say(round).unwrap().contains("round 0 is there: 0 pages"));
        assert!(
            say(What::Lost { lost: 1234 })
                .unwrap()
                .ends_with("1,234 events were missed here")
        );
        let report = Report::bare("s".into(), "p".into(), Status::Failed, "no".into());
        let ended = say(What::Migration(Event::Report(Box::new(report)))).unwrap();
        assert!(
            ended.contains("the migration to tcp:b:1 failed (no)"),
            "{ended}"
        );
    }
}
