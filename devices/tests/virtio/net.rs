use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ferry_devices::net::{Backend, HEADER, MacAddress, Net, Offloads, rarp};
use ferry_devices::virtio::AnyVirtio;

use crate::driver::{DATA, Driver, eventually, memory};

const RX: usize = 0;
const TX: usize = 1;
const CONTROL: usize = 2;
const CSUM: u64 = 1;
const GUEST_CSUM: u64 = 1 << 1;
const GUEST_TSO4: u64 = 1 << 7;
const MRG_RXBUF: u64 = 1 << 15;
const ANNOUNCE: u64 = 1 << 21;
/// What read(2) says of a tap whose interface is gone, Linux on x86-64.
const EBADFD: i32 = 77;
const MAC: MacAddress = MacAddress([0x52, 0x54, 0, 1, 2, 3]);

/// One end of a wire whose other end is the test's.
struct Wire {
    socket: UnixDatagram,
    offloads: Arc<Mutex<Option<Offloads>>>,
    reads: Arc<AtomicUsize>,
    /// As a tap whose interface was deleted: always ready, and every read and write is an error.
    gone: Arc<AtomicBool>,
}

impl Backend for Wire {
    fn read(&mut self, frame: &mut [u8]) -> io::Result<usize> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        if self.gone.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(EBADFD));
        }
        self.socket.recv(frame)
    }
    fn write(&mut self, frame: &[u8]) -> io::Result<()> {
        if self.gone.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(EBADFD));
        }
        self.socket.send(frame).map(drop)
    }
    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        *self.offloads.lock().unwrap() = Some(offloads);
        Ok(())
    }
    fn readable(&self) -> io::Result<OwnedFd> {
        self.socket.try_clone().map(Into::into)
    }
}

struct Lan {
    socket: UnixDatagram,
    offloads: Arc<Mutex<Option<Offloads>>>,
    reads: Arc<AtomicUsize>,
    gone: Arc<AtomicBool>,
}

fn card() -> (Net, Lan) {
    let (socket, theirs) = UnixDatagram::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let lan = Lan {
        socket,
        offloads: Arc::default(),
        reads: Arc::default(),
        gone: Arc::default(),
    };
    let wire = Wire {
        socket: theirs,
        offloads: Arc::clone(&lan.offloads),
        reads: Arc::clone(&lan.reads),
        gone: Arc::clone(&lan.gone),
    };
    (Net::new(Box::new(wire), MAC), lan)
}

fn start(features: u64) -> (Driver<Net>, Lan) {
    let (net, lan) = card();
    (Driver::start(net, memory(), features, 16), lan)
}

impl Lan {
    fn recv(&self) -> Vec<u8> {
        let mut frame = vec![0; 0x2_0000];
        let n = self.socket.recv(&mut frame).unwrap();
        frame.truncate(n);
        frame
    }

    fn silent(&self) -> bool {
        self.socket.set_nonblocking(true).unwrap();
        let silent = self.socket.recv(&mut [0; 16]).is_err();
        self.socket.set_nonblocking(false).unwrap();
        silent
    }
}

fn frame(len: usize, seed: u8) -> Vec<u8> {
    let mut frame = vec![0; HEADER];
    frame.extend((0..len).map(|i| (i as u8).wrapping_mul(7).wrapping_add(seed)));
    frame
}

fn send(d: &mut Driver<Net>, frame: &[u8]) {
    d.put(DATA, frame);
    let len = frame.len() as u32;
    let half = len / 2;
    d.add(
        TX,
        &[(DATA, half), (DATA + u64::from(half), len - half)],
        &[],
    );
    d.kick(TX);
    d.wait(TX);
}

#[test]
fn frames_are_sent_as_they_are() {
    let (mut d, lan) = start(u64::MAX);
    for len in [1, 60, 1514, 65_000] {
        let frame = frame(len, 3);
        send(&mut d, &frame);
        assert_eq!(lan.recv(), frame);
    }
    let mut big = frame(65_000, 1);
    big[..2].copy_from_slice(&[1, 1]);
    send(&mut d, &big);
    assert_eq!(lan.recv(), big, "a segment to be cut up");
}

