//! Port I/O.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ferry_vmm::machine::Machine;

use crate::support::{copy_memory, eventually, kvm, machine};

/// ```text
///    xor ebx, ebx
/// 1: mov edx, 0x3f8
///    mov eax, ebx
///    out dx, al       ; the byte
///    mov edx, 0x3ff
///    out dx, al       ; to the scratch register
///    xor eax, eax
///    in al, dx        ; and back
///    cmp al, bl
///    jne 2f
///    inc bl
///    jmp 1b
/// 2: ud2
/// ```
const TALK: [u8; 29] = [
    0x31, 0xdb, 0xba, 0xf8, 0x03, 0x00, 0x00, 0x89, 0xd8, 0xee, 0xba, 0xff, 0x03, 0x00, 0x00, 0xee,
    0x31, 0xc0, 0xec, 0x38, 0xd8, 0x75, 0x04, 0xfe, 0xc3, 0xeb, 0xe7, 0x0f, 0x0b,
];

/// Takes bytes that count up from 0, and counts those that do not.
#[derive(Clone, Default)]
struct Sequence {
    bytes: Arc<AtomicU64>,
    wrong: Arc<AtomicU64>,
}

impl Sequence {
    fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::SeqCst)
    }

    fn check(&self) {
        assert_eq!(
            self.wrong.load(Ordering::SeqCst),
            0,
            "bytes lost or doubled"
        );
    }
}

impl Write for Sequence {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        for byte in buf {
            let n = self.bytes.fetch_add(1, Ordering::SeqCst);
            if n % 256 != u64::from(*byte) {
                self.wrong.fetch_add(1, Ordering::SeqCst);
            }
        }
        Ok(buf.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_thousand_pauses_lose_no_byte_and_no_access() {
    if !kvm() {
        return;
    }
    let out = Sequence::default();
    let m = machine(Machine::builder().serial(Box::new(out.clone())), &TALK);
    m.resume().unwrap();
    for i in 0..1000u64 {
        // Not always at the same place of the guest's loop.
        std::thread::sleep(Duration::from_micros(i * 7 % 200));
        let paused = m.pause().unwrap();
        let bytes = out.bytes();
        paused.resume().unwrap();
        if i % 50 == 0 {
            eventually("another byte", &m, || out.bytes() > bytes);
        }
    }
    assert_eq!(
        m.exit_reason(),
        None,
        "every byte came back from the scratch register"
    );
    out.check();
}

#[test]
fn moving_in_the_middle_of_port_accesses_loses_none() {
    if !kvm() {
        return;
    }
    let out = Sequence::default();
    let mut m = machine(Machine::builder().serial(Box::new(out.clone())), &TALK);
    m.resume().unwrap();
    for i in 0..10u64 {
        let bytes = out.bytes();
        eventually("another byte", &m, || out.bytes() > bytes + i);
        let paused = m.pause().unwrap();
        let state = paused.save().unwrap();
        let next = Machine::builder()
            .from_description(m.description())
            .serial(Box::new(out.clone()))
            .build()
            .unwrap();
        copy_memory(&m, &next);
        next.pause().unwrap().restore(&state).unwrap();
        paused.keep_paused();
        m = next;
        m.resume().unwrap();
    }
    let bytes = out.bytes();
    eventually("another byte", &m, || out.bytes() > bytes);
    out.check();
}

#[test]
fn input_is_only_taken_by_a_running_guest() {
    if !kvm() {
        return;
    }
    let m = machine(Machine::builder(), &TALK);
    assert_eq!(m.serial_input(b"x"), 0);
    m.resume().unwrap();
    assert_eq!(m.serial_input(b"hello"), 5);
}
