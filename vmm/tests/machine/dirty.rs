//! The dirty log and rings against an oracle that knows what was written.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use ferry_migration::options::Tracking;
use ferry_vmm::kvm::{DirtyLogError, DirtyLogKind, Host};
use ferry_vmm::machine::{Builder, Machine};
use vm_memory::{Bytes, GuestAddress};

use crate::support::{COUNT, COUNTER, MIB, eventually, kvm, machine, progresses, read};

/// Waits for an address in the mailbox, adds one to the word there, and empties the mailbox.
///
/// ```text
/// 1: mov rax, [0x200000]
///    test rax, rax
///    jz 1b
///    inc qword ptr [rax]
///    mov qword ptr [0x200000], 0
///    jmp 1b
/// ```
const MAILBOX: [u8; 30] = [
    0x48, 0x8b, 0x04, 0x25, 0x00, 0x00, 0x20, 0x00, 0x48, 0x85, 0xc0, 0x74, 0xf3, 0x48, 0xff, 0x00,
    0x48, 0xc7, 0x04, 0x25, 0x00, 0x00, 0x20, 0x00, 0x00, 0x00, 0x00, 0x00, 0xeb, 0xe2,
];

const PAGES: u64 = 16 * MIB / 4096;
const MAILBOX_PAGE: u64 = COUNTER / 4096;

/// Has the guest write to each of these pages.
fn guest_writes(m: &Machine, pages: &[u64]) {
    for page in pages {
        let address = page * 4096 + 8;
        m.ram()
            .memory()
            .write_obj(address, GuestAddress(COUNTER))
            .unwrap();
        eventually("the guest's write", m, || read(m, COUNTER) == 0);
    }
}

fn dirty(m: &Machine) -> BTreeSet<u64> {
    let mut pages = BTreeSet::new();
    m.dirty_log()
        .collect(|first, words| {
            for (i, word) in (0u64..).zip(words) {
                pages.extend(
                    (0..64)
                        .filter(|b| word >> b & 1 == 1)
                        .map(|b| first + i * 64 + b),
                );
            }
        })
        .unwrap();
    pages
}

fn clear(m: &Machine, pages: &BTreeSet<u64>) {
    let mut words = vec![0u64; usize::try_from(PAGES / 64).unwrap()];
    for page in pages {
        words[usize::try_from(page / 64).unwrap()] |= 1 << (page % 64);
    }
    m.dirty_log().clear(0, &words).unwrap();
}

#[test]
fn exactly_what_was_written_is_dirty_until_it_is_cleared() {
    each_tracking(|builder| exactly_what_was_written_is_dirty(&machine(builder, &MAILBOX)));
}

/// By the log, and by rings where there are any.
fn each_tracking(test: impl Fn(Builder)) {
    if !kvm() {
        return;
    }
    test(Machine::builder().dirty(Tracking::Log));
    if rings() {
        test(Machine::builder().dirty(Tracking::Ring));
    }
}

fn rings() -> bool {
    let has = kvm() && Host::open().unwrap().has_dirty_rings();
    if !has {
        let test = std::thread::current().name().unwrap_or("?").to_owned();
        eprintln!("NOT RUN: {test}: no dirty rings here");
    }
    has
}

fn exactly_what_was_written_is_dirty(m: &Machine) {
    m.resume().unwrap();
    guest_writes(m, &[700]);
    let log = m.dirty_log();
    assert!(matches!(log.collect(|_, _| ()), Err(DirtyLogError::Off)));
    log.start().unwrap();
    assert!(matches!(log.start(), Err(DirtyLogError::AlreadyOn)));
    println!("dirty log: {:?}", log.kind());

    let everything: BTreeSet<u64> = (0..PAGES).collect();
    assert_eq!(dirty(m), everything, "every page is dirty at the start");
    clear(m, &everything);
    assert_eq!(dirty(m), BTreeSet::new());

    // The guest's writes, at and across the edges of words, and the VMM's own.
    let written = [600, 639, 640, 1000, 1023, 1024, 4095];
    guest_writes(m, &written);
    m.ram()
        .memory()
        .write_slice(&[1; 5000], GuestAddress(2000 * 4096))
        .unwrap();
    m.ram().discard(3000, 2).unwrap();
    let mut oracle: BTreeSet<u64> = written.into_iter().collect();
    oracle.extend([MAILBOX_PAGE, 2000, 2001, 3000, 3001]);
    assert_eq!(dirty(m), oracle);
    assert_eq!(dirty(m), oracle, "collecting clears nothing");

    // Clearing some leaves the others, of the same word too.
    let some: BTreeSet<u64> = [639, 1024, 2000].into();
    clear(m, &some);
    let rest: BTreeSet<u64> = oracle.difference(&some).copied().collect();
    assert_eq!(dirty(m), rest);

    // Written again after it was cleared: dirty again. Between collect and clear: cleared, since
    // the sender reads the page after clearing it, and so sends this write too. Rings tell of it
    // all the same, for they protect what was collected: it is sent once more than need be.
    guest_writes(m, &[639]);
    let seen = dirty(m);
    assert!(seen.contains(&639));
    guest_writes(m, &[640]);
    clear(m, &seen);
    let again: BTreeSet<u64> = match log.kind() {
        DirtyLogKind::Ring(_) => [640, MAILBOX_PAGE].into(),
        _ => BTreeSet::new(),
    };
    assert_eq!(dirty(m), again);
    clear(m, &again);
    assert_eq!(dirty(m), BTreeSet::new());
    guest_writes(m, &[640]);
    assert_eq!(dirty(m), [640, MAILBOX_PAGE].into());

    // Words that are not where words can be.
    assert!(log.clear(1, &[1]).is_err());
    assert!(log.clear(PAGES, &[1]).is_err());
    assert!(
        log.clear(0, &vec![1; usize::try_from(PAGES).unwrap()])
            .is_err()
    );
    log.clear(PAGES - 64, &[u64::MAX]).unwrap();

    log.stop().unwrap();
    log.stop().unwrap();
    assert!(matches!(log.clear(0, &[1]), Err(DirtyLogError::Off)));
    guest_writes(m, &[5]);
    log.start().unwrap();
    assert_eq!(dirty(m), everything);
}

