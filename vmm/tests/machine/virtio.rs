//! A guest in ring 3 that drives a virtio disk by itself: registers, ring, notifications, and no
//! interrupt.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use ferry_devices::block::Disk;
use ferry_vmm::boot::{MemoryWrite, WriteData};
use ferry_vmm::machine::{Backends, Builder, DiskOptions, Machine, MachineState, ResumeError};
use tempfile::NamedTempFile;
use vm_memory::{Bytes, GuestAddress};

use crate::absent::{fault, take_memory, thread_name};
use crate::support::{
    COUNTER, MIB, TO_RING_3, copy_memory, eventually, image, kvm, progresses, read,
};

/// Writes to registers as a table at 0x300000 says, then writes the sector at 0x200000 to the disk,
/// counts in it, and so on.
///
/// ```text
///    mov esi, 0x300000
/// 1: mov rdi, [rsi]
///    test rdi, rdi
///    jz 2f
///    mov eax, [rsi + 8]
///    mov [rdi], eax
///    add rsi, 16
///    jmp 1b
/// 2: xor ebx, ebx
///    mov edi, 0xd0000050      ; QueueNotify
///    xor ecx, ecx
/// 3: inc ebx
///    mov [0x401002], bx       ; the available ring's index
///    mov [rdi], ecx
/// 4: mov ax, [0x402002]       ; the used ring's
///    cmp ax, bx
///    jne 4b
///    inc qword ptr [0x200000]
///    jmp 3b
/// ```
const WRITER: [u8; 68] = [
    0xbe, 0x00, 0x00, 0x30, 0x00, 0x48, 0x8b, 0x3e, 0x48, 0x85, 0xff, 0x74, 0x0b, 0x8b, 0x46, 0x08,
    0x89, 0x07, 0x48, 0x83, 0xc6, 0x10, 0xeb, 0xed, 0x31, 0xdb, 0xbf, 0x50, 0x00, 0x00, 0xd0, 0x31,
    0xc9, 0xff, 0xc3, 0x66, 0x89, 0x1c, 0x25, 0x02, 0x10, 0x40, 0x00, 0x89, 0x0f, 0x66, 0x8b, 0x04,
    0x25, 0x02, 0x20, 0x40, 0x00, 0x66, 0x39, 0xc3, 0x75, 0xf3, 0x48, 0xff, 0x04, 0x25, 0x00, 0x00,
    0x20, 0x00, 0xeb, 0xdd,
];

const REGISTERS: u64 = 0xd000_0000;
const DESCRIPTORS: u32 = 0x40_0000;
const AVAILABLE: u32 = 0x40_1000;
const USED: u32 = 0x40_2000;
pub const HEADER: u32 = 0x40_3000;
const STATUS: u32 = 0x40_3100;

pub fn disk() -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    file
}

pub fn backends(path: &Path) -> Backends {
    Backends {
        disks: vec![DiskOptions::new(path, false)],
        ..Backends::default()
    }
}

/// What the disk's first sector counts.
fn counted(path: &Path) -> u64 {
    let mut bytes = [0; 8];
    File::open(path)
        .unwrap()
        .read_exact_at(&mut bytes, 0)
        .unwrap();
    u64::from_le_bytes(bytes)
}

/// A machine that runs [`WRITER`] on its first virtio device.
pub fn writer(builder: Builder) -> Machine {
    let chain = [
        descriptor(HEADER, 16, 1, 1),
        descriptor(u32::try_from(COUNTER).unwrap(), 512, 1, 2),
        descriptor(STATUS, 1, 2, 0),
    ]
    .concat();
    let mut header = [0; 16];
    header[0] = 1;
    let buffers = vec![
        (HEADER.into(), header.to_vec()),
        (STATUS.into(), vec![0xff]),
    ];
    driver(builder, 0, chain, buffers)
}

pub fn descriptor(address: u32, len: u32, flags: u16, next: u16) -> Vec<u8> {
    let (address, len) = (u64::from(address).to_le_bytes(), len.to_le_bytes());
    [
        &address[..],
        &len,
        &flags.to_le_bytes(),
        &next.to_le_bytes(),
    ]
    .concat()
}

