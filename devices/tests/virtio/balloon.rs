use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};

use ferry_devices::balloon::auto::Settings;
use ferry_devices::balloon::{Balloon, FreePages};
use ferry_devices::virtio::{AnyVirtio, DeviceState};

use crate::driver::{DATA, Driver, RAM, eventually, memory};

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATISTICS: usize = 2;
const REPORTING: usize = 3;
const STATS_VQ: u64 = 1 << 1;
const PAGE_REPORTING: u64 = 1 << 5;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    In(u64, u64),
    Out(u64, u64),
    Free(u64, u64),
}

#[derive(Default)]
struct Pages(Mutex<Vec<Event>>);

impl Pages {
    fn take(&self) -> Vec<Event> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl FreePages for Pages {
    fn inflated(&self, first: u64, count: u64) {
        self.0.lock().unwrap().push(Event::In(first, count));
    }
    fn deflated(&self, first: u64, count: u64) {
        self.0.lock().unwrap().push(Event::Out(first, count));
    }
    fn reported(&self, first: u64, count: u64) {
        self.0.lock().unwrap().push(Event::Free(first, count));
    }
}

fn start(features: u64) -> (Driver<Balloon>, Arc<Pages>) {
    let pages = Arc::new(Pages::default());
    let balloon = Balloon::new(Arc::clone(&pages) as _);
    (Driver::start(balloon, memory(), features, 16), pages)
}

fn numbers(d: &mut Driver<Balloon>, queue: usize, numbers: &[u32]) {
    let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
    d.put(DATA, &bytes);
    d.add(queue, &[(DATA, bytes.len() as u32)], &[]);
    d.kick(queue);
}

#[test]
fn pages_go_in_and_out_in_runs() {
    let (mut d, pages) = start(u64::MAX);
    numbers(&mut d, INFLATE, &[7, 5, 6, 5, 100, 2]);
    d.wait(INFLATE);
    assert_eq!(
        pages.take(),
        [Event::In(2, 1), Event::In(5, 3), Event::In(100, 1)]
    );
    numbers(&mut d, DEFLATE, &[6, 5]);
    d.wait(DEFLATE);
    assert_eq!(pages.take(), [Event::Out(5, 2)]);
    // As many numbers as are taken at once, of each page twice; and one more.
    let many: Vec<u32> = (0..4096).map(|n| n % 2048).collect();
    numbers(&mut d, INFLATE, &many);
    d.wait(INFLATE);
    assert_eq!(pages.take(), [Event::In(0, 2048)]);
    // More lists than are worked off in one turn.
    d.put(DATA, &9u32.to_le_bytes());
    for _ in 0..16 {
        d.add(INFLATE, &[(DATA, 4)], &[]);
    }
    d.kick(INFLATE);
    for _ in 0..16 {
        d.wait(INFLATE);
    }
    assert_eq!(pages.take(), [Event::In(9, 1); 16]);
    numbers(&mut d, INFLATE, &vec![1; 4097]);
    d.broken();
    assert_eq!(pages.take(), []);
}

#[test]
fn pages_that_are_not_ram_stop_the_device() {
    for bad in [(RAM / 4096) as u32, u32::MAX] {
        let (mut d, pages) = start(u64::MAX);
        numbers(&mut d, INFLATE, &[bad]);
        d.broken();
        assert_eq!(pages.take(), []);
    }
}

#[test]
fn the_target_is_told_and_what_the_driver_says_is_kept() {
    let (d, _) = start(u64::MAX);
    let (interrupts, generation) = (d.interrupts(), d.read(0xfc));
    d.device.reconfigure(|b| b.set_target(300));
    assert_eq!(d.interrupts(), interrupts + 1);
    assert_ne!(d.read(0xfc), generation);
    assert_eq!(d.read(0x60) & 2, 2);
    assert_eq!(u32::from_le_bytes(d.config(0)), 300);
    d.write(0x104, 250);
    // The target is not the driver's.
    d.write(0x100, 1);
    assert_eq!(d.config::<8>(0), [44, 1, 0, 0, 250, 0, 0, 0]);
    assert_eq!(d.device.with(|b| (b.target(), b.actual())), (300, 250));
    d.write(0x70, 0);
    assert_eq!(d.device.with(|b| (b.target(), b.actual())), (300, 0));
}

#[test]
fn free_pages_are_reported_whole() {
    let (mut d, pages) = start(u64::MAX);
    d.add(
        REPORTING,
        &[],
        &[(0x10_0000, 0x4000), (0x20_0800, 0x1800), (0x30_0800, 0x900)],
    );
    d.kick(REPORTING);
    d.wait(REPORTING);
    assert_eq!(pages.take(), [Event::Free(0x100, 4), Event::Free(0x201, 1)]);
}

/// Pages that take their time to go.
struct Slow {
    begun: AtomicBool,
    go: Mutex<mpsc::Receiver<()>>,
}

impl FreePages for Slow {
    fn inflated(&self, _: u64, _: u64) {}
    fn deflated(&self, _: u64, _: u64) {}
    fn reported(&self, _: u64, _: u64) {
        self.begun.store(true, Ordering::SeqCst);
        self.go.lock().unwrap().recv().unwrap();
    }
}

/// The guest may use a page again once it has its report back: by then it must be gone, and not go
/// later.
#[test]
fn a_report_comes_back_after_its_pages_have_gone() {
    let (sender, go) = mpsc::channel();
    let pages = Arc::new(Slow {
        begun: AtomicBool::new(false),
        go: Mutex::new(go),
    });
    let balloon = Balloon::new(Arc::clone(&pages) as _);
    let mut d = Driver::start(balloon, memory(), u64::MAX, 16);
    d.add(REPORTING, &[], &[(0x10_0000, 0x4000)]);
    d.kick(REPORTING);
    eventually("the pages go", || pages.begun.load(Ordering::SeqCst));
    assert!(d.take(REPORTING).is_none());
    sender.send(()).unwrap();
    d.wait(REPORTING);
}

/// In the pause nothing goes: a report that is on its way moves, and is dealt with where the guest
/// runs.
#[test]
fn a_report_in_the_pause_moves_with_the_guest() {
    let (mut d, pages) = start(u64::MAX);
    d.device.pause().unwrap();
    d.add(REPORTING, &[], &[(0x10_0000, 0x4000)]);
    d.kick(REPORTING);
    assert!(d.take(REPORTING).is_none());
    let there = Arc::new(Pages::default());
    let mut d = d.migrate(|_| Balloon::new(Arc::clone(&there) as _));
    d.wait(REPORTING);
    assert_eq!(there.take(), [Event::Free(0x100, 4)]);
    assert_eq!(pages.take(), []);
}

#[test]
fn queues_are_numbered_without_those_that_the_driver_left_out() {
    let (mut d, pages) = start(PAGE_REPORTING);
    d.add(2, &[], &[(0x10_0000, 0x1000)]);
    d.kick(2);
    d.wait(2);
    assert_eq!(pages.take(), [Event::Free(0x100, 1)]);
    let (mut d, pages) = start(STATS_VQ);
    d.add(3, &[], &[(0x10_0000, 0x1000)]);
    d.kick(3);
    numbers(&mut d, INFLATE, &[1]);
    d.wait(INFLATE);
    assert!(d.take(3).is_none());
    assert_eq!(pages.take(), [Event::In(1, 1)]);
}

fn statistics(d: &mut Driver<Balloon>, free: u64) {
    let mut bytes = Vec::new();
    for (tag, value) in [(4u16, free), (5, 1 << 30), (10, 3), (11, 4), (99, 5)] {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(value.to_le_bytes());
    }
    // Half an entry at the end is nothing.
    bytes.extend([6, 0, 1]);
    d.put(DATA, &bytes);
    d.add(STATISTICS, &[(DATA, bytes.len() as u32)], &[]);
    d.kick(STATISTICS);
}

fn free_memory(d: &Driver<Balloon>) -> Option<u64> {
    d.device
        .with(|b| b.statistics().and_then(|s| s.free_memory))
}

#[test]
fn statistics_are_asked_for_and_move_with_the_guest() {
    let (mut d, _) = start(u64::MAX);
    assert_eq!(d.device.with_queues(Balloon::ask_statistics), Some(false));
    statistics(&mut d, 1000);
    eventually("the statistics come", || free_memory(&d) == Some(1000));
    assert_eq!(
        d.device.with(|b| b.statistics().unwrap().available_memory),
        None
    );
    let said = d.device.with(|b| b.statistics().cloned().unwrap());
    assert_eq!((said.oom_kills, said.allocation_stalls), (Some(3), Some(4)));
    assert_eq!(d.device.with(|b| b.told().unwrap().times), 1);
    assert!(d.take(STATISTICS).is_none(), "the buffer is kept");
    assert_eq!(d.device.with_queues(Balloon::ask_statistics), Some(true));
    d.wait(STATISTICS);
    assert_eq!(d.device.with_queues(Balloon::ask_statistics), Some(false));
    statistics(&mut d, 2000);
    eventually("newer ones come", || free_memory(&d) == Some(2000));
    // The buffer that the device keeps goes back into its queue, for the device after a resume.
    d.device.pause().unwrap();
    let state = d.device.save();
    assert_eq!(state.transport.queues[STATISTICS].returned.len(), 1);
    assert_eq!(d.device.with_queues(Balloon::ask_statistics), None);
    d.device.resume();
    eventually("it is kept again", || {
        d.device.with_queues(Balloon::ask_statistics) == Some(true)
    });
    d.wait(STATISTICS);
    statistics(&mut d, 3000);
    eventually("the newest come", || free_memory(&d) == Some(3000));
    let pages = Arc::new(Pages::default());
    let mut d = d.migrate_paused(|_| Balloon::new(pages));
    assert_eq!(free_memory(&d), Some(3000));
    // When that was said is the other host's to know.
    assert_eq!(d.device.with(|b| b.told()), None);
    d.device.resume();
    eventually("the buffer has moved too", || {
        d.device.with_queues(Balloon::ask_statistics) == Some(true)
    });
    d.wait(STATISTICS);
}

#[test]
fn the_size_moves_with_the_guest() {
    let (d, _) = start(u64::MAX);
    d.device.reconfigure(|b| b.set_target(10));
    let auto = Some(Settings::for_ram(1 << 30));
    d.device.with(|b| b.set_auto(auto));
    d.write(0x104, 7);
    let d = d.migrate(|_| Balloon::new(Arc::new(Pages::default())));
    assert_eq!(d.device.with(|b| b.auto()), auto);
    assert_eq!(d.config::<8>(0), [10, 0, 0, 0, 7, 0, 0, 0]);
    d.device.pause().unwrap();
    assert!(matches!(d.device.save().device, DeviceState::Balloon(s) if s.actual == 7));
}
