//! The bare guest in a machine of this process.
#![allow(dead_code, reason = "not every benchmark asks how fast its guest is")]

use anyhow::{Context, Result, bail, ensure};
use ferry_guest_images::{BARE, Line, Manner, Work, Workload};
use ferry_migration::options::Tracking;
use ferry_vmm::boot::Kernel;
use ferry_vmm::machine::Machine;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often the guest tells of its progress.
const STAT: Duration = Duration::from_millis(20);
/// How long anything of the guest's may take.
const TIMEOUT: Duration = Duration::from_secs(120);

/// A running guest.
pub struct Guest {
    pub machine: Arc<Machine>,
    console: Console,
}

/// What it has printed.
#[derive(Clone, Default)]
struct Console(Arc<Mutex<String>>);

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut text = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        text.push_str(&String::from_utf8_lossy(bytes));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Guest {
    /// Runs `work` in so much memory, until it is ready.
    pub fn run(work: &str, memory: u64, tracking: Tracking) -> Result<Self> {
        let console = Console::default();
        let machine = Machine::builder()
            .memory(memory)
            .dirty(tracking)
            .serial(Box::new(console.clone()))
            .build()?;
        let manner = Manner {
            stat_ms: u64::try_from(STAT.as_millis()).ok(),
            ..Manner::default()
        };
        let mut image = tempfile::NamedTempFile::new()?;
        image.write_all(BARE)?;
        machine.load(&Kernel {
            path: image.path().to_owned(),
            initrd: None,
            cmdline: Workload::parse(work)?.command_line_with(
                1,
                machine.tsc_khz().map(u64::from),
                manner,
            ),
        })?;
        machine.resume()?;
        let guest = Self {
            machine: Arc::new(machine),
            console,
        };
        guest.wait_for("to be ready", |line| {
            matches!(line, Line::Ready { .. }).then_some(())
        })?;
        Ok(guest)
    }

    /// Milliseconds on its own clock and pages written, as it says next.
    pub fn progress(&self) -> Result<(u64, u64)> {
        self.console
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
        // The first line may be the rest of one.
        self.wait_for("to tell its progress", |line| match line {
            Line::Stat {
                t_ms,
                work: Work::Writes { writes, .. },
                ..
            } => Some((*t_ms, *writes)),
            _ => None,
        })
    }

    fn wait_for<T>(&self, what: &str, find: impl Fn(&Line<'_>) -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let text = self
                .console
                .0
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone();
            // What is not finished by a line feed may be the beginning of a longer number.
            let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
            let found = whole.lines().find_map(|line| find(&Line::parse(line)?));
            if let Some(found) = found {
                return Ok(found);
            }
            if let Some(exit) = self.machine.exit_reason() {
                bail!("the guest was expected {what}, and ended: {exit}; it printed {text}");
            }
            ensure!(
                Instant::now() < deadline,
                "the guest was expected {what}, in vain"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Writes of a guest for each second of its clock between two moments of [`Guest::progress`].
pub fn rate(from: (u64, u64), to: (u64, u64)) -> Result<f64> {
    let ms = to.0.checked_sub(from.0).filter(|ms| *ms > 0);
    let ms = ms.context("the guest's clock stands still")?;
    Ok(to.1.saturating_sub(from.1) as f64 * 1e3 / ms as f64)
}
