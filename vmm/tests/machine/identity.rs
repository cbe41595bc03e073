//! A copy that is told that it is one.

use ferry_vmm::machine::{GenerationId, Machine};
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

fn page(machine: &Machine) -> [u8; 48] {
    let mut bytes = [0; 48];
    machine.ram().memory().read_slice(&mut bytes, PAGE).unwrap();
    bytes
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
