//! Moving a machine's guest to another process or host: the ports of `ferry-migration`, implemented
//! over a [`Machine`].
//!
//! The source side is [`migrate`]; the destination side is a [`Receiver`].

mod arrival;
mod beside;
mod disks;

pub(crate) mod guest;
pub(crate) mod host;
mod link;
mod listener;
mod newcomers;
mod receive;
mod uri;

pub(crate) use arrival::Awaited;
pub use arrival::{Arrival, Following, GuestInDoubt, Owner};
pub use link::StreamLink;
pub use listener::{Listener, ReceiveError};
pub use receive::{ReceiveState, Receiver, SerialFactory};
pub use uri::{Uri, UriError};

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use ferry_devices::sync::lock;
pub(crate) use ferry_migration::net::{MonotonicClock, session_id};
use ferry_migration::options::{Options, Tracking};
use ferry_migration::report::{Event, Phase, Progress, Report, Status};
use ferry_migration::source::{self, CancelSwitch, Setup};
use ferry_migration::wire::SessionId;

use crate::machine::Machine;
use crate::memory::{UserfaultError, available_memory};
use guest::MachineGuest;
use link::Dial;

/// Shared with the thread that migrates: others look on and cancel.
#[derive(Clone, Debug, Default)]
pub struct Handle {
    inner: Arc<HandleInner>,
}

#[derive(Debug, Default)]
struct HandleInner {
    cancel: CancelSwitch,
    progress: Mutex<Progress>,
}

impl Handle {
    /// For a migration that has not begun.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks the migration to end; `false` when the guest was committed already.
    pub fn cancel(&self) -> bool {
        self.inner.cancel.cancel()
    }

    /// Where it stands.
    #[must_use]
    pub fn progress(&self) -> Progress {
        lock(&self.inner.progress).clone()
    }

    /// Called at the commit, before anything is sent: the record that decides who owns the guest.
    /// It lives in this process, like the guest's memory: neither survives without the other.
    fn committed(&self) {
        lock(&self.inner.progress).phase = Phase::Committed;
    }

    fn is_cancelled(&self) -> bool {
        self.inner.cancel.is_cancelled()
    }
}

/// Moves the machine's guest to `uri`; blocks until the end.
///
/// The guest runs on here as before unless the report's status is `Completed` (it runs at the
/// destination, and must never run here again) or `InDoubt` (it runs nowhere; see [`recover`]).
pub fn migrate(
    machine: &Arc<Machine>,
    uri: &Uri,
    options: &Options,
    handle: &Handle,
    events: &mut dyn FnMut(Event),
) -> Report {
    let session = session_id();
    let check = check_tracking(options.dirty, machine.dirty_log().kind().tracking())
        .and_then(|()| check_huge_pages(options, machine.ram().hugepages()))
        .and_then(|()| check_cache(options, machine.ram().size(), available_memory()));
    if let Err(why) = check {
        return Report::bare(
            session.to_string(),
            options.policy.name().to_owned(),
            Status::Failed,
            why,
        );
    }
    engine(
        machine,
        (uri, options, session),
        handle,
        events,
        |guest, setup| source::migrate(guest, setup),
    )
}

/// Runs one of the source engine's operations over a machine.
fn engine(
    machine: &Arc<Machine>,
    (uri, options, session): (&Uri, &Options, SessionId),
    handle: &Handle,
    events: &mut dyn FnMut(Event),
    operation: impl FnOnce(&MachineGuest<'_>, Setup<'_, StreamLink>) -> Report,
) -> Report {
    let mut dial = Dial::new(uri.clone(), Some(handle.clone()));
    let guest = MachineGuest::new(machine, handle);
    let clock = MonotonicClock::new();
    let mut forward = |event: Event| {
        if let Event::Progress(progress) = &event {
            let mut shared = lock(&handle.inner.progress);
            // The commit's record is never taken back by an older snapshot.
            if shared.phase != Phase::Committed
                || matches!(
                    progress.phase,
                    Phase::PostCopy | Phase::Completed | Phase::InDoubt | Phase::Interrupted
                )
            {
                *shared = progress.clone();
            }
        }
        events(event);
    };
    let setup = Setup {
        connect: &mut |role, index| dial.connect(role, index),
        clock: &clock,
        options,
        session,
        cancel: &handle.inner.cancel,
        events: &mut forward,
        timeouts: source::Timeouts::default(),
        threads: true,
    };
    let run = AssertUnwindSafe(|| operation(&guest, setup));
    match catch_unwind(run) {
        Ok(report) => report,
        Err(_) => {
            // The next migration needs the dirty log.
            if let Err(error) = machine.dirty_log().stop() {
                tracing::warn!(%error, "the guest may be slower than before");
            }
            // A defect in the engine must not lose the guest, nor run it twice.
            if matches!(
                handle.progress().phase,
                Phase::Committed | Phase::PostCopy | Phase::Interrupted
            ) {
                guest.keep();
            }
            Report::broken(
                &handle.progress(),
                "the migration engine failed inside; the VMM's output says where",
            )
        }
    }
}

