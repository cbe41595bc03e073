//! The decision on made-up links: a sender whose socket buffer drains while it codes.

use super::*;
use crate::rng::Rng;
use std::collections::VecDeque;

/// What coding costs and gives, by level.
#[derive(Clone, Copy)]
struct Guest {
    /// Microseconds for a page.
    encode: [f64; 3],
    ratio: [f64; 3],
}

impl Guest {
    /// The cheaper of the levels that make it smaller.
    const fn level(self) -> Level {
        if self.ratio[1] < 1.0 {
            Level::Patch
        } else {
            Level::Full
        }
    }
}

/// Bytes that sockets hold: what Linux's begin with, and what both sides' were seen to hold on
/// loopback. Each in two runs.
const BUFFERS: [(f64, u64); 4] = [(4e6, 1), (4e6, 2), (13e6, 3), (13e6, 4)];

const HALF: Guest = Guest {
    encode: [0.0, 1.5, 1.8],
    ratio: [1.0, 0.53, 0.53],
};
const TEXT: Guest = Guest {
    encode: [0.0, 1.0, 9.0],
    ratio: [1.0, 1.0, 0.3],
};
const NOISE: Guest = Guest {
    encode: [0.0, 1.0, 1.7],
    ratio: [1.0, 1.0, 1.0],
};

#[derive(Clone, Copy)]
struct Wire {
    /// Microseconds for a page of 4,096 bytes.
    drain: f64,
    /// Microseconds of this processor to put a page into the socket.
    copy: f64,
    /// Bytes that the socket takes before it blocks.
    buffer: f64,
    /// Microseconds for a coded page at the receiver, before it takes the next.
    decode: f64,
    /// Of what the receiver's time varies by.
    seed: u64,
}

const fn gigabit(rate: f64) -> Wire {
    Wire {
        drain: 4096.0 * 8.0 / (rate * 1e3),
        copy: 0.4,
        buffer: 4e6,
        decode: 0.0,
        seed: 1,
    }
}

/// Copying is all that it does, here and there in turns.
const LOOPBACK: Wire = Wire {
    drain: 0.0,
    copy: 1.8,
    buffer: 4e6,
    decode: 0.0,
    seed: 1,
};

/// Microseconds for so many batches of 256 pages, and how many went out at each level.
fn send(guest: Guest, wire: Wire, batches: u32, chooser: Option<&mut Chooser>) -> (f64, [u32; 3]) {
    let mut none = Chooser::new(Level::Raw, 0.0);
    let adaptive = chooser.is_some();
    let chooser = chooser.unwrap_or(&mut none);
    // What lies in the socket: when the receiver is done with it, and its pages on the wire.
    let mut queue = VecDeque::<(f64, f64)>::new();
    let (mut now, mut done, mut queued) = (0.0_f64, 0.0_f64, 0.0_f64);
    let (mut rng, mut data_channel) = (Rng::new(wire.seed), DataChannel::default());
    let mut levels = [0; 3];
    let micros = |us: f64| Duration::from_secs_f64(us / 1e6);
    for _ in 0..batches {
        let pages = 256.0;
        if adaptive && chooser.wants_sample() {
            for level in [Level::Patch, Level::Full] {
                let took = 8.0 * guest.encode[level.index()];
                let bytes = pages_bytes(8.0 * guest.ratio[level.index()]);
                chooser.sample(level, 8, bytes, micros(took));
                now += took;
            }
        }
        let level = if adaptive {
            chooser.level()
        } else {
            Level::Raw
        };
        levels[level.index()] += 1;
        let encode = pages * guest.encode[level.index()];
        let wired = pages * guest.ratio[level.index()];
        now += encode;
        let began = now;
        let decode = if level == Level::Raw {
            0.0
        } else {
            pages * wire.decode
        };
        // It takes now half, now one and a half of its usual time.
        let jitter = 0.5 + rng.unit();
        done = done.max(now) + jitter * (wired * wire.drain + decode);
        now += wired * wire.copy;
        queue.push_back((done, wired));
        queued += wired;
        let room = wire.buffer / 4096.0;
        // Blocked when the buffer is full, and woken when a third of it is free.
        let most = if queued > room {
            room * 2.0 / 3.0
        } else {
            room
        };
        while let Some((done, pages)) = queue.front()
            && (*done <= now || queued > most)
        {
            now = now.max(*done);
            queued -= pages;
            queue.pop_front();
        }
        if adaptive {
            let outcome = Outcome {
                level,
                data_channels: 1,
                pages: 256,
                bytes: pages_bytes(wired),
                encode: micros(encode),
                link: micros(now - began),
            };
            chooser.record(&mut data_channel, outcome);
        }
    }
    (now.max(done), levels)
}