#[test]
fn frames_that_cannot_be_are_dropped() {
    let (mut d, lan) = start(1 << 32);
    send(&mut d, &[0; HEADER]);
    send(&mut d, &[0; 4]);
    send(&mut d, &vec![0; 70_000]);
    // Offloads that were not negotiated.
    let mut wants = frame(60, 0);
    wants[0] = 1;
    send(&mut d, &wants);
    assert!(lan.silent());
    let good = frame(60, 0);
    send(&mut d, &good);
    assert_eq!(lan.recv(), good);
}

#[test]
fn frames_arrive_in_buffers_and_wait_for_them() {
    let (mut d, lan) = start(1 << 32);
    for seed in 0..3 {
        lan.socket.send(&frame(100, seed)).unwrap();
    }
    for seed in 0..3 {
        d.add(RX, &[], &[(DATA, 12), (DATA + 0x1000, 2000)]);
        d.kick(RX);
        let (_, len) = d.wait(RX);
        assert_eq!(len, 112);
        let header = d.get(DATA, HEADER);
        assert_eq!(header[10..], [1, 0], "one buffer");
        assert_eq!(d.get(DATA + 0x1000, 100), frame(100, seed)[HEADER..]);
    }
    // One that fits in no buffer is dropped, and the buffer serves the next.
    d.add(RX, &[], &[(DATA, 200)]);
    d.kick(RX);
    lan.socket.send(&frame(1000, 9)).unwrap();
    lan.socket.send(&frame(50, 8)).unwrap();
    assert_eq!(d.wait(RX).1, 62);
    assert_eq!(d.get(DATA + 12, 50), frame(50, 8)[HEADER..]);
}

#[test]
fn a_frame_is_spread_over_merged_buffers_and_comes_whole() {
    let (mut d, lan) = start(1 << 32 | MRG_RXBUF);
    let frame = frame(3000, 5);
    let at = |n: u64| DATA + n * 0x1000;
    d.add(RX, &[], &[(at(0), 1000)]);
    d.add(RX, &[], &[(at(1), 1000)]);
    d.kick(RX);
    lan.socket.send(&frame).unwrap();
    // Too few: neither is used, nor are they lost.
    d.add(RX, &[], &[(at(2), 1000)]);
    assert!(d.take(RX).is_none());
    d.add(RX, &[], &[(at(3), 1000)]);
    d.kick(RX);
    let parts = [
        d.wait(RX).1,
        d.take(RX).unwrap().1,
        d.take(RX).unwrap().1,
        d.take(RX).unwrap().1,
    ];
    assert_eq!(parts, [1000, 1000, 1000, 12]);
    let mut got = Vec::new();
    for (n, len) in (0u64..).zip(parts) {
        got.extend(d.get(at(n), len as usize));
    }
    assert_eq!(got[10..12], [4, 0], "four buffers");
    assert_eq!(got[12..], frame[12..]);
}

#[test]
fn a_buffer_without_room_for_a_header_stops_the_device() {
    let (mut d, lan) = start(1 << 32 | MRG_RXBUF);
    d.add(RX, &[], &[(DATA, 11)]);
    lan.socket.send(&frame(100, 0)).unwrap();
    d.kick(RX);
    d.broken();
}

#[test]
fn offloads_follow_the_driver() {
    let (d, lan) = start(1 << 32 | CSUM | GUEST_CSUM | GUEST_TSO4);
    let all = Offloads {
        checksum: true,
        tso4: true,
        tso6: false,
    };
    assert_eq!(*lan.offloads.lock().unwrap(), Some(all));
    // Elsewhere too.
    let (net, there) = card();
    let d = d.migrate(|_| net);
    assert_eq!(*there.offloads.lock().unwrap(), Some(all));
    d.write(0x70, 0);
    assert_eq!(*there.offloads.lock().unwrap(), Some(Offloads::default()));
}

