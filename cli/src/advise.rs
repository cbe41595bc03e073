//! `ferry advise`: which policy for this guest, over this link.

use super::outcome::Ended;
use super::security::{Certificates, Pair};
use ferry_migration::model::Setup;
use ferry_migration::model::advise::{Advice, Forecast, advise};
use ferry_migration::options::{Options, PolicyKind};
use ferry_migration::page::PAGE_BYTES;
use ferry_migration::probe::Path;
use ferry_migration::trace::Trace;
use ferry_terminal::flags::Target;
use ferry_terminal::output::{Failure, put, put_json, say};
use ferry_terminal::rows::aligned;
use ferry_terminal::units::{duration, memory, rate, span, traffic};
use ferry_vmm::api::client::Client;
use ferry_vmm::api::types::{RecordRequest, Security};
use ferry_vmm::migrate::{Peer, Uri, measure};
use serde::Serialize;
use std::process::ExitCode;
use std::time::Duration;

/// Forecast a move: what every policy would come to, and which to take.
///
/// Records for some seconds which pages the guest writes, measures the way to a receiver where one
/// is given, and has the model run every policy over both. Nothing is moved. Each policy runs from
/// several places of the recording: the total, the stalls and the bytes are those in the middle,
/// the pause is the longest. A policy that does not reach the goals stops the guest in the end, as
/// with --on-timeout stop. While it is recorded, each page that the guest writes costs it a fault
/// per interval.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  ferry advise web --to tcp:otherhost:7000 --tls /etc/ferry/pki
  ferry advise web --bandwidth 10Gbit --downtime 50ms --no-postcopy")]
pub struct Args {
    #[command(flatten)]
    target: Target,
    /// The receiver to measure the way to, where `ferry receive` waits: tcp:HOST:PORT. It takes
    /// about a second and all of the link.
    #[arg(long, value_name = "URI")]
    to: Option<Uri>,
    /// Without --to: what the link carries, for example 2.5Gbit.
    #[arg(long, value_name = "RATE", value_parser = rate, conflicts_with = "to", default_value = "1Gbit")]
    bandwidth: u64,
    /// Without --to: the link's round trip.
    #[arg(long, value_name = "TIME", value_parser = duration, conflicts_with = "to", default_value = "0.2ms")]
    round_trip: Duration,
    /// The longest acceptable downtime [default: 300ms].
    #[arg(long, value_name = "TIME", value_parser = duration)]
    downtime: Option<Duration>,
    /// The longest acceptable time in all [default: as of `ferry migrate`].
    #[arg(long, value_name = "TIME", value_parser = duration)]
    timeout: Option<Duration>,
    /// Leave out what runs the guest before its memory is there.
    #[arg(long)]
    no_postcopy: bool,
    /// How long to record.
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "5s")]
    duration: Duration,
    /// Print one JSON object instead.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    certificates: Certificates,
    #[command(flatten)]
    pair: Pair,
}

/// How often the dirty log is looked at: the model knows no more about a page than that.
const INTERVAL: Duration = Duration::from_millis(50);

/// What `--json` prints.
#[derive(Serialize)]
struct Printed<'a> {
    schema: u32,
    path: Path,
    measured: bool,
    memory_bytes: u64,
    empty_pages: u64,
    recorded_seconds: f64,
    dirtied_pages_per_second: f64,
    #[serde(flatten)]
    advice: &'a Advice,
    command: Option<String>,
}

pub fn run(args: &Args) -> Result<ExitCode, Ended> {
    let wanted = args.options();
    wanted.check().map_err(|e| Ended::usage(e.to_string()))?;
    let request = RecordRequest::new(args.duration, INTERVAL).map_err(Ended::usage)?;
    let path = args.path()?;
    let client = Client::new(&args.target.socket()?);
    if !args.json {
        say(&format!(
            "recording for {}",
            span(args.duration.as_secs_f64() * 1e3)
        ));
    }
    let mut bytes = Vec::new();
    client.record(&request, &mut bytes)?;
    let trace = Trace::read(&bytes[..]).map_err(|e| Failure(e.to_string()))?;
    if trace.frames().is_empty() {
        let why = "nothing was recorded: the guest has ended, stands still, or leaves this host";
        return Err(Failure(why.into()).into());
    }
    let setup = Setup::recorded(&trace, path.bandwidth, path.round_trip);
    let advice = advise(&trace, &setup, &wanted);
    let command = advice
        .policy
        .map(|policy| args.command(policy, advice.fits));
    let printed = Printed {
        schema: 1,
        path,
        measured: args.to.is_some(),
        memory_bytes: trace.header().memory_bytes,
        empty_pages: setup.empty.len(),
        recorded_seconds: trace.duration().as_secs_f64(),
        dirtied_pages_per_second: trace.dirty_rate(),
        advice: &advice,
        command,
    };
    if args.json {
        put_json(&printed)?;
    } else {
        put(&text(&printed))?;
    }
    Ok(ExitCode::SUCCESS)
}

