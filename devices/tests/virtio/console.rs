use std::io::{self, Write};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use ferry_devices::console::{Console, ConsoleState, INPUT_LIMIT};
use ferry_devices::virtio::{AnyVirtio, DeviceState, RestoreError};
use proptest::prelude::*;

use crate::driver::{DATA, Driver, eventually, memory};

const RX: usize = 0;
const TX: usize = 1;
/// `VIRTIO_CONSOLE_F_SIZE`, `_F_MULTIPORT` and `_F_EMERG_WRITE`.
const SIZE: u64 = 1 << 0;
const NOT_OFFERED: u64 = 1 << 1 | 1 << 2;

/// Takes so many bytes, and refuses the rest.
#[derive(Clone, Default)]
struct Sink(Arc<Mutex<(Vec<u8>, usize)>>);

impl Sink {
    fn with_room(room: usize) -> Self {
        Self(Arc::new(Mutex::new((Vec::new(), room))))
    }
    fn got(&self) -> Vec<u8> {
        self.0.lock().unwrap().0.clone()
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let (got, room) = &mut *self.0.lock().unwrap();
        let n = bytes.len().min(*room);
        if n == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        got.extend(&bytes[..n]);
        *room -= n;
        Ok(n)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn console(sink: &Sink) -> Console {
    Console::new(Box::new(sink.clone())).unwrap()
}

fn start(sink: &Sink) -> Driver<Console> {
    Driver::start(console(sink), memory(), u64::MAX, 8)
}

/// Types once the device is not at work; how many bytes it took.
fn types(d: &Driver<Console>, bytes: &[u8]) -> usize {
    let mut taken = None;
    eventually("it is given what is typed", || {
        taken = d.device.try_while_running(|console| console.input(bytes));
        taken.is_some()
    });
    taken.unwrap()
}

/// Resizes the terminal once the device is not at work.
fn resizes(d: &Driver<Console>, columns: u16, rows: u16) {
    eventually("it hears of a size", || {
        d.device
            .try_reconfigure(|console| console.set_size(columns, rows))
    });
}

/// The input in the next buffer that comes back.
fn reads(d: &mut Driver<Console>, at: u64) -> Vec<u8> {
    let (_, n) = d.wait(RX);
    d.get(at, n as usize)
}

fn prints(d: &mut Driver<Console>, text: &[u8]) {
    d.put(DATA, text);
    d.add(TX, &[(DATA, text.len() as u32)], &[]);
    d.kick(TX);
    assert_eq!(d.wait(TX).1, 0);
}

#[test]
fn output_arrives_whole_from_buffers_in_pieces() {
    let sink = Sink::with_room(usize::MAX);
    let mut d = start(&sink);
    assert_eq!(d.offered() & NOT_OFFERED, 0);
    d.put(DATA, b"hello, ");
    d.put(DATA + 0x1000, b"host");
    d.add(TX, &[(DATA, 7), (DATA + 0x1000, 4)], &[]);
    d.kick(TX);
    d.wait(TX);
    // More than is copied at a time.
    let long: Vec<u8> = (0..100_000u32).map(|n| (n % 251) as u8).collect();
    prints(&mut d, &long);
    assert_eq!(sink.got(), [b"hello, host", &long[..]].concat());
}

#[test]
fn output_that_is_not_taken_is_counted_and_the_guest_goes_on() {
    let sink = Sink::with_room(10);
    let console = console(&sink);
    let lost = console.lost_output();
    let mut d = Driver::start(console, memory(), u64::MAX, 8);
    prints(&mut d, b"0123456789abcdef");
    assert_eq!(sink.got(), b"0123456789");
    prints(&mut d, b"more");
    assert_eq!(lost.load(Ordering::Relaxed), 10);
    // Of one buffer a mebibyte is taken.
    sink.0.lock().unwrap().1 = usize::MAX;
    d.add(TX, &[(DATA, 3 << 20), (DATA, 3 << 20)], &[]);
    d.kick(TX);
    d.wait(TX);
    assert_eq!(sink.got().len(), 10 + (1 << 20));
    assert_eq!(lost.load(Ordering::Relaxed), 10 + (5 << 20));
}

#[test]
fn input_waits_for_buffers_and_is_bounded() {
    let sink = Sink::default();
    let mut d = start(&sink);
    assert_eq!(types(&d, b"typed"), 5);
    d.add(RX, &[], &[(DATA, 3)]);
    d.kick(RX);
    assert_eq!(reads(&mut d, DATA), b"typ");
    d.add(RX, &[], &[(DATA, 64)]);
    d.kick(RX);
    assert_eq!(reads(&mut d, DATA), b"ed");
    // A buffer that waits gets what is typed next, without a word of the driver's.
    d.add(RX, &[], &[(DATA, 64)]);
    d.kick(RX);
    assert_eq!(types(&d, b"x"), 1);
    assert_eq!(reads(&mut d, DATA), b"x");
    assert!(d.interrupts() > 0);
    assert_eq!(types(&d, &vec![1; INPUT_LIMIT + 5]), INPUT_LIMIT);
    assert_eq!(types(&d, b"x"), 0);
}

#[test]
fn what_was_typed_before_there_was_a_driver_is_for_it() {
    let sink = Sink::default();
    let mut d = Driver::plug(console(&sink), memory());
    assert_eq!(types(&d, b"early"), 5);
    d.init(u64::MAX, 8);
    d.add(RX, &[], &[(DATA, 64)]);
    d.kick(RX);
    assert_eq!(reads(&mut d, DATA), b"early");
}

#[test]
fn a_paused_console_takes_nothing() {
    let d = start(&Sink::default());
    d.device.pause().unwrap();
    let taken = d.device.try_while_running(|console| console.input(b"x"));
    assert_eq!(taken, None);
    assert!(!d.device.try_reconfigure(|console| console.set_size(80, 25)));
    let DeviceState::Console(state) = d.device.save().device else {
        panic!("another device's state");
    };
    assert_eq!(state, ConsoleState::default());
}

#[test]
fn the_size_is_told_and_travels() {
    let sink = Sink::default();
    let d = start(&sink);
    assert_eq!(d.offered() & SIZE, SIZE);
    assert_eq!(d.config::<4>(0), [0; 4]);
    let before = d.interrupts();
    resizes(&d, 132, 43);
    assert_eq!(d.config::<4>(0), [132, 0, 43, 0]);
    assert_eq!(d.interrupts(), before + 1);
    // What is no news is not told.
    resizes(&d, 132, 43);
    assert_eq!(d.interrupts(), before + 1);
    let d = d.migrate(|_| console(&sink));
    assert_eq!(d.config::<4>(0), [132, 0, 43, 0]);
}

#[test]
fn a_buffer_without_room_stops_the_device() {
    let mut d = start(&Sink::default());
    types(&d, b"x");
    d.add(RX, &[(DATA, 8)], &[]);
    d.kick(RX);
    d.broken();
}

#[test]
fn an_impossible_state_is_refused() {
    let d = start(&Sink::default());
    d.device.pause().unwrap();
    let mut state = d.device.save();
    state.device = DeviceState::Console(ConsoleState {
        input: vec![0; INPUT_LIMIT + 1],
        ..ConsoleState::default()
    });
    let error = d.device.restore(&state).unwrap_err();
    assert!(matches!(error, RestoreError::Registers { .. }), "{error}");
}

#[derive(Debug, Clone)]
enum Step {
    Type(u16),
    /// A buffer for input.
    Give(u8),
    Print(u8),
    Pause,
    Move,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (1..1000u16).prop_map(Step::Type),
        4 => (1..=255u8).prop_map(Step::Give),
        3 => (1..=255u8).prop_map(Step::Print),
        1 => Just(Step::Pause),
        1 => Just(Step::Move),
    ]
}

/// Bytes that count, so that one that is lost, doubled or out of turn is seen.
fn count(from: &mut u32, n: usize) -> Vec<u8> {
    (0..n)
        .map(|_| {
            *from += 1;
            (*from % 251) as u8
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is typed and printed, and wherever the guest is when, all of it arrives in order.
    #[test]
    fn nothing_is_lost_or_doubled_by_a_move(steps in prop::collection::vec(step(), 1..40)) {
        let sink = Sink::with_room(usize::MAX);
        let mut d = start(&sink);
        let (mut typed, mut printed) = (0, 0);
        let (mut sent, mut told, mut read) = (Vec::new(), Vec::new(), Vec::new());
        let mut buffers = 0u8;
        for step in steps {
            match step {
                Step::Type(n) => {
                    let bytes = count(&mut typed, n.into());
                    prop_assert_eq!(types(&d, &bytes), bytes.len());
                    sent.extend(bytes);
                }
                Step::Give(n) if buffers < 8 => {
                    let at = DATA + 0x1_0000 + u64::from(buffers) * 0x1000;
                    d.add(RX, &[], &[(at, n.into())]);
                    d.kick(RX);
                    buffers += 1;
                }
                Step::Give(_) => {}
                Step::Print(n) => {
                    let text = count(&mut printed, n.into());
                    prints(&mut d, &text);
                    told.extend(text);
                }
                Step::Pause => {
                    d.device.pause().unwrap();
                    d.device.resume();
                }
                Step::Move => d = d.migrate(|_| console(&sink)),
            }
            // The buffers that came back are read in order, once all have: the next begin anew.
            if buffers == 8 {
                let bytes = count(&mut typed, 2048);
                prop_assert_eq!(types(&d, &bytes), bytes.len());
                sent.extend(bytes);
                for n in 0..8 {
                    read.extend(reads(&mut d, DATA + 0x1_0000 + n * 0x1000));
                }
                buffers = 0;
            }
        }
        prop_assert_eq!(sink.got(), told);
        // What has not been read lies in buffers, in order, or in the state.
        for n in 0..buffers {
            let Some((_, len)) = d.take(RX) else { break };
            read.extend(d.get(DATA + 0x1_0000 + u64::from(n) * 0x1000, len as usize));
        }
        prop_assert!(sent.starts_with(&read), "what was read is not what was typed");
    }
}
