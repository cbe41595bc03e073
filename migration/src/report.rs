//! What is measured: live progress and the final report, as serialisable types.
//!
//! The JSON names are an interface (`ferry migrate --json`): fields are added, never renamed.

mod latency;

pub use crate::data_channels::Channels;
pub use crate::steering::{Change, Steered};
pub use latency::{Bucket, Latencies};

use serde::{Deserialize, Serialize};

/// How a migration ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
// Exhaustive: by it a VMM decides what becomes of the guest, and must decide for every end.
pub enum Status {
    /// The guest runs at the destination.
    Completed,
    /// It did not work; the source's guest runs on.
    Failed,
    /// The user (or a limit) stopped it; the source's guest runs on.
    Cancelled,
    /// The commit was sent and not confirmed: neither side runs the guest by itself.
    InDoubt,
    /// The guest runs at the destination, and pages are missing there that are only here: the
    /// connection was lost in post-copy. Both sides keep everything.
    Interrupted,
}

/// One round: one pass over a set of pages.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// Counts from 1; the stop-and-copy is the last.
    pub n: u32,
    /// Pages sent in it, zero pages included.
    pub pages: u64,
    /// Bytes on the wire, headers included.
    pub bytes: u64,
    /// How long it took until the destination had placed it, in milliseconds.
    pub ms: f64,
    /// Pages that the guest dirtied meanwhile.
    pub dirtied: u64,
    /// Of those, how many in each of at most [`Round::REGIONS`] equal parts of the guest's physical
    /// addresses, the lowest first; holes in its RAM count as never dirtied. Empty for pages that
    /// followed.
    #[serde(default)]
    pub dirtied_regions: Vec<u64>,
    /// Whether these pages followed the guest, which ran at the destination (post-copy).
    #[serde(default)]
    pub follows: bool,
}

impl Round {
    /// Parts of guest memory by which dirtied pages are counted.
    pub const REGIONS: usize = 64;

    /// Adds pages that the guest has dirtied, by parts of its memory.
    pub(crate) fn dirty(&mut self, regions: &[u64]) {
        self.dirtied += regions.iter().sum::<u64>();
        self.dirtied_regions.resize(regions.len(), 0);
        for (mine, more) in self.dirtied_regions.iter_mut().zip(regions) {
            *mine += more;
        }
    }
}

/// Where the downtime went. All in milliseconds; their sum is `downtime_ms`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Downtime {
    /// Stopping the vCPUs and reading the last dirty log.
    pub quiesce_ms: f64,
    /// Sending the last pages.
    pub last_pages_ms: f64,
    /// Hashing and comparing what was written since the guest's memory was compared while it ran
    /// (`--verify`).
    #[serde(default)]
    pub verify_ms: f64,
    /// Saving, sending and restoring CPU and device state, up to the destination's "ready".
    pub state_ms: f64,
    /// From "ready" over the commit to the first guest instruction.
    pub start_ms: f64,
}

/// Pages by what happened to them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pages {
    /// Pages of RAM that the guest has.
    pub total: u64,
    /// Sent with their contents, re-sends included.
    pub sent: u64,
    /// Of all of these, how many crossed, or were told of, more than once.
    pub resent: u64,
    /// Found to be zero, and told as such.
    pub zero: u64,
    /// Known to hold nothing without being read (never written, in the balloon, or reported free):
    /// told in runs.
    pub skipped: u64,
}

/// Disks whose contents moved with the guest. Bytes are counted in whole blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Disk {
    /// How many disks.
    pub disks: u64,
    /// Their size in bytes.
    pub total: u64,
    /// Sent with their contents, re-sends included.
    pub sent: u64,
    /// Announced as zero, holes among them.
    pub zero: u64,
    /// Of those two, what crossed more than once.
    pub resent: u64,
    /// Of those two, what crossed in the pause.
    pub in_pause: u64,
    /// What that came to on the wire, headers included.
    pub bytes_wire: u64,
    /// Passes over what was written; the first is over all.
    pub rounds: u32,
    /// From the first block until the destination had all but what was written meanwhile, in
    /// milliseconds; memory began to move after that.
    pub ms: f64,
}

/// What one coder did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Coder {
    /// Pages that went through it.
    pub pages: u64,
    /// Bytes that they came to on the wire, headers and tables not counted.
    pub bytes_wire: u64,
    /// Bytes that this saved.
    pub bytes_saved: u64,
}

