use super::*;
use ferry_migration::page::Run;
use vm_memory::{Bytes as _, GuestMemoryBackend as _};

const MIB: u64 = 1 << 20;

#[test]
fn sizes_that_cannot_be_are_refused_with_a_sentence() {
    for (bytes, backing, word) in [
        (0, Backing::Auto, "0 bytes"),
        (4097, Backing::Auto, "multiple"),
        (3 * MIB, Backing::Hugetlb, "2097152"),
        (u64::MAX - 4095, Backing::Auto, "more than a guest can have"),
        (MAX_RAM, Backing::Small, "has available"),
        (MAX_RAM, Backing::Auto, "has available"),
    ] {
        let text = GuestRam::new(bytes, backing).unwrap_err().to_string();
        assert!(text.contains(word), "{bytes}: {text}");
    }
}

#[test]
fn a_pool_that_is_too_small_is_named() {
    // No machine has a pool of 2 TiB.
    let error = GuestRam::new(2 << 40, Backing::Hugetlb).unwrap_err();
    assert!(matches!(error, RamError::PoolTooSmall { .. }), "{error}");
}

#[test]
fn big_memory_is_split_around_the_hole() {
    let layout = RamLayout::new(5 << 30, false).unwrap();
    let [low, high] = layout.regions() else {
        panic!("two regions")
    };
    assert_eq!((low.address(), low.bytes()), (0, 3 << 30));
    assert_eq!(
        (high.address(), high.bytes(), high.file_offset),
        (4 << 30, 2 << 30, 3 << 30)
    );
    assert!(layout.contains(0, 3 << 30));
    assert!(!layout.contains(0, (3 << 30) + 1));
    assert!(!layout.contains(u64::MAX, 2));
    assert!(layout.contains(6 << 30, 0) && !layout.contains(6 << 30, 1));
}

#[test]
fn addresses_are_checked() {
    let ram = GuestRam::new(2 * MIB, Backing::Small).unwrap();
    let base = ram.host_address(0, 512).unwrap();
    assert_eq!(
        ram.host_address(3, 1).unwrap().as_ptr() as usize,
        base.as_ptr() as usize + 3 * 4096
    );
    for (gfn, count) in [(0, 513), (512, 1), (u64::MAX, 1), (1, u64::MAX), (511, 2)] {
        assert_eq!(
            ram.host_address(gfn, count),
            Err(RangeError::new(gfn, count))
        );
    }
}

#[test]
fn own_writes_are_tracked_by_words_and_cleared_exactly() {
    let ram = GuestRam::new(2 * MIB, Backing::Small).unwrap();
    ram.memory()
        .write_slice(&[1; 5000], GuestAddress(70 * 4096))
        .unwrap();
    let mut words = [0; 8];
    ram.or_dirty_words(0, &mut words).unwrap();
    assert_eq!(words, [0, 0b1100_0000, 0, 0, 0, 0, 0, 0]);
    ram.clear_dirty_words(64, &[0b0100_0000]).unwrap();
    let mut words = [0; 2];
    ram.or_dirty_words(64, &mut words).unwrap();
    assert_eq!(words, [0b1000_0000, 0]);
    assert!(ram.or_dirty_words(1, &mut words).is_err());
    assert!(ram.or_dirty_words(7 * 64, &mut words).is_err());
    assert!(ram.clear_dirty_words(512, &[1]).is_err());
    ram.mark_all_dirty();
    let mut words = [0; 8];
    ram.or_dirty_words(0, &mut words).unwrap();
    assert_eq!(words, [u64::MAX; 8]);
    ram.clear_all_dirty();
}