/// What part of the time of raw pages a GiB takes, and how many batches went out at each level.
fn of_raw(guest: Guest, wire: Wire, start: Level) -> (f64, [u32; 3]) {
    let (raw, _) = send(guest, wire, 1024, None);
    let (auto, levels) = send(guest, wire, 1024, Some(&mut Chooser::new(start, 0.0)));
    (auto / raw, levels)
}

fn pages_bytes(pages: f64) -> u64 {
    (pages * 4096.0) as u64
}

/// 1 GiB over links from 100 Mbit/s to loopback: `auto` is never slower than nothing by more than 3
/// %.
#[test]
fn never_slower_than_nothing() {
    for guest in [HALF, TEXT, NOISE] {
        let links = [0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0].map(gigabit);
        for wire in links.into_iter().chain([LOOPBACK]) {
            let (part, levels) = of_raw(guest, wire, Level::Raw);
            assert!(
                part <= 1.03,
                "{:.2} µs a page: {part:.3}, {levels:?}",
                wire.drain
            );
        }
    }
}

/// A receiver at work, which takes `drain` microseconds for a raw page and `part` of that for a
/// coded one.
fn receiver(guest: Guest, drain: f64, part: f64, (buffer, seed): (f64, u64)) -> Wire {
    let ratio = guest.ratio[guest.level().index()];
    Wire {
        drain,
        decode: (part - ratio) * drain,
        buffer,
        seed,
        ..LOOPBACK
    }
}

/// A "link" that is a receiver at work, as loopback is to a busy machine: it takes a coded page off
/// the socket sooner, and loses more than that by decoding it. What is lost is what it takes to
/// find out: of a GiB coded throughout, a third, and half of it by who begins with coders.
#[test]
fn never_much_slower_than_nothing_at_a_busy_receiver() {
    for (guest, drains) in [
        (HALF, &[1.0, 2.0, 4.0, 8.0, 16.0][..]),
        (TEXT, &[12.0, 16.0]),
    ] {
        for (drain, buffer) in drains.iter().flat_map(|d| BUFFERS.map(|b| (*d, b))) {
            for loss in [1.05, 1.1, 1.2, 1.4] {
                let wire = receiver(guest, drain, loss, buffer);
                for (start, share) in [(Level::Raw, 3.0), (Level::Patch, 2.0)] {
                    let (part, levels) = of_raw(guest, wire, start);
                    assert!(
                        part <= 1.03 + (loss - 1.0) / share,
                        "{drain} µs a page, {loss}, {buffer:?}: {part:.3} from {start:?}, {levels:?}"
                    );
                }
            }
        }
    }
}

/// Where it gains by coded pages, a good part of that is gained, however much lies in the buffers
/// between them.
#[test]
fn a_receiver_that_gains_is_relieved() {
    for (guest, drains) in [(HALF, &[4.0, 8.0, 16.0][..]), (TEXT, &[16.0])] {
        for (drain, buffer) in drains.iter().flat_map(|d| BUFFERS.map(|b| (*d, b))) {
            let wire = receiver(guest, drain, 0.7, buffer);
            let (part, levels) = of_raw(guest, wire, Level::Raw);
            assert!(
                part <= 0.88,
                "{drain} µs a page, {buffer:?}: {part:.3}, {levels:?}"
            );
        }
    }
}

/// Where the link is what takes the time, nearly all that can be gained is gained.
#[test]
fn a_slow_link_is_relieved() {
    for (guest, best) in [(HALF, 0.53), (TEXT, 0.3)] {
        for rate in [0.1, 0.5, 1.0] {
            let (part, levels) = of_raw(guest, gigabit(rate), Level::Raw);
            assert!(part <= best + 0.05, "{rate} Gbit/s: {part:.2}, {levels:?}");
        }
    }
}

