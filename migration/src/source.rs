//! The source engine.
//!
//! ```text
//!              HELLO-ACK      policy: stop, drained    pause         READY, written down    RUNNING
//!  Connecting ─(disks)──▶ Live ───────────▶ Stopping ──────▶ Stopped ───────────▶ CommitSent ────────▶ Confirmed ─▶ Moved
//!      │                   │                   │               │                    │    │                ▲
//!      │   any failure, cancel, the policy     │   resumes     │        NOT STARTED │    │ no answer      │
//!      └──────────┬────────┴───────────────────┴───────────────┘◀───────────────────┘    ▼                │
//!                 ▼                                                     InDoubt ── COMMIT again, recover ─┘
//!              the guest runs here
//! ```
//!
//! Every box is a type, in the file of its phase, that consumes itself and owns what it needs: the
//! started log, the [`Paused`](crate::port::Paused) guest, the
//! [`Committed`] guest. What it drops on an error is undone: up to and
//! including Stopped, every failure leaves the guest running at the source. From CommitSent on the
//! source never runs the guest by itself; [`Ownership`] says so to everybody else.
//!
//! Disks that move with the guest (`source/blocks.rs`) are sent before memory is logged. Where the
//! destination takes the guest's memory itself (`Features::SHARED_MEMORY`), Connecting goes on with
//! Stopping at once.
//!
//! In post-copy the guest is handed over before its pages, and Confirmed goes on with
//!
//! ```text
//!             RUNNING             ARRIVED
//!  CommitSent ───────▶ Confirmed ──────────▶ Moved
//!                        │   ▲
//!        connection lost ▼   │ recover: the pages that the destination lists as missing
//!                     Interrupted
//! ```

mod abort;
mod acks;
mod blocks;
mod coder;
mod commit;
mod data_channels;
mod dirty_log;
mod disk_rounds;
mod engine;
mod error;
mod finish;
mod flush;
mod freeing;
mod handshake;
mod hashes;
mod helm;
mod live;
mod owner;
// Here, as `owner.rs` is compiled with other atomics too.
#[cfg(test)]
#[path = "source/owner/tests.rs"]
mod owner_tests;
mod page_server;
mod parts;
mod phases;
mod post_copy;
mod push;
mod record;
mod round;
mod session;
mod setup;
mod stop;
mod throttle;
mod window;

pub use abort::{AbortTold, tell_abort};
pub use error::SourceError;
pub use owner::{Owner, Ownership};
pub use setup::{Setup, Timeouts};

use crate::model::policy_of;
use crate::policy::Policy;
use crate::port::{Committed, Link, SourceVm};
use crate::report::{Phase, Report, Status};
use crate::wire::Role;
use commit::CommitSent;
use engine::Source;
use handshake::{Agreed, Connecting};
use phases::{End, Moved};

/// Moves a guest by the policy that the options name; see [`migrate_with`].
pub fn migrate<L: Link, G: SourceVm<L>>(guest: &G, setup: Setup<'_, L>) -> Report {
    let mut policy = policy_of(setup.options);
    migrate_with(guest, setup, policy.as_mut())
}

