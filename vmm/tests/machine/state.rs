//! Saving on one machine, going on on another.

use ferry_vmm::machine::{Machine, MachineState, RestoreMachineError, UnfitHost};

use crate::support::{COUNTER, MIB, copy_memory, kvm, machine, progresses, read};

/// Counts in an integer and in an SSE register at once, and faults when they differ.
///
/// ```text
///    mov eax, 1
///    cvtsi2sd xmm14, rax
///    xorpd xmm15, xmm15
///    xor r15d, r15d
/// 1: inc r15
///    addsd xmm15, xmm14
///    cvttsd2si rax, xmm15
///    cmp rax, r15
///    jne 2f
///    mov [0x200000], r15
///    jmp 1b
/// 2: ud2
/// ```
const COUNT_TWICE: [u8; 48] = [
    0xb8, 0x01, 0x00, 0x00, 0x00, 0xf2, 0x4c, 0x0f, 0x2a, 0xf0, 0x66, 0x45, 0x0f, 0x57, 0xff, 0x45,
    0x31, 0xff, 0x49, 0xff, 0xc7, 0xf2, 0x45, 0x0f, 0x58, 0xfe, 0xf2, 0x49, 0x0f, 0x2c, 0xc7, 0x4c,
    0x39, 0xf8, 0x75, 0x0a, 0x4c, 0x89, 0x3c, 0x25, 0x00, 0x00, 0x20, 0x00, 0xeb, 0xe4, 0x0f, 0x0b,
];

#[test]
fn a_guest_goes_on_in_another_machine_without_a_seam() {
    if !kvm() {
        return;
    }
    let mut m = machine(Machine::builder().name("traveller"), &COUNT_TWICE);
    // CR4.OSFXSR is off at entry; the guest needs it for SSE, and ring 3 cannot set it.
    enable_sse(&m);
    m.resume().unwrap();
    for _ in 0..5 {
        progresses(&m, COUNTER);
        let paused = m.pause().unwrap();
        let count = read(&m, COUNTER);
        let bytes = paused.save().unwrap().to_bytes().unwrap();
        paused.keep_paused();
        let state = MachineState::from_bytes(&bytes).unwrap();
        m.description().check_host().unwrap();
        let next = Machine::builder()
            .from_description(m.description())
            .build()
            .unwrap();
        assert_eq!(next.description(), m.description());
        copy_memory(&m, &next);
        let restored = next.pause().unwrap();
        for msr in restored.restore(&state).unwrap().skipped_msrs {
            println!("skipped {msr:x?}");
        }
        // What was restored reads back as what was saved.
        let again = restored.save().unwrap();
        assert_eq!(again.vcpus()[0].rip(), state.vcpus()[0].rip());
        restored.keep_paused();
        drop(m);
        m = next;
        assert_eq!(read(&m, COUNTER), count);
        m.resume().unwrap();
        progresses(&m, COUNTER);
        assert!(read(&m, COUNTER) > count);
    }
    assert_eq!(
        m.exit_reason(),
        None,
        "the integer and the SSE register agree"
    );
}

/// Replaces the ring-0 part by one that sets CR4.OSFXSR first.
///
/// ```text
/// mov rax, cr4
/// or eax, 0x600
/// mov cr4, rax
/// ```
fn enable_sse(m: &Machine) {
    let mut ring0 = vec![
        0x0f, 0x20, 0xe0, 0x0d, 0x00, 0x06, 0x00, 0x00, 0x0f, 0x22, 0xe0,
    ];
    ring0.extend(crate::support::TO_RING_3);
    m.apply(&crate::support::image(&ring0, &COUNT_TWICE))
        .unwrap();
}

#[test]
fn damaged_states_are_refused_and_never_panic() {
    if !kvm() {
        return;
    }
    let m = machine(Machine::builder(), &COUNT_TWICE);
    let paused = m.pause().unwrap();
    let good = paused.save().unwrap().to_bytes().unwrap();
    println!("the state of one vCPU has {} bytes", good.len());
    for len in (0..good.len()).step_by(37) {
        assert!(MachineState::from_bytes(&good[..len]).is_err());
    }
    for at in (0..good.len()).step_by(13) {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        assert!(MachineState::from_bytes(&bad).is_err(), "byte {at}");
        // With the checksum made right, it is an error or a state that KVM judges.
        let crc = crc32c::crc32c(&bad[24..]);
        bad[20..24].copy_from_slice(&crc.to_le_bytes());
        if let Ok(state) = MachineState::from_bytes(&bad) {
            let _ = paused.restore(&state);
        }
    }
}

#[test]
fn another_machines_state_is_refused() {
    if !kvm() {
        return;
    }
    let one = machine(Machine::builder(), &COUNT_TWICE);
    let two = Machine::builder().memory(MIB).cpus(2).build().unwrap();
    let state = one.pause().unwrap().save().unwrap();
    let error = two.pause().unwrap().restore(&state).unwrap_err();
    assert!(
        matches!(error, RestoreMachineError::Cpus { saved: 1, here: 2 }),
        "{error}"
    );
}

#[test]
fn a_host_without_the_guests_features_says_which() {
    if !kvm() {
        return;
    }
    let m = machine(Machine::builder(), &COUNT_TWICE);
    let mut description = m.description().clone();
    for entry in description
        .cpuid
        .iter_mut()
        .filter(|e| e.function == 7 && e.index == 0)
    {
        entry.ebx |= 1 << 26 | 1 << 22; // avx512pf, which no host has together with SVM or on this list
    }
    let error = description.check_host().unwrap_err();
    assert!(matches!(error, UnfitHost::Features(_)), "{error}");
    assert!(error.to_string().contains("ebx bit 22"), "{error}");
    // Memory is checked where it is allocated: a hand-over needs none.
    let built = Machine::builder().memory(1 << 41).build();
    let error = built.err().unwrap().to_string();
    assert!(error.contains("available"), "{error}");
}
