//! `ferry migrate`.

use super::serve::SAME_WISH;
use ferry_migration::options::{Compress, Handover, OnTimeout, Options, PolicyKind, Tracking};
use ferry_migration::order::PushOrder;
use ferry_migration::report::Status;
use ferry_terminal::flags::{Asked, asked, named};
use ferry_terminal::output::{Failure, put, put_json, say};
use ferry_terminal::progress::Display;
use ferry_terminal::summary::{sentence, table};
use ferry_terminal::units::{duration, rate, size};
use ferry_vmm::api::client::{Action, Client};
use ferry_vmm::api::types::MigrateRequest;
use nix::sys::signal::{SigSet, Signal};
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Move a running guest to another host.
///
/// The guest runs on here until the destination is ready to run it; if anything fails before that, or Ctrl-C cancels it, it
/// stays here as if nothing had happened.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
  ferry migrate --api /tmp/a.sock tcp:otherhost:7000 --downtime 100ms --bandwidth 2.5Gbit --verify")]
pub struct Args {
    /// The control socket of the guest's VMM.
    #[arg(long, value_name = "SOCKET")]
    api: PathBuf,
    /// Where `ferry receive` waits: tcp:HOST:PORT or unix:PATH.
    #[arg(value_name = "URI")]
    uri: String,
    /// Which algorithm decides what is sent when.
    #[arg(long, value_parser = named::<PolicyKind>)]
    policy: Option<PolicyKind>,
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
    /// Post-copy: in which order pages follow that the guest does not ask for: demand (none), flush (by address) or
    /// bubble (around its page faults).
    #[arg(long, value_name = "ORDER", value_parser = named::<PushOrder>)]
    order: Option<PushOrder>,
    /// Post-copy: how many streams of page faults are bubbled around at once.
    #[arg(long, value_name = "N")]
    pivots: Option<u16>,
    /// The longest acceptable pause.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    downtime: Option<Duration>,
    /// The longest acceptable time before the pause.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    timeout: Option<Duration>,
    /// What to do after it: cancel, stop (pause for as long as it takes), or postcopy (move the guest, its pages follow).
    #[arg(long, value_name = "ACTION", value_parser = named::<OnTimeout>)]
    on_timeout: Option<OnTimeout>,
    /// The most to send per second, for example 2.5Gbit, or 100M in bytes.
    #[arg(long, value_name = "RATE", value_parser = rate)]
    bandwidth: Option<u64>,
    /// Connections that carry pages; auto takes as many as are measured to pay.
    #[arg(long, value_name = "N", value_parser = channels)]
    channels: Option<u16>,
    /// How pages are made smaller on their way: auto takes to a coder only where that is measured to pay.
    #[arg(long, value_name = "HOW", value_parser = named::<Compress>)]
    compress: Option<Compress>,
    /// Copies of sent pages that the source keeps, so that it can send differences, for example 256M; 0 keeps none.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    delta_cache: Option<u64>,
    /// How dirty pages are to be found: auto takes what the guest's VMM was started with, log and ring insist on it.
    #[arg(long, value_name = "HOW", value_parser = named::<Tracking>)]
    dirty: Option<Tracking>,
    /// Move the contents of the guest's disks too, before its memory; the destination's --disk is made, or written over if it
    /// has the same size. --timeout counts from the end of the first pass over them.
    #[arg(long)]
    copy_disk: bool,
    /// Compare all memory (and copied disks) of both sides in the pause, and fail on a difference.
    #[arg(long)]
    verify: bool,
    /// To a destination on this host (unix:PATH): give it the memory itself, so that nothing is copied; auto does where it
    /// can, off sends pages.
    #[arg(long, value_name = "WHEN", value_parser = named::<Handover>)]
    handover: Option<Handover>,
    /// Print the report as one JSON object.
    #[arg(long)]
    json: bool,
    /// Show progress even where stderr is no terminal.
    #[arg(long, conflicts_with = "quiet")]
    progress: bool,
    /// Print nothing but errors (and the report, with --json).
    #[arg(long)]
    quiet: bool,
}

/// A number of connections; 0 stands for `auto`.
fn channels(text: &str) -> Result<u16, String> {
    match text.parse() {
        _ if text == "auto" => Ok(0),
        Ok(n) if n > 0 => Ok(n),
        _ => Err(format!(
            "give auto, or a number from 1 to {}",
            Options::MAX_CHANNELS
        )),
    }
}

impl Args {
    fn options(&self) -> Options {
        let default = Options::default();
        Options {
            policy: self.policy.unwrap_or(default.policy),
            downtime: self.downtime.unwrap_or(default.downtime),
            timeout: self.timeout.unwrap_or(default.timeout),
            on_timeout: self.on_timeout.unwrap_or(default.on_timeout),
            bandwidth: self.bandwidth,
            split: self.split.unwrap_or(default.split),
            turn_share: self.turn_share.unwrap_or(default.turn_share),
            sync: self.sync.unwrap_or(default.sync),
            reorder: self.reorder.and_then(|asked| asked.0),
            order: self.order.unwrap_or(default.order),
            pivots: self.pivots.unwrap_or(default.pivots),
            channels: self.channels.filter(|n| *n > 0),
            compress: self.compress.unwrap_or(default.compress),
            delta_cache: self.delta_cache.unwrap_or(default.delta_cache),
            dirty: self.dirty.unwrap_or(default.dirty),
            copy_disk: self.copy_disk,
            verify: self.verify,
            handover: self.handover.unwrap_or(default.handover),
            ..default
        }
    }
}

