//! A guest that is told that it moved, and a copy that it is one.

use ferry_vmm::machine::{Disruption, GenerationId, Machine, VmClock};
use vm_memory::{Bytes, GuestAddress};

use crate::support::{COUNT, COUNTER, kvm, machine, progresses};

/// As `ferry run` leaves it.
const PAGE: GuestAddress = GuestAddress(0xe_f000);
const FIRST: [u8; 16] = *b"0123456789abcdef";

/// A guest that counts, and knows no interrupts.
fn counter(page: &[u8]) -> Machine {
    let machine = machine(Machine::builder(), &COUNT);
    machine.ram().memory().write_slice(page, PAGE).unwrap();
    machine
}

fn bytes<const N: usize>(machine: &Machine, at: GuestAddress) -> [u8; N] {
    let mut bytes = [0; N];
    machine.ram().memory().read_slice(&mut bytes, at).unwrap();
    bytes
}

fn page(machine: &Machine) -> [u8; 48] {
    bytes(machine, PAGE)
}

#[test]
fn a_copy_has_an_id_of_its_own_and_goes_on() {
    if !kvm() {
        return;
    }
    let m = counter(&[b"FERRY GENERATION".as_slice(), &FIRST].concat());
    assert_eq!(m.generation().unwrap(), Some(GenerationId::from(FIRST)));
    m.resume().unwrap();
    progresses(&m, COUNTER);
    let mut ids = vec![GenerationId::from(FIRST)];
    for _ in 0..3 {
        let paused = m.pause().unwrap();
        let id = paused.renew_identity().unwrap().unwrap();
        assert!(!ids.contains(&id), "{id} came twice");
        assert_eq!(m.generation().unwrap(), Some(id));
        let bytes = page(&m);
        assert_eq!(bytes[16..32], id.bytes());
        assert_eq!(
            (&bytes[..16], &bytes[32..]),
            (&b"FERRY GENERATION"[..], &[0; 16][..])
        );
        ids.push(id);
        drop(paused);
        // No handler, no interrupt.
        progresses(&m, COUNTER);
    }
}

#[test]
fn a_guest_that_was_started_without_an_id_goes_on_without() {
    if !kvm() {
        return;
    }
    for before in [[0; 32], *b"FERRY GENERATIONS and other text"] {
        let m = counter(&before[1..]);
        let bytes = page(&m);
        let paused = m.pause().unwrap();
        assert_eq!(paused.renew_identity().unwrap(), None);
        assert_eq!((m.generation().unwrap(), page(&m)), (None, bytes));
    }
}

/// As `ferry run` leaves it.
const CLOCK_PAGE: GuestAddress = GuestAddress(0xe_e000);
const CLOCK_HEAD: &[u8] = b"VCLK\x00\x10\0\0\x01\0\xff\0";

fn numbers(clock: VmClock) -> (u32, u64, u64) {
    (
        clock.seq_count,
        clock.disruption_marker,
        clock.vm_generation_counter,
    )
}

#[test]
fn a_disrupted_clock_has_another_marker_and_its_guest_goes_on() {
    if !kvm() {
        return;
    }
    let m = counter(&[]);
    let memory = m.ram().memory();
    memory.write_slice(CLOCK_HEAD, CLOCK_PAGE).unwrap();
    let numbered = |m: &Machine| numbers(m.vmclock().unwrap().unwrap());
    assert_eq!(numbered(&m), (0, 0, 0));
    m.resume().unwrap();
    progresses(&m, COUNTER);
    for (what, then) in [
        (Disruption::Moved, (2, 1, 0)),
        (Disruption::Copied, (4, 2, 1)),
        (Disruption::Moved, (6, 3, 1)),
    ] {
        let paused = m.pause().unwrap();
        assert!(paused.disrupt_clock(what).unwrap());
        assert_eq!(numbered(&m), then, "{what:?}");
        drop(paused);
        // No handler, no interrupt.
        progresses(&m, COUNTER);
    }
    // Where the specification has them, and nothing else.
    let mut expected = [0; 0x78];
    expected[..12].copy_from_slice(CLOCK_HEAD);
    (expected[12], expected[16], expected[104]) = (6, 3, 1);
    assert_eq!(bytes::<0x78>(&m, CLOCK_PAGE), expected);
}

#[test]
fn whatever_a_guest_wrote_to_its_clock_the_next_disruption_shows() {
    if !kvm() {
        return;
    }
    let m = counter(&[]);
    let clock = [CLOCK_HEAD, &[0xff; 100]].concat();
    m.ram().memory().write_slice(&clock, CLOCK_PAGE).unwrap();
    let paused = m.pause().unwrap();
    assert!(paused.disrupt_clock(Disruption::Copied).unwrap());
    assert_eq!(numbers(m.vmclock().unwrap().unwrap()), (0, 0, 0));
    // Nor is a page a clock that does not begin as one does.
    for at in 0..12 {
        let mut head = CLOCK_HEAD.to_vec();
        head[at] ^= 1;
        m.ram().memory().write_slice(&head, CLOCK_PAGE).unwrap();
        let before = bytes::<0x78>(&m, CLOCK_PAGE);
        assert!(!paused.disrupt_clock(Disruption::Copied).unwrap());
        assert_eq!(m.vmclock().unwrap(), None);
        assert_eq!(bytes::<0x78>(&m, CLOCK_PAGE), before);
    }
}
