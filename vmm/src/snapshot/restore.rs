//! A guest from a file: at once, its memory following on demand, or after all of its memory was
//! read.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Instant;

use ferry_devices::thread;
use ferry_migration::options::Tracking;
use ferry_migration::port::{DestinationVm, PortError, PostCopyVm};
use ferry_migration::report::Faults;
use ferry_migration::snapshot::{Snapshot, SnapshotError as FormatError, fill_all};
use serde::{Deserialize, Serialize};

use super::cancel::unless;
use super::reading::{Pages, Reading, unreadable};
use super::{Contents, modified, ms, threads};
use crate::machine::{Backends, Machine, RunState};
use crate::migrate::host::MachineHost;
use crate::migrate::sink::RamSink;
use crate::migrate::{Awaited, Following, MonotonicClock, SerialFactory};

/// How a guest is restored.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct RestoreOptions {
    /// The file.
    pub path: PathBuf,
    /// All memory is read before the guest runs.
    pub eager: bool,
    /// Disks that are not as they were, and a CPU that the guest does not count on, are taken all
    /// the same.
    pub force: bool,
    /// The guest goes on as the one that was saved, and is not told that it may be a copy.
    pub same_identity: bool,
    /// How the pages that the guest dirties are found when it is migrated on.
    pub dirty: Tracking,
}

impl RestoreOptions {
    /// Restores this file on demand, as a copy of its guest.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            eager: false,
            force: false,
            same_identity: false,
            dirty: Tracking::Auto,
        }
    }
}

/// Why a guest was not restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// There is no such file.
    #[error("the snapshot {} cannot be opened: {source}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It cannot be used.
    #[error("the snapshot {} cannot be restored: {source}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Why.
        source: FormatError,
    },
    /// Not a machine's.
    #[error("the snapshot {} has a description that cannot be understood: {source}", path.display())]
    Description {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// A disk is not as it was.
    #[error(
        "the disk {} {what} since the snapshot {} was taken of the guest ({was}), which would destroy its files; give a copy of \
         the disk from that time (with its time of change, as `cp -p` keeps it), or --force if you know better",
        disk.display(),
        path.display()
    )]
    Disk {
        /// The disk that was given here.
        disk: PathBuf,
        /// The snapshot.
        path: PathBuf,
        /// What is different.
        what: &'static str,
        /// What it was in the snapshot.
        was: String,
    },
    /// This host cannot run it.
    #[error("the guest of the snapshot {} cannot run here: {source}", path.display())]
    Host {
        /// The file.
        path: PathBuf,
        /// Why.
        source: PortError,
    },
    /// A thread cannot be started.
    #[error("a thread that reads the guest's memory cannot be started: {0}")]
    Thread(#[from] std::io::Error),
}

/// What a restore did.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct RestoreReport {
    /// Version of this object; grows when a field is added.
    pub schema: u32,
    /// The file.
    pub path: PathBuf,
    /// The snapshot's name.
    pub session: String,
    /// Why memory could not be read to the end, in a sentence: the guest was ended then.
    pub error: Option<String>,
    /// The guest's VM generation id, in hexadecimal digits; `None` where it was started without.
    pub generation: Option<String>,
    /// Whether that is a new one, which tells the guest that it is a copy.
    pub new_identity: bool,
    /// Whether all memory was read before the guest ran.
    pub eager: bool,
    /// Why, when it was not asked for.
    pub why_eager: Option<String>,
    /// From the request until all memory was there, in milliseconds.
    pub total_ms: f64,
    /// From the request until the guest ran (or was ready to, when it was paused), in milliseconds.
    pub start_ms: f64,
    /// Pages of RAM.
    pub pages: u64,
    /// Pages that are in the file; the others are zero.
    pub data_pages: u64,
    /// Of those, how many were not read, for the guest ended before.
    pub unread_pages: u64,
    /// Bytes that were read of the file.
    pub bytes_read: u64,
    /// The guest's waits for pages.
    pub faults: Faults,
    /// Waits for pages that turned out to be zero, which takes no reading.
    pub zero_faults: u64,
}

impl RestoreReport {
    /// Called while the guest has not run yet.
    fn note_identity(&mut self, machine: &Machine) -> Result<(), PortError> {
        let id = machine.generation()?;
        self.new_identity &= id.is_some();
        self.generation = id.map(|id| id.to_string());
        Ok(())
    }
}

