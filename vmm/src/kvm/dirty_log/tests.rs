//! All kinds of log, and rings, on one KVM, by hiding what it has. `tests/machine/dirty.rs` has the
//! log of this host under a running guest.

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::boot::{Entry, Gdt};
use crate::kvm::{Host, Vcpu, VmExit};
use crate::memory::{Backing, GuestRam, PAGE_SIZE};
use ferry_devices::bus::Bus;

const PAGES: u64 = 512;
/// `inc dword ptr [ebx]; out 0x80, al; jmp .`
const CODE: [u8; 6] = [0xff, 0x03, 0xe6, 0x80, 0xeb, 0xfe];

fn vm(flags: u32, ring: u32) -> Option<(Arc<Vm>, Vcpu)> {
    let mut host = match Host::open() {
        Ok(host) => host,
        Err(error) => {
            eprintln!("NOT RUN: the dirty log's kinds: {error}");
            return None;
        }
    };
    host.hide_dirty_log_flags(!flags);
    let ram = Arc::new(GuestRam::new(PAGES * PAGE_SIZE, Backing::Small).unwrap());
    ram.memory()
        .write_slice(&CODE, GuestAddress(0x1000))
        .unwrap();
    let vm = Arc::new(Vm::with_dirty_rings(&host, ram, ring).unwrap());
    let cpuid = host.guest_cpuid().unwrap();
    let vcpu = vm.create_vcpu(0, 1, &cpuid).unwrap();
    Some((vm, vcpu))
}

fn guest_writes(vcpu: &mut Vcpu, page: u64) {
    let ebx = u32::try_from(page * PAGE_SIZE).unwrap();
    let gdt = Gdt { base: 0, limit: 0 };
    vcpu.set_entry(&Entry::Protected32 {
        eip: 0x1000,
        ebx,
        gdt,
    })
    .unwrap();
    let bus = Bus::new();
    assert_eq!(vcpu.run(&bus, &bus), VmExit::Handled);
    // The write to the port is complete only now.
    vcpu.kicker().kick();
    assert_eq!(vcpu.run(&bus, &bus), VmExit::Interrupted);
    vcpu.kicker().release();
}

fn dirty(log: &DirtyLog) -> Vec<u64> {
    let mut pages = Vec::new();
    log.collect(|first, words| {
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

#[test]
fn all_kinds_of_log_say_the_same() {
    let manual = kvm_bindings::KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE;
    let initially_set = manual | KVM_DIRTY_LOG_INITIALLY_SET;
    for (flags, ring, kind) in [
        (0, 0, DirtyLogKind::Plain),
        (manual, 0, DirtyLogKind::Manual),
        (initially_set, 0, DirtyLogKind::ManualInitiallySet),
        // Whatever the log could do: a VM has one of them.
        (initially_set, 1024, DirtyLogKind::Ring(1024)),
    ] {
        let Some((vm, mut vcpu)) = vm(flags, ring) else {
            return;
        };
        let log = DirtyLog::new(vm.clone());
        if log.kind() != kind {
            eprintln!("NOT RUN: this KVM has no dirty log of kind {kind:?}");
            continue;
        }
        guest_writes(&mut vcpu, 300);
        log.start().unwrap();
        let all: Vec<u64> = (0..PAGES).collect();
        assert_eq!(dirty(&log), all, "{kind:?}");
        log.clear(0, &[u64::MAX; 8]).unwrap();
        assert!(dirty(&log).is_empty(), "{kind:?}");
        for page in [63, 64, 500] {
            guest_writes(&mut vcpu, page);
        }
        vm.ram()
            .memory()
            .write_slice(&[1], GuestAddress(70 * PAGE_SIZE))
            .unwrap();
        assert_eq!(dirty(&log), [63, 64, 70, 500], "{kind:?}");
        assert_eq!(
            dirty(&log),
            [63, 64, 70, 500],
            "{kind:?}: collecting clears nothing"
        );
        log.clear(64, &[1 << 6]).unwrap();
        assert_eq!(dirty(&log), [63, 64, 500], "{kind:?}");
        log.clear(0, &[u64::MAX; 8]).unwrap();
        guest_writes(&mut vcpu, 500);
        assert_eq!(dirty(&log), [500], "{kind:?}: dirty again");
        log.stop().unwrap();
        guest_writes(&mut vcpu, 1);
        assert!(matches!(log.collect(|_, _| ()), Err(DirtyLogError::Off)));
    }
}

/// Pages that were reported and not taken when the tracking ended are not dirty in the next one.
#[test]
fn a_ring_forgets_what_an_earlier_migration_left() {
    let Some((vm, mut vcpu)) = vm(0, 1024) else {
        return;
    };
    let log = DirtyLog::new(vm.clone());
    if log.kind() == DirtyLogKind::Plain {
        eprintln!("NOT RUN: this KVM has no dirty ring");
        return;
    }
    for page in [10, 20, 30] {
        log.start().unwrap();
        log.clear(0, &[u64::MAX; 8]).unwrap();
        guest_writes(&mut vcpu, page);
        // Not collected. The VM is told to report no more, past the log, so that this stays in the
        // ring.
        vm.log_dirty_pages(false).unwrap();
        guest_writes(&mut vcpu, page + 1);
        log.stop().unwrap();
        log.start().unwrap();
        log.clear(0, &[u64::MAX; 8]).unwrap();
        assert!(dirty(&log).is_empty(), "{page}");
        guest_writes(&mut vcpu, page);
        assert_eq!(dirty(&log), [page]);
        log.stop().unwrap();
    }
}
