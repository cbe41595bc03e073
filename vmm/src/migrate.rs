//! Moving a machine's guest to another process or host: the ports of `ferry-migration`, implemented
//! over a [`Machine`].
//!
//! The source side is [`migrate`]; the destination side is a [`Receiver`].
//!
//! ```no_run
//! use std::sync::Arc;
//! use std::time::Duration;
//!
//! use ferry_migration::options::Options;
//! use ferry_vmm::machine::Machine;
//! use ferry_vmm::migrate::{Arrival, Handle, Receiver, Uri, migrate};
//!
//! # type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;
//! fn at_the_source(machine: &Arc<Machine>) -> Result<()> {
//!     let to: Uri = "tcp:192.0.2.7:7000".parse()?;
//!     let report = migrate(machine, &to, &Options::default(), &Handle::new(), &mut |_| {});
//!     println!("{:?}: {:.1} ms of downtime", report.status, report.downtime_ms);
//!     Ok(())
//! }
//!
//! fn at_the_destination() -> Result<()> {
//!     let console = || Ok(Box::new(std::io::stdout()) as _);
//!     let receiver = Receiver::bind(&"tcp:192.0.2.7:7000".parse()?, Arc::new(console))?;
//!     while let Some(arrival) = receiver.wait(Duration::from_secs(600)) {
//!         if let Arrival::Arrived { machine, .. } = arrival {
//!             println!("{:?}", machine.wait());
//!         }
//!     }
//!     Ok(())
//! }
//! ```

mod arrival;
mod copied;
mod disks;
mod fd_passing;
mod gate;

pub(crate) mod guest;
pub(crate) mod host;
mod link;
mod listener;
mod newcomers;
mod peer;
mod probe;
mod receive;
pub(crate) mod sink;
mod uri;

pub(crate) use arrival::Awaited;
pub use arrival::{Arrival, Following, GuestInDoubt, Incoming, Owner};
pub use gate::{Gate, Network, NetworkError};
pub use link::StreamLink;
pub use listener::{Listener, ReceiveError};
pub use peer::Peer;
pub use probe::measure;
pub use receive::{ReceiveState, Receiver, SerialFactory};
pub use uri::{Uri, UriError, absolute_uri};

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ferry_devices::sync::lock;
use ferry_devices::thread;
pub(crate) use ferry_migration::net::{MonotonicClock, session_id};
use ferry_migration::options::{Options, Tracking};
use ferry_migration::report::{Event, Progress, Report, Status};
use ferry_migration::source::{self, AbortTold, Owner as GuestOwner, Ownership, Setup};
use ferry_migration::steering::{Change, Steering, SteeringError};
use ferry_migration::wire::SessionId;

use crate::machine::{Machine, RunState};
use crate::memory::{UserfaultError, available_memory};
use guest::{CommittedMachine, MachineGuest};
use link::Dial;

/// Shared with the thread that migrates, for progress and cancelling.
#[derive(Clone, Debug, Default)]
pub struct Handle {
    inner: Arc<HandleInner>,
}

#[derive(Debug)]
struct HandleInner {
    session: SessionId,
    owner: Ownership,
    steering: Steering,
    progress: Mutex<Progress>,
}

impl Default for HandleInner {
    fn default() -> Self {
        Self::of(Ownership::default())
    }
}

impl HandleInner {
    fn of(owner: Ownership) -> Self {
        Self {
            session: session_id(),
            owner,
            steering: Steering::default(),
            progress: Mutex::default(),
        }
    }
}

impl Handle {
    /// For a migration that has not begun.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// For the recovery of a migration whose guest was committed.
    #[must_use]
    pub fn in_doubt() -> Self {
        Self {
            inner: Arc::new(HandleInner::of(Ownership::in_doubt())),
        }
    }

    /// Asks the migration to end; `false` when the guest was committed already.
    pub fn cancel(&self) -> bool {
        self.inner.owner.cancel()
    }

    /// Changes what the options of the running migration say.
    ///
    /// # Errors
    /// Why nothing is changed.
    pub fn steer(&self, change: &Change) -> Result<(), SteeringError> {
        self.inner.steering.change(change)
    }

    /// The session that both sides will know the migration by.
    #[must_use]
    pub fn session(&self) -> String {
        self.inner.session.to_string()
    }

    /// Where it stands.
    #[must_use]
    pub fn progress(&self) -> Progress {
        lock(&self.inner.progress).clone()
    }

    /// Who owns the guest: the record that decides. It lives in this process, like the guest's
    /// memory: neither survives without the other.
    #[must_use]
    pub fn owner(&self) -> GuestOwner {
        self.inner.owner.owner()
    }

    fn is_cancelled(&self) -> bool {
        self.inner.owner.is_cancelled()
    }
}

