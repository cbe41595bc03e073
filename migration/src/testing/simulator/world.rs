//! The state of the simulated world: memories, pipes, time, who runs, and what goes wrong.

mod destination;
mod transport;
mod writes;

pub(super) use transport::{Connection, Side, weight_of};

use super::disk::Disks;
use super::fault::{ApiCall, Call, FaultKind, PortFault};
use super::{Rng, Scenario};
use crate::page::{Gfn, PageSet, RamLayout, Run};
use crate::port::FreedPages;
use crate::rng::Odds;
use crate::source::Ownership;
use crate::steering::{Change, Steering};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// The machine's state: what must arrive unharmed.
pub(super) const STATE: &[u8] = b"registers and devices of the simulated machine";

/// What a dropped page shows in the simulated memory.
const STALE: u64 = u64::MAX;

#[derive(Debug)]
pub(super) struct World {
    pub now: Duration,
    rng: Rng,
    write_rate: f64,
    /// The share of its time that the guest rests at the source, and how long it has.
    pub slowed: f64,
    pub rested: Duration,
    racing_writes: f64,
    zero_writes: Odds,
    given_back: Odds,
    owed_writes: f64,
    /// The working set, shuffled, and where a walk through it stands (`None`: writes go anywhere).
    hot: Vec<Gfn>,
    walked: Option<usize>,
    bandwidth: f64,
    verified: bool,
    /// What the flush of a block that was written takes.
    flush_time: Duration,
    forgetful: bool,
    pub layout: RamLayout,
    pub source_memory: Vec<u64>,
    /// Pages at the source that hold nothing, as the host knows.
    pub holes: PageSet,
    /// Memory as it was when the guest was last paused: what a destination must run with. (A
    /// source that resumed and later died has moved on; an operator who takes over goes back.)
    pub paused_memory: Vec<u64>,
    /// What the source has given back.
    pub freed: Arc<Mutex<FreedPages>>,
    pub destination_memory: Vec<u64>,
    pub disks: Disks,
    next_version: u64,
    pub log: Option<PageSet>,
    pub source_runs: bool,
    /// Since when the source's guest stands still, and how long it may.
    pub paused_at: Option<Duration>,
    max_pause: Option<Duration>,
    /// What each message takes besides.
    slow: Duration,
    pub destination_runs: bool,
    pub destination_has: bool,
    /// The destination has the state: nothing but what is missing is written there any more.
    pub complete: bool,
    pub committed: bool,
    /// Whether the link carries memory itself, and whether the destination has taken it.
    pub shares: bool,
    pub shared: bool,
    /// A side has run the guest in the shared memory since its state was saved.
    pub ran_since_shared: bool,
    pub source_dead: bool,
    pub destination_dead: bool,
    pub connections: Vec<Connection>,
    pub messages: u64,
    pub faults: Vec<super::Fault>,
    pub port_fault: Option<PortFault>,
    port_calls: [u64; 6],
    /// Post-copy: pages that are missing at the destination, what the guest waits for, and whom
    /// that was told.
    pub missing: Option<PageSet>,
    blocked: Option<Gfn>,
    pub faults_heard: VecDeque<Gfn>,
    pub faults_taken: u64,
    pub owner: Option<Arc<Ownership>>,
    pub steering: Option<Arc<Steering>>,
    /// Changes that a user was told are made.
    pub steered: usize,
    /// A user was told that the migration is cancelled.
    pub cancelled: bool,
    /// Calls that are to come, the next one first.
    calls: VecDeque<Call>,
    /// A user has paused the guest.
    paused_by_user: bool,
    /// How often the destination started the guest.
    pub starts: u32,
    pub violations: Vec<String>,
}

fn index(gfn: Gfn) -> usize {
    usize::try_from(gfn).unwrap_or(usize::MAX)
}

