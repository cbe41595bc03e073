//! Memory of 2 MiB pages.

use super::*;

fn transparent(bytes: u64) -> Option<Arc<GuestRam>> {
    let ram = GuestRam::new(bytes, Backing::Auto).unwrap();
    if ram.backing() != Backing::Transparent {
        not_run(&format!("{:?}", ram.note()));
        return None;
    }
    Some(Arc::new(ram))
}

/// Memory of 2 MiB pages of which nothing has come: page by page, in any order, with zeros between
/// and pages that come twice, it is filled with such, and no page is seen before it has come.
#[test]
fn empty_memory_is_filled_with_2_mib_pages() {
    let Some(ram) = transparent(8 * MIB) else {
        return;
    };
    // The first piece is there in part, and is filled as ever.
    ram.memory()
        .write_slice(&page(3), GuestAddress(3 * PAGE_SIZE))
        .unwrap();
    ram.drop_pages(4, 508).unwrap();
    let empty = [Run::new(4, 2000)];
    let Some(userfault) = register_empty(Arc::clone(&ram), &empty) else {
        return;
    };
    let held = || {
        use std::os::unix::fs::MetadataExt as _;
        ram.file().metadata().unwrap().blocks() * 512
    };
    let placed = |placed, present| Placed { placed, present };
    std::thread::scope(|s| {
        // In a piece of which nothing has come, and of which a neighbour has.
        for gfn in [700, 701] {
            let touch = reader(s, &ram, gfn);
            assert_eq!(fault(&userfault).gfn, gfn);
            let done = userfault.place(gfn, 1, &page(gfn)).unwrap();
            assert_eq!(done, placed(1, 0));
            assert_eq!(touch.join().unwrap().0, first_word(gfn));
        }
        // Zeros, where the file has a page and where it has none.
        for gfn in [702, 1200] {
            let touch = reader(s, &ram, gfn);
            assert_eq!(fault(&userfault).gfn, gfn);
            assert_eq!(userfault.place_zero(gfn, 1).unwrap(), placed(1, 0));
            assert_eq!(touch.join().unwrap().0, 0);
        }
    });
    // What the guest has written since is not written over.
    ram.memory()
        .write_obj(1_u64, GuestAddress(701 * PAGE_SIZE))
        .unwrap();
    assert_eq!(
        userfault.place(700, 2, &pages(700, 2)).unwrap(),
        placed(0, 2)
    );
    assert_eq!(userfault.place_zero(701, 1).unwrap(), placed(0, 1));
    assert_eq!(read(&ram, 701), 1);
    // Across pieces, those that are none among them.
    let done = userfault.place(500, 200, &pages(500, 200)).unwrap();
    assert_eq!(done, placed(200, 0));
    let done = userfault.place(703, 1300, &pages(703, 1300)).unwrap();
    assert_eq!(done, placed(1299, 1));
    assert_eq!(read(&ram, 3), first_word(3));
    for gfn in (500..700).chain(703..1200).chain(1201..2003) {
        assert_eq!(read(&ram, gfn), first_word(gfn), "{gfn}");
    }
    // Pages 512 to 1535 are in two pages of 2 MiB: of no page are there two.
    let small = 4 + 12 + (2003 - 1536);
    assert_eq!(held(), 4 * MIB + small * PAGE_SIZE);
}

/// Memory of 2 MiB pages, of which some pages are dropped: these alone fault, and the end allows 2
/// MiB pages again.
#[test]
fn pages_of_a_2_mib_page_fault_alone() {
    let Some(ram) = transparent(4 * MIB) else {
        return;
    };
    for gfn in 0..1024 {
        ram.memory()
            .write_slice(&page(gfn), GuestAddress(gfn * PAGE_SIZE))
            .unwrap();
    }
    let missing = [5, 6, 511, 512];
    for gfn in missing {
        ram.drop_pages(gfn, 1).unwrap();
    }
    let Some(userfault) = register(Arc::clone(&ram)) else {
        return;
    };
    assert!(!ram.fills_huge());
    std::thread::scope(|s| {
        for gfn in missing {
            let touch = reader(s, &ram, gfn);
            assert_eq!(fault(&userfault).gfn, gfn);
            let placed = userfault.place(gfn, 1, &page(gfn)).unwrap();
            assert_eq!(placed.placed, 1);
            assert_eq!(touch.join().unwrap().0, first_word(gfn));
        }
    });
    drop(userfault);
    assert!(ram.fills_huge());
    // The thread that puts them together works meanwhile: it changes nothing.
    for gfn in 0..1024 {
        assert_eq!(read(&ram, gfn), first_word(gfn));
    }
}
