//! A simulated guest, link, clock and destination: the real engines and policies run over them,
//! in one thread, with faults injected at any message and a seed that replays.
//!
//! Memory is simulated by *versions*: a page is a number that grows with every write, so that a
//! lost write is seen exactly, and a guest of gigabytes costs megabytes. Bytes on the link are
//! counted, and take time, as if pages were 4 KiB; the guest writes while that time passes.
//!
//! ```
//! let scenario = ferry_migration::testing::simulator::Scenario::random(42);
//! let outcome = ferry_migration::testing::simulator::run(&scenario);
//! assert!(outcome.violations.is_empty(), "{:?}", outcome.violations);
//! ```

mod disk;
mod echo;
mod fault;
mod guest;
mod host;
pub(crate) mod link;
mod verdict;
mod world;

use crate::destination;
use crate::model::policy_of;
use crate::options::{Compress, OnTimeout, Options, PolicyKind};
use crate::order::PushOrder;
use crate::page::{PAGE_BYTES, PageSet};
use crate::policy::Policy;
use crate::report::{Event, Report, Status};
pub use crate::rng::Rng;
use crate::source::{self, Ownership, Setup};
use crate::steering::Steering;
use crate::sync::lock;
use crate::wire::SessionId;
pub use fault::{ApiCall, Call, Fault, FaultKind, PortFault, random_change};
use guest::{SimCommitted, SimGuest};
use link::{Peer, SimClock, SimLink};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use world::World;

/// Everything that a simulated migration depends on.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Of the random numbers: same scenario, same run.
    pub seed: u64,
    /// Pages of RAM, in two regions with a hole between.
    pub pages: u64,
    /// Pages that the guest writes per second.
    pub write_rate: f64,
    /// Writes go to this many pages (the working set).
    pub working_set: u64,
    /// The guest walks its working set page after page (in a shuffled order) instead of writing
    /// anywhere in it: writes then hit different pages until all were hit.
    pub walk: bool,
    /// Share of pages that are zero at the start.
    pub zero_share: f64,
    /// Share of writes that make their page zero.
    pub zero_writes: f64,
    /// Share of writes that give their page back instead (a balloon, or free-page reporting): it
    /// holds nothing then, which is known without reading it, until it is written again.
    pub given_back: f64,
    /// Blocks of the guest's disk; 0 is no disk. It moves where `options.copy_disk` is set.
    pub disk_blocks: u64,
    /// What it takes to flush a block that was written.
    pub flush_time: Duration,
    /// Bytes per second.
    pub bandwidth: f64,
    /// The user's options.
    pub options: Options,
    /// Probability of a further write in the middle of reading a page and of clearing the log: to
    /// find races. 0 where the write rate is to be exact.
    pub racing_writes: f64,
    /// Both processes are on one host: the destination maps the guest's memory itself.
    pub shares: bool,
    /// What goes wrong.
    pub faults: Vec<Fault>,
    /// What goes wrong behind the ports.
    pub port_fault: Option<PortFault>,
    /// What users ask for meanwhile.
    pub calls: Vec<Call>,
    /// Attempts to recover before the network is mended: what goes wrong in each, counted from its
    /// first message.
    pub recoveries: Vec<Fault>,
    /// How often the source's last word (COMMIT or ABORT) comes late, once more, on a connection of
    /// its own.
    pub echoes: u32,
    /// Makes the simulated guest's dirty log forget a page: only to show that the simulator
    /// notices.
    pub forgetful_log: bool,
    /// The same of its disk and what is written to that.
    pub forgetful_disk: bool,
}

/// Where a process of the simulation ended up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Its guest runs.
    Runs,
    /// It holds a guest that does not run.
    Holds,
    /// It has no guest.
    Empty,
    /// Killed.
    Dead,
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The source's report.
    pub report: Report,
    /// The source process.
    pub source: Fate,
    /// The destination process.
    pub destination: Fate,
    /// Broken promises: empty, or the engine is wrong.
    pub violations: Vec<String>,
    /// Messages that crossed, in both directions.
    pub messages: u64,
    /// Page faults that the guest took at the destination.
    pub faults: u64,
    /// What the policy said that it has chosen.
    pub choices: Vec<String>,
    /// The report of the recovery, where one was needed and possible.
    pub recovered: Option<Report>,
}