/// Moves a guest by a policy of the caller's; blocks until the end. The guest runs on here unless
/// the report's status is `Completed` or `Interrupted` (it runs at the destination) or `InDoubt`
/// (it runs nowhere).
///
/// Of the options the engine itself uses all but
/// [`Options::policy`](crate::options::Options::policy) and what only a policy reads.
/// A user who [steers](crate::steering) to another policy gets the one that the options name.
/// Post-copy ([`Decision::HandOver`](crate::policy::Decision::HandOver)) must be agreed on in the
/// handshake: it is where [`Options::may_post_copy`](crate::options::Options::may_post_copy) holds.
///
/// ```
/// use ferry_migration::net::{self, MonotonicClock};
/// use ferry_migration::policy::{Decision, Policy, View};
/// use ferry_migration::source::{Ownership, Setup, Timeouts, migrate_with};
/// use ferry_migration::testing::{MemoryLink, TestDestination, TestSource};
/// use ferry_migration::{destination, options::Options, report::Status, steering::Steering};
///
/// /// Sends nothing while the guest runs: all of it goes out in the pause.
/// struct StopAtOnce;
///
/// impl Policy for StopAtOnce {
///     fn name(&self) -> &'static str {
///         "stop-at-once"
///     }
///
///     fn next(&mut self, view: &View<'_>) -> Decision {
///         let why = format!("{} pages are sent in the pause", view.pending_pages);
///         Decision::Stop { why }
///     }
/// }
///
/// // A guest of 64 pages, and a destination behind a link in memory.
/// let (guest, there) = (TestSource::new(64), TestDestination::new(64));
/// let (ours, theirs) = MemoryLink::pair();
/// let vm = there.clone();
/// let receiver = std::thread::spawn(move || {
///     let mut links = Some(theirs);
///     let accept = |_| Ok(links.take());
///     net::receive(accept, vm, destination::Timeouts::default()).is_ok()
/// });
///
/// let mut links = Some(ours);
/// let setup = Setup {
///     connect: &mut |_, _| links.take().ok_or_else(|| std::io::Error::other("one channel only")),
///     clock: &MonotonicClock::new(),
///     options: &Options::default(),
///     session: net::session_id(),
///     owner: &Ownership::default(),
///     steering: &Steering::default(),
///     events: &mut |event| println!("{event:?}"),
///     timeouts: Timeouts::default(),
///     threads: true,
/// };
/// let report = migrate_with(&guest, setup, &mut StopAtOnce);
/// assert_eq!(report.status, Status::Completed, "{:?}", report.error);
/// assert_eq!(report.policy, "stop-at-once");
/// assert!(receiver.join().unwrap() && there.runs() && !guest.runs());
/// ```
pub fn migrate_with<L: Link, G: SourceVm<L>>(
    guest: &G,
    setup: Setup<'_, L>,
    policy: &mut dyn Policy,
) -> Report {
    let name = policy.name();
    let session = setup.session.to_string();
    let refused = |error: SourceError| {
        let (status, why) = (error.status(), error.to_string());
        Report::bare(session.clone(), name.to_owned(), status, why)
    };
    if let Err(error) = setup.options.check() {
        return refused(error.into());
    }
    match Source::connect(guest, setup, Role::Control, name) {
        Ok(mut source) => {
            let end = source.run(policy);
            let end = source.resolve(end);
            source.finish(end)
        }
        Err(error) => refused(error),
    }
}

/// For a source that is in doubt or was interrupted: says the commit again on a new connection, and
/// sends the missing pages. The destination runs the guest if it does not run it yet.
/// Blocks until the destination has everything. `committed` is what is left of the guest here.
///
/// The report's status is `Completed`; `Failed` when the destination says that it did not start the
/// guest, which runs here again; `InDoubt` when the destination cannot be reached, belongs to
/// another migration or no longer has the guest; `Interrupted` when it runs the guest and the
/// connection was lost again. Its numbers are those of this connection.
pub fn recover<'g, L: Link, G: SourceVm<L>>(
    guest: &'g G,
    committed: Committed<'g>,
    setup: Setup<'_, L>,
) -> Report {
    let name = setup.options.policy.name();
    let session = setup.session.to_string();
    match Source::connect(guest, setup, Role::Recover, name) {
        Ok(mut source) => {
            source.memory.pending.clear();
            source.record.progress.phase = Phase::Committed;
            let asked = CommitSent {
                source: &mut source,
                committed,
            }
            .ask();
            source.finish(asked)
        }
        Err(error) => Report {
            retry_commit: error.may_retry(),
            ..Report::bare(session, name.to_owned(), Status::InDoubt, error.to_string())
        },
    }
}

impl<'g, L: Link, G: SourceVm<L>> Source<'_, 'g, L, G> {
    fn run(&mut self, policy: &mut dyn Policy) -> Result<Moved<'g>, End<'g>> {
        let stopping = match (Connecting { source: self }).shake_hands()? {
            Agreed::Send(live) => live.run(policy)?,
            Agreed::Share(stopping) => stopping,
        };
        stopping.move_guest()
    }
}
