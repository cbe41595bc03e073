//! `GET /v1/migrations`: the migrations of this VMM, kept after they have ended.

use super::unix_ms;
use ferry_migration::report::{self, Faults, Progress, Report};
use serde::{Deserialize, Serialize};

/// The answer to `GET /v1/migrations`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Migrations {
    /// The newest last; the oldest are dropped beyond [`Migrations::KEPT`].
    pub migrations: Vec<MigrationRecord>,
}

impl Migrations {
    /// How many are kept.
    pub const KEPT: usize = 16;
}

/// The answer to `GET /v1/migrations/ID`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MigrationRecord {
    /// Version of this object; grows when a field is added.
    pub schema: u32,
    /// The session that both sides know it by.
    pub id: String,
    /// Seen from this VMM.
    pub direction: Direction,
    /// Where it goes; `null` for one that arrives.
    pub to: Option<String>,
    /// The policy's name; empty while an arriving one has not said it.
    pub policy: String,
    /// How it stands.
    pub status: RecordStatus,
    /// When it began, in milliseconds since 1970 (UTC).
    pub begun_unix_ms: u64,
    /// When it ended; `null` while it is under way.
    pub ended_unix_ms: Option<u64>,
    /// How far it is; `null` once it has ended, and where it arrives.
    pub progress: Option<Progress>,
    /// The source's report, once it has ended; `null` where it arrives.
    pub report: Option<Report>,
    /// What the destination has seen; `null` at the source.
    pub incoming: Option<IncomingReport>,
}

impl MigrationRecord {
    /// The current value of [`MigrationRecord::schema`].
    pub const SCHEMA: u32 = 1;

    /// A migration that begins now.
    #[must_use]
    pub fn begun(id: String, direction: Direction) -> Self {
        Self {
            schema: Self::SCHEMA,
            id,
            direction,
            to: None,
            policy: String::new(),
            status: RecordStatus::UnderWay,
            begun_unix_ms: unix_ms(),
            ended_unix_ms: None,
            progress: None,
            report: None,
            incoming: None,
        }
    }
}

/// Which way a migration goes, seen from a VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// The guest leaves.
    Outgoing,
    /// The guest arrives.
    Incoming,
}

impl Direction {
    /// The name in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Outgoing => "outgoing",
            Self::Incoming => "incoming",
        }
    }
}

/// How a migration stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RecordStatus {
    /// It has not ended. In post-copy the guest may run at the destination already.
    UnderWay,
    /// The guest is at the destination, with all of its memory.
    Completed,
    /// The source has its guest.
    Failed,
    /// It was stopped by an operator or a limit; the source has its guest.
    Cancelled,
    /// Neither side runs the guest by itself.
    InDoubt,
    /// The guest runs at the destination; pages that only the source has are missing there.
    Interrupted,
}

impl RecordStatus {
    /// The name in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::UnderWay => "under-way",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::InDoubt => "in-doubt",
            Self::Interrupted => "interrupted",
        }
    }
}

impl From<report::Status> for RecordStatus {
    fn from(status: report::Status) -> Self {
        match status {
            report::Status::Completed => Self::Completed,
            report::Status::Failed => Self::Failed,
            report::Status::Cancelled => Self::Cancelled,
            report::Status::InDoubt => Self::InDoubt,
            report::Status::Interrupted => Self::Interrupted,
        }
    }
}

/// What a destination has seen of a migration. The source's report has the rest.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct IncomingReport {
    /// From the source's first connection until the latest news, in milliseconds.
    pub total_ms: f64,
    /// Bytes received on all of its connections, as they are after decryption.
    pub bytes_received: u64,
    /// Pages that follow the guest and are not here.
    pub missing_pages: u64,
    /// Post-copy's faults here so far.
    pub faults: Faults,
    /// The latest news, in one sentence.
    pub explanation: String,
}
