//! `GET /metrics`: what a VMM counts, for Prometheus.
//!
//! Names follow <https://prometheus.io/docs/practices/naming/>: `ferry_`, base units, `_total` for
//! what only grows. A label's values are few and known, except the guest's name.

use super::prometheus::{Histogram, Kind, Page};
use super::types::{Direction, IncomingReport, RecordStatus, StateName, Status, unix_ms};
use ferry_migration::options::PolicyKind;
use ferry_migration::page::PAGE_BYTES;
use ferry_migration::report::{Faults, Pages, Report, Round};
use std::collections::BTreeMap;
use std::fs;

/// In seconds: from what a guest does not notice to what a TCP connection does not survive.
const DOWNTIMES: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
];
/// In seconds, up to an hour.
const DURATIONS: &[f64] = &[
    0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0,
];
/// In seconds: a page over a local link takes some tens of microseconds.
const FAULTS: &[f64] = &[
    0.000_01, 0.000_025, 0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.0025, 0.005, 0.01, 0.025,
    0.05, 0.1, 0.25, 1.0,
];

const STATES: [StateName; 8] = [
    StateName::Receiving,
    StateName::Running,
    StateName::Paused,
    StateName::Migrating,
    StateName::Moved,
    StateName::InDoubt,
    StateName::Interrupted,
    StateName::Ended,
];
const DIRECTIONS: [Direction; 2] = [Direction::Outgoing, Direction::Incoming];

/// What a VMM has counted since it was started.
#[derive(Clone, Debug)]
pub struct Totals {
    migrations: BTreeMap<(Direction, &'static str, RecordStatus), u64>,
    downtime: Histogram,
    duration: BTreeMap<Direction, Histogram>,
    pages: Pages,
    sent_bytes: u64,
    received_bytes: u64,
    faults: Histogram,
}

impl Default for Totals {
    fn default() -> Self {
        let durations = DIRECTIONS.map(|direction| (direction, Histogram::new(DURATIONS)));
        Self {
            migrations: BTreeMap::new(),
            downtime: Histogram::new(DOWNTIMES),
            duration: durations.into(),
            pages: Pages::default(),
            sent_bytes: 0,
            received_bytes: 0,
            faults: Histogram::new(FAULTS),
        }
    }
}

/// A policy's name as a label. One that arrives is another host's word.
fn policy(name: &str) -> &'static str {
    let mut known = PolicyKind::ALL.iter().map(|kind| kind.name());
    known.find(|known| *known == name).unwrap_or("other")
}

/// Bytes that the guest dirtied a second in a round of the live phase.
#[must_use]
pub fn dirty_rate(round: &Round) -> Option<f64> {
    // Far fewer than 2⁵³.
    #[allow(clippy::cast_precision_loss)]
    let bytes = round.dirtied.saturating_mul(PAGE_BYTES) as f64;
    (round.ms > 0.0 && !round.follows).then(|| bytes / round.ms * 1e3)
}

impl Totals {
    /// A migration has left, or was to.
    pub fn left(&mut self, report: &Report) {
        self.ended(Direction::Outgoing, &report.policy, report.status.into());
        self.observe(Direction::Outgoing, report.total_ms);
        if report.status == ferry_migration::report::Status::Completed {
            self.downtime.observe(report.downtime_ms / 1e3);
        }
        self.sent_bytes += report.bytes_wire;
        self.pages.sent += report.pages.sent;
        self.pages.resent += report.pages.resent;
        self.pages.zero += report.pages.zero;
        self.pages.skipped += report.pages.skipped;
        self.faulted(&report.faults);
    }

    /// A migration has arrived, or was to.
    pub fn arrived(&mut self, policy: &str, status: RecordStatus, incoming: &IncomingReport) {
        self.ended(Direction::Incoming, policy, status);
        self.observe(Direction::Incoming, incoming.total_ms);
        self.faulted(&incoming.faults);
    }

    /// So many bytes were received.
    pub fn received(&mut self, bytes: u64) {
        self.received_bytes += bytes;
    }