/// A sender copies the counter's page whenever it is dirty, while the guest counts. What it copied
/// last must be what is there once the guest stands still: a lost bit would show as an old number.
#[test]
fn a_racing_sender_never_misses_the_last_write() {
    each_tracking(|builder| racing_sender_never_misses(&machine(builder, &COUNT)));
}

fn racing_sender_never_misses(m: &Machine) {
    m.resume().unwrap();
    progresses(m, COUNTER);
    m.dirty_log().start().unwrap();
    let all: BTreeSet<u64> = (0..PAGES).collect();
    clear(m, &all);
    let copy = AtomicU64::new(read(m, COUNTER));
    let send = || {
        let mut found = false;
        m.dirty_log()
            .collect(|_, words| {
                let at = usize::try_from(MAILBOX_PAGE / 64).unwrap();
                found |= words[at] >> (MAILBOX_PAGE % 64) & 1 == 1;
            })
            .unwrap();
        if found {
            clear(m, &[MAILBOX_PAGE].into());
            copy.store(read(m, COUNTER), Ordering::SeqCst);
        }
    };
    for _ in 0..30 {
        let done = AtomicBool::new(false);
        std::thread::scope(|s| {
            s.spawn(|| {
                while !done.load(Ordering::SeqCst) {
                    send();
                }
            });
            std::thread::sleep(std::time::Duration::from_millis(3));
            let paused = m.pause().unwrap();
            done.store(true, Ordering::SeqCst);
            paused.keep_paused();
        });
        send();
        assert_eq!(copy.load(Ordering::SeqCst), read(m, COUNTER));
        m.resume().unwrap();
    }
}

/// Writes the number of the sweep to each page from 4 MiB to 16 MiB, over and over; the number is
/// in the mailbox.
///
/// ```text
/// 1: mov rbx, 0x400000
///    mov rax, [0x200000]
///    inc rax
///    mov [0x200000], rax
/// 2: mov [rbx], rax
///    add rbx, 0x1000
///    cmp rbx, 0x1000000
///    jb 2b
///    jmp 1b
/// ```
const SWEEP: [u8; 48] = [
    0x48, 0xc7, 0xc3, 0x00, 0x00, 0x40, 0x00, 0x48, 0x8b, 0x04, 0x25, 0x00, 0x00, 0x20, 0x00, 0x48,
    0xff, 0xc0, 0x48, 0x89, 0x04, 0x25, 0x00, 0x00, 0x20, 0x00, 0x48, 0x89, 0x03, 0x48, 0x81, 0xc3,
    0x00, 0x10, 0x00, 0x00, 0x48, 0x81, 0xfb, 0x00, 0x00, 0x00, 0x01, 0x72, 0xed, 0xeb, 0xd1, 0x90,
];
const SWEPT: std::ops::Range<u64> = 1024..4096;

/// A guest that dirties three times as many pages as its ring has entries, and no thread takes
/// them: it stops for its own ring, goes on, and every page is known. A sender that then copies
/// what is dirty has what the guest has.
#[test]
fn a_burst_larger_than_the_ring_loses_nothing() {
    if !rings() {
        return;
    }
    let builder = Machine::builder()
        .dirty(Tracking::Ring)
        .dirty_ring_entries(1024);
    let m = machine(builder, &SWEEP);
    let log = m.dirty_log();
    assert_eq!(log.kind(), DirtyLogKind::Ring(1024));
    m.resume().unwrap();
    let all: BTreeSet<u64> = (0..PAGES).collect();
    let mut copy = vec![0; usize::try_from(PAGES).unwrap()];
    for round in 0..5 {
        let full = log.full_rings();
        log.start().unwrap();
        clear(&m, &all);
        copy.fill(u64::MAX);
        let begun = read(&m, COUNTER);
        for page in 0..PAGES {
            copy[usize::try_from(page).unwrap()] = read(&m, page * 4096);
        }
        eventually("two sweeps", &m, || read(&m, COUNTER) > begun + 2);
        assert!(log.full_rings() > full, "the ring was never full");
        let mut send = |pages: &BTreeSet<u64>| {
            clear(&m, pages);
            for page in pages {
                copy[usize::try_from(*page).unwrap()] = read(&m, page * 4096);
            }
        };
        // Some rounds of a migration, then its pause.
        let found = dirty(&m);
        assert!(SWEPT.into_iter().all(|page| found.contains(&page)));
        send(&found);
        for _ in 0..round {
            send(&dirty(&m));
        }
        let paused = m.pause().unwrap();
        send(&dirty(&m));
        for page in 0..PAGES {
            let (sent, there) = (copy[usize::try_from(page).unwrap()], read(&m, page * 4096));
            assert_eq!(sent, there, "page {page}, round {round}");
        }
        log.stop().unwrap();
        drop(paused);
    }
}