impl Args {
    fn options(&self) -> Options {
        let default = Options::default();
        Options {
            downtime: self.downtime.unwrap_or(default.downtime),
            timeout: self.timeout.unwrap_or(default.timeout),
            no_postcopy: self.no_postcopy,
            ..default
        }
    }

    /// The way there: measured, or as it was given.
    fn path(&self) -> Result<Path, Ended> {
        let security = Security {
            tls: self.certificates.files()?,
            pair: self.pair.line()?,
        };
        let Some(to) = &self.to else {
            if security.is_wanted() {
                return Err(Ended::usage(
                    "--tls and --pair are about a receiver: give --to",
                ));
            }
            return Ok(Path {
                bandwidth: self.bandwidth as f64,
                round_trip: self.round_trip,
            });
        };
        let peer = Peer::new(to.clone(), &security).map_err(Failure)?;
        Ok(measure(&peer).map_err(Failure)?)
    }

    /// What moves the guest in the way that is advised.
    fn command(&self, policy: PolicyKind, fits: bool) -> String {
        let to = self.to.as_ref().map_or("URI".to_owned(), Uri::to_string);
        let mut words = vec!["ferry".to_owned(), "migrate".to_owned()];
        words.extend(self.target.guest.words());
        words.extend([to, "--policy".to_owned(), policy.name().to_owned()]);
        let mut option = |name: &str, value: Option<String>| {
            words.extend(value.map(|value| format!("{name} {value}")));
        };
        let ms = |time: Duration| format!("{}ms", time.as_millis());
        option("--downtime", self.downtime.map(ms));
        option("--timeout", self.timeout.map(ms));
        option("--on-timeout", (!fits).then(|| "stop".to_owned()));
        option("--tls", self.certificates.folder());
        option("--tls-authz", self.certificates.name().map(str::to_owned));
        words.join(" ")
    }
}

fn text(printed: &Printed<'_>) -> String {
    let ms = |time: Duration| span(time.as_secs_f64() * 1e3);
    let path = printed.path;
    let how = if printed.measured {
        "measured"
    } else {
        "as given"
    };
    let mut text = format!(
        "guest   {}, of which {} empty; {} pages dirtied a second in {}\nlink    {:.2} Gbit/s, round trip {} ({how})\n\n",
        memory(printed.memory_bytes),
        memory(printed.empty_pages * PAGE_BYTES),
        format_args!("{:.0}", printed.dirtied_pages_per_second),
        span(printed.recorded_seconds * 1e3),
        path.bandwidth * 8.0 / 1e9,
        ms(path.round_trip),
    );
    let head = ["policy", "total", "pause", "stall", "sent", "fits"];
    let mut lines = vec![head.map(str::to_owned).to_vec()];
    let line = |f: &Forecast| {
        vec![
            f.policy.name().to_owned(),
            ms(f.total),
            ms(f.downtime),
            ms(f.stalled),
            traffic(f.bytes),
            if f.fits { "yes" } else { "no" }.to_owned(),
        ]
    };
    lines.extend(printed.advice.forecasts.iter().map(line));
    text += &aligned(&lines);
    for forecast in &printed.advice.forecasts {
        if let Some(reason) = forecast.reason {
            text += &format!("{}: {reason}\n", forecast.policy.name());
        }
    }
    text += &format!("\n{}\n", printed.advice.why);
    if let Some(command) = &printed.command {
        text += &format!("{command}\n");
    }
    text
}
