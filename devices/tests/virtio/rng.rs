use ferry_devices::rng::Rng;

use crate::driver::{DATA, Driver, memory};

#[test]
fn buffers_are_filled_with_bytes_that_differ() {
    let mut d = Driver::start(Rng::new(), memory(), u64::MAX, 8);
    d.add(0, &[], &[(DATA, 16), (DATA + 16, 16)]);
    // More than is given at once.
    d.add(0, &[], &[(DATA + 0x1000, 0x2_0000)]);
    d.kick(0);
    assert_eq!(d.wait(0).1, 32);
    assert_eq!(d.wait(0).1, 0x1_0000);
    let (a, b) = (d.get(DATA, 16), d.get(DATA + 16, 16));
    assert_ne!(a, b);
    assert_ne!(a, [0; 16]);
    assert_eq!(d.get(DATA + 32, 0x1000 - 32), vec![0; 0x1000 - 32]);
    assert_eq!(d.get(DATA + 0x1_1000, 0x1000), vec![0; 0x1000]);
}

#[test]
fn a_request_of_a_paused_guest_is_answered_elsewhere() {
    let mut d = Driver::start(Rng::new(), memory(), u64::MAX, 8);
    use ferry_devices::virtio::AnyVirtio;
    d.device.pause().unwrap();
    d.add(0, &[], &[(DATA, 16)]);
    // The notification is lost with the source.
    d.kick(0);
    let mut d = d.migrate(|_| Rng::new());
    assert_eq!(d.wait(0).1, 16);
    assert_ne!(d.get(DATA, 16), [0; 16]);
    assert!(d.interrupts() > 0);
}

#[test]
fn an_interrupt_that_was_on_its_way_is_raised_again() {
    let mut d = Driver::start(Rng::new(), memory(), 1 << 32, 8);
    d.add(0, &[], &[(DATA, 16)]);
    d.kick(0);
    d.wait(0);
    let d = d.migrate(|_| Rng::new());
    assert!(d.interrupts() > 0);
    assert_eq!(d.read(0x60), 1);
    d.write(0x64, 1);
    let d = d.migrate(|_| Rng::new());
    assert_eq!(d.interrupts(), 0);
}