    fn ended(&mut self, direction: Direction, name: &str, status: RecordStatus) {
        let key = (direction, policy(name), status);
        *self.migrations.entry(key).or_default() += 1;
    }

    fn observe(&mut self, direction: Direction, ms: f64) {
        if let Some(histogram) = self.duration.get_mut(&direction) {
            histogram.observe(ms / 1e3);
        }
    }

    fn faulted(&mut self, faults: &Faults) {
        let mut left = faults.stalled_ms / 1e3;
        for bucket in &faults.histogram {
            self.faults.add(bucket.upto_us / 1e6, bucket.count, left);
            left = 0.0;
        }
    }

    /// The page; `dirty_rate` is that of the running migration's latest round.
    #[must_use]
    pub fn page(&self, status: &Status, dirty_rate: Option<f64>) -> String {
        let mut page = Page::default();
        guest(&mut page, status);
        running(&mut page, status, dirty_rate);
        self.ended_migrations(&mut page);
        process(&mut page, status);
        page.into_text()
    }

    fn ended_migrations(&self, page: &mut Page) {
        page.family(
            "ferry_migrations_total",
            Kind::Counter,
            "Migrations that have ended, by direction, policy and outcome.",
        );
        for ((direction, policy, outcome), count) in &self.migrations {
            let labels = [
                ("direction", direction.name()),
                ("policy", policy),
                ("outcome", outcome.name()),
            ];
            page.sample(&labels, *count);
        }
        page.family(
            "ferry_migration_duration_seconds",
            Kind::Histogram,
            "From a migration's beginning to its end.",
        );
        for (direction, histogram) in &self.duration {
            page.histogram(&[("direction", direction.name())], histogram);
        }
        page.family(
            "ferry_migration_downtime_seconds",
            Kind::Histogram,
            "How long guests stood still that moved away from here.",
        )
        .histogram(&[], &self.downtime);
        page.counter(
            "ferry_migration_sent_bytes_total",
            "Bytes sent by migrations that have ended.",
            self.sent_bytes,
        );
        page.counter(
            "ferry_migration_received_bytes_total",
            "Bytes received by migrations that arrive.",
            self.received_bytes,
        );
        page.family(
            "ferry_migration_pages_total",
            Kind::Counter,
            "Pages of migrations that have ended here as the source, by what happened to them; resent ones are sent too.",
        );
        let pages = &self.pages;
        for (kind, count) in [
            ("sent", pages.sent),
            ("resent", pages.resent),
            ("zero", pages.zero),
            ("skipped", pages.skipped),
        ] {
            page.sample(&[("kind", kind)], count);
        }
        page.family(
            "ferry_postcopy_fault_seconds",
            Kind::Histogram,
            "How long processors waited for a page of a migration that has ended.",
        )
        .histogram(&[], &self.faults);
    }
}

fn guest(page: &mut Page, status: &Status) {
    page.family("ferry_build_info", Kind::Gauge, "Which ferry this is.")
        .sample(&[("version", &status.version)], 1_u64);
    let here = !matches!(
        status.state,
        StateName::Receiving | StateName::Moved | StateName::Ended
    );
    let info = status.guest.as_ref();
    page.gauge(
        "ferry_guests",
        "Guests that are here, running or not.",
        u64::from(here),
    );
    page.family(
        "ferry_guest_state",
        Kind::Gauge,
        "1 for the state that the guest is in.",
    );
    for state in STATES {
        let is = u64::from(state == status.state);
        page.sample(&[("state", state.name())], is);
    }
    let Some(info) = info else {
        return;
    };
    let name = info.name.as_deref().unwrap_or_default();
    page.family("ferry_guest_info", Kind::Gauge, "The guest's name.")
        .sample(&[("name", name)], 1_u64);
    page.gauge(
        "ferry_guest_vcpus",
        "Virtual processors.",
        u64::from(info.cpus),
    );
    page.gauge(
        "ferry_guest_memory_bytes",
        "RAM of the guest.",
        info.memory_bytes,
    );
    if let Some(memory) = &info.memory {
        page.gauge(
            "ferry_guest_memory_resident_bytes",
            "RAM of the guest that the host's memory holds.",
            memory.resident_bytes,
        );
        page.gauge(
            "ferry_guest_memory_huge_bytes",
            "Of that, in pages of 2 MiB.",
            memory.huge_bytes,
        );
    }
    if let Some(balloon) = &status.balloon {
        page.gauge(
            "ferry_guest_balloon_bytes",
            "Memory that the guest has given back.",
            balloon.actual_bytes,
        );
    }
    if let Some(missing) = &status.missing {
        page.gauge(
            "ferry_guest_missing_bytes",
            "RAM that has not arrived of a guest that runs here.",
            missing.pages * PAGE_BYTES,
        );
    }
    page.counter(
        "ferry_guest_serial_lost_bytes_total",
        "Serial output that was dropped because nothing took it.",
        status.serial_output_lost,
    );
    page.counter(
        "ferry_guest_console_lost_bytes_total",
        "Output on the virtio console that was dropped because nothing took it.",
        status.console_output_lost,
    );
}