#[test]
fn a_card_is_announced_by_the_host_and_by_the_guest() {
    let (d, _) = start(u64::MAX);
    assert_eq!(d.config::<6>(0), MAC.0);
    assert_eq!(d.config::<2>(6), [1, 0]);
    let (net, lan) = card();
    let mut d = d.migrate(|_| net);
    d.device.reconfigure(|net| net.announce().unwrap());
    assert_eq!(lan.recv(), rarp(MAC));
    assert_eq!(
        d.config::<2>(6),
        [3, 0],
        "the guest is asked to announce itself"
    );
    assert_eq!(d.read(0x60) & 2, 2);
    // It did.
    d.put(DATA, &[3, 0]);
    d.add(CONTROL, &[(DATA, 2)], &[(DATA + 16, 1)]);
    d.kick(CONTROL);
    assert_eq!(d.wait(CONTROL).1, 1);
    assert_eq!(d.get(DATA + 16, 1), [0]);
    assert_eq!(d.config::<2>(6), [1, 0]);
    // Other commands are not understood.
    d.put(DATA, &[0, 0]);
    d.put(DATA + 16, &[9]);
    d.add(CONTROL, &[(DATA, 2), (DATA + 2, 1)], &[(DATA + 16, 1)]);
    d.kick(CONTROL);
    d.wait(CONTROL);
    assert_eq!(d.get(DATA + 16, 1), [1]);
    // A driver that cannot is not asked.
    let (d, _lan) = start(!ANNOUNCE);
    d.device.reconfigure(|net| net.announce().unwrap());
    assert_eq!(d.config::<2>(6), [1, 0]);
}

#[test]
fn buffers_move_with_the_guest_and_a_frame_in_hand_does_not() {
    let (mut d, lan) = start(1 << 32 | MRG_RXBUF);
    d.add(RX, &[], &[(DATA, 1000)]);
    d.kick(RX);
    lan.socket.send(&frame(1500, 1)).unwrap();
    eventually("the frame is taken off the wire", || {
        // It waits for a second buffer; what is behind it stays on the wire.
        lan.socket.set_nonblocking(true).unwrap();
        d.device.pause().unwrap();
        let returned = d.device.save().transport.queues[RX].returned.len();
        d.device.resume();
        returned == 1
    });
    let (net, there) = card();
    let mut d = d.migrate(|_| net);
    there.socket.send(&frame(60, 2)).unwrap();
    assert_eq!(d.wait(RX).1, 72);
    assert_eq!(d.get(DATA + 12, 60), frame(60, 2)[HEADER..]);
    assert!(d.take(RX).is_none());
}

#[test]
fn a_tap_that_is_gone_is_not_read_over_and_over_and_one_that_comes_back_is_used() {
    let (mut d, lan) = start(u64::MAX);
    let room = |d: &mut Driver<Net>| {
        d.add(RX, &[], &[(DATA + 0x8_0000, 0x1000)]);
        d.kick(RX);
    };
    room(&mut d);
    let before = lan.reads.load(Ordering::SeqCst);
    lan.gone.store(true, Ordering::SeqCst);
    // Never taken: the wire is readable from here on, as a deleted tap is.
    lan.socket.send(&frame(60, 1)).unwrap();
    eventually("the card tries", || {
        lan.reads.load(Ordering::SeqCst) > before
    });
    std::thread::sleep(Duration::from_millis(300));
    let tried = lan.reads.load(Ordering::SeqCst) - before;
    assert!(tried < 10, "{tried} reads of a tap that is gone");
    // The guest still gets its frames back, lost.
    send(&mut d, &frame(60, 2));
    lan.gone.store(false, Ordering::SeqCst);
    send(&mut d, &frame(60, 3));
    assert_eq!(lan.recv(), frame(60, 3));
    d.wait(RX);
}
