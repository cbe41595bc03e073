//! A machine over the memory of another: nothing there changes before it is resumed, and one of the
//! two runs.

use ferry_vmm::machine::{Machine, MachineState, ResumeError};

use crate::support::{COUNT, COUNTER, kvm, machine, progresses, read};

/// All memory.
fn contents(m: &Machine) -> Vec<u8> {
    let mut page = [0; 4096];
    let mut bytes = Vec::new();
    for region in m.ram().regions() {
        for gfn in region.first_gfn..region.end_gfn() {
            m.ram().copy_page(gfn, &mut page).unwrap();
            bytes.extend_from_slice(&page);
        }
    }
    bytes
}

fn taking_over(m: &Machine) -> Machine {
    Machine::builder()
        .from_description(m.description())
        .shared_memory(m.ram().share().unwrap())
        .build()
        .unwrap()
}

#[test]
fn a_guest_goes_on_in_the_same_memory_without_a_copy() {
    if !kvm() {
        return;
    }
    let mut m = machine(Machine::builder(), &COUNT);
    m.resume().unwrap();
    for _ in 0..3 {
        progresses(&m, COUNTER);
        let next = taking_over(&m);
        let paused = m.pause().unwrap();
        let before = contents(&m);
        let bytes = paused.save().unwrap().to_bytes().unwrap();
        let state = MachineState::from_bytes(&bytes).unwrap();
        let restored = next.pause().unwrap();
        restored.restore(&state).unwrap();
        restored.keep_paused();
        assert!(
            before == contents(&m),
            "building and restoring write nothing"
        );
        // Not committed: the source's guest is the source's.
        assert!(matches!(next.resume(), Err(ResumeError::Memory(_))));
        m.ram().give_up().unwrap();
        next.resume().unwrap();
        progresses(&next, COUNTER);
        assert!(matches!(paused.resume(), Err(ResumeError::Memory(_))));
        let count = read(&next, COUNTER);
        drop(m);
        m = next;
        progresses(&m, COUNTER);
        assert!(read(&m, COUNTER) >= count);
    }
}

/// A hand-over that fails before the commit: the source goes on, and what the destination restored
/// is void.
#[test]
fn a_source_that_resumes_keeps_its_guest() {
    if !kvm() {
        return;
    }
    let m = machine(Machine::builder(), &COUNT);
    m.resume().unwrap();
    progresses(&m, COUNTER);
    let next = taking_over(&m);
    let paused = m.pause().unwrap();
    let state = paused.save().unwrap();
    let restored = next.pause().unwrap();
    restored.restore(&state).unwrap();
    restored.keep_paused();
    drop(paused);
    progresses(&m, COUNTER);
    drop(m);
    let Err(ResumeError::Memory(why)) = next.resume() else {
        panic!("it runs on memory that is newer than its state");
    };
    assert!(why.contains("has run the guest since"), "{why}");
}
