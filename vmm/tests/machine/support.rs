//! Guests and the machine around them.

use std::path::Path;
use std::time::{Duration, Instant};

use ferry_vmm::boot::{BootImage, Entry, Gdt, MemoryWrite, WriteData};
use ferry_vmm::kvm::Host;
use ferry_vmm::machine::{Builder, Exit, Machine};
use vm_memory::{Bytes, GuestAddress};

pub const MIB: u64 = 1 << 20;
/// Where the guests count.
pub const COUNTER: u64 = 0x20_0000;

/// ```text
/// mov eax, 0x38    ; the TSS
/// ltr ax
/// push 0x2b        ; SS
/// push 0x80000     ; RSP
/// push 0x3002      ; RFLAGS: IOPL 3, interrupts off
/// push 0x33        ; CS
/// push 0x100000    ; RIP
/// iretq
/// ```
pub const TO_RING_3: [u8; 29] = [
    0xb8, 0x38, 0x00, 0x00, 0x00, 0x0f, 0x00, 0xd8, 0x6a, 0x2b, 0x68, 0x00, 0x00, 0x08, 0x00, 0x68,
    0x02, 0x30, 0x00, 0x00, 0x6a, 0x33, 0x68, 0x00, 0x00, 0x10, 0x00, 0x48, 0xcf,
];

/// ```text
/// 1: inc qword ptr [0x200000]
///    jmp 1b
/// ```
pub const COUNT: [u8; 10] = [0x48, 0xff, 0x04, 0x25, 0x00, 0x00, 0x20, 0x00, 0xeb, 0xf6];

/// Whether this host can run guests; says loudly if not.
pub fn kvm() -> bool {
    match Host::open() {
        Ok(_) => true,
        Err(error) => {
            let test = std::thread::current().name().unwrap_or("?").to_owned();
            eprintln!("NOT RUN: {test}: {error}");
            assert!(
                !Path::new("/dev/kvm").exists()
                    || matches!(error, ferry_vmm::kvm::OpenError::Permission { .. }),
                "there is a KVM, but it cannot be used: {error}"
            );
            false
        }
    }
}

fn bytes(address: u64, bytes: Vec<u8>) -> MemoryWrite {
    MemoryWrite {
        address,
        data: WriteData::Bytes(bytes),
    }
}

/// `ring0` runs at 0xf000 in ring 0 and is expected to enter `ring3`, at 1 MiB.
pub fn image(ring0: &[u8], ring3: &[u8]) -> BootImage {
    // Present, writable, user, accessed, dirty: the processor then has no reason to write to the
    // tables, and only the pages that the guest writes are dirtied.
    const TABLE: u64 = 0x27;
    const LARGE_PAGE: u64 = 0xe7;
    let mut tables = vec![0u64; 3 * 512];
    tables[0] = 0xa000 | TABLE;
    tables[512] = 0xb000 | TABLE;
    for (i, entry) in (0u64..512).zip(&mut tables[1024..]) {
        *entry = i << 21 | LARGE_PAGE;
    }
    let gdt: [u64; 9] = [
        0,
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0,
        0x00cf_f300_0000_ffff, // 0x2b
        0x00af_fb00_0000_ffff, // 0x33
        0x0000_8900_1000_00e8, // 0x38: the TSS at 0x1000
        0,
    ];
    // Ports below 0x400 are free to ring 3 by the TSS as well: a software KVM that runs ring 3
    // natively may run it with IOPL 0.
    let mut tss = vec![0; 0xe9];
    tss[0x66] = 0x68;
    tss[0xe8] = 0xff;
    let flat = |words: &[u64]| {
        words
            .iter()
            .flat_map(|w| w.to_le_bytes())
            .collect::<Vec<u8>>()
    };
    BootImage {
        entry: Entry::Long64 {
            rip: 0xf000,
            rsi: 0,
            rsp: 0x8_0000,
            cr3: 0x9000,
            gdt: Gdt {
                base: 0x500,
                limit: 9 * 8 - 1,
            },
        },
        writes: vec![
            bytes(0x500, flat(&gdt)),
            bytes(0x1000, tss),
            bytes(0x9000, flat(&tables)),
            bytes(0xf000, ring0.to_vec()),
            bytes(0x10_0000, ring3.to_vec()),
        ],
    }
}

/// A machine of 16 MiB that runs `ring3`.
pub fn machine(builder: Builder, ring3: &[u8]) -> Machine {
    let machine = builder.memory(16 * MIB).build().unwrap();
    machine.apply(&image(&TO_RING_3, ring3)).unwrap();
    machine
}

pub fn read(machine: &Machine, address: u64) -> u64 {
    machine
        .ram()
        .memory()
        .read_obj(GuestAddress(address))
        .unwrap()
}

/// Copies all memory, as a migration would.
pub fn copy_memory(from: &Machine, to: &Machine) {
    let mut page = vec![0; 4096];
    for region in from.ram().regions() {
        for gfn in region.first_gfn..region.end_gfn() {
            let at = GuestAddress(gfn * 4096);
            from.ram().memory().read_slice(&mut page, at).unwrap();
            if page.iter().any(|b| *b != 0) {
                to.ram().memory().write_slice(&page, at).unwrap();
            }
        }
    }
}

/// Waits until `condition` holds; a minute is for machines that are busy with something else.
pub fn eventually(what: &str, machine: &Machine, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        if let Some(exit) = machine.exit_reason() {
            panic!("waiting for {what}, but the machine ended: {exit}");
        }
        assert!(Instant::now() < deadline, "{what} did not happen");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Waits until the counter at `address` moves on.
pub fn progresses(machine: &Machine, address: u64) {
    let before = read(machine, address);
    eventually("progress of the guest", machine, || {
        read(machine, address) != before
    });
}

/// The end of a machine that is expected to end.
pub fn ends(machine: &Machine) -> Exit {
    machine
        .wait_timeout(Duration::from_secs(60))
        .expect("the machine ends")
}
