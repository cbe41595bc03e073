//! `ferry tune` and `ferry switchover`: a running migration is steered.

use super::outcome::Ended;
use ferry_migration::options::{OnTimeout, Options, PolicyKind};
use ferry_migration::steering::Change;
use ferry_terminal::flags::{Target, choice};
use ferry_terminal::output::{put_failure, put_json, say};
use ferry_terminal::units::{duration, rate};
use ferry_vmm::api::client::{Client, ClientError};
use serde::Serialize;
use std::process::ExitCode;
use std::time::Duration;

/// Change the limits of the migration that is under way.
///
/// What is not given stays. A change holds from the next batch on; a round that is being sent is
/// cut short where the policy has to decide anew. It is an event of the migration and in its
/// report. After the live phase nothing can be changed.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  ferry tune web --bandwidth 500Mbit --downtime 1s
  ferry tune web --bandwidth none --policy mplm")]
pub struct Tune {
    #[command(flatten)]
    target: Target,
    /// The most to send per second, for example 2.5Gbit; none takes the cap away.
    #[arg(long, value_name = "RATE", value_parser = cap)]
    bandwidth: Option<Cap>,
    /// The longest acceptable downtime.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    downtime: Option<Duration>,
    /// The longest acceptable live phase, counted from its beginning.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    timeout: Option<Duration>,
    /// What to do after it. postcopy only where the migration began with a policy or limit that
    /// may need it.
    #[arg(long, value_name = "ACTION", value_parser = choice::<OnTimeout>())]
    on_timeout: Option<OnTimeout>,
    /// Another policy from the next round on, but not auto. hybrid and postcopy only where the
    /// migration began with a policy or limit that may need them.
    #[arg(long, value_name = "POLICY", value_parser = choice::<PolicyKind>())]
    policy: Option<PolicyKind>,
    /// With --on-timeout throttle: the most that the guest is slowed, in per cent of its time.
    #[arg(long, value_name = "PERCENT")]
    throttle: Option<u8>,
    /// Print one JSON object instead. Its `code` names the result: accepted, not-migrating,
    /// too-early, too-late, no-postcopy, no-throttle, auto, busy, invalid.
    #[arg(long)]
    json: bool,
}

/// End the live phase of the migration that is under way: the guest moves now.
///
/// The guest is moved as its policy would move it at its own end. Hybrid and post-copy hand it
/// over, and what is missing follows. The others pause it until all is sent, however long that
/// takes; but where that is longer than --downtime and the migration may use post-copy
/// (--on-timeout postcopy, or auto), they hand it over too.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  ferry switchover web")]
pub struct Switchover {
    #[command(flatten)]
    target: Target,
    /// Print one JSON object instead, with the codes of `ferry tune --json`.
    #[arg(long)]
    json: bool,
}

/// A cap that was given; `None` is none.
#[derive(Clone, Copy, Debug)]
struct Cap(Option<u64>);

fn cap(text: &str) -> Result<Cap, String> {
    if text == "none" {
        return Ok(Cap(None));
    }
    rate(text).map(|rate| Cap(Some(rate)))
}

/// What `--json` prints.
#[derive(Serialize)]
struct Accepted {
    schema: u32,
    code: &'static str,
    change: Change,
}

impl Tune {
    fn change(&self) -> Change {
        Change {
            policy: self.policy,
            bandwidth: self.bandwidth.map(|cap| cap.0),
            downtime: self.downtime,
            timeout: self.timeout,
            on_timeout: self.on_timeout,
            throttle: self.throttle,
            switchover: false,
        }
    }

    pub fn run(&self) -> Result<ExitCode, Ended> {
        let change = self.change();
        if change == Change::default() {
            return Err(Ended::usage(
                "nothing is to be changed; give --bandwidth, --downtime, --timeout, --on-timeout, --throttle or --policy",
            ));
        }
        if let Err(error) = change.applied_to(&Options::default()).check() {
            return Err(Ended::usage(error.to_string()));
        }
        steer(&Client::new(&self.target.socket()?), change, self.json)
    }
}

impl Switchover {
    pub fn run(&self) -> Result<ExitCode, Ended> {
        steer(
            &Client::new(&self.target.socket()?),
            Change::switchover(),
            self.json,
        )
    }
}

fn steer(client: &Client, change: Change, json: bool) -> Result<ExitCode, Ended> {
    match client.steer(&change) {
        Ok(()) if json => put_json(&Accepted {
            schema: 1,
            code: "accepted",
            change,
        })?,
        Ok(()) => say(&format!("the migration goes on with: {change}")),
        Err(ClientError::Refused {
            sentence,
            code: Some(code),
            ..
        }) => {
            say(&sentence);
            put_failure(&code, &sentence);
            return Ok(ExitCode::FAILURE);
        }
        Err(error) => return Err(error.into()),
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        tune: Tune,
    }

    fn parse(flags: &str) -> Result<Change, String> {
        let fixed = ["ferry", "--api", "s"];
        let cli = Cli::try_parse_from(fixed.into_iter().chain(flags.split_whitespace()));
        cli.map(|cli| cli.tune.change()).map_err(|e| e.to_string())
    }

    #[test]
    fn every_flag_arrives_and_what_is_left_out_stays() {
        assert_eq!(parse("").unwrap(), Change::default());
        let flags = "--bandwidth 100Mbit --downtime 1s --timeout 2m --on-timeout stop --throttle 50 --policy mplm";
        let expected = Change {
            policy: Some(PolicyKind::Mplm),
            bandwidth: Some(Some(12_500_000)),
            downtime: Some(Duration::from_secs(1)),
            timeout: Some(Duration::from_secs(120)),
            on_timeout: Some(OnTimeout::Stop),
            throttle: Some(50),
            switchover: false,
        };
        assert_eq!(parse(flags).unwrap(), expected);
        assert_eq!(parse("--bandwidth none").unwrap().bandwidth, Some(None));
        assert!(parse("--bandwidth fast").is_err() && parse("--policy magic").is_err());
    }
}
