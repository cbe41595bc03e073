//! `ferry`: what the command line takes, and which command does it.
//!
//! Errors are one sentence on stderr, exit status 1, or 2 for a wrong command line.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic))]
#![forbid(unsafe_code)]

mod advise;
mod agent;
mod attach;
mod balloon;
mod console;
mod devices;
mod doctor;
mod evacuate;
mod events;
mod generate;
mod guest_file;
mod lines;
mod logs;
mod manage;
mod memory;
mod migrate;
mod nas;
mod numa;
mod observe;
mod outcome;
mod passed;
mod picture;
mod pki;
mod ps;
mod pty;
mod receive;
mod report;
mod restore;
mod run;
mod sandbox;
mod security;
mod serial;
mod serve;
mod set;
mod snapshot;
mod socket;
mod spool;
mod steer;
mod to_host;
#[cfg(not(feature = "lab"))]
mod without_lab;

use clap::error::ErrorKind;
use clap::{ArgAction, ArgMatches, CommandFactory, FromArgMatches, Parser, Subcommand};
#[cfg(feature = "lab")]
use ferry_lab::{bench, demo, record, sim};
use ferry_terminal::output::{put, put_failure, say, say_in_json};
use nix::sys::signal::{SigSet, Signal};
use outcome::Ended;
use std::process::ExitCode;
use std::str::FromStr;
#[cfg(not(feature = "lab"))]
use without_lab::{bench, demo, record, sim};

/// Runs virtual machines and moves them between hosts while they run.
#[derive(Debug, Parser)]
#[command(
    name = "ferry",
    version,
    propagate_version = true,
    max_term_width = 100,
    arg_required_else_help = true
)]
#[command(after_help = "Example, in two terminals of one host:
  ferry receive tcp:127.0.0.1:7000 --name moved
  ferry run --nas mg.A --name web
and in a third:
  ferry ps
  ferry migrate web tcp:127.0.0.1:7000

Sizes take K M G (powers of 1024), rates Kbit Mbit Gbit (or K M G for bytes per second), durations ms s m h.
The log goes to stderr; FERRY_LOG sets what it says, as in FERRY_LOG=debug.")]
struct Cli {
    /// Log more (-v what happens, -vv how, -vvv all).
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,
    /// How the log and what is said on stderr are written: text, or json, one object a line.
    #[arg(long, value_name = "text|json", global = true, default_value = "text")]
    log_format: LogFormat,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(run::Args),
    Receive(receive::Args),
    Migrate(migrate::Args),
    Advise(advise::Args),
    Evacuate(evacuate::Args),
    Agent(agent::Args),
    Cancel(manage::Cancel),
    Tune(steer::Tune),
    Switchover(steer::Switchover),
    Status(manage::Status),
    Events(events::Args),
    Report(report::Args),
    Pause(manage::Pause),
    Resume(manage::Resume),
    Stop(manage::Stop),
    PowerButton(manage::PowerButton),
    Recover(manage::Recover),
    Pki(pki::Args),
    Ps(ps::Args),
    Console(attach::Args),
    Logs(logs::Args),
    Balloon(balloon::Args),
    Set(set::Args),
    Record(record::Args),
    Snapshot(snapshot::Args),
    Restore(restore::Args),
    Doctor(doctor::Args),
    Nas(nas::Args),
    Completions(generate::Completions),
    Man(generate::Man),
    Sim(sim::Args),
    Demo(demo::Args),
    Bench(Box<bench::Args>),
}

fn main() -> ExitCode {
    fail_writes_past_the_size_limit();
    let definition = Cli::command();
    let line = match guest_file::expand(&definition, std::env::args_os().collect()) {
        Ok(line) => line,
        Err(ended) => return tell(ended),
    };
    let (matches, cli) = match read(&definition, &line) {
        Ok(read) => read,
        Err(e) => return usage(&e, line.place(&e)),
    };
    if cli.log_format == LogFormat::Json {
        say_in_json();
    }
    log(cli.verbose, cli.log_format);
    let ended = match guest_file::printed(&definition, &matches) {
        Ok(Some(text)) => put(&text).map(|()| ExitCode::SUCCESS).map_err(Ended::from),
        Ok(None) => run_command(cli.command),
        Err(ended) => Err(ended),
    };
    ended.unwrap_or_else(tell)
}

/// The command line, as clap has read it and as the commands take it.
fn read(
    definition: &clap::Command,
    line: &guest_file::Line,
) -> Result<(ArgMatches, Cli), clap::Error> {
    let matches = definition.clone().try_get_matches_from(&line.args)?;
    let cli = Cli::from_arg_matches(&matches);
    let cli = cli.map_err(|e| e.format(&mut definition.clone()))?;
    Ok((matches, cli))
}

fn tell(Ended { outcome, sentence }: Ended) -> ExitCode {
    say(&sentence);
    put_failure(outcome.code, &sentence);
    outcome.exit()
}