/// Whether dirty pages are found as was asked for: that was decided when the machine was built.
fn check_tracking(asked: Tracking, has: Tracking) -> Result<(), String> {
    if asked == Tracking::Auto || asked == has {
        return Ok(());
    }
    Err(format!(
        "this guest's dirty pages are found by the {}, and --dirty {} was asked for: leave it out here, and give it to \
         the `ferry run` or `ferry receive` that the guest is built by",
        has.name(),
        asked.name()
    ))
}

/// Whether the guest could follow: the destination's memory is of the same pages.
fn check_huge_pages(options: &Options, hugepages: bool) -> Result<(), String> {
    if hugepages && options.may_post_copy() {
        return Err(UserfaultError::Hugepages.to_string());
    }
    Ok(())
}

/// Whether this host has the memory that copies of sent pages may come to take: found out now, and not by the OOM killer
/// in the middle of a migration. The cache is never larger than the guest.
fn check_cache(options: &Options, guest_bytes: u64, available: Option<u64>) -> Result<(), String> {
    if !options.compress.patches() {
        return Ok(());
    }
    let bytes = options.delta_cache.min(guest_bytes);
    match available {
        Some(available) if bytes > available => Err(format!(
            "a delta cache of {} MiB is more than the {} MiB of memory that this host has available; \
             give a smaller --delta-cache, or 0 for none",
            bytes >> 20,
            available >> 20
        )),
        _ => Ok(()),
    }
}

/// For a guest that is in doubt or was interrupted after [`migrate`]: says the commit again to the receiver at `uri`,
/// and sends what the destination lacks. The destination runs the guest if it does not do so yet. Blocks until it
/// has all of it.
///
/// The report's status is `Completed`, or says that nothing is better than before, and why.
pub fn recover(
    machine: &Arc<Machine>,
    uri: &Uri,
    session: &str,
    options: &Options,
    handle: &Handle,
    events: &mut dyn FnMut(Event),
) -> Report {
    let Some(session) = parse_session(session) else {
        return Report::broken(
            &handle.progress(),
            &format!("'{session}' is no migration's session"),
        );
    };
    // What was committed stays so, whatever becomes of this connection.
    handle.committed();
    engine(
        machine,
        (uri, options, session),
        handle,
        events,
        |guest, setup| source::recover(guest, setup),
    )
}

fn parse_session(text: &str) -> Option<SessionId> {
    let mut id = [0; 16];
    if text.len() != 32 || !text.is_ascii() {
        return None;
    }
    for (byte, at) in id.iter_mut().zip((0..32).step_by(2)) {
        *byte = u8::from_str_radix(text.get(at..at + 2)?, 16).ok()?;
    }
    Some(SessionId(id))
}

/// The engine's view of where RAM is.
pub(crate) fn engine_layout(
    ram: &crate::memory::GuestRam,
) -> Result<ferry_migration::page::RamLayout, ferry_migration::page::LayoutError> {
    let runs = ram
        .regions()
        .iter()
        .map(|r| ferry_migration::page::Run::new(r.first_gfn, r.pages))
        .collect();
    ferry_migration::page::RamLayout::new(runs)
}

/// The engine's runs as memory knows them: at most as many as a frame has.
fn page_runs<'a>(
    runs: &[ferry_migration::page::Run],
    buffer: &'a mut [crate::memory::PageRun; ferry_migration::wire::MAX_RUNS as usize],
) -> std::io::Result<&'a [crate::memory::PageRun]> {
    let room = buffer
        .get_mut(..runs.len())
        .ok_or(std::io::ErrorKind::InvalidInput)?;
    for (to, run) in room.iter_mut().zip(runs) {
        *to = (run.first, run.count);
    }
    Ok(room)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_migration::options::{Compress, PolicyKind};

    #[test]
    fn a_cache_larger_than_memory_is_refused_before_anything_is_sent() {
        let check = |compress, delta_cache, guest, available| {
            let options = Options {
                compress,
                delta_cache,
                ..Options::default()
            };
            check_cache(&options, guest, available)
        };
        let refused = check(Compress::Delta, 1 << 40, 2 << 30, Some(1 << 30)).unwrap_err();
        assert!(
            refused.contains("2048 MiB") && refused.contains("1024 MiB"),
            "{refused}"
        );
        assert!(refused.contains("--delta-cache"), "{refused}");
        // Never larger than the guest; and nobody needs one who sends no differences.
        assert_eq!(
            check(Compress::Auto, u64::MAX, 1 << 29, Some(1 << 30)),
            Ok(())
        );
        assert_eq!(
            check(Compress::Zstd, 1 << 40, 2 << 30, Some(1 << 30)),
            Ok(())
        );
        assert_eq!(check(Compress::Delta, 1 << 40, 2 << 30, None), Ok(()));
    }

    #[test]
    fn huge_pages_do_not_follow() {
        let hybrid = Options {
            policy: PolicyKind::Hybrid,
            ..Options::default()
        };
        assert!(check_huge_pages(&hybrid, true).is_err());
        assert_eq!(check_huge_pages(&hybrid, false), Ok(()));
        assert_eq!(check_huge_pages(&Options::default(), true), Ok(()));
    }
}