pub fn run(args: &Args) -> Result<ExitCode, Failure> {
    let request = MigrateRequest {
        uri: args.uri.clone(),
        options: args.options(),
        detach: false,
    };
    request.options.check()?;
    let client = Client::new(&args.api);
    // Before the first connection, so that Ctrl-C never leaves a migration behind that nobody watches.
    cancel_on_signal(client.clone(), "cancelling; the guest stays where it is")?;
    let mut display = Display::new(args.progress, args.quiet);
    let result = client.migrate(&request, &mut |event| display.show(event));
    display.clear();
    let report = result?;
    if args.json {
        put_json(&report)?;
    } else if !args.quiet {
        // A hand-over of memory has no rounds, and a pause to tell of.
        let rest = if report.rounds.is_empty() && report.status != Status::Completed {
            String::new()
        } else {
            format!("\n{}", table(&report))
        };
        match report.status {
            Status::Completed => put(&format!("{}\n{rest}", sentence(&report, &args.uri)))?,
            _ => put(rest.trim_start())?,
        }
    }
    if report.status == Status::Completed && report.verified != Some(false) {
        return Ok(ExitCode::SUCCESS);
    }
    display.say(&sentence(&report, &args.uri));
    Ok(ExitCode::FAILURE)
}

/// SIGINT and SIGTERM cancel what the VMM does, and say so; its answer then says what became of it. A second one gives up waiting.
pub fn cancel_on_signal(client: Client, sentence: &'static str) -> Result<(), Failure> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    let failed = |e: io::Error| Failure(format!("cannot watch for Ctrl-C ({e})"));
    // Blocked here before any other thread starts, so that only the thread below gets them.
    signals.thread_block().map_err(|e| failed(e.into()))?;
    let watch = move || {
        if signals.wait().is_err() {
            return;
        }
        say(sentence);
        // Not begun yet, or over: then there is nothing to cancel, and the report says so.
        if let Err(e) = client.act(Action::Cancel) {
            say(&e.to_string());
        }
        // One wish may arrive twice: timeout(1) signals the process and its group.
        let first = Instant::now();
        while signals.wait().is_ok() {
            if first.elapsed() >= SAME_WISH {
                say("not waiting any longer; `ferry status` shows what became of the guest");
                std::process::exit(130);
            }
        }
    };
    std::thread::Builder::new()
        .name("ferry-signals".into())
        .spawn(watch)
        .map_err(failed)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

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
        let options = parse(&[
            "--policy",
            "precopy",
            "--downtime",
            "50ms",
            "--timeout",
            "2m",
            "--on-timeout",
            "stop",
            "--bandwidth",
            "1Gbit",
            "--channels",
            "4",
            "--compress",
            "adaptive",
            "--delta-cache",
            "32M",
            "--dirty",
            "ring",
            "--copy-disk",
            "--verify",
            "--handover",
            "off",
        ])
        .unwrap();
        let expected = Options {
            downtime: Duration::from_millis(50),
            timeout: Duration::from_secs(120),
            on_timeout: OnTimeout::Stop,
            bandwidth: Some(125_000_000),
            channels: Some(4),
            compress: Compress::Adaptive,
            delta_cache: 32 << 20,
            dirty: Tracking::Ring,
            copy_disk: true,
            verify: true,
            handover: Handover::Off,
            ..Options::default()
        };
        assert_eq!(options, expected);
    }

    #[test]
    fn reordering_is_asked_for_or_left_to_the_policy() {
        for (flags, reorder) in [
            (&[] as &[&str], None),
            (&["--reorder=auto"], None),
            (&["--reorder"], Some(true)),
            (&["--reorder=on"], Some(true)),
            (&["--reorder=off"], Some(false)),
            (&["--reorder", "--verify"], Some(true)),
        ] {
            assert_eq!(parse(flags).unwrap().reorder, reorder, "{flags:?}");
        }
        for (policy, reorders) in [
            ("precopy", true),
            ("hybrid", true),
            ("stord", false),
            ("mplm", false),
        ] {
            let reorder = |flag| parse(&["--policy", policy, flag]).unwrap().reorders();
            assert_eq!(reorder("--reorder=auto"), reorders, "{policy}");
            assert!(
                reorder("--reorder") && !reorder("--reorder=off"),
                "{policy}"
            );
        }
        let error = parse(&["--reorder=perhaps"]).unwrap_err();
        assert!(error.contains("auto, on or off"), "{error}");
    }

    #[test]
    fn unknown_names_are_refused_with_the_known_ones() {
        let error = parse(&["--policy", "magic"]).unwrap_err();
        assert!(
            error.contains("magic") && error.contains("'precopy'"),
            "{error}"
        );
        assert!(parse(&["--progress", "--quiet"]).is_err());
    }
}
