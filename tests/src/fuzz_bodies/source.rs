//! A source whose destination says anything at all.

use super::guest::StandIn;
use super::link::channels;
use ferry_migration::options::{Compress, OnTimeout, Options, PolicyKind};
use ferry_migration::order::PushOrder;
use ferry_migration::port::given_away;
use ferry_migration::report::{Report, Status};
use ferry_migration::source::{Ownership, Setup, Timeouts, migrate, recover};
use ferry_migration::steering::Steering;
use ferry_migration::testing::{RecordedPeer, Seen, TestClock};
use ferry_migration::wire::{Preamble, Role, SessionId};
use std::time::Duration;

/// A migration, or (where the first byte says so) the recovery of one, with options that the first
/// three bytes choose; the rest is what the destination says on each channel, in the order in which
/// they are opened.
///
/// It ends, by a sentence without control characters where it failed. The guest runs here unless it
/// was committed, and what is reported is what became of it. Returns the report, if there was
/// input.
pub fn source(bytes: &[u8]) -> Option<Report> {
    let ([kind, flags, coding], said) = bytes.split_first_chunk::<3>()?;
    let flag = |bit: u8| flags >> bit & 1 == 1;
    let options = Options {
        policy: PolicyKind::ALL[usize::from(kind % 8) % PolicyKind::ALL.len()],
        compress: [
            Compress::Auto,
            Compress::None,
            Compress::Zstd,
            Compress::Delta,
            Compress::Adaptive,
        ][usize::from(coding % 5)],
        order: [PushOrder::Bubble, PushOrder::Flush, PushOrder::Demand]
            [usize::from(coding / 5 % 3)],
        timeout: Duration::from_millis(100),
        on_timeout: [OnTimeout::Cancel, OnTimeout::Stop, OnTimeout::Postcopy]
            [usize::from(kind >> 5) % 3],
        max_rounds: Some(4),
        delta_cache: 1 << 16,
        verify: flag(0),
        channels: [None, Some(1), Some(2)][usize::from(flags >> 1) % 4 % 3],
        copy_disk: flag(3),
        ..Options::default()
    };
    let recovers = kind & 0x10 > 0;
    let guest = StandIn::busy();
    if recovers {
        let mut standing = guest.standing();
        (standing.paused, standing.committed) = (true, true);
    }
    let session = SessionId([7; 16]);
    let mut said = channels(said, flag(4)).into_iter();
    let mut connect = |role: Role, index: u16| {
        let mut stream = Preamble::new(role, index, session).encode().to_vec();
        if flag(5) {
            // Its preamble, too.
            stream.clear();
        }
        stream.extend(said.next().unwrap_or_default());
        let seen = match role {
            Role::Fault => Seen::Held,
            _ if flag(6) => Seen::AtOnce,
            _ => Seen::WhenWaitedFor,
        };
        Ok(RecordedPeer::new(stream, seen))
    };
    let mut events = 0_u64;
    let setup = Setup {
        connect: &mut connect,
        clock: &TestClock::ticking(Duration::from_millis(1)),
        options: &options,
        session,
        owner: &Ownership::default(),
        steering: &Steering::default(),
        events: &mut |_| events += 1,
        timeouts: Timeouts::default(),
        threads: false,
    };
    let report = if recovers {
        recover(&guest, given_away(&guest), setup)
    } else {
        migrate(&guest, setup)
    };
    let standing = guest.standing();
    let gone = matches!(
        report.status,
        Status::Completed | Status::Interrupted | Status::InDoubt
    );
    assert_eq!(gone, standing.committed, "{report:?}");
    assert_eq!(gone, standing.paused, "{report:?}");
    let done = report.status == Status::Completed;
    // The log of a guest that runs elsewhere goes with what is left of it here.
    let moved = done || report.status == Status::Interrupted;
    assert!(
        moved || !standing.logged,
        "the dirty log was left on: {report:?}"
    );
    assert_eq!(done, standing.released, "{report:?}");
    if let Some(error) = &report.error {
        assert!(!error.is_empty() && !error.chars().any(char::is_control));
    }
    drop(standing);
    Some(report)
}