fn run_command(command: Command) -> Result<ExitCode, Ended> {
    Ok(match command {
        Command::Run(args) => {
            args.check()?;
            run::run(&args)?
        }
        Command::Receive(args) => receive::run(&args)?,
        Command::Migrate(args) => migrate::run(&args)?,
        Command::Advise(args) => advise::run(&args)?,
        Command::Evacuate(args) => evacuate::run(&args)?,
        Command::Agent(args) => agent::run(&args)?,
        Command::Cancel(args) => args.run()?,
        Command::Tune(args) => args.run()?,
        Command::Switchover(args) => args.run()?,
        Command::Status(args) => args.run()?,
        Command::Events(args) => events::run(&args)?,
        Command::Report(args) => report::run(&args)?,
        Command::Pause(args) => args.run()?,
        Command::Resume(args) => args.run()?,
        Command::Stop(args) => args.run()?,
        Command::PowerButton(args) => args.run()?,
        Command::Recover(args) => args.run()?,
        Command::Pki(args) => pki::run(&args)?,
        Command::Ps(args) => ps::run(&args)?,
        Command::Console(args) => attach::run(&args)?,
        Command::Logs(args) => logs::run(&args)?,
        Command::Balloon(args) => balloon::run(&args)?,
        Command::Set(args) => set::run(&args)?,
        Command::Record(args) => record::run(&args)?,
        Command::Snapshot(args) => snapshot::run(&args)?,
        Command::Restore(args) => restore::run(&args)?,
        Command::Doctor(args) => doctor::run(&args)?,
        Command::Nas(args) => nas::run(&args)?,
        Command::Completions(args) => args.run(Cli::command())?,
        Command::Man(args) => args.run(Cli::command())?,
        Command::Sim(args) => sim::run(&args)?,
        Command::Demo(args) => demo::run(&args)?,
        Command::Bench(args) => bench::run(&args)?,
    })
}

/// Past a file-size limit (`ulimit -f`,
/// `LimitFSIZE=`) a write shall fail with EFBIG, and not end the process by SIGXFSZ: blocked, the
/// signal stays pending. Before any thread is started, as threads inherit it.
fn fail_writes_past_the_size_limit() {
    let mut set = SigSet::empty();
    set.add(Signal::SIGXFSZ);
    if let Err(e) = set.thread_block() {
        say(&format!(
            "a file-size limit would end this process (SIGXFSZ cannot be blocked: {e})"
        ));
    }
}

/// clap's answer: help as it is, errors in one sentence, behind their place in a guest file.
fn usage(error: &clap::Error, place: Option<&str>) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
        }
        _ => {
            let text = error.render().to_string();
            // `args` would panic on what is no UTF-8.
            let command = std::env::args_os().nth(1);
            let sentence = one_sentence(&text, command.and_then(|c| c.into_string().ok()));
            let sentence = match place {
                Some(place) => format!("{place}: {sentence}"),
                None => sentence,
            };
            say(&sentence);
            put_failure(outcome::USAGE.code, &sentence);
        }
    }
    ExitCode::from(2)
}

/// clap's paragraphs on one line: what is wrong and its tips, without the usage, which --help shows
/// better.
fn one_sentence(text: &str, command: Option<String>) -> String {
    let paragraphs = text
        .split("\n\n")
        .map(|p| p.split_whitespace().collect::<Vec<_>>().join(" "));
    let told: Vec<String> = paragraphs
        .filter(|p| {
            !p.is_empty() && !p.starts_with("Usage:") && !p.starts_with("For more information")
        })
        .map(|p| p.trim_start_matches("error: ").to_owned())
        .collect();
    let known = command.filter(|c| !c.is_empty() && c.bytes().all(|b| b.is_ascii_lowercase()));
    let known = known.filter(|c| Cli::command().find_subcommand(c).is_some());
    let help = known.map_or_else(
        || "ferry --help".to_owned(),
        |c| format!("ferry {c} --help"),
    );
    format!("{}; see `{help}`", told.join("; "))
}

/// `--log-format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LogFormat {
    Text,
    Json,
}

impl FromStr for LogFormat {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err("give text or json"),
        }
    }
}

fn log(verbose: u8, format: LogFormat) {
    use tracing_subscriber::EnvFilter;
    let level = match verbose {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    let filter = match std::env::var("FERRY_LOG") {
        Ok(text) if verbose == 0 => EnvFilter::try_new(&text).unwrap_or_else(|e| {
            say(&format!(
                "FERRY_LOG={text} is not understood ({e}); logging warnings only"
            ));
            EnvFilter::new("warn")
        }),
        _ => EnvFilter::new(level),
    };
    let json = format == LogFormat::Json;
    let terminal = std::io::IsTerminal::is_terminal(&std::io::stderr());
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(terminal && !json);
    // A second subscriber would be the only reason to fail, and there is none.
    let _ = match json {
        true => builder.json().try_init(),
        false => builder.try_init(),
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_an_example() {
        for command in Cli::command().get_subcommands_mut() {
            let help = command.render_long_help().to_string();
            assert!(help.contains("Example"), "{}", command.get_name());
        }
    }

    #[test]
    fn usage_errors_are_one_sentence() {
        let text = |args: &[&str]| {
            let error = Cli::try_parse_from(args).unwrap_err();
            one_sentence(
                &error.render().to_string(),
                args.get(1).map(|a| (*a).to_owned()),
            )
        };
        assert_eq!(
            text(&["ferry", "migrate", "tcp:x:1"]),
            "where to is missing; give NAME and HOST or URI, or --api SOCKET and one of them; see `ferry migrate --help`"
        );
        let downtime = text(&[
            "ferry",
            "migrate",
            "--api",
            "s",
            "tcp:x:1",
            "--downtime",
            "300",
        ]);
        assert_eq!(
            downtime,
            "invalid value '300' for '--downtime <TIME>': a duration is a number with ms, s, m or h, such as 300ms or \
             1.5s; see `ferry migrate --help`"
        );
        let typo = text(&["ferry", "migrat"]);
        assert!(
            typo.contains("unrecognized subcommand 'migrat'") && typo.contains("'migrate'"),
            "{typo}"
        );
        assert!(typo.ends_with("see `ferry --help`"), "{typo}");
    }
}