impl Scenario {
    /// A random guest, link, options and faults.
    #[must_use]
    pub fn random(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let pages = 16 + rng.below(600);
        let mut scenario = Self {
            pages,
            write_rate: rng.unit() * 60_000.0,
            working_set: 1 + rng.below(pages),
            walk: rng.chance(0.3),
            zero_share: rng.unit(),
            bandwidth: 10e6 + rng.unit() * 200e6,
            ..Self::calm(seed)
        };
        scenario.options = random_options(&mut rng, pages);
        // Most faults early, where all messages of short migrations are; some anywhere.
        while rng.chance(if scenario.faults.is_empty() {
            0.85
        } else {
            0.25
        }) {
            let at = if rng.chance(0.7) {
                rng.below(24)
            } else {
                rng.below(160)
            };
            let kind = FaultKind::random(&mut rng);
            scenario.faults.push(Fault { at, kind });
        }
        if rng.chance(0.25) {
            scenario.port_fault = Some(PortFault::random(&mut rng));
        }
        if rng.chance(0.5) {
            scenario.given_back = rng.unit() * 0.7;
        }
        if rng.chance(0.3) {
            scenario.disk_blocks = 1 + rng.below(20);
            scenario.options.copy_disk = true;
            scenario.flush_time = Duration::from_micros(rng.below(400));
            if scenario.port_fault.is_none() && rng.chance(0.2) {
                scenario.port_fault = Some(PortFault::random_disk(&mut rng));
            }
        }
        scenario.shares = rng.chance(0.15);
        while rng.chance(0.35) {
            scenario.calls.push(Call::random(&mut rng));
        }
        // Numbers of their own: the rest of a seed's scenario does not depend on them.
        let mut steering = Rng::new(seed ^ 0x57ee_7109);
        if steering.chance(0.2) {
            scenario.options.on_timeout = OnTimeout::Throttle;
        }
        if steering.chance(0.5) {
            while steering.chance(0.6) {
                scenario.calls.push(Call::random_steering(&mut steering));
            }
        }
        scenario.calls.sort_by_key(|call| call.at);
        scenario.options.free_source =
            scenario.options.may_post_copy() && Rng::new(seed ^ 0xf4ee).chance(0.5);
        while rng.chance(0.4) {
            let at = rng.below(30);
            let kind = FaultKind::random(&mut rng);
            scenario.recoveries.push(Fault { at, kind });
        }
        scenario.echoes = u32::try_from(rng.below(4)).unwrap_or(0);
        scenario
    }

    /// A quiet migration.
    #[must_use]
    pub fn calm(seed: u64) -> Self {
        Self {
            seed,
            pages: 512,
            write_rate: 2_000.0,
            working_set: 64,
            walk: false,
            zero_share: 0.3,
            zero_writes: 0.1,
            given_back: 0.0,
            disk_blocks: 0,
            flush_time: Duration::ZERO,
            bandwidth: 100e6,
            options: Options {
                downtime: Duration::from_millis(5),
                // Bytes are then a matter of pages alone.
                compress: Compress::None,
                ..Options::default()
            },
            racing_writes: 0.2,
            shares: false,
            faults: Vec::new(),
            port_fault: None,
            calls: Vec::new(),
            recoveries: Vec::new(),
            echoes: 0,
            forgetful_log: false,
            forgetful_disk: false,
        }
    }
}

/// Runs a scenario to its end, recovery included, and checks every promise.
#[must_use]
pub fn run(scenario: &Scenario) -> Outcome {
    run_with(scenario, policy_of(&scenario.options).as_mut())
}