impl Coder {
    pub(crate) const fn add(&mut self, pages: u64, bytes: u64, wire: u64) {
        self.pages += pages;
        self.bytes_wire += wire;
        self.bytes_saved += bytes.saturating_sub(wire);
    }

    const fn join(&mut self, other: &Self) {
        self.pages += other.pages;
        self.bytes_wire += other.bytes_wire;
        self.bytes_saved += other.bytes_saved;
    }
}

/// Pages by the coder that they went through; what is in none of them went out as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Codecs {
    /// Compressed.
    pub zstd: Coder,
    /// Sent as the difference to what the destination had.
    pub delta: Coder,
    /// Mostly zeros, which were left out.
    pub sparse: Coder,
    /// Sent as they are, but from a copy, so that they can be the base of a difference later.
    pub copied: Coder,
    /// Processor time spent on all of that at the source, summed over the channels, in
    /// milliseconds.
    pub encode_ms: f64,
}

impl Codecs {
    /// Whether no page went through a coder.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.zstd.pages + self.delta.pages + self.sparse.pages + self.copied.pages == 0
    }

    pub(crate) const fn join(&mut self, other: &Self) {
        self.zstd.join(&other.zstd);
        self.delta.join(&other.delta);
        self.sparse.join(&other.sparse);
        self.copied.join(&other.copied);
        self.encode_ms += other.encode_ms;
    }
}

/// Post-copy's page faults.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Faults {
    /// Faults that crossed the network.
    pub count: u64,
    /// Median latency in microseconds.
    pub p50_us: f64,
    /// 99th percentile in microseconds.
    pub p99_us: f64,
    /// The worst in microseconds.
    pub max_us: f64,
    /// Sum over the vCPUs of the time they waited, in milliseconds.
    pub stalled_ms: f64,
    /// Faults whose page had left already when they were received.
    #[serde(default)]
    pub on_their_way: u64,
    /// Their latencies, for a distribution: the buckets that are not empty.
    #[serde(default)]
    pub histogram: Vec<Bucket>,
}

/// How a guest was slowed, so that its migration would converge.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Slowed {
    /// When that began, since the request, in milliseconds.
    pub from_ms: f64,
    /// For how long, in milliseconds.
    pub ms: f64,
    /// Its virtual processors, in order.
    pub vcpus: Vec<SlowedVcpu>,
}

/// How a virtual processor was slowed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SlowedVcpu {
    /// The largest share of its time that it was to rest, in per cent.
    pub most_percent: f64,
    /// How long it rested, in milliseconds.
    pub rested_ms: f64,
}

/// Memory that the source gave back to its host while the rest followed the guest
/// ([`Options::free_source`](crate::options::Options::free_source)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Freed {
    /// Bytes that were given back before the end.
    pub bytes: u64,
    /// The most bytes that both hosts held at a time, or may have held: what the destination has
    /// not said to have counts as well.
    pub twice_bytes: u64,
}

/// What a migration did: the object that `ferry migrate --json` prints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Version of this object; grows when a field is added.
    pub schema: u32,
    /// The session that both sides logged.
    pub session: String,
    /// The policy's name.
    pub policy: String,
    /// How it ended.
    pub status: Status,
    /// Why it did not complete, in one sentence.
    pub error: Option<String>,
    /// From the request until the source may be discarded, in milliseconds.
    pub total_ms: f64,
    /// From the last guest instruction at the source to the first at the destination, in
    /// milliseconds. When the guest resumed at the source instead: how long it stood still.
    pub downtime_ms: f64,
    /// Where it went.
    pub downtime: Downtime,
    /// The rounds, the stop-and-copy last.
    pub rounds: Vec<Round>,
    /// Rounds in the middle of a very long migration that `rounds` leaves out.
    pub rounds_omitted: u64,
    /// Pages by fate.
    pub pages: Pages,
    /// Pages by coder.
    #[serde(default)]
    pub codecs: Codecs,
    /// The connections that pages went out on.
    #[serde(default)]
    pub channels: Channels,
    /// Disks that moved with the guest; `null` where that was not asked for.
    #[serde(default)]
    pub disk: Option<Disk>,
    /// All bytes that the source wrote to its channels.
    pub bytes_wire: u64,
    /// `bytes_wire` over `total_ms`, in 10⁶ bytes per second.
    pub mbps: f64,
    /// Post-copy's faults, as the destination measured them; zero for the pre-copy family.
    pub faults: Faults,
    /// Whether memory was compared and equal; `null` when it was not compared.
    pub verified: Option<bool>,
    /// Why the live phase ended, or why `auto` chose as it did, in one sentence.
    pub why: Option<String>,
    /// What the user changed while it ran, the newest last.
    #[serde(default)]
    pub steered: Vec<Steered>,
    /// How the guest was slowed; `null` where it was not.
    #[serde(default)]
    pub slowed: Option<Slowed>,
    /// What the source gave back of the guest's memory while that followed; `null` where it was not
    /// asked to.
    #[serde(default)]
    pub freed: Option<Freed>,
    /// The guest ended at the source during its migration, so nothing runs on anywhere.
    #[serde(default)]
    pub guest_ended: bool,
    /// The commit is unanswered and is to be repeated: for the VMM, not for the user.
    #[serde(skip)]
    pub retry_commit: bool,
    /// The reason of an ABORT that a destination, which may be in doubt, could not be told: for the
    /// VMM to repeat.
    #[serde(skip)]
    pub abort_untold: Option<String>,
}

