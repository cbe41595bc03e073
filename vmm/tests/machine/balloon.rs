//! Memory that the guest gives back in the middle of a migration, after it was sent.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use ferry_migration::options::{Compress, Options, PolicyKind};
use ferry_migration::report::{Event, Status};
use ferry_vmm::machine::Machine;
use ferry_vmm::migrate::{Arrival, Handle, Receiver, migrate};
use vm_memory::{Bytes, GuestAddress};

use crate::support::{COUNT, COUNTER, kvm, machine, progresses};

/// Pages that hold something, and those of them that are given back once they were sent.
const HELD: std::ops::Range<u64> = 1024..2048;
const GIVEN: std::ops::Range<u64> = 1024..1536;
/// One that is used again before the guest moves.
const AGAIN: u64 = 1030;

fn fill(machine: &Machine, gfn: u64, byte: u8) {
    let page = [byte; 4096];
    let at = GuestAddress(gfn * 4096);
    machine.ram().memory().write_slice(&page, at).unwrap();
}

fn byte(gfn: u64) -> u8 {
    u8::try_from(gfn % 251).unwrap() + 1
}

/// What the destination has, after the source gave back (by what a balloon's pages go through) what
/// it had sent.
fn moves(policy: PolicyKind) {
    let source = Arc::new(machine(Machine::builder(), &COUNT));
    HELD.for_each(|gfn| fill(&source, gfn, byte(gfn)));
    source.resume().unwrap();
    progresses(&source, COUNTER);
    let nothing = || Ok(Box::new(io::sink()) as Box<dyn Write + Send>);
    let uri = "tcp:127.0.0.1:0".parse().unwrap();
    let receiver = Receiver::bind(&uri, Arc::new(nothing)).unwrap();
    let options = Options {
        policy,
        verify: true,
        compress: Compress::None,
        ..Options::default()
    };
    let mut given = false;
    let mut give = |event| {
        let Event::Round(round) = event else { return };
        if round.n != 1 || round.follows {
            return;
        }
        let ram = source.ram();
        ram.discard(GIVEN.start, GIVEN.end - GIVEN.start).unwrap();
        fill(&source, AGAIN, 7);
        // The guest counts on in this one all the while: its next write finds a hole, and must be
        // in the log.
        ram.discard(COUNTER / 4096, 1).unwrap();
        given = true;
    };
    let report = migrate(
        &source,
        receiver.local_uri(),
        &options,
        &Handle::new(),
        &mut give,
    );
    assert!(given, "{report:#?}");
    assert_eq!(
        (report.status, report.verified),
        (Status::Completed, Some(true)),
        "{report:#?}"
    );
    // All but the one that was used again, and what was never written.
    assert!(report.pages.skipped >= 511, "{report:#?}");
    let Some(Arrival::Arrived { machine, .. }) = receiver.wait(Duration::from_secs(60)) else {
        panic!("it never arrived");
    };
    for gfn in HELD {
        let mut page = [0; 4096];
        machine.ram().copy_page(gfn, &mut page).unwrap();
        let expected = match gfn {
            AGAIN => 7,
            gfn if GIVEN.contains(&gfn) => 0,
            gfn => byte(gfn),
        };
        assert!(page == [expected; 4096], "page {gfn}");
    }
    progresses(&machine, COUNTER);
    machine.stop();
}

#[test]
fn what_was_sent_and_then_given_back_is_not_stale() {
    if kvm() {
        moves(PolicyKind::Precopy);
    }
}

#[test]
fn what_was_sent_and_then_given_back_follows_as_nothing() {
    if kvm() {
        moves(PolicyKind::Hybrid);
    }
}
