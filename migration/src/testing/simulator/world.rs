//! The state of the simulated world: memories, pipes, time, who runs, and what goes wrong.

mod writes;

use super::disk::Disks;
use super::fault::{ApiCall, Call, FaultKind, PortFault};
use super::{Rng, Scenario};
use crate::page::{Gfn, PAGE_BYTES, PageSet, RamLayout, Run};
use crate::port::FreedPages;
use crate::rng::Odds;
use crate::source::Ownership;
use crate::steering::{Change, Steering};
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// A connection: bytes on their way, and whether more will come.
#[derive(Debug, Default)]
pub(super) struct Connection {
    pub to_destination: VecDeque<u8>,
    pub to_source: VecDeque<u8>,
    pub broken: bool,
    pub stalled: bool,
}

/// Which end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Source,
    Destination,
}

/// The machine's state: what must arrive unharmed.
pub(super) const STATE: &[u8] = b"registers and devices of the simulated machine";

/// What a message takes on a link that trickles.
const SLOW: Duration = Duration::from_secs(2);

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
        let low = scenario.pages.div_ceil(2);
        let runs = if scenario.pages > low {
            vec![Run::new(0, low), Run::new(low + 70, scenario.pages - low)]
        } else {
            vec![Run::new(0, low)]
        };
        let layout = RamLayout::new(runs).unwrap_or_else(|error| unreachable_layout(&error));
        let ram: Vec<Gfn> = layout.all().iter().collect();
        let mut source_memory = vec![0; index(layout.end())];
        let mut holes = PageSet::new(layout.end());
        let mut next_version = 1;
        for &gfn in &ram {
            if !rng.chance(scenario.zero_share) {
                source_memory[index(gfn)] = next_version;
                next_version += 1;
            } else if scenario.given_back > 0.0 {
                // Never written.
                holes.insert(gfn);
            }
        }
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

    /// Whether the guest, at the destination, has to wait for this page.
    fn faults_on(&mut self, gfn: Gfn) -> bool {
        let faults =
            self.destination_runs && self.missing.as_ref().is_some_and(|set| set.contains(gfn));
        if faults {
            self.blocked = Some(gfn);
            self.faults_heard.push_back(gfn);
            self.faults_taken += 1;
        }
        faults
    }

    /// What is here of these pages is stale and must not be read.
    pub fn drop_stale(&mut self, pages: &PageSet) {
        for gfn in pages.iter() {
            self.destination_memory[index(gfn)] = STALE;
        }
    }

    /// These pages are to follow the guest.
    pub fn begin_post_copy(&mut self, missing: &PageSet) {
        for gfn in missing.iter() {
            if self.destination_memory[index(gfn)] != STALE {
                self.violations
                    .push(format!("page {gfn} is missing and was not dropped"));
            }
        }
        self.missing = Some(missing.clone());
    }

    /// A page that has followed the guest.
    pub fn place(&mut self, gfn: Gfn, version: u64) {
        let expected = self.missing.as_mut().is_some_and(|set| set.remove(gfn));
        if !expected {
            self.violations.push(format!("page {gfn} was placed twice"));
            return;
        }
        let sent = self.paused_memory[index(gfn)];
        if sent != version {
            self.violations.push(format!(
                "lost write: page {gfn} followed as {version}, should be {sent}"
            ));
        }
        self.destination_memory[index(gfn)] = version;
        if self.blocked == Some(gfn) {
            self.blocked = None;
            self.write(gfn);
        }
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

    /// Whether the process at this end has died.
    pub fn is_dead(&self, side: Side) -> bool {
        match side {
            Side::Source => self.source_dead,
            Side::Destination => self.destination_dead,
        }
    }

    /// How long the link is busy with so many bytes.
    pub fn takes(&self, weight: u64) -> Duration {
        Duration::from_secs_f64(weight as f64 / self.bandwidth)
            + Duration::from_micros(20)
            + self.slow
    }

    /// Hands over what the link took of a message until its sender's deadline.
    pub fn send_in_part(&mut self, side: Side, connection: usize, bytes: &[u8]) {
        if !self.is_dead(side) && !self.connections[connection].broken {
            let part = index(self.rng.below(bytes.len() as u64));
            self.deliver(side, connection, &bytes[..part]);
        }
    }

    /// Sends bytes; `weight` is how many bytes they stand for.
    pub fn send(
        &mut self,
        side: Side,
        connection: usize,
        bytes: &[u8],
        weight: u64,
        guarded: usize,
    ) -> io::Result<()> {
        self.pass(self.takes(weight));
        if self.is_dead(side) || self.connections[connection].broken {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        let at = self.messages;
        self.messages += 1;
        let fault = self
            .faults
            .iter()
            .find(|fault| fault.at == at)
            .map(|fault| fault.kind);
        match fault {
            Some(FaultKind::CutBefore) => self.break_all(),
            Some(FaultKind::LostSilently) => {
                self.break_all();
                return Ok(());
            }
            Some(FaultKind::CutWithin) => {
                let keep = index(self.rng.below(bytes.len() as u64));
                self.deliver(side, connection, &bytes[..keep]);
                self.break_all();
            }
            Some(FaultKind::SourceDies) => {
                self.source_dead = true;
                self.source_runs = false;
                self.break_all();
            }
            Some(FaultKind::DestinationDies) => {
                self.destination_dead = true;
                self.destination_runs = false;
                self.break_all();
            }
            Some(FaultKind::Flip(bit)) => {
                let range = if self.verified { bytes.len() } else { guarded };
                let bit = bit as usize % (range * 8).max(1);
                let mut bytes = bytes.to_vec();
                if let Some(byte) = bytes.get_mut(bit / 8) {
                    *byte ^= 1 << (bit % 8);
                }
                self.deliver(side, connection, &bytes);
                return Ok(());
            }
            Some(FaultKind::Slow) => self.slow = SLOW,
            Some(FaultKind::Stall) => {
                for connection in &mut self.connections {
                    connection.stalled = true;
                }
            }
            Some(FaultKind::Cancel) => self.cancel(),
            Some(FaultKind::CutAfter) => {
                self.deliver(side, connection, bytes);
                self.break_all();
                return Ok(());
            }
            None => {}
        }
        if self.connections[connection].broken {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        self.deliver(side, connection, bytes);
        Ok(())
    }

    fn deliver(&mut self, from: Side, connection: usize, bytes: &[u8]) {
        let connection = &mut self.connections[connection];
        if connection.stalled {
            return;
        }
        match from {
            Side::Source => connection.to_destination.extend(bytes),
            Side::Destination => connection.to_source.extend(bytes),
        }
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

    /// Breaks every connection; what was on its way in both directions still arrives.
    fn break_all(&mut self) {
        for connection in &mut self.connections {
            connection.broken = true;
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

    /// The destination's claim on shared memory, as the kernel would decide it.
    pub fn claim(&mut self) -> Result<(), crate::port::PortError> {
        if self.ran_since_shared {
            return Err("the guest has run in this memory since".into());
        }
        if !(self.committed || self.source_dead) {
            return Err("the source has the guest's memory".into());
        }
        self.destination_memory = self.source_memory.clone();
        self.ran_since_shared = true;
        Ok(())
    }

    /// What the destination has of a page.
    pub fn at_destination(&self, gfn: Gfn) -> u64 {
        let memory = if self.shared {
            &self.source_memory
        } else {
            &self.destination_memory
        };
        memory[index(gfn)]
    }

    /// The destination puts a page in place.
    pub fn fill(&mut self, gfn: Gfn, version: u64) {
        if self.complete {
            let wrong = format!("page {gfn} was written into a complete guest");
            self.violations.push(wrong);
        } else if self.shared {
            let wrong = format!("page {gfn} was written into memory that the source's guest has");
            self.violations.push(wrong);
        } else {
            self.destination_memory[index(gfn)] = version;
        }
    }

    pub fn destination_starts(&mut self) {
        if self.source_runs {
            self.violations
                .push("two owners: the destination started while the source runs".into());
        }
        let layout = self.layout.clone();
        let mut here = layout.all();
        if let Some(missing) = &self.missing {
            here.subtract(missing);
        }
        for gfn in here.iter() {
            let (sent, here) = (
                self.paused_memory[index(gfn)],
                self.destination_memory[index(gfn)],
            );
            if sent != here {
                self.violations.push(format!(
                    "lost write: page {gfn} is {here}, should be {sent}"
                ));
            }
        }
        self.violations.extend(self.disks.wrong());
        self.starts += 1;
        if self.starts > 1 {
            self.violations
                .push("the destination started the guest again".into());
        }
        if self.cancelled && !self.source_dead {
            self.violations
                .push("a guest started whose migration was cancelled".into());
        }
        // An operator who takes over from a source that went on and died goes back in time.
        if self.disks.is_unflushed() && !self.source_dead {
            let wrong = "the guest started on a disk that the source had not flushed";
            self.violations.push(wrong.into());
        }
        self.destination_runs = true;
    }
}

/// What pages weigh on the link.
pub(super) const fn weight_of(head: usize, pages: u64) -> u64 {
    head as u64 + pages * PAGE_BYTES
}

/// The simulated layout is made above; a wrong one is a mistake in this file.
fn unreachable_layout(error: &crate::page::LayoutError) -> RamLayout {
    unreachable!("the simulated layout is wrong: {error}")
}
