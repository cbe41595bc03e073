//! A driver that breaks every rule: the device stops and says so, and works again after a reset.

use ferry_devices::bus::BusDevice;
use ferry_devices::rng::Rng;
use ferry_devices::virtio::{AnyVirtio, QueueState, VirtioState};

use crate::block::{READ, device, disk, image};
use crate::driver::{
    ACKNOWLEDGE, DATA, DRIVER, DRIVER_OK, Driver, FEATURES_OK, NEEDS_RESET, RAM, eventually, memory,
};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A descriptor: address, length, flags, next.
type Descriptor = (u64, u32, u16, u16);

fn rng() -> Driver<Rng> {
    Driver::start(Rng::new(), memory(), u64::MAX, 8)
}

fn works(d: &mut Driver<Rng>) {
    d.put(DATA, &[0; 32]);
    d.add(0, &[], &[(DATA, 32)]);
    d.kick(0);
    assert_eq!(d.wait(0).1, 32);
    assert_ne!(d.get(DATA, 32), [0; 32]);
}

/// Publishes `head` with these descriptors in the table; the device must give up.
fn breaks(what: &str, descriptors: &[Descriptor], head: u16) {
    let mut d = rng();
    let ring = &mut d.rings[0];
    for (index, (address, len, flags, next)) in (0u16..).zip(descriptors) {
        ring.write_descriptor(&d.memory, index, *address, *len, *flags, *next);
    }
    ring.publish(&d.memory, head);
    d.kick(0);
    eventually(what, || d.status() & NEEDS_RESET != 0);
    assert!(d.take(0).is_none(), "{what}: nothing is given back");
    assert!(d.interrupts() > 0, "{what}: the driver is told");
    // It stays so until a reset.
    d.kick(0);
    d.write(0x70, 15);
    assert!(d.status() & NEEDS_RESET != 0);
    d.init(u64::MAX, 8);
    assert_eq!(d.status() & NEEDS_RESET, 0);
    works(&mut d);
}

#[test]
fn chains_that_cannot_be_stop_the_device() {
    breaks("a loop of one", &[(DATA, 1, WRITE | NEXT, 0)], 0);
    breaks(
        "a loop of two",
        &[(DATA, 1, WRITE | NEXT, 1), (DATA, 1, WRITE | NEXT, 0)],
        0,
    );
    breaks("a next past the table", &[(DATA, 1, WRITE | NEXT, 8)], 0);
    breaks(
        "a next far past it",
        &[(DATA, 1, WRITE | NEXT, u16::MAX)],
        0,
    );
    breaks("a head past the table", &[], 8);
    breaks("a head far past it", &[], u16::MAX);
    breaks("an address past RAM", &[(RAM, 1, WRITE, 0)], 0);
    breaks("the last address", &[(u64::MAX, 1, WRITE, 0)], 0);
    breaks("a length past RAM", &[(RAM - 16, 17, WRITE, 0)], 0);
    breaks("an absurd length", &[(DATA, u32::MAX, WRITE, 0)], 0);
    breaks("a wrap", &[(u64::MAX - 8, 32, WRITE, 0)], 0);
    breaks(
        "a readable buffer after a writable one",
        &[(DATA, 1, WRITE | NEXT, 1), (DATA, 1, 0, 0)],
        0,
    );
    breaks("nothing to write to", &[(DATA, 16, 0, 0)], 0);
    breaks("an empty buffer", &[(DATA, 0, WRITE, 0)], 0);
}

#[test]
fn indirect_tables_that_cannot_be_stop_the_device() {
    breaks("no table", &[(DATA, 0, INDIRECT, 0)], 0);
    breaks("half a descriptor", &[(DATA, 24, INDIRECT, 0)], 0);
    breaks("a huge table", &[(DATA, 16 * 1025, INDIRECT, 0)], 0);
    breaks("a table past RAM", &[(RAM - 16, 32, INDIRECT, 0)], 0);
    breaks(
        "a table at the end of all",
        &[(u64::MAX - 15, 16, INDIRECT, 0)],
        0,
    );
    // What is in the ring's own table from its second descriptor on serves as the indirect one.
    let inside = |descriptor| {
        let table = Driver::start(Rng::new(), memory(), 0, 8).rings[0].descriptors();
        [(table + 16, 16, INDIRECT, 0), descriptor]
    };
    breaks("a table in a table", &inside((DATA, 16, INDIRECT, 0)), 0);
    breaks("a loop in a table", &inside((DATA, 1, WRITE | NEXT, 0)), 0);
    breaks(
        "a next past a table",
        &inside((DATA, 1, WRITE | NEXT, 1)),
        0,
    );
}

