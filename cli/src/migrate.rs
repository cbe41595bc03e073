//! `ferry migrate`.

use super::outcome::{Coded, Ended, HELP, Outcome};
use super::picture::Picture;
use super::security::{Certificates, Pair};
use super::serve::SAME_WISH;
use super::to_host;
use ferry_agent::{Agent, Wanted};
use ferry_migration::options::{Compress, Handover, Options, Tracking};
use ferry_migration::report::{Event, Report, Status};
use ferry_terminal::flags::{Guest, PolicyFlags, TargetAnd, Word, choice};
use ferry_terminal::output::{Failure, put, put_failure, put_json, say};
use ferry_terminal::progress::Display;
use ferry_terminal::summary::{sentence, table};
use ferry_terminal::units::{duration, rate, size};
use ferry_vmm::api::client::{Action, Client};
use ferry_vmm::api::types::{MigrateRequest, MigrationStatus};
use ferry_vmm::migrate::absolute_uri;
use ferry_vmm::thread;
use nix::sys::signal::{SigSet, Signal};
use serde::Serialize;
use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Move a running guest to another host.
///
/// The guest runs on here until the destination is ready to run it. If anything fails before that,
/// or Ctrl-C cancels the migration, the guest stays here.
#[derive(Debug, clap::Args)]
#[command(after_help = format!("Examples:
  ferry migrate web tcp:otherhost:7000 --tls /etc/ferry/pki --downtime 100ms --verify
  ferry migrate --api /tmp/a.sock unix:/tmp/link
  ferry migrate web otherhost

{HELP}"))]
pub struct Args {
    #[command(flatten)]
    target: TargetAnd<Destination>,
    #[command(flatten)]
    policy: PolicyFlags,
    #[command(flatten)]
    transport: TransportFlags,
    #[command(flatten)]
    certificates: Certificates,
    #[command(flatten)]
    pair: Pair,
    #[command(flatten)]
    report: ReportFlags,
}

/// Where the guest goes.
#[derive(Clone, Debug)]
struct Destination(String);

impl Word for Destination {
    const VALUE: &'static str = "HOST|URI";
    const HELP: &'static str = "The host, where `ferry agent` prepares a receiver: HOST or HOST:PORT. Or where `ferry \
                                receive` waits: tcp:HOST:PORT or unix:PATH";

    fn read(word: Option<OsString>) -> Result<Self, String> {
        let word = word.ok_or(
            "where to is missing; give NAME and HOST or URI, or --api SOCKET and one of them",
        )?;
        let text = word.into_string();
        text.map(Self)
            .map_err(|odd| format!("{} is no URI", odd.display()))
    }
}

/// How memory and disks cross the network.
#[derive(Debug, clap::Args)]
#[group(skip)]
#[command(next_help_heading = "Transport")]
struct TransportFlags {
    /// The most to send per second, for example 2.5Gbit, or 100M in bytes; without it, as fast as
    /// the link takes.
    #[arg(long, value_name = "RATE", value_parser = rate)]
    bandwidth: Option<u64>,
    /// Connections that carry pages; auto takes as many as are measured to pay.
    #[arg(long, value_name = "N", value_parser = channels, default_value = "auto")]
    channels: Channels,
    /// How pages are compressed; auto compresses only where it measures that this pays.
    #[arg(long, value_name = "HOW", value_parser = choice::<Compress>(), default_value = "auto")]
    compress: Compress,
    /// Copies of sent pages that the source keeps, so that it can send differences, for example
    /// 256M; 0 keeps none.
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "64M")]
    delta_cache: u64,
    /// How dirty pages are found: auto takes what the guest's VMM was started with, log and ring
    /// insist on it.
    #[arg(long, value_name = "HOW", value_parser = choice::<Tracking>(), default_value = "auto")]
    dirty: Tracking,
    /// Move the contents of the guest's disks too, before its memory. The destination's --disk is
    /// made, or written over if it has the same size. --timeout counts from the end of the first
    /// pass over them.
    #[arg(long)]
    copy_disk: bool,
    /// Compare all memory (and copied disks) of both sides in the pause, and fail on a difference.
    #[arg(long)]
    verify: bool,
    /// To a destination on this host (unix:PATH): hand the memory itself over, so that nothing is
    /// copied. auto does where it can, off sends pages.
    #[arg(long, value_name = "WHEN", value_parser = choice::<Handover>(), default_value = "auto")]
    handover: Handover,
    /// While pages follow the guest: give memory that the destination has back to this host, so
    /// that it is there once and not twice.
    #[arg(long)]
    free_source: bool,
    /// The longest that the guest may stand still, whatever the destination does; after that it
    /// runs here again [default: 30 s and four times the predicted pause].
    #[arg(long, value_name = "TIME", value_parser = duration)]
    max_pause: Option<Duration>,
}