/// As [`run`], by a policy of the caller's.
#[must_use]
pub fn run_with(scenario: &Scenario, policy: &mut dyn Policy) -> Outcome {
    let world = Arc::new(Mutex::new(World::new(scenario)));
    let peer = Arc::new(Mutex::new(Peer::new(Arc::clone(&world))));
    let owner = Arc::new(Ownership::default());
    lock(&world).owner = Some(Arc::clone(&owner));
    let steering = Arc::new(Steering::default());
    lock(&world).steering = Some(Arc::clone(&steering));
    let session = SessionId(*b"simulated-moving");
    let clock = SimClock::new(Arc::clone(&world));
    let guest = SimGuest::new(Arc::clone(&world));
    let mut connect = |_, _| SimLink::connect(&world, &peer);
    let mut choices = Vec::new();
    let mut told = 0;
    let mut events = |event: Event| match event {
        Event::Choice { why } => choices.push(why),
        Event::Progress(progress) => told = told.max(progress.round),
        _ => {}
    };
    let report = source::migrate_with(
        &guest,
        Setup {
            connect: &mut connect,
            clock: &clock,
            options: &scenario.options,
            session,
            owner: &owner,
            steering: &steering,
            events: &mut events,
            timeouts: source::Timeouts::default(),
            threads: false,
        },
        policy,
    );
    // Whatever is still on its way arrives; a broken connection is noticed.
    Peer::drive_all(&peer);
    let mut violations = lock(&world).check(&report, &lock(&peer));
    let last = report.rounds.last().map_or(1, |round| round.n);
    if report.status == Status::Completed && told > last {
        violations.push(format!("progress was told of round {told} of {last}"));
    }
    let lost = matches!(report.status, Status::InDoubt | Status::Interrupted);
    if lost {
        for fault in &scenario.recoveries {
            lock(&world).expect_fault(*fault);
            try_to_recover(scenario, &world, &peer, session, &mut violations);
        }
    }
    lock(&world).mend();
    for _ in 0..scenario.echoes / 2 {
        echo::last_word(&world, &peer, session, &mut violations);
    }
    let recovered = if lost && !lock(&world).source_dead {
        Some(recover(scenario, &world, &peer, session, &mut violations))
    } else {
        None
    };
    operator(&world, &peer, &mut violations);
    for _ in 0..scenario.echoes.div_ceil(2) {
        echo::last_word(&world, &peer, session, &mut violations);
    }
    let world = lock(&world);
    violations.extend(world.violations.iter().cloned());
    Outcome {
        source: world.source_fate(),
        destination: world.destination_fate(&lock(&peer)),
        messages: world.messages,
        faults: world.faults_taken,
        recovered,
        report,
        choices,
        violations,
    }
}

/// What the source's VMM does when it is told to recover.
fn call_recover(
    scenario: &Scenario,
    world: &Arc<Mutex<World>>,
    peer: &Arc<Mutex<Peer>>,
    session: SessionId,
) -> Report {
    let guest = SimGuest::new(Arc::clone(world));
    let clock = SimClock::new(Arc::clone(world));
    let owner = Ownership::in_doubt();
    let setup = Setup {
        connect: &mut |_, _| SimLink::connect(world, peer),
        clock: &clock,
        options: &scenario.options,
        session,
        owner: &owner,
        steering: &Steering::default(),
        events: &mut |_| {},
        timeouts: source::Timeouts::default(),
        threads: false,
    };
    let committed = Box::new(SimCommitted(Arc::clone(world)));
    source::recover(&guest, committed, setup)
}

/// A source reconnects while the network is still bad. Whatever comes of it, nothing is lost and
/// nothing runs twice.
fn try_to_recover(
    scenario: &Scenario,
    world: &Arc<Mutex<World>>,
    peer: &Arc<Mutex<Peer>>,
    session: SessionId,
    violations: &mut Vec<String>,
) {
    if lock(world).source_dead {
        return;
    }
    let ran = lock(world).destination_runs;
    let report = call_recover(scenario, world, peer, session);
    Peer::drive_all(peer);
    let world = lock(world);
    let mut must = |truth: bool, what: &str| {
        if !truth {
            violations.push(format!(
                "{what} (recover: {:?}, {:?})",
                report.status, report.error
            ));
        }
    };
    must(!world.source_runs, "the source runs what it had committed");
    must(
        !ran || world.destination_runs || world.destination_dead,
        "recover stopped a guest that ran",
    );
    let complete = world.missing.as_ref().is_none_or(PageSet::is_empty);
    must(
        report.status != Status::Completed
            || complete && (world.destination_runs || world.destination_dead),
        "recover succeeded, yet the guest is not complete at the destination",
    );
}

