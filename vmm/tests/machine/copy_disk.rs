//! A guest that writes to its disk all the time moves with it to a machine that has another file.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ferry_migration::options::{Compress, OnTimeout, Options, PolicyKind, Tracking};
use ferry_migration::report::Status;
use ferry_vmm::machine::Machine;
use ferry_vmm::migrate::{Arrival, Handle, Receiver, Uri, migrate};
use vm_memory::{Bytes, GuestAddress};

use crate::support::{COUNTER, kvm, progresses, read};
use crate::virtio::{HEADER, backends, disk, status, writer};

const SECTORS: u64 = 2048;

/// Sends the guest's writes all over the disk, by changing the request that it repeats; ends with
/// the last sector.
fn scatter(machine: &Machine, ended: &Mutex<bool>) {
    let at = GuestAddress(u64::from(HEADER) + 8);
    let mut sector = 1u64;
    loop {
        let guard = ended.lock().unwrap();
        if *guard {
            return;
        }
        sector = sector
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let to = (sector >> 32) % SECTORS;
        machine.ram().memory().write_obj(to, at).unwrap();
        drop(guard);
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn sectors(path: &Path) -> Vec<Vec<u8>> {
    let bytes = std::fs::read(path).unwrap();
    bytes.chunks(512).map(<[u8]>::to_vec).collect()
}

fn moves(policy: PolicyKind) {
    let file = disk();
    let all = usize::try_from(SECTORS * 512).unwrap();
    file.as_file().write_all_at(&vec![3; all], 0).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("copy.img");
    let source = Arc::new(writer(Machine::builder().devices(backends(file.path()))));
    let uri = Uri::Unix(dir.path().join("link"));
    let serial = Arc::new(|| Ok(Box::new(std::io::sink()) as _));
    let receiver = Receiver::bind_with(&uri, serial, backends(&copy), Tracking::Auto).unwrap();
    source.resume().unwrap();
    progresses(&source, COUNTER);
    let options = Options {
        policy,
        compress: Compress::None,
        copy_disk: true,
        verify: true,
        on_timeout: OnTimeout::Stop,
        timeout: Duration::from_secs(15),
        // Slow enough for the guest to write while its disk is copied.
        bandwidth: Some(20_000_000),
        ..Options::default()
    };
    let ended = Mutex::new(false);
    let report = std::thread::scope(|scope| {
        scope.spawn(|| scatter(&source, &ended));
        let report = migrate(&source, &uri, &options, &Handle::new(), &mut |_| {
            // The guest's memory must not be written by others once it stands still.
            if source.dirty_log().is_on() && !std::mem::replace(&mut *ended.lock().unwrap(), true) {
                // Its disk was sent, and the migration waits here until it has written to it again.
                progresses(&source, COUNTER);
                progresses(&source, COUNTER);
            }
        });
        *ended.lock().unwrap() = true;
        report
    });
    assert_eq!(report.status, Status::Completed, "{report:#?}");
    let disk = report.disk.unwrap();
    println!("{}: {disk:?}", policy.name());
    assert!(disk.resent > 0 && disk.total == SECTORS * 512, "{disk:?}");
    let Some(Arrival::Arrived { machine, .. }) = receiver.wait(Duration::from_secs(60)) else {
        panic!("it did not arrive");
    };
    progresses(&machine, COUNTER);
    let paused = machine.pause().unwrap();
    assert_eq!(status(&machine), 0);
    let count = read(&machine, COUNTER);
    let at = GuestAddress(u64::from(HEADER) + 8);
    let last: u64 = machine.ram().memory().read_obj(at).unwrap();
    let (then, now) = (sectors(file.path()), sectors(&copy));
    assert_eq!(then.len(), now.len());
    for (n, (then, now)) in (0..).zip(then.iter().zip(&now)) {
        // The guest goes on with the sector that it was at.
        assert!(n == last || then == now, "sector {n} differs");
    }
    let on_disk = u64::from_le_bytes(*now[usize::try_from(last).unwrap()].first_chunk().unwrap());
    assert!(
        on_disk == count || on_disk + 1 == count,
        "{on_disk} {count}"
    );
    paused.keep_paused();
}

#[test]
fn a_disk_that_is_written_all_the_time_moves_by_pre_copy() {
    if kvm() {
        moves(PolicyKind::Precopy);
    }
}

#[test]
fn a_disk_that_is_written_all_the_time_moves_by_post_copy() {
    if kvm() {
        moves(PolicyKind::Postcopy);
    }
}