/// On loopback it stays with raw pages, whatever the pages hold; and so it does where nothing
/// compresses.
#[test]
fn a_fast_link_is_left_alone() {
    for (guest, wire) in [(TEXT, LOOPBACK), (NOISE, LOOPBACK), (NOISE, gigabit(1.0))] {
        let mut chooser = Chooser::new(Level::Raw, 0.0);
        let (_, levels) = send(guest, wire, 1024, Some(&mut chooser));
        assert_eq!(levels, [1024, 0, 0]);
    }
}

/// `adaptive` begins with coders, and leaves them where they hold the migration up.
#[test]
fn it_backs_off() {
    for guest in [TEXT, NOISE] {
        let mut chooser = Chooser::new(Level::Full, 0.0);
        let (_, levels) = send(guest, LOOPBACK, 1024, Some(&mut chooser));
        assert!(levels[0] > 900, "{levels:?}");
    }
}

/// A receiver that decodes slowly looks like a slow link, until raw pages are looked at.
#[test]
fn a_slow_receiver_is_found_out() {
    let wire = Wire {
        decode: 4.0,
        buffer: 1e6,
        drain: 0.01,
        ..LOOPBACK
    };
    let mut chooser = Chooser::new(Level::Patch, 0.0);
    let (_, levels) = send(HALF, wire, 1024, Some(&mut chooser));
    assert!(levels[0] > 800, "{levels:?}");
}

/// The link gets slow, the link gets fast again: so does the answer change.
#[test]
fn it_follows_the_link() {
    let mut chooser = Chooser::new(Level::Raw, 0.0);
    send(TEXT, LOOPBACK, 800, Some(&mut chooser));
    assert_eq!(chooser.level(), Level::Raw);
    send(TEXT, gigabit(0.5), 800, Some(&mut chooser));
    assert_eq!(chooser.level(), Level::Full);
    send(TEXT, LOOPBACK, 800, Some(&mut chooser));
    assert_eq!(chooser.level(), Level::Raw);
    send(TEXT, gigabit(1.0), 800, Some(&mut chooser));
    assert_eq!(chooser.level(), Level::Full);
}

/// The user's cap is a slow link, however fast the socket takes what is sent.
#[test]
fn a_cap_counts_as_a_slow_link() {
    let cap = 50e6;
    let mut chooser = Chooser::new(Level::Raw, 1.0 / cap);
    send(TEXT, LOOPBACK, 100, Some(&mut chooser));
    assert_eq!(chooser.level(), Level::Full);
}

/// Odd measurements decide nothing and break nothing.
#[test]
fn nothing_is_divided_by_nothing() {
    let mut chooser = Chooser::new(Level::Raw, 0.0);
    for (pages, bytes) in [(0, 0), (1, 0), (0, 1), (u64::MAX, u64::MAX)] {
        chooser.record(
            &mut DataChannel::default(),
            Outcome {
                level: Level::Raw,
                data_channels: 1,
                pages,
                bytes,
                encode: Duration::ZERO,
                link: Duration::ZERO,
            },
        );
        chooser.sample(Level::Full, pages.min(8), bytes, Duration::ZERO);
    }
    assert_eq!(chooser.level(), Level::Raw);
}

/// Pauses of the receiver do not make a fast link a slow one; a link that has become slow does.
#[test]
fn a_pause_is_not_a_slow_link() {
    let (mut chooser, mut data_channel) = (Chooser::new(Level::Raw, 0.0), DataChannel::default());
    let mut batches = |us_per_page: u64, count: u32| {
        for _ in 0..count {
            chooser.record(
                &mut data_channel,
                Outcome {
                    level: Level::Raw,
                    data_channels: 1,
                    pages: 1024,
                    bytes: 1024 * PAGE_BYTES,
                    encode: Duration::ZERO,
                    link: Duration::from_micros(1024 * us_per_page),
                },
            );
        }
        chooser.link_has_time()
    };
    assert!(!batches(3, 40));
    assert!(!batches(100, 1));
    assert!(!batches(3, 8));
    assert!(!batches(100, 1));
    assert!(batches(34, 20));
    assert!(!batches(3, 40));
}
