//! Migrations on several data channels, with real threads at both ends and trouble that a seed
//! chooses.
//!
//! `FERRY_SIM_SEEDS=a..b` replays or widens the search. A seed fixes the guest, the options and at
//! which byte of which channel the trouble comes; how the threads interleave is up to the machine.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use ferry_migration::destination::{self, DestinationError};
use ferry_migration::net::{self, MonotonicClock};
use ferry_migration::options::{Compress, OnTimeout, Options, PolicyKind};
use ferry_migration::port::{Link, given_away};
use ferry_migration::report::{Event, Report, Status};
use ferry_migration::rng::Rng;
use ferry_migration::source::{self, Ownership, Setup};
use ferry_migration::steering::Steering;
use ferry_migration::testing::{MemoryLink, TestDestination, TestSource, Trouble, random_change};
use ferry_migration::wire::{Role, SessionId};
use std::collections::BTreeMap;
use std::io;
use std::sync::mpsc::channel;
use std::time::Duration;

/// Long enough for a starved machine, short enough to wait for where a peer has gone for good.
const TIMEOUT: Duration = Duration::from_secs(20);
const SESSION: SessionId = SessionId(*b"several-channels");

fn seeds() -> std::ops::Range<u64> {
    let range = std::env::var("FERRY_SIM_SEEDS").unwrap_or_else(|_| "0..150".into());
    let (from, to) = range
        .split_once("..")
        .expect("FERRY_SIM_SEEDS is a range, such as 17..18");
    from.parse().unwrap()..to.parse().unwrap()
}

fn pick<T: Copy>(rng: &mut Rng, of: &[T]) -> T {
    of[usize::try_from(rng.below(of.len() as u64)).unwrap()]
}

/// What goes wrong.
#[derive(Clone, Copy, Debug)]
enum Fault {
    Nothing,
    /// A connection is gone after so many bytes; 0 is the control channel, the others are data
    /// channels.
    Dies(u16, u64),
    /// A user cancels at so many reports of progress.
    Cancel(u32),
}

fn fault(rng: &mut Rng, channels: u16, bytes: u64) -> Fault {
    match rng.below(4) {
        0 => Fault::Nothing,
        1 => Fault::Cancel(u32::try_from(rng.below(6)).unwrap()),
        _ => {
            let channel = u16::try_from(rng.below(u64::from(channels) + 1)).unwrap();
            let most = if channel == 0 { 4000 } else { bytes };
            Fault::Dies(channel, rng.below(most))
        }
    }
}

fn options(rng: &mut Rng) -> Options {
    Options {
        policy: pick(
            rng,
            &[PolicyKind::Precopy, PolicyKind::Stord, PolicyKind::Mplm],
        ),
        channels: Some(2 + u16::try_from(rng.below(4)).unwrap()),
        compress: pick(
            rng,
            &[
                Compress::None,
                Compress::Auto,
                Compress::Zstd,
                Compress::Delta,
            ],
        ),
        reorder: pick(rng, &[None, Some(true), Some(false)]),
        verify: rng.chance(0.5),
        max_rounds: Some(4),
        on_timeout: OnTimeout::Stop,
        ..Options::default()
    }
}

struct Outcome {
    report: Report,
    fault: Fault,
    received: Result<TestDestination, DestinationError>,
}

fn setup<'a>(
    connect: &'a mut dyn FnMut(Role, u16) -> io::Result<MemoryLink>,
    clock: &'a MonotonicClock,
    options: &'a Options,
    (owner, steering): (&'a Ownership, &'a Steering),
    events: &'a mut dyn FnMut(Event),
) -> Setup<'a, MemoryLink> {
    Setup {
        connect,
        clock,
        options,
        session: SESSION,
        owner,
        steering,
        events,
        timeouts: source::Timeouts {
            handshake: TIMEOUT,
            transfer: TIMEOUT,
            ready: TIMEOUT,
            commit: TIMEOUT,
            ..source::Timeouts::DEFAULT
        },
        threads: true,
    }
}