impl World {
    pub fn new(scenario: &Scenario) -> Self {
        let mut rng = Rng::new(scenario.seed ^ 0x5eed);
        let layout = layout_of(scenario);
        let ram: Vec<Gfn> = layout.all().iter().collect();
        let (source_memory, holes, next_version) = memory_of(scenario, &layout, &ram, &mut rng);
        let mut hot = ram;
        for at in 0..hot.len() {
            let other = at + index(rng.below((hot.len() - at) as u64));
            hot.swap(at, other);
        }
        hot.truncate(index(scenario.working_set.max(1)));
        Self {
            now: Duration::ZERO,
            rng,
            write_rate: scenario.write_rate,
            slowed: 0.0,
            rested: Duration::ZERO,
            racing_writes: scenario.racing_writes,
            zero_writes: Odds::new(scenario.zero_writes),
            given_back: Odds::new(scenario.given_back),
            owed_writes: 0.0,
            hot,
            walked: scenario.walk.then_some(0),
            bandwidth: scenario.bandwidth,
            verified: scenario.options.verify,
            flush_time: scenario.flush_time,
            forgetful: scenario.forgetful_log,
            holes,
            layout,
            source_memory,
            paused_memory: Vec::new(),
            freed: Arc::default(),
            destination_memory: Vec::new(),
            disks: Disks::new(scenario.disk_blocks, scenario.forgetful_disk),
            next_version,
            log: None,
            source_runs: true,
            paused_at: None,
            max_pause: scenario.options.max_pause,
            slow: Duration::ZERO,
            destination_runs: false,
            destination_has: false,
            complete: false,
            committed: false,
            shares: scenario.shares,
            shared: false,
            ran_since_shared: false,
            source_dead: false,
            destination_dead: false,
            connections: Vec::new(),
            messages: 0,
            faults: scenario.faults.clone(),
            port_fault: scenario.port_fault,
            port_calls: [0; 6],
            missing: None,
            blocked: None,
            faults_heard: VecDeque::new(),
            faults_taken: 0,
            owner: None,
            steering: None,
            steered: 0,
            cancelled: false,
            calls: scenario.calls.iter().copied().collect(),
            paused_by_user: false,
            starts: 0,
            violations: Vec::new(),
        }
    }

    /// Lets time pass; the guest writes meanwhile.
    pub fn pass(&mut self, time: Duration) {
        self.now += time;
        self.disks.settle();
        while let Some(call) = self.calls.front().filter(|call| call.at <= self.now) {
            let what = call.what;
            self.calls.pop_front();
            self.call(what);
        }
        if !(self.source_runs || self.destination_runs) || self.blocked.is_some() {
            return;
        }
        if self.paused_by_user {
            return;
        }
        let runs = if self.source_runs {
            self.rested += time.mul_f64(self.slowed);
            1.0 - self.slowed
        } else {
            1.0
        };
        self.owed_writes += time.as_secs_f64().min(10.0) * self.write_rate * runs;
        // Rewriting the same pages more often than this changes nothing that a migration can see.
        let writes = self.owed_writes.floor().min(20_000.0);
        self.owed_writes = if self.owed_writes > 20_000.0 {
            0.0
        } else {
            self.owed_writes - writes
        };
        #[expect(clippy::cast_possible_truncation, reason = "at most 20,000")]
        let writes = writes as u64;
        if self.source_runs {
            self.run_at_source(writes);
        } else if self.lacks_what_it_writes() {
            self.run_at_destination(writes);
        } else {
            // These pages are in place: what the guest writes from here on no migration can lose.
            self.pass_over(writes);
        }
    }

    /// A user's call to the source's VMM.
    fn call(&mut self, what: ApiCall) {
        match what {
            _ if self.source_dead => {}
            ApiCall::Cancel => self.cancel(),
            ApiCall::Pause => self.paused_by_user |= self.source_runs,
            // A guest that has left is not the source's to resume.
            ApiCall::Resume if self.committed => {}
            ApiCall::Resume => self.paused_by_user = false,
            ApiCall::Steer(change) => self.steer(&change),
        }
    }

    fn steer(&mut self, change: &Change) {
        let steering = self.steering.as_ref();
        if steering.is_some_and(|steering| steering.change(change).is_ok()) {
            self.steered += 1;
            if self.paused_at.is_some() || self.committed {
                let wrong = format!("'{change}' was accepted in the pause or after the commit");
                self.violations.push(wrong);
            }
        }
    }

    fn cancel(&mut self) {
        if let Some(owner) = &self.owner
            && owner.cancel()
        {
            self.cancelled = true;
            if self.committed {
                self.violations
                    .push("a user was told that a committed migration is cancelled".into());
            }
        }
    }

    /// A fault of a recovery: `at` counts from its first message.
    pub fn expect_fault(&mut self, fault: super::Fault) {
        let at = self.messages + fault.at;
        self.faults.push(super::Fault { at, ..fault });
    }

    /// A read of a page of the running or paused source. Without races the engine knows
    /// beforehand that it is empty.
    pub fn read(&mut self, gfn: Gfn) -> u64 {
        if self.racing_writes == 0.0 && self.holes.contains(gfn) {
            self.violations
                .push(format!("page {gfn} holds nothing and was read"));
        }
        let version = self.source_memory[index(gfn)];
        if version == STALE {
            let wrong = format!("page {gfn} was given back and read");
            self.violations.push(wrong);
        }
        version
    }

    /// The source gives these pages back to its host.
    pub fn free(&mut self, pages: Run) {
        for gfn in pages.first..pages.end() {
            let misses = self.missing.as_ref().is_none_or(|set| set.contains(gfn));
            if misses || !(self.destination_runs || self.destination_dead) {
                let wrong =
                    format!("page {gfn} was given back, and it is missing at the destination");
                self.violations.push(wrong);
            }
            self.source_memory[index(gfn)] = STALE;
        }
    }

