use super::*;
use crate::memory::Backing;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use vm_memory::{Bytes, GuestAddress};

#[test]
fn pages_cross_a_socket_and_holes_stay_holes() {
    let (a, b) = (
        GuestRam::new(4 << 20, Backing::Small).unwrap(),
        GuestRam::new(4 << 20, Backing::Small).unwrap(),
    );
    for gfn in [3_u64, 4, 700] {
        a.memory()
            .write_slice(
                &[u8::try_from(gfn % 251).unwrap(); 4096],
                GuestAddress(gfn * 4096),
            )
            .unwrap();
    }
    assert_eq!(a.unpopulated(0, 1024), Some(Run::new(0, 3)));
    assert_eq!(a.unpopulated(3, 1021), Some(Run::new(5, 695)));
    assert_eq!(a.unpopulated(3, 2), None);
    assert_eq!(a.unpopulated(701, 323), Some(Run::new(701, 323)));
    assert_eq!(a.populated(0, 1024), Some(Run::new(3, 2)));
    assert_eq!(a.populated(4, 1020), Some(Run::new(4, 1)));
    assert_eq!(a.populated(5, 1019), Some(Run::new(700, 1)));
    assert_eq!(a.populated(5, 695), None);
    assert_eq!(a.populated(701, 323), None);
    assert!(a.page_is_zero(2).unwrap() && !a.page_is_zero(3).unwrap());
    let (from, to) = UnixStream::pair().unwrap();
    let runs = [Run::new(3, 2), Run::new(700, 1)];
    let writer = std::thread::spawn(move || {
        a.write_pages(from.as_fd(), b"head", &runs, |_| Ok(()))
            .unwrap();
        (a, from)
    });
    let mut head = [0; 4];
    io::Read::read_exact(&mut &to, &mut head).unwrap();
    assert_eq!(&head, b"head");
    b.read_pages(to.as_fd(), &runs, |_| Ok(())).unwrap();
    let (a, from) = writer.join().unwrap();
    let (mut x, mut y) = ([0; 4096], [0; 4096]);
    for gfn in 0..1024 {
        a.copy_page(gfn, &mut x).unwrap();
        b.copy_page(gfn, &mut y).unwrap();
        assert_eq!(x, y, "page {gfn}");
    }
    // The other way into memory: through a pipe, into the file.
    let c = GuestRam::new(4 << 20, Backing::Small).unwrap();
    let pipe = SplicePipe::new().unwrap();
    a.write_pages(from.as_fd(), &[], &runs, |_| Ok(())).unwrap();
    c.splice_pages(to.as_fd(), &pipe, &[Run::new(3, 2)], |_| Ok(()))
        .unwrap();
    c.splice_pages(to.as_fd(), &pipe, &[Run::new(700, 1)], |_| Ok(()))
        .unwrap();
    for gfn in 0..1024 {
        a.copy_page(gfn, &mut x).unwrap();
        c.copy_page(gfn, &mut y).unwrap();
        assert_eq!(x, y, "page {gfn}");
    }
    assert!(
        c.splice_pages(to.as_fd(), &pipe, &[Run::new(1023, 2)], |_| Ok(()))
            .is_err()
    );
    drop(from);
    let error = c
        .splice_pages(to.as_fd(), &pipe, &[Run::new(1, 1)], |_| Ok(()))
        .unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    let error = b
        .read_pages(to.as_fd(), &[Run::new(1, 1)], |_| Ok(()))
        .unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    assert!(
        b.read_pages(to.as_fd(), &[Run::new(1023, 2)], |_| Ok(()))
            .is_err()
    );
    assert!(a.page_is_zero(1024).is_err());
}

#[test]
fn decoded_pages_are_placed_where_they_belong() {
    let ram = GuestRam::new(4 << 20, Backing::Small).unwrap();
    let bytes: Vec<u8> = (0..=250).cycle().take(3 * 4096).collect();
    for (first, pages, fresh) in [
        (10, 1, true),
        (20, 3, true),
        (1021, 3, false),
        (10, 1, false),
    ] {
        ram.write_decoded(first, &bytes[..pages * 4096], fresh)
            .unwrap();
        let mut page = [0; 4096];
        for (gfn, expected) in (first..).zip(bytes[..pages * 4096].chunks(4096)) {
            ram.copy_page(gfn, &mut page).unwrap();
            assert!(page == expected, "page {gfn}");
        }
        assert!(ram.page_is_zero(first - 1).unwrap());
    }
    for fresh in [false, true] {
        let past = ram.write_decoded(1022, &bytes, fresh);
        assert!(past.is_err(), "past the end");
        assert!(ram.write_decoded(1, &bytes[..5000], fresh).is_err());
    }
}
