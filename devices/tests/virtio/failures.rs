//! A defect in a thread of a device's: its guest is told to end with a sentence, and nothing waits
//! for the thread.

use std::sync::atomic::Ordering;
use std::time::Duration;

use ferry_devices::rng::Rng;
use ferry_devices::virtio::AnyVirtio;

use crate::block::{READ, device, disk, image};
use crate::driver::{DATA, Driver, memory};

const LONG: Duration = Duration::from_secs(60);

#[test]
fn a_panic_of_a_worker_is_told() {
    let mut d = Driver::start(Rng::new(), memory(), u64::MAX, 16);
    d.memory.trap.store(DATA, Ordering::SeqCst);
    d.add(0, &[], &[(DATA, 64)]);
    d.kick(0);
    let sentence = d.failure.recv_timeout(LONG).unwrap();
    assert!(
        sentence.contains("virtio-4 panicked (a defect)"),
        "{sentence}"
    );
    // The device can still be paused, saved and dropped.
    d.device.pause().unwrap();
    d.device.save();
}

#[test]
fn a_panic_of_a_disks_thread_is_told_and_its_request_is_not_waited_for() {
    let file = image(8);
    let disk = disk(&file, false);
    let memory = memory();
    let mut d = Driver::start(device(&disk, memory.clone()), memory, u64::MAX, 64);
    d.request(0, READ, 0, 512);
    // Half of the data: the worker checks where it lies, and only the disk's thread touches it.
    let data = Driver::buffer(0) + 256;
    d.memory.trap.store(data, Ordering::SeqCst);
    d.kick(0);
    let sentence = d.failure.recv_timeout(LONG).unwrap();
    assert!(sentence.contains("disk panicked (a defect)"), "{sentence}");
    // The guest must not go on elsewhere without its answer.
    let refused = d.device.pause().unwrap_err().to_string();
    assert!(refused.contains("1 requests"), "{refused}");
}
