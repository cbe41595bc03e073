//! The control socket: HTTP/1.1 and JSON over a Unix socket.
//!
//! `curl --unix-socket S http://localhost/v1/status` works, as users of other VMMs expect.
//!
//! | request | body | answer |
//! |---|---|---|
//! | `GET /v1/status` | | 200, [`types::Status`] |
//! | `PUT /v1/pause`, `/v1/resume`, `/v1/stop`, `/v1/cancel`, `/v1/power-button` | none or `{}` | 204 |
//! | `PUT /v1/migrate` | [`types::MigrateRequest`] | 200, a chunked stream of `application/x-ndjson`: one [`Event`] a line, the report last; with `"detach": true` 202 at once |
//! | `PATCH /v1/migrate` | [`Change`]: what the running migration does from now on | 204 |
//! | `GET /v1/migration` | | 200, [`types::MigrationStatus`]: progress now, and the last report |
//! | `GET /v1/migrations[/ID]` | | 200, [`types::Migrations`] or [`types::MigrationRecord`] |
//! | `GET /v1/vm` | | 200, [`types::Configuration`] |
//! | `GET /v1/events` | | 200, a stream of [`types::Notice`]: NDJSON, or `text/event-stream` |
//! | `GET /metrics` | | 200, [`metrics`] in Prometheus' text format |
//! | `PUT /v1/recover` | [`types::RecoverRequest`] | 204 |
//! | `PUT /v1/record` | [`types::RecordRequest`] | 200, a stream of `application/octet-stream`: a dirty trace ([`ferry_migration::trace`]), as it is recorded |
//! | `GET /v1/balloon` | | 200, [`types::BalloonStatus`] |
//! | `PUT /v1/balloon` | [`types::BalloonRequest`] | 204 |
//! | `GET /v1/memory` | | 200, [`types::MemoryStatus`] |
//! | `PUT /v1/memory` | [`types::MemoryRequest`] | 200, [`types::MemoryStatus`] |
//!
//! Every failure is `{"error": "one sentence"}` with 400, 404, 405, 409 or 500 (and 408, 411, 413,
//! 417, 431, 503 where HTTP asks for them). `HEAD` works wherever `GET` does.
//!
//! Limits: [`http::MAX_HEAD`] bytes of header, [`http::MAX_BODY`] of body, [`server::Limits`] for
//! connections and times. A connection has a thread of its own; nothing here waits for a migration
//! except the stream that reports it, and a stream that is not read loses progress lines, never
//! the report.
//!
//! [`Event`]: ferry_migration::report::Event
//! [`Change`]: ferry_migration::steering::Change

#![forbid(unsafe_code)]

pub mod client;
pub mod events;
pub mod http;
pub mod metrics;
pub mod prometheus;
mod routes;
pub mod scrape;
pub mod server;
#[cfg(test)]
mod tests;
pub mod types;

use events::Subscription;
use ferry_migration::steering::Change;
use types::{
    BalloonRequest, BalloonStatus, Configuration, MemoryRequest, MemoryStatus, MigrateRequest,
    MigrationRecord, MigrationStatus, Migrations, Notice, RecordRequest, RecoverRequest,
    SnapshotReport, SnapshotRequest, Status,
};

/// Why a request was refused. The text is one sentence for the user.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The request cannot be meant (HTTP 400).
    #[error("{0}")]
    Invalid(String),
    /// The guest is in a state that does not allow it (HTTP 409).
    #[error("{0}")]
    Conflict(String),
    /// It was allowed and did not work (HTTP 500).
    #[error("{0}")]
    Failed(String),
    /// As its HTTP status says, with a name for programs beside the sentence.
    #[error("{sentence}")]
    Coded {
        /// The HTTP status.
        status: u16,
        /// The name; an interface.
        code: &'static str,
        /// One sentence.
        sentence: String,
    },
}

/// A stream of bytes that is made while it is read: asking for a piece may block. Dropping it ends
/// what makes it.
pub type Pieces = Box<dyn Iterator<Item = Vec<u8>> + Send>;

