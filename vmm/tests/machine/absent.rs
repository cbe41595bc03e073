//! A guest whose memory arrives while it runs.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use ferry_vmm::machine::{Machine, PauseError};
use ferry_vmm::memory::{Backing, Fault, GuestRam, Userfault, UserfaultError, Waited};

use crate::support::{COUNT, COUNTER, MIB, eventually, kvm, machine, progresses, read};

/// All of the guest's memory, taken away from it; says loudly where that is not allowed.
pub fn take_memory(m: &Machine) -> Option<(Userfault, Source)> {
    let mut source = Vec::new();
    for gfn in 0..m.ram().size() / 4096 {
        let mut page = [0; 4096];
        m.ram().copy_page(gfn, &mut page).unwrap();
        source.push(page);
    }
    m.ram().drop_pages(0, m.ram().size() / 4096).unwrap();
    match Userfault::register(Arc::clone(m.ram())) {
        Ok(userfault) => Some((userfault, Source(source))),
        Err(error @ (UserfaultError::Forbidden { .. } | UserfaultError::Unsupported { .. })) => {
            let test = std::thread::current().name().unwrap_or("?").to_owned();
            eprintln!("NOT RUN: {test}: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

pub struct Source(Vec<[u8; 4096]>);

impl Source {
    pub fn serve(&self, userfault: &Userfault, gfn: u64) {
        let page = &self.0[usize::try_from(gfn).unwrap()];
        userfault.place(gfn, 1, page).unwrap();
    }
}

pub fn fault(userfault: &Userfault) -> Option<Fault> {
    match userfault.wait(Duration::from_secs(60)).unwrap() {
        Waited::Fault(fault) => Some(fault),
        Waited::Interrupted => None,
        Waited::TimedOut => panic!("the guest neither faults nor ends"),
    }
}

pub fn thread_name(id: u32) -> String {
    std::fs::read_to_string(format!("/proc/self/task/{id}/comm"))
        .map_or_else(|_| "a kernel thread".into(), |name| name.trim().into())
}

/// The processor's tables, the page tables, code, stack and data all come by faults, in ring 0 and
/// in ring 3.
#[test]
fn a_guest_runs_before_its_memory_is_there() {
    if !kvm() {
        return;
    }
    let m = machine(Machine::builder(), &COUNT);
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
        eventually("the guest's count", &m, || read(&m, COUNTER) > 1000);
        userfault.interrupt().unwrap();
        server.join().unwrap();
    });
    println!("asked for pages {served:x?}, by {threads:?}");
    // GDT, page tables, code of ring 0, code of ring 3.
    for gfn in [0, 0x9, 0xa, 0xb, 0xf, 0x100, COUNTER / 4096] {
        assert!(served.contains(&gfn), "page {gfn:#x}");
    }
    assert!(served.len() < 100, "only what is touched is asked for");
    // The rest arrives, or is known to be zero, and it is a whole guest.
    for gfn in 0..4 * MIB / 4096 {
        source.serve(&userfault, gfn);
    }
    userfault.release(4 * MIB / 4096, 12 * MIB / 4096).unwrap();
    progresses(&m, COUNTER);
    drop(userfault);
    progresses(&m, COUNTER);
}

/// A vCPU that waits for a page can be paused, at once or when the page has come; in no case is
/// anything lost.
#[test]
fn a_pause_and_a_missing_page() {
    if !kvm() {
        return;
    }
    let pages = [
        ("page table", 0x9),
        ("code of ring 0", 0xf),
        ("stack of ring 0", 0x7f),
        ("code of ring 3", 0x100),
        ("data of ring 3", COUNTER / 4096),
    ];
    for (what, absent) in pages {
        let m = machine(Machine::builder(), &COUNT);
        let Some((userfault, source)) = take_memory(&m) else {
            return;
        };
        for gfn in (0..16 * MIB / 4096).filter(|gfn| *gfn != absent) {
            source.serve(&userfault, gfn);
        }
        m.resume().unwrap();
        assert_eq!(fault(&userfault).map(|f| f.gfn), Some(absent));
        let interruptible = std::thread::scope(|s| {
            let pause = s.spawn(|| m.pause().map(|paused| paused.save().map(drop)));
            let mut reports = 0;
            // A signal makes an access in kernel mode start anew, and each time it is reported
            // anew.
            while !pause.is_finished() && reports < 100 {
                let waited = userfault.wait(Duration::from_millis(10)).unwrap();
                reports += u32::from(matches!(waited, Waited::Fault(_)));
            }
            let interruptible = pause.is_finished();
            source.serve(&userfault, absent);
            match pause.join().unwrap() {
                Ok(saved) => {
                    saved.unwrap();
                    interruptible
                }
                Err(PauseError::Stuck(_)) => false,
                Err(error) => panic!("waiting for its {what}: {error}"),
            }
        });
        println!(
            "waiting for its {what}, a vCPU {}",
            if interruptible {
                "can be paused"
            } else {
                "is paused when the page has come"
            }
        );
        eventually("the guest's count", &m, || read(&m, COUNTER) > 1000);
    }
}

/// A machine can be given up while its vCPU waits: first the faults, then the machine.
#[test]
fn a_machine_ends_while_a_page_is_missing() {
    if !kvm() {
        return;
    }
    let m = machine(Machine::builder(), &COUNT);
    let Some((userfault, _)) = take_memory(&m) else {
        return;
    };
    m.resume().unwrap();
    assert!(fault(&userfault).is_some());
    m.stop();
    drop(userfault);
    drop(m);
}

#[test]
fn huge_pages_are_refused() {
    // As small as a huge page can be; most hosts have no pool.
    match GuestRam::new(2 * MIB, Backing::Hugetlb) {
        Ok(ram) => {
            let error = Userfault::register(Arc::new(ram)).unwrap_err();
            assert!(matches!(error, UserfaultError::Hugepages), "{error}");
        }
        Err(error) => eprintln!("NOT RUN: huge_pages_are_refused: {error}"),
    }
}