/// What is printed.
#[derive(Debug, clap::Args)]
#[group(skip)]
#[command(next_help_heading = "Output")]
struct ReportFlags {
    /// Print one JSON object: the report, or why there is none. Its `code` names how the migration
    /// ended.
    #[arg(long)]
    json: bool,
    /// Show progress even where stderr is no terminal.
    #[arg(long, conflicts_with = "quiet")]
    progress: bool,
    /// Begin the migration, print its ID and do not wait: `ferry report` shows how it goes and
    /// ended, here while this VMM is there (see --linger of `ferry run`), and at the destination.
    #[arg(long, conflicts_with = "progress")]
    detach: bool,
    /// Print nothing but errors (and the report, with --json).
    #[arg(long)]
    quiet: bool,
    /// Draw the migration into a new file, for a browser, also one that fails: rounds, pending
    /// memory, bandwidth, dirty pages, downtime and page faults.
    #[arg(long, value_name = "FILE", conflicts_with = "detach")]
    html: Option<PathBuf>,
}

/// A number of connections; `None` is `auto`.
#[derive(Clone, Copy, Debug)]
struct Channels(Option<u16>);

fn channels(text: &str) -> Result<Channels, String> {
    match text.parse() {
        _ if text == "auto" => Ok(Channels(None)),
        Ok(n) if n > 0 => Ok(Channels(Some(n))),
        _ => Err(format!(
            "give auto, or a number from 1 to {}",
            Options::MAX_CHANNELS
        )),
    }
}

impl Args {
    /// The file of --html, begun.
    fn picture(&self) -> Result<Option<Picture>, Failure> {
        let Some(path) = &self.report.html else {
            return Ok(None);
        };
        let guest = match &self.target.guest {
            Guest::Named(name) => Some(name.to_string()),
            _ => None,
        };
        Ok(Some(Picture::begin(path, guest, &self.target.word.0)?))
    }

    fn options(&self) -> Options {
        let transport = &self.transport;
        Options {
            bandwidth: transport.bandwidth,
            channels: transport.channels.0,
            compress: transport.compress,
            delta_cache: transport.delta_cache,
            dirty: transport.dirty,
            copy_disk: transport.copy_disk,
            verify: transport.verify,
            handover: transport.handover,
            free_source: transport.free_source,
            max_pause: transport.max_pause,
            ..self.policy.options()
        }
    }
}

pub fn run(args: &Args) -> Result<ExitCode, Ended> {
    let uri = &args.target.word.0;
    let request = MigrateRequest {
        uri: absolute_uri(uri),
        options: args.options(),
        detach: false,
        tls: args.certificates.files()?,
        pair: args.pair.line()?,
    };
    if let Err(error) = request.options.check() {
        return Err(Ended::usage(error.to_string()));
    }
    let client = Client::new(&args.target.socket()?);
    if to_host::is_host(uri) {
        if args.report.detach {
            return Err(Ended::usage(
                "--detach is for a receiver that waits; a host's agent is told how the move ends",
            ));
        }
        return to_agent(args, &client, request);
    }
    if args.report.detach {
        return detach(args, &client.begin_migration(&request)?);
    }
    watched(args, &client, |events| {
        to_its_end(&client, &request, events)
    })
}

/// Shows a migration as it goes, and how it has ended; draws it where that is wanted.
fn watched(
    args: &Args,
    client: &Client,
    migrate: impl FnOnce(&mut dyn FnMut(&Event)) -> Result<Report, Ended>,
) -> Result<ExitCode, Ended> {
    let mut picture = args.picture()?;
    // Before the first connection, so that Ctrl-C never leaves an unwatched migration behind.
    cancel_on_signal(client.clone(), "cancelling; the guest stays where it is")?;
    let mut display = Display::new(args.report.progress, args.report.quiet);
    let result = migrate(&mut |event| {
        display.show(event);
        if let Some(picture) = &mut picture {
            picture.receive(event);
        }
    });
    display.clear();
    if let Some(picture) = picture {
        picture.end(&result);
    }
    Ok(show(args, &result?, &display)?)
}

/// Has a VMM migrate its guest, and waits for the report.
pub fn to_its_end(
    client: &Client,
    request: &MigrateRequest,
    events: &mut dyn FnMut(&Event),
) -> Result<Report, Ended> {
    let mut begun = false;
    let result = client.migrate(request, &mut |event| {
        begun = true;
        events(event);
    });
    result.map_err(|error| Ended {
        outcome: Outcome::without_report(&error, begun),
        sentence: error.to_string(),
    })
}

/// Moves the guest to a host, whose agent prepares its receiver.
fn to_agent(args: &Args, client: &Client, request: MigrateRequest) -> Result<ExitCode, Ended> {
    let place = &args.target.word.0;
    if request.pair.is_some() {
        return Err(Ended::usage(
            "--pair is for a receiver that waits; an agent knows this host by its certificate (--tls)",
        ));
    }
    let agent = Agent::new(
        place,
        &args.certificates.folder_or_default(),
        args.certificates.name(),
    )?;
    let name = to_host::name_of(&args.target.guest, client)?;
    let guest = client.configuration()?;
    let nodes = guest.memory.nodes.len();
    let wanted = Wanted {
        copy_disk: request.options.copy_disk,
        ..to_host::wanted(guest, &name)?
    };
    let host = agent.host()?;
    to_host::check_version(&host, agent.host_name())?;
    if let Some(note) = to_host::nodes_note(&host, agent.host_name(), nodes) {
        say(&note);
    }
    watched(args, client, |events| {
        to_host::move_to(&agent, client, &wanted, request, events)
    })
}

