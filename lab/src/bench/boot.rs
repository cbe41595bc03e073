//! `ferry bench boot`: from `ferry run --linux` to a guest that is ready, stage by stage.
//!
//! The VMM reports the stages before the guest's first instruction ([`Timeline`]). The others are
//! lines that the guest prints, timed when they arrive here. All times are of one clock.

use super::interrupt;
use super::process::{Process, said};
use super::statistics::spread;
use crate::nested::{Elsewhere, linux_runs_here, why};
use ferry_guest_images::{LINUX_INIT_START, Line};
use ferry_terminal::output::{Failure, put, put_json, say};
use ferry_terminal::rows::aligned;
use ferry_terminal::timeline::{Mark, Timeline, nanos};
use ferry_terminal::units::{size, span};
use ferry_vmm::doctor::examine;
use ferry_vmm::sync::lock;
use ferry_vmm::thread;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// The stages, in their order, and what has happened when each is reached.
const STAGES: [(&str, &str); 8] = [
    ("start", "the process runs and has read its command line"),
    (
        "machine",
        "KVM's machine, its memory, vCPUs and devices are there",
    ),
    (
        "images",
        "the kernel is found and checked, the RAM disk made",
    ),
    ("load", "both are in the guest's memory, with ACPI's tables"),
    (
        "entry",
        "the control socket is open, the first vCPU enters the guest",
    ),
    (
        "console",
        "the kernel is unpacked and prints its first line",
    ),
    ("init", "the kernel has started everything and runs /init"),
    ("ready", "modules are loaded, devices and network are up"),
];

/// An early console and a higher log level show the kernel's first line when it is printed.
const CMDLINE: &str = "loglevel=6 earlyprintk=ttyS0,115200";

/// What takes longer hangs.
const TIMEOUT: Duration = Duration::from_secs(240);

/// Measure how long a stock Debian Linux takes from `ferry run --linux` until it is ready, stage by
/// stage.
///
/// Where this host's KVM cannot run Linux, all of it happens in a host that QEMU emulates, at some
/// twentieth of the speed: the shares are of use then, the times are not.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  ferry bench boot --runs 10 --cpus 2")]
pub struct Args {
    /// Boots; the table has their medians.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// Virtual processors.
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u32,
    /// RAM.
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = size)]
    memory: u64,
    /// One JSON object instead of the table.
    #[arg(long)]
    json: bool,
}

/// What came out.
#[derive(Debug, Serialize, Deserialize)]
struct Boots {
    schema: String,
    /// `this host` or `a nested host`.
    place: String,
    /// A debug build's own stages say nothing about a release build's.
    debug_build: bool,
    cpus: u32,
    memory_bytes: u64,
    stages: Vec<Stage>,
    total_ms: Figures,
}