#[test]
fn a_good_indirect_table_works() {
    let mut d = rng();
    let ring = &mut d.rings[0];
    let table = ring.descriptors() + 16;
    ring.write_descriptor(&d.memory, 0, table, 32, INDIRECT, 0);
    ring.write_descriptor(&d.memory, 1, DATA, 8, WRITE | NEXT, 1);
    ring.write_descriptor(&d.memory, 2, DATA + 64, 8, WRITE, 0);
    ring.chains.insert(0, vec![]);
    ring.publish(&d.memory, 0);
    d.kick(0);
    assert_eq!(d.wait(0), (0, 16));
    assert_ne!(d.get(DATA, 8), [0; 8]);
    assert_eq!(d.get(DATA + 8, 56), [0; 56]);
    assert_ne!(d.get(DATA + 64, 8), [0; 8]);
}

#[test]
fn an_index_that_runs_away_stops_the_device() {
    for ahead in [9, 100, 0x8000, u16::MAX] {
        let d = rng();
        d.rings[0].set_index(&d.memory, ahead);
        d.kick(0);
        d.broken();
    }
}

#[test]
fn more_requests_than_the_queue_holds_are_refused() {
    // As fast as it can, the driver makes one chain available again and again. However many of them
    // the device has at a time, it must not be more than the queue holds, or the driver could have
    // it keep any number.
    let file = image(4096);
    let disk = disk(&file, false);
    let memory = memory();
    let mut d = Driver::start(device(&disk, memory.clone()), memory, u64::MAX, 4);
    let head = d.request(0, READ, 0, 4096);
    let mut published = 1u16;
    for _ in 0..200 {
        d.rings[0].chains.insert(head, vec![]);
        let used: u16 = {
            use vm_memory::{Bytes, GuestAddress};
            d.memory
                .read_obj(GuestAddress(d.rings[0].used() + 2))
                .unwrap()
        };
        if published.wrapping_sub(used) < 4 {
            let memory = d.memory.clone();
            d.rings[0].publish(&memory, head);
            published += 1;
        }
        d.kick(0);
    }
    d.device.pause().unwrap();
    let state = d.device.save();
    assert!(state.transport.queues[0].returned.len() <= 4);
}

