//! Two vCPUs.

use ferry_vmm::boot::{MemoryWrite, WriteData};
use ferry_vmm::machine::Machine;

use crate::support::{COUNT, COUNTER, MIB, TO_RING_3, copy_memory, image, kvm, progresses, read};

/// Where the second vCPU counts.
const AP_COUNTER: u64 = 0x7000;

/// ```text
/// mov ecx, 0x1b        ; IA32_APIC_BASE: x2APIC
/// rdmsr
/// or eax, 0xc00
/// wrmsr
/// xor edx, edx
/// mov ecx, 0x830       ; ICR: INIT, then SIPI to 0x8000, to all others
/// mov eax, 0xc4500
/// wrmsr
/// mov eax, 0xc4608
/// wrmsr
/// ```
const WAKE_OTHERS: [u8; 35] = [
    0xb9, 0x1b, 0x00, 0x00, 0x00, 0x0f, 0x32, 0x0d, 0x00, 0x0c, 0x00, 0x00, 0x0f, 0x30, 0x31, 0xd2,
    0xb9, 0x30, 0x08, 0x00, 0x00, 0xb8, 0x00, 0x45, 0x0c, 0x00, 0x0f, 0x30, 0xb8, 0x08, 0x46, 0x0c,
    0x00, 0x0f, 0x30,
];

/// In real mode:
///
/// ```text
///    xor ax, ax
///    mov ds, ax
/// 1: inc dword ptr [0x7000]
///    jmp 1b
/// ```
const TRAMPOLINE: [u8; 11] = [
    0x31, 0xc0, 0x8e, 0xd8, 0x66, 0xff, 0x06, 0x00, 0x70, 0xeb, 0xf9,
];

#[test]
fn two_vcpus_start_stop_and_move_together() {
    if !kvm() {
        return;
    }
    let mut m = Machine::builder().memory(16 * MIB).cpus(2).build().unwrap();
    let mut ring0 = WAKE_OTHERS.to_vec();
    ring0.extend(TO_RING_3);
    let mut boot = image(&ring0, &COUNT);
    boot.writes.push(MemoryWrite {
        address: 0x8000,
        data: WriteData::Bytes(TRAMPOLINE.to_vec()),
    });
    m.apply(&boot).unwrap();
    // Before it runs: the second vCPU's wait for INIT must move too.
    for _ in 0..3 {
        let paused = m.pause().unwrap();
        let counts = [read(&m, COUNTER), read(&m, AP_COUNTER)];
        std::thread::sleep(std::time::Duration::from_millis(2));
        assert_eq!(counts, [read(&m, COUNTER), read(&m, AP_COUNTER)]);
        let state = paused.save().unwrap();
        paused.keep_paused();
        let next = Machine::builder()
            .from_description(m.description())
            .build()
            .unwrap();
        copy_memory(&m, &next);
        next.pause().unwrap().restore(&state).unwrap();
        m = next;
        m.resume().unwrap();
        progresses(&m, COUNTER);
        progresses(&m, AP_COUNTER);
        assert_eq!(m.entries().iter().flatten().count(), 2);
    }
}
