//! Ctrl-C: what runs is ended, what was measured is kept.

use ferry_terminal::output::{Failure, say};
use ferry_vmm::thread;
use nix::sys::signal::{SigSet, Signal};
use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A signal asked for the end.
static WANTED: AtomicBool = AtomicBool::new(false);

/// How often a wait checks for that.
const LOOK: Duration = Duration::from_millis(10);

/// Has SIGINT and SIGTERM noted from now on. To be called before any thread is started.
pub fn watch() -> Result<(), Failure> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals
        .thread_block()
        .map_err(|e| Failure(format!("cannot watch for Ctrl-C ({e})")))?;
    let note = move || {
        while signals.wait().is_ok() {
            if !WANTED.swap(true, Ordering::Relaxed) {
                // The bar is on the line.
                if std::io::stderr().is_terminal() {
                    eprintln!();
                }
                say(
                    "ending the run in hand; the others are kept, and the same command goes on with the rest",
                );
            }
        }
        Ok(())
    };
    let failed = |why: String| say(&format!("Ctrl-C is not noted from now on: {why}"));
    thread::spawn(thread::Kind::Vmm, "ferry-signals", note, failed)?;
    Ok(())
}

/// Whether a signal asked for the end.
pub fn wanted() -> bool {
    WANTED.load(Ordering::Relaxed)
}

/// The failure of what was ended.
pub fn check() -> Result<(), Failure> {
    if wanted() {
        return Err(Failure("it was interrupted".into()));
    }
    Ok(())
}

/// Sleeps, unless it is interrupted.
pub fn pause(time: Duration) -> Result<(), Failure> {
    let began = Instant::now();
    loop {
        check()?;
        let left = time.saturating_sub(began.elapsed());
        if left.is_zero() {
            return Ok(());
        }
        std::thread::sleep(left.min(LOOK));
    }
}

/// Waits until `look` finds something; `late` says what it was that did not come in `timeout`.
pub fn until<T>(
    timeout: Duration,
    late: impl FnOnce() -> String,
    mut look: impl FnMut() -> Result<Option<T>, Failure>,
) -> Result<T, Failure> {
    let began = Instant::now();
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if began.elapsed() > timeout {
            return Err(Failure(late()));
        }
        pause(LOOK)?;
    }
}