/// A machine whose guest offers one chain of descriptors to a queue of its first virtio device,
/// again and again, and counts.
pub fn driver(
    builder: Builder,
    queue: u8,
    chain: Vec<u8>,
    buffers: Vec<(u64, Vec<u8>)>,
) -> Machine {
    let registers = [
        (0x70, 0),
        (0x70, 1),
        (0x70, 3),
        (0x24, 1),
        // VIRTIO_F_VERSION_1, and no other: without flushes each write goes to the disk at once.
        (0x20, 1),
        (0x70, 11),
        (0x30, queue.into()),
        (0x38, 8),
        (0x80, DESCRIPTORS),
        (0x90, AVAILABLE),
        (0xa0, USED),
        (0x44, 1),
        (0x70, 15),
    ];
    let table: Vec<u8> = registers
        .iter()
        .map(|(offset, value)| (REGISTERS + offset, u64::from(*value)))
        .chain([(0, 0)])
        .flat_map(|(address, value)| [address.to_le_bytes(), value.to_le_bytes()].concat())
        .collect();
    // Page tables for the fourth GiB beside those for the first.
    let tables: Vec<u8> = (0u64..512)
        .flat_map(|i| (3 << 30 | i << 21 | 0xf7).to_le_bytes())
        .collect();
    // After `xor ecx, ecx`, `inc ecx` as often as it takes: jumps before and after are within their
    // parts.
    let (before, after) = WRITER.split_at(33);
    let select = [0xff, 0xc1].repeat(queue.into());
    let mut image = image(&TO_RING_3, &[before, &select, after].concat());
    let own = [
        (0xa018, 0xc027u64.to_le_bytes().to_vec()),
        (0xc000, tables),
        (0x30_0000, table),
        (DESCRIPTORS.into(), chain),
    ];
    for (address, bytes) in own.into_iter().chain(buffers) {
        let data = WriteData::Bytes(bytes);
        image.writes.push(MemoryWrite { address, data });
    }
    let machine = builder.memory(16 * MIB).build().unwrap();
    machine.apply(&image).unwrap();
    machine
}

pub fn status(machine: &Machine) -> u8 {
    let at = GuestAddress(STATUS.into());
    machine.ram().memory().read_obj(at).unwrap()
}

#[test]
fn a_guest_writes_to_its_disk_and_goes_on_elsewhere() {
    if !kvm() {
        return;
    }
    let file = disk();
    let mut m = writer(Machine::builder().devices(backends(file.path())));
    m.resume().unwrap();
    for _ in 0..10 {
        progresses(&m, COUNTER);
        let paused = m.pause().unwrap();
        let count = read(&m, COUNTER);
        // The request that counts to `count` is done or not; one that was begun is not half done.
        let on_disk = counted(file.path());
        assert!(
            on_disk == count || on_disk + 1 == count,
            "{on_disk} {count}"
        );
        assert_eq!(status(&m), 0);
        let bytes = paused.save().unwrap().to_bytes().unwrap();
        let state = MachineState::from_bytes(&bytes).unwrap();
        // Built and restored while the source still owns the disk; run only when it has given it
        // up.
        let next = Machine::builder()
            .from_description(m.description())
            .devices(backends(file.path()))
            .build()
            .unwrap();
        copy_memory(&m, &next);
        let restored = next.pause().unwrap();
        restored.restore(&state).unwrap();
        assert!(matches!(restored.resume(), Err(ResumeError::Disk(_))));
        m.release_disks().unwrap();
        paused.keep_paused();
        next.resume().unwrap();
        assert!(
            matches!(m.resume(), Err(ResumeError::Disk(_))),
            "it runs twice"
        );
        m = next;
        progresses(&m, COUNTER);
        eventually("the write reaches the disk", &m, || {
            counted(file.path()) > count
        });
    }
}

#[test]
fn a_disk_in_use_leaves_the_locks_of_the_others() {
    if !kvm() {
        return;
    }
    let (first, second) = (disk(), disk());
    let both = || {
        let mut both = backends(first.path());
        both.disks.extend(backends(second.path()).disks);
        both
    };
    let source = Machine::builder()
        .memory(MIB)
        .devices(both())
        .build()
        .unwrap();
    let destination = Machine::builder()
        .from_description(source.description())
        .devices(both())
        .build()
        .unwrap();
    source.release_disks().unwrap();
    let theft = Disk::open(second.path(), false).unwrap();
    theft.lock().unwrap();
    assert!(matches!(destination.resume(), Err(ResumeError::Disk(_))));
    theft.unlock().unwrap();
    // The guest that did not start there can run here again.
    source.resume().unwrap();
}

#[test]
fn pauses_and_resumes_lose_no_request() {
    if !kvm() {
        return;
    }
    let file = disk();
    let m = writer(Machine::builder().devices(backends(file.path())));
    m.resume().unwrap();
    for _ in 0..200 {
        let paused = m.pause().unwrap();
        let count = read(&m, COUNTER);
        let on_disk = counted(file.path());
        assert!(
            count == 0 || on_disk == count || on_disk + 1 == count,
            "{on_disk} {count}"
        );
        drop(paused);
    }
    progresses(&m, COUNTER);
}

