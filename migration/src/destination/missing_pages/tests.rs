use super::*;
use crate::port::{PortError, PostCopySink};
use crate::testing::{Loopback, TestClock};
use std::io;

/// Takes whatever it is given.
struct AnySink;

impl PageSink<Loopback> for AnySink {
    fn receive(&self, _: &mut Loopback, _: &[Run]) -> io::Result<()> {
        Ok(())
    }
    fn zero(&self, _: Run) -> Result<(), PortError> {
        Ok(())
    }
    fn write(&self, _: Run, _: &[u8]) -> Result<(), PortError> {
        Ok(())
    }
    fn copy_page(&self, _: Gfn, into: &mut [u8; PAGE_SIZE]) -> Result<(), PortError> {
        into.fill(0);
        Ok(())
    }
    fn post_copy(&self) -> Option<&dyn PostCopySink> {
        Some(self)
    }
}

impl PostCopySink for AnySink {
    fn place(&self, _: Run, _: &[u8]) -> Result<(), PortError> {
        Ok(())
    }
    fn place_zero(&self, _: Run) -> Result<(), PortError> {
        Ok(())
    }
    fn next_fault(&self, _: Duration) -> Result<Option<PageFault>, PortError> {
        Ok(None)
    }
}

/// Four pages are to follow.
fn missing_pages() -> MissingPages<Loopback, AnySink> {
    let layout = RamLayout::new(vec![Run::new(0, 4)]).unwrap();
    let all = layout.all();
    let missing_pages = MissingPages::new(layout, Arc::new(TestClock::still()), true, 1);
    missing_pages.begin(Arc::new(AnySink), &all);
    missing_pages
}

const fn page_of(gfn: Gfn) -> [u8; PAGE_SIZE] {
    [gfn.to_le_bytes()[0] + 1; PAGE_SIZE]
}

fn place(missing_pages: &MissingPages<Loopback, AnySink>, gfn: Gfn) {
    missing_pages
        .place(&[Run::new(gfn, 1)], Some(&page_of(gfn)))
        .unwrap();
}

/// The source's hash of a page, right or wrong.
fn tell(missing_pages: &MissingPages<Loopback, AnySink>, gfn: Gfn, right: bool) {
    let hash = page_hash(gfn, &page_of(if right { gfn } else { gfn + 7 }));
    missing_pages.compare(gfn, hash.to_le_bytes());
}

/// The answer to a fault travels on its own channel: the hash of its page may be here before it.
#[test]
fn hashes_and_pages_come_in_any_order() {
    for wrong in [None, Some(0), Some(3)] {
        let missing_pages = missing_pages();
        let right = |gfn| wrong != Some(gfn);
        place(&missing_pages, 0);
        tell(&missing_pages, 0, right(0));
        tell(&missing_pages, 1, right(1));
        tell(&missing_pages, 2, right(2));
        place(&missing_pages, 2);
        // Said again after a reconnection: once is enough.
        tell(&missing_pages, 0, right(0));
        tell(&missing_pages, 1, right(1));
        place(&missing_pages, 3);
        assert!(missing_pages.complete().is_none());
        place(&missing_pages, 1);
        assert!(
            missing_pages.complete().is_none(),
            "page 3 was not compared"
        );
        tell(&missing_pages, 3, right(3));
        let (_, different) = missing_pages.complete().unwrap();
        assert_eq!(different, u64::from(wrong.is_some()), "{wrong:?}");
    }
}

/// Who waits after the connection was lost is known, and asked for by the next one only.
#[test]
fn faults_without_a_connection_wait_for_the_next() {
    let missing_pages = missing_pages();
    let fault = |gfn| PageFault { gfn, waiter: 1 };
    let old = missing_pages.attach(0).unwrap();
    assert!(missing_pages.attach(0).is_err(), "it is connected already");
    assert!(missing_pages.attach(1).is_err(), "it was not announced");
    assert_eq!(missing_pages.fault(fault(0), old), FaultIs::New);
    missing_pages.lose("the network is gone");
    assert!(missing_pages.ended(old) && missing_pages.is_lost(old));
    assert_eq!(missing_pages.fault(fault(1), old), FaultIs::Known);
    assert_eq!(
        (missing_pages.waiting(), missing_pages.next_unasked(old)),
        (2, None)
    );
    missing_pages.reconnect();
    let new = missing_pages.attach(0).unwrap();
    assert!(missing_pages.ended(old) && !missing_pages.is_lost(old) && !missing_pages.ended(new));
    // Received by a thread of the old connection, which is on its way out.
    assert_eq!(missing_pages.fault(fault(2), old), FaultIs::Known);
    assert_eq!(missing_pages.next_unasked(old), None);
    let asked: Vec<_> = std::iter::from_fn(|| missing_pages.next_unasked(new)).collect();
    assert_eq!(asked, [0, 1, 2]);
    assert_eq!(missing_pages.fault(fault(3), new), FaultIs::New);
}
