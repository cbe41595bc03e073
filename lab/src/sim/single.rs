//! `ferry sim` without a paper: one policy over one guest.

use super::guest;
use ferry_migration::model::{Outcome, Round, migrate};
use ferry_migration::options::Options;
use ferry_terminal::flags::PolicyFlags;
use ferry_terminal::output::{Failure, put, put_json, say};
use ferry_terminal::rows::{RoundRow, Rows, rounds};
use ferry_terminal::units::{grouped, rate, span, traffic};
use serde_json::json;
use std::process::ExitCode;
use std::time::Duration;

/// A guest, and a policy with the flags of `ferry migrate`.
#[derive(Debug, clap::Args)]
// Its name would be that of the command it is part of.
#[group(skip)]
pub struct Args {
    #[command(flatten)]
    guest: guest::Args,
    #[command(flatten)]
    policy: PolicyFlags,
    /// The sender's own cap, below the link's --bandwidth, for example 500Mbit.
    #[arg(long, value_name = "RATE", value_parser = rate, help_heading = "Limits")]
    cap: Option<u64>,
    /// Print one JSON object instead.
    #[arg(long)]
    json: bool,
}

impl Args {
    fn options(&self) -> Options {
        Options {
            bandwidth: self.cap,
            ..self.policy.options()
        }
    }
}

pub fn run(args: &Args) -> Result<ExitCode, Failure> {
    let options = args.options();
    options.check()?;
    let guest = args.guest.guest()?;
    let mut activity = guest.activity();
    let outcome = migrate(&guest.setup, &options, &mut *activity);
    if args.json {
        put_json(&json!({ "schema": 1, "guest": guest.name, "outcome": outcome }))?;
    } else {
        put(&text(&guest.name, &outcome))?;
    }
    if outcome.completed {
        return Ok(ExitCode::SUCCESS);
    }
    say(&format!("the guest would have stayed: {}", outcome.why));
    Ok(ExitCode::FAILURE)
}

fn text(name: &str, o: &Outcome) -> String {
    let ms = |time: Duration| span(time.as_secs_f64() * 1e3);
    let mut rows = Rows::default();
    rows.add("guest", name);
    rows.add("policy", &o.policy);
    rows.add("total", ms(o.total));
    rows.add("downtime", ms(o.downtime));
    rows.add(
        "pages",
        format!(
            "{} sent, {} of them again; {}",
            grouped(o.pages_sent),
            grouped(o.pages_resent),
            traffic(o.bytes)
        ),
    );
    if let Some(faults) = &o.faults {
        rows.add(
            "faults",
            format!(
                "{} ({} hit a page on its way), {} hidden by pushing ({:.1} %); stalled {}, at worst {}",
                grouped(faults.count),
                grouped(faults.on_the_way),
                grouped(faults.hidden),
                faults.hidden_share() * 100.0,
                ms(faults.stalled),
                ms(faults.worst)
            ),
        );
    }
    rows.add("why", &o.why);
    let row = |round: &Round| RoundRow {
        n: round.n,
        cells: vec![
            round.n.to_string(),
            grouped(round.pages),
            span(round.end * 1e3),
            grouped(round.pending),
        ],
    };
    let head = ["round", "pages", "until", "pending"];
    rows.text() + &rounds(&head, &o.rounds.iter().map(row).collect::<Vec<_>>())
}