/// What `--detach --json` prints.
#[derive(Serialize)]
struct Begun<'a> {
    schema: u32,
    code: &'static str,
    id: &'a str,
}

fn detach(args: &Args, status: &MigrationStatus) -> Result<ExitCode, Ended> {
    let id = status.id.as_deref().unwrap_or_default();
    match args.report.json {
        true => put_json(&Begun {
            schema: 1,
            code: "begun",
            id,
        })?,
        false => put(&format!("{id}\n"))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn show(args: &Args, report: &Report, display: &Display) -> Result<ExitCode, Failure> {
    let outcome = Outcome::of(report);
    if args.report.json {
        let code = outcome.code;
        put_json(&Coded { code, report })?;
    } else if !args.report.quiet {
        // A hand-over of memory has no rounds, but a pause.
        let rest = if report.rounds.is_empty() && report.status != Status::Completed {
            String::new()
        } else {
            format!("\n{}", table(report))
        };
        match report.status {
            Status::Completed => put(&format!(
                "{}\n{rest}",
                sentence(report, &args.target.word.0)
            ))?,
            _ => put(rest.trim_start())?,
        }
    }
    if outcome.status != 0 {
        display.say(&sentence(report, &args.target.word.0));
    }
    Ok(outcome.exit())
}

/// SIGINT and SIGTERM cancel what the VMM does, whose answer then says how it ended. A second
/// signal ends this command at once.
pub fn cancel_on_signal(client: Client, sentence: &'static str) -> Result<(), Failure> {
    on_signal(sentence, move || {
        // Before the migration begins and after it ends, there is nothing to cancel; the report
        // says so.
        if let Err(e) = client.act(Action::Cancel) {
            say(&e.to_string());
        }
    })
}

/// SIGINT and SIGTERM do this once. A second signal ends this command at once.
pub fn on_signal(
    sentence: &'static str,
    cancel: impl FnOnce() + Send + 'static,
) -> Result<(), Failure> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    let failed = |e: io::Error| Failure(format!("cannot watch for Ctrl-C ({e})"));
    // Blocked here before any other thread starts, so that only the thread below gets them.
    signals.thread_block().map_err(|e| failed(e.into()))?;
    let watch = move || {
        signals.wait().map_err(|e| e.to_string())?;
        say(sentence);
        cancel();
        // timeout(1) signals the process and its group: one wish can arrive twice.
        let first = Instant::now();
        while signals.wait().is_ok() {
            if first.elapsed() >= SAME_WISH {
                let sentence =
                    "not waiting any longer; `ferry status` shows what became of the guest";
                say(sentence);
                put_failure("not-awaited", sentence);
                std::process::exit(130);
            }
        }
        Ok(())
    };
    let ended = |why: String| say(&format!("Ctrl-C cancels nothing any more: {why}"));
    thread::spawn(thread::Kind::Vmm, "ferry-signals", watch, ended).map_err(failed)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use std::time::Duration;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    fn parse(rest: &[&str]) -> Result<Options, String> {
        let fixed = ["ferry", "--api", "s", "tcp:x:1"];
        let cli = Cli::try_parse_from(fixed.iter().chain(rest)).map_err(|e| e.to_string())?;
        Ok(cli.args.options())
    }

    #[test]
    fn without_flags_it_is_the_default() {
        assert_eq!(parse(&[]).unwrap(), Options::default());
    }

    #[test]
    fn flags_arrive() {
        let flags = "--policy precopy --downtime 50ms --bandwidth 1Gbit --channels 4 --compress adaptive \
                     --delta-cache 32M --dirty ring --copy-disk --verify --handover off --max-pause 2s";
        let flags: Vec<&str> = flags.split_whitespace().collect();
        let expected = Options {
            downtime: Duration::from_millis(50),
            bandwidth: Some(125_000_000),
            channels: Some(4),
            compress: Compress::Adaptive,
            delta_cache: 32 << 20,
            dirty: Tracking::Ring,
            copy_disk: true,
            verify: true,
            handover: Handover::Off,
            max_pause: Some(Duration::from_secs(2)),
            ..Options::default()
        };
        assert_eq!(parse(&flags).unwrap(), expected);
    }

    #[test]
    fn contradictions_are_refused() {
        assert!(parse(&["--progress", "--quiet"]).is_err());
        let error = parse(&["--compress", "gzip"]).unwrap_err();
        assert!(error.contains("zstd"), "{error}");
    }

    #[test]
    fn help_shows_defaults_in_groups() {
        let help = <Cli as clap::CommandFactory>::command()
            .render_long_help()
            .to_string();
        for part in [
            "\nPolicy:\n",
            "\nLimits:\n",
            "\nTransport:\n",
            "\nOutput:\n",
            "[default: precopy]",
            "[default: 300ms]",
            "[default: 64M]",
            "Exit status:",
        ] {
            assert!(help.contains(part), "{part:?} is not in {help}");
        }
    }
}