/// The migration that leaves now.
fn running(page: &mut Page, status: &Status, dirty_rate: Option<f64>) {
    let progress = status.migration.as_ref();
    page.gauge(
        "ferry_migration_running",
        "Whether the guest is being migrated away.",
        u64::from(progress.is_some()),
    );
    let Some(progress) = progress else {
        return;
    };
    page.gauge(
        "ferry_migration_round",
        "The running migration's round.",
        u64::from(progress.round),
    );
    page.gauge(
        "ferry_migration_pending_bytes",
        "RAM that is missing or stale at the destination.",
        progress.pending_pages.saturating_mul(PAGE_BYTES),
    );
    page.gauge(
        "ferry_migration_running_sent_bytes",
        "Bytes that the running migration has sent.",
        progress.bytes_wire,
    );
    page.gauge(
        "ferry_migration_bandwidth_bytes_per_second",
        "Measured bandwidth of the running migration; 0 while unknown.",
        progress.mbps * 1e6,
    );
    if let Some(rate) = dirty_rate {
        page.gauge(
            "ferry_migration_dirty_bytes_per_second",
            "RAM that the guest dirtied in the running migration's latest round.",
            rate,
        );
    }
    if let Some(ms) = progress.predicted_downtime_ms {
        page.gauge(
            "ferry_migration_predicted_downtime_seconds",
            "The pause that a stop right now would cost.",
            ms / 1e3,
        );
    }
}

/// By the names that the ecosystem's client libraries use. What cannot be read is left out.
fn process(page: &mut Page, status: &Status) {
    /// proc_pid_stat(5): `USER_HZ` of x86-64.
    const TICKS: f64 = 100.0;
    let number = |text: &str| text.parse::<u64>().ok();
    let statm = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let mut sizes = statm.split(' ').map(number);
    if let (Some(Some(all)), Some(Some(resident))) = (sizes.next(), sizes.next()) {
        page.gauge(
            "process_virtual_memory_bytes",
            "Virtual memory size in bytes.",
            all * PAGE_BYTES,
        );
        page.gauge(
            "process_resident_memory_bytes",
            "Resident memory size in bytes, the guest's RAM included.",
            resident * PAGE_BYTES,
        );
    }
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The program's name, which may hold anything, is in parentheses.
    let after = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
    let fields: Vec<&str> = after.split(' ').collect();
    let ticks = |at: usize| fields.get(at).copied().and_then(number);
    // The third field is the first here: utime is the 14th, stime the 15th.
    if let (Some(user), Some(system)) = (ticks(11), ticks(12)) {
        // Exact for 2.8 million years.
        #[allow(clippy::cast_precision_loss)]
        let seconds = (user + system) as f64 / TICKS;
        page.counter(
            "process_cpu_seconds_total",
            "Processor time, the guest's included, in seconds.",
            seconds,
        );
    }
    // Exact to 2⁵³ milliseconds.
    #[allow(clippy::cast_precision_loss)]
    let start = unix_ms().saturating_sub(status.uptime_ms) as f64 / 1e3;
    page.gauge(
        "process_start_time_seconds",
        "When the VMM was started, in seconds since 1970.",
        start,
    );
}
