//! What a receiver tells its owner.

use super::StreamLink;
use super::host::RamSink;
use crate::machine::Machine;
use ferry_migration::destination::Arriving;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What a receiver tells its owner.
#[derive(Debug)]
pub enum Arrival {
    /// A migration failed or was cancelled; the source has its guest; waiting for the next. A sentence.
    Failed(String),
    /// The guest is complete here and does not run: the source has fallen silent before its commit
    /// was read. A sentence. [`Receiver::take_over`] or the source's `recover` ends the doubt.
    InDoubt(String),
    /// The guest is here, and runs if it ran at the source.
    Arrived {
        /// The guest's machine.
        machine: Arc<Machine>,
        /// In post-copy: its pages follow.
        following: Option<Following>,
    },
    /// Every page that was to follow is here.
    Complete,
    /// The connection to the source was lost while pages follow. A sentence. The source's `recover` mends it.
    Interrupted(String),
}

/// Pages that follow a guest which runs here already.
#[derive(Clone)]
pub struct Following {
    pub(super) pages: Arc<Arriving<StreamLink, RamSink>>,
    pub(super) sink: Arc<RamSink>,
}

impl std::fmt::Debug for Following {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Following({} pages)", self.left())
    }
}

impl Following {
    /// Pages that are not here yet.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.pages.left()
    }

    /// How many waits for a page are under way.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.pages.waiting()
    }

    /// Why nothing comes any more, when the connection to the source is lost.
    #[must_use]
    pub fn lost(&self) -> Option<String> {
        self.pages.lost()
    }

    /// For a machine that has ended: whoever waits for a page goes on, with zeros, and the source is told that
    /// nothing more is needed, if it can be at once.
    pub fn abandon(&self) {
        const MOMENT: Duration = Duration::from_millis(500);
        self.pages.dismiss();
        self.sink.end_faults();
        let until = Instant::now() + MOMENT;
        while !self.pages.is_over() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}
