//! The JSON of the control socket. Names are an interface: fields are added, never renamed.

mod balloon;
mod memory;
mod migrations;
mod notices;
mod vm;

pub use balloon::{BalloonRequest, BalloonStatus, BalloonWish, GuestMemory};
pub use memory::{MemoryRequest, MemoryStatus};
pub use migrations::{Direction, IncomingReport, MigrationRecord, Migrations, RecordStatus};
pub use notices::{ArrivalOutcome, Notice, What, unix_ms};
pub use vm::{
    Boot, Configuration, Cpu, DiskConfiguration, MemoryConfiguration, NetworkConfiguration,
    NodeConfiguration, Setup, VsockConfiguration,
};

use crate::memory::GuestRam;
use ferry_migration::options::{Compress, Options};
use ferry_migration::report::{Codecs, Progress, Report};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;

/// Where the guest is, as far as this VMM is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StateName {
    /// No guest yet: waiting for a migration to arrive.
    Receiving,
    /// The guest runs here.
    Running,
    /// The guest is here and stands still.
    Paused,
    /// The guest is here and is being migrated away.
    Migrating,
    /// The guest was migrated away and never runs here again.
    Moved,
    /// The guest was handed over and not confirmed, or is complete here and was not handed over: it
    /// does not run here.
    InDoubt,
    /// The guest runs at the destination; pages that only this side has are missing there.
    Interrupted,
    /// The guest has ended.
    Ended,
}

impl StateName {
    /// The name in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Receiving => "receiving",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Migrating => "migrating",
            Self::Moved => "moved",
            Self::InDoubt => "in-doubt",
            Self::Interrupted => "interrupted",
            Self::Ended => "ended",
        }
    }
}

/// The guest's size and name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestInfo {
    /// The name that `--name` gave, if any.
    pub name: Option<String>,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// Virtual processors.
    pub cpus: u32,
    /// What the RAM is made of; `null` when nothing is known of that.
    #[serde(default)]
    pub memory: Option<MemoryInfo>,
}

/// What a guest's RAM is made of on this host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryInfo {
    /// `thp` (transparent pages of 2 MiB), `4k` or `hugetlb` (2 MiB pages of the host's pool).
    pub backing: String,
    /// Bytes that are there and mapped.
    pub resident_bytes: u64,
    /// Of those, in pages of 2 MiB.
    pub huge_bytes: u64,
    /// Why it is not made of what it could be, in a sentence.
    pub note: Option<String>,
}

impl MemoryInfo {
    /// What is known of this RAM.
    #[must_use]
    pub fn of(ram: &GuestRam) -> Self {
        let resident = ram.resident();
        Self {
            backing: ram.backing().name().into(),
            resident_bytes: resident.bytes,
            huge_bytes: resident.huge_bytes,
            note: ram.note().map(str::to_owned),
        }
    }
}

/// The answer to `GET /v1/status`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Version of this object; grows when a field is added.
    pub schema: u32,
    /// ferry's version.
    pub version: String,
    /// The VMM's process.
    pub pid: u32,
    /// Where the guest is.
    pub state: StateName,
    /// The state in one sentence, with what can be done about it.
    pub explanation: String,
    /// The guest; `null` while none has arrived.
    pub guest: Option<GuestInfo>,
    /// How long this VMM has been up, in milliseconds.
    pub uptime_ms: u64,
    /// The running migration; `null` when none runs.
    pub migration: Option<Progress>,
    /// Where a receiving VMM listens.
    pub listening: Option<String>,
    /// Post-copy, at the destination: what has not arrived of the guest; `null` when it is
    /// complete.
    #[serde(default, alias = "lacks")]
    pub missing: Option<Missing>,
    /// The guest's balloon; `null` when it has none.
    #[serde(default)]
    pub balloon: Option<BalloonStatus>,
    /// Bytes of the guest's serial output that were dropped, because nothing took them in time.
    #[serde(default)]
    pub serial_output_lost: u64,
    /// Where the guest's serial port goes, as `--serial` takes it, with an absolute path; `null`
    /// when the program that embeds the VMM does not say.
    #[serde(default)]
    pub serial: Option<String>,
    /// Bytes of the output on the guest's console that were dropped, because nothing took them in
    /// time.
    #[serde(default)]
    pub console_output_lost: u64,
    /// Where the guest's console goes, as `--console` takes it, with an absolute path; `null` when
    /// nothing was given for one here.
    #[serde(default)]
    pub console: Option<String>,
    /// Where the guest is being migrated to, or was; `null` when it is here alone.
    #[serde(default)]
    pub to: Option<String>,
}

impl Status {
    /// The current value of [`Status::schema`].
    pub const SCHEMA: u32 = 2;
}

/// Pages that have not arrived of a guest that runs already.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Missing {
    /// How many.
    pub pages: u64,
    /// How many waits for one of them are under way.
    pub waiting: u64,
    /// Why none comes any more, when the connection to the source is lost.
    pub lost: Option<String>,
    /// The snapshot that they are read from; `null` when a source sends them.
    #[serde(default)]
    pub file: Option<PathBuf>,
}

/// How the connections of a migration are secured; without either of the two they are in clear.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Security {
    /// By certificates of one authority.
    pub tls: Option<TlsFiles>,
    /// By the line that `ferry receive --pair` has printed.
    pub pair: Option<String>,
}

impl Security {
    /// Whether there is to be any.
    #[must_use]
    pub const fn is_wanted(&self) -> bool {
        self.tls.is_some() || self.pair.is_some()
    }
}

/// Certificates of one authority, in the files that QEMU names so.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// The folder with `ca-cert.pem`, `client-cert.pem` and `client-key.pem`, for the VMM to read.
    pub dir: PathBuf,
    /// The name that the receiver's certificate must carry; `null` is the host of the URI.
    #[serde(default)]
    pub authz: Option<String>,
}

