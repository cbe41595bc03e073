//! The guest's life: read the command line, set up memory and processors, run, report.

use crate::console::{self, Text};
use crate::cpu::{self, MAX_CPUS};
use crate::memory;
use crate::monitor::Monitor;
use crate::start_info::{self, StartInfo};
use crate::team::{ARRIVED, Processors};
use core::fmt;
use ferry_nas::dirty::{self, Dirty};
use ferry_nas::line::{KernelResult, Line};
use ferry_nas::workload::BYTES_PER_CPU;
use ferry_nas::workload::{SpecError, Workload};
use ferry_nas::{Hooks, Problem, RunError, Workspace};

/// Why the guest cannot do what it was told.
pub enum Error {
    Boot(start_info::Error),
    NoRun,
    Token(Text),
    Spec(Text),
    Memory {
        run: Text,
        needed_mib: u64,
        given_mib: u64,
    },
    Processors {
        wanted: usize,
        came: usize,
    },
    Clock,
    Run(RunError),
    TooSmall(dirty::TooSmall),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Boot(error) => error.fmt(f),
            Self::NoRun => f.write_str("the command line does not say what to run; add ferry.run=mg.A, for example"),
            Self::Token(token) => {
                write!(f, "`{}` on the command line does not do; see guest-images/README.md for what does", &**token)
            }
            Self::Spec(text) => f.write_str(text),
            Self::Memory { run, needed_mib, given_mib } => write!(
                f,
                "{} needs a guest of {needed_mib} MiB and this one has {given_mib}; give it more memory",
                &**run
            ),
            Self::Processors { wanted, came } => {
                write!(f, "ferry.cpus={wanted} but only {came} processors came up; give the guest that many")
            }
            Self::Clock => f.write_str("the clock's rate cannot be measured without an interval timer; add ferry.tsc_khz=N"),
            Self::Run(error) => error.fmt(f),
            Self::TooSmall(error) => error.fmt(f),
        }
    }
}

struct Options {
    workload: Workload,
    cpus: usize,
    tsc_khz: Option<u64>,
    repeat: u64,
    stat_ms: u64,
    beat_ms: Option<u64>,
}

impl Options {
    /// Reads the command line. Tokens without the `ferry.` prefix are ignored.
    fn parse(command_line: &str) -> Result<Self, Error> {
        let (mut run, mut cpus, mut tsc_khz, mut repeat) = (None, 1, None, 1);
        let (mut stat_ms, mut beat_ms) = (1000, None);
        for token in command_line.split_ascii_whitespace() {
            let Some(option) = token.strip_prefix("ferry.") else {
                continue;
            };
            let bad = || Error::Token(Text::new(format_args!("{token}")));
            let (key, value) = option.split_once('=').ok_or_else(bad)?;
            let number = value.parse::<u64>().ok();
            match key {
                "run" => run = Some(value),
                "cpus" => {
                    let number = number.and_then(|number| usize::try_from(number).ok());
                    cpus = number
                        .filter(|number| (1..=MAX_CPUS).contains(number))
                        .ok_or_else(bad)?;
                }
                "tsc_khz" => {
                    tsc_khz = Some(
                        number
                            .filter(|khz| (1000..=100_000_000).contains(khz))
                            .ok_or_else(bad)?,
                    );
                }
                "repeat" => repeat = number.ok_or_else(bad)?,
                "stat_ms" => {
                    stat_ms = number
                        .filter(|ms| (20..=60_000).contains(ms))
                        .ok_or_else(bad)?;
                }
                "beat_ms" => {
                    beat_ms = Some(
                        number
                            .filter(|ms| (1..=1000).contains(ms))
                            .ok_or_else(bad)?,
                    );
                }
                _ => return Err(bad()),
            }
        }
        let spec = |error: SpecError<'_>| Error::Spec(Text::new(format_args!("{error}")));
        Ok(Self {
            workload: Workload::parse(run.ok_or(Error::NoRun)?).map_err(spec)?,
            cpus,
            tsc_khz,
            repeat,
            stat_ms,
            beat_ms,
        })
    }
}