#[test]
fn queues_that_cannot_be_stop_the_device() {
    let set_up = |writes: &[(u64, u32)]| {
        let d = Driver::plug(Rng::new(), memory());
        for status in [0, ACKNOWLEDGE, ACKNOWLEDGE | DRIVER] {
            d.write(0x70, status);
        }
        d.accept(1 << 32);
        d.write(0x70, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        for (register, value) in [
            (0x30, 0),
            (0x38, 8),
            (0x80, 0x1000),
            (0x90, 0x2000),
            (0xa0, 0x3000),
        ] {
            d.write(register, value);
        }
        for (register, value) in writes {
            d.write(*register, *value);
        }
        d.write(0x44, 1);
        d.write(0x70, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        d
    };
    assert_eq!(set_up(&[]).status() & NEEDS_RESET, 0);
    let ram = RAM as u32;
    for wrong in [
        (0x38, 0),
        (0x38, 3),
        (0x38, 128),
        (0x38, 0x1_0000),
        (0x38, u32::MAX),
        (0x80, 0x1008),
        (0x90, 0x2001),
        (0xa0, 0x3002),
        (0x80, ram),
        (0x80, ram - 16),
        (0x90, ram - 20),
        (0xa0, ram - 64),
        (0x84, 1),
        (0x94, u32::MAX),
        (0xa4, u32::MAX),
    ] {
        let d = set_up(&[wrong]);
        assert!(d.status() & NEEDS_RESET != 0, "{wrong:x?}");
        d.kick(0);
    }
}

#[test]
fn features_are_negotiated_or_refused() {
    let d = Driver::plug(Rng::new(), memory());
    let try_features = |features: u64| {
        for status in [0, ACKNOWLEDGE, ACKNOWLEDGE | DRIVER] {
            d.write(0x70, status);
        }
        d.accept(features);
        d.write(0x70, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        d.status() & FEATURES_OK != 0
    };
    assert!(try_features(d.offered()));
    assert!(try_features(1 << 32));
    assert!(!try_features(0), "a legacy driver");
    assert!(!try_features(1 << 32 | 1 << 5), "not offered");
    assert!(!try_features(u64::MAX));
    // And no way around it.
    d.write(0x70, ACKNOWLEDGE | DRIVER | DRIVER_OK);
    assert_eq!(d.status() & DRIVER_OK, 0);
    // Features are fixed once accepted.
    assert!(try_features(1 << 32));
    d.accept(u64::MAX);
    assert_eq!(d.device.save().transport.driver_features, 1 << 32);
    // Without DRIVER nothing can be accepted.
    d.write(0x70, 0);
    d.write(0x70, FEATURES_OK);
    assert_eq!(d.status() & FEATURES_OK, 0);
}

#[test]
fn accesses_of_odd_widths_do_nothing() {
    let file = image(64);
    let memory = memory();
    let d = Driver::start(
        device(&disk(&file, false), memory.clone()),
        memory,
        u64::MAX,
        8,
    );
    let before = d.device.save();
    let mut port = d.device.port();
    for offset in 0..0x110u64 {
        for width in [1, 2, 3, 4, 5, 8] {
            let mut data = vec![0xff; width];
            port.read(offset, &mut data);
            let register = offset < 0x100 && (width != 4 || offset % 4 != 0);
            assert!(
                !register || data.iter().all(|b| *b == 0),
                "{offset:#x} {width}"
            );
            // Nor does a write change anything, but for a reset, which is a whole one.
            if register || offset >= 0x100 {
                port.write(offset, &vec![0xff; width]);
            }
        }
    }
    assert_eq!(d.device.save(), before);
    // The configuration is bytes: any width, also past its end.
    assert_eq!(d.config::<1>(0), [64]);
    assert_eq!(d.config::<2>(20), [0, 2]);
    assert_eq!(d.config::<8>(0), 64u64.to_le_bytes());
    assert_eq!(d.config::<8>(56), [1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(d.config::<4>(0xeff), [0; 4]);
    let mut data = [0xff; 4];
    port.read(u64::MAX, &mut data);
    port.write(u64::MAX, &data);
}

#[test]
fn queues_that_are_not_there_are_not_there() {
    let mut d = rng();
    for queue in [1, 2, 1000, u32::MAX] {
        d.write(0x30, queue);
        assert_eq!((d.read(0x34), d.read(0x44)), (0, 0));
        for register in [0x38, 0x44, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4] {
            d.write(register, 1);
        }
        d.write(0x50, queue);
    }
    works(&mut d);
    // Nor may a queue be changed under a driver that is ready.
    d.write(0x30, 0);
    let before = d.device.save();
    for register in [0x38, 0x44, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4] {
        d.write(register, 16);
    }
    assert_eq!(d.device.save(), before);
    // Bits of the status are only added.
    d.write(0x70, ACKNOWLEDGE);
    assert_eq!(d.device.save(), before);
    works(&mut d);
    // A notification by the bus works like one by an eventfd.
    d.add(0, &[], &[(DATA, 8)]);
    d.write(0x50, 0);
    d.wait(0);
}

#[test]
fn notifications_before_their_time_do_nothing() {
    let mut d = Driver::plug(Rng::new(), memory());
    d.kick(0);
    d.write(0x50, 0);
    d.write(0x70, ACKNOWLEDGE);
    d.kick(0);
    assert_eq!(d.interrupts(), 0);
    d.init(u64::MAX, 8);
    works(&mut d);
}

#[test]
fn event_idx_and_flags_decide_about_interrupts() {
    for features in [u64::MAX, 1 << 32] {
        let mut d = Driver::start(Rng::new(), memory(), features, 8);
        let flags = d.rings[0].available();
        // Wanted at the third buffer from here; without EVENT_IDX: never.
        d.rings[0].set_used_event(&d.memory, 2);
        d.put(flags, &1u16.to_le_bytes());
        let mut seen = Vec::new();
        for _ in 0..5 {
            d.add(0, &[], &[(DATA, 8)]);
            d.kick(0);
            d.wait(0);
            // The interrupt, if any, is raised after the buffer is used, with the lock held.
            d.device.pause().unwrap();
            seen.push(d.interrupts());
            d.device.resume();
        }
        let event_idx = features == u64::MAX;
        let wanted = if event_idx { [0, 0, 1, 1, 1] } else { [0; 5] };
        assert_eq!(seen, wanted);
        if event_idx {
            assert_eq!(d.read(0x60), 1);
            d.write(0x64, 1);
            assert_eq!(d.read(0x60), 0);
        }
    }
}

#[test]
fn states_that_cannot_be_are_refused() {
    let d = rng();
    d.device.pause().unwrap();
    let good = d.device.save();
    d.device.restore(&good).unwrap();
    let queue = good.transport.queues[0].clone();
    let with_queue = |change: fn(&mut QueueState)| {
        let mut state = good.clone();
        change(&mut state.transport.queues[0]);
        state
    };
    let with = |change: fn(&mut VirtioState)| {
        let mut state = good.clone();
        change(&mut state);
        state
    };
    let bad = [
        with_queue(|q| q.size = 0),
        with_queue(|q| q.size = 3),
        with_queue(|q| q.size = 1024),
        with_queue(|q| q.descriptors = 1),
        with_queue(|q| q.available = u64::MAX - 1),
        with_queue(|q| q.used = RAM),
        with_queue(|q| q.returned = vec![8]),
        with_queue(|q| q.returned = vec![0; 9]),
        with(|s| s.transport.queues.clear()),
        with(|s| s.transport.queues.push(s.transport.queues[0].clone())),
        with(|s| s.transport.status |= 1 << 20),
        with(|s| s.transport.driver_features |= 1 << 50),
    ];
    for state in bad {
        assert!(d.device.restore(&state).is_err(), "{state:?}");
        // It is as after a reset, and can be restored yet.
        assert_eq!(d.device.save().transport.status, 0);
    }
    let file = image(8);
    let memory = memory();
    let other = Driver::plug(device(&disk(&file, false), memory.clone()), memory);
    other.device.pause().unwrap();
    let error = other.device.restore(&good).unwrap_err();
    assert!(
        error.to_string().contains("random number generator"),
        "{error}"
    );
    let bigger = image(16);
    let memory = crate::driver::memory();
    let big = Driver::plug(device(&disk(&bigger, false), memory.clone()), memory);
    big.device.pause().unwrap();
    let error = other
        .device
        .restore(&big.device.save())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("16 sectors") && error.contains("has 8"),
        "{error}"
    );
    d.device.restore(&good).unwrap();
    assert_eq!(d.device.save().transport.queues[0], queue);
}

/// Those of a driver that is not done yet, too: it would go on with what the device does not have.
#[test]
fn features_that_were_agreed_on_and_are_not_offered_are_refused() {
    let d = rng();
    d.device.pause().unwrap();
    let mut state = d.device.save();
    state.transport.driver_features |= 1 << 5;
    let (agreed, ready) = (ACKNOWLEDGE | DRIVER | FEATURES_OK, DRIVER_OK);
    for (status, taken) in [
        (ACKNOWLEDGE | DRIVER, true),
        (agreed, false),
        (agreed | ready, false),
        (agreed | ready | NEEDS_RESET, false),
    ] {
        state.transport.status = status;
        assert_eq!(d.device.restore(&state).is_ok(), taken, "{status:#x}");
    }
    // Features could still be written to a device that works.
    state.transport.driver_features = 1 << 32;
    state.transport.status = ACKNOWLEDGE | DRIVER | ready;
    let error = d.device.restore(&state).unwrap_err().to_string();
    assert!(error.contains("impossible status"), "{error}");
}
