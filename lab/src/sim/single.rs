//! `ferry sim` without a paper: one policy over one guest.

use super::guest;
use ferry_migration::model::{Outcome, migrate};
use ferry_migration::options::{OnTimeout, Options, PolicyKind};
use ferry_migration::order::PushOrder;
use ferry_terminal::flags::{Asked, asked, named};
use ferry_terminal::output::{Failure, put, put_json, say};
use ferry_terminal::units::{duration, grouped, rate, span, traffic};
use serde_json::json;
use std::process::ExitCode;
use std::time::Duration;

/// Which policy, with what options; the names are those of `ferry migrate`.
#[derive(Debug, clap::Args)]
// Its name would be that of the command it is part of.
#[group(skip)]
pub struct Args {
    #[command(flatten)]
    guest: guest::Args,
    /// Which algorithm decides what is sent when.
    #[arg(long, value_parser = named::<PolicyKind>, default_value = "precopy")]
    policy: PolicyKind,
    /// The longest acceptable pause.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    downtime: Option<Duration>,
    /// The longest acceptable time before the pause.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    timeout: Option<Duration>,
    /// What to do after it: cancel, or stop (pause for as long as it takes).
    #[arg(long, value_name = "ACTION", value_parser = named::<OnTimeout>)]
    on_timeout: Option<OnTimeout>,
    /// The sender's own cap, below the link's --bandwidth.
    #[arg(long, value_name = "RATE", value_parser = rate)]
    cap: Option<u64>,
    /// STORD: pieces into which a set of pages is split.
    #[arg(long, value_name = "K")]
    split: Option<u32>,
    /// MPLM: pages of the dirty group for every 100 that were never sent.
    #[arg(long, value_name = "PERCENT")]
    turn_share: Option<u32>,
    /// MPLM: how often the dirty log is looked at.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    sync: Option<Duration>,
    /// Send pages that are dirtied often late in a round; in the first, where that is not known yet, memory is sent in
    /// steps, and what is written meanwhile goes last. auto: pre-copy and hybrid do, the others do not.
    #[arg(long, value_name = "auto|on|off", value_parser = asked, num_args = 0..=1, require_equals = true, default_missing_value = "on")]
    reorder: Option<Asked>,
    /// Post-copy: the order in which pages are pushed.
    #[arg(long, value_name = "ORDER", value_parser = named::<PushOrder>)]
    order: Option<PushOrder>,
    /// Post-copy: pivots of bubbling.
    #[arg(long, value_name = "N")]
    pivots: Option<u16>,
    /// Print one JSON object instead.
    #[arg(long)]
    json: bool,
}

impl Args {
    fn options(&self) -> Options {
        let default = Options::default();
        Options {
            policy: self.policy,
            downtime: self.downtime.unwrap_or(default.downtime),
            timeout: self.timeout.unwrap_or(default.timeout),
            on_timeout: self.on_timeout.unwrap_or(default.on_timeout),
            bandwidth: self.cap,
            split: self.split.unwrap_or(default.split),
            turn_share: self.turn_share.unwrap_or(default.turn_share),
            sync: self.sync.unwrap_or(default.sync),
            reorder: self.reorder.and_then(|asked| asked.0),
            order: self.order.unwrap_or(default.order),
            pivots: self.pivots.unwrap_or(default.pivots),
            ..default
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

/// Rounds shown from each end of a long list.
const SHOWN: usize = 12;

fn text(name: &str, o: &Outcome) -> String {
    let ms = |time: Duration| span(time.as_secs_f64() * 1e3);
    let mut text = format!("guest      {name}\npolicy     {}\n", o.policy);
    text += &format!(
        "total      {}\ndowntime   {}\n",
        ms(o.total),
        ms(o.downtime)
    );
    text += &format!(
        "pages      {} sent, {} of them again; {}\n",
        grouped(o.pages_sent),
        grouped(o.pages_resent),
        traffic(o.bytes)
    );
    if let Some(faults) = &o.faults {
        text += &format!(
            "faults     {} ({} hit a page on its way), {} hidden by pushing ({:.1} %); stalled {}, at worst {}\n",
            grouped(faults.count),
            grouped(faults.on_the_way),
            grouped(faults.hidden),
            faults.hidden_share() * 100.0,
            ms(faults.stalled),
            ms(faults.worst)
        );
    }
    text += &format!("why        {}\n", o.why);
    text += &format!(
        "{:>8} {:>12} {:>12} {:>12}\n",
        "round", "pages", "until", "pending"
    );
    for (at, round) in o.rounds.iter().enumerate() {
        if o.rounds.len() > 2 * SHOWN && at == SHOWN {
            text += &format!("{:>8}\n", format!("… {}", o.rounds.len() - 2 * SHOWN));
        }
        if at < SHOWN || at + SHOWN >= o.rounds.len() {
            text += &format!(
                "{:>8} {:>12} {:>12} {:>12}\n",
                round.n,
                grouped(round.pages),
                span(round.end * 1e3),
                grouped(round.pending)
            );
        }
    }
    text
}