    pub fn collect(&mut self, into: &mut PageSet) {
        if let Some(log) = &mut self.log {
            if self.forgetful
                && let Some(gfn) = log.iter().last()
            {
                log.remove(gfn);
            }
            into.union_with(log);
        }
    }

    /// Whether this port call is to fail.
    pub fn port_fails(&mut self, port: PortFault) -> Result<(), crate::port::PortError> {
        let hit = match (self.port_fault, port) {
            (Some(PortFault::Collect(n)), PortFault::Collect(_)) => {
                self.port_calls[0] += 1;
                self.port_calls[0] == n + 1
            }
            (Some(PortFault::Clear(n)), PortFault::Clear(_)) => {
                self.port_calls[1] += 1;
                self.port_calls[1] == n + 1
            }
            (Some(PortFault::Place(n)), PortFault::Place(_)) => {
                self.port_calls[2] += 1;
                self.port_calls[2] == n + 1
            }
            (Some(PortFault::DiskRead(n)), PortFault::DiskRead(_)) => {
                self.port_calls[3] += 1;
                self.port_calls[3] == n + 1
            }
            (Some(PortFault::DiskWrite(n)), PortFault::DiskWrite(_)) => {
                self.port_calls[4] += 1;
                self.port_calls[4] == n + 1
            }
            (Some(PortFault::Flush(n)), PortFault::Flush(_)) => {
                self.port_calls[5] += 1;
                self.port_calls[5] == n + 1
            }
            (Some(fault), port) => fault == port,
            (None, _) => false,
        };
        if hit {
            Err(format!("injected fault: {port:?}").into())
        } else {
            Ok(())
        }
    }

    /// The guest's disk reaches what outlasts a crash: the more was written, the longer that takes.
    pub fn flush(&mut self) {
        let unflushed = self.disks.flush();
        self.pass(Duration::from_micros(100) + self.flush_time * unflushed);
    }

    /// What the operator has seen to before a recovery: the network, and memory at the destination.
    pub fn mend(&mut self) {
        self.faults.clear();
        self.slow = Duration::ZERO;
        if matches!(self.port_fault, Some(PortFault::Place(_))) {
            self.port_fault = None;
        }
    }

    pub fn start_fails(&self) -> bool {
        self.port_fault == Some(PortFault::Run)
    }

    /// What the guest may stand still for when the source ends the pause: its deadline, and the
    /// messages under way.
    fn check_pause(&mut self) {
        let Some(paused_at) = self.paused_at.take() else {
            return;
        };
        let stood = self.now.saturating_sub(paused_at);
        if let Some(max) = self.max_pause
            && stood > max + self.slow * 2 + Duration::from_millis(50)
        {
            let wrong = format!("the guest stood still for {stood:?}, and {max:?} were allowed");
            self.violations.push(wrong);
        }
    }

    pub fn source_resumes(&mut self) {
        if self.source_dead {
            return;
        }
        if self.committed {
            self.violations
                .push("the source resumed a guest that it had committed".into());
        }
        if self.destination_runs {
            self.violations
                .push("two owners: the source resumed while the destination runs".into());
        }
        self.check_pause();
        if self.source_memory.contains(&STALE) {
            self.violations
                .push("the source resumed a guest whose memory it had given back".into());
        }
        self.source_runs = true;
        self.ran_since_shared |= self.shared;
    }
}

/// RAM in two pieces where there are pages for that.
fn layout_of(scenario: &Scenario) -> RamLayout {
    let low = scenario.pages.div_ceil(2);
    let runs = if scenario.pages > low {
        vec![Run::new(0, low), Run::new(low + 70, scenario.pages - low)]
    } else {
        vec![Run::new(0, low)]
    };
    RamLayout::new(runs).unwrap_or_else(|error| unreachable_layout(&error))
}

/// What the guest's memory holds at first, which pages of it were never written, and the next
/// version of a page.
fn memory_of(
    scenario: &Scenario,
    layout: &RamLayout,
    ram: &[Gfn],
    rng: &mut Rng,
) -> (Vec<u64>, PageSet, u64) {
    let mut memory = vec![0; index(layout.end())];
    let mut holes = PageSet::new(layout.end());
    let mut next_version = 1;
    for &gfn in ram {
        if !rng.chance(scenario.zero_share) {
            memory[index(gfn)] = next_version;
            next_version += 1;
        } else if scenario.given_back > 0.0 {
            holes.insert(gfn);
        }
    }
    (memory, holes, next_version)
}

/// The simulated layout is made above; a wrong one is a mistake in this file.
fn unreachable_layout(error: &crate::page::LayoutError) -> RamLayout {
    unreachable!("the simulated layout is wrong: {error}")
}
