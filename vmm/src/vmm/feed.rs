//! `GET /v1/events`: the VMM's listeners.
//!
//! Its lock is taken under that of the VMM's state, held while an event is put into at most
//! [`LISTENERS`] queues, and no other is taken under it but theirs.

use super::state::State;
use crate::api::Refusal;
use crate::api::events::{Publisher, Subscription};
use crate::api::types::{Notice, What};
use ferry_devices::sync::lock;
use ferry_migration::report::Event;
use std::sync::Mutex;

/// Half of the control socket's connections: listeners keep no other client out.
pub(super) const LISTENERS: usize = 32;

#[derive(Debug)]
pub(super) struct Feed {
    /// `None` once nothing more will happen.
    publisher: Mutex<Option<Publisher<Notice>>>,
}

impl Default for Feed {
    fn default() -> Self {
        Self {
            publisher: Mutex::new(Some(Publisher::default())),
        }
    }
}

/// A state as an event.
pub(super) fn state(state: &State, migration: Option<&str>) -> What {
    What::State {
        state: state.name(),
        explanation: state.explanation(),
        to: state.to().map(str::to_owned),
        migration: migration.map(str::to_owned),
    }
}

impl Feed {
    /// Tells the listeners, if there are any.
    pub(super) fn tell(&self, what: impl FnOnce() -> What) {
        if let Some(publisher) = &mut *lock(&self.publisher)
            && publisher.listeners() > 0
        {
            publisher.publish(&Notice::now(what()));
        }
    }

    /// What a migration says of itself.
    pub(super) fn migration(&self, event: &Event) {
        self.tell(|| What::Migration(event.clone()));
    }

    /// Nothing more will happen.
    pub(super) fn end(&self) {
        *lock(&self.publisher) = None;
    }

    /// One more listener: it gets `first`, then every later event.
    pub(super) fn subscribe(&self, first: What) -> Result<Subscription<Notice>, Refusal> {
        let first = Some(Notice::now(first));
        let mut publisher = lock(&self.publisher);
        let Some(publisher) = &mut *publisher else {
            return Ok(Subscription::ended(first));
        };
        if publisher.listeners() >= LISTENERS {
            return Err(Refusal::Coded {
                status: 503,
                code: "too-many-listeners",
                sentence: format!(
                    "{LISTENERS} listen to the events of this VMM already; end one of them, or ask GET /v1/status"
                ),
            });
        }
        Ok(publisher.subscribe_after(first))
    }
}
