//! What a receiver tells its owner.

use super::StreamLink;
use super::sink::RamSink;
use crate::machine::Machine;
use ferry_migration::destination::MissingPages;
use ferry_migration::report::Faults;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// Who the guest of a receiver is for. Its methods are called on the thread that receives, and must
/// not wait for anything that the source does: a source is told that its guest has arrived after
/// [`arrival`](Self::arrival) has returned.
///
/// A function that takes arrivals is an owner that wants every guest.
pub trait Owner: Send + Sync {
    /// Whether a guest is still wanted here; asked before the source is told that all is ready.
    ///
    /// # Errors
    /// Why not; a sentence.
    fn wants(&self) -> Result<(), String> {
        Ok(())
    }

    /// The source has committed, or an operator takes over: from now on the guest belongs here,
    /// although it does not run yet. After an error it never runs here, and the source is told so.
    ///
    /// # Errors
    /// Why it is not wanted any more; a sentence.
    fn claim(&self) -> Result<(), String> {
        Ok(())
    }

    /// What is known of the migration that the next [`arrival`](Self::arrival) is about, just
    /// before that. Not for a connection that is no migration's.
    fn incoming(&self, incoming: &Incoming, arrival: &Arrival) {
        let _ = (incoming, arrival);
    }

    /// What has happened.
    fn arrival(&self, arrival: Arrival);
}

/// What a receiver knows of a migration that arrives.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Incoming {
    /// The session that both sides know it by.
    pub session: String,
    /// The policy that the source has named; empty while it has not.
    pub policy: String,
    /// Since its first connection.
    pub elapsed: Duration,
    /// Bytes received on all of its connections, as they are after decryption.
    pub bytes: u64,
    /// Pages that follow the guest and are not here.
    pub missing_pages: u64,
    /// Post-copy's faults here so far.
    pub faults: Faults,
}

impl<F: Fn(Arrival) + Send + Sync> Owner for F {
    fn arrival(&self, arrival: Arrival) {
        self(arrival);
    }
}

/// What a receiver tells its owner.
#[derive(Debug)]
#[non_exhaustive]
pub enum Arrival {
    /// A connection was no migration's; nothing has changed. A sentence.
    Refused(String),
    /// A migration failed or was cancelled; the source has its guest; waiting for the next. A
    /// sentence.
    Failed(String),
    /// The guest is complete here and does not run: the source has fallen silent before its commit
    /// was read. The source's word, whenever it comes, or an operator's ends that.
    InDoubt {
        /// A sentence.
        why: String,
        /// For the operator.
        guest: GuestInDoubt,
    },
    /// The guest is here, and runs if it ran at the source; which does not know yet.
    Arrived {
        /// The guest's machine.
        machine: Arc<Machine>,
        /// In post-copy: its pages follow.
        following: Option<Following>,
    },
    /// Every page that was to follow is here.
    Complete,
    /// The connection to the source was lost while pages follow. A sentence. The source's `recover`
    /// mends it.
    Interrupted(String),
    /// No connection is accepted any more. A sentence.
    Unreachable(String),
}

/// What keeps a guest in doubt.
pub(super) trait KeepsGuest: Send + Sync {
    /// As [`Receiver::take_over`](super::Receiver::take_over).
    fn take_over(self: Arc<Self>, force: bool) -> Result<(), String>;
}

/// A guest that is complete at a receiver and was not handed over.
#[derive(Clone)]
pub struct GuestInDoubt(pub(super) Weak<dyn KeepsGuest>);

impl std::fmt::Debug for GuestInDoubt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("GuestInDoubt")
    }
}

impl GuestInDoubt {
    /// As [`Receiver::take_over`](super::Receiver::take_over).
    ///
    /// # Errors
    /// As there.
    pub fn take_over(&self, force: bool) -> Result<(), String> {
        let receiver = self.0.upgrade();
        receiver
            .ok_or("this receiver has ended; the guest in doubt is gone with it")?
            .take_over(force)
    }
}

/// Where the pages of a guest come from that runs here already.
pub(crate) trait Awaited: Send + Sync {
    /// Pages that are not here yet.
    fn left(&self) -> u64;
    /// How many waits for a page are under way.
    fn waiting(&self) -> usize;
    /// Why nothing comes any more.
    fn lost(&self) -> Option<String>;
    /// The file that they are read from, if it is one.
    fn file(&self) -> Option<&Path> {
        None
    }
    /// The machine has ended.
    fn abandon(&self);
}

/// Pages that follow a guest which runs here already.
#[derive(Clone)]
pub struct Following(Arc<dyn Awaited>);

impl std::fmt::Debug for Following {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Following({} pages)", self.left())
    }
}

impl Following {
    pub(crate) fn new(pages: impl Awaited + 'static) -> Self {
        Self(Arc::new(pages))
    }

    /// Pages that are not here yet.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.0.left()
    }

    /// How many waits for a page are under way.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.0.waiting()
    }

    /// Why nothing comes any more, when the connection to the source is lost.
    #[must_use]
    pub fn lost(&self) -> Option<String> {
        self.0.lost()
    }

    /// The snapshot that they are read from; `None` when a source sends them.
    #[must_use]
    pub fn file(&self) -> Option<&Path> {
        self.0.file()
    }

    /// For a machine that has ended: a thread that waits for a page goes on, with zeros, and the
    /// source is told that nothing more is needed, if it can be at once.
    pub fn abandon(&self) {
        self.0.abandon();
    }
}

/// Pages that a source sends.
pub(super) struct Sent {
    pub pages: Arc<MissingPages<StreamLink, RamSink>>,
    pub sink: Arc<RamSink>,
}

impl Awaited for Sent {
    fn left(&self) -> u64 {
        self.pages.left()
    }

    fn waiting(&self) -> usize {
        self.pages.waiting()
    }

    fn lost(&self) -> Option<String> {
        self.pages.lost()
    }

    fn abandon(&self) {
        const MOMENT: Duration = Duration::from_millis(500);
        self.pages.dismiss();
        self.sink.end_faults();
        let until = Instant::now() + MOMENT;
        // At the end of a guest, once: a condition variable for it would cost each page that comes.
        while !self.pages.is_over() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}
