//! A defect in a thread that answers page faults: the page that it had taken never leaves, so the
//! source says so at once instead of waiting for the destination to have everything.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use ferry_migration::destination::exchange_preamble;
use ferry_migration::net::MonotonicClock;
use ferry_migration::options::{Options, PolicyKind};
use ferry_migration::order::PushOrder;
use ferry_migration::page::{Gfn, PAGE_SIZE, PageSet, RamLayout, Run};
use ferry_migration::port::{Link, PageSource, Paused, PortError, SourceVm};
use ferry_migration::report::{Report, Status};
use ferry_migration::source::{self, Ownership, Setup, Timeouts};
use ferry_migration::steering::Steering;
use ferry_migration::testing::{MemoryLink, TestSource};
use ferry_migration::wire::{
    Features, FrameType, Header, HelloAck, Ready, Role, Running, SessionId,
};
use std::io;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

/// Longer than any test takes, on any machine.
const NEVER: Duration = Duration::from_secs(60);

/// A guest whose pages the threads that answer faults cannot send.
struct Broken(TestSource);

impl PageSource<MemoryLink> for Broken {
    fn transmit(&self, link: &mut MemoryLink, head: &[u8], runs: &[Run]) -> io::Result<()> {
        assert_ne!(
            std::thread::current().name(),
            Some("ferry-serve"),
            "a defect"
        );
        self.0.transmit(link, head, runs)
    }

    fn copy_page(&self, gfn: Gfn, into: &mut [u8; PAGE_SIZE]) -> Result<(), PortError> {
        PageSource::<MemoryLink>::copy_page(&self.0, gfn, into)
    }
}

impl SourceVm<MemoryLink> for Broken {
    fn layout(&self) -> RamLayout {
        SourceVm::<MemoryLink>::layout(&self.0)
    }

    fn description(&self) -> Result<Vec<u8>, PortError> {
        SourceVm::<MemoryLink>::description(&self.0)
    }

    fn state_bytes(&self) -> u64 {
        SourceVm::<MemoryLink>::state_bytes(&self.0)
    }

    fn start_tracking(&self) -> Result<(), PortError> {
        SourceVm::<MemoryLink>::start_tracking(&self.0)
    }

    fn stop_tracking(&self) {}

    fn collect_dirty(&self, into: &mut PageSet) -> Result<(), PortError> {
        SourceVm::<MemoryLink>::collect_dirty(&self.0, into)
    }

    fn clear_dirty(&self, runs: &[Run], scratch: &mut Vec<u64>) -> Result<(), PortError> {
        SourceVm::<MemoryLink>::clear_dirty(&self.0, runs, scratch)
    }

    fn pause(&self) -> Result<Paused<'_>, PortError> {
        SourceVm::<MemoryLink>::pause(&self.0)
    }
}

/// A destination that runs the guest and asks for one page; it takes what comes until the source
/// hangs up.
fn ask_for_the_last_page(connections: &Receiver<MemoryLink>, pages: u64) {
    let (mut control, _) = exchange_preamble(connections.recv().unwrap(), NEVER).unwrap();
    control.link().set_timeout(None);
    let (mut fault, mut runs) = (None, false);
    let mut payload = Vec::new();
    while let Ok(header) = control.recv_header() {
        control.recv_payload(&header, &mut payload).unwrap();
        match header.kind {
            FrameType::Hello => {
                let features = Features::POST_COPY;
                let ack = HelloAck {
                    features,
                    state: None,
                };
                control.send_json(FrameType::HelloAck, &ack).unwrap();
                control.set_end(pages);
                let link = connections.recv().unwrap();
                fault = Some(exchange_preamble(link, NEVER).unwrap().0);
            }
            FrameType::RoundEnd if !runs => {
                let ack = Header::bare(FrameType::RoundAck, header.round);
                control.send(ack, &[]).unwrap();
            }
            FrameType::State => {
                let ready = Ready::default();
                control.send_json(FrameType::Ready, &ready).unwrap();
            }
            FrameType::Commit => {
                runs = true;
                let running = Running {
                    missing: pages,
                    ..Running::default()
                };
                control.send_json(FrameType::Running, &running).unwrap();
                let request = Header {
                    gfn: pages - 1,
                    count: 1,
                    ..Header::bare(FrameType::PageRequest, 0)
                };
                fault.as_mut().unwrap().send(request, &[]).unwrap();
            }
            _ => {}
        }
    }
}

fn migrate(pages: usize) -> Report {
    let guest = Broken(TestSource::with(pages, |_, page| page[0] = 1));
    let options = Options {
        policy: PolicyKind::Postcopy,
        order: PushOrder::Demand,
        ..Options::default()
    };
    let (sender, connections) = channel();
    let peer = std::thread::spawn(move || ask_for_the_last_page(&connections, pages as u64));
    let connect = move |_: Role, _| {
        let (ours, theirs) = MemoryLink::pair();
        sender.send(theirs).map_err(|_| io::Error::other("gone"))?;
        Ok(ours)
    };
    let report = source::migrate(
        &guest,
        Setup {
            connect: &mut { connect },
            clock: &MonotonicClock::new(),
            options: &options,
            session: SessionId([7; 16]),
            owner: &Ownership::default(),
            steering: &Steering::default(),
            events: &mut |_| {},
            timeouts: Timeouts {
                // A source that does not notice waits for so long.
                transfer: Duration::from_secs(5),
                ..Timeouts::DEFAULT
            },
            threads: true,
        },
    );
    peer.join().unwrap();
    report
}

#[test]
fn a_panic_of_a_thread_that_answers_faults_is_reported() {
    // While pages are left to push, and while only the last confirmation is missing.
    for pages in [64, 1] {
        let report = migrate(pages);
        assert_eq!(
            report.status,
            Status::Interrupted,
            "{pages} pages: {report:?}"
        );
        let error = report.error.unwrap();
        assert!(error.contains("panicked"), "{pages} pages: {error}");
    }
}