/// A stage over all runs.
#[derive(Debug, Serialize, Deserialize)]
struct Stage {
    name: String,
    what: String,
    /// From the stage before.
    ms: Figures,
    /// From the start of the process, in the median.
    since_start_ms: f64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Figures {
    median: f64,
    min: f64,
    max: f64,
    /// In the order of the runs.
    runs: Vec<f64>,
}

impl Figures {
    fn of(runs: Vec<f64>) -> Self {
        let found = spread(runs.clone());
        let or_none = |value: Option<f64>| value.unwrap_or(f64::NAN);
        Self {
            median: or_none(found.map(|s| s.median)),
            min: or_none(found.map(|s| s.min)),
            max: or_none(found.map(|s| s.max)),
            runs,
        }
    }
}

pub fn run(args: &Args) -> Result<ExitCode, Failure> {
    let found = examine();
    let boots = if linux_runs_here(&found) {
        if cfg!(debug_assertions) {
            say(
                "this ferry is a debug build: its own stages say nothing; use cargo build --release",
            );
        }
        here(args)?
    } else {
        say(&why(&found));
        elsewhere(args)?
    };
    if args.json {
        put_json(&boots)?;
    } else {
        put(&table(&boots))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// On this host's KVM.
fn here(args: &Args) -> Result<Boots, Failure> {
    interrupt::watch()?;
    let dir = tempfile::Builder::new().prefix("ferry-boot-").tempdir()?;
    let runs: Vec<Boot> = (0..args.runs)
        .map(|_| boot(args, dir.path()))
        .collect::<Result<_, _>>()?;
    Ok(Boots {
        schema: "ferry-boot/1".to_owned(),
        place: "this host".to_owned(),
        debug_build: cfg!(debug_assertions),
        cpus: args.cpus,
        memory_bytes: args.memory,
        stages: stages(&runs),
        total_ms: Figures::of(
            runs.iter()
                .filter_map(|times| times.last().copied())
                .collect(),
        ),
    })
}

/// In a nested host, by this very program.
fn elsewhere(args: &Args) -> Result<Boots, Failure> {
    let nested = Elsewhere::start(&|sentence| say(sentence))?;
    let [runs, cpus, memory] = [
        args.runs.to_string(),
        args.cpus.to_string(),
        format!("{}K", args.memory >> 10),
    ];
    let command = [
        "bench", "boot", "--json", "--runs", &runs, "--cpus", &cpus, "--memory", &memory,
    ];
    let ran = nested.ferry(&command)?.wait(TIMEOUT * args.runs)?;
    for sentence in ran.stderr.lines() {
        say(sentence.trim_start_matches("ferry: "));
    }
    if ran.code != 0 {
        return Err(Failure(
            "the boots in the nested host could not be measured; see above".to_owned(),
        ));
    }
    let mut boots: Boots = serde_json::from_str(&ran.stdout)?;
    boots.place = "a nested host".to_owned();
    Ok(boots)
}

/// When each stage was reached, in milliseconds from the start.
type Boot = [f64; STAGES.len()];

/// One boot, and the guest's end.
fn boot(args: &Args, dir: &Path) -> Result<Boot, Failure> {
    let (timeline, errors) = (dir.join("timeline"), dir.join("errors"));
    // What an earlier boot left must not be taken for this one's.
    let _ = std::fs::remove_file(&timeline);
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args(["run", "--linux", "--serial", "stdio", "--cmdline", CMDLINE])
        .args(["--cpus", &args.cpus.to_string()])
        .args(["--memory", &format!("{}K", args.memory >> 10)])
        .arg("--timeline")
        .arg(&timeline)
        .arg("--api")
        .arg(dir.join("api.sock"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(File::create(&errors)?);
    let began = nanos(Instant::now());
    let mut vmm = Process::start("ferry run", &mut command)?;
    let lines = Arc::new(Mutex::new(Vec::new()));
    let console = vmm.take_stdout()?;
    let to = Arc::clone(&lines);
    let read = move || {
        follow(console, &to);
        Ok(())
    };
    // The guest is then said not to become ready.
    let failed = |why: String| say(&why);
    thread::spawn(thread::Kind::Vmm, "ferry-console", read, failed)?;
    let printed = interrupt::until(
        TIMEOUT,
        || format!("the guest is not ready after {TIMEOUT:?}"),
        || {
            let found = printed(&lock(&lines));
            if found.is_none() && !vmm.runs() {
                return Err(Failure(format!(
                    "ferry run ended too early: {}",
                    said(std::slice::from_ref(&errors))
                )));
            }
            Ok(found)
        },
    )?;
    let mut marks = Timeline::read(&timeline)?;
    marks.extend(printed);
    // Its control socket has to go before the next one makes its own.
    vmm.type_in(b"poweroff\n")?;
    vmm.end(TIMEOUT)?;
    in_order(began, &marks)
}

/// The first line, or a part of it, and when it came; then each whole line.
fn follow(mut console: impl Read, to: &Mutex<Vec<(u64, String)>>) {
    let add = |line: String| {
        let line = (nanos(Instant::now()), line);
        lock(to).push(line);
    };
    let mut first = [0];
    if console.read_exact(&mut first).is_err() {
        return;
    }
    add(String::new());
    let mut lines = BufReader::new(console);
    let mut line = Vec::new();
    while lines.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
        add(String::from_utf8_lossy(&line).trim().to_owned());
        line.clear();
    }
}

/// The stages that the console shows, once all of them are there.
fn printed(lines: &[(u64, String)]) -> Option<Vec<Mark>> {
    let first = lines.first()?.0;
    let of = |wanted: &dyn Fn(&str) -> bool| {
        lines
            .iter()
            .find(|(_, line)| wanted(line))
            .map(|(at, _)| *at)
    };
    let init = of(&|line| line.ends_with(LINUX_INIT_START))?;
    let ready = of(&|line| matches!(Line::parse(line), Some(Line::Ready { .. })))?;
    let mark = |name: &str, at| (name.to_owned(), at);
    Some(vec![
        mark("console", first),
        mark("init", init),
        mark("ready", ready),
    ])
}

/// All stages must be there, each after the one before: else something was not measured.
fn in_order(began: u64, marks: &[Mark]) -> Result<Boot, Failure> {
    let mut times = [0.0; STAGES.len()];
    let mut last = began;
    if marks.len() != STAGES.len() {
        return Err(Failure(format!(
            "{} stages of the boot were seen, not {}: {marks:?}",
            marks.len(),
            STAGES.len()
        )));
    }
    for ((time, (stage, _)), (name, at)) in times.iter_mut().zip(STAGES).zip(marks) {
        if stage != name || *at < last {
            return Err(Failure(format!(
                "the boot's stage {name} was seen where {stage} belongs, or before the stage before it"
            )));
        }
        last = *at;
        *time = Duration::from_nanos(at - began).as_secs_f64() * 1e3;
    }
    Ok(times)
}

/// Each stage over all runs.
fn stages(runs: &[Boot]) -> Vec<Stage> {
    let stage = |(n, (name, what)): (usize, (&str, &str))| {
        let at = |times: &Boot, n: usize| times.get(n).copied().unwrap_or(f64::NAN);
        let before = |times: &Boot| n.checked_sub(1).map_or(0.0, |n| at(times, n));
        Stage {
            name: name.to_owned(),
            what: what.to_owned(),
            ms: Figures::of(runs.iter().map(|t| at(t, n) - before(t)).collect()),
            since_start_ms: Figures::of(runs.iter().map(|t| at(t, n)).collect()).median,
        }
    };
    STAGES.into_iter().enumerate().map(stage).collect()
}

fn table(boots: &Boots) -> String {
    let words = |cells: [&str; 5]| cells.map(str::to_owned).to_vec();
    let mut lines = vec![words(["stage", "takes", "min", "max", "since start"])];
    for stage in &boots.stages {
        lines.push(vec![
            stage.name.clone(),
            span(stage.ms.median),
            span(stage.ms.min),
            span(stage.ms.max),
            span(stage.since_start_ms),
        ]);
    }
    let mut text = format!(
        "Debian's Linux on {}, {} vCPU, {} MiB, {} boots (medians){}\n\n{}\n",
        boots.place,
        boots.cpus,
        boots.memory_bytes >> 20,
        boots.total_ms.runs.len(),
        if boots.debug_build {
            ", by a debug build"
        } else {
            ""
        },
        aligned(&lines)
    );
    for stage in &boots.stages {
        text.push_str(&format!("{:<8} {}\n", stage.name, stage.what));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn marks() -> Vec<Mark> {
        let times = 1_001..;
        STAGES
            .iter()
            .zip(times)
            .map(|((name, _), at)| ((*name).to_owned(), at * 1_000_000))
            .collect()
    }

    #[test]
    fn stages_that_are_missing_or_out_of_order_are_no_result() {
        let began = 1_000 * 1_000_000;
        assert_eq!(
            in_order(began, &marks()).unwrap(),
            [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
        );
        for n in 0..STAGES.len() {
            let mut missing = marks();
            missing.remove(n);
            assert!(in_order(began, &missing).is_err());
            let mut early = marks();
            early[n].1 -= 2_000_000;
            assert!(in_order(began, &early).is_err(), "{n}");
        }
    }

    #[test]
    fn each_stage_is_counted_from_the_one_before() {
        let boot = in_order(1_000 * 1_000_000, &marks()).unwrap();
        let stages = stages(&[boot, boot]);
        assert!(
            stages
                .iter()
                .all(|s| s.ms.median == 1.0 && s.ms.runs == [1.0, 1.0])
        );
        assert_eq!(stages.last().map(|s| s.since_start_ms), Some(8.0));
    }

    #[test]
    fn the_console_tells_three_stages() {
        let lines = Mutex::new(Vec::new());
        let ready = Line::Ready { t_ms: 5 };
        let text = format!("[    0.0] Linux version 6\r\nx\r\n{LINUX_INIT_START}\r\n{ready}\r\n");
        follow(text.as_bytes(), &lines);
        let lines = lines.into_inner().unwrap();
        let names: Vec<String> = printed(&lines).unwrap().into_iter().map(|m| m.0).collect();
        assert_eq!(names, ["console", "init", "ready"]);
        assert!(printed(&lines[..lines.len() - 1]).is_none());
    }
}