/// A source in doubt or interrupted reconnects; the destination must end up running all of the
/// guest.
fn recover(
    scenario: &Scenario,
    world: &Arc<Mutex<World>>,
    peer: &Arc<Mutex<Peer>>,
    session: SessionId,
    violations: &mut Vec<String>,
) -> Report {
    let kept = {
        let world = lock(world);
        !world.destination_dead && !world.start_fails()
    };
    let report = call_recover(scenario, world, peer, session);
    let world = lock(world);
    if report.status == Status::Completed {
        if !world.destination_runs {
            violations.push("recover succeeded, yet the guest does not run".into());
        }
        if world.missing.as_ref().is_some_and(|set| !set.is_empty()) {
            violations.push("recover succeeded, yet pages are missing".into());
        }
    } else if kept {
        violations.push(format!(
            "recover failed although both sides live: {:?}",
            report.error
        ));
    }
    report
}

/// The last resort: the source is dead and the destination was ready: an operator takes over.
fn operator(world: &Arc<Mutex<World>>, peer: &Arc<Mutex<Peer>>, violations: &mut Vec<String>) {
    if !lock(world).source_dead || lock(world).destination_dead || lock(world).destination_runs {
        return;
    }
    let mut peer = lock(peer);
    let Some(engine) = peer.engine() else { return };
    if matches!(
        engine.state(),
        destination::State::Ready | destination::State::InDoubt
    ) {
        // Shared memory in which the source's guest went on is worth nothing to the state that was
        // saved before.
        let stale = lock(world).ran_since_shared;
        let result = engine.take_over();
        let world = lock(world);
        if stale && result.is_ok() {
            violations.push("an operator took over a guest whose memory has gone on".into());
        }
        let misses = world.missing.as_ref().is_some_and(|set| !set.is_empty());
        if misses && result.is_ok() {
            violations.push("an operator took over a guest whose pages are gone".into());
        }
        if !misses && !stale && !world.start_fails() && (result.is_err() || !world.destination_runs)
        {
            violations.push("an operator could not take over a complete guest".into());
        }
    }
}

/// Options of a random scenario, for a guest of so many pages.
fn random_options(rng: &mut Rng, pages: u64) -> Options {
    Options {
        downtime: Duration::from_millis(rng.below(20)),
        timeout: Duration::from_millis(200 + rng.below(2000)),
        on_timeout: [OnTimeout::Stop, OnTimeout::Cancel, OnTimeout::Postcopy]
            [usize::try_from(rng.below(3)).unwrap_or(0)],
        max_rounds: rng
            .chance(0.3)
            .then(|| 1 + u32::try_from(rng.below(20)).unwrap_or(1)),
        bandwidth: rng.chance(0.2).then(|| 5_000_000 + rng.below(50_000_000)),
        verify: rng.chance(0.5),
        max_pause: rng
            .chance(0.3)
            .then(|| Duration::from_millis(1 + rng.below(100))),
        policy: [
            PolicyKind::Precopy,
            PolicyKind::Stord,
            PolicyKind::Mplm,
            PolicyKind::Postcopy,
            PolicyKind::Hybrid,
        ][usize::try_from(rng.below(5)).unwrap_or(0)],
        order: [PushOrder::Demand, PushOrder::Flush, PushOrder::Bubble]
            [usize::try_from(rng.below(3)).unwrap_or(0)],
        pivots: 1 + u16::try_from(rng.below(5)).unwrap_or(0),
        split: 1 + u32::try_from(rng.below(12)).unwrap_or(0),
        turn_share: u32::try_from(rng.below(300)).unwrap_or(0),
        sync: Duration::from_millis(rng.below(20)),
        reorder: Some(rng.chance(0.3)),
        compress: [
            Compress::None,
            Compress::Auto,
            Compress::Zstd,
            Compress::Delta,
            Compress::Adaptive,
        ][usize::try_from(rng.below(5)).unwrap_or(0)],
        delta_cache: PAGE_BYTES * (1 + rng.below(2 * pages)),
        ..Options::default()
    }
}

#[cfg(test)]
mod tests;