#[test]
fn discarded_pages_are_zero_and_count_as_written() {
    let ram = GuestRam::new(2 * MIB, Backing::Small).unwrap();
    ram.memory()
        .write_slice(&[7; 3 * 4096], GuestAddress(4096))
        .unwrap();
    ram.clear_all_dirty();
    ram.discard(2, 1).unwrap();
    let mut bytes = [9; 3 * 4096];
    ram.memory()
        .read_slice(&mut bytes, GuestAddress(4096))
        .unwrap();
    assert!(bytes[..4096].iter().chain(&bytes[8192..]).all(|b| *b == 7));
    assert!(bytes[4096..8192].iter().all(|b| *b == 0));
    let mut words = [0];
    ram.or_dirty_words(0, &mut words).unwrap();
    assert_eq!(words, [0b100]);
    assert!(ram.discard(511, 2).is_err());
    assert!(ram.memory().find_region(GuestAddress(2 * MIB)).is_none());
}

/// What the guest sees of a page: its first word.
fn word(ram: &GuestRam, gfn: u64) -> u64 {
    ram.memory()
        .read_obj(GuestAddress(gfn * PAGE_SIZE))
        .unwrap()
}

/// Memory that `auto` gives, each page of which holds its own number plus one; `None` where this
/// host has no 2 MiB pages.
fn transparent(bytes: u64) -> Option<GuestRam> {
    let ram = GuestRam::new(bytes, Backing::Auto).unwrap();
    if ram.backing() != Backing::Transparent {
        eprintln!("NOT RUN: transparent 2 MiB pages: {:?}", ram.note());
        return None;
    }
    for gfn in 0..bytes / PAGE_SIZE {
        let at = GuestAddress(gfn * PAGE_SIZE);
        ram.memory().write_obj(gfn + 1, at).unwrap();
    }
    Some(ram)
}

#[test]
fn memory_is_of_2_mib_pages_by_default() {
    let Some(ram) = transparent(8 * MIB) else {
        return;
    };
    let found = ram.resident();
    assert_eq!(found.bytes, 8 * MIB);
    // A host that is short of them gives fewer; the test machine's does not go down to none.
    assert!(found.huge_bytes > 0, "{found:?}");
    let small = GuestRam::new(8 * MIB, Backing::Small).unwrap();
    small.memory().write_obj(1_u64, GuestAddress(0)).unwrap();
    let expected = Resident {
        bytes: PAGE_SIZE,
        huge_bytes: 0,
    };
    assert_eq!(small.resident(), expected);
    assert_eq!((small.backing(), small.note()), (Backing::Small, None));
}

#[test]
fn memory_smaller_than_a_2_mib_page_has_small_ones() {
    let ram = GuestRam::new(MIB, Backing::Auto).unwrap();
    assert_eq!((ram.backing(), ram.note()), (Backing::Small, None));
}

#[test]
fn preallocated_memory_is_there_at_once() {
    for backing in [Backing::Auto, Backing::Small] {
        let options = MemoryOptions {
            backing,
            prealloc: true,
        };
        let ram = GuestRam::with_options(4 * MIB, options).unwrap();
        assert!(ram.is_preallocated());
        assert_eq!(ram.resident().bytes, 4 * MIB);
        assert_eq!(ram.unpopulated(0, 1024), None);
    }
}

/// Single pages of 2 MiB pages: the dropped ones are absent, the others keep what they have.
#[test]
fn a_part_of_a_2_mib_page_can_be_dropped() {
    let Some(ram) = transparent(8 * MIB) else {
        return;
    };
    ram.forbid_transparent_hugepages();
    let dropped = [(0, 1), (511, 2), (700, 300), (2047, 1)];
    for (first, count) in dropped {
        ram.drop_pages(first, count).unwrap();
    }
    // What comes now fills no hole beside it, however it comes.
    ram.drop_pages(1100, 300).unwrap();
    ram.write_decoded(1200, &[7; 4096], true).unwrap();
    let is_dropped = |gfn| {
        let runs = dropped.iter().chain(&[(1100, 100), (1201, 199)]);
        runs.clone()
            .any(|(first, count)| (*first..first + count).contains(&gfn))
    };
    for gfn in 0..2048 {
        assert_eq!(ram.unpopulated(gfn, 1).is_some(), is_dropped(gfn), "{gfn}");
        let expected = match gfn {
            1200 => u64::from_ne_bytes([7; 8]),
            _ => gfn + 1,
        };
        if !is_dropped(gfn) {
            assert_eq!(word(&ram, gfn), expected, "{gfn}");
        }
    }
}