/// A guest that was restored.
#[derive(Debug)]
#[non_exhaustive]
pub struct Restored {
    /// Its machine, which runs, or is paused as the guest was when it was saved.
    pub machine: Arc<Machine>,
    /// Pages that are still to be read.
    pub following: Option<Following>,
    /// Brings the report, once all memory is there; closed without one if that failed inside, which
    /// has ended the guest.
    pub report: mpsc::Receiver<RestoreReport>,
}

impl Restored {
    /// Whether the guest runs.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.machine.run_state() == RunState::Running
    }
}

/// Pages that are read from a file.
struct FromFile {
    pages: Arc<Pages>,
    sink: Arc<RamSink>,
    path: PathBuf,
}

impl Awaited for FromFile {
    fn left(&self) -> u64 {
        self.pages.left()
    }

    fn waiting(&self) -> usize {
        self.pages.waiting()
    }

    fn lost(&self) -> Option<String> {
        self.pages.failed()
    }

    fn file(&self) -> Option<&Path> {
        Some(&self.path)
    }

    fn abandon(&self) {
        self.pages.dismiss();
        self.sink.end_faults();
    }
}

/// Builds the machine of a snapshot and lets its guest run on, if it ran when it was saved.
///
/// Unless all is to be read first, memory is read while the guest runs; it waits where it touches
/// what has not been read. If that cannot be done here (userfaultfd is not allowed, huge pages),
/// all is read first, and the report says why. If the file turns out to be damaged later the
/// machine [fails](Machine::fail), before the guest has seen any of that.
///
/// Reading all of it first, and waiting for what is needed before the guest runs, end when
/// `cancelled` says so.
///
/// # Errors
/// [`RestoreError`]; nothing runs.
pub fn restore(
    options: &RestoreOptions,
    serial: SerialFactory,
    backends: Backends,
    cancelled: &(dyn Fn() -> bool + Sync),
) -> Result<Restored, RestoreError> {
    let began = Instant::now();
    let path = &options.path;
    let file = File::open(path).map_err(|source| RestoreError::Open {
        path: path.clone(),
        source,
    })?;
    let format = |source| RestoreError::Format {
        path: path.clone(),
        source,
    };
    let snapshot = Snapshot::open(file).map_err(format)?;
    let understood = |source| RestoreError::Description {
        path: path.clone(),
        source,
    };
    let contents: Contents = serde_json::from_slice(snapshot.machine()).map_err(understood)?;
    if !options.force {
        check_disks(path, &contents, &backends)?;
    }
    let description = serde_json::to_vec(&contents.description).map_err(understood)?;
    let refused = |source| RestoreError::Host {
        path: path.clone(),
        source,
    };
    let backends = Backends {
        insist: options.force,
        ..backends
    };
    let mut host = MachineHost::new(serial, backends, options.dirty)
        .with_stopped_clock()
        .with_new_identity(!options.same_identity);
    let sink = host
        .prepare(snapshot.layout(), &description)
        .map_err(refused)?;
    let machine = host.machine().cloned();
    let machine = machine.ok_or_else(|| refused("there is no machine".into()))?;
    let mut report = of_file(options, &snapshot);
    if !options.eager {
        match host.begin(&snapshot.data()) {
            Ok(()) => {
                report.eager = false;
                let restored = on_demand(began, host, snapshot, &sink, machine, report, cancelled);
                return restored.map_err(|error| match error.downcast() {
                    Ok(error) => format(*error),
                    Err(error) => refused(error),
                });
            }
            Err(error) => report.why_eager = Some(error.to_string()),
        }
    }
    report.bytes_read = fill_all(&snapshot, &*sink, threads(), cancelled).map_err(format)?;
    let start = host
        .restore(snapshot.state())
        .and_then(|()| report.note_identity(&machine))
        .and_then(|()| host.run())
        .map_err(refused)?;
    let total = began.elapsed();
    report.total_ms = ms(total);
    report.start_ms = ms(total.saturating_sub(start.unwrap_or_default()));
    let (done, reported) = mpsc::channel();
    // Its other end is here.
    let _ = done.send(report);
    Ok(Restored {
        machine,
        following: None,
        report: reported,
    })
}

/// What a report says of its file.
fn of_file(options: &RestoreOptions, snapshot: &Snapshot<File>) -> RestoreReport {
    RestoreReport {
        schema: 2,
        path: options.path.clone(),
        new_identity: !options.same_identity,
        session: snapshot.session().to_string(),
        pages: snapshot.layout().pages(),
        data_pages: snapshot.data_pages(),
        eager: true,
        ..RestoreReport::default()
    }
}

/// Whether a start counts: what was restored after a page could not be read was restored over
/// zeros.
fn counts(started: Result<(), PortError>, stopped: bool, pages: &Pages) -> Result<(), PortError> {
    match pages.failed() {
        _ if stopped => Err(FormatError::Cancelled.into()),
        Some(why) => Err(format!("its memory cannot be read: {why}").into()),
        None => started,
    }
}

