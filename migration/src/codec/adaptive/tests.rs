//! The decision on made-up links: a sender whose socket buffer drains while it codes.

use super::*;

/// What coding costs and gives, by level.
#[derive(Clone, Copy)]
struct Guest {
    /// Microseconds for a page.
    encode: [f64; 3],
    ratio: [f64; 3],
}

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
}

const fn gigabit(rate: f64) -> Wire {
    Wire {
        drain: 4096.0 * 8.0 / (rate * 1e3),
        copy: 0.4,
        buffer: 4e6,
        decode: 0.0,
    }
}

/// Copying is all that it does, here and there in turns.
const LOOPBACK: Wire = Wire {
    drain: 0.0,
    copy: 1.8,
    buffer: 4e6,
    decode: 0.0,
};

/// Microseconds for so many batches of 256 pages, and how many went out at each level.
fn send(guest: Guest, wire: Wire, batches: u32, chooser: Option<&mut Chooser>) -> (f64, [u32; 3]) {
    let mut none = Chooser::new(Level::Raw, 0.0);
    let adaptive = chooser.is_some();
    let chooser = chooser.unwrap_or(&mut none);
    let (mut now, mut queued_until) = (0.0_f64, 0.0_f64);
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
        queued_until = queued_until.max(now) + wired * wire.drain + decode;
        // Blocked until what is queued fits the buffer.
        let fits = if wire.drain > 0.0 {
            wire.buffer / 4096.0 * wire.drain
        } else {
            0.0
        };
        now += wired * wire.copy;
        if queued_until - fits > now {
            // It waits, and is woken when a third of the buffer is free.
            now = queued_until - fits * 2.0 / 3.0;
        }
        if adaptive {
            chooser.record(Outcome {
                level,
                pages: 256,
                bytes: pages_bytes(wired),
                encode: micros(encode),
                link: micros(now - began),
            });
        }
    }
    (now.max(queued_until), levels)
}

fn pages_bytes(pages: f64) -> u64 {
    (pages * 4096.0) as u64
}

/// 1 GiB over links from 100 Mbit/s to loopback: `auto` is never slower than nothing by more than 3 %.
#[test]
fn never_slower_than_nothing() {
    for guest in [HALF, TEXT, NOISE] {
        let links = [0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0].map(gigabit);
        for wire in links.into_iter().chain([LOOPBACK]) {
            let (raw, _) = send(guest, wire, 1024, None);
            let mut chooser = Chooser::new(Level::Raw, 0.0);
            let (auto, levels) = send(guest, wire, 1024, Some(&mut chooser));
            assert!(
                auto <= 1.03 * raw,
                "{:.2} µs a page: {auto:.0} µs in place of {raw:.0}, {levels:?}",
                wire.drain
            );
        }
    }
}

/// A "link" that is a receiver at work, as loopback is to a busy machine: it takes a coded page off the socket sooner, and loses
/// more than that by decoding it.
#[test]
fn never_slower_than_nothing_at_a_busy_receiver() {
    for drain in [1.0, 2.0, 4.0, 8.0] {
        for loss in [1.05, 1.1, 1.2, 1.4] {
            let wire = Wire {
                drain,
                decode: (loss - HALF.ratio[1]) * drain,
                ..LOOPBACK
            };
            let (raw, _) = send(HALF, wire, 1024, None);
            for start in [Level::Raw, Level::Patch] {
                let mut chooser = Chooser::new(start, 0.0);
                let (auto, levels) = send(HALF, wire, 1024, Some(&mut chooser));
                assert!(
                    auto <= 1.03 * raw,
                    "{drain} µs a page, {loss}: {:.3} from {start:?}, {levels:?}",
                    auto / raw
                );
            }
        }
    }
}

/// Where the link is what takes the time, nearly all that can be gained is gained.
#[test]
fn a_slow_link_is_relieved() {
    for (guest, best) in [(HALF, 0.53), (TEXT, 0.3)] {
        for rate in [0.1, 0.5, 1.0] {
            let (raw, _) = send(guest, gigabit(rate), 1024, None);
            let mut chooser = Chooser::new(Level::Raw, 0.0);
            let (auto, levels) = send(guest, gigabit(rate), 1024, Some(&mut chooser));
            assert!(
                auto <= (best + 0.05) * raw,
                "{rate} Gbit/s: {:.2}, {levels:?}",
                auto / raw
            );
        }
    }
}

/// On loopback it stays with raw pages, whatever the pages hold; and so it does where nothing compresses.
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
    send(TEXT, LOOPBACK, 300, Some(&mut chooser));
    assert_eq!(chooser.level(), Level::Raw);
    send(TEXT, gigabit(0.5), 300, Some(&mut chooser));
    assert_eq!(chooser.level(), Level::Full);
    send(TEXT, LOOPBACK, 300, Some(&mut chooser));
    assert_eq!(chooser.level(), Level::Raw);
    send(TEXT, gigabit(1.0), 300, Some(&mut chooser));
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
        chooser.record(Outcome {
            level: Level::Raw,
            pages,
            bytes,
            encode: Duration::ZERO,
            link: Duration::ZERO,
        });
        chooser.sample(Level::Full, pages.min(8), bytes, Duration::ZERO);
    }
    assert_eq!(chooser.level(), Level::Raw);
}

/// Pauses of the receiver do not make a fast link a slow one; a link that has become slow does.
#[test]
fn a_pause_is_not_a_slow_link() {
    let mut chooser = Chooser::new(Level::Raw, 0.0);
    let mut batches = |us_per_page: u64, count: u32| {
        for _ in 0..count {
            chooser.record(Outcome {
                level: Level::Raw,
                pages: 1024,
                bytes: 1024 * PAGE_BYTES,
                encode: Duration::ZERO,
                link: Duration::from_micros(1024 * us_per_page),
            });
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