/// What the control socket controls. Every method returns at once: a migration runs elsewhere.
pub trait Control: Send + Sync + 'static {
    /// What there is to know about the guest and its VMM.
    fn status(&self) -> Status;

    /// Stops the guest's processors.
    ///
    /// # Errors
    /// [`Refusal`] when there is no guest here to pause.
    fn pause(&self) -> Result<(), Refusal>;

    /// Lets a paused guest run on.
    ///
    /// # Errors
    /// [`Refusal`] when the guest is not paused, or is no longer this VMM's.
    fn resume(&self) -> Result<(), Refusal>;

    /// Ends the guest and the VMM. Always works; a migration before its commit is cancelled first.
    ///
    /// # Errors
    /// [`Refusal`] when the end cannot even be asked for.
    fn stop(&self) -> Result<(), Refusal>;

    /// Presses the power button of the guest's machine.
    ///
    /// # Errors
    /// [`Refusal`] when the guest does not run here.
    fn power_button(&self) -> Result<(), Refusal>;

    /// Cancels the running migration.
    ///
    /// # Errors
    /// [`Refusal`] when none runs.
    fn cancel(&self) -> Result<(), Refusal>;

    /// Begins a migration; its events arrive in the subscription.
    ///
    /// # Errors
    /// [`Refusal`] when it cannot begin. What goes wrong later is in the report.
    fn migrate(&self, request: &MigrateRequest) -> Result<Subscription, Refusal>;

    /// Changes what the running migration does from now on.
    ///
    /// # Errors
    /// [`Refusal`] when none runs, it is too late, or the change cannot be meant.
    fn steer(&self, change: &Change) -> Result<(), Refusal>;

    /// The running migration's progress and the last one's report.
    fn migration(&self) -> MigrationStatus;

    /// The migrations of this VMM that are kept.
    fn migrations(&self) -> Migrations {
        Migrations::default()
    }

    /// One of them; `None` when it is not kept any more, or never was.
    fn migration_record(&self, id: &str) -> Option<MigrationRecord> {
        let mut all = self.migrations().migrations.into_iter();
        all.rfind(|record| record.id == id)
    }

    /// What the guest's machine is made of.
    ///
    /// # Errors
    /// [`Refusal`] when there is none.
    fn configuration(&self) -> Result<Configuration, Refusal>;

    /// What happens from now on; the state comes first.
    ///
    /// # Errors
    /// [`Refusal`] when too many listen.
    fn events(&self) -> Result<Subscription<Notice>, Refusal>;

    /// The page for Prometheus.
    fn metrics(&self) -> String {
        metrics::Totals::default().page(&self.status(), None)
    }

    /// Resolves a migration in doubt.
    ///
    /// # Errors
    /// [`Refusal`] when nothing is in doubt or it cannot be resolved so.
    fn recover(&self, request: &RecoverRequest) -> Result<(), Refusal>;

    /// Begins to record which pages the guest dirties; the pieces are the trace.
    ///
    /// # Errors
    /// [`Refusal`] when it cannot begin.
    fn record(&self, request: &RecordRequest) -> Result<Pieces, Refusal>;

    /// The guest's balloon, and what the guest says of its memory.
    ///
    /// # Errors
    /// [`Refusal`] when there is none.
    fn balloon(&self) -> Result<BalloonStatus, Refusal>;

    /// Sets the balloon's size, or has it moved automatically.
    ///
    /// # Errors
    /// [`Refusal`] when there is none, the guest is not here any more, or the size cannot be.
    fn set_balloon(&self, request: &BalloonRequest) -> Result<(), Refusal>;

    /// How much memory the guest is to have, and has.
    ///
    /// # Errors
    /// [`Refusal`] when it has no balloon.
    fn memory(&self) -> Result<MemoryStatus, Refusal> {
        let balloon = self.balloon()?;
        let guest = self.status().guest.map_or(0, |guest| guest.memory_bytes);
        Ok(MemoryStatus::of(guest, &balloon))
    }

    /// Lets the guest grow or shrink, by its balloon; it follows in its own time.
    ///
    /// # Errors
    /// [`Refusal`] when it has no balloon, is not here any more, or the size cannot be.
    fn set_memory(&self, request: &MemoryRequest) -> Result<MemoryStatus, Refusal> {
        let memory = self.memory()?;
        let balloon = request.balloon(memory.max_bytes);
        self.set_balloon(&balloon.map_err(Refusal::Invalid)?)?;
        self.memory()
    }

    /// Writes the guest to a file; blocks until it is there.
    ///
    /// # Errors
    /// [`Refusal`] when the guest cannot be written; it goes on as before.
    fn snapshot(&self, request: &SnapshotRequest) -> Result<SnapshotReport, Refusal>;
}