/// The guest runs; its pages follow.
fn on_demand(
    began: Instant,
    mut host: MachineHost,
    snapshot: Snapshot<File>,
    sink: &Arc<RamSink>,
    machine: Arc<Machine>,
    mut report: RestoreReport,
    cancelled: &(dyn Fn() -> bool + Sync),
) -> Result<Restored, PortError> {
    let state = snapshot.state().to_vec();
    let clock = Arc::new(MonotonicClock::new());
    let pages = Arc::new(Pages::new(snapshot, Arc::clone(sink), clock));
    let servers = usize::try_from(machine.description().cpus).map_or(1, |cpus| cpus.clamp(1, 8));
    let mut threads = Vec::new();
    let reading = Reading {
        pages: &pages,
        machine: &machine,
        sink,
        path: &report.path.clone(),
    };
    let stopped = AtomicBool::new(false);
    let stop = || {
        stopped.store(true, Ordering::Relaxed);
        pages.dismiss();
        machine.stop();
        sink.end_faults();
    };
    let started = unless(cancelled, &stop, || {
        // KVM itself may touch memory when it takes the state, and so may the identity: faults are
        // served from here on.
        for _ in 0..servers {
            threads.push(reading.thread("ferry-faults", Pages::serve)?);
        }
        host.restore(&state)?;
        report.note_identity(&machine)?;
        let ran_for = host.run()?;
        report.start_ms = ms(began.elapsed().saturating_sub(ran_for.unwrap_or_default()));
        threads.push(reading.thread("ferry-push", Pages::push)?);
        Ok(())
    });
    let started = counts(started, stopped.into_inner(), &pages);
    if let Err(error) = started {
        pages.dismiss();
        machine.stop();
        // The threads end by themselves, unless their file stalls: that is not waited for.
        host.end();
        return Err(error);
    }
    let following = Following::new(FromFile {
        pages: Arc::clone(&pages),
        sink: Arc::clone(sink),
        path: report.path.clone(),
    });
    let (done, reported) = mpsc::channel();
    let failed = Arc::clone(&machine);
    let remainder = Remainder {
        began,
        host,
        pages,
        threads,
        report,
    };
    let finish = move || {
        // The embedder may not want it.
        let _ = done.send(remainder.finish());
        Ok(())
    };
    thread::spawn(
        thread::Kind::Migration,
        "ferry-restore",
        finish,
        move |why| failed.fail(why),
    )?;
    Ok(Restored {
        machine,
        following: Some(following),
        report: reported,
    })
}

/// A restore whose guest runs: what is left to do.
struct Remainder {
    began: Instant,
    host: MachineHost,
    pages: Arc<Pages>,
    /// Read the pages.
    threads: Vec<std::thread::JoinHandle<()>>,
    report: RestoreReport,
}

impl Remainder {
    /// Waits until all memory is there, or the guest has ended.
    fn finish(self) -> RestoreReport {
        let Self {
            began,
            mut host,
            pages,
            threads,
            mut report,
        } = self;
        for thread in threads {
            // It has said why, if it did not get to the end, and ended the guest.
            let _ = thread.join();
        }
        if let Some(why) = pages.failed() {
            pages.dismiss();
            report.error = Some(unreadable(&report.path, &why));
        }
        host.end();
        let filled = pages.filled();
        report.total_ms = ms(began.elapsed());
        report.unread_pages = pages.left();
        report.bytes_read = filled.bytes;
        report.faults = filled.faults;
        report.zero_faults = filled.zero_faults;
        report
    }
}

/// The disks that are given here are those of the snapshot, and were not written to since.
fn check_disks(path: &Path, contents: &Contents, backends: &Backends) -> Result<(), RestoreError> {
    // How many there must be is checked with the machine.
    for (mark, disk) in contents.disks.iter().zip(&backends.disks) {
        let error = |what, was: String| {
            Err(RestoreError::Disk {
                disk: disk.path.clone(),
                path: path.to_owned(),
                what,
                was,
            })
        };
        // What cannot be opened is said better where it is opened.
        let Ok(now) = modified(&disk.path) else {
            continue;
        };
        match (now, mark.modified_ns) {
            (Some(now), Some(then)) if now == then => {}
            (Some(_), Some(_)) => return error("was changed", format!("then at {}", mark.path)),
            _ => {
                return error(
                    "may have been changed",
                    "a block device has no modification time".into(),
                );
            }
        }
    }
    Ok(())
}
