use super::*;
use vm_memory::GuestMemoryBackend as _;

const MIB: u64 = 1 << 20;

#[test]
fn sizes_that_cannot_be_are_refused_with_a_sentence() {
    for (bytes, huge, word) in [
        (0, false, "0 bytes"),
        (4097, false, "multiple"),
        (3 * MIB, true, "2097152"),
        (u64::MAX - 4095, false, "more than a guest can have"),
        (MAX_RAM, false, "more than this host has available"),
    ] {
        let text = GuestRam::new(bytes, huge).unwrap_err().to_string();
        assert!(text.contains(word), "{bytes}: {text}");
    }
}

#[test]
fn a_pool_that_is_too_small_is_named() {
    // No machine has a pool of 2 TiB.
    let error = GuestRam::new(2 << 40, true).unwrap_err();
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
    let ram = GuestRam::new(2 * MIB, false).unwrap();
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
    let ram = GuestRam::new(2 * MIB, false).unwrap();
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
    let ram = GuestRam::new(2 * MIB, false).unwrap();
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