#[test]
fn what_a_device_writes_is_in_the_dirty_log() {
    if !kvm() {
        return;
    }
    let file = disk();
    let m = writer(Machine::builder().devices(backends(file.path())));
    m.resume().unwrap();
    progresses(&m, COUNTER);
    m.dirty_log().start().unwrap();
    let page = u64::from(USED) / 4096;
    // The guest only reads this page.
    let dirty = || {
        let mut found = false;
        let look = |first: u64, words: &[u64]| {
            let bit = page - first;
            found |= words[usize::try_from(bit / 64).unwrap()] >> (bit % 64) & 1 == 1;
        };
        m.dirty_log().collect(look).unwrap();
        found
    };
    for _ in 0..5 {
        assert!(dirty());
        m.dirty_log()
            .clear(0, &vec![u64::MAX; 16 * 256 / 64])
            .unwrap();
        progresses(&m, COUNTER);
        progresses(&m, COUNTER);
    }
}

/// The device reads rings, a header and data that have not arrived, as the guest after a post-copy
/// has them.
#[test]
fn a_device_waits_for_memory_that_has_not_arrived() {
    if !kvm() {
        return;
    }
    let file = disk();
    let m = writer(Machine::builder().devices(backends(file.path())));
    m.resume().unwrap();
    progresses(&m, COUNTER);
    m.pause().unwrap().keep_paused();
    let before = read(&m, COUNTER);
    let Some((userfault, source)) = take_memory(&m) else {
        return;
    };
    let (mut served, mut threads) = (BTreeSet::new(), BTreeSet::new());
    std::thread::scope(|s| {
        let server = s.spawn(|| {
            while let Some(fault) = fault(&userfault) {
                served.insert(fault.gfn);
                threads.extend(fault.thread.map(thread_name));
                source.serve(&userfault, fault.gfn);
            }
        });
        m.resume().unwrap();
        eventually("more requests", &m, || read(&m, COUNTER) > before + 10);
        userfault.interrupt().unwrap();
        server.join().unwrap();
    });
    println!("asked for pages {served:x?}, by {threads:?}");
    // Only the device reads these.
    for page in [DESCRIPTORS / 4096, HEADER / 4096] {
        assert!(served.contains(&u64::from(page)), "page {page:#x}");
    }
    assert!(
        threads.iter().any(|name| name.starts_with("virtio")),
        "{threads:?}"
    );
    drop(userfault);
    let paused = m.pause().unwrap();
    let (count, on_disk) = (read(&m, COUNTER), counted(file.path()));
    assert!(
        on_disk == count || on_disk + 1 == count,
        "{on_disk} {count}"
    );
    assert_eq!(status(&m), 0);
    drop(paused);
}

#[test]
fn devices_that_cannot_be_are_refused_with_a_sentence() {
    if !kvm() {
        return;
    }
    let file = disk();
    let builder = || Machine::builder().memory(MIB);
    let sentence = |b: Builder| b.build().unwrap_err().to_string();
    let first = builder().devices(backends(file.path())).build().unwrap();
    let text = sentence(builder().devices(backends(file.path())));
    assert!(text.contains("in use"), "{text}");
    let text = sentence(builder().devices(backends("/no/such.img".as_ref())));
    assert!(text.contains("/no/such.img"), "{text}");
    // Elsewhere: too few disks, or another one.
    let missing_pages = || builder().from_description(first.description());
    let text = sentence(missing_pages());
    assert!(text.contains("--disk"), "{text}");
    let other = NamedTempFile::new().unwrap();
    other.as_file().set_len(512).unwrap();
    let text = sentence(missing_pages().devices(backends(other.path())));
    assert!(text.contains("512 bytes"), "{text}");
    // A CPU that the guest does not count on, unless an operator insists.
    let mut strange = first.description().clone();
    strange
        .cpuid
        .iter_mut()
        .filter(|e| e.function == 7)
        .for_each(|e| e.edx |= 1 << 29);
    strange.arch_capabilities = Some(1 << 62);
    let strange = |insist| {
        builder().from_description(&strange).devices(Backends {
            insist,
            ..backends(file.path())
        })
    };
    let text = sentence(strange(false));
    assert!(
        text.contains("bit 62") && text.contains("--force"),
        "{text}"
    );
    strange(true).build().unwrap();
    // And states of machines with other devices.
    let state = first.pause().unwrap().save().unwrap();
    let plain = builder().build().unwrap();
    let text = plain
        .pause()
        .unwrap()
        .restore(&state)
        .unwrap_err()
        .to_string();
    assert!(text.contains("1 virtio devices"), "{text}");
    let many = Backends {
        disks: vec![backends(file.path()).disks[0].clone(); 14],
        ..Backends::default()
    };
    drop(first);
    let text = sentence(builder().devices(many));
    assert!(text.contains("at most 13"), "{text}");
}