/// The body of `PUT /v1/migrate`.
///
/// Built by functional update, `MigrateRequest { …, ..MigrateRequest::default() }`:
/// a new field has a default and breaks no caller. `#[non_exhaustive]` would forbid just that.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrateRequest {
    /// Where to: `tcp:HOST:PORT` or `unix:PATH`.
    pub uri: String,
    /// How; what is left out has its default.
    #[serde(default)]
    pub options: Options,
    /// Answer at once instead of streaming events; see `GET /v1/migration` for the outcome.
    #[serde(default)]
    pub detach: bool,
    /// Secure every connection by certificates of one authority.
    #[serde(default)]
    pub tls: Option<TlsFiles>,
    /// Secure every connection by the line that `ferry receive --pair` has printed. A secret.
    #[serde(default)]
    pub pair: Option<String>,
}

impl MigrateRequest {
    /// How its connections are secured.
    #[must_use]
    pub fn security(&self) -> Security {
        Security {
            tls: self.tls.clone(),
            pair: self.pair.clone(),
        }
    }
}

/// The answer to `GET /v1/migration`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct MigrationStatus {
    /// Names the running migration, or the last one that ended: for `GET /v1/migrations/ID`.
    #[serde(default)]
    pub id: Option<String>,
    /// The running migration; `null` when none runs.
    pub progress: Option<Progress>,
    /// The last one that ended; `null` when none has.
    pub report: Option<Report>,
}

/// The body of `PUT /v1/recover`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RecoverRequest {
    /// Where the other side listens now, if it moved.
    pub uri: Option<String>,
    /// Other certificates than the migration began with; the rest of its security stays.
    pub tls: Option<TlsFiles>,
    /// Run the guest here, on the operator's word that it does not run on the other side.
    pub take_over: bool,
    /// Take over although nothing tells whether the guest's disks were written since its state was
    /// saved.
    pub force: bool,
}

/// The body of `PUT /v1/record`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RecordRequest {
    /// How long to record, in milliseconds.
    pub duration_ms: u64,
    /// How often the dirty log is looked at, in milliseconds.
    pub interval_ms: u64,
}

impl Default for RecordRequest {
    fn default() -> Self {
        Self {
            duration_ms: 10_000,
            interval_ms: 100,
        }
    }
}

impl RecordRequest {
    /// The longest recording: a day.
    pub const MAX_DURATION_MS: u64 = 24 * 3600 * 1000;
    /// The longest interval. A client that has gone is noticed when a frame is written.
    pub const MAX_INTERVAL_MS: u64 = 60_000;

    /// To record for so long, and look so often.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn new(duration: Duration, interval: Duration) -> Result<Self, String> {
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let request = Self {
            duration_ms: millis(duration),
            interval_ms: millis(interval),
        };
        request.check()?;
        Ok(request)
    }

    /// Checks what a type cannot.
    ///
    /// # Errors
    /// A sentence for the user.
    pub fn check(&self) -> Result<(), String> {
        if !(1..=Self::MAX_INTERVAL_MS).contains(&self.interval_ms) {
            return Err(format!(
                "an interval of {} ms was asked for; give 1 ms to 60 s",
                self.interval_ms
            ));
        }
        if !(self.interval_ms..=Self::MAX_DURATION_MS).contains(&self.duration_ms) {
            return Err(format!(
                "a recording of {} ms was asked for; give at least one interval of {} ms and at most 24 h",
                self.duration_ms, self.interval_ms
            ));
        }
        Ok(())
    }
}

/// What becomes of the guest when its snapshot is complete.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Then {
    /// It goes on as it did before: it runs if it ran.
    #[default]
    Resume,
    /// It stands still.
    Pause,
    /// It is ended: the file is the guest now.
    Stop,
}

/// The body of `PUT /v1/snapshot`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRequest {
    /// The file to make, as the VMM finds it: an absolute path.
    pub path: PathBuf,
    /// How pages are made smaller.
    #[serde(default)]
    pub compress: Compress,
    /// The guest runs while most of its memory is written.
    #[serde(default)]
    pub live: bool,
    /// A file of that name is replaced.
    #[serde(default)]
    pub force: bool,
    /// What becomes of the guest.
    #[serde(default)]
    pub then: Then,
    /// The version of the machine's state in the file, for a ferry that does not read the newest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_version: Option<u32>,
}

/// The answer to `PUT /v1/snapshot`: what was written.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct SnapshotReport {
    /// Version of this object; grows when a field is added.
    pub schema: u32,
    /// The file.
    pub path: PathBuf,
    /// Names the snapshot.
    pub session: String,
    /// From the request until the file was on the disk under its name, in milliseconds.
    pub total_ms: f64,
    /// From the last guest instruction to the next one, in milliseconds; to the end of writing its
    /// memory and state when it was not to run again.
    pub downtime_ms: f64,
    /// Of that, stopping it.
    pub quiesce_ms: f64,
    /// Of that, writing memory.
    pub pages_ms: f64,
    /// Of that, reading its state.
    pub state_ms: f64,
    /// Bytes in the file.
    pub bytes: u64,
    /// Pages of RAM.
    pub pages: u64,
    /// Of those, how many are in the file; the others are zero and take no room.
    pub data_pages: u64,
    /// Pages that were written more than once (live).
    pub superseded: u64,
    /// Passes over memory, the one in the pause included.
    pub rounds: u32,
    /// Pages by coder.
    pub codecs: Codecs,
}

/// Every failure's body.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// One sentence.
    pub error: String,
    /// A name for programs, where the request has such.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
}