/// Moves the machine's guest to `peer`, such as a [`Uri`] in clear; blocks until the end.
///
/// The guest runs on here as before unless the report's status is `Completed` (it runs at the
/// destination, and must never run here again) or `InDoubt` (it runs nowhere; see [`recover`]).
pub fn migrate(
    machine: &Arc<Machine>,
    peer: impl Into<Peer>,
    options: &Options,
    handle: &Handle,
    events: &mut dyn FnMut(Event),
) -> Report {
    let session = handle.inner.session;
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
        (&peer.into(), options, session),
        handle,
        events,
        |guest, setup| source::migrate(guest, setup),
    )
}

/// Runs one of the source engine's operations over a machine.
fn engine(
    machine: &Arc<Machine>,
    (peer, options, session): (&Peer, &Options, SessionId),
    handle: &Handle,
    events: &mut dyn FnMut(Event),
    operation: impl FnOnce(&MachineGuest<'_>, Setup<'_, StreamLink>) -> Report,
) -> Report {
    let mut dial = Dial::new(peer.clone(), Some(handle.clone()));
    let guest = MachineGuest::new(machine);
    let clock = MonotonicClock::new();
    let mut forward = |event: Event| {
        if let Event::Progress(progress) = &event {
            lock(&handle.inner.progress).clone_from(progress);
        }
        events(event);
    };
    let setup = Setup {
        connect: &mut |role, index| dial.connect(role, index),
        clock: &clock,
        options,
        session,
        owner: &handle.inner.owner,
        steering: &handle.inner.steering,
        events: &mut forward,
        timeouts: source::Timeouts::default(),
        threads: true,
    };
    let run = AssertUnwindSafe(|| operation(&guest, setup));
    // A defect in the engine loses no guest and runs none twice: what it held of the guest was
    // dropped.
    let report = catch_unwind(run).unwrap_or_else(|_| {
        Report::broken(
            &handle.progress(),
            handle.owner(),
            "the migration engine failed inside; the VMM's output says where",
        )
    });
    if let Some(reason) = report.abort_untold.clone() {
        keep_telling(peer.clone(), session, options.clone(), reason);
    }
    report
}

/// The pause between two attempts to tell a destination that the source keeps the guest.
const TELL_AGAIN: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(60)];

/// Says ABORT until the destination answers: it may keep a guest in doubt. The guest runs here
/// meanwhile.
fn keep_telling(peer: Peer, session: SessionId, options: Options, reason: String) {
    let tell = move || {
        let mut pause = TELL_AGAIN[0];
        let clock = MonotonicClock::new();
        let (owner, steering) = (Ownership::default(), Steering::default());
        loop {
            std::thread::sleep(pause);
            pause = (pause * 2).min(TELL_AGAIN[1]);
            let mut dial = Dial::new(peer.clone(), None);
            let mut setup = Setup {
                connect: &mut |role, index| dial.connect(role, index),
                clock: &clock,
                options: &options,
                session,
                owner: &owner,
                steering: &steering,
                events: &mut |_| {},
                timeouts: source::Timeouts::default(),
                threads: true,
            };
            if source::tell_abort(&mut setup, &reason) == AbortTold::Answered {
                tracing::info!(%session, to = %peer.uri(), "the destination knows that the guest stays here");
                return Ok(());
            }
        }
    };
    let failed = |why| tracing::error!("{why}");
    if let Err(error) = thread::spawn(thread::Kind::Migration, "ferry-abort", tell, failed) {
        tracing::warn!(%error, "the destination is not told again that the guest stays here");
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

/// Whether this host has the memory that copies of sent pages may come to take: found out now, and
/// not by the OOM killer in the middle of a migration. The cache is never larger than the guest.
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

/// For a guest that is in doubt or was interrupted after [`migrate`]: says the commit again to the
/// receiver at `peer`, and sends the pages that are missing there. The destination runs the guest
/// if it does not do so yet. Blocks until it has all of it.
///
/// The report's status is `Completed`; `Failed` when the destination did not start the guest, which
/// runs here again; or it says that nothing is better than before, and why. `handle` is one [in
/// doubt](Handle::in_doubt).
pub fn recover(
    machine: &Arc<Machine>,
    peer: impl Into<Peer>,
    session: &str,
    options: &Options,
    handle: &Handle,
    events: &mut dyn FnMut(Event),
) -> Report {
    let Some(session) = parse_session(session) else {
        return Report::broken(
            &handle.progress(),
            GuestOwner::InDoubt,
            &format!("'{session}' is no migration's session"),
        );
    };
    let Some(committed) = CommittedMachine::of(machine) else {
        let (owner, why) = match machine.run_state() {
            RunState::Committed => (
                GuestOwner::InDoubt,
                "the destination is being asked about the guest already: wait for the answer",
            ),
            _ => (
                GuestOwner::Source,
                "there is nothing to recover: the guest was not handed over",
            ),
        };
        return Report::broken(&handle.progress(), owner, why);
    };
    engine(
        machine,
        (&peer.into(), options, session),
        handle,
        events,
        |guest, setup| source::recover(guest, Box::new(committed), setup),
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
        // Never larger than the guest; and without differences there is none.
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