/// Runs what the command line says.
pub fn run(start_info: u64) -> Result<(), Error> {
    let info = StartInfo::read(start_info).map_err(Error::Boot)?;
    let options = Options::parse(info.command_line().map_err(Error::Boot)?)?;
    let khz = options
        .tsc_khz
        .or_else(cpu::measure_tsc_khz)
        .ok_or(Error::Clock)?;
    let memory: u64 = info
        .regions()
        .iter()
        .map(|region| region.end - region.start)
        .sum();
    // What firmware keeps for itself below 1 MiB rounds away.
    let memory_mib = (memory + (1 << 20) - 1) >> 20;
    let run = Text::new(format_args!("{}", options.workload));
    let writer = matches!(options.workload, Workload::Dirty(_));
    let monitor = Monitor::new(khz, writer, options.stat_ms, options.beat_ms);
    console::print(&Line::Start {
        run: &run,
        cpus: options.cpus as u64,
        memory_mib,
        tsc_khz: khz,
    });

    let needed_mib = options.workload.memory_needed(options.cpus) >> 20;
    let too_small = || Error::Memory {
        run: Text::new(format_args!("{}", &*run)),
        needed_mib,
        given_mib: memory_mib,
    };
    let mut arena = memory::map(info.regions()).ok_or_else(too_small)?;
    let others = options.cpus - 1;
    if (arena.len() as u64)
        < options.workload.arena_needed(options.cpus) + (others * BYTES_PER_CPU) as u64
    {
        return Err(too_small());
    }
    let (stacks, rest) = arena.split_at_mut(others * BYTES_PER_CPU);
    arena = rest;
    if others > 0 {
        let at = stacks.as_ptr().addr();
        let came = cpu::start_others(others, stacks, khz, &ARRIVED);
        if came < others {
            return Err(Error::Processors {
                wanted: options.cpus,
                came: came + 1,
            });
        }
        monitor.processors(options.cpus, at);
    }
    let team = Processors::new(others);
    match options.workload {
        Workload::Nas(problem) => {
            run_kernel(problem, options.repeat, arena, &team, &monitor, too_small)
        }
        Workload::Dirty(dirty) => run_writer(&dirty, arena, &team, &monitor, too_small),
    }
}

fn run_kernel(
    problem: Problem,
    repeat: u64,
    mut arena: &'static mut [u8],
    team: &Processors,
    monitor: &Monitor,
    too_small: impl Fn() -> Error,
) -> Result<(), Error> {
    let needs = problem.needs(ferry_nas::Team::size(team));
    let floats: &mut [f64] = memory::take(&mut arena, needs.floats).ok_or_else(&too_small)?;
    let words: &mut [u32] = memory::take(&mut arena, needs.words).ok_or_else(&too_small)?;
    let name = Text::new(format_args!("{problem}"));
    let mut run = 1;
    loop {
        monitor.run(run);
        let workspace = Workspace {
            floats: &mut *floats,
            words: &mut *words,
            kept: run > 1,
        };
        let outcome = ferry_nas::run(problem, workspace, team, monitor).map_err(Error::Run)?;
        console::print(&Line::Result(KernelResult {
            kernel: &name,
            run,
            verified: outcome.verified,
            value: outcome.check.value,
            reference: outcome.check.reference,
            error: outcome.error,
            mops: outcome.mops,
            seconds: outcome.seconds,
            gaps: monitor.gaps(false),
        }));
        if run == repeat || monitor.stop() {
            return Ok(());
        }
        run += 1;
    }
}

fn run_writer(
    dirty: &Dirty,
    mut arena: &'static mut [u8],
    team: &Processors,
    monitor: &Monitor,
    too_small: impl Fn() -> Error,
) -> Result<(), Error> {
    let working_set = usize::try_from(dirty.working_set_pages).map_err(|_| too_small())?;
    let generations: &mut [u32] = memory::take(&mut arena, working_set).ok_or_else(&too_small)?;
    let left = arena
        .as_ptr()
        .align_offset(size_of::<dirty::Page>())
        .min(arena.len());
    let count = (arena.len() - left) / size_of::<dirty::Page>();
    let pages = memory::take(&mut arena, count).ok_or_else(&too_small)?;
    let verdict = dirty::run(dirty, dirty::Memory { pages, generations }, team, monitor)
        .map_err(Error::TooSmall)?;
    console::print(&Line::Verdict {
        verdict,
        gaps: monitor.gaps(false),
    });
    Ok(())
}