#[test]
fn while_holes_mean_something_nothing_is_written_to_the_file() {
    let ram = GuestRam::new(2 * MIB, Backing::Small).unwrap();
    assert!(ram.takes_writes());
    ram.forbid_transparent_hugepages();
    assert!(!ram.takes_writes());
    ram.write_decoded(7, &[7; 4096], true).unwrap();
    assert_eq!(ram.unpopulated(6, 1), Some(Run::new(6, 1)));
    assert_eq!(word(&ram, 7), u64::from_ne_bytes([7; 8]));
    ram.allow_transparent_hugepages();
    assert!(ram.takes_writes());
}

#[test]
fn clearing_splits_no_2_mib_page_and_discarding_gives_memory_back() {
    use std::os::unix::fs::MetadataExt as _;
    let Some(ram) = transparent(8 * MIB) else {
        return;
    };
    let held = || ram.file().metadata().unwrap().blocks() * 512;
    let before = held();
    ram.clear(5, 1).unwrap();
    assert_eq!(held(), before);
    // Its whole 2 MiB pages go; of the others the part is overwritten.
    ram.clear(511, 514).unwrap();
    assert_eq!(held(), before - 2 * MIB);
    ram.discard(1600, 3).unwrap();
    assert_eq!(held(), before - 2 * MIB - 3 * PAGE_SIZE);
    let mut words = [0; 32];
    ram.or_dirty_words(0, &mut words).unwrap();
    for gfn in 0..2048 {
        let zero = gfn == 5 || (511..1025).contains(&gfn) || (1600..1603).contains(&gfn);
        assert_eq!(word(&ram, gfn), if zero { 0 } else { gfn + 1 }, "{gfn}");
    }
}

#[test]
fn a_split_2_mib_page_is_put_together_again() {
    let Some(ram) = transparent(6 * MIB) else {
        return;
    };
    ram.forbid_transparent_hugepages();
    ram.drop_pages(3, 1).unwrap();
    ram.drop_pages(512, 512).unwrap();
    ram.memory()
        .write_obj(4_u64, GuestAddress(3 * 4096))
        .unwrap();
    ram.allow_transparent_hugepages();
    match ram.collapse(0) {
        Ok(done) => assert!(done),
        // Linux before 6.1 cannot, and a host may be short of such pages.
        Err(error) => {
            return eprintln!("NOT RUN: a_split_2_mib_page_is_put_together_again: {error}");
        }
    }
    assert!(!ram.collapse(512).unwrap(), "nothing is there");
    assert_eq!(ram.unpopulated(512, 512), Some(Run::new(512, 512)));
    for gfn in 0..512 {
        assert_eq!(word(&ram, gfn), gfn + 1);
    }
    assert!(ram.resident().huge_bytes >= 2 * MIB);
}

/// A guest with pages of a pool comes to a host that has none, or too few.
#[test]
fn a_guest_of_a_pool_arrives_where_there_is_none() {
    let ram = GuestRam::arriving(4 * MIB, true, MemoryOptions::default()).unwrap();
    if ram.hugepages() {
        eprintln!("NOT RUN: a_guest_of_a_pool_arrives_where_there_is_none: this host has a pool");
        return;
    }
    let note = ram.note().unwrap();
    assert!(note.contains("pool"), "{note}");
    let options = MemoryOptions {
        backing: Backing::Hugetlb,
        ..MemoryOptions::default()
    };
    assert!(GuestRam::arriving(4 * MIB, false, options).is_err());
}