impl Report {
    /// The current value of [`Report::schema`].
    pub const SCHEMA: u32 = 1;

    /// The report of a migration that sent nothing, or of which nothing more is known than how it
    /// ended.
    #[must_use]
    pub fn bare(session: String, policy: String, status: Status, error: String) -> Self {
        Self {
            schema: Self::SCHEMA,
            session,
            policy,
            status,
            error: Some(error),
            total_ms: 0.0,
            downtime_ms: 0.0,
            downtime: Downtime::default(),
            rounds: Vec::new(),
            rounds_omitted: 0,
            pages: Pages::default(),
            codecs: Codecs::default(),
            channels: Channels::default(),
            disk: None,
            bytes_wire: 0,
            mbps: 0.0,
            faults: Faults::default(),
            verified: None,
            why: None,
            steered: Vec::new(),
            slowed: None,
            freed: None,
            guest_ended: false,
            retry_commit: false,
            abort_untold: None,
        }
    }
}

/// Where a migration stands, at the source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
// Exhaustive: a display has words for each, and the compiler names the one that it has not.
pub enum Phase {
    /// Connecting and shaking hands.
    #[default]
    Connecting,
    /// The guest runs and its disks are being sent.
    Disks,
    /// The guest runs and its memory is being sent.
    Live,
    /// The guest runs; waiting until the link is empty, before the pause.
    Draining,
    /// The guest stands still.
    Stopped,
    /// The commit was written down and sent.
    Committed,
    /// The guest runs at the destination; its pages follow (post-copy).
    PostCopy,
    /// The destination confirmed.
    Completed,
    /// It failed or was cancelled; the guest runs at the source.
    Aborted,
    /// Committed, and not answered.
    InDoubt,
    /// The guest runs at the destination, and pages are missing there that are only here.
    Interrupted,
}

/// A snapshot of a running migration.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Where it stands.
    pub phase: Phase,
    /// The session.
    pub session: String,
    /// The policy's name.
    pub policy: String,
    /// The current round, from 1.
    pub round: u32,
    /// Since the request, in milliseconds.
    pub elapsed_ms: f64,
    /// Pages of RAM.
    pub pages_total: u64,
    /// Pages of this round.
    pub round_pages: u64,
    /// Of those, sent already.
    pub round_sent: u64,
    /// Pages that are missing or stale at the destination, as last known.
    pub pending_pages: u64,
    /// Bytes of disks that move with the guest; `null` where none does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_total: Option<u64>,
    /// Bytes of disks that are missing or stale at the destination, as last known; `null` where no
    /// disk moves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_pending: Option<u64>,
    /// Pages found dirty in the last collection.
    pub dirtied_pages: u64,
    /// Bytes written to the channels so far.
    pub bytes_wire: u64,
    /// Measured bandwidth in 10⁶ bytes per second; 0 while unknown.
    pub mbps: f64,
    /// The pause that a stop right now would cost, in milliseconds; `null` while unknown.
    pub predicted_downtime_ms: Option<f64>,
}

/// One line of a migration's event stream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Event {
    /// Several times a second while it moves.
    Progress(Progress),
    /// The destination has placed a whole round.
    Round(Round),
    /// The policy has chosen how the guest is moved, or has changed its mind.
    Choice {
        /// Its sentence.
        why: String,
    },
    /// The user has changed something, which holds from now on.
    Steered(Steered),
    /// The end; nothing follows.
    Report(Box<Report>),
}
