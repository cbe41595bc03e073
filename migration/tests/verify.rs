//! `--verify` hashes memory while the guest runs, and in the pause only what was written since.
#![allow(clippy::unwrap_used)]

use ferry_migration::destination::Timeouts;
use ferry_migration::net::{self, MonotonicClock};
use ferry_migration::options::Options;
use ferry_migration::page::PAGE_SIZE;
use ferry_migration::policy::{Decision, Policy, SendOrder, View};
use ferry_migration::report::Status;
use ferry_migration::source::{self, Ownership, Setup};
use ferry_migration::steering::Steering;
use ferry_migration::testing::{MemoryLink, TestDestination, TestSource};
use std::sync::mpsc;

/// Sends until nothing is pending: pre-copy's own leaves to the pause what a fast link sends in a
/// moment.
struct All;

impl Policy for All {
    fn name(&self) -> &'static str {
        "all"
    }

    fn next(&mut self, view: &View<'_>) -> Decision {
        if view.pending_pages == 0 {
            return Decision::Stop {
                why: "nothing is pending".into(),
            };
        }
        Decision::Send {
            pages: view.pending.clone(),
            order: SendOrder::ColdFirst,
        }
    }
}

#[test]
fn in_the_pause_only_what_was_written_since_is_hashed() {
    const PAGES: usize = 3000;
    // No page is zero: one that is not looked at by the codec, either.
    let source = TestSource::with(PAGES, |index, page| {
        page[..8].copy_from_slice(&(index as u64 + 1).to_le_bytes());
        page[PAGE_SIZE - 1] = 1;
    });
    let destination = TestDestination::new(PAGES);
    let (dial, listen) = mpsc::channel();
    let report = std::thread::scope(|scope| {
        let there = destination.clone();
        let accept = move |time| Ok(listen.recv_timeout(time).ok());
        scope.spawn(move || net::receive(accept, there, Timeouts::default()));
        let mut connect = |_, _| {
            let (ours, theirs) = MemoryLink::pair();
            dial.send(theirs)
                .map_err(std::io::Error::other)
                .map(|()| ours)
        };
        let options = Options {
            verify: true,
            ..Options::default()
        };
        let setup = Setup {
            connect: &mut connect,
            clock: &MonotonicClock::new(),
            options: &options,
            session: net::session_id(),
            owner: &Ownership::default(),
            steering: &Steering::default(),
            events: &mut |_| {},
            timeouts: source::Timeouts::default(),
            threads: true,
        };
        source::migrate_with(&source, setup, &mut All)
    });
    assert_eq!(report.status, Status::Completed, "{report:#?}");
    assert_eq!(report.verified, Some(true));
    assert!(source.memory() == destination.memory());
    // It wrote nothing after its memory was hashed.
    assert_eq!(source.copied_while_stopped(), 0, "of {PAGES} pages");
}