/// One migration, and its recovery where the source is in doubt; checks who has the guest.
fn run(seed: u64) -> Outcome {
    let mut rng = Rng::new(seed);
    let pages = 100 + usize::try_from(rng.below(4000)).unwrap();
    let options = options(&mut rng);
    let channels = options.channels.unwrap_or(1);
    let fault = fault(
        &mut rng,
        channels,
        pages as u64 * 4096 / u64::from(channels),
    );
    let source = TestSource::new(pages);
    let destination = TestDestination::new(pages);
    let (dial, listen) = channel();
    let connect = |role: Role, index: u16| {
        let (ours, theirs) = MemoryLink::pair();
        dial.send(theirs).map_err(io::Error::other)?;
        let trouble = match (fault, role) {
            (Fault::Dies(0, after), Role::Control) => Some(after),
            (Fault::Dies(n, after), Role::Data) if n == index + 1 => Some(after),
            _ => None,
        };
        Ok(ours.suffers(trouble.map(|after| Trouble::Dies(Default::default(), after))))
    };
    let owner = Ownership::default();
    let steering = Steering::default();
    let mut accepted = 0;
    let mut told = 0;
    let mut cancelled = false;
    let mut events = |_: Event| {
        told += 1;
        if matches!(fault, Fault::Cancel(at) if told > at) {
            cancelled |= owner.cancel();
        }
        if rng.chance(0.1) {
            let change = random_change(&mut rng);
            accepted += usize::from(steering.change(&change).is_ok());
        }
    };
    let timeouts = destination::Timeouts {
        handshake: TIMEOUT,
        transfer: TIMEOUT,
        commit: TIMEOUT,
    };
    let there = destination.clone();
    let (report, recovered, received) = std::thread::scope(|scope| {
        let accept = move |time| Ok(listen.recv_timeout(time).ok());
        let peer = scope.spawn(move || net::receive(accept, there, timeouts));
        let mut connect = connect;
        let clock = MonotonicClock::new();
        let report = source::migrate(
            &source,
            setup(
                &mut connect,
                &clock,
                &options,
                (&owner, &steering),
                &mut events,
            ),
        );
        let (fresh, mut silent) = (Ownership::in_doubt(), |_: Event| {});
        let unsteered = Steering::default();
        let again = setup(
            &mut connect,
            &clock,
            &options,
            (&fresh, &unsteered),
            &mut silent,
        );
        let recovered = (report.status == Status::InDoubt)
            .then(|| source::recover(&source, given_away(&source), again));
        (report, recovered, peer.join().unwrap())
    });
    let end = recovered.as_ref().unwrap_or(&report).status;
    let what = format!("seed {seed}: {fault:?}, {options:?}: {report:?}, {recovered:?}");
    assert_eq!(destination.late_writes(), 0, "written after STATE: {what}");
    assert!(!(source.runs() && destination.runs()), "two owners: {what}");
    match end {
        Status::Completed => {
            assert!(destination.runs() && received.is_ok(), "{what}");
            assert!(
                source.memory() == destination.memory(),
                "lost write: {what}"
            );
            assert!(!cancelled, "cancelled, and it went on: {what}");
            let steered = report.steered.len();
            assert_eq!(
                steered, accepted,
                "not all that was accepted was done: {what}"
            );
        }
        Status::Failed | Status::Cancelled => assert!(source.runs(), "{what}"),
        Status::InDoubt | Status::Interrupted => panic!("no side has the guest: {what}"),
    }
    Outcome {
        report,
        fault,
        received,
    }
}

#[test]
fn no_seed_loses_a_write_or_makes_two_owners() {
    let mut endings = BTreeMap::new();
    for seed in seeds() {
        let Outcome {
            report,
            fault,
            received,
        } = run(seed);
        if matches!(fault, Fault::Nothing) {
            assert_eq!(report.status, Status::Completed, "seed {seed}: {report:?}");
            assert!(received.is_ok());
        }
        *endings.entry(format!("{:?}", report.status)).or_insert(0) += 1;
    }
    println!("{endings:?}");
    if seeds().count() >= 100 {
        for status in ["Completed", "Failed", "Cancelled"] {
            assert!(
                endings.contains_key(status),
                "no seed ended {status}: {endings:?}"
            );
        }
    }
}

/// The checks can fail: a sink notices what is written after the state was restored.
#[test]
fn a_late_write_is_counted() {
    use ferry_migration::page::{PAGE_SIZE, Run};
    use ferry_migration::port::{DestinationVm, PageSink};
    fn restored<L: Link>(vm: &mut TestDestination) {
        DestinationVm::<L>::restore(vm, b"state").unwrap();
    }
    let mut vm = TestDestination::new(4);
    let sink = vm.memory().clone();
    PageSink::<MemoryLink>::write(&sink, Run::new(0, 1), &[1; PAGE_SIZE]).unwrap();
    assert_eq!(vm.late_writes(), 0);
    restored::<MemoryLink>(&mut vm);
    PageSink::<MemoryLink>::write(&sink, Run::new(1, 2), &[1; 2 * PAGE_SIZE]).unwrap();
    assert_eq!(vm.late_writes(), 2);
}
